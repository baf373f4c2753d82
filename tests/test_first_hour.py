"""README's and the documentation's commands, from the wheel, in a fresh environment and an empty folder."""

import csv
import itertools
import json
import os
import re
import resource
import shlex
import site
import subprocess
import sys
import venv
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.request import urlopen

import av
import numpy as np
import pytest

from discovla.config import packaged_configs, read_values
from discovla.data.manifest import read_manifest
from discovla.drawn_world.synthetic import WorldSizes, draw_world
from tests.data.captions.server import captions_server

ROOT = Path(__file__).parents[1]
CLIPS = 60
PARTS = 4  # clips of one real video, at most
BY_MAKE = ["git clone ... && cd discovla", "make train", "make test"]  # .ci/run runs them on a checkout
# words added to a command, small enough for a CPU, and without a download: the drawn CLIP for OpenAI's
SMALL = {
    "train": ["model.pretrained=drawn", "steps=2", "data.workers=0", "engine.device=cpu"],
    "doctor": ["--workers", "1"],
    "shard": ["--workers", "1", "--size", "64"],
    "caption": ["--workers", "1"],
}


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """Return the `bin` folder of a new environment with the wheel, beside the libraries of this one."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    for name in files.decode().split("\0"):
        if name and (ROOT / name).is_file() and not name.startswith(("tests/", "benchmarks/")):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "-q"]
    words = ["wheel", str(source), "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([*pip, *words], check=True, env=environment(DISCOVLA_CUDA="0"))
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "env", with_pip=False)
    words = ["--python", folder / "env", "install", "--no-deps", "--no-index", wheel]
    subprocess.run([*pip, *words], check=True, env=environment())
    # a line of a .pth file adds a folder without its own .pth files, so without an editable discovla
    (packages,) = folder.glob("env/lib/python3*/site-packages")
    (packages / "libraries.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    return folder / "env/bin"


def environment(**extra: str) -> dict[str, str]:
    """Return the environment of a new shell, without the checkout."""
    own = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return own | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} | extra


def commands(document: str) -> list[str]:
    """Return the commands of a document: its indented lines outside of fenced blocks.

    Those of README's section on search are left out, see `search_commands`.
    """
    text = re.sub(r"^```.*?^```", "", (ROOT / document).read_text(), flags=re.M | re.S)
    text = re.sub(r"^## Search\n.*?^## ", "## ", text, flags=re.M | re.S)
    return [line.split("  #")[0].strip() for line in text.splitlines() if line.startswith("    ")]


def search_commands() -> list[str]:
    """Return the commands of README's section on search, after the installation."""
    section = (ROOT / "README.md").read_text().split("\n## Search\n")[1].split("\n## ")[0]
    lines = [line.split("  #")[0].strip() for line in section.splitlines() if line.startswith("    ")]
    assert lines[0] == "pip install 'discovla[search]'"
    return lines[1:]


def python_block() -> str:
    """Return README's block of Python."""
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)[0]


def write_video(path: Path, frames: Sequence[np.ndarray], *, rate: int = 4) -> None:
    """Encode frames, y x 3 uint8, as H.264."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def small_parts(source: Path) -> list[list[np.ndarray]]:
    """Return the first parts of a video, each of 16 frames of 64 x 64 pixels."""
    with av.open(str(source)) as container:
        decoded = itertools.islice(container.decode(video=0), 16 * PARTS)
        frames = [frame.reformat(64, 64, "rgb24").to_ndarray() for frame in decoded]
    return [frames[first : first + 16] for first in range(0, len(frames) - 15, 16)]


def real_data() -> Path:
    """Return the folder of real files, which may not be there."""
    return Path(os.environ.get("DISCOVLA_REALDATA", ROOT.parent / "shared/realdata")).resolve()


def own_clips(folder: Path) -> list[tuple[Path, str]]:
    """Return 60 small clips with captions: cut from the real files if they are there, else drawn."""
    real = real_data()
    if not (real / "MANIFEST.json").is_file():
        sizes = WorldSizes(train=CLIPS, val=0, test=0, siblings=0)
        drawn = read_manifest(draw_world(folder, sizes=sizes, workers=1))
        return [(clip.video, clip.captions[0]) for clip in drawn]
    folder.mkdir()
    clips = []
    for file in json.loads((real / "MANIFEST.json").read_text())["files"]:
        video = (file["facts"] or {}).get("video")
        whole = video and not video["decode_error"] and (video["decoded_frames"] or 0) >= 16
        for frames in small_parts(real / file["file"]) if whole else []:
            path = folder / f"{len(clips):02}.mp4"
            write_video(path, frames)
            clips.append((path, f"part {len(clips)} of {Path(file['file']).stem.replace('_', ' ')}"))
    assert len(clips) >= CLIPS, f"{real}: {len(clips)} clips"
    return clips[:: len(clips) // CLIPS][:CLIPS]


def test_every_command_of_readme_and_of_own_videos_is_run_by_a_test():
    readme, page = commands("README.md"), commands("docs/own-videos.md")
    assert readme == [*BY_MAKE, *page[:4]]
    assert all(command.startswith("discovla ") for command in page)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_blocks_of_readme_and_of_own_videos_run_from_the_wheel_in_an_empty_folder(installed, tmp_path):
    clips, folder = own_clips(tmp_path / "videos"), tmp_path / "empty"
    folder.mkdir()
    with (folder / "clips.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("video", "caption"), *clips])

    def run(*words: str | Path) -> str:
        """Run Python and return what it prints."""
        program = [installed / "python", *words]
        done = subprocess.run(program, cwd=folder, env=environment(), capture_output=True, text=True)
        assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    printed = {}
    with captions_server() as server:
        for command in [*commands("README.md")[len(BY_MAKE) :], *commands("docs/own-videos.md")[4:]]:
            words = shlex.split(command.replace("http://localhost:8000/v1", server.url))
            printed[command] = run("-m", *words, *SMALL.get(words[1], []))
            if command == "discovla evaluate runs/mine":
                check_own_run(folder, printed)
    captioned = read_manifest(folder / "data/mine/captioned.jsonl", split="train")
    assert all(text is not None for clip in captioned for texts in clip.frame_captions for text in texts)
    write_video(folder / "a.mp4", [np.full((64, 64, 3), 9, np.uint8)] * 8)
    write_video(folder / "b.mp4", [np.full((64, 64, 3), 90, np.uint8)] * 84)  # 21 seconds
    sizes = WorldSizes(train=48, val=8, test=24, siblings=0)
    draw_world(folder / "data/drawn_world", sizes=sizes, workers=1)
    run("-m", "discovla", "train", "quickstart", *SMALL["train"], "batch_size=16")
    assert run("-c", python_block() + "\nprint(tuple(scores.shape))").splitlines()[-1] == "(1, 2)"

    check_search(folder, run, [installed / "python", "-m", "discovla", "serve"])


def check_search(folder: Path, run: Callable[..., str], serve: Sequence[str | Path]) -> None:
    """Run README's commands of the search, and search the real files, if there are any."""
    names = []
    for command in search_commands():
        words = shlex.split(command)[1:]
        names.append(words[0])
        if words[0] == "serve":
            check_server([*serve, folder / words[1], "--port", "0"])
            continue
        printed = run("-m", "discovla", *words)
        if words[0] == "search":
            assert len(re.findall(r"^ *\d .*\(moment \d+\)$", printed, flags=re.M)) == 5
        if words[0] == "evaluate":
            assert "24 clips, 24 captions of split 'test'" in printed and "probability" in printed
            stored = json.loads(run("-m", "discovla", *words, "--json"))
            assert sum(one["queries"] for one in stored.pop("reliability")) == 2 * 24
            assert stored == json.loads(run("-m", "discovla", *words[:-2], "--json"))
    assert names == ["index", "search", "serve", "evaluate"]
    # the run has read shards, whose clips name no files of this machine
    run("-m", "discovla", "evaluate", "runs/quickstart", "--index", "my.index", "--report")
    assert "Reliability of probabilities" in (folder / "runs/quickstart/report.html").read_text()
    if (real_data() / "MANIFEST.json").is_file():
        run("-m", "discovla", "index", "runs/quickstart", real_data(), "--out", "real.index")
        status = json.loads(run("-m", "discovla", "index", "real.index", "--status", "--json"))
        files = json.loads((real_data() / "MANIFEST.json").read_text())["files"]
        assert status["videos"] + status["refused"] >= sum("video" in (file["facts"] or {}) for file in files)
        assert all(video["reason"] for video in status["not_indexed"])
        hits = json.loads(run("-m", "discovla", "search", "real.index", "a bicycle", "--json"))["hits"]
        assert len(hits) == 10 and all(Path(hit["video"]).is_file() for hit in hits)


def check_server(words: Sequence[str | Path]) -> None:
    """Start a server, search by its API, and stop it."""
    with subprocess.Popen(words, env=environment(), stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            address = next(match[0] for line in process.stdout if (match := re.search(r"http://\S+", line)))
            with urlopen(f"{address.rstrip('/')}/api/search?q=a+red+circle&k=3") as response:
                assert len(json.load(response)["hits"]) == 3
        finally:
            process.terminate()


def check_own_run(folder: Path, printed: dict[str, str]) -> None:
    """Compare splits, tables and files of the run of own clips with what its commands printed."""
    splits = [clip.split for clip in read_manifest(folder / "data/mine/manifest.jsonl")]
    assert [splits.count(split) for split in ("train", "val", "test")] == [48, 6, 6]
    _, _, train, evaluate = printed.values()
    (trained,) = re.findall(r"^discovla, step \d+ +(\d.*)", train, flags=re.M)
    assert re.findall(r"^raw +(.*)", evaluate, flags=re.M) == [trained]
    assert "6 clips, 6 captions of split 'test'" in evaluate
    assert (folder / "runs/mine/report.html").stat().st_size > 10_000


def test_make_train_says_how_to_enter_the_environment(tmp_path):
    (tmp_path / "bin").mkdir()
    for name, script in {"python": "exit 0", "discovla": 'echo called "$@"'}.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "installed").touch()
    words = ["make", "--no-print-directory", "train", f"VENV={tmp_path}", "ARGS=steps=2"]
    done = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert "called train --processes 1 configs/quickstart.toml steps=2" in lines
    assert lines[-1].endswith(f"source {tmp_path}/bin/activate")
    assert "source .venv/bin/activate" in (ROOT / "README.md").read_text()


def test_git_ignores_the_folders_that_the_packaged_configs_write():
    folders = {str(read_values(name)["directory"]) for name in packaged_configs()}
    words = ["git", "check-ignore", *folders, "data/drawn_world/manifest.jsonl", "data/mine/shards/x.tar"]
    ignored = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    assert set(ignored) == set(words[2:])


def test_a_missing_manifest_is_named_by_its_absolute_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=rf"found no file {tmp_path}/data/none\.jsonl"):
        read_manifest("data/none.jsonl")


def test_help_takes_a_fraction_of_importing_torch():
    def seconds(*words: str) -> float:
        """Return the CPU time of a child."""
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *words], env=environment(), capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    times = [(seconds("-m", "discovla", "--help"), seconds("-c", "import torch")) for _ in range(3)]
    assert min(ours / torch for ours, torch in times) < 0.3, times


@pytest.mark.slow
def test_all_configs_are_in_the_wheel(installed, tmp_path):
    words = "from discovla.config import packaged_configs; print(*packaged_configs())"
    run = subprocess.run(
        [installed / "python", "-c", words], cwd=tmp_path, env=environment(), capture_output=True, text=True
    )
    assert run.stdout.split() == sorted(path.stem for path in (ROOT / "configs").glob("*.toml")), run.stderr
