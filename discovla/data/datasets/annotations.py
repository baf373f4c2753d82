"""Annotations of a dataset as clips, common changes to such clips, and DiscoVLA's file of frame captions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from discovla.data.datasets.files import VideoFolder, read_json
from discovla.data.manifest import Clip
from discovla.files import write_file


@dataclass(frozen=True, kw_only=True)
class Annotations:
    """Clips read from annotation files, with the facts that the report checks and prints."""

    clips: list[Clip]
    protocol: str | None = None
    """`<dataset> <protocol>`, a key of `PROTOCOLS`; None for a user's own data."""
    listed: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """By split, the video ids of its list."""
    rows: Mapping[str, int] = field(default_factory=dict)
    """By split, the number of sentences, if several sentences are joined into one caption."""
    unlisted: Sequence[str] = ()
    """Ids that have captions and are in no list."""
    notes: Sequence[str] = ()
    """Further lines for the report."""

    @property
    def uncaptioned(self) -> dict[str, list[str]]:
        """By split, the listed ids that have no caption and therefore no clip."""
        ids = {clip.id for clip in self.clips}
        missing = {split: [n for n in names if n not in ids] for split, names in self.listed.items()}
        return {split: names for split, names in missing.items() if names}


def listed_clips(
    captions: Mapping[str, tuple[str, ...]], lists: Mapping[str, Sequence[str]], videos: VideoFolder
) -> Annotations:
    """Make a clip of every listed id that has a caption, in the order of the lists."""
    clips = [
        Clip(id=name, video=videos.find(name), captions=captions[name], split=split)
        for split, names in lists.items()
        for name in names
        if captions.get(name)
    ]
    listed = {name for names in lists.values() for name in names}
    return Annotations(clips=clips, listed=lists, unlisted=[n for n in captions if n not in listed])


def check_disjoint(lists: Mapping[str, Iterable[str]]) -> None:
    """Refuse splits that share a video.

    Raises:
        ValueError: names the first shared id, both splits and how many ids they share.
    """
    seen: dict[str, set[str]] = {}
    for split, names in lists.items():
        names = list(names)
        for other, others in seen.items():
            shared = [name for name in names if name in others]
            if shared:
                raise ValueError(
                    f"expected splits without a common video, found {len(shared)} in {other} and in {split},"
                    f" the first {shared[0]}"
                )
        seen[split] = set(names)


def first_captions(clips: Iterable[Clip]) -> list[Clip]:
    """Reduce each clip to its first caption, without frame captions."""
    return [
        replace(
            clip,
            captions=clip.captions[:1],
            frame_captions=None,
            caption_order=None if clip.caption_order is None else clip.caption_order[:1],
        )
        for clip in clips
    ]


def hold_out(clips: Sequence[Clip], number: int) -> list[Clip]:
    """Move `number` evenly spaced training clips to the split `val`, each with its first caption.

    For protocols without validation clips: checkpoints are then selected without the test clips.

    Raises:
        ValueError: there are not more training clips than `number`, or a split `val` exists already.
    """
    train = [i for i, clip in enumerate(clips) if clip.split == "train"]
    if not 0 <= number < len(train):
        raise ValueError(f"val: expected fewer than the {len(train)} training clips, got {number}")
    if number and any(clip.split == "val" for clip in clips):
        raise ValueError("val: the dataset has a split 'val' of its own; expected 0 clips to hold out")
    held = {train[i * len(train) // number] for i in range(number)}
    return [
        replace(first_captions([clip])[0], split="val") if i in held else clip for i, clip in enumerate(clips)
    ]


def video_key(path: Path) -> Hashable:
    """Return a key that is equal for all paths of one video file, by links or otherwise."""
    try:
        status = path.stat()
    except OSError:
        return path.resolve()
    return status.st_dev, status.st_ino


def hold_out_videos(clips: Sequence[Clip], sizes: Mapping[str, int | float], *, seed: int = 0) -> list[Clip]:
    """Move training clips to other splits, all clips of a video file together and with all their captions.

    Videos are chosen by a hash of the seed and the ids of their clips, so that clips added later move few
    others.  A video is left in training if a clip of it is already in another split.

    Args:
        clips: of a user's own data.
        sizes: by split, a number of clips, or their share of all training clips if it is a float.  A split
            gets more clips only if its last video has more.
        seed: of the choice.

    Raises:
        ValueError: a split exists already, or too few training clips would remain.
    """
    sizes = {split: size for split, size in sizes.items() if size}
    for split in sizes:
        if any(clip.split == split for clip in clips):
            raise ValueError(f"--{split}: the clips have a split {split!r} of their own; leave --{split} out")
    videos: dict[Hashable, list[int]] = {}
    for i, clip in enumerate(clips):
        videos.setdefault(video_key(clip.video), []).append(i)
    total = sum(clip.split == "train" for clip in clips)
    whole = [members for members in videos.values() if all(clips[i].split == "train" for i in members)]
    names = {members[0]: min(clips[i].id for i in members) for members in whole}
    whole.sort(key=lambda m: hashlib.sha256(f"{seed}/{names[m[0]]}".encode()).digest())
    splits = [clip.split for clip in clips]
    for split, size in sizes.items():
        wanted = max(1, round(size * total)) if isinstance(size, float) else size
        count = 0
        while count < wanted and whole:
            members = whole.pop()
            count += len(members)
            for i in members:
                splits[i] = split
        if count < wanted or "train" not in splits:
            raise ValueError(
                f"--{split}: expected fewer clips than the {total} for training, which are of "
                f"{len(videos)} videos, found {wanted}"
            )
    return [replace(clip, split=split) for clip, split in zip(clips, splits, strict=True)]


def read_frame_captions(path: str | Path) -> dict[str, tuple[str, ...]]:
    """Read frame captions, as DiscoVLA releases them.

    Raises:
        ValueError: the file is not an object of non-empty lists of texts.
    """
    lists = read_json(path)
    if not isinstance(lists, dict) or not lists:
        kind = "an empty object" if lists == {} else type(lists).__name__
        raise ValueError(f"{path}: expected an object of lists of frame captions, found {kind}")
    for key, texts in lists.items():
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{path}: {key!r}: expected a list of texts, found {str(texts)[:60]}")
    return {key: tuple(texts) for key, texts in lists.items()}


def write_frame_captions(path: str | Path, clips: Iterable[Clip]) -> None:
    """Write the frame captions of clips; captions without frame captions are left out.

    Raises:
        ValueError: no clip has frame captions.
        OSError: the file cannot be written.
    """
    lists = {
        f"{clip.id}_{caption}": texts
        for clip in clips
        for caption, texts in zip(clip.captions, clip.frame_captions or (), strict=False)
        if texts is not None
    }
    if not lists:
        raise ValueError(f"{path}: expected a clip with frame captions, found none")
    write_file(Path(path), json.dumps(lists, ensure_ascii=False, indent=0) + "\n")


def with_frame_captions(
    clips: Sequence[Clip], lists: Mapping[str, tuple[str, ...]], split: str = "train"
) -> list[Clip]:
    """Set the frame captions of the clips of one split: per caption a list, or None if `lists` has none."""
    return [
        replace(clip, frame_captions=tuple(lists.get(f"{clip.id}_{caption}") for caption in clip.captions))
        if clip.split == split
        else clip
        for clip in clips
    ]
