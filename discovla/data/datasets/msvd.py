"""MSVD: 1,970 clips of YouTube videos with about 40 captions each."""

from __future__ import annotations

from pathlib import Path

from discovla.data.datasets.annotations import Annotations, listed_clips
from discovla.data.datasets.files import VideoFolder, read_captions, required_file
from discovla.data.datasets.protocol import Dataset, ExpectedSplit
from discovla.data.datasets.tables import read_ids


def read_msvd(root: Path, videos: str | Path, protocol: str) -> Annotations:
    """Read MSVD: 1,200 / 100 / 670 clips, every caption a query.

    Id lists are {train,val,test}_list.txt; captions are raw-captions.pkl (lists of words) or
    captions_msvd.json (lists of texts).  Videos are `<id>.avi` or have another extension.
    """
    captions = read_captions(required_file(root, "raw-captions.pkl", "captions_msvd.json"))
    lists = {split: read_ids(required_file(root, f"{split}_list.txt")) for split in ("train", "val", "test")}
    return listed_clips(captions, lists, VideoFolder(videos, ".avi"))


MSVD = Dataset(
    name="msvd",
    title="MSVD",
    reader=read_msvd,
    protocols={
        "standard": {
            "train": ExpectedSplit(
                videos=1200,
                captions=48774,
                ids="abfb8ab5660b464cf547d63a37a369920ff92c5f547af80f07aedd709df335d3",
            ),
            "val": ExpectedSplit(
                videos=100,
                captions=4290,
                ids="9527cf1ef6c8fe2fb1ecfda0e1856acc563fecef5ff0a409b5d908b65c1e6ed4",
            ),
            "test": ExpectedSplit(
                videos=670,
                captions=27763,
                ids="95eacd1fddb1d88cd7144267913ef02d0ecb8cc94a88bc484035433a2d8f9c7a",
            ),
        }
    },
)
