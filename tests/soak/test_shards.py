"""Shards of a run that is killed 20 times at random.

pytest -m soak tests/soak/test_shards.py
"""

from __future__ import annotations

import random
import time

import pytest

from tests.data.shards.world import contents, decoded_clips, make_manifest, make_shards, sharding


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_twenty_kills_neither_change_a_byte_nor_lose_a_decoded_clip(tmp_path):
    manifest, out = make_manifest(tmp_path / "clips", count=300), tmp_path / "out"
    make_shards(manifest, tmp_path / "expected", workers=2)
    draws, kills, decoded = random.Random(0), 0, set()
    while kills < 20:
        with sharding(manifest, out) as process:
            deadline = time.monotonic() + 300
            while process.poll() is None and decoded_clips(out) <= decoded:  # until it decodes
                assert time.monotonic() < deadline
                time.sleep(0.005)
            time.sleep(draws.uniform(0, 0.2))
            if process.poll() is not None:
                break
        kills += 1
        assert decoded_clips(out) > decoded
        decoded = decoded_clips(out)
    assert kills == 20, f"finished after {kills} kills: draw more clips"
    with sharding(manifest, out) as process:
        last, _ = process.communicate(timeout=600)
    assert int(last) == 301 - len(decoded)
    assert contents(out) == contents(tmp_path / "expected")
