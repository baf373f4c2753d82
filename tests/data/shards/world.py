"""Clips of every kind that shards hold, and their shards."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from discovla.data.manifest import Clip, write_manifest
from discovla.data.sampling import Sampling
from discovla.data.shards.layout import ShardSettings
from discovla.data.shards.writer import ShardReport, write_shards
from tests.data.conftest import movie

FRAMES, SIZE = 4, 16


def make_manifest(folder: Path, cut_off: Path | None = None, count: int = 5, split: str = "train") -> Path:
    """Write clips of 20 frames at 10 fps: one is short, one has a start, and one or two are bad."""
    clips = []
    for i in range(count):
        path = movie(folder / f"videos/{i}.mp4", 3 if i == 1 else 20, size=(24, 40) if i % 2 else (32, 20))
        clips.append(
            Clip(
                id=f"clip/{i}.x",
                video=path,
                captions=(f"caption {i} a", f"one that is longer {i} b"),
                split="val" if i == 2 else split,
                start=0.5 if i == 3 else None,
                frame_captions=(tuple(f"still {i} {f}" for f in range(FRAMES)), None),
            )
        )
    text = folder / "text.mp4"
    text.write_text("no video")
    clips.append(Clip(id="text", video=text, captions=("no video",), split="train"))
    if cut_off is not None:
        clips.append(Clip(id="cut", video=cut_off, captions=("cut off",), split="train"))
    write_manifest(folder / "manifest.jsonl", clips)
    return folder / "manifest.jsonl"


def sampling(clip: Clip, seed: str | None = None, **changes) -> Sampling:
    fields = {"frames": FRAMES, "sample_rate": 5.0, "start": clip.start, "seed": seed}
    return Sampling(**(fields | changes))


def settings(**changes) -> ShardSettings:
    fields = {"frames": FRAMES, "sample_rate": 5.0, "size": SIZE, "clips_per_shard": 2, "context_length": 12}
    return ShardSettings(**(fields | changes))


def make_shards(
    manifest: Path, out: Path, *, workers: int = 0, verify: bool = False, **changes
) -> ShardReport:
    return write_shards(manifest, out, settings(**changes), workers=workers, verify=verify)


def contents(folder: Path) -> dict[str, bytes]:
    """Return the content of every file of a shard folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def decoded_clips(out: Path) -> set[int]:
    """Return the numbers of the clips that runs have decoded, in finished tars and in part files."""
    records = [json.loads(path.read_text()) for path in (out / ".state").glob("*-*.json")]
    parts = {int(path.name) for path in (out / ".state/parts").glob("0*")}
    return parts | {clip["number"] for record in records for clip in record["clips"]}


@contextmanager
def sharding(manifest: Path, out: Path) -> Iterator[subprocess.Popen[str]]:
    """Run `make_shards` in a process that prints the number of decoded clips, and kill it at the end."""
    code = (
        "import sys; from pathlib import Path; from tests.data.shards.world import make_shards;"
        "print(make_shards(Path(sys.argv[1]), Path(sys.argv[2]), workers=2).decoded)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(manifest), str(out)],
        cwd=Path(__file__).parents[3],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
