"""torchcodec gives the frames of PyAV or refuses the file, and says why it cannot be used."""

from __future__ import annotations

import importlib
import importlib.metadata
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from discovla.data.sampling import Sampling
from discovla.data.video import torchcodec
from discovla.data.video.errors import DecodeError, WrongFrames
from discovla.data.video.frames import check_decoder, read_frames
from discovla.data.video.index import FrameIndex, FrameIndexStore
from discovla.data.video.pyav import decode_through, index_video
from tests.data.odd_clips import KINDS, odd_clip
from tests.data.video.test_frames import expected_verdict, header_rate, realdata_videos

MISSING = torchcodec.missing()
installed = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
REFUSED = {
    "mjpeg": "its codec is mjpeg",
    "mpeg4-b-frames": "its codec is mpeg4",
    "transport-stream": "its frames are reordered",
    "odd-size-vp9": "its size 47x33 is odd",
    "ten-bit": "it has 10 bits a colour",
    "edit-skips-start": "its first frame is not a keyframe",
    "edit-skips-far": "its first frame is not a keyframe",
    "edit-skips-start-vp9": "its first frame is not a keyframe",
}


@pytest.fixture(scope="module", params=KINDS)
def odd(request, tmp_path_factory) -> Path:
    return odd_clip(tmp_path_factory.mktemp("odd"), request.param)


@pytest.fixture
def index(counting) -> FrameIndex:
    return index_video(counting)


def test_files_of_which_it_gives_other_frames_are_refused_by_their_index(odd):
    reason = torchcodec.unfit(index_video(odd))
    assert (reason or "").startswith(REFUSED.get(odd.stem, "")), reason
    assert (reason is None) == (odd.stem not in REFUSED)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"faults": 1}, "it is damaged"),
        ({"problem": "cut"}, "it is damaged"),
        ({"sequential": True}, "it is damaged"),
        ({"uniform": False}, "it is damaged, changes its size"),
        ({"interlaced": True}, "its frames are interlaced"),
        ({"codec": "svq1"}, "its codec is svq1"),
        ({"keyframes": ()}, "its first frame is not a keyframe"),
    ],
    ids=str,
)
def test_damaged_interlaced_and_inexact_files_are_refused(index, change, reason):
    assert str(torchcodec.unfit(replace(index, **change))).startswith(reason)


@installed
def test_golden_every_frame_is_that_of_pyav_or_the_file_is_refused(odd):
    index = index_video(odd)
    frames = range(index.count)
    images, _ = decode_through(odd, np.asarray, frames=frames)
    if odd.stem in REFUSED:
        with pytest.raises(WrongFrames, match=REFUSED[odd.stem]):
            torchcodec.decode_frames(odd, index, frames, np.asarray)
        return
    found = torchcodec.decode_frames(odd, index, frames, np.asarray)
    assert all(np.array_equal(found[number], images[number]) for number in frames)
    for number in (index.count - 1, index.count // 2, 0):  # alone, from the keyframe before
        (alone,) = torchcodec.decode_frames(odd, index, [number], np.asarray).values()
        assert np.array_equal(alone, images[number])


@installed
def test_opening_a_file_reads_our_index_and_scans_nothing(counting, index, monkeypatch):
    opened = []
    real = importlib.import_module("torchcodec.decoders").VideoDecoder

    def open_file(path: str, **options):
        opened.append(options)
        return real(path, **options)

    monkeypatch.setattr(torchcodec, "_decoders", lambda: SimpleNamespace(VideoDecoder=open_file))
    torchcodec.decode_frames(counting, index, [3], np.asarray)
    assert opened[0]["custom_frame_mappings"] is not None


@installed
def test_a_frame_at_another_time_is_refused(counting, index):
    moved = replace(index, times=tuple(time + 512 * (place > 4) for place, time in enumerate(index.times)))
    with pytest.raises(WrongFrames, match="torchcodec"):
        torchcodec.decode_frames(counting, moved, [7], np.asarray)


@installed
def test_a_refused_file_is_named_with_its_decoder(tmp_path):
    path = odd_clip(tmp_path, "ten-bit")
    with pytest.raises(DecodeError, match=r"mp4: cannot be read by decoder = 'torchcodec': it has 10"):
        read_frames(path, Sampling(frames=2, sample_rate=10.0), decoder="torchcodec")


@installed
@pytest.mark.slow
def test_realdata_frames_are_those_of_pyav_or_the_file_is_refused(realdata):
    same = 0
    for path, facts in realdata_videos(realdata):
        sampling = Sampling(frames=4, sample_rate=1.0 if header_rate(facts) > 1 else 0.1)
        store = FrameIndexStore()
        try:
            found = read_frames(path, sampling, decoder="torchcodec", store=store)
        except DecodeError as error:
            assert ("cannot be read by decoder" in error.reason) == (expected_verdict(facts) == "ok"), path
            continue
        wanted = read_frames(path, sampling)
        assert (found.indices, found.seconds) == (wanted.indices, wanted.seconds), path
        assert np.array_equal(found.frames, wanted.frames), path
        same += 1
    assert same


def test_a_decoder_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(torchcodec.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="decoder: torchcodec is not installed"):
        check_decoder("torchcodec")


@pytest.mark.parametrize(
    ("library", "reason"),
    [
        (None, "torchcodec 0.17.0 does not load: expected the libraries of FFmpeg .*, found none: no symbol"),
        ("libav.so", "torchcodec 0.17.0 does not load beside torch 9.9, although FFmpeg is installed; .*"),
    ],
    ids=["without FFmpeg", "with FFmpeg"],
)
def test_a_decoder_that_does_not_load_says_whether_ffmpeg_is_missing(monkeypatch, library, reason):
    def fail() -> None:
        raise RuntimeError("no symbol\nand a page of text")

    versions = {"torchcodec": "0.17.0", "torch": "9.9"}
    monkeypatch.setattr(torchcodec.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(importlib.metadata, "version", versions.__getitem__)
    monkeypatch.setattr(torchcodec, "_decoders", fail)
    monkeypatch.setattr(torchcodec, "find_library", lambda name: library)
    with pytest.raises(ValueError, match=reason):
        check_decoder("torchcodec")
