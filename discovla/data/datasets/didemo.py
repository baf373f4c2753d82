"""DiDeMo: videos of Flickr whose moments are described; a video's descriptions make one paragraph."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

from discovla.data.captions.frame_captions import read_json
from discovla.data.datasets.annotated import VIDEO_SUFFIXES, Annotated, VideoFolder, check_apart
from discovla.data.datasets.reading import needed, read_ids
from discovla.data.manifest import Clip

Protocol = Literal["paragraph", "paragraph-listed"]

SECONDS = 30.0  # annotators saw no more of a video: six chunks of 5 s
_SPLITS = ("train", "val", "test")


def didemo(root: str | Path, *, protocol: Protocol, videos: str | Path) -> Annotated:
    """DiDeMo, paragraph to video: the descriptions of a video joined in file order, its first 30 s.

    paragraph: every video of {train,val,test}_data.json.  paragraph-listed: only those of
    {train,val,test}_list.txt, as field reports have them; a list may leave out the extensions.

    Args:
        root: folder of the annotation files.
        videos: folder of the videos under their Flickr names; another extension will do.

    Raises:
        ValueError: a file is missing or not as expected, or a video is in two splits.
    """
    root, folder = Path(root), VideoFolder(videos)
    if protocol not in get_args(Protocol):
        raise ValueError(f"protocol: expected {' or '.join(get_args(Protocol))}, got {protocol!r}")
    said = {split: _descriptions(needed(root, f"{split}_data.json")) for split in _SPLITS}
    clips: list[Clip] = []
    found = Annotated(clips=clips, protocol=f"didemo {protocol}")
    listed, rows, silent = {}, {}, {}
    for split, texts in said.items():
        names = list(texts)
        if protocol == "paragraph-listed":
            names, silent[split] = _listed(root / f"{split}_list.txt", texts)
        listed[split] = [*names, *silent.get(split, ())]
        rows[split] = sum(len(texts[name]) for name in names)
        clips += [_clip(name, texts[name], split, folder) for name in names]
    check_apart(listed)
    return replace(found, listed=listed, rows=rows, silent={s: names for s, names in silent.items() if names})


def _clip(name: str, texts: list[str], split: str, videos: VideoFolder) -> Clip:
    """One video and its paragraph."""
    path = videos.find(name, _stem(name))
    return Clip(id=name, video=path, captions=(" ".join(texts),), split=split, end=SECONDS)


def _descriptions(path: Path) -> dict[str, list[str]]:
    """The descriptions of each video, in file order."""
    texts: dict[str, list[str]] = {}
    rows = read_json(path)
    try:
        for row in rows:
            texts.setdefault(row["video"], []).append(row["description"].strip())
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: expected a list of objects with video and description") from error
    if not texts:
        raise ValueError(f"{path}: expected at least one description, found none")
    return texts


def _listed(path: Path, texts: dict[str, list[str]]) -> tuple[list[str], list[str]]:
    """The videos of a list by their names in the annotations, and those that have no description."""
    names = {**{_stem(name): name for name in texts}, **{name: name for name in texts}}
    ids = read_ids(path)
    found = [names.get(i) or names.get(_stem(i)) for i in ids]
    return [name for name in found if name], [i for i, name in zip(ids, found, strict=True) if not name]


def _stem(name: str) -> str:
    """A file name without the extension of a video; some have none or only its dot, and ids may hold dots."""
    return name.rpartition(".")[0] if name.lower().endswith((*VIDEO_SUFFIXES, ".")) else name
