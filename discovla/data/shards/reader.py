"""Frames of clips from shards, wherever they lie, in any order."""

from __future__ import annotations

import hashlib
import io
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from discovla.data.manifest import Clip
from discovla.data.sampling import Sampling
from discovla.data.shards.byte_ranges import Files, Unread, files_at
from discovla.data.shards.layout import CLIPS, FRAME, FRAMES, SUMMARY, VERSION, ShardSettings
from discovla.data.video.errors import DecodeError
from discovla.data.video.frames import Damaged

_GAP = 1 << 16  # bytes between two frames that are read along rather than asked for apart


@dataclass(frozen=True, kw_only=True)
class StoredFrames:
    """Frames of a clip as shards keep them.

    content: of each of f' frames the bytes of a JPEG, or all of them raw, f' y x 3 uint8.  places: of each
    frame sampled, which of these it is.  size: width and height.
    """

    content: tuple[bytes, ...] | np.ndarray
    places: np.ndarray
    size: tuple[int, int]


class Shards:
    """The clips of a folder of shards, or of its copy behind an http(s) address.

    It pickles, so that worker processes can have it, and holds no frames.  Every process checks the sum of a
    frame when it first reads it, and of one that comes over a network each time.

    Args:
        root: folder or address, as `discovla shard` wrote it.

    Raises:
        ValueError: there are no shards, they are not what was written, or a tar is cut off.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = str(root)
        self.files: Files = files_at(root)
        summary = self._summary()
        self.settings = ShardSettings(**summary["settings"])
        self._tars: list[str] = [shard["name"] for shard in summary["shards"]]
        self._check_tars(summary["shards"])
        rows = [json.loads(line) for line in self._checked(CLIPS, summary).decode().splitlines()]
        self._rows = np.load(io.BytesIO(self._checked(FRAMES, summary)), allow_pickle=False)
        if self._rows.dtype != FRAME:
            raise ValueError(f"{self.files.name(FRAMES)}: expected rows of {FRAME}, found {self._rows.dtype}")
        self._unseen = np.ones(len(self._rows), bool)  # frames whose sums this process has not checked
        folder = Path(root)
        self.clips = [_clip(row, folder) for row in rows]
        self._facts = {row["id"]: _facts(row) for row in rows}

    def split(self, name: str) -> list[Clip]:
        """The clips of a split, in the order of the manifest.

        Raises:
            ValueError: there are none.
        """
        chosen = [clip for clip in self.clips if clip.split == name]
        if not chosen:
            found = ", ".join(f"{key} {n}" for key, n in Counter(clip.split for clip in self.clips).items())
            raise ValueError(f"{self.files.name(CLIPS)}: no clip of the split {name!r}; found {found}")
        return chosen

    def frames(
        self,
        clip: Clip,
        sampling: Sampling,
        each: Callable[[Image.Image], np.ndarray] | None,
        *,
        damaged: Damaged = "refuse",
    ) -> np.ndarray:
        """The sampled frames of a clip, as `read_frames` gives them from its file.

        Args:
            each: applied once to each frame; None takes them as they are kept.

        Returns: uint8, f y x 3; it may not be written to.

        Raises:
            DecodeError: the clip gave none when the shards were made, they hold others, or they cannot be
                read here and now.
        """
        facts, numbers, places = self._chosen(clip, sampling, damaged)
        try:
            kept = self._images(facts, numbers)
        except Unread as error:
            raise DecodeError(clip.video, str(error)) from error
        if each is not None:
            kept = np.stack([each(Image.fromarray(image)) for image in kept])
        return kept if len(places) == len(kept) else kept[places]

    def stored_frames(self, clip: Clip, sampling: Sampling, *, damaged: Damaged = "refuse") -> StoredFrames:
        """The sampled frames of a clip as they are kept, for others to decode.

        Raises:
            DecodeError: as `frames`.
        """
        facts, numbers, places = self._chosen(clip, sampling, damaged)
        height, width = facts["shape"]
        try:
            if self.settings.format == "raw":
                content: tuple[bytes, ...] | np.ndarray = self._images(facts, numbers)
            else:
                content = tuple(bytes(piece) for piece in self._pieces(facts, numbers)[1])
        except Unread as error:
            raise DecodeError(clip.video, str(error)) from error
        return StoredFrames(content=content, places=places, size=(width, height))

    def _chosen(
        self, clip: Clip, sampling: Sampling, damaged: Damaged
    ) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
        """What is known of a clip, the rows of the frames sampled, and of each frame which of those it is."""
        facts = self._facts.get(clip.id)
        if facts is None:
            raise DecodeError(clip.video, f"not in the shards {self.files.name(CLIPS)}")
        reason = facts.get("bad") or (facts.get("problem") if damaged == "refuse" else None)
        if reason:
            raise DecodeError(clip.video, reason)
        try:
            chosen, places = np.unique(sampling.indices(facts["count"], facts["rate"]), return_inverse=True)
        except ValueError as error:
            raise DecodeError(clip.video, str(error)) from error
        numbers, lacking = self._found(facts, chosen)
        if lacking:
            raise DecodeError(clip.video, f"{self.files.name(CLIPS)}: its shard has no frame {lacking[0]}")
        return facts, numbers, places

    def check(self, clips: Iterable[Clip], sampled: Callable[[Clip], Sampling], *, size: int | None) -> None:
        """Refuse, before anything is read, shards that hold other frames than those wanted.

        Args:
            clips: those that will be read; what gives no frames is left to be told then.
            sampled: the frames wanted of a clip; all that a sampling with a seed may draw.
            size: pixels of a side, or None where frames as displayed are wanted.

        Raises:
            ValueError: another size, or a frame that is not there.
        """
        kept = self.settings.size
        name = self.files.name(SUMMARY)
        if kept is not None and kept != size:
            wanted = "full size, for this augment" if size is None else f"{size} pixels a side"
            raise ValueError(
                f"{name}: expected frames of {wanted}, found {kept}; `discovla shard --size` makes others"
            )
        for clip in clips:
            facts = self._facts.get(clip.id, {"bad": "not there"})
            if "bad" in facts:
                continue
            sampling = sampled(clip)
            take = sampling.indices if sampling.seed is None else sampling.candidates
            _, lacking = self._found(facts, np.unique(take(facts["count"], facts["rate"])))
            if lacking:
                raise ValueError(
                    f"{name}: expected the frames of sampling = {sampling.sampler!r}, frames ="
                    f" {sampling.frames}, found no frame {lacking[0]} of clip {clip.id!r};"
                    f" made for {self.settings.sampling!r}, {self.settings.frames},"
                    f" keep = {self.settings.keep!r}"
                )

    def _found(self, facts: dict[str, Any], indices: np.ndarray) -> tuple[np.ndarray, list[int]]:
        """Rows that hold a clip's frames with these indices, and indices that have none."""
        held = self._rows["index"][facts["first"] : facts["first"] + facts["rows"]]
        places = np.searchsorted(held, indices).clip(max=len(held) - 1)
        return facts["first"] + places, indices[held[places] != indices].tolist()

    def _images(self, facts: dict[str, Any], numbers: np.ndarray) -> np.ndarray:
        """Frames as they are kept, f y x 3, by the numbers of their rows."""
        rows, pieces, content = self._pieces(facts, numbers)
        if self.settings.format == "jpeg":
            tar = self._tars[facts["shard"]]
            return np.stack([self._jpeg(tar, row, piece) for row, piece in zip(rows, pieces, strict=True)])
        shape = (*facts["shape"], 3)
        if len(content) == rows["size"].sum():  # one after another, in one run: nothing needs to be copied
            return np.frombuffer(content, np.uint8).reshape(len(rows), *shape)
        return np.stack([np.frombuffer(piece, np.uint8).reshape(shape) for piece in pieces])

    def _pieces(
        self, facts: dict[str, Any], numbers: np.ndarray
    ) -> tuple[np.ndarray, list[memoryview], memoryview]:
        """Rows by their numbers, the bytes of each, sums checked, and the last that were read in one run."""
        tar, rows = self._tars[facts["shard"]], self._rows[numbers]
        offsets, sizes = rows["offset"].tolist(), rows["size"].tolist()
        pieces: list[memoryview] = []
        content = memoryview(b"")
        for first, last in _runs(rows):
            start = offsets[first]
            content = memoryview(self.files.part(tar, start, offsets[last] + sizes[last] - start))
            pieces += [content[offsets[i] - start :][: sizes[i]] for i in range(first, last + 1)]
        if self._unseen[numbers].any():
            self._check_sums(tar, rows, pieces)
            self._unseen[numbers] = not self.files.stay
        return rows, pieces, content

    def _check_sums(self, tar: str, rows: np.ndarray, pieces: Sequence[memoryview]) -> None:
        """Refuse bytes that are not those written."""
        for row, piece, crc32 in zip(rows, pieces, rows["crc32"].tolist(), strict=True):
            if zlib.crc32(piece) != crc32:
                raise Unread(
                    f"{self.files.name(tar)}: frame {row['index']} at byte {row['offset']} is not what was"
                    " written; `discovla shard --verify` makes it again"
                )

    def _jpeg(self, tar: str, row: np.ndarray, content: memoryview) -> np.ndarray:
        """A frame from its JPEG."""
        try:
            return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
        except (OSError, ValueError, SyntaxError) as error:
            raise Unread(f"{self.files.name(tar)}: frame {row['index']} is no JPEG: {error}") from error

    def _summary(self) -> dict[str, Any]:
        """What `shards.json` says."""
        name = self.files.name(SUMMARY)
        try:
            summary = json.loads(self.files.whole(SUMMARY))
        except Unread as error:
            raise ValueError(
                f"{error}; expected the index of shards, which `discovla shard` writes when all are there"
            ) from None
        except ValueError as error:
            raise ValueError(f"{name}: expected the index of shards, found no JSON: {error}") from None
        found = summary.get("version") if isinstance(summary, dict) else None
        if found != VERSION:
            raise ValueError(f"{name}: expected shards of version {VERSION}, found {found}")
        return summary

    def _check_tars(self, shards: Sequence[dict[str, Any]]) -> None:
        """Refuse tars that are not there or of another size, as far as that is known without reading."""
        for shard in shards:
            name = self.files.name(shard["name"])
            try:
                size = self.files.size(shard["name"])
            except Unread as error:
                raise ValueError(f"{error}; `discovla shard` makes it again") from None
            if size is not None and size != shard["bytes"]:
                kind = "cut off" if size < shard["bytes"] else "not what was written"
                raise ValueError(
                    f"{name}: {kind}: expected {shard['bytes']} bytes, found {size};"
                    " `discovla shard` makes it again"
                )

    def _checked(self, file: str, summary: dict[str, Any]) -> bytes:
        """A file that must be what was written."""
        try:
            content = self.files.whole(file)
        except Unread as error:
            raise ValueError(f"{error}; `discovla shard` writes it again") from None
        if hashlib.sha256(content).hexdigest() != summary["files"][file]:
            raise ValueError(
                f"{self.files.name(file)}: not what was written; `discovla shard` writes it again"
            )
        return content


def open_shards(root: str) -> Shards:
    """The shards at a root, which are read once for as long as they stay the same."""
    summary = Path(root) / SUMMARY
    stamp = (summary.stat().st_mtime_ns, summary.stat().st_size) if summary.is_file() else None
    return _opened(root, stamp)


@lru_cache(maxsize=2)
def _opened(root: str, stamp: object) -> Shards:
    return Shards(root)


def _runs(rows: np.ndarray) -> list[tuple[int, int]]:
    """First and last of each run of rows whose bytes lie close together; rows come in the order of bytes."""
    ends = rows["offset"] + rows["size"]
    breaks = np.flatnonzero(rows["offset"][1:] > ends[:-1] + _GAP)
    firsts = [0, *(breaks + 1).tolist()]
    return list(zip(firsts, [*breaks.tolist(), len(rows) - 1], strict=True))


def _clip(row: dict[str, Any], folder: Path) -> Clip:
    """The clip of a line; its path tells only what it was made from."""
    told = row.get("frame_captions")
    return Clip(
        id=row["id"],
        video=Path(row["video"]),
        captions=tuple(row["captions"]),
        split=row["split"],
        start=row.get("start"),
        end=row.get("end"),
        frame_captions=None if told is None else tuple(None if t is None else tuple(t) for t in told),
        caption_order=None if row.get("caption_order") is None else tuple(row["caption_order"]),
    )


def _facts(row: dict[str, Any]) -> dict[str, Any]:
    """What is known of a clip's frames."""
    names = ("bad", "shard", "first", "rows", "shape", "count", "rate", "problem")
    return {name: row[name] for name in names if name in row}
