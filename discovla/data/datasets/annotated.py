"""What a dataset's annotation files hold, whichever their form."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from discovla.data.captions.frame_captions import frame_captions_of
from discovla.data.manifest import Clip

VIDEO_SUFFIXES = (
    *(".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".3gp", ".3g2"),
    *(".mts", ".m2ts", ".ts", ".ogv", ".gif"),
)


@dataclass(frozen=True, kw_only=True)
class Annotated:
    """Clips of a dataset and what there was to say on the way.

    protocol: `<dataset> <protocol>` as `PROTOCOLS` knows it, None for a user's own data.  listed: by split
    the ids its list holds.  rows: by split the rows or sentences read, where several make one caption.
    silent: by split ids of the list that have no caption and are left out.  unlisted: ids that have captions
    and are in no list.  notes: whatever else the report has to say.
    """

    clips: list[Clip]
    protocol: str | None = None
    listed: Mapping[str, Sequence[str]] = field(default_factory=dict)
    rows: Mapping[str, int] = field(default_factory=dict)
    silent: Mapping[str, Sequence[str]] = field(default_factory=dict)
    unlisted: Sequence[str] = ()
    notes: Sequence[str] = ()


class VideoFolder:
    """Where the video of an id is, whatever its extension.

    Args:
        folder: of the video files.
        extension: that a file is expected to have where there is none yet.
    """

    def __init__(self, folder: str | Path, extension: str = ".mp4") -> None:
        self.folder = Path(folder).resolve()
        self.extension = extension
        self._known: dict[Path, dict[str, str]] = {}

    def find(self, *names: str) -> Path:
        """The first file that has one of the names, with or without an extension.

        Args:
            names: relative to the folder, the likeliest first.

        Returns: a path that need not exist; then it is the first name, with the expected extension where it
            has none.
        """
        for name in names:
            path = self.folder / name
            found = self._files(path.parent).get(path.name)
            if found is not None:
                return path.parent / found
        first = names[0]
        known = first.lower().endswith(VIDEO_SUFFIXES)
        return self.folder / (first if known else first.removesuffix(".") + self.extension)

    def _files(self, folder: Path) -> dict[str, str]:
        """File names of a folder by themselves and by their stem, of several the expected extension first."""
        if folder not in self._known:
            files = sorted(p.name for p in folder.iterdir() if p.is_file()) if folder.is_dir() else []
            files.sort(key=lambda name: not name.endswith(self.extension))
            stems = [(n.rpartition(".")[0], n) for n in files if n.lower().endswith(VIDEO_SUFFIXES)]
            self._known[folder] = dict(reversed([(name, name) for name in files] + stems))
            self._known[folder] |= {name: name for name in files}
        return self._known[folder]


def listed_clips(
    captions: Mapping[str, tuple[str, ...]],
    lists: Mapping[str, Sequence[str]],
    videos: VideoFolder,
    protocol: str,
) -> Annotated:
    """Clips of the ids of each split's list, in its order, with their captions.

    Raises:
        ValueError: an id is in two lists, or no id has a caption.
    """
    check_apart(lists)
    clips = [
        Clip(id=name, video=videos.find(name), captions=captions[name], split=split)
        for split, names in lists.items()
        for name in names
        if captions.get(name)
    ]
    if not clips:
        number = sum(map(len, lists.values()))
        raise ValueError(f"{protocol}: none of the {number} videos of the lists has a caption")
    known = {name for names in lists.values() for name in names}
    silent = {split: [n for n in names if not captions.get(n)] for split, names in lists.items()}
    return Annotated(
        clips=clips,
        protocol=protocol,
        listed=lists,
        silent={split: names for split, names in silent.items() if names},
        unlisted=[name for name in captions if name not in known],
    )


def check_apart(lists: Mapping[str, Iterable[str]]) -> None:
    """Refuse splits that share a video.

    Raises:
        ValueError: the first shared id, both splits and how many they share.
    """
    seen: dict[str, set[str]] = {}
    for split, names in lists.items():
        names = list(names)
        for other, known in seen.items():
            shared = [name for name in names if name in known]
            if shared:
                raise ValueError(
                    f"expected splits without a common video, found {len(shared)} in {other} and in {split},"
                    f" the first {shared[0]}"
                )
        seen[split] = set(names)


def with_frame_captions(clips: Sequence[Clip], lists: Mapping[str, tuple[str, ...]]) -> list[Clip]:
    """The same clips, those of the split `train` with their frame captions, None where there are none."""
    return [
        replace(clip, frame_captions=frame_captions_of(lists, clip.id, clip.captions))
        if clip.split == "train"
        else clip
        for clip in clips
    ]


def first_captions(clips: Iterable[Clip]) -> list[Clip]:
    """The same clips with their first caption alone and no frame captions."""
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
    """Move `number` training clips, evenly spaced, to the split `val`, each with its first caption.

    For datasets whose protocol has no validation clips of its own: what is selected on them never sees the
    test.

    Raises:
        ValueError: there are not more training clips than that, or there is a `val` already.
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
