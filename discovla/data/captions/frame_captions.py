"""Still captions of sampled frames, written beforehand by a captioner."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from discovla.data.manifest import Clip, write_whole


def read_frame_captions(path: str | Path) -> dict[str, tuple[str, ...]]:
    """The frame captions of a dataset: `<video id>_<caption>` to one still caption per sampled frame.

    Args:
        path: a JSON object of lists of texts, as DiscoVLA's pseudo captions come.

    Raises:
        ValueError: the file is no such object, or a list is empty or holds something other than texts.
    """
    lists = read_json(path)
    if not isinstance(lists, dict) or not lists:
        found = "an empty object" if lists == {} else type(lists).__name__
        raise ValueError(f"{path}: expected an object of lists of frame captions, found {found}")
    for key, texts in lists.items():
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{path}: {key!r}: expected a list of texts, found {str(texts)[:60]}")
    return {key: tuple(texts) for key, texts in lists.items()}


def write_frame_captions(path: str | Path, clips: Iterable[Clip]) -> int:
    """Write the frame captions of clips in the form that `read_frame_captions` reads.

    Returns: how many pairs of a clip and a caption have some.

    Raises:
        ValueError: none has.
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
    write_whole(Path(path), json.dumps(lists, ensure_ascii=False, indent=0) + "\n")
    return len(lists)


def frame_captions_of(
    lists: Mapping[str, tuple[str, ...]], video_id: str, captions: tuple[str, ...]
) -> tuple[tuple[str, ...] | None, ...]:
    """For each caption of a video its frame captions, None where there are none."""
    return tuple(lists.get(f"{video_id}_{caption}") for caption in captions)


def read_json(path: str | Path) -> Any:
    """A JSON file.

    Raises:
        ValueError: there is no such file, or it is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not JSON: {error.msg} at column {error.colno}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text, found byte {error.start} is not") from error
    except OSError as error:
        raise ValueError(f"{path}: expected a JSON file, {error.strerror}") from error
