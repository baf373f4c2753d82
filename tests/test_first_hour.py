"""README's block for own clips, from the wheel, in a fresh environment and an empty folder."""

import csv
import os
import re
import shlex
import site
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from discovla.data.manifest import read_manifest
from discovla.drawn_world.synthetic import WorldSizes, draw_world

ROOT = Path(__file__).parents[1]
# small enough for a CPU, and without a download: the drawn CLIP in place of OpenAI's
SMALL = ["model.pretrained=drawn", "steps=2", "data.workers=0", "engine.device=cpu"]


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


def own_clips_block() -> list[str]:
    """Return the commands of README's section on own videos."""
    section = (ROOT / "README.md").read_text().split("## Own videos\n")[1].split("\n## ")[0]
    return [line.split("  #")[0].strip() for line in section.splitlines() if line.startswith("    ")]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_block_for_own_clips_runs_from_the_wheel_in_an_empty_folder(installed, tmp_path):
    sizes = WorldSizes(train=60, val=0, test=0, siblings=0)
    clips = read_manifest(draw_world(tmp_path / "videos", sizes=sizes, workers=1))
    folder = tmp_path / "empty"
    folder.mkdir()
    with (folder / "clips.csv").open("w", newline="") as file:
        rows = [(clip.video, clip.captions[0]) for clip in clips]
        csv.writer(file).writerows([("video", "caption"), *rows])
    commands = [shlex.split(line) for line in own_clips_block()]
    assert [words[:2] for words in commands] == [
        ["discovla", "prepare"],
        ["discovla", "doctor"],
        ["discovla", "train"],
        ["discovla", "evaluate"],
    ]
    tables = []
    for words in commands:
        more = SMALL if words[1] == "train" else []
        program = [installed / "python", "-m", *words, *more]
        run = subprocess.run(program, cwd=folder, env=environment(), capture_output=True, text=True)
        assert run.returncode == 0, f"{words}\n{run.stdout}\n{run.stderr}"
        tables.append(run.stdout)
    splits = [clip.split for clip in read_manifest(folder / "data/mine/manifest.jsonl")]
    assert [splits.count(split) for split in ("train", "val", "test")] == [48, 6, 6]
    (trained,) = re.findall(r"^discovla, step \d+ +(.*)", tables[2], flags=re.M)
    assert re.findall(r"^raw +(.*)", tables[3], flags=re.M) == [trained]
    assert (folder / "runs/mine/report.html").stat().st_size > 10_000
    load = "import discovla; print('texts', len(discovla.load('runs/mine').embed_texts(['a circle'])))"
    words = [installed / "python", "-c", load]
    run = subprocess.run(words, cwd=folder, env=environment(), capture_output=True, text=True)
    assert run.returncode == 0 and "texts 1" in run.stdout, run.stderr


@pytest.mark.slow
def test_all_configs_are_in_the_wheel(installed, tmp_path):
    words = "from discovla.config import packaged_configs; print(*packaged_configs())"
    run = subprocess.run(
        [installed / "python", "-c", words], cwd=tmp_path, env=environment(), capture_output=True, text=True
    )
    assert run.stdout.split() == sorted(path.stem for path in (ROOT / "configs").glob("*.toml")), run.stderr
