"""What tells frames from others is the same, however it is come by."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from discovla.data.sampling import Sampling
from discovla.data.video.fingerprints import UNKNOWN, Fingerprints, fingerprint
from discovla.data.video.index import FrameIndex, packed, unpacked
from discovla.data.video.pyav import scan
from tests.data.odd_clips import KINDS, odd_clip
from tests.data.video.test_frames import realdata_videos


def frames_of(path: Path, limit: int = 40) -> tuple[dict[int, Image.Image], FrameIndex]:
    """Up to `limit` frames of a file as displayed, and its table, made while few of them are converted."""
    _, table = scan(path, None, np.asarray, 0)
    if not table.count or not table.rate:
        return {}, table
    chosen = Sampling(frames=min(limit, table.count), sample_rate=table.rate)
    images, _ = scan(path, chosen, np.asarray, table.count)
    two = replace(chosen, frames=2)
    return {i: Image.fromarray(each) for i, each in images.items()}, scan(
        path, two, np.asarray, table.count, prints=True
    )[1]


def check(images: dict[int, Image.Image], table: FrameIndex) -> None:
    """The table knows each image and tells it from one with a block changed, if colours have 8 bits."""
    for index, image in images.items():
        mean = table.mean(index)
        assert (mean is None) == ("10" in table.pixels and index not in (0, table.count - 1))
        assert not table.differs(index, image)
        assert not table.differs(index, image, 1)
        if mean is not None:
            assert np.abs(np.subtract(fingerprint(image, table.turn).mean, mean)).max() <= 0.51
            assert table.differs(index, with_block(image))


def with_block(image: Image.Image) -> Image.Image:
    """An image with a block in its middle inverted, of 16 x 16 or a 16th of its height."""
    pixels = np.array(image)
    side = max(16, len(pixels) // 16, pixels.shape[1] // 16)
    y, x = (max(0, size // 2 - side // 2) for size in pixels.shape[:2])
    pixels[y : y + side, x : x + side] ^= 255
    return Image.fromarray(pixels)


@pytest.mark.parametrize("name", [name for name in KINDS if not name.startswith("edit")])
def test_rows_alone_tell_what_whole_images_tell(name, tmp_path):
    images, table = frames_of(odd_clip(tmp_path, name))
    assert len(images) == table.count == len(table.sums)
    check(images, table)
    assert unpacked(packed(table)) == table


@pytest.mark.slow
def test_realdata_rows_alone_tell_what_whole_images_tell(realdata):
    seen = 0
    for path, facts in realdata_videos(realdata):
        if (facts.get("video") or {}).get("decoded_frames"):
            images, table = frames_of(path, 6)
            if table.ordered:
                check(images, table)
                seen += len(images)
    assert seen > 100


@pytest.mark.parametrize(
    "kind", ["yuv420p", "yuvj422p", "yuv440p", "yuvj440p", "yuv410p", "rgb24", "gray", "nv12", "pal8"]
)
@pytest.mark.parametrize("size", [(320, 240), (640, 362), (2, 2), (6, 4), (1, 1)])
def test_every_format_and_size_gives_that_of_its_image(kind, size):
    draws = np.random.default_rng(0)
    prints, wanted = Fingerprints(), []
    for _ in range(11):  # more than are converted at once
        frame = av.VideoFrame(*size, kind)
        for plane in frame.planes:
            plane.update(draws.integers(0, 256, plane.buffer_size, np.uint8).tobytes())
        prints.add(frame)
        wanted.append(fingerprint(frame.to_image()))
    found = prints.all()
    assert [each.checksum for each in found] == [each.checksum for each in wanted]
    assert UNKNOWN not in {each.checksum for each in found}
    means = np.subtract([each.mean for each in found], [each.mean for each in wanted])
    assert np.abs(means).max() < 0.01


def test_frames_that_change_their_kind_keep_their_order():
    frames = [av.VideoFrame.from_ndarray(np.full((96, 64), 10 * i, np.uint8), "yuv420p") for i in range(10)]
    frames[4:6] = [frame.reformat(format="rgb24") for frame in frames[4:6]]
    frames[7].color_range = 2
    prints = Fingerprints()
    for frame in frames:
        prints.add(frame)
    assert [each.checksum for each in prints.all()] == [fingerprint(f.to_image()).checksum for f in frames]


def test_another_picture_is_told_by_its_colour_where_pixels_may_be_rounded_otherwise(tmp_path):
    images, table = frames_of(odd_clip(tmp_path, "mpeg4-b-frames"))
    pixels = np.asarray(images[9]).astype(int)
    rounded = Image.fromarray(np.clip(pixels + 2, 0, 255).astype(np.uint8))
    assert table.differs(9, rounded)
    assert not table.differs(9, rounded, 2)
    assert table.differs(9, images[30], 2)
