"""Files entered at their key frames: the same frames as decoding the whole gives."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from discovla.data.sampling import Sampling
from discovla.data.video import pyav
from discovla.data.video.errors import DecodeError
from discovla.data.video.index import FrameIndex
from discovla.data.video.pyav import Astray, open_video, read_entering, scan
from tests.data.odd_clips import KINDS, odd_clip
from tests.data.video.test_frames import realdata_videos


@pytest.fixture(scope="module", params=KINDS)
def odd(request, tmp_path_factory) -> Path:
    return odd_clip(tmp_path_factory.mktemp("odd"), request.param)


def whole(path: Path, limit: int = 40) -> tuple[dict[int, np.ndarray], FrameIndex]:
    """Up to `limit` frames of a file and its table, all of it decoded."""
    _, table = scan(path, None, np.asarray, 0)
    if not table.count or not table.rate:
        return {}, table
    chosen = Sampling(frames=min(limit, table.count), sample_rate=table.rate)
    return scan(path, chosen, np.asarray, table.count)[0], table


def differing(path: Path, images: dict[int, np.ndarray], table: FrameIndex, step: int) -> list[int]:
    """Frames, one in `step`, that entering gives otherwise."""
    indices = sorted(images)[::step]
    found = read_entering(path, table, indices, np.asarray)
    assert sorted(found) == indices
    return [index for index in indices if not np.array_equal(found[index], images[index])]


@pytest.mark.parametrize("step", [1, 3, 13])
def test_frames_are_those_of_the_whole_file(odd, step):
    images, table = whole(odd)
    assert table.count == len(KINDS[odd.stem].shown)
    assert table.ordered
    assert differing(odd, images, table, step) == []


def test_a_frame_alone_is_that_of_the_whole_file(odd):
    images, table = whole(odd)
    for index in (table.count - 1, table.count // 2, 0):
        assert np.array_equal(read_entering(odd, table, [index], np.asarray)[index], images[index])


@pytest.mark.slow
def test_realdata_frames_are_those_of_the_whole_file(realdata):
    entered = 0
    for path, facts in realdata_videos(realdata):
        if not (facts.get("video") or {}).get("decoded_frames"):
            continue
        images, table = whole(path, 12)
        if table.ordered and images:
            assert differing(path, images, table, 1) == [], path
            entered += 1
    assert entered


@pytest.fixture
def sent(monkeypatch) -> list[int | None]:
    """Times of the packets that were read, in order."""
    times: list[int | None] = []

    @contextmanager
    def watched(path):
        with open_video(path) as (container, stream):

            def demux(stream):
                for packet in container.demux(stream):
                    times.append(packet.pts)
                    yield packet

            yield SimpleNamespace(demux=demux, seek=container.seek), stream

    monkeypatch.setattr(pyav, "open_video", watched)
    return times


@pytest.mark.parametrize(
    "name", ["short-gop", "every-frame-key", "open-gop", "hevc-open-gop", "vp9", "mjpeg"]
)
def test_reading_begins_at_the_last_key_frame(tmp_path, sent, name):
    path = odd_clip(tmp_path, name)
    images, table = whole(path)
    key, _ = table.keys[-1]
    assert key > 20
    sent.clear()
    found = read_entering(path, table, [key, table.count - 1], np.asarray)
    assert sent[0] == table.times[key]
    assert len(sent) <= table.count - key + 1
    assert all(np.array_equal(found[index], images[index]) for index in found)


def test_a_table_of_other_frames_is_seen(tmp_path):
    path = odd_clip(tmp_path, "short-gop")
    images, table = whole(path)
    moved = replace(table, times=tuple(time + 1 for time in table.times))
    with pytest.raises(Astray, match="frame 5 does not come"):
        read_entering(path, moved, [5], np.asarray)
    assert table.sums == ()
    changed = replace(table, sums=(1,) * table.count, means=bytes(3 * table.count))
    with pytest.raises(Astray, match="frame 5 is not the one it was"):
        read_entering(path, changed, [5], np.asarray)
    assert np.array_equal(read_entering(path, table, [5], np.asarray)[5], images[5])


def test_a_file_that_is_gone_says_so(tmp_path):
    path = odd_clip(tmp_path, "one-frame")
    _, table = whole(path)
    path.unlink()
    with pytest.raises(DecodeError, match="there is no such file"):
        read_entering(path, table, [0], np.asarray)
