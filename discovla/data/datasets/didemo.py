"""DiDeMo: Flickr videos with descriptions of moments, joined into one paragraph a video."""

from __future__ import annotations

from pathlib import Path

from discovla.data.datasets.annotations import Annotations
from discovla.data.datasets.files import VIDEO_SUFFIXES, VideoFolder, read_json, required_file
from discovla.data.datasets.protocol import Dataset, ExpectedSplit
from discovla.data.datasets.tables import read_ids
from discovla.data.manifest import Clip

SECONDS = 30.0  # annotators saw the first six chunks of 5 s


def read_didemo(root: Path, videos: str | Path, protocol: str) -> Annotations:
    """Read DiDeMo, paragraph to video: the descriptions of a video joined in file order, its first 30 s.

    paragraph: every video of {train,val,test}_data.json.  paragraph-listed: only the videos of
    {train,val,test}_list.txt, whose ids may lack the extension.  Videos have their Flickr names, with any
    extension.
    """
    folder = VideoFolder(videos)
    clips: list[Clip] = []
    listed, rows = {}, {}
    for split in ("train", "val", "test"):
        texts = _read_descriptions(required_file(root, f"{split}_data.json"))
        names, unmatched = list(texts), []
        if protocol == "paragraph-listed":
            names, unmatched = _match_ids(read_ids(root / f"{split}_list.txt"), texts)
        listed[split] = [*names, *unmatched]
        rows[split] = sum(len(texts[name]) for name in names)
        clips += [
            Clip(
                id=name,
                video=folder.find(name, _stem(name)),
                captions=(" ".join(texts[name]),),
                split=split,
                end=SECONDS,
            )
            for name in names
        ]
    return Annotations(clips=clips, listed=listed, rows=rows)


def _read_descriptions(path: Path) -> dict[str, list[str]]:
    """Read the descriptions of each video, in file order."""
    texts: dict[str, list[str]] = {}
    try:
        for row in read_json(path):
            texts.setdefault(row["video"], []).append(row["description"].strip())
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: expected a list of objects with video and description") from error
    if not texts:
        raise ValueError(f"{path}: expected at least one description, found none")
    return texts


def _match_ids(ids: list[str], texts: dict[str, list[str]]) -> tuple[list[str], list[str]]:
    """Match ids with names in the annotations, ignoring extensions; return the names and unmatched ids."""
    names = {_stem(name): name for name in texts} | {name: name for name in texts}
    matches = {i: names.get(i) or names.get(_stem(i)) for i in ids}
    return [name for name in matches.values() if name], [i for i, name in matches.items() if not name]


def _stem(name: str) -> str:
    """Cut a video extension or a final dot; other dots are part of the name."""
    return name.rpartition(".")[0] if name.lower().endswith((*VIDEO_SUFFIXES, ".")) else name


DIDEMO = Dataset(
    name="didemo",
    title="DiDeMo",
    reader=read_didemo,
    protocols={
        "paragraph": {
            "val": ExpectedSplit(videos=1094, rows=4180),
            "test": ExpectedSplit(videos=1037, rows=4021),
        },
        "paragraph-listed": {  # as the field reports it
            "train": ExpectedSplit(videos=8395),
            "val": ExpectedSplit(videos=1065),
            "test": ExpectedSplit(videos=1004),
        },
    },
)
