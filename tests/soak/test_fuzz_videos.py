"""500 damaged videos through the doctor and each decoder: none may crash, hang or give wrong frames.

pytest -m soak tests/soak/test_fuzz_videos.py
DISCOVLA_SOAK_RECORD=1 pytest -m soak tests/soak/test_fuzz_videos.py    with rows in benchmarks/results
"""

from __future__ import annotations

import resource
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from discovla.data.dali import reader as dali
from discovla.data.video import torchcodec
from tests.data.damaged_clips import HEADER, compare, draw_sources, write_damaged
from tests.data.test_sandbox import children
from tests.soak.recording import record

COUNT = 500


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("decoder", ["pyav", "torchcodec", "dali"])
@pytest.mark.parametrize("sources", ["drawn", "real"])
def test_damaged_videos_neither_crash_nor_hang_nor_give_wrong_frames(request, tmp_path, sources, decoder):
    reason = {"torchcodec": torchcodec.missing, "dali": dali.missing}.get(decoder, lambda: None)()
    if reason is not None:
        pytest.skip(reason)
    paths = draw_sources(tmp_path / "sources") if sources == "drawn" else real_clips(request)
    clips = write_damaged(paths, tmp_path / "clips", COUNT, seed=["drawn", "real"].index(sources))
    begin = time.perf_counter()
    comparison = compare(clips, tmp_path, decoder, seconds=30, black_is_wrong=sources == "drawn")
    row = {"files": COUNT, "sources": sources, "decoder": decoder, **asdict(comparison)}
    row["seconds"] = round(time.perf_counter() - begin, 1)
    row["largest_process_mb"] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024
    record("fuzz-videos", row)
    assert comparison.wrong == []
    assert comparison.crashed == 0
    assert children() == set()


def real_clips(request: pytest.FixtureRequest) -> list[Path]:
    """Return the real videos that are small enough to damage 500 times."""
    folder: Path = request.getfixturevalue("realdata")
    files = sorted(path for path in (folder / "videos").rglob("*") if path.is_file())
    return [path for path in files if HEADER < path.stat().st_size < 1_000_000]
