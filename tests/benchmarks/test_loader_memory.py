"""Memory over many odd files, in small."""

from __future__ import annotations

import pytest

from benchmarks.loader_memory import link_clips, watch


@pytest.mark.slow
@pytest.mark.parametrize("subject", ["doctor", "loader"])
def test_memory_does_not_grow_with_the_number_of_files(subject, tmp_path):
    clips = link_clips(tmp_path, 800)
    assert len({clip.video for clip in clips}) == 800
    row = watch(subject, clips)
    assert row["files"] == 800
    assert row["mb_after_a_fifth"] > 10
    assert row["growth_mb"] <= 12  # 20 KB a file
