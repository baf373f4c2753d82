"""The same frames from every decoder, and what each says of files it cannot read exactly."""

from __future__ import annotations

import importlib
import logging
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from discovla.data.cache import FrameCache
from discovla.data.sampling import Sampling
from discovla.data.video import frames, pyav
from discovla.data.video import torchcodec as torchcodec_module
from discovla.data.video.errors import DecodeError
from discovla.data.video.frames import TRIED, Decoded, Decoder, read_frames
from discovla.data.video.index import FrameIndexStore
from discovla.data.video.torchcodec import TOLERANCE, missing
from tests.data.conftest import movie, numbers
from tests.data.odd_clips import KINDS, odd_clip, picture
from tests.data.video.test_frames import expected_verdict, realdata_videos

LACKING = missing()
torchcodec = pytest.mark.skipif(LACKING is not None, reason=str(LACKING))
TEN = Sampling(frames=10, sample_rate=10.0)
INEXACT = {"odd-size-vp9", "ten-bit", "intra-refresh", "mpeg4-b-frames", "transport-stream"}
INEXACT |= {"edit-skips-start", "edit-skips-start-vp9"}
EDITED = [name for name, kind in KINDS.items() if kind.skipped or kind.delayed]


@pytest.fixture(scope="module", params=KINDS)
def odd(request, tmp_path_factory) -> Path:
    return odd_clip(tmp_path_factory.mktemp("odd"), request.param)


def same(found: Decoded, wanted: Decoded, tolerance: int = 0) -> bool:
    """Whether two readings agree in everything."""
    told = [(d.indices, d.seconds, d.count, d.rate, d.problem) for d in (found, wanted)]
    return told[0] == told[1] and near(found, wanted, tolerance)


def near(found: Decoded, wanted: Decoded, tolerance: int) -> bool:
    return int(np.abs(found.frames.astype(int) - wanted.frames).max()) <= tolerance


def changed(sums: tuple[int, ...], *places: int) -> tuple[int, ...]:
    return tuple(1 if place in places else each for place, each in enumerate(sums))


def test_golden_pyav_gives_the_same_frames_each_time(odd):
    wanted = read_frames(odd, TEN, np.asarray)
    decoder = Decoder("pyav")
    assert all(same(decoder.read(odd, TEN, np.asarray), wanted) for _ in range(3))


@pytest.mark.parametrize("name", EDITED)
def test_golden_an_edit_list_leaves_out_and_delays_what_it_says(name, tmp_path):
    kind, shown = KINDS[name], KINDS[name].shown
    seconds = [(kind.times(i) - kind.skipped + kind.delayed) / kind.ticks for i in shown]
    pictures = np.stack([picture(i, *kind.size)[::4, ::4] for i in range(kind.count)]).astype(int)
    decoder = Decoder("pyav")
    path = odd_clip(tmp_path, name)
    for start in (0, 0, 9, 14):  # counted, then entered in its middle too
        sampling = Sampling(frames=len(shown) - start, sample_rate=10.0, start=start / 10)
        found = decoder.read(path, sampling, np.asarray)
        assert (found.count, found.indices) == (len(shown), tuple(range(start, len(shown))))
        assert found.seconds == pytest.approx(seconds[start:], abs=1e-4)
        small = found.frames[:, ::4, ::4]
        nearest = [int(np.abs(pictures - frame).mean((1, 2, 3)).argmin()) for frame in small]
        assert nearest == shown[start:]


@torchcodec
def test_golden_torchcodec_gives_the_same_frames_or_refuses(odd):
    wanted = read_frames(odd, TEN, np.asarray)
    decoder = Decoder("torchcodec")
    if odd.stem in INEXACT:
        with pytest.raises(DecodeError, match=r"cannot be read by decoder = 'torchcodec'"):
            decoder.read(odd, TEN, np.asarray)
    else:
        assert same(decoder.read(odd, TEN, np.asarray), wanted, TOLERANCE)


@torchcodec
def test_golden_auto_gives_the_frames_of_every_file(odd):
    wanted = read_frames(odd, TEN, np.asarray)
    for chosen in ("pyav", "torchcodec"):
        decoder = Decoder("auto")
        decoder.chosen = chosen
        assert same(decoder.read(odd, TEN, np.asarray), wanted, TOLERANCE)


@pytest.mark.slow
def test_realdata_every_decoder_gives_the_same_frames_and_verdicts(realdata):
    readers = [Decoder("pyav")] + ([] if LACKING else [Decoder("torchcodec")])
    told = 0
    for path, facts in realdata_videos(realdata):
        rate = (facts.get("video") or {}).get("avg_rate")
        sampling = Sampling(frames=4, sample_rate=1.0 if rate and eval_rate(rate) > 1 else 0.1)
        for reader in readers:
            if expected_verdict(facts) != "ok":
                with pytest.raises(DecodeError) as error:
                    reader.read(path, sampling, np.asarray)
                told += 1
                assert str(error.value).startswith(f"{path}: ")
                continue
            wanted = read_frames(path, sampling, np.asarray)
            try:
                assert same(reader.read(path, sampling, np.asarray), wanted, TOLERANCE), path
            except DecodeError as error:
                assert (reader.name, "cannot be read by" in str(error)) == ("torchcodec", True), path
    assert told


def eval_rate(rate: str) -> float:
    number, _, divisor = rate.partition("/")
    return float(number) / float(divisor or 1)


def test_a_file_that_breaks_off_is_refused_or_used_each_time(cut_off):
    decoder = Decoder("pyav")
    for _ in range(2):
        with pytest.raises(DecodeError, match="damaged: "):
            decoder.read(cut_off, TEN, np.asarray)
    wanted = read_frames(cut_off, TEN, np.asarray, damaged="use")
    assert same(decoder.read(cut_off, TEN, np.asarray, damaged="use"), wanted)


def test_a_file_is_decoded_whole_once(counting, monkeypatch):
    decoder = Decoder("pyav")
    decoder.read(counting, TEN, np.asarray)
    monkeypatch.setattr(frames, "scan", None)
    moved = decoder.read(counting, Sampling(frames=3, sample_rate=10.0), np.asarray)
    assert numbers(moved.frames) == [0, 9, 19]


def test_tables_in_a_cache_serve_other_processes(counting, tmp_path, monkeypatch):
    Decoder("pyav", FrameIndexStore(FrameCache(tmp_path))).read(counting, TEN, np.asarray)
    monkeypatch.setattr(frames, "scan", None)
    other = Decoder("pyav", FrameIndexStore(FrameCache(tmp_path)))
    assert numbers(other.read(counting, TEN, np.asarray).frames) == [0, 2, 4, 6, 8, 10, 12, 14, 16, 19]


def test_a_changed_file_is_counted_again(tmp_path):
    decoder = Decoder("pyav")
    path = movie(tmp_path / "clip.mp4", 20)
    assert decoder.read(path, TEN, np.asarray).count == 20
    assert decoder.read(movie(path, 12), TEN, np.asarray).count == 12
    os.utime(path, ns=(1, 1))
    assert decoder.read(path, TEN, np.asarray).count == 12


def test_a_file_that_goes_astray_is_decoded_whole_and_said_once(counting, caplog):
    decoder = Decoder("pyav")
    wanted = decoder.read(counting, TEN, np.asarray)
    table = decoder.tables.get(counting)
    decoder.tables.put(counting, replace(table, sums=changed(table.sums, 9, 4)))
    for _ in range(3):
        assert same(decoder.read(counting, TEN, np.asarray), wanted)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert f"{counting}: decoded whole each time: entered at a key frame, frame 4 is not" in caplog.text


@torchcodec
def test_torchcodec_refuses_a_file_of_which_it_gives_other_frames(counting):
    decoder = Decoder("torchcodec")
    for _ in range(2):  # also when the file is met again
        decoder.read(counting, TEN, np.asarray)
        table = decoder.tables.get(counting)
    decoder.tables.put(counting, replace(table, sums=changed(table.sums, 4)))
    with pytest.raises(DecodeError, match="by decoder = 'torchcodec': torchcodec has another frame 4"):
        decoder.read(counting, TEN, np.asarray)


class Astray:
    """torchcodec, but giving the pixels of the frame before in place of those of odd frames."""

    def __init__(self, path: str, **options) -> None:
        self.real = importlib.import_module("torchcodec.decoders").VideoDecoder(path, **options)

    def __len__(self) -> int:
        return len(self.real)

    def get_frame_at(self, index: int) -> SimpleNamespace:
        data, told = self.real.get_frame_at(index - index % 2).data, self.real.get_frame_at(index)
        return SimpleNamespace(data=data, pts_seconds=told.pts_seconds)


@torchcodec
def test_torchcodec_is_checked_on_frames_that_the_first_visit_did_not_sample(counting, monkeypatch):
    first, later = (Sampling(frames=1, sample_rate=10.0, start=at / 10, end=at / 10) for at in (4, 7))
    decoder = Decoder("torchcodec")
    assert decoder.read(counting, first, np.asarray).indices == (4,)
    monkeypatch.setattr(torchcodec_module, "_decoders", lambda: SimpleNamespace(VideoDecoder=Astray))
    assert decoder.read(counting, first, np.asarray).indices == (4,)
    with pytest.raises(DecodeError, match="torchcodec has another frame 7"):
        decoder.read(counting, later, np.asarray)
    auto = Decoder("auto", decoder.tables)
    auto.chosen = "torchcodec"
    assert same(auto.read(counting, later, np.asarray), read_frames(counting, later, np.asarray))


def test_pyav_is_checked_on_frames_that_the_first_visit_did_not_sample(counting, monkeypatch, caplog):
    first, later = (Sampling(frames=1, sample_rate=10.0, start=at / 10, end=at / 10) for at in (4, 7))
    decoder = Decoder("pyav")
    decoder.read(counting, first, np.asarray)
    monkeypatch.setattr(pyav, "displayed", lambda frame, size: Image.new("RGB", size))
    assert same(decoder.read(counting, later, np.asarray), read_frames(counting, later, np.asarray))
    assert "entered at a key frame, frame 7 is not the one it was" in caplog.text


def test_tables_take_bounded_memory(counting, tmp_path, monkeypatch):
    tables = FrameIndexStore()
    decoder = Decoder("pyav", tables)
    decoder.read(counting, TEN, np.asarray)
    monkeypatch.setattr("discovla.data.video.index._KEPT", 3 * tables._bytes)
    for name in range(10):
        path = tmp_path / f"{name}.mp4"
        path.write_bytes(counting.read_bytes())
        decoder.read(path, TEN, np.asarray)
    assert len(tables._kept) <= 3
    assert tables._bytes == sum(map(len, tables._kept.values()))
    assert tables.get(path) is not None


@torchcodec
def test_auto_takes_the_faster_and_says_by_how_much(counting, caplog, monkeypatch):
    def slow(*arguments):
        clock[0] += 2.0
        return real(*arguments)

    clock = [0.0]
    real = frames.read_torchcodec
    monkeypatch.setattr(frames, "read_torchcodec", slow)
    monkeypatch.setattr(frames.time, "perf_counter", lambda: clock[0])
    caplog.set_level(logging.INFO)
    decoder = Decoder("auto")
    for _ in range(TRIED):
        assert decoder.chosen is None
        decoder.read(counting, TEN, np.asarray)
    assert decoder.chosen == "pyav"
    assert "decoder: auto takes pyav: pyav 0.000 s, torchcodec 2.000 s a clip, over 8 clips" in caplog.text


@torchcodec
def test_auto_says_once_what_it_leaves_to_pyav(tmp_path, caplog):
    path = odd_clip(tmp_path, "ten-bit")
    decoder = Decoder("auto")
    decoder.chosen = "torchcodec"
    for _ in range(3):
        decoder.read(path, TEN, np.asarray)
    expected = f"{path}: decoder: auto leaves it to pyav: it has 10 bits a colour"
    assert len(caplog.records) == 1
    assert caplog.messages[0].startswith(expected)


def test_a_decoder_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(frames, "missing", lambda: "torchcodec is not installed")
    with pytest.raises(ValueError, match="decoder: torchcodec is not installed"):
        Decoder("torchcodec")
    assert Decoder("auto").chosen == "pyav"
