"""Captioning of sampled frames: requests, store, resuming and output."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from discovla.cli import main
from discovla.data.captions.captioning import (
    CaptionSettings,
    CaptionStore,
    NoCaption,
    caption_clips,
    with_captions,
)
from discovla.data.datasets.annotations import read_frame_captions, write_frame_captions
from discovla.data.manifest import Clip, read_manifest, write_manifest
from tests.data.captions.server import captions_server
from tests.data.conftest import movie, numbers
from tests.holders import holder

SETTINGS = CaptionSettings(frames=3, side=32, batch_size=2, workers=1, seconds=20)


class Grey:
    """A captioner that names the number of a frame of a counting clip; it has no caption for `fails`."""

    identity = "grey"

    def __init__(self, *fails: int) -> None:
        self.fails, self.asked, self.batches = fails, [], []

    def __call__(self, images):
        self.batches.append(len(images))
        frames = [numbers(image[None])[0] for image in images]
        self.asked += frames
        return [NoCaption(reason="no answer") if n in self.fails else f"grey {n}" for n in frames]


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


def test_each_different_frame_is_captioned_once(clips, tmp_path):
    captioner = Grey()
    result = caption_clips(clips, captioner, CaptionStore(tmp_path / "c", "grey"), SETTINGS)
    assert result.texts == TEXTS
    assert sorted(captioner.asked) == [0, 4, 9, 19]
    assert captioner.batches == [2, 2]
    assert (result.asked, result.frames) == (4, 4)
    assert list(result.bad) == ["bad"]
    assert "not a video file" in result.bad["bad"]
    assert result.lines() == [
        "3 clips captioned: 4 different frames now, 0 were known before",
        "1 clips give no frames and are left out:",
        f"  bad: {result.bad['bad']}",
    ]


def test_stored_captions_are_not_asked_for_again(clips, tmp_path):
    caption_clips(clips[:1], Grey(), CaptionStore(tmp_path / "c", "grey"), SETTINGS)
    captioner = Grey()
    result = caption_clips(clips, captioner, CaptionStore(tmp_path / "c", "grey"), SETTINGS)
    assert captioner.asked == [4]
    assert result.texts == TEXTS
    assert (result.asked, result.frames) == (1, 4)
    again = Grey()
    caption_clips(clips, again, CaptionStore(tmp_path / "c", "grey"), SETTINGS)
    assert again.asked == []
    other = Grey()
    caption_clips(clips, other, CaptionStore(tmp_path / "c", "another prompt"), SETTINGS)
    assert len(other.asked) == 4


def test_an_incomplete_last_line_costs_only_its_frame(clips, tmp_path):
    store = CaptionStore(tmp_path / "c", "grey")
    caption_clips(clips[:1], Grey(), store, SETTINGS)
    lines = store.path.read_bytes().split(b"\n")
    assert b"grey 19" in lines[3]
    store.path.write_bytes(b"\n".join([*lines[:3], lines[3][:-9]]))
    captioner = Grey()
    result = caption_clips(clips[:1], captioner, CaptionStore(tmp_path / "c", "grey"), SETTINGS)
    assert captioner.asked == [19]
    assert result.texts["a"] == TEXTS["a"]
    store.path.write_bytes(b"1\n")
    with pytest.raises(ValueError, match=r"jsonl:1: expected a line that `caption` wrote; remove the file"):
        CaptionStore(tmp_path / "c", "grey")


def test_a_frame_without_a_caption_leaves_its_clips_out_and_is_retried_next_time(clips, tmp_path):
    result = caption_clips(clips, Grey(19), CaptionStore(tmp_path / "c", "grey"), SETTINGS)
    assert result.texts == {"b": TEXTS["b"]}
    assert result.failed == {"a": "no answer", "same": "no answer"}
    assert "2 clips lack the caption of a frame and are left out:" in result.lines()
    captioner = Grey()
    result = caption_clips(clips, captioner, CaptionStore(tmp_path / "c", "grey"), SETTINGS)
    assert captioner.asked == [19]
    assert result.texts == TEXTS


def test_a_first_batch_without_captions_stops_at_once(clips, tmp_path):
    captioner = Grey(*range(20))
    with pytest.raises(ValueError, match="the first 2 frames got no caption: no answer"):
        caption_clips(clips, captioner, CaptionStore(tmp_path / "c", "grey"), SETTINGS)
    assert len(captioner.asked) == 2


def test_pictures_are_reduced_and_rotated_for_display(tmp_path):
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


def test_frame_captions_go_to_every_caption_and_replace_no_existing_ones(clips):
    old = [Clip(**{**vars(clips[0]), "frame_captions": (None, ("p", "q", "r"))}), *clips[1:]]
    captioned = with_captions(old, TEXTS)
    assert captioned[0].frame_captions == (TEXTS["a"], ("p", "q", "r"))
    assert captioned[1].frame_captions == (TEXTS["b"],)
    assert captioned[2].frame_captions is None


def test_the_json_of_discovla_reads_back(clips, tmp_path):
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


def test_the_command_writes_a_manifest_or_the_json_of_discovla(clips, tmp_path, capsys):
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


def test_the_command_keeps_known_captions(clips, tmp_path):
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
        (
            ["--model", "blip"],
            "--model: expected openai:NAME (with --url) or coca:ARCHITECTURE@",
        ),
        (["--model", "hf:org/x"], "serve it with `vllm serve org/x` and use --model openai:org/x --url"),
        (["--model", "coca:x@y"], "--url: expected with --model openai:NAME and with no other"),
        (["--split", "dev"], "expected clips of the split 'dev'"),
        (["--url", "localhost"], "--url: expected http://... or https://..., found 'localhost'"),
        (["--batch-size", "0"], "--batch-size: expected at least 1, got 0"),
    ],
    ids=str,
)
def test_the_command_refuses_bad_options(clips, tmp_path, capsys, change, message):
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


def test_captioning_resumes_after_a_kill_and_asks_nothing_twice(tmp_path):
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


def test_a_cache_to_which_another_process_writes_is_refused_until_that_has_ended(clips, tmp_path, capsys):
    with captions_server() as server:
        again = words(tmp_path, "out.json", server.url)
        with holder(tmp_path / "out.json.cache", "discovla caption") as other:
            assert main(again) == 2
            assert f"another discovla caption (process {other.pid} on " in capsys.readouterr().err
            assert server.asked == 0
        assert main(again) == 0


def test_the_command_refuses_a_prompt_to_coca(clips, tmp_path, capsys):
    options = ["--model", "coca:x@y", "--prompt", "what is it"]
    assert main(["caption", str(tmp_path / "m.jsonl"), str(tmp_path / "out.json"), *options]) == 2
    assert "--prompt: expected none with a CoCa model" in capsys.readouterr().err
