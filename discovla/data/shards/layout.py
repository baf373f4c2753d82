"""Files of a shard folder: WebDataset tars, DALI's index of each tar, and one index of all frames.

    train-000000.tar ...   samples of one split, one per clip: NUMBER.json, NUMBER.tokens.npy,
                           NUMBER.frame_tokens.npy if the clip has frame captions, and its frames, either
                           NUMBER.frames.npy (uint8, f y x 3) or NUMBER.000.jpg, NUMBER.001.jpg ...
    train-000000.idx ...   DALI's index of the tar, in the format of `wds2idx`
    clips.jsonl            one line per clip of the manifest, in its order: the position of the frames, or the
                           reason why there are none
    frames.npy             one row per frame (`FRAME`), clip after clip
    quarantine.jsonl       clips without frames, with the reason
    shards.json            settings, sizes and checksums; written last

NUMBER is the index of the clip in the manifest, eight digits.
"""

from __future__ import annotations

import io
import json
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
from discovla.data.video.frames import Damaged, Hdr

VERSION = 1
SUMMARY, CLIPS, FRAMES, QUARANTINE = "shards.json", "clips.jsonl", "frames.npy", "quarantine.jsonl"
# index: of the frame in its video. offset, size: bytes in the tar. crc32: checksum of these bytes.
FRAME = np.dtype([("index", "<u4"), ("offset", "<u8"), ("size", "<u4"), ("crc32", "<u4")])

Format = Literal["raw", "jpeg"]
Keep = Literal["sampled", "candidates"]


@dataclass(frozen=True, kw_only=True)
class ShardSettings:
    """Content of shards; options that `DataConfig` has too are those of a run."""

    frames: int = 12
    sampling: Sampler = "discovla"
    sample_rate: float = 1.0
    sampling_divisor: int = 1
    sampling_slice: Slice = "even"
    damaged: Damaged = "refuse"
    hdr: Hdr = "refuse"
    keep: Keep = "sampled"
    """`sampled`: frames that evaluation samples, repeated where a clip is short. `candidates`: every frame
    that training may sample under any seed, once each."""
    size: int | None = 224
    """Side in pixels of the centre crop made by `resize_and_crop`; None keeps whole frames."""
    format: Format = "raw"
    quality: int = 90
    """JPEG quality, 1 to 100."""
    context_length: int = 77
    """Most tokens of a stored caption."""
    clips_per_shard: int = 256

    def __post_init__(self) -> None:
        for name in ("frames", "sampling_divisor", "clips_per_shard"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, found {getattr(self, name)}")
        if self.size is not None and self.size < 1:
            raise ValueError(f"size: expected at least 1 pixel, found {self.size}")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality: expected 1 to 100, found {self.quality}")

    def sampling_for(self, clip: Clip) -> Sampling:
        """Return the sampling whose indices are the frames to store of a clip."""
        sampling = clip_sampling(self, clip)
        return _AllCandidates(**asdict(sampling)) if self.keep == "candidates" else sampling


class _AllCandidates(Sampling):
    """A sampling whose indices are all frames that the original may sample under any seed."""

    def indices(self, count: int, rate: float) -> list[int]:
        return Sampling(**asdict(self)).candidates(count, rate)


def clip_to_json(clip: Clip) -> dict[str, Any]:
    """Return the fields of a clip except its video, without those that are None."""
    names = (
        "id",
        "captions",
        "split",
        "start",
        "end",
        "frame_captions",
        "caption_order",
        "reversed_captions",
    )
    return {name: value for name in names if (value := getattr(clip, name)) is not None}


def clip_from_json(row: dict[str, Any]) -> Clip:
    """Return the clip of a line of clips.jsonl; its video need not exist."""
    frame_captions, order = row.get("frame_captions"), row.get("caption_order")
    backwards = row.get("reversed_captions")
    if frame_captions is not None:
        frame_captions = tuple(None if texts is None else tuple(texts) for texts in frame_captions)
    return Clip(
        id=row["id"],
        video=Path(row["video"]),
        captions=tuple(row["captions"]),
        split=row["split"],
        start=row.get("start"),
        end=row.get("end"),
        frame_captions=frame_captions,
        caption_order=None if order is None else tuple(order),
        reversed_captions=None if backwards is None else tuple(backwards),
    )


@dataclass(frozen=True, kw_only=True)
class TarSample:
    """The bytes of one clip in a tar.

    content: tar headers and members. members: extension, offset and size of each member. rows: `FRAME` rows;
    all offsets count from the beginning of `content`.
    """

    content: bytes
    members: list[tuple[str, int, int]]
    rows: np.ndarray


def tar_sample(
    number: int, clip: Clip, images: Sequence[np.ndarray], facts: dict[str, Any], settings: ShardSettings
) -> TarSample:
    """Encode a clip as the members of a tar.

    Args:
        number: index of the clip in the manifest.
        images: frames to store, uint8 y x 3, all of one size.
        facts: `indices` of the frames in the video, its `count` and `rate`; added to the JSON member.
    """
    members = [("json", json.dumps({**clip_to_json(clip), **facts, "shape": images[0].shape}).encode())]
    members += _token_members(clip, settings.context_length)
    if settings.format == "raw":
        frames = [("frames.npy", npy_bytes(np.stack(images)))]
    else:
        frames = [(f"{i:03d}.jpg", _jpeg_bytes(image, settings.quality)) for i, image in enumerate(images)]
    content = io.BytesIO()
    places = [
        (name, *_append_member(content, f"{number:08d}.{name}", body)) for name, body in members + frames
    ]
    rows = np.empty(len(images), FRAME)
    rows["index"] = facts["indices"]
    if settings.format == "raw":
        _, offset, size = places[-1]
        bytes_per_frame = images[0].size
        rows["offset"] = offset + size - bytes_per_frame * np.arange(len(images), 0, -1)
        rows["size"] = bytes_per_frame
    else:
        rows["offset"] = [offset for _, offset, _ in places[-len(images) :]]
        rows["size"] = [size for _, _, size in places[-len(images) :]]
    view = content.getbuffer()
    rows["crc32"] = [zlib.crc32(view[row["offset"] : row["offset"] + row["size"]]) for row in rows]
    return TarSample(content=bytes(view), members=places, rows=rows)


def tar_end(size: int) -> bytes:
    """Return the end of a tar of `size` bytes: two empty blocks, padded to a whole record."""
    return bytes(2 * tarfile.BLOCKSIZE + -(size + 2 * tarfile.BLOCKSIZE) % tarfile.RECORDSIZE)


def dali_index(samples: Sequence[tuple[int, int, Sequence[tuple[str, int, int]]]]) -> str:
    """Return DALI's index of a tar, version 1.2: a line per sample with extension, offset, size and name.

    Args:
        samples: number, offset in the tar and `TarSample.members` of each clip.
    """
    lines = [f"v1.2 {len(samples)}"]
    for number, start, members in samples:
        lines.append(
            " ".join(f"{name} {start + offset} {size} {number:08d}.{name}" for name, offset, size in members)
        )
    return "\n".join(lines) + "\n"


def npy_bytes(array: np.ndarray) -> bytes:
    """Encode an array as a .npy file."""
    content = io.BytesIO()
    np.save(content, np.ascontiguousarray(array), allow_pickle=False)
    return content.getvalue()


def _jpeg_bytes(image: np.ndarray, quality: int) -> bytes:
    """Encode a frame as JPEG with 4:2:0 chroma, as most videos have."""
    content = io.BytesIO()
    Image.fromarray(image).save(content, "JPEG", quality=quality, subsampling="4:2:0")
    return content.getvalue()


def _append_member(tar: io.BytesIO, name: str, body: bytes) -> tuple[int, int]:
    """Append a member and return the offset and size of its body."""
    info = tarfile.TarInfo(name)  # default times and modes: every run writes the same bytes
    info.size = len(body)
    tar.write(info.tobuf(tarfile.USTAR_FORMAT))
    offset = tar.tell()
    tar.write(body)
    tar.write(bytes(-len(body) % tarfile.BLOCKSIZE))
    return offset, len(body)


def _token_members(clip: Clip, context_length: int) -> list[tuple[str, bytes]]:
    """Return members with the token ids (uint16) of captions, n l, and of frame captions, n f l."""
    members = [("tokens.npy", npy_bytes(_token_ids(clip.captions, context_length)))]
    if clip.frame_captions is not None:
        frames = max((len(texts) for texts in clip.frame_captions if texts is not None), default=0)
        padded = [[*(texts or ()), *[None] * frames][:frames] for texts in clip.frame_captions]
        ids = _token_ids([text for texts in padded for text in texts], context_length)  # (n f) l
        shape = (len(padded), frames, ids.shape[1])
        members.append(("frame_tokens.npy", npy_bytes(ids.reshape(shape))))
    return members


def _token_ids(texts: Sequence[str | None], context_length: int) -> np.ndarray:
    """Return token ids, n l, cut to the longest text; a missing text is a row of zeros."""
    if not texts:
        return np.zeros((0, 0), np.uint16)
    ids, mask = Tokenizer(context_length).encode([text or "" for text in texts])
    present = np.array([text is not None for text in texts])
    longest = int((mask.sum(1).numpy() * present).max())
    return (ids.numpy() * present[:, None])[:, :longest].astype(np.uint16)
