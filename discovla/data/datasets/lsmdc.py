"""LSMDC: clips of films with one sentence each."""

from __future__ import annotations

import re
from pathlib import Path

from discovla.data.datasets.annotations import Annotations
from discovla.data.datasets.files import VideoFolder, read_text, required_file
from discovla.data.datasets.protocol import Dataset, ExpectedSplit
from discovla.data.manifest import Clip

_FILES = {
    "train": "LSMDC16_annos_training.csv",
    "val": "LSMDC16_annos_val.csv",
    "test": "LSMDC16_challenge_1000_publictect.csv",
}
_SKIPPED = "1012_Unbreakable_00.05.16.065-00.05.21.941"
_CLIP_ID = re.compile(r"(?P<movie>.+)_\d\d\.\d\d\.\d\d\.\d+-\d\d\.\d\d\.\d\d\.\d+")
_COLUMNS = 6


def read_lsmdc(root: Path, videos: str | Path, protocol: str) -> Annotations:
    """Read LSMDC: one sentence a clip, 1,000 test pairs.

    Several rows of one clip make one clip with several captions.  One training clip is left out, as loaders
    of the field do, because its video is broken.

    Annotations are LSMDC16_annos_{training,val}.csv and LSMDC16_challenge_1000_publictect.csv: separated by
    tabs, no header, no quoting.  Videos are `<movie>/<clip id>.avi` or `<clip id>.avi`.
    """
    folder = VideoFolder(videos, ".avi")
    sentences = {split: _read_sentences(required_file(root, name)) for split, name in _FILES.items()}
    skipped = sentences["train"].pop(_SKIPPED, None)
    return Annotations(
        clips=[
            Clip(id=name, video=_video(name, folder), captions=tuple(texts), split=split)
            for split, clips in sentences.items()
            for name, texts in clips.items()
        ],
        listed={split: list(clips) for split, clips in sentences.items()},
        notes=[f"train: left out {_SKIPPED}, as loaders of the field do"] if skipped else [],
    )


def _video(name: str, videos: VideoFolder) -> Path:
    """Find the file of a clip; the dots of its id do not start an extension."""
    match = _CLIP_ID.fullmatch(name)
    return videos.find(f"{match['movie']}/{name}", name) if match else videos.find(name)


def _read_sentences(path: Path) -> dict[str, list[str]]:
    """Read the sentences of each clip, in file order."""
    texts: dict[str, list[str]] = {}
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        cells = [cell.strip() for cell in line.rstrip("\r").split("\t")]
        where = f"{path}:{number}"
        if len(cells) != _COLUMNS:
            raise ValueError(f"{where}: expected {_COLUMNS} columns by tab, found {len(cells)}")
        if not _CLIP_ID.fullmatch(cells[0]):
            raise ValueError(f"{where}: expected a clip id <movie>_<start>-<end>, found {cells[0][:60]!r}")
        if not cells[-1]:
            raise ValueError(f"{where}: the sentence is empty")
        texts.setdefault(cells[0], []).append(cells[-1])
    if not texts:
        raise ValueError(f"{path}: expected at least one row, found none")
    return texts


LSMDC = Dataset(
    name="lsmdc",
    title="LSMDC",
    reader=read_lsmdc,
    protocols={"standard": {"test": ExpectedSplit(videos=1000, captions=1000)}},
)
