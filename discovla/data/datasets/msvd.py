"""MSVD: 1,970 clips of YouTube videos with many captions each."""

from __future__ import annotations

from pathlib import Path

from discovla.data.datasets.annotated import Annotated, VideoFolder, listed_clips
from discovla.data.datasets.reading import needed, read_captions, read_ids

_CAPTIONS = ("raw-captions.pkl", "captions_msvd.json")


def msvd(root: str | Path, *, videos: str | Path) -> Annotated:
    """MSVD: 1,200 / 100 / 670 clips, every caption a query.

    Args:
        root: folder of {train,val,test}_list.txt and of raw-captions.pkl (lists of words) or
            captions_msvd.json (lists of texts).
        videos: folder of `<id>.avi`, or of another extension.

    Raises:
        ValueError: a file is missing or not as expected, or a video is in two splits.
    """
    root = Path(root)
    captions = read_captions(needed(root, *_CAPTIONS))
    lists = {split: read_ids(needed(root, f"{split}_list.txt")) for split in ("train", "val", "test")}
    return listed_clips(captions, lists, VideoFolder(videos, ".avi"), "msvd standard")
