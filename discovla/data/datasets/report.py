"""Writing a dataset's manifest, and saying what it holds and what is not as it should be."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from discovla.data.datasets.annotated import Annotated, hold_out
from discovla.data.datasets.protocols import differences
from discovla.data.manifest import Clip, write_manifest, write_whole

_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class SplitReport:
    """What a manifest holds of one split.

    without_frame_captions: captions left without, counted once per video and text, or None where no frame
    captions were given.  shared_captions: by sentence the number of clips that it is said of, where more than
    one.  missing_videos: clips whose file is not there.
    """

    clips: int
    captions: int
    without_frame_captions: int | None
    shared_captions: dict[str, int]
    missing_videos: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Report:
    """What `prepare` wrote, and what it found.

    protocol: the named one, None for a user's own data.  differences: what is not as that protocol has it.
    silent: by split ids of its list without a caption, which are left out.  unlisted: ids with captions that
    are in no list.  notes: whatever else there is to say.
    """

    manifest: Path
    splits: dict[str, SplitReport]
    protocol: str | None = None
    differences: tuple[str, ...] = ()
    silent: dict[str, tuple[str, ...]]
    unlisted: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """The report as text: what was written, a line per split, then all that is to be known of it."""
        lines = [f"wrote {self.manifest}"]
        lines += [_split_line(name, split) for name, split in self.splits.items()]
        for name, split in self.splits.items():
            if split.shared_captions:
                number, said = len(split.shared_captions), sum(split.shared_captions.values())
                lines.append(f"{name}: {number} sentences are said of several clips, {said} times in all")
        for name, ids in self.silent.items():
            lines.append(f"{name}: {len(ids)} listed videos have no caption and are left out: {_shown(ids)}")
        if self.unlisted:
            lines.append(
                f"{len(self.unlisted)} videos with captions are in no split: {_shown(self.unlisted)}"
            )
        lines += self.notes
        if self.protocol is not None and not self.differences:
            lines.append(f"protocol {self.protocol}: all that is known of it agrees")
        lines += [f"protocol {self.protocol} differs: {line}" for line in self.differences]
        return lines

    def write(self, path: Path) -> None:
        """Write all of it, whole lists included, as JSON; the same input gives the same bytes."""
        fields: dict[str, Any] = asdict(self) | {"manifest": self.manifest.name}
        write_whole(path, json.dumps(fields, indent=1, ensure_ascii=False) + "\n")


def prepare(
    found: Annotated | Sequence[Clip], out: str | Path, *, val: int = 0, strict: bool = False
) -> Report:
    """Write the manifest of a dataset and say what it holds; the report goes beside it, as `.report.json`.

    Args:
        found: what a dataset's reader gave, or clips.
        out: the manifest to write.
        val: training clips to hold out as `val`, see `hold_out`.
        strict: whether a difference from the named protocol is an error, and nothing is written.

    Raises:
        ValueError: clips that make no manifest, or a difference where that is an error.
    """
    if not isinstance(found, Annotated):
        found = Annotated(clips=list(found))
    out = Path(out)
    told = differences(found.protocol, found.clips, found.listed, found.rows) if found.protocol else []
    if told and strict:
        raise ValueError(f"protocol {found.protocol} differs: {'; '.join(told)}")
    clips = hold_out(found.clips, val) if val else found.clips
    result = Report(
        manifest=out,
        splits=report(clips),
        protocol=found.protocol,
        differences=tuple(told),
        silent={split: tuple(ids) for split, ids in found.silent.items()},
        unlisted=tuple(found.unlisted),
        notes=tuple(found.notes),
    )
    write_manifest(out, clips)
    result.write(report_path(out))
    return result


def report_path(manifest: Path) -> Path:
    """Where the report of a manifest is."""
    return manifest.with_name(f"{manifest.stem}.report.json")


def report(clips: Sequence[Clip]) -> dict[str, SplitReport]:
    """What there is of each split: clips, captions, what is said twice and what is missing."""
    splits = {}
    for name in dict.fromkeys(clip.split for clip in clips):
        chosen = [clip for clip in clips if clip.split == name]
        bare = None
        if any(clip.frame_captions is not None for clip in chosen):
            bare = sum(len(_bare(clip)) for clip in chosen)
        said = Counter(caption for clip in chosen for caption in dict.fromkeys(clip.captions))
        splits[name] = SplitReport(
            clips=len(chosen),
            captions=sum(len(clip.captions) for clip in chosen),
            without_frame_captions=bare,
            shared_captions={caption: number for caption, number in said.items() if number > 1},
            missing_videos=tuple(str(clip.video) for clip in chosen if not clip.video.is_file()),
        )
    return splits


def _bare(clip: Clip) -> set[str]:
    """The captions of a clip that have no frame captions."""
    lists = clip.frame_captions or (None,) * len(clip.captions)
    return {caption for caption, texts in zip(clip.captions, lists, strict=True) if texts is None}


def _split_line(name: str, split: SplitReport) -> str:
    """One split in a line."""
    line = f"{name}: {split.clips} clips, {split.captions} captions"
    if split.without_frame_captions:
        line += f", {split.without_frame_captions} without frame captions"
    if split.missing_videos:
        line += f", {len(split.missing_videos)} videos missing ({_shown(split.missing_videos)})"
    return line


def _shown(names: Sequence[str]) -> str:
    """The first of some names."""
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
