"""Read frames of clips from shards in any order, from a local folder or from any URL that fsspec opens."""

from __future__ import annotations

import hashlib
import io
import json
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from discovla.data.manifest import Clip, split_clips
from discovla.data.sampling import Sampling
from discovla.data.shards.layout import CLIPS, FRAME, FRAMES, SUMMARY, VERSION, ShardSettings, clip_from_json
from discovla.data.shards.storage import StorageError, open_storage
from discovla.data.video.errors import DecodeError
from discovla.data.video.frames import Damaged

GAP = 1 << 16  # frames with at most so many bytes between them are read as one range


@dataclass(frozen=True, kw_only=True)
class StoredFrames:
    """Frames of a clip as they are stored.

    content: JPEG files, or raw frames f' y x 3 uint8; each frame once. places: for every sampled frame, its
    position in `content`. size: width and height.
    """

    content: tuple[bytes, ...] | np.ndarray
    places: np.ndarray
    size: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class _ClipRecord:
    """Line of clips.jsonl about the frames of a clip.

    bad: reason why there are none. shard: index of the tar. first, rows: slice of the frame table. shape:
    height and width of the frames. count, rate: frames and frame rate of the video. problem: damage of the
    video, found when it was decoded.
    """

    bad: str | None = None
    shard: int = 0
    first: int = 0
    rows: int = 0
    shape: tuple[int, ...] = ()
    count: int = 0
    rate: float = 0.0
    problem: str | None = None


class Shards:
    """Clips of a shard folder; reads their frames from the tars by byte ranges.

    It pickles, so that `DataLoader` workers receive it, and holds no frames. Checksums of frames are verified
    by each process at the first read, and at every read of remote frames.

    Args:
        root: folder written by `discovla shard`, or the URL of a copy of it.

    Raises:
        ValueError: the index is missing or changed, or a local tar is missing or cut off.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = str(root)
        self._storage = open_storage(self.root)
        summary = self._read_summary()
        self.settings = ShardSettings(**summary["settings"])
        self._tars: list[str] = [shard["name"] for shard in summary["shards"]]
        self._check_sizes(summary["shards"])
        lines = [json.loads(line) for line in self._read_index(CLIPS, summary).decode().splitlines()]
        self.clips = [clip_from_json(line) for line in lines]
        names = [field.name for field in fields(_ClipRecord)]
        self._records = {
            line["id"]: _ClipRecord(**{name: line[name] for name in names if name in line}) for line in lines
        }
        self._rows = np.load(io.BytesIO(self._read_index(FRAMES, summary)), allow_pickle=False)
        if self._rows.dtype != FRAME:
            raise ValueError(
                f"{self._storage.path(FRAMES)}: expected rows of {FRAME}, found {self._rows.dtype}"
            )
        self._unverified = np.ones(len(self._rows), bool)  # frames whose checksum is still to be verified

    def split(self, name: str) -> list[Clip]:
        """Return the clips of a split, in the order of the manifest.

        Raises:
            ValueError: there are none.
        """
        return split_clips(self.clips, name, self._storage.path(CLIPS))

    def frames(
        self,
        clip: Clip,
        sampling: Sampling,
        transform: Callable[[Image.Image], np.ndarray] | None,
        *,
        damaged: Damaged = "refuse",
    ) -> np.ndarray:
        """Return the sampled frames of a clip, the same as `read_frames` returns from its video.

        Args:
            transform: applied once to each stored frame; None returns frames as stored.

        Returns: uint8, f y x 3, read-only.

        Raises:
            DecodeError: the clip has no frames, not the sampled ones, or they cannot be read.
        """
        record, numbers, places = self._select(clip, sampling, damaged)
        images = self._images(clip, record, numbers)
        if transform is not None:
            images = np.stack([transform(Image.fromarray(image)) for image in images])
        return images if len(places) == len(images) else images[places]

    def stored_frames(self, clip: Clip, sampling: Sampling, *, damaged: Damaged = "refuse") -> StoredFrames:
        """Return the sampled frames of a clip without decoding them.

        Raises:
            DecodeError: as `frames`.
        """
        record, numbers, places = self._select(clip, sampling, damaged)
        height, width = record.shape
        content: tuple[bytes, ...] | np.ndarray
        if self.settings.format == "raw":
            content = self._images(clip, record, numbers)
        else:
            content = tuple(bytes(piece) for piece in self._read(clip, record, numbers))
        return StoredFrames(content=content, places=places, size=(width, height))

    def check(
        self, clips: Iterable[Clip], sampling_for: Callable[[Clip], Sampling], *, size: int | None
    ) -> None:
        """Check before training that the shards hold the frames to be read; bad clips are left out.

        Args:
            sampling_for: sampling of a clip; with a seed, all frames it may draw are required.
            size: side of the frames in pixels; None requires whole frames.

        Raises:
            ValueError: the frames have another size, or one is missing.
        """
        path, settings = self._storage.path(SUMMARY), self.settings
        if settings.size not in (None, size):
            expected = (
                "whole frames, which this augment needs" if size is None else f"frames of {size} pixels"
            )
            raise ValueError(
                f"{path}: expected {expected}, found {settings.size} pixels; set another"
                " `discovla shard --size`"
            )
        for clip in clips:
            record = self._records.get(clip.id)
            if record is None or record.bad is not None:
                continue
            sampling = sampling_for(clip)
            indices = (sampling.indices if sampling.seed is None else sampling.candidates)(
                record.count, record.rate
            )
            _, missing = self._find_rows(record, np.unique(indices))
            if missing:
                raise ValueError(
                    f"{path}: expected the frames of sampling = {sampling.sampler!r}, frames ="
                    f" {sampling.frames}, found no frame {missing[0]} of clip {clip.id!r}; the shards were"
                    f" made with {settings.sampling!r}, {settings.frames}, keep = {settings.keep!r}"
                )

    def _select(
        self, clip: Clip, sampling: Sampling, damaged: Damaged
    ) -> tuple[_ClipRecord, np.ndarray, np.ndarray]:
        """Return the record of a clip, its sampled rows, each once, and the position of each sample."""
        record = self._records.get(clip.id)
        if record is None:
            raise DecodeError(clip.video, f"not in the shards {self._storage.path(CLIPS)}")
        reason = record.bad or (record.problem if damaged == "refuse" else None)
        if reason:
            raise DecodeError(clip.video, reason)
        try:
            indices, places = np.unique(sampling.indices(record.count, record.rate), return_inverse=True)
        except ValueError as error:
            raise DecodeError(clip.video, str(error)) from error
        numbers, missing = self._find_rows(record, indices)
        if missing:
            raise DecodeError(clip.video, f"{self._storage.path(CLIPS)}: no frame {missing[0]} in its shard")
        return record, numbers, places

    def _find_rows(self, record: _ClipRecord, indices: np.ndarray) -> tuple[np.ndarray, list[int]]:
        """Return the rows of the frames with these indices, and the indices that have no row."""
        stored = self._rows["index"][record.first : record.first + record.rows]
        places = np.searchsorted(stored, indices).clip(max=len(stored) - 1)
        return record.first + places, indices[stored[places] != indices].tolist()

    def _images(self, clip: Clip, record: _ClipRecord, numbers: np.ndarray) -> np.ndarray:
        """Read and decode frames by their rows, f y x 3."""
        pieces = self._read(clip, record, numbers)
        if self.settings.format == "raw":
            shape = (*record.shape, 3)
            content = pieces[0].obj
            assert isinstance(content, bytes)
            if all(piece.obj is content for piece in pieces) and len(content) == sum(map(len, pieces)):
                return np.frombuffer(content, np.uint8).reshape(len(pieces), *shape)  # adjacent: no copy
            return np.stack([np.frombuffer(piece, np.uint8).reshape(shape) for piece in pieces])
        images = []
        for number, piece in zip(numbers, pieces, strict=True):
            try:
                images.append(np.asarray(Image.open(io.BytesIO(piece)).convert("RGB")))
            except (OSError, ValueError, SyntaxError) as error:
                path, index = self._storage.path(self._tars[record.shard]), self._rows["index"][number]
                raise DecodeError(clip.video, f"{path}: frame {index}: expected a JPEG: {error}") from error
        return np.stack(images)

    def _read(self, clip: Clip, record: _ClipRecord, numbers: np.ndarray) -> list[memoryview]:
        """Read the bytes of frames by their rows and verify their checksums."""
        tar, rows = self._tars[record.shard], self._rows[numbers]
        offsets, sizes = rows["offset"].tolist(), rows["size"].tolist()
        runs = [[0, 0]]  # first and last frame of each range
        for i in range(1, len(rows)):
            if offsets[i] > offsets[i - 1] + sizes[i - 1] + GAP:
                runs.append([i, i])
            runs[-1][1] = i
        ranges = [(offsets[first], offsets[last] + sizes[last] - offsets[first]) for first, last in runs]
        try:
            contents = self._storage.read_ranges(tar, ranges)
        except StorageError as error:
            raise DecodeError(clip.video, str(error)) from error
        pieces = [
            memoryview(content)[offsets[i] - start :][: sizes[i]]
            for (first, last), (start, _), content in zip(runs, ranges, contents, strict=True)
            for i in range(first, last + 1)
        ]
        if self._unverified[numbers].any():
            for row, piece in zip(rows, pieces, strict=True):
                if zlib.crc32(piece) != row["crc32"]:
                    frame = f"frame {row['index']} at byte {row['offset']}"
                    raise DecodeError(
                        clip.video,
                        f"{self._storage.path(tar)}: {frame}: expected checksum {row['crc32']:08x}, found"
                        f" {zlib.crc32(piece):08x}; `discovla shard --verify` writes it again",
                    )
            self._unverified[numbers] = not self._storage.stable
        return pieces

    def _read_summary(self) -> dict[str, Any]:
        """Read shards.json."""
        path = self._storage.path(SUMMARY)
        try:
            self._storage.read_ranges(SUMMARY, [(0, 1)])  # a server without ranges would send whole tars
            summary = json.loads(self._storage.read(SUMMARY))
        except StorageError as error:
            raise ValueError(
                f"{error}; expected the index of shards, which `discovla shard` writes last"
            ) from None
        except ValueError as error:
            raise ValueError(f"{path}: expected the index of shards, found no JSON: {error}") from None
        version = summary.get("version") if isinstance(summary, dict) else None
        if version != VERSION:
            raise ValueError(f"{path}: expected shards of version {VERSION}, found {version}")
        return summary

    def _read_index(self, file: str, summary: dict[str, Any]) -> bytes:
        """Read an index file and verify its checksum."""
        try:
            content = self._storage.read(file)
        except StorageError as error:
            raise ValueError(f"{error}; `discovla shard` writes it again") from None
        if hashlib.sha256(content).hexdigest() != summary["files"][file]:
            path = self._storage.path(file)
            raise ValueError(f"{path}: checksum differs from {SUMMARY}; `discovla shard` writes it again")
        return content

    def _check_sizes(self, shards: Sequence[dict[str, Any]]) -> None:
        """Raise ValueError if a tar is missing or has another size, as far as sizes need no request."""
        for shard in shards:
            try:
                size = self._storage.size(shard["name"])
            except StorageError as error:
                raise ValueError(f"{error}; `discovla shard` writes it again") from None
            if size is not None and size != shard["bytes"]:
                kind = "cut off" if size < shard["bytes"] else "changed"
                raise ValueError(
                    f"{self._storage.path(shard['name'])}: {kind}: expected {shard['bytes']} bytes, found"
                    f" {size}; `discovla shard` writes it again"
                )


def open_shards(root: str) -> Shards:
    """Open shards once in a process; a local folder that was written again is opened anew."""
    summary = Path(root) / SUMMARY
    stamp = (summary.stat().st_mtime_ns, summary.stat().st_size) if summary.is_file() else None
    return _open_shards(root, stamp)


@lru_cache(maxsize=2)
def _open_shards(root: str, stamp: object) -> Shards:
    return Shards(root)
