"""HDR, depth and alpha are named, HDR is refused or mapped to SDR, and the largest stream is read."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from discovla.cli import main
from discovla.data.doctor import ExamineOptions, ExamineRequest, diagnose, examine
from discovla.data.manifest import Clip
from discovla.data.sampling import Sampling
from discovla.data.video import torchcodec
from discovla.data.video.errors import DecodeError
from discovla.data.video.frames import read_frames
from discovla.data.video.index import FrameIndexStore
from discovla.data.video.pyav import chosen_stream, index_video

PQ, HLG, BT709 = 16, 18, 1
SAMPLING = Sampling(frames=2, sample_rate=1.0)


@dataclass(frozen=True)
class Variant:
    """A video of two frames in one colour."""

    pixels: str = "yuv420p10le"
    transfer: int = BT709
    codec: str = "ffv1"
    value: float = 0.5  # of the signal, 0..1
    suffix: str = ".mkv"


def write(path: Path, variant: Variant) -> Path:
    """Write a grey of the signal's value in limited range."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(variant.codec, rate=2)
        stream.width, stream.height, stream.pix_fmt = 32, 16, variant.pixels
        context = stream.codec_context
        hdr = variant.transfer != BT709
        context.color_trc = variant.transfer
        context.color_primaries = context.colorspace = 9 if hdr else 1
        context.color_range = 1
        for number in range(2):
            grey = np.full((16, 32), round(65535 * variant.value), np.uint16)
            frame = av.VideoFrame.from_ndarray(grey, format="gray16le")
            frame = frame.reformat(format=variant.pixels, dst_color_range=1)
            frame.color_trc, frame.color_primaries = variant.transfer, context.color_primaries
            frame.colorspace, frame.color_range = context.colorspace, 1
            frame.pts, frame.time_base = number, Fraction(1, 2)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def pq_signal(light: float) -> float:
    """Return the PQ signal of cd/m2 (SMPTE ST 2084)."""
    y = (light / 10000) ** 0.1593017578125
    return ((0.8359375 + 18.8515625 * y) / (1 + 18.6875 * y)) ** 78.84375


def hlg_signal(light: float) -> float:
    """Return the HLG signal of a grey of cd/m2 on a display of 1000 cd/m2 (ARIB STD-B67)."""
    scene = (light / 1000) ** (1 / 1.2)
    return (
        (3 * scene) ** 0.5 if scene <= 1 / 12 else 0.17883277 * np.log(12 * scene - 0.28466892) + 0.55991073
    )


def examined(path: Path, folder: Path) -> dict:
    return examine(ExamineRequest(path=path, samplings=(SAMPLING,), index_dir=folder))


@pytest.mark.parametrize(
    ("variant", "unusual"),
    [
        (Variant(transfer=PQ), ["HDR (PQ)", "10 bits a colour"]),
        (Variant(transfer=HLG), ["HDR (HLG)", "10 bits a colour"]),
        (Variant(transfer=HLG, pixels="yuv420p"), ["HDR (HLG)"]),
        (Variant(transfer=PQ, pixels="gbrp12le"), ["HDR (PQ)", "12 bits a colour"]),
        (Variant(), ["10 bits a colour"]),
        (Variant(pixels="yuv444p16le"), ["16 bits a colour"]),
        (Variant(pixels="gray16le"), ["16 bits a colour"]),
        (Variant(pixels="yuva420p"), ["alpha, which is dropped"]),
        (Variant(pixels="argb", codec="qtrle", suffix=".mov"), ["alpha, which is dropped"]),
        (Variant(pixels="yuva420p", codec="libvpx-vp9", suffix=".webm"), ["alpha, which is dropped"]),
        (Variant(pixels="yuv420p"), []),
    ],
    ids=str,
)
def test_what_the_pixels_are_is_named_and_hdr_alone_is_refused(variant, unusual, tmp_path):
    facts = examined(write(tmp_path / f"v{variant.suffix}", variant), tmp_path)
    assert facts["unusual"] == unusual
    refused = "HDR" in str(unusual)
    assert (facts["clips"][0] is not None) == refused
    assert not refused or "data.hdr = 'tonemap'" in facts["clips"][0]


@pytest.mark.parametrize(("transfer", "signal"), [(PQ, pq_signal), (HLG, hlg_signal)])
@pytest.mark.parametrize(
    ("light", "level"),
    [
        (0.0, 0),
        (20.3, 98),
        (101.5, 191),
        (1000.0, 255),
    ],  # 203 cd/m2 is white: 255 * (light / 203) ** (1 / 2.4)
)
def test_light_keeps_its_brightness_relative_to_white(transfer, signal, light, level, tmp_path):
    path = write(
        tmp_path / "v.mkv", Variant(transfer=transfer, value=float(signal(light)), pixels="yuv420p12le")
    )
    frame = read_frames(path, SAMPLING, hdr="tonemap").frames[0]
    assert frame.shape == (16, 32, 3)
    assert abs(int(frame[8, 16, 1]) - level) <= 2
    assert np.ptp(frame.astype(int), axis=-1).max() <= 2, "grey stays grey"


def test_white_and_what_is_brighter_stay_apart(tmp_path):
    levels = []
    for light in (150, 203, 400, 800):
        path = write(
            tmp_path / f"{light}.mkv", Variant(transfer=PQ, value=pq_signal(light), pixels="yuv420p12le")
        )
        levels.append(int(read_frames(path, SAMPLING, hdr="tonemap").frames[0][8, 16, 1]))
    assert np.all(np.diff(levels) >= 2)


def test_a_stored_index_refuses_and_maps_as_the_first_visit(tmp_path):
    path = write(tmp_path / "v.mkv", Variant(transfer=PQ))
    store = FrameIndexStore(tmp_path / "index")
    with pytest.raises(DecodeError, match=r"HDR video \(PQ\): expected SDR"):
        read_frames(path, SAMPLING, store=store)
    with pytest.raises(DecodeError, match=r"HDR video \(PQ\): expected SDR"):
        read_frames(path, SAMPLING, store=store)
    again = read_frames(path, SAMPLING, store=store, hdr="tonemap").frames
    assert np.array_equal(again, read_frames(path, SAMPLING, hdr="tonemap").frames)
    assert "HDR" in (torchcodec.unfit(index_video(path)) or "")


def test_the_command_refuses_hdr_unless_asked_to_map_it(tmp_path, capsys):
    path, out = write(tmp_path / "v.mkv", Variant(transfer=HLG)), str(tmp_path / "out")
    assert main(["frames", str(path), "--out", out]) == 2
    assert "HDR video (HLG)" in capsys.readouterr().err
    assert main(["frames", str(path), "--out", out, "--hdr", "tonemap"]) == 0


def streams(path: Path, *sizes: tuple[str, int, int], default: int | None = None) -> Path:
    """Write a file of several video streams."""
    with av.open(str(path), "w") as container:
        made = []
        for number, (codec, width, height) in enumerate(sizes):
            stream = container.add_stream(codec, rate=4)
            stream.width, stream.height = width, height
            stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
            if default is not None:
                stream.disposition = av.stream.Disposition.default if number == default else 0
            made.append(stream)
        for number in range(4):
            for stream in made:
                grey = np.full((stream.height, stream.width, 3), 90, np.uint8)
                frame = av.VideoFrame.from_ndarray(grey, format="rgb24").reformat(format=stream.pix_fmt)
                frame.pts, frame.time_base = number, Fraction(1, 4)
                container.mux(stream.encode(frame))
        for stream in made:
            container.mux(stream.encode())
    return path


@pytest.mark.parametrize(
    ("sizes", "default", "size"),
    [
        ((("libx264", 32, 24), ("libx264", 64, 48)), None, (64, 48)),
        ((("libx264", 64, 48), ("libx264", 32, 24)), None, (64, 48)),
        ((("libx264", 32, 24), ("libx264", 64, 48), ("libx264", 48, 32)), None, (64, 48)),
        ((("libx264", 32, 24), ("libx264", 64, 48)), 0, (32, 24)),
        ((("libx264", 32, 24), ("libx264", 64, 48)), 1, (64, 48)),
        ((("libx264", 64, 48), ("mjpeg", 128, 96)), None, (64, 48)),
    ],
    ids=str,
)
def test_the_largest_stream_of_equal_flags_is_read_and_named(sizes, default, size, tmp_path):
    path = streams(tmp_path / "v.mkv", *sizes, default=default)
    index = index_video(path)
    assert index.size == size
    assert chosen_stream(path).endswith(f"{index.stream_index} is read")
    facts = examined(path, tmp_path)
    assert facts["unusual"] == ["several video streams"]
    assert facts["stream"] == chosen_stream(path)


@pytest.mark.parametrize("name", ["v.ogv", "v.ts", "v.mkv", "v.gif", "v.avi"])
@pytest.mark.parametrize("count", [1, 6])
def test_rate_and_length_come_from_the_frames(name, count, tmp_path):
    codec = {".ogv": "libtheora", ".gif": "gif"}.get(Path(name).suffix, "mpeg4")
    if codec == "libtheora" and codec not in av.codecs_available:
        codec = "libvpx"
    with av.open(str(tmp_path / name), "w", format="ogg" if name == "v.ogv" else None) as container:
        stream = container.add_stream(codec, rate=5)
        stream.width, stream.height = 32, 24
        stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
        for number in range(count):
            frame = av.VideoFrame.from_ndarray(np.full((24, 32, 3), 40 * number, np.uint8), format="rgb24")
            frame = frame.reformat(format=stream.pix_fmt)
            frame.pts, frame.time_base = number, Fraction(1, 5)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    decoded = read_frames(tmp_path / name, SAMPLING)
    assert decoded.count == count
    facts = examined(tmp_path / name, tmp_path)
    if count > 1:
        assert decoded.rate == pytest.approx(5, rel=0.01)
        assert facts["duration"] == pytest.approx(count / 5, rel=0.02)
    else:
        assert "one frame" in facts["unusual"]
        assert facts["clips"] == [None]


def test_a_span_beyond_the_end_is_said_and_one_that_starts_there_is_broken(tmp_path):
    path = write(tmp_path / "v.mkv", Variant(pixels="yuv420p"))  # 1 s
    spans = {"whole": (None, None), "inside": (0, 1), "rounded": (0, 1.4), "late": (0.2, 9), "beyond": (5, 9)}
    clips = [
        Clip(id=name, video=path, captions=("a",), split="test", start=start, end=end)
        for name, (start, end) in spans.items()
    ]
    options = ExamineOptions(sampling=SAMPLING, workers=1, index_dir=tmp_path / "index")
    diagnosis = diagnose(clips, tmp_path / "out", options)
    assert [name for name, _, _ in diagnosis.broken] == ["beyond"]
    assert [name for name, _, _ in diagnosis.overlong] == ["late", "beyond"]
    assert any("2 clips end after their video" in line for line in diagnosis.lines())
