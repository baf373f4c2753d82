"""Captions of sampled frames: what is asked, kept, resumed and written."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from discovla.cli import main
from discovla.data.captions.captioners import Failed
from discovla.data.captions.captioning import CaptionSettings, CaptionStore, caption_clips, with_captions
from discovla.data.datasets.frame_captions import read_frame_captions, write_frame_captions
from discovla.data.manifest import Clip, read_manifest, write_manifest
from tests.data.captions.server import captions_server
from tests.data.conftest import movie, numbers

SETTINGS = CaptionSettings(frames=3, side=32, batch_size=2, workers=1, seconds=20)


class Grey:
    """Says the number of a frame of a counting clip, and remembers what it was asked; `fails` on some."""

    identity = "grey"

    def __init__(self, *fails: int) -> None:
        self.fails, self.asked, self.batches = fails, [], []

    def __call__(self, images):
        self.batches.append(len(images))
        found = [numbers(image[None])[0] for image in images]
        self.asked += found
        return [Failed(reason="no answer") if n in self.fails else f"grey {n}" for n in found]


@pytest.fixture
def clips(tmp_path, counting) -> list[Clip]:
    """A clip of frames 0, 10 and 19; the same file again, as a part of it, and a broken one."""
    (tmp_path / "text.mp4").write_text("no video")
    rows = [
        Clip(id="a", video=counting, captions=("one", "two"), split="train"),
        Clip(id="b", video=counting, captions=("one",), split="train", start=0.0, end=0.9),
        Clip(id="bad", video=tmp_path / "text.mp4", captions=("x",), split="train"),
        Clip(id="same", video=counting, captions=("three",), split="train"),
    ]
    write_manifest(tmp_path / "m.jsonl", rows)
    return rows


TEXTS = {
    "a": ("grey 0", "grey 9", "grey 19"),
    "b": ("grey 0", "grey 4", "grey 9"),
    "same": ("grey 0", "grey 9", "grey 19"),
}


def test_every_different_frame_is_asked_once(clips, tmp_path):
    captioner = Grey()
    found = caption_clips(clips, captioner, CaptionStore(tmp_path / "c", "grey"), SETTINGS)
    assert found.texts == TEXTS
    assert sorted(captioner.asked) == [0, 4, 9, 19]
    assert captioner.batches == [2, 2]
    assert (found.asked, found.frames) == (4, 4)
    assert list(found.bad) == ["bad"]
    assert "not a video file" in found.bad["bad"]
    assert found.lines() == [
        "3 clips captioned: 4 different frames now, 0 were known before",
        "1 clips give no frames and are left out:",
        f"  bad: {found.bad['bad']}",
    ]


def test_what_is_known_is_not_asked_again(clips, tmp_path):
    caption_clips(clips[:1], Grey(), CaptionStore(tmp_path / "c", "grey"), SETTINGS)
    captioner = Grey()
    found = caption_clips(clips, captioner, CaptionStore(tmp_path / "c", "grey"), SETTINGS)
    assert captioner.asked == [4]
    assert found.texts == TEXTS
    assert (found.asked, found.frames) == (1, 4)
    again = Grey()
    caption_clips(clips, again, CaptionStore(tmp_path / "c", "grey"), SETTINGS)
    assert again.asked == []
    other = Grey()
    caption_clips(clips, other, CaptionStore(tmp_path / "c", "another prompt"), SETTINGS)
    assert len(other.asked) == 4


def test_a_line_cut_short_costs_its_frame_alone(clips, tmp_path):
    store = CaptionStore(tmp_path / "c", "grey")
    caption_clips(clips[:1], Grey(), store, SETTINGS)
    lines = store.path.read_bytes().split(b"\n")
    assert b"grey 19" in lines[3]
    store.path.write_bytes(b"\n".join([*lines[:3], lines[3][:-9]]))
    captioner = Grey()
    found = caption_clips(clips[:1], captioner, CaptionStore(tmp_path / "c", "grey"), SETTINGS)
    assert captioner.asked == [19]
    assert found.texts["a"] == TEXTS["a"]
    store.path.write_bytes(b"1\n")
    with pytest.raises(ValueError, match=r"jsonl:1: not what `caption` wrote; remove the file"):
        CaptionStore(tmp_path / "c", "grey")


def test_a_frame_without_a_caption_leaves_its_clips_out_and_is_tried_again(clips, tmp_path):
    found = caption_clips(clips, Grey(19), CaptionStore(tmp_path / "c", "grey"), SETTINGS)
    assert found.texts == {"b": TEXTS["b"]}
    assert found.failed == {"a": "no answer", "same": "no answer"}
    assert "2 clips lack the caption of a frame and are left out:" in found.lines()
    captioner = Grey()
    found = caption_clips(clips, captioner, CaptionStore(tmp_path / "c", "grey"), SETTINGS)
    assert captioner.asked == [19]
    assert found.texts == TEXTS


def test_a_model_that_answers_nothing_ends_it_at_once(clips, tmp_path):
    captioner = Grey(*range(20))
    with pytest.raises(ValueError, match="the first 2 frames got no caption: no answer"):
        caption_clips(clips, captioner, CaptionStore(tmp_path / "c", "grey"), SETTINGS)
    assert len(captioner.asked) == 2


def test_pictures_are_reduced_and_turned_as_displayed(tmp_path):
    path = movie(tmp_path / "wide.mp4", 2, size=(32, 64), rotation=90)
    seen = []

    def look(images):
        seen.extend(image.shape for image in images)
        return ["x"] * len(images)

    look.identity = "look"  # type: ignore[attr-defined]
    clip = Clip(id="a", video=path, captions=("one",), split="train")
    caption_clips([clip], look, CaptionStore(tmp_path / "c", "look"), SETTINGS)  # type: ignore[arg-type]
    assert set(seen) == {(32, 16, 3)}
    assert np.prod(seen[0]) > 0


def test_captions_go_to_every_caption_of_a_clip_and_replace_none(clips):
    old = [Clip(**{**vars(clips[0]), "frame_captions": (None, ("p", "q", "r"))}), *clips[1:]]
    found = with_captions(old, TEXTS)
    assert found[0].frame_captions == (TEXTS["a"], ("p", "q", "r"))
    assert found[1].frame_captions == (TEXTS["b"],)
    assert found[2].frame_captions is None


def test_the_official_form_reads_as_it_was_written(clips, tmp_path):
    write_frame_captions(tmp_path / "f.json", with_captions(clips, TEXTS))
    assert read_frame_captions(tmp_path / "f.json") == {
        "a_one": TEXTS["a"],
        "a_two": TEXTS["a"],
        "b_one": TEXTS["b"],
        "same_three": TEXTS["same"],
    }
    with pytest.raises(ValueError, match=r"f.json: expected a clip with frame captions, found none"):
        write_frame_captions(tmp_path / "f.json", clips)


def words(folder: Path, out: str, url: str, *more: str) -> list[str]:
    sizes = ["--frames", "3", "--side", "32", "--batch-size", "2", "--workers", "1"]
    return [
        "caption",
        str(folder / "m.jsonl"),
        str(folder / out),
        "--model",
        "openai:m",
        "--url",
        url,
        *sizes,
        *more,
    ]


def test_the_command_writes_a_manifest_and_the_official_form(clips, tmp_path, capsys):
    with captions_server() as server:
        assert main(words(tmp_path, "out.jsonl", server.url, "--cache", str(tmp_path / "c"))) == 0
        number = len(server.seen)
        assert main(words(tmp_path, "out.json", server.url, "--cache", str(tmp_path / "c"))) == 0
        assert len(server.seen) == number == 4
    made = {clip.id: clip for clip in read_manifest(tmp_path / "out.jsonl")}
    lists = read_frame_captions(tmp_path / "out.json")
    assert made["a"].frame_captions == (lists["a_one"], lists["a_two"])
    assert made["bad"].frame_captions is None
    assert len(lists["b_one"]) == 3
    assert "1 clips give no frames and are left out:" in capsys.readouterr().out


def test_the_command_does_not_ask_for_what_a_file_of_captions_has(clips, tmp_path):
    known = {"a_one": ["p", "q", "r"], "a_two": ["s", "t", "u"], "same_three": ["v", "w", "x"]}
    (tmp_path / "known.json").write_text(json.dumps(known))
    with captions_server() as server:
        known_words = ["--known", str(tmp_path / "known.json")]
        assert main(words(tmp_path, "out.json", server.url, *known_words)) == 0
        assert len(server.seen) == 3  # of b alone
    lists = read_frame_captions(tmp_path / "out.json")
    assert {name: list(lists[name]) for name in known} == known
    assert set(lists) == {*known, "b_one"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--model", "blip"], "--model: expected coca:ARCHITECTURE@WEIGHTS (open_clip), hf:NAME"),
        (["--model", "hf:x"], "--url: expected with --model openai:NAME and with no other"),
        (["--split", "dev"], "no clip of the split 'dev'"),
        (["--url", "localhost"], "--url: expected http://... or https://..., found 'localhost'"),
        (["--batch-size", "0"], "--batch-size: expected at least 1, got 0"),
    ],
    ids=str,
)
def test_the_command_names_what_is_wrong(clips, tmp_path, capsys, change, message):
    assert main(words(tmp_path, "out.json", "http://localhost:1/v1", *change)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()


KILLED = """
import os, sys
from discovla.data.captions import captioning
from discovla.cli import main
add = captioning.CaptionStore.add_texts
def killed(self, texts):
    add(self, texts)
    if len(self.texts) >= 4:
        os.kill(os.getpid(), 9)
captioning.CaptionStore.add_texts = killed
main(sys.argv[1:])
"""


def test_captioning_that_was_killed_goes_on_and_asks_nothing_twice(tmp_path):
    rows = []
    for i in range(3):
        path = movie(
            tmp_path / f"{i}.mp4", 6, draw=lambda n, y, x, i=i: np.full((y, x, 3), 30 * n + 9 * i, np.uint8)
        )
        rows.append(Clip(id=f"clip{i}", video=path, captions=("one",), split="train"))
    write_manifest(tmp_path / "m.jsonl", rows)
    with captions_server() as server:
        again = words(tmp_path, "out.json", server.url)
        run = subprocess.run([sys.executable, "-c", KILLED, *again], check=False)
        assert run.returncode == -signal.SIGKILL
        assert not (tmp_path / "out.json").exists()
        assert len(server.seen) == 4
        assert main(again) == 0
        assert len(server.seen) == len(set(server.seen)) == 9
        assert main(words(tmp_path, "whole.json", server.url)) == 0
    assert (tmp_path / "out.json").read_bytes() == (tmp_path / "whole.json").read_bytes()
