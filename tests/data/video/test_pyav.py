"""Frames decoded from keyframes on are those of decoding the whole file."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from discovla.data.video import pyav
from discovla.data.video.errors import DecodeError, WrongFrames
from discovla.data.video.index import FrameIndex
from discovla.data.video.pyav import OpenVideo, decode_frames, decode_through, index_video, open_video
from tests.data.odd_clips import KINDS, odd_clip
from tests.data.video.test_frames import realdata_videos


@pytest.fixture(scope="module", params=KINDS)
def odd(request, tmp_path_factory) -> Path:
    return odd_clip(tmp_path_factory.mktemp("odd"), request.param)


def whole(path: Path, limit: int = 40) -> tuple[dict[int, np.ndarray], FrameIndex]:
    """Return up to `limit` frames of a file, all of it decoded, and its index."""
    count = index_video(path).count
    frames = {count * place // limit for place in range(limit)} if count else set()
    return decode_through(path, np.asarray, frames=frames)


def differing(path: Path, images: dict[int, np.ndarray], index: FrameIndex, step: int) -> list[int]:
    """Return the frames, one in `step`, that differ when decoded from keyframes on."""
    frames = sorted(images)[::step]
    found = decode_frames(path, index, frames, np.asarray)
    assert sorted(found) == frames
    return [frame for frame in frames if not np.array_equal(found[frame], images[frame])]


@pytest.mark.parametrize("step", [1, 3, 13])
def test_golden_frames_are_those_of_the_whole_file(odd, step):
    images, index = whole(odd)
    assert index.count == len(KINDS[odd.stem].shown)
    assert index.seekable
    assert differing(odd, images, index, step) == []


def test_a_frame_alone_is_that_of_the_whole_file(odd):
    images, index = whole(odd)
    for frame in (index.count - 1, index.count // 2, 0):
        assert np.array_equal(decode_frames(odd, index, [frame], np.asarray)[frame], images[frame])


@pytest.mark.slow
def test_realdata_frames_are_those_of_the_whole_file(realdata):
    sought = 0
    for path, facts in realdata_videos(realdata):
        if not (facts.get("video") or {}).get("decoded_frames"):
            continue
        images, index = whole(path, 12)
        if index.seekable and images:
            assert differing(path, images, index, 1) == [], path
            sought += 1
    assert sought


@pytest.fixture
def sent(monkeypatch) -> list[int | None]:
    """Times of the packets that were read, in order."""
    times: list[int | None] = []

    @contextmanager
    def recorded(path):
        with open_video(path) as video:

            def demux(stream):
                for packet in video.container.demux(stream):
                    times.append(packet.pts)
                    yield packet

            container = SimpleNamespace(demux=demux, seek=video.container.seek)
            yield OpenVideo(container, video.stream, video.messages)

    monkeypatch.setattr(pyav, "open_video", recorded)
    return times


@pytest.mark.parametrize(
    "name", ["short-gop", "every-frame-key", "open-gop", "hevc-open-gop", "vp9", "mjpeg"]
)
def test_decoding_starts_at_the_last_keyframe(tmp_path, monkeypatch, name, request):
    path = odd_clip(tmp_path, name)
    images, index = whole(path)
    sent = request.getfixturevalue("sent")
    keyframe, _ = index.keyframes[-1]
    assert keyframe > 20
    found = decode_frames(path, index, [keyframe, index.count - 1], np.asarray)
    assert sent[0] == index.times[keyframe]
    assert len(sent) <= index.count - keyframe + 1
    assert all(np.array_equal(found[frame], images[frame]) for frame in found)


def test_an_index_of_other_frames_is_noticed(tmp_path):
    path = odd_clip(tmp_path, "short-gop")
    _, index = whole(path)
    moved = replace(index, times=tuple(time + 1 for time in index.times))
    with pytest.raises(WrongFrames, match="frame 5 is not found"):
        decode_frames(path, moved, [5], np.asarray)


def test_errors_that_the_decoder_conceals_are_counted(tmp_path):
    path = odd_clip(tmp_path, "mpeg4-b-frames")
    content = bytearray(path.read_bytes())
    at = content.index(b"movi") + 3000
    content[at : at + 40] = bytes(40)
    path.write_bytes(content)
    index = index_video(path)
    assert index.problem is None
    assert index.faults > 0
    assert not index.seekable


def test_a_file_that_is_gone_says_so(tmp_path):
    path = odd_clip(tmp_path, "one-frame")
    index = index_video(path)
    path.unlink()
    with pytest.raises(DecodeError, match="there is no such file"):
        decode_frames(path, index, [0], np.asarray)
