"""Frame captions in DiscoVLA's JSON: `<clip id>_<caption>` to one still caption per sampled frame."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from discovla.data.datasets.files import read_json
from discovla.data.manifest import Clip, write_atomic


def read_frame_captions(path: str | Path) -> dict[str, tuple[str, ...]]:
    """Read frame captions, as DiscoVLA releases them.

    Raises:
        ValueError: the file is not an object of non-empty lists of texts.
    """
    lists = read_json(path)
    if not isinstance(lists, dict) or not lists:
        kind = "an empty object" if lists == {} else type(lists).__name__
        raise ValueError(f"{path}: expected an object of lists of frame captions, found {kind}")
    for key, texts in lists.items():
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{path}: {key!r}: expected a list of texts, found {str(texts)[:60]}")
    return {key: tuple(texts) for key, texts in lists.items()}


def write_frame_captions(path: str | Path, clips: Iterable[Clip]) -> None:
    """Write the frame captions of clips; captions without frame captions are left out.

    Raises:
        ValueError: no clip has frame captions.
        OSError: the file cannot be written.
    """
    lists = {
        f"{clip.id}_{caption}": texts
        for clip in clips
        for caption, texts in zip(clip.captions, clip.frame_captions or (), strict=False)
        if texts is not None
    }
    if not lists:
        raise ValueError(f"{path}: expected a clip with frame captions, found none")
    write_atomic(Path(path), json.dumps(lists, ensure_ascii=False, indent=0) + "\n")


def with_frame_captions(
    clips: Sequence[Clip], lists: Mapping[str, tuple[str, ...]], split: str = "train"
) -> list[Clip]:
    """Set the frame captions of the clips of one split: per caption a list, or None if `lists` has none."""
    return [
        replace(clip, frame_captions=tuple(lists.get(f"{clip.id}_{caption}") for caption in clip.captions))
        if clip.split == split
        else clip
        for clip in clips
    ]
