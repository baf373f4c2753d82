"""Whether `auto` takes DALI: only where it reads the first clips as PyAV does, and faster."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from discovla.data import choice
from discovla.data.choice import choose_decoder
from discovla.data.config import DataConfig
from discovla.data.dali.support import missing
from discovla.data.manifest import Clip, write_manifest
from discovla.data.shards.layout import ShardSettings
from discovla.data.shards.writer import write_shards
from discovla.data.video.torchcodec import missing as lacks_torchcodec
from tests.data.odd_clips import odd_clip

LACKING = missing()
with_dali = pytest.mark.skipif(LACKING is not None, reason=str(LACKING))
on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="what a CPU refuses, a GPU reads")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("choice")
    for name in ("vp9", "mjpeg", "long-gop"):
        odd_clip(folder, name)
    (folder / "text.webm").write_text("no video")
    return folder


def clips(folder: Path, *names: str) -> list[Clip]:
    return [Clip(id=name, video=folder / name, captions=("one",), split="train") for name in names]


def config(folder: Path, **changes) -> DataConfig:
    fields = {"manifest": folder / "manifest.jsonl", "frames": 3, "sample_rate": 10.0, "workers": 1}
    return DataConfig(**(fields | {"decoder": "auto", "decode_seconds": 60.0} | changes))


@pytest.fixture
def rates(monkeypatch, caplog) -> dict[str, float]:
    """Frames a second that each way seems to have, in the order of measuring, after each did its work."""
    told: dict[str, float] = {"pyav": 100.0} | ({} if lacks_torchcodec() else {"torchcodec": 90.0})
    told["dali"] = 200.0
    frames: list[int] = []

    def fastest(once):
        frames.append(once())
        return list(told.values())[len(frames) - 1]

    monkeypatch.setattr(choice, "_fastest", fastest)
    caplog.set_level(logging.INFO)
    yield told
    assert len(set(frames)) <= 1  # every way gave as many frames


@with_dali
def test_dali_is_taken_where_it_is_faster_and_the_figures_are_told(folder, rates, caplog):
    some = clips(folder, "text.webm", "vp9.webm", "mjpeg.avi")
    assert choose_decoder(some, config(folder), 16) == "dali+pyav"
    told = ", ".join(f"{name} {rate:.0f}" for name, rate in sorted(rates.items()))
    expected = f"decoder: auto takes dali+pyav: {told} frames a second of the first clips"
    assert [m for m in caplog.messages if "auto" in m] == [expected]


def test_dali_is_not_taken_where_it_is_hardly_faster(folder, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(choice, "_rates", lambda *_: {"pyav": 100.0, "torchcodec": 90.0, "dali": 105.0})
    assert choose_decoder(clips(folder, "vp9.webm"), config(folder), 16) == "auto"
    told = (
        "auto leaves out dali, which is not a tenth faster: dali 105, pyav 100, torchcodec 90 frames a second"
    )
    assert told in caplog.text


@with_dali
@on_cpu
def test_dali_is_left_out_where_a_clip_is_not_for_it(folder, rates, caplog):
    assert choose_decoder(clips(folder, "vp9.webm", "long-gop.mp4"), config(folder), 16) == "auto"
    assert "decoder: auto leaves out dali: " in caplog.text
    assert "long-gop.mp4: cannot be read by decoder = 'dali': its codec is h264" in caplog.text


@with_dali
def test_dali_is_left_out_where_it_gives_other_frames(folder, rates, caplog, monkeypatch):
    monkeypatch.setattr(choice.dali, "TOLERANCE_MEAN", 0.01)
    assert choose_decoder(clips(folder, "vp9.webm"), config(folder), 16) == "auto"
    assert "vp9.webm: it gives other frames, " in caplog.text


def test_dali_is_left_out_without_a_measurement_where_it_is_not_there_or_of_no_use(
    folder, tmp_path, caplog, monkeypatch
):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(choice.dali, "missing", lambda: None)
    assert choose_decoder(clips(folder, "vp9.webm"), config(folder, cache=tmp_path), 16) == "auto"
    assert "auto leaves out dali: data.cache keeps the frames of a clip, which is decoded once" in caplog.text
    assert choose_decoder(clips(folder, "text.webm"), config(folder), 16) == "auto"
    assert "auto leaves out dali: none of the first 32 clips gives frames" in caplog.text
    monkeypatch.setattr(choice.dali, "missing", lambda: "DALI is not installed")
    assert choose_decoder(clips(folder, "vp9.webm"), config(folder), 16) == "auto"
    assert "auto leaves out dali: DALI is not installed" in caplog.text


@with_dali
@pytest.mark.slow
def test_jpeg_shards_are_measured_too_and_raw_ones_need_no_decoder(folder, tmp_path, rates, caplog):
    some = clips(folder, "vp9.webm", "long-gop.mp4")
    write_manifest(tmp_path / "m.jsonl", some)
    for form in ("jpeg", "raw"):
        settings = ShardSettings(frames=3, sample_rate=10.0, size=16, format=form, quality=95)
        write_shards(tmp_path / "m.jsonl", tmp_path / form, settings, workers=0)
    rates.pop("torchcodec", None)
    assert choose_decoder(some, config(folder, shards=str(tmp_path / "jpeg")), 16) == "dali+pyav"
    assert "decoder: auto takes dali+pyav: dali 200, pillow 100 frames a second" in caplog.text
    caplog.clear()
    assert choose_decoder(some, config(folder, shards=str(tmp_path / "raw")), 16) == "auto"
    assert not caplog.messages


@pytest.mark.parametrize("error", [RuntimeError("DALI's graph cannot be built here"), ImportError("no CUDA")])
def test_dali_is_left_out_where_it_cannot_run(folder, caplog, monkeypatch, error):
    def cannot(*_):
        raise error

    caplog.set_level(logging.INFO)
    monkeypatch.setattr(choice, "_rates", cannot)
    assert choose_decoder(clips(folder, "vp9.webm"), config(folder), 16) == "auto"
    assert f"auto leaves out dali: {error}" in caplog.text


def test_a_run_by_dali_is_read_by_pyav_where_dali_is_not(folder, caplog, monkeypatch):
    monkeypatch.setattr(choice.dali, "missing", lambda: "DALI is not installed")
    chosen = config(folder).model_copy(update={"decoder": "dali+pyav"})
    assert choice.readable_here(chosen).decoder == "pyav" and "DALI is not installed" in caplog.text
    asked = config(folder).model_copy(update={"decoder": "dali"})
    assert choice.readable_here(asked) is asked, "what was asked for by name is not replaced"


def test_the_fastest_pass_but_the_first_counts(monkeypatch):
    clock = iter(np.cumsum([0.0, 1.0, 0.0, 4.0, 0.0, 2.0]))
    monkeypatch.setattr(choice.time, "perf_counter", lambda: next(clock))
    assert choice._fastest(lambda: 12) == 6.0
