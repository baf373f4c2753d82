"""Write the manifest of a dataset, and report its contents and its differences from the protocol."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from discovla.data.datasets import PROTOCOLS
from discovla.data.datasets.annotations import Annotations, hold_out
from discovla.data.datasets.protocol import differences
from discovla.data.manifest import Clip, write_manifest
from discovla.files import write_file
from discovla.foreign import to_json

_SHOWN = 3  # names in one line


@dataclass(frozen=True, kw_only=True)
class SplitReport:
    """Contents of one split of a manifest."""

    clips: int
    captions: int
    without_frame_captions: int | None
    """Captions without frame captions, each text of a clip counted once; None if no caption has any."""
    shared_captions: dict[str, int]
    """By sentence, the number of clips it describes, if more than one."""
    missing_videos: tuple[str, ...]
    """Video files that do not exist."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Contents of a manifest, and what `prepare` found in its sources; see `Annotations`."""

    manifest: Path
    splits: dict[str, SplitReport]
    protocol: str | None = None
    differences: tuple[str, ...] = ()
    uncaptioned: dict[str, list[str]]
    unlisted: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """Return the report as text."""
        lines = [f"wrote {self.manifest}"]
        for name, split in self.splits.items():
            line = f"{name}: {split.clips} clips, {split.captions} captions"
            if split.without_frame_captions:
                line += f", {split.without_frame_captions} without frame captions"
            if split.missing_videos:
                line += f", {len(split.missing_videos)} videos missing ({_first(split.missing_videos)})"
            lines.append(line)
        for name, split in self.splits.items():
            if split.shared_captions:
                number, total = len(split.shared_captions), sum(split.shared_captions.values())
                lines.append(f"{name}: {number} sentences describe several clips, {total} clips in all")
        for name, ids in self.uncaptioned.items():
            lines.append(f"{name}: {len(ids)} listed videos have no caption and are left out: {_first(ids)}")
        if self.unlisted:
            lines.append(
                f"{len(self.unlisted)} videos with captions are in no split: {_first(self.unlisted)}"
            )
        lines += self.notes
        if self.protocol is not None and not self.differences:
            lines.append(f"protocol {self.protocol}: every known count and checksum agrees")
        lines += [f"protocol {self.protocol} differs: {line}" for line in self.differences]
        return lines


def prepare(
    annotations: Annotations | Sequence[Clip], out: str | Path, *, val: int = 0, strict: bool = False
) -> Report:
    """Write the manifest of a dataset, and its report beside it as `<manifest>.report.json`.

    The same annotations give the same bytes.

    Args:
        annotations: from a dataset's reader, or clips.
        out: the manifest to write.
        val: training clips to hold out as `val`, see `hold_out`.
        strict: raise if the annotations differ from their protocol, and write nothing.

    Raises:
        ValueError: the clips are no valid manifest, or differ from their protocol with `strict`.
    """
    if not isinstance(annotations, Annotations):
        annotations = Annotations(clips=list(annotations))
    out, protocol = Path(out), annotations.protocol
    faults = differences(annotations, PROTOCOLS[protocol]) if protocol else []
    if faults and strict:
        raise ValueError(f"protocol {protocol} differs: {'; '.join(faults)}")
    clips = hold_out(annotations.clips, val) if val else annotations.clips
    result = Report(
        manifest=out,
        splits=split_reports(clips),
        protocol=protocol,
        differences=tuple(faults),
        uncaptioned=annotations.uncaptioned,
        unlisted=tuple(annotations.unlisted),
        notes=tuple(annotations.notes),
    )
    write_manifest(out, clips)
    fields = asdict(result) | {"manifest": out.name}
    report = out.with_name(f"{out.stem}.report.json")
    write_file(report, to_json(fields, indent=1) + "\n")
    return result


def split_reports(clips: Sequence[Clip]) -> dict[str, SplitReport]:
    """Return the contents of each split."""
    splits = {}
    for name in dict.fromkeys(clip.split for clip in clips):
        chosen = [clip for clip in clips if clip.split == name]
        clips_by_caption = Counter(caption for clip in chosen for caption in dict.fromkeys(clip.captions))
        with_some = any(clip.frame_captions is not None for clip in chosen)
        splits[name] = SplitReport(
            clips=len(chosen),
            captions=sum(len(clip.captions) for clip in chosen),
            without_frame_captions=sum(map(_without_frame_captions, chosen)) if with_some else None,
            shared_captions={text: number for text, number in clips_by_caption.items() if number > 1},
            missing_videos=tuple(str(clip.video) for clip in chosen if not clip.video.is_file()),
        )
    return splits


def _without_frame_captions(clip: Clip) -> int:
    """Count the different captions of a clip that have no frame captions."""
    lists = clip.frame_captions or (None,) * len(clip.captions)
    return len({caption for caption, texts in zip(clip.captions, lists, strict=True) if texts is None})


def _first(names: Sequence[str]) -> str:
    """Join the first of some names."""
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
