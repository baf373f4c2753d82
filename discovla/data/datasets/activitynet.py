"""ActivityNet Captions: long videos whose sentences make one paragraph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

from discovla.data.captions.frame_captions import read_json
from discovla.data.datasets.annotated import Annotated, VideoFolder, listed_clips
from discovla.data.datasets.reading import first_of, needed, read_ids

Protocol = Literal["paragraph", "paragraph-val_2"]

_LISTS = {"train": "train_ids.json", "test": "val_ids.json"}


def activitynet(root: str | Path, *, protocol: Protocol, videos: str | Path) -> Annotated:
    """ActivityNet Captions, paragraph to video: all sentences of a video joined, the whole video.

    paragraph: 10,009 videos to train on, the 4,917 of val_1.json to test on.  paragraph-val_2: the second
    annotation of those, val_2.json, to test on.  There is nothing to select on but what is held out.

    Args:
        root: folder of train.json and val_1.json or val_2.json; the lists train_ids.json and val_ids.json are
            followed where they are there, and hold ids without a sentence.
        videos: folder of the videos, by their ids without `v_`, or with it.

    Raises:
        ValueError: a file is missing or not as expected, or a video is in both splits.
    """
    root, folder = Path(root), VideoFolder(videos)
    if protocol not in get_args(Protocol):
        raise ValueError(f"protocol: expected {' or '.join(get_args(Protocol))}, got {protocol!r}")
    test = "val_2.json" if protocol == "paragraph-val_2" else "val_1.json"
    said = {"train": _sentences(needed(root, "train.json")), "test": _sentences(needed(root, test))}
    paths = {split: first_of(root, name) for split, name in _LISTS.items()}
    lists = {s: list(said[s]) if path is None else read_ids(path) for s, path in paths.items()}
    paragraphs = {name: (" ".join(texts),) for split in said.values() for name, texts in split.items()}
    found = listed_clips(paragraphs, lists, folder, f"activitynet {protocol}")
    clips = [replace(c, video=folder.find(c.id.removeprefix("v_"), c.id)) for c in found.clips]
    return replace(found, clips=clips, rows=_rows(said, lists))


def _rows(said: Mapping[str, Mapping[str, list[str]]], lists: Mapping[str, list[str]]) -> dict[str, int]:
    """Sentences of the videos of each list."""
    return {split: sum(len(said[split].get(name, ())) for name in names) for split, names in lists.items()}


def _sentences(path: Path) -> dict[str, list[str]]:
    """The sentences of each video without the spaces that most of them begin with."""
    found = read_json(path)
    try:
        texts = {name: [text.strip() for text in row["sentences"]] for name, row in found.items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: expected an object of objects with sentences, by video") from error
    for name, sentences in texts.items():
        if not any(sentences):
            raise ValueError(f"{path}: {name!r}: expected sentences, found none")
    if not texts:
        raise ValueError(f"{path}: expected at least one video, found none")
    return texts
