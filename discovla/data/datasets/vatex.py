"""VATEX: 10 s clips of YouTube videos with ten English captions each."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

from discovla.data.captions.frame_captions import read_json
from discovla.data.datasets.annotated import Annotated, VideoFolder, listed_clips
from discovla.data.datasets.reading import first_of, needed, read_ids

Protocol = Literal["hgr", "mixed-1k5"]

_RELEASE = {"train": "vatex_training_v1.0.json", "val": "vatex_validation_v1.0.json"}


def vatex(root: str | Path, *, protocol: Protocol, videos: str | Path) -> Annotated:
    """VATEX in English.

    hgr: 25,991 clips to train on, and the 3,000 official validation clips cut into 1,500 to select and 1,500
    to test on, every caption a query.  mixed-1k5: the test list that CLIP2Video's release also holds, another
    1,500 of those 3,000.  It shares clips with both halves of hgr: whoever selects on the one and tests on
    the other has seen the test.  Its clips are left out of `val` here, and the report says how many.

    Args:
        root: folder of vatex_data.json with {train,val,test}_list.txt (for mixed-1k5 test1k5_sec_list.txt
            too), or of the original release (vatex_training_v1.0.json, vatex_validation_v1.0.json), whose
            training ids are the list where there is none.
        videos: folder of `<id>.mp4`.

    Raises:
        ValueError: a file is missing or not as expected, or a video is in two splits.
    """
    root, folder = Path(root), VideoFolder(videos)
    if protocol not in get_args(Protocol):
        raise ValueError(f"protocol: expected {' or '.join(get_args(Protocol))}, got {protocol!r}")
    captions, train = _captions(root)
    given = first_of(root, "train_list.txt") if train else needed(root, "train_list.txt")
    lists = {
        "train": read_ids(given) if given is not None else train,
        "val": read_ids(needed(root, "val_list.txt")),
        "test": read_ids(needed(root, "test_list.txt")),
    }
    if protocol == "hgr":
        return listed_clips(captions, lists, folder, "vatex hgr")
    test = read_ids(needed(root, "test1k5_sec_list.txt"))
    shared = {split: len(set(test) & set(names)) for split, names in lists.items()}
    val = [name for name in lists["val"] if name not in set(test)]
    lists |= {"val": val, "test": test}
    note = (
        f"leaking: of the {len(test)} test clips {shared['val']} are in val_list.txt and {shared['test']} in"
        f" test_list.txt; a model selected on hgr's val has seen the former, which are left out of val here;"
        " figures on it do not compare with hgr's"
    )
    return replace(listed_clips(captions, lists, folder, "vatex mixed-1k5"), notes=[note])


def _captions(root: Path) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """English captions by video, and the ids of the release's training file where that is the source."""
    path = first_of(root, "vatex_data.json")
    if path is not None:
        return _english(path), []
    paths = {split: needed(root, name, "vatex_data.json") for split, name in _RELEASE.items()}
    found = {split: _english(path) for split, path in paths.items()}
    return {**found["train"], **found["val"]}, list(found["train"])


def _english(path: Path) -> dict[str, tuple[str, ...]]:
    """The English captions of a file, an object by id or the release's list of objects."""
    found = read_json(path)
    try:
        rows: list[Any] = (
            list(found.items()) if isinstance(found, dict) else [(r["videoID"], r) for r in found]
        )
        captions = {str(name): tuple(row["enCap"]) for name, row in rows}
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected objects with videoID and enCap, or an object of them") from error
    for name, texts in captions.items():
        if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
            raise ValueError(
                f"{path}: {name!r}: enCap: expected texts that are not empty, found {texts}"[:300]
            )
    return captions
