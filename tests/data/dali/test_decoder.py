"""Frames decoded by DALI on a CPU, against those of PyAV."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from discovla.data.config import DataConfig
from discovla.data.dali import reader as dali_reader
from discovla.data.dali.pipeline import PipelineConfig, Plan
from discovla.data.dali.reader import TOLERANCE_MEAN, DaliClipReader, DaliDecoder, missing, unfit
from discovla.data.dataset import FileClipReader
from discovla.data.manifest import Clip
from discovla.data.sandbox import Sandbox
from discovla.data.video.errors import DecodeError
from discovla.data.video.pyav import index_video
from tests.data.dali.tasks import hang_at
from tests.data.odd_clips import odd_clip
from tests.data.video.test_frames import expected_verdict, realdata_videos

REASON = missing()
with_dali = pytest.mark.skipif(REASON is not None, reason=str(REASON))
SIZE = 32
CPU = ["vp9.webm", "mjpeg.avi", "odd-size-vp9.webm", "vp8-without-duration.webm"]
CPU += ["edit-skips-gop.mp4", "edit-delays-start-vp9.mp4"]
SKIPPING = "edit-skips-start-vp9.mp4"
GPU = ["long-gop.mp4", "hevc-open-gop.mp4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("odd")
    for name in [*CPU, *GPU, SKIPPING, "turned"]:
        odd_clip(folder, Path(name).stem)
    return folder


def config(**changes) -> DataConfig:
    fields = {"manifest": Path("none"), "frames": 4, "sample_rate": 10.0, "decode_seconds": 60.0}
    return DataConfig(**(fields | {"decoder": "dali"} | changes))


def dali_clip_reader(**changes) -> DaliClipReader:
    return DaliClipReader(config(**changes), SIZE)


def clip(path: Path, **span: float) -> Clip:
    return Clip(id=path.name, video=path, captions=("one",), split="train", **span)  # type: ignore[arg-type]


def plan(path: Path, **span: float) -> Plan:
    return dali_clip_reader().read(clip(path, **span))


def pyav_frames(path: Path, seed: str | None = None, **changes) -> np.ndarray:
    reader = FileClipReader(config(decoder="pyav", **changes), SIZE, sandbox=False)
    return reader.read(clip(path), seed)


@pytest.fixture(scope="module")
def decoder() -> Iterator[DaliDecoder]:
    """One decoder for all tests without augmentation."""
    decoder = DaliDecoder(dali_clip_reader().pipeline)
    yield decoder
    decoder.close()


def error_of(frames: np.ndarray, others: np.ndarray) -> float:
    return float(np.abs(frames.astype(int) - others).mean())


def assert_near(frames: np.ndarray, expected: np.ndarray, name: str) -> None:
    """Assert that each frame is within the tolerance of its own, and nearest to it."""
    errors = [[error_of(a, b) for b in expected] for a in frames]
    assert np.diag(errors).max() <= TOLERANCE_MEAN, name
    assert np.argmin(errors, 1).tolist() == [0, 1, 2, 3], name


def assert_all_near(folder: Path, decoder: DaliDecoder, reader: DaliClipReader, seed: str | None) -> None:
    """Assert that the clips of every codec that DALI decodes here are near to PyAV's."""
    names = CPU + (GPU if decoder.config.device is not None else [])
    frames, reasons = decoder.decode([reader.read(clip(folder / name), seed) for name in names])
    assert frames.is_cuda == (decoder.config.device is not None)
    assert reasons == [None] * len(names)
    for name, clip_frames in zip(names, frames.cpu().numpy(), strict=True):
        expected = pyav_frames(folder / name, seed, augment=reader.config.augment)
        assert_near(clip_frames, expected, name)


@with_dali
def test_frames_are_near_to_those_of_pyav(folder, decoder):
    assert_all_near(folder, decoder, dali_clip_reader(), None)


@with_dali
@pytest.mark.slow
@pytest.mark.parametrize("augment", ["light", "resized_crop"])
def test_augmented_frames_are_near_to_those_of_pyav(folder, augment):
    reader = dali_clip_reader(augment=augment)
    decoder = DaliDecoder(reader.pipeline)
    assert_all_near(folder, decoder, reader, "0/0/1")
    decoder.close()


@with_dali
@pytest.mark.slow
def test_realdata_frames_are_near_to_those_of_pyav_or_the_file_is_refused(realdata, decoder):
    near, refused = [], 0
    for path, facts in realdata_videos(realdata):
        number, _, divisor = ((facts.get("video") or {}).get("avg_rate") or "0").partition("/")
        options = {"sample_rate": 1.0 if float(number) > float(divisor or 1) else 0.1}
        try:
            planned = dali_clip_reader(**options).read(clip(path))
        except DecodeError as error:
            unfit_for_dali = "cannot be read by decoder = 'dali'" in error.reason
            assert unfit_for_dali == (expected_verdict(facts) == "ok"), path
            refused += 1
            continue
        frames, reasons = decoder.decode([planned])
        if reasons == [None]:
            assert error_of(frames[0].cpu().numpy(), pyav_frames(path, **options)) <= TOLERANCE_MEAN, path
            near.append(path.name)
    assert refused
    assert len(near) >= 4, near


@with_dali
def test_repeated_frames_are_repeated_and_missing_frames_are_black(folder, decoder):
    span = clip(folder / "vp9.webm", start=0.2, end=0.35)
    options = ({}, {"sampling": "clip4clip", "sample_rate": 1.0})
    plans = [dali_clip_reader(**each).read(span) for each in options]
    frames, reasons = decoder.decode([*plans, None])
    assert reasons == [None] * 3
    for clip_frames, planned, each in zip(frames.cpu().numpy(), plans, options, strict=False):
        expected = FileClipReader(config(decoder="pyav", **each), SIZE, sandbox=False).read(span)
        assert len(planned) == len(expected)
        assert error_of(clip_frames[: len(expected)], expected) <= TOLERANCE_MEAN
        assert not clip_frames[len(expected) :].any()
    assert len(plans[1]) < 4 == len(plans[0]) > len(plans[0].indices)
    assert not frames[2].any()


@with_dali
def test_a_file_that_dali_cannot_decode_like_pyav_is_refused_by_name(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(dali_reader.torch.cuda, "is_available", lambda: False)
    (tmp_path / "text.mp4").write_text("no video")
    paths = [folder / "long-gop.mp4", folder / "turned.mp4", folder / "none.mp4", tmp_path / "text.mp4"]
    reasons = []
    for path in paths:
        with pytest.raises(DecodeError) as caught:
            plan(path)
        reasons.append(str(caught.value).partition(f"{path}: ")[2])
    codec = (
        "cannot be read by decoder = 'dali': expected one of the codecs mjpeg, vp8, vp9 on a CPU, found h264"
    )
    text = "not a video file (Invalid data found when processing input)"
    assert reasons == [codec, codec, "there is no such file", text]


@with_dali
def test_a_clip_that_fails_the_pipeline_is_named_and_the_others_are_decoded(folder, decoder, tmp_path):
    plans = [plan(folder / name) for name in ("vp9.webm", "vp9.webm", "vp9.webm", "mjpeg.avi")]
    text, gone = tmp_path / "text.webm", tmp_path / "gone.webm"
    text.write_bytes(bytes(range(256)) * 8)  # the file changed after it was planned
    plans[1:3] = [replace(plans[1], path=text), replace(plans[2], path=gone)]
    frames, reasons = decoder.decode(plans)
    assert reasons[0] is reasons[3] is None
    assert str(reasons[1]).startswith("DALI: ")
    assert reasons[2] == "cannot be read: No such file or directory"
    assert not frames[1:3].any()
    for row, name in ((0, "vp9.webm"), (3, "mjpeg.avi")):
        assert_near(frames[row].cpu().numpy(), pyav_frames(folder / name), name)


@with_dali
@pytest.mark.slow
def test_a_killed_process_is_replaced_and_gives_the_same_frames(folder, decoder):
    plans = [plan(folder / "vp9.webm"), plan(folder / "mjpeg.avi")]
    before, _ = decoder.decode(plans)
    assert decoder._sandbox._process is not None
    os.kill(decoder._sandbox._process.pid, signal.SIGKILL)
    after, reasons = decoder.decode(plans[::-1])
    assert reasons == [None, None]
    assert after.flip(0).equal(before)


@pytest.mark.slow
def test_a_clip_that_hangs_is_named_and_the_others_are_decoded(monkeypatch):
    monkeypatch.setattr(dali_reader, "missing", lambda: None)
    decoder = DaliDecoder(PipelineConfig(frames=2, image_size=4, time_limit=0.5))
    decoder._sandbox = Sandbox(hang_at, limit=0.5)
    number = np.zeros(1, np.int64)
    names = ("fine", "hang", "good")
    plans = [Plan(id=name, path=Path(name), indices=number.astype(np.int32), places=number) for name in names]
    frames, reasons = decoder.decode(plans)
    assert reasons == [None, "not decoded: took longer than 0.5 s", None]
    assert frames.flatten(1).any(1).tolist() == [True, False, True]
    decoder.close()


def test_files_that_dali_would_decode_otherwise_are_known(folder):
    index = index_video(folder / "vp9.webm")
    assert unfit(index, gpu=False) is None
    assert unfit(index_video(folder / "long-gop.mp4"), gpu=True) is None
    cases = {
        "rotation": index_video(folder / "turned.mp4"),
        "found 41 packets": replace(index, packets=41),
        "found 30 packets and 27 frames": index_video(folder / SKIPPING),
        "found stream 1": replace(index, stream_index=1),
        "8 bits": replace(index, pixel_format="yuv420p10le"),
        "ascending times": replace(index, problem="cut"),
        "found prores": replace(index, codec="prores"),
    }
    for words, case in cases.items():
        assert words in str(unfit(case, gpu=True))


def test_a_missing_dali_is_named(monkeypatch):
    monkeypatch.setattr(dali_reader, "missing", lambda: "DALI is not installed")
    with pytest.raises(ValueError, match="decoder: DALI is not installed"):
        DaliDecoder(PipelineConfig(frames=1, image_size=8))
    with pytest.raises(ValueError, match="decoder: DALI is not installed"):
        dali_clip_reader()
