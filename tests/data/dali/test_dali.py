"""Frames by DALI's graph on a CPU, against those of PyAV."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from discovla.data.config import Augment, FrameSettings
from discovla.data.dali import reader as dali_reader
from discovla.data.dali.frames import DaliFrames
from discovla.data.dali.plans import Plan, no_plan
from discovla.data.dali.reader import DaliClipReader
from discovla.data.dali.support import TOLERANCE_MEAN, DaliSettings, missing, unfit
from discovla.data.dataset import FileClipReader
from discovla.data.manifest import Clip
from discovla.data.sandbox import Sandbox
from discovla.data.video.errors import DecodeError
from discovla.data.video.pyav import index_video
from tests.data.odd_clips import odd_clip
from tests.data.sandbox_tasks import hang_at
from tests.data.video.test_frames import expected_verdict, header_rate, realdata_videos

LACKING = missing()
with_dali = pytest.mark.skipif(LACKING is not None, reason=str(LACKING))
SIZE = 32
SETTINGS = FrameSettings(frames=4, image_size=SIZE, sample_rate=10.0, limit=60.0)
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


@pytest.fixture(scope="module")
def graph() -> Iterator[DaliFrames]:
    """One graph for all that is neither cut nor augmented."""
    graph = DaliFrames(DaliClipReader(SETTINGS, "none").graph)
    yield graph
    graph.close()


def clip(path: Path, **span: float) -> Clip:
    return Clip(id=path.name, video=path, captions=("one",), split="train", **span)  # type: ignore[arg-type]


def plan(path: Path, augment: Augment = "none", **span: float) -> Plan:
    return DaliClipReader(SETTINGS, augment).sample(clip(path, **span), augment, "0/0/1")[0]


def wanted(path: Path, augment: Augment = "none", **span: float) -> np.ndarray:
    return FileClipReader(replace(SETTINGS, limit=None)).read_augmented(clip(path, **span), augment, "0/0/1")


def error_of(frames: np.ndarray, others: np.ndarray) -> float:
    return float(np.abs(frames.astype(int) - others).mean())


def assert_near(frames: np.ndarray, path: Path, augment: Augment = "none") -> None:
    """Each frame is the one wanted, and nearer to it than to its neighbours."""
    errors = [[error_of(a, b) for b in wanted(path, augment)] for a in frames]
    assert np.diag(errors).max() <= TOLERANCE_MEAN, path.name
    assert np.argmin(errors, 1).tolist() == [0, 1, 2, 3], path.name


def assert_all_near(folder: Path, graph: DaliFrames, augment: Augment) -> None:
    """Clips of all codecs that DALI reads here."""
    names = CPU + (GPU if graph.settings.device is not None else [])
    frames, reasons = graph.read([plan(folder / name, augment) for name in names])
    assert frames.is_cuda == (graph.settings.device is not None)
    assert reasons == [None] * len(names)
    for name, found in zip(names, frames.cpu().numpy(), strict=True):
        assert_near(found, folder / name, augment)


@with_dali
def test_golden_frames_are_those_of_pyav_within_the_tolerance(folder, graph):
    assert_all_near(folder, graph, "none")


@with_dali
@pytest.mark.slow
def test_golden_crops_are_those_of_pyav_within_the_tolerance(folder):
    graph = DaliFrames(DaliClipReader(SETTINGS, "resized_crop").graph)
    assert_all_near(folder, graph, "resized_crop")
    graph.close()


@with_dali
@pytest.mark.slow
def test_realdata_frames_are_those_of_pyav_or_the_file_is_refused(realdata, graph):
    read, refused = [], 0
    for path, facts in realdata_videos(realdata):
        settings = replace(SETTINGS, sample_rate=1.0 if header_rate(facts) > 1 else 0.1)
        try:
            planned, _ = DaliClipReader(settings, "none").sample(clip(path))
        except DecodeError as error:
            otherwise = "cannot be read by decoder = 'dali'" in error.reason
            assert otherwise == (expected_verdict(facts) == "ok"), path
            refused += 1
            continue
        frames, reasons = graph.read([planned])
        if reasons == [None]:
            known = FileClipReader(replace(settings, limit=None)).read(clip(path))
            assert error_of(frames[0].cpu().numpy(), known) <= TOLERANCE_MEAN, path
            read.append(path.name)
    assert refused
    assert len(read) >= 5, read


@with_dali
def test_a_clip_that_repeats_frames_or_has_fewer_is_shown_as_it_is(folder, graph):
    short, part = SETTINGS, replace(SETTINGS, sampling="clip4clip", sample_rate=1.0)
    readers = [DaliClipReader(each, "none") for each in (short, part)]
    span = {"start": 0.2, "end": 0.35}
    plans = [reader.sample(clip(folder / "vp9.webm", **span))[0] for reader in readers]
    frames, reasons = graph.read([*plans, no_plan(4)])
    assert reasons == [None] * 3
    for found, planned, settings in zip(frames.cpu().numpy(), plans, (short, part), strict=False):
        known = FileClipReader(replace(settings, limit=None)).read(clip(folder / "vp9.webm", **span))
        assert len(planned.places) == len(known)
        assert error_of(found[: len(known)], known) <= TOLERANCE_MEAN
        assert not found[len(known) :].any()
    assert len(plans[1].places) < 4 == len(plans[0].places) > len(plans[0].indices)
    assert not frames[2].any()


@with_dali
def test_what_dali_cannot_do_exactly_is_named(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(dali_reader.torch.cuda, "is_available", lambda: False)
    (tmp_path / "text.mp4").write_text("no video")
    paths = [folder / "long-gop.mp4", folder / "turned.mp4", folder / "none.mp4", tmp_path / "text.mp4"]
    told = []
    for path in paths:
        with pytest.raises(DecodeError) as caught:
            plan(path)
        told.append(str(caught.value).partition(f"{path}: ")[2])
    codec = "cannot be read by decoder = 'dali': its codec is h264, DALI decodes mjpeg, vp8, vp9 on a CPU"
    none, text = "there is no such file", "not a video file (Invalid data found when processing input)"
    assert told == [codec, codec, none, text]


@with_dali
def test_a_clip_that_ends_the_graph_is_named_and_the_others_are_read(folder, graph, tmp_path):
    planned = [plan(folder / name) for name in ("vp9.webm", "mjpeg.avi", "vp9.webm")]
    text, gone = tmp_path / "text.webm", tmp_path / "gone.webm"
    text.write_bytes(bytes(range(256)) * 8)  # no longer what it was when it was planned
    plans = [planned[0], replace(planned[0], path=text), replace(planned[2], path=gone), planned[1]]
    frames, reasons = graph.read(plans)
    assert reasons[0] is reasons[3] is None
    assert str(reasons[1]).startswith("DALI: ")
    assert reasons[2] == "cannot be read: No such file or directory"
    assert not frames[1:3].any()
    assert_near(frames[0].cpu().numpy(), folder / "vp9.webm")
    assert_near(frames[3].cpu().numpy(), folder / "mjpeg.avi")


@with_dali
def test_what_the_graph_fails_at_is_read_by_another_reader(folder, graph, tmp_path, caplog):
    gone = tmp_path / "gone.webm"
    other = FileClipReader(replace(SETTINGS, limit=None))
    reader = DaliClipReader(SETTINGS, "none", instead=other)
    plans = [reader.sample(clip(folder / name))[0] for name in ("vp9.webm", "mjpeg.avi")]
    reader.close()
    text = tmp_path / "text.webm"
    text.write_bytes(bytes(range(256)) * 8)
    plans = [
        plans[0],
        replace(plans[0], path=text),
        replace(plans[1], path=gone, asked=(clip(gone), None, "")),
    ]
    graph.instead = other
    frames, reasons = graph.read(plans)
    graph.instead = None
    assert reasons == [None, None, "there is no such file"]
    assert np.array_equal(frames[1].cpu().numpy(), wanted(folder / "vp9.webm"))
    assert_near(frames[0].cpu().numpy(), folder / "vp9.webm")
    assert f"{text}: decoder: 'dali+pyav' leaves it to pyav: DALI: " in caplog.text


@with_dali
@pytest.mark.slow
def test_a_graph_whose_process_was_killed_is_made_anew_and_gives_the_same(folder, graph):
    plans = [plan(folder / "vp9.webm"), plan(folder / "mjpeg.avi")]
    before, _ = graph.read(plans)
    assert graph._worker._process is not None
    os.kill(graph._worker._process.pid, signal.SIGKILL)
    after, reasons = graph.read(plans[::-1])
    assert reasons == [None, None]
    assert after.flip(0).equal(before)


@pytest.mark.slow
def test_a_clip_that_hangs_its_process_is_named_and_the_others_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr("discovla.data.dali.frames.missing", lambda: None)
    graph = DaliFrames(DaliSettings(frames=2, image_size=4, limit=0.5))
    graph._worker = Sandbox(hang_at, limit=0.5)
    plans = [replace(no_plan(2), id=name, indices=np.zeros(1, np.int32)) for name in ("fine", "hang", "good")]
    frames, reasons = graph.read(plans)
    assert reasons == [None, "not decoded: took longer than 0.5 s", None]
    assert frames.flatten(1).any(1).tolist() == [True, False, True]
    graph.close()


def test_what_dali_would_read_otherwise_is_known(folder):
    table = index_video(folder / "vp9.webm")
    assert unfit(table, cuda=False) is None
    assert unfit(index_video(folder / "long-gop.mp4"), cuda=True) is None
    cases = {
        "shown turned": index_video(folder / "turned.mp4"),
        "packets": replace(table, packets=41),
        "30 packets, which DALI takes for frames, and 27 frames decode": index_video(folder / SKIPPING),
        "stream is number 1": replace(table, stream_index=1),
        "8 bits": replace(table, pixel_format="yuv420p10le"),
        "damaged": replace(table, problem="cut"),
        "codec is prores": replace(table, codec="prores"),
    }
    for words, case in cases.items():
        assert words in str(unfit(case, cuda=True))


def test_dali_that_is_not_there_is_named(monkeypatch):
    for module in ("reader", "frames"):
        monkeypatch.setattr(f"discovla.data.dali.{module}.missing", lambda: "DALI is not installed")
    with pytest.raises(ValueError, match="decoder: DALI is not installed"):
        DaliFrames(DaliSettings(frames=1, image_size=8))
    with pytest.raises(ValueError, match="decoder: DALI is not installed"):
        DaliClipReader(SETTINGS, "none")
