"""Training pairs in the order of the dataset."""

from __future__ import annotations

from pathlib import Path

import pytest

from discovla.data.dataset import Pair, training_pairs
from discovla.data.manifest import Clip


def clip(name: str, **changes) -> Clip:
    fields = {
        "id": name,
        "video": Path(f"/{name}.mp4"),
        "captions": (f"{name} 0", f"{name} 1"),
        "split": "train",
    }
    return Clip(**(fields | changes))


def test_pairs_go_clip_by_clip():
    pairs = training_pairs([clip("a"), clip("b")], frame_captions=False, missing="error")
    assert pairs == [Pair(0, 0), Pair(0, 1), Pair(1, 0), Pair(1, 1)]


def test_pairs_follow_an_order_of_captions():
    clips = [clip("a", caption_order=(5, 1)), clip("b", caption_order=(0, 7))]
    pairs = training_pairs(clips, frame_captions=False, missing="error")
    assert pairs == [Pair(1, 0), Pair(0, 1), Pair(0, 0), Pair(1, 1)]


def test_an_order_of_some_clips_only_is_refused():
    with pytest.raises(ValueError, match="caption_order: expected all 2 clips to have one, found 1"):
        training_pairs([clip("a", caption_order=(0, 1)), clip("b")], frame_captions=False, missing="error")


def test_pairs_without_frame_captions_are_dropped_and_counted(caplog):
    clips = [clip("a", frame_captions=(None, ("x",))), clip("b")]
    assert training_pairs(clips, frame_captions=True, missing="drop") == [Pair(0, 1)]
    assert "3 of 4 captions have no frame captions and are left out" in caplog.text


def test_frame_captions_that_none_has_are_an_error_even_where_they_may_be_dropped():
    with pytest.raises(ValueError, match="frame captions: none of 2 captions has any"):
        training_pairs([clip("a")], frame_captions=True, missing="drop")
