"""Published datasets and their protocols: expected counts and checksums, and the comparison with a copy."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from discovla.data.datasets.annotations import Annotations, check_disjoint
from discovla.data.manifest import Clip

_SHOWN = 5  # ids named in one line


@dataclass(frozen=True, kw_only=True)
class ExpectedSplit:
    """Facts of one split of a protocol; None where a fact is unknown."""

    videos: int | None = None
    captions: int | None = None
    rows: int | None = None
    """Sentences, where several are joined into one caption."""
    ids: str | None = None
    """`id_checksum` of the split's list."""
    pairs: str | None = None
    """`pair_checksum` of the split's clips."""
    numbers: range | None = None
    """All numbers, where the ids are `video<number>`; allows missing and extra ids to be named."""
    excluding: str | None = None
    """Split whose ids are taken away from `numbers`."""


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A published dataset."""

    name: str
    title: str
    reader: Callable[[Path, str | Path, str], Annotations]
    """Reads annotations from (root folder, folder of videos, protocol); its docstring is the help text."""
    protocols: Mapping[str, Mapping[str, ExpectedSplit]]
    """By protocol name, the expected splits; the first protocol is the default."""

    def read(
        self, root: str | Path, *, videos: str | Path | None = None, protocol: str | None = None
    ) -> Annotations:
        """Read the annotation files of a folder.

        Args:
            root: folder of the annotation files.
            videos: folder of the videos, which need not exist; default: `root/videos/all` if it exists (the
                archive of MSR-VTT has it), else `root/videos`.
            protocol: a key of `protocols`; None for the first.

        Raises:
            ValueError: a file is missing or malformed, no clip has a caption, or two splits share a video.
        """
        root = Path(root)
        protocol = protocol or next(iter(self.protocols))
        if protocol not in self.protocols:
            raise ValueError(f"protocol: expected one of {', '.join(self.protocols)}, got {protocol!r}")
        if videos is None:
            videos = root / "videos/all" if (root / "videos/all").is_dir() else root / "videos"
        annotations = self.reader(root, videos, protocol)
        check_disjoint(annotations.listed)
        if not annotations.clips:
            number = sum(map(len, annotations.listed.values()))
            raise ValueError(f"{self.name} {protocol}: none of the {number} listed videos has a caption")
        return replace(annotations, protocol=f"{self.name} {protocol}")


def differences(annotations: Annotations, expected: Mapping[str, ExpectedSplit]) -> list[str]:
    """Compare annotations with a protocol: one line per difference, none if every known fact agrees."""
    lines = []
    for split, facts in expected.items():
        clips = [clip for clip in annotations.clips if clip.split == split]
        captions = sum(len(clip.captions) for clip in clips)
        counts = (
            ("videos", facts.videos, len(clips)),
            ("captions", facts.captions, captions),
            ("rows", facts.rows, annotations.rows.get(split, captions)),
        )
        faults = [
            f"expected {want} {name}, found {have}" for name, want, have in counts if want not in (None, have)
        ]
        faults += _id_differences(facts, split, annotations.listed)
        if facts.pairs is not None and not faults and pair_checksum(clips) != facts.pairs:
            faults.append("the videos are the protocol's, their captions or their order are not")
        lines += [f"{split}: {fault}" for fault in faults]
    return lines


def _id_differences(expected: ExpectedSplit, split: str, listed: Mapping[str, Iterable[str]]) -> list[str]:
    """Compare the ids of a split's list, naming missing and extra ids if the expected ids are known."""
    ids = set(listed.get(split, ()))
    if expected.ids is None or id_checksum(ids) == expected.ids:
        return []
    if expected.numbers is None:
        return ["the ids are not those of the protocol (SHA-256 of the sorted list differs)"]
    excluded = set(listed.get(expected.excluding, ())) if expected.excluding else set()
    known_ids = {f"video{number}" for number in expected.numbers} - excluded
    lines = []
    for kind, names in (("missing", known_ids - ids), ("extra", ids - known_ids)):
        if names:
            shown = sorted(names, key=lambda name: (len(name), name))[:_SHOWN]
            more = ", ..." if len(names) > _SHOWN else ""
            lines.append(f"{len(names)} ids {kind}: {', '.join(shown)}{more}")
    return lines


def id_checksum(ids: Iterable[str]) -> str:
    """Return the SHA-256 of ids, one a line, sorted; independent of the order of a list."""
    return hashlib.sha256("".join(f"{name}\n" for name in sorted(ids)).encode()).hexdigest()


def pair_checksum(clips: Iterable[Clip]) -> str:
    """Return the SHA-256 of lines `<id>\\t<caption>`, in order."""
    lines = (f"{clip.id}\t{caption}\n" for clip in clips for caption in clip.captions)
    return hashlib.sha256("".join(lines).encode()).hexdigest()
