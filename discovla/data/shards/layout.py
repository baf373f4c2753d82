"""The files that shards are: WebDataset tars, DALI's index of each, and one index of all frames.

A folder of shards holds

    train-000000.tar ...   one sample a clip, of one split: NUMBER.json, NUMBER.tokens.npy,
                           NUMBER.frame_tokens.npy where there are frame captions, and the frames, either
                           NUMBER.frames.npy (uint8, f y x 3) or NUMBER.000.jpg, NUMBER.001.jpg ...
    train-000000.idx ...   DALI's index of the tar, as `wds2idx` writes it
    clips.jsonl            the manifest's clips in its order: where their frames are, or why there are none
    frames.npy             one row a frame (`FRAME`), clip after clip
    quarantine.jsonl       the clips that gave no frames, with the reason
    shards.json            settings, sizes and checksums; written last

NUMBER is the clip's place in the manifest.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from discovla.data.manifest import Clip
from discovla.data.sampling import Sampler, Sampling, Slice, clip_sampling
from discovla.data.tokens import Tokenizer
from discovla.data.video.frames import Damaged

VERSION = 1
SUMMARY, CLIPS, FRAMES, QUARANTINE = "shards.json", "clips.jsonl", "frames.npy", "quarantine.jsonl"
# index: in the clip.  offset, size: of its bytes in the tar.  crc32: of these bytes.
FRAME = np.dtype([("index", "<u4"), ("offset", "<u8"), ("size", "<u4"), ("crc32", "<u4")])

Format = Literal["raw", "jpeg"]
Keep = Literal["sampled", "candidates"]

_BLOCK, _RECORD = tarfile.BLOCKSIZE, tarfile.RECORDSIZE
_CLIP_FIELDS = ("id", "captions", "split", "start", "end", "frame_captions", "caption_order")


@dataclass(frozen=True, kw_only=True)
class ShardSettings:
    """What shards hold of each clip.

    frames, sampling, sample_rate, sampling_divisor, sampling_slice, damaged: as in `DataConfig`.
    keep: `sampled` frames are those that testing takes, with repeats where a clip is short; `candidates` are
    all that training may take under some seed, each once.
    size: pixels of a side of the square that `resize_and_crop` makes; None keeps frames as displayed.
    format, quality: of the frames.  context_length: the longest caption in tokens.
    clips_per_shard: of one tar.
    """

    frames: int = 12
    sampling: Sampler = "discovla"
    sample_rate: float = 1.0
    sampling_divisor: int = 1
    sampling_slice: Slice = "even"
    damaged: Damaged = "refuse"
    keep: Keep = "sampled"
    size: int | None = 224
    format: Format = "raw"
    quality: int = 90
    context_length: int = 77
    clips_per_shard: int = 256

    def __post_init__(self) -> None:
        for name in ("frames", "sampling_divisor", "clips_per_shard"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.size is not None and self.size < 1:
            raise ValueError(f"size: expected pixels, at least 1, got {self.size}")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality: expected 1 .. 100, got {self.quality}")

    def taken(self, clip: Clip) -> Sampling:
        """Which frames of a clip are in the shards."""
        sampling = clip_sampling(self, clip)
        return KeptSampling(**asdict(sampling)) if self.keep == "candidates" else sampling


class KeptSampling(Sampling):
    """All frames that a sampling may take under some seed."""

    def indices(self, count: int, rate: float) -> list[int]:
        return Sampling(**asdict(self)).candidates(count, rate)


@dataclass(frozen=True, kw_only=True)
class Packed:
    """One clip as it stands in a tar.

    content: headers and members.  members: (extension, offset, size) of each.  rows: `FRAME`, offsets from
    the beginning of the content.
    """

    content: bytes
    members: list[tuple[str, int, int]]
    rows: np.ndarray


def clip_fields(clip: Clip) -> dict[str, Any]:
    """What a manifest says of a clip beside its file, without what it leaves out."""
    values = {name: getattr(clip, name) for name in _CLIP_FIELDS}
    return {name: value for name, value in values.items() if value is not None}


def pack(
    number: int, clip: Clip, images: Sequence[np.ndarray], facts: dict[str, Any], settings: ShardSettings
) -> Packed:
    """A clip as the members of a tar.

    Args:
        number: its place in the manifest.
        images: the frames to keep, uint8 y x 3, all of one size.
        facts: `indices` of the frames in the clip, its `count` and `rate`; they become part of the JSON.
    """
    members = [("json", _json_bytes({**clip_fields(clip), **facts, "shape": images[0].shape}))]
    members += _token_members(clip, settings.context_length)
    first = len(members)
    if settings.format == "raw":
        members.append(("frames.npy", npy_bytes(np.stack(images))))
    else:
        members += [(f"{i:03d}.jpg", jpeg_bytes(image, settings.quality)) for i, image in enumerate(images)]
    content = io.BytesIO()
    places = [(name, *_append(content, f"{number_key(number)}.{name}", body)) for name, body in members]
    rows = np.empty(len(images), FRAME)
    rows["index"] = facts["indices"]
    if settings.format == "raw":
        _, offset, size = places[first]
        each = images[0].size
        rows["offset"] = offset + size - each * len(images) + each * np.arange(len(images))
        rows["size"] = each
    else:
        rows["offset"] = [offset for _, offset, _ in places[first:]]
        rows["size"] = [size for _, _, size in places[first:]]
    view = content.getbuffer()
    rows["crc32"] = [zlib.crc32(view[row["offset"] : row["offset"] + row["size"]]) for row in rows]
    return Packed(content=bytes(view), members=places, rows=rows)


def number_key(number: int) -> str:
    """The name of a clip in its tar."""
    return f"{number:08d}"


def tar_end(size: int) -> bytes:
    """What closes a tar of `size` bytes: two empty blocks, then up to a whole record."""
    return bytes(2 * _BLOCK + -(size + 2 * _BLOCK) % _RECORD)


def dali_index(samples: Sequence[tuple[int, int, Sequence[tuple[str, int, int]]]]) -> str:
    """DALI's index of a tar, version 1.2: a line a sample, extension, offset, size and name of each member.

    Args:
        samples: number, offset in the tar and members of each clip, as in `Packed`.
    """
    lines = [f"v1.2 {len(samples)}"]
    for number, start, members in samples:
        key = number_key(number)
        lines.append(" ".join(f"{name} {start + at} {size} {key}.{name}" for name, at, size in members))
    return "\n".join(lines) + "\n"


def jpeg_bytes(image: np.ndarray, quality: int) -> bytes:
    """A frame as JPEG, its colours at half the resolution as in video."""
    content = io.BytesIO()
    Image.fromarray(image).save(content, "JPEG", quality=quality, subsampling="4:2:0")
    return content.getvalue()


def write_whole(path: Path, content: bytes) -> None:
    """Write a file whole or not at all; what is there already and the same is left alone."""
    if path.exists() and path.stat().st_size == len(content) and path.read_bytes() == content:
        return
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def file_sha256(path: Path) -> str:
    """Checksum of a file of any size."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _append(tar: io.BytesIO, name: str, body: bytes) -> tuple[int, int]:
    """One member more; the offset and size of its bytes."""
    info = tarfile.TarInfo(name)
    info.size = len(body)  # all else, the time too, stays as it is by default: the same bytes at every run
    tar.write(info.tobuf(tarfile.USTAR_FORMAT))
    offset = tar.tell()
    tar.write(body)
    tar.write(bytes(-len(body) % _BLOCK))
    return offset, len(body)


def _token_members(clip: Clip, context_length: int) -> list[tuple[str, bytes]]:
    """Token ids of captions and, where there are any, of frame captions: uint16, 0 after the end."""
    members = [("tokens.npy", npy_bytes(_tokens(clip.captions, context_length)))]
    if clip.frame_captions is not None:
        longest = max((len(texts) for texts in clip.frame_captions if texts is not None), default=0)
        texts = [text for told in clip.frame_captions for text in _filled(told, longest)]
        ids = _tokens(texts, context_length) if texts else np.zeros((0, 0), np.uint16)
        shape = (len(clip.frame_captions), longest, ids.shape[-1])  # caption f l
        members.append(("frame_tokens.npy", npy_bytes(ids.reshape(shape))))
    return members


def _filled(texts: tuple[str, ...] | None, number: int) -> list[str | None]:
    """`number` texts, None for those that are not there."""
    found: list[str | None] = list(texts or ())
    return found + [None] * (number - len(found))


def _tokens(texts: Sequence[str | None], context_length: int) -> np.ndarray:
    """Token ids, n l, as long as the longest text; a text that is not there has zeros alone."""
    ids, mask = Tokenizer(context_length).encode([text or "" for text in texts])
    there = np.array([text is not None for text in texts])
    longest = int((mask.sum(1).numpy() * there).max(initial=0))
    return (ids.numpy() * there[:, None])[:, :longest].astype(np.uint16)


def npy_bytes(array: np.ndarray) -> bytes:
    """An array as a .npy file."""
    content = io.BytesIO()
    np.save(content, np.ascontiguousarray(array), allow_pickle=False)
    return content.getvalue()


def _json_bytes(value: Any) -> bytes:
    return json.dumps(value).encode()
