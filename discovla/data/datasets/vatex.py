"""VATEX: 10 s clips of YouTube videos with ten English captions each."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from discovla.data.datasets.annotations import Annotations, listed_clips
from discovla.data.datasets.files import VideoFolder, optional_file, read_json, required_file
from discovla.data.datasets.protocol import Dataset, ExpectedSplit
from discovla.data.datasets.tables import read_ids

_TRAIN_FILE, _VALIDATION_FILE = "vatex_training_v1.0.json", "vatex_validation_v1.0.json"

_Captions = dict[str, tuple[str, ...]]


def read_vatex(root: Path, videos: str | Path, protocol: str) -> Annotations:
    """Read VATEX in English.

    hgr: 25,991 training clips; the 3,000 official validation clips are cut into 1,500 for `val` and 1,500 for
    `test`, every caption a query.  mixed-1k5: the test list in CLIP2Video's release, another 1,500 of those
    3,000.  It shares clips with both halves of hgr, so a model selected on hgr's `val` has seen test clips.
    Here its clips are removed from `val`, and the report counts them.

    Annotations are vatex_data.json, or the original release (vatex_training_v1.0.json and
    vatex_validation_v1.0.json).  Lists are {train,val,test}_list.txt, and test1k5_sec_list.txt for mixed-1k5;
    train_list.txt is optional with the original release.  Videos are `<id>.mp4`.
    """
    folder = VideoFolder(videos)
    captions, release_train = _read_captions(root)
    train = optional_file(root, "train_list.txt") if release_train else required_file(root, "train_list.txt")
    lists = {
        "train": release_train if train is None else read_ids(train),
        "val": read_ids(required_file(root, "val_list.txt")),
        "test": read_ids(required_file(root, "test_list.txt")),
    }
    if protocol == "hgr":
        return listed_clips(captions, lists, folder)
    test = read_ids(required_file(root, "test1k5_sec_list.txt"))
    shared = {split: len(set(test) & set(names)) for split, names in lists.items()}
    lists |= {"val": [name for name in lists["val"] if name not in set(test)], "test": test}
    note = (
        f"leaking: of the {len(test)} test clips {shared['val']} are in val_list.txt and {shared['test']} in"
        f" test_list.txt; a model selected on hgr's val has seen the former, which are left out of val here;"
        " figures on it do not compare with hgr's"
    )
    return replace(listed_clips(captions, lists, folder), notes=[note])


def _read_captions(root: Path) -> tuple[_Captions, list[str]]:
    """Read English captions by video, and the training ids if the original release is the source."""
    path = optional_file(root, "vatex_data.json")
    if path is not None:
        return _english(path), []
    train = _english(required_file(root, _TRAIN_FILE, "vatex_data.json"))
    return train | _english(required_file(root, _VALIDATION_FILE, "vatex_data.json")), list(train)


def _english(path: Path) -> _Captions:
    """Read the English captions of a file: an object by id, or the release's list of objects."""
    content = read_json(path)
    try:
        rows = content.items() if isinstance(content, dict) else [(row["videoID"], row) for row in content]
        captions = {str(name): tuple(row["enCap"]) for name, row in rows}
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected objects with videoID and enCap, or an object of them") from error
    for name, texts in captions.items():
        if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
            raise ValueError(
                f"{path}: {name!r}: enCap: expected texts that are not empty, found {texts}"[:300]
            )
    return captions


_TRAIN = ExpectedSplit(videos=25991, captions=259910)  # as the field reports it

VATEX = Dataset(
    name="vatex",
    title="VATEX in English",
    reader=read_vatex,
    protocols={
        "hgr": {
            "train": _TRAIN,
            "val": ExpectedSplit(
                videos=1500,
                captions=15000,
                ids="77fde2983497b56959246411452a9c4587c66956449deafd12ab3e678bc85d21",
            ),
            "test": ExpectedSplit(
                videos=1500,
                captions=15000,
                ids="efc26b559080d66fa7c8d694e6b3b051378322a051ef35f22c8312c117849d8d",
            ),
        },
        "mixed-1k5": {
            "train": _TRAIN,
            "val": ExpectedSplit(videos=724, captions=7240),
            "test": ExpectedSplit(
                videos=1500,
                captions=15000,
                ids="6ecb94ff2f4ca1a501a5488f551f5e28f3fbb8f7c8aadb04164772854b913556",
            ),
        },
    },
)
