"""LSMDC: clips of films with one sentence each."""

from __future__ import annotations

import re
from pathlib import Path

from discovla.data.datasets.annotated import Annotated, VideoFolder, check_apart
from discovla.data.datasets.reading import needed, read_text
from discovla.data.manifest import Clip

_FILES = {
    "train": "LSMDC16_annos_training.csv",
    "val": "LSMDC16_annos_val.csv",
    "test": "LSMDC16_challenge_1000_publictect.csv",
}
_SKIPPED = "1012_Unbreakable_00.05.16.065-00.05.21.941"
_CLIP_ID = re.compile(r"(?P<movie>.+)_\d\d\.\d\d\.\d\d\.\d+-\d\d\.\d\d\.\d\d\.\d+")
_COLUMNS = 6


def lsmdc(root: str | Path, *, videos: str | Path) -> Annotated:
    """LSMDC: a sentence a clip, 1,000 pairs to test on.

    A clip that several rows describe is one clip with their sentences.  One training clip is left out, as
    loaders of the field do: its video is broken.

    Args:
        root: folder of LSMDC16_annos_{training,val}.csv and LSMDC16_challenge_1000_publictect.csv, tables by
            tab without a header, in which a quotation mark is only that.
        videos: folder of `<movie>/<clip id>.avi`, or of `<clip id>.avi`.

    Raises:
        ValueError: a file is missing or a row not as expected, or a clip is in two splits.
    """
    root, folder = Path(root), VideoFolder(videos, ".avi")
    said = {split: _sentences(needed(root, name)) for split, name in _FILES.items()}
    skipped = said["train"].pop(_SKIPPED, None)
    listed = {split: list(texts) for split, texts in said.items()}
    check_apart(listed)
    return Annotated(
        clips=[
            Clip(id=name, video=_video(name, folder), captions=tuple(sentences), split=split)
            for split, texts in said.items()
            for name, sentences in texts.items()
        ],
        protocol="lsmdc standard",
        listed=listed,
        notes=[f"train: left out {_SKIPPED}, as loaders of the field do"] if skipped else [],
    )


def _video(name: str, videos: VideoFolder) -> Path:
    """The file of a clip.  Its id holds dots: it has no extension to cut off."""
    match = _CLIP_ID.fullmatch(name)
    return videos.find(f"{match['movie']}/{name}", name) if match else videos.find(name)


def _sentences(path: Path) -> dict[str, list[str]]:
    """The sentences of each clip, in file order."""
    texts: dict[str, list[str]] = {}
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        cells = line.rstrip("\r").split("\t")
        if len(cells) != _COLUMNS:
            raise ValueError(f"{path}:{number}: expected {_COLUMNS} columns by tab, found {len(cells)}")
        if not _CLIP_ID.fullmatch(cells[0].strip()):
            raise ValueError(
                f"{path}:{number}: expected a clip id <movie>_<start>-<end>, found {cells[0][:60]!r}"
            )
        if not cells[-1].strip():
            raise ValueError(f"{path}:{number}: the sentence is empty")
        texts.setdefault(cells[0].strip(), []).append(cells[-1].strip())
    if not texts:
        raise ValueError(f"{path}: expected at least one row, found none")
    return texts
