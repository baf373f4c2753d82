"""Frames by DALI's graph on a CPU, against those of PyAV."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from discovla.data import dali
from discovla.data.dali import TOLERANCE_MEAN, DaliFrames, DaliSettings, missing, unfit
from discovla.data.decode import DecodeError, tabulate
from discovla.data.reading import Reading, read_frames
from discovla.data.sampling import Sampling
from tests.data.odd_clips import odd_clip

LACKING = missing()
with_dali = pytest.mark.skipif(LACKING is not None, reason=str(LACKING))
SIZE = 32
CUDA = pytest.param(True, marks=pytest.mark.gpu)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("odd")
    names = ["vp9", "mjpeg", "odd-size-vp9", "vp8-without-duration", "long-gop", "turned", "hevc-open-gop"]
    for name in names:
        odd_clip(folder, name)
    return folder


def readings(folder: Path, *names: str, augment: str = "none", frames: int = 4) -> list[Reading]:
    sampling = Sampling(frames=frames, sample_rate=10.0)
    return [
        Reading(path=folder / name, sampling=sampling, image_size=SIZE, augment=augment, seed=f"0/0/{n}")
        for n, name in enumerate(names)
    ]


def read(asked: list[Reading], **changes) -> tuple[np.ndarray, list[int | DecodeError]]:
    settings = DaliSettings(batch_size=len(asked), frames=4, image_size=SIZE, threads=1)
    source = DaliFrames(replace(settings, **changes))
    try:
        frames, found = source.read(asked)
        assert frames.device.type == ("cuda" if source.settings.cuda else "cpu")
        return frames.cpu().numpy(), found
    finally:
        source.close()


@with_dali
@pytest.mark.parametrize("crop", [False, True], ids=["middle", "crop"])
@pytest.mark.parametrize("cuda", [False, CUDA], ids=["cpu", "gpu"])
def test_golden_frames_are_those_of_pyav_within_the_tolerance(folder, crop, cuda):
    names = ["vp9.webm", "mjpeg.avi", "odd-size-vp9.webm", "vp8-without-duration.webm"]
    names += ["long-gop.mp4", "hevc-open-gop.mp4"] if cuda else []
    asked = readings(folder, *names, augment="resized_crop" if crop else "none")
    frames, found = read(asked, crop=crop, cuda=cuda)
    assert found == [4] * len(names)
    for name, got, reading in zip(names, frames, asked, strict=True):
        wanted = read_frames(reading).astype(int)
        errors = [[np.abs(a - b).mean() for b in wanted] for a in got.astype(int)]
        assert np.diag(errors).max() <= TOLERANCE_MEAN, name
        assert np.argmin(errors, 1).tolist() == [0, 1, 2, 3], name  # no neighbour in place of a frame


@with_dali
def test_what_dali_cannot_do_exactly_is_named_and_the_others_are_read(folder, tmp_path):
    (tmp_path / "text.mp4").write_text("no video")
    asked = readings(folder, "vp9.webm", "long-gop.mp4", "none.mp4", "mjpeg.avi")
    asked.append(replace(asked[0], path=tmp_path / "text.mp4"))
    frames, found = read(asked)
    assert (found[0], found[3]) == (4, 4)
    assert [str(found[n]).partition(f"{asked[n].path}: ")[2] for n in (1, 2, 4)] == [
        "cannot be read by decoder = 'dali': its codec is h264, DALI decodes mjpeg, vp8, vp9 on a CPU",
        "there is no such file",
        "not a video file (Invalid data found when processing input)",
    ]
    assert not frames[[1, 2, 4]].any()


@with_dali
def test_a_clip_that_ends_the_graph_is_named_and_the_others_are_read(folder, monkeypatch):
    monkeypatch.setattr(dali, "unfit", lambda table, *, cuda: None)
    asked = readings(folder, "vp9.webm", "long-gop.mp4", "mjpeg.avi")
    frames, found = read(asked)
    assert (found[0], found[2]) == (4, 4)
    assert isinstance(found[1], DecodeError)
    assert str(found[1]).startswith(f"{asked[1].path}: DALI: ")
    assert "Failed to create video decoder" in str(found[1])
    assert np.abs(frames[2].astype(int) - read_frames(asked[2])).mean() <= TOLERANCE_MEAN


@with_dali
def test_a_clip_with_fewer_frames_is_followed_by_black(folder):
    asked = readings(folder, "vp9.webm", frames=3)
    frames, found = read(asked)
    assert found == [3]
    assert not frames[0, 3].any()
    assert np.abs(frames[0, :3].astype(int) - read_frames(asked[0])).mean() <= TOLERANCE_MEAN


@with_dali
def test_a_graph_made_anew_gives_the_same(folder):
    asked = readings(folder, "vp9.webm", "mjpeg.avi", augment="resized_crop")
    first, _ = read(asked, crop=True)
    again, _ = read(asked[::-1], crop=True)
    assert np.array_equal(first, again[::-1])


def test_what_dali_would_read_otherwise_is_known(folder):
    table = tabulate(folder / "vp9.webm")
    assert unfit(table, cuda=False) is None
    assert unfit(tabulate(folder / "long-gop.mp4"), cuda=True) is None
    cases = {
        "shown turned": tabulate(folder / "turned.mp4"),
        "packets": replace(table, packets=41),
        "stream is number 1": replace(table, stream=1),
        "8 bits": replace(table, pixels="yuv420p10le"),
        "breaks off": replace(table, problem="cut"),
        "codec is prores": replace(table, codec="prores"),
    }
    for words, case in cases.items():
        assert words in str(unfit(case, cuda=True))


def test_dali_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(dali, "missing", lambda: "DALI is not installed")
    with pytest.raises(ValueError, match="decoder: DALI is not installed"):
        DaliFrames(DaliSettings(batch_size=1, frames=1, image_size=8, cuda=torch.cuda.is_available()))
