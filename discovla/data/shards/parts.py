"""A clip decoded into a file of its own, until its shard is put together."""

from __future__ import annotations

import json
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from discovla.data.manifest import Clip
from discovla.data.shards.layout import ShardSettings, pack
from discovla.data.video.frames import read_frames
from discovla.data.video.resize import resize_and_crop

_TRAILER = struct.Struct("<II8s")  # bytes of the record, checksum, magic
_MAGIC = b"dvpart01"


@dataclass(frozen=True)
class PartItem:
    """A clip to be decoded into a file of its own."""

    number: int
    clip: Clip
    path: Path
    settings: ShardSettings


def decode_part(item: PartItem) -> int:
    """Decode one clip and write its members and its record to a file, whole or not at all.

    Returns: how many frames it holds.

    Raises:
        DecodeError: the clip gives none.
        OSError: the file cannot be written.
    """
    settings, clip = item.settings, item.clip

    def each(image: Image.Image) -> np.ndarray:
        return np.asarray(image) if settings.size is None else resize_and_crop(image, settings.size)

    decoded = read_frames(clip.video, settings.taken(clip), each, damaged=settings.damaged)
    facts: dict[str, Any] = {"indices": decoded.indices, "count": decoded.count, "rate": decoded.rate}
    if decoded.problem is not None:
        facts["problem"] = decoded.problem
    images = [decoded.images[index] for index in decoded.indices]
    packed = pack(item.number, clip, images, facts, settings)
    del facts["indices"]
    record = {"members": packed.members, "rows": packed.rows.tolist(), "shape": images[0].shape[:2], **facts}
    write_part(item.path, packed.content, record)
    return len(images)


def write_part(path: Path, content: bytes, record: dict[str, Any]) -> None:
    """A part: content, record, and what tells that both are whole."""
    text = json.dumps(record).encode()
    trailer = _TRAILER.pack(len(text), zlib.crc32(text, zlib.crc32(content)), _MAGIC)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.writelines((content, text, trailer))
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def read_part(path: Path) -> tuple[memoryview, dict[str, Any]] | None:
    """Content and record of a part; None where there is none that is whole."""
    try:
        whole = memoryview(path.read_bytes())
    except FileNotFoundError:
        return None
    if len(whole) < _TRAILER.size:
        return None
    length, checksum, magic = _TRAILER.unpack(whole[-_TRAILER.size :])
    body = whole[: -_TRAILER.size]
    if magic != _MAGIC or length > len(body) or zlib.crc32(body) != checksum:
        return None
    cut = len(body) - length
    return body[:cut], json.loads(bytes(body[cut:]))
