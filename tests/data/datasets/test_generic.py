"""A user's own clips, and clips held out for validation."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from discovla.cli import main
from discovla.data.datasets.annotations import hold_out, hold_out_videos
from discovla.data.datasets.generic import csv_clips, folder_clips, jsonl_clips


def table(folder: Path, text: str) -> Path:
    path = folder / "clips.csv"
    path.write_text(text)
    return path


def test_rows_of_one_video_become_one_clip(tmp_path):
    clips = csv_clips(table(tmp_path, 'video,caption\na/x.mp4,one\nb.mp4,"two, more"\na/x.mp4,three\n')).clips
    assert [(c.id, c.captions, c.split) for c in clips] == [
        ("a/x.mp4", ("one", "three"), "train"),
        ("b.mp4", ("two, more",), "train"),
    ]
    assert clips[0].video == tmp_path / "a/x.mp4"


def test_spans_of_one_video_are_clips_of_their_own(tmp_path):
    text = (
        "video;start;end;split;caption\nx.mp4;0;2.5;train;one\nx.mp4;2.5;;test;two\nx.mp4;0;2.5;train;three"
    )
    clips = csv_clips(table(tmp_path, text)).clips
    assert [(c.id, c.start, c.end, c.split, c.captions) for c in clips] == [
        ("x.mp4@0-2.5", 0.0, 2.5, "train", ("one", "three")),
        ("x.mp4@2.5-", 2.5, None, "test", ("two",)),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "clips.csv:1: expected the column video, caption, found nothing"),
        ("video,text\nx.mp4,one\n", "clips.csv:1: expected the column caption, found video, text"),
        (
            "video,caption,lang\nx.mp4,one,en\n",
            "clips.csv:1: expected the columns video, caption, start, end, split",
        ),
        ("video,caption\nx.mp4,one\nx.mp4\n", "clips.csv:3: expected 2 columns, found 1"),
        ("video,caption\nx.mp4,one\nx.mp4, \n", "clips.csv:3: caption is empty"),
        ("video,caption\n,one\n", "clips.csv:2: video is empty"),
        (
            "video,caption,start\nx.mp4,one,now\n",
            "clips.csv:2: start: expected seconds not below 0, found 'now'",
        ),
        ("video,caption,end\nx.mp4,one,-1\n", "clips.csv:2: end: expected seconds not below 0, found '-1'"),
        (
            "video,caption,split\nx.mp4,one,train\nx.mp4,two,test\n",
            "clips.csv:3: x.mp4 is in split 'test', at line 2 in 'train'",
        ),
        ('video,caption\nx.mp4,"one\n', "clips.csv:2: not a table: a quoted cell begins here and never ends"),
    ],
    ids=lambda value: value[:30],
)
def test_a_bad_table_is_named_by_file_and_line(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        csv_clips(table(tmp_path, text))


def test_a_table_without_rows_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"clips.csv: expected at least one row below the header"):
        csv_clips(table(tmp_path, "video,caption\n"))


def test_held_out_clips_are_spread_and_keep_one_caption(tmp_path):
    text = "video,caption\n" + "".join(f"{i}.mp4,one\n{i}.mp4,two\n" for i in range(6))
    clips = hold_out(csv_clips(table(tmp_path, text)).clips, 2)
    assert [(c.id, c.captions) for c in clips if c.split == "val"] == [
        ("0.mp4", ("one",)),
        ("3.mp4", ("one",)),
    ]
    assert sum(c.split == "train" for c in clips) == 4


def test_holding_out_everything_is_refused(tmp_path):
    clips = csv_clips(table(tmp_path, "video,caption\nx.mp4,one\n")).clips
    with pytest.raises(ValueError, match="val: expected fewer than the 1 training clips, got 1"):
        hold_out(clips, 1)


def test_parts_of_a_video_in_two_splits_are_noted(tmp_path):
    text = "video,caption,start,end,split\nx.mp4,one,0,5,train\nx.mp4,two,5,9,test\ny.mp4,three,,,test\n"
    assert csv_clips(table(tmp_path, text)).notes == ["1 videos have parts in several splits: x.mp4"]


def lines(folder: Path, *rows: object) -> Path:
    path = folder / "clips.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def test_json_lines_become_clips(tmp_path):
    rows = (
        {"video": "a.mp4", "captions": ["one", "two"], "split": "val"},
        {"video": "b.mp4", "caption": "three", "start": 1, "end": 2.5},
        {"video": "a.mp4", "caption": "four", "split": "val"},
    )
    clips = jsonl_clips(lines(tmp_path, *rows)).clips
    assert [(c.id, c.captions, c.split, c.start, c.end) for c in clips] == [
        ("a.mp4", ("one", "two", "four"), "val", None, None),
        ("b.mp4@1-2.5", ("three",), "train", 1.0, 2.5),
    ]
    assert clips[1].video == tmp_path / "b.mp4"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "clips.jsonl:2: not JSON"),
        ([], "clips.jsonl:2: expected a JSON object, found list"),
        ({"caption": "x"}, "clips.jsonl:2: missing video; found caption"),
        ({"video": "x.mp4"}, "clips.jsonl:2: expected either caption or captions, found video"),
        ({"video": "x.mp4", "caption": "a", "captions": ["b"]}, "2: expected either caption or captions"),
        ({"video": "x.mp4", "caption": " "}, "2: caption: expected a text that is not empty, found ' '"),
        ({"video": "x.mp4", "captions": []}, r"2: captions: expected a list of texts, found \[\]"),
        ({"video": "", "caption": "a"}, "2: video: expected a text that is not empty, found ''"),
        ({"video": "x.mp4", "caption": "a", "fps": 3}, "clips.jsonl:2: unknown fps; expected only video"),
        ({"video": "x.mp4", "caption": "a", "start": -1}, "2: start: expected seconds not below 0, found -1"),
        ({"video": "x.mp4", "caption": "a", "end": "3"}, "2: end: expected seconds not below 0, found '3'"),
        ({"video": "v.mp4", "caption": "a", "split": "test"}, "2: v.mp4 is in split 'test', at line 1"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_bad_json_line_is_named(tmp_path, row, message):
    with pytest.raises(ValueError, match=message):
        jsonl_clips(lines(tmp_path, {"video": "v.mp4", "caption": "fine"}, row))


def files(folder: Path, **texts: str) -> Path:
    for name, text in texts.items():
        path = folder / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def test_a_folder_takes_captions_from_text_files_beside_the_videos(tmp_path):
    files(
        tmp_path,
        b_mp4="",
        b_txt="one\n\n  two \n",
        test__c_MOV="",
        test__c_txt="three",
        other__c_webm="",
        other__c_webm_txt="four",
        bare_mp4="",
        lone_txt="five",
    )
    annotations = folder_clips(tmp_path)
    assert [(c.id, c.captions, c.split) for c in annotations.clips] == [
        ("b.mp4", ("one", "two"), "train"),
        ("other/c.webm", ("four",), "train"),
        ("test/c.MOV", ("three",), "test"),
    ]
    assert annotations.notes == [
        "1 videos have no text beside them and are left out: bare.mp4",
        "1 texts have no video beside them: lone.txt",
    ]


def test_a_folder_without_texts_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected a text beside a video, found 1 videos without one"):
        folder_clips(files(tmp_path, x_mp4=""))
    with pytest.raises(ValueError, match=r"x.txt: expected a caption a line, found none"):
        folder_clips(files(tmp_path, x_txt=" \n"))
    with pytest.raises(ValueError, match="no: expected a folder of videos, found none"):
        folder_clips(tmp_path / "no")


def trimmed(videos: int, parts: int) -> str:
    rows = (f"{v}.mp4,{v} {p},{p},{p + 1}\n" for v in range(videos) for p in range(parts))
    return "video,caption,start,end\n" + "".join(rows)


def splits_of(clips) -> dict[str, set[str]]:
    """Return the videos of each split."""
    return {split: {c.video.name for c in clips if c.split == split} for split in ("train", "val", "test")}


def test_held_out_videos_are_in_one_split_with_all_their_clips(tmp_path):
    clips = csv_clips(table(tmp_path, trimmed(20, 3))).clips
    held = hold_out_videos(clips, {"val": 6, "test": 0.1})
    splits = splits_of(held)
    assert [len(videos) for videos in splits.values()] == [16, 2, 2]
    assert len(set.union(*splits.values())) == 20
    assert [(c.id, c.captions) for c in held] == [(c.id, c.captions) for c in clips]


def test_the_choice_of_held_out_videos_depends_on_the_seed_and_is_stable(tmp_path):
    clips = csv_clips(table(tmp_path, trimmed(30, 1))).clips
    first = hold_out_videos(clips, {"val": 5}, seed=1)
    assert hold_out_videos(clips, {"val": 5}, seed=1) == first
    assert splits_of(hold_out_videos(clips, {"val": 5}, seed=2))["val"] != splits_of(first)["val"]
    more = hold_out_videos(csv_clips(table(tmp_path, trimmed(31, 1))).clips, {"val": 5}, seed=1)
    assert len(splits_of(more)["val"] & splits_of(first)["val"]) >= 4


def test_links_to_a_video_are_held_out_with_it(tmp_path):
    names = []
    for i in range(4):
        (tmp_path / f"{i}.mp4").write_bytes(b"x")
        (tmp_path / f"link{i}.mp4").symlink_to(f"{i}.mp4")
        os.link(tmp_path / f"{i}.mp4", tmp_path / f"hard{i}.mp4")
        names += [f"{i}.mp4", f"link{i}.mp4", f"hard{i}.mp4"]
    clips = csv_clips(table(tmp_path, "video,caption\n" + "".join(f"{n},{n}\n" for n in names))).clips
    held = splits_of(hold_out_videos(clips, {"test": 2}))["test"]
    assert len(held) == 3, held
    assert len({name[-5] for name in held}) == 1


def test_a_video_with_clips_in_another_split_is_not_held_out(tmp_path):
    text = "video,caption,start,end,split\nx.mp4,one,0,5,train\nx.mp4,two,5,9,test\ny.mp4,three,,,train\n"
    text += "z.mp4,four,,,train\n"
    held = hold_out_videos(csv_clips(table(tmp_path, text)).clips, {"val": 1})
    assert splits_of(held)["val"] < {"y.mp4", "z.mp4"}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"val": 4}, "--val: expected fewer clips than the 4 for training"),
        ({"val": 2, "test": 2}, "--test: expected fewer clips than the 4 for training"),
        ({"test": 0.99}, "--test: expected fewer clips than the 4 for training"),
    ],
)
def test_holding_out_all_videos_is_refused(sizes, message, tmp_path):
    clips = csv_clips(table(tmp_path, trimmed(4, 1))).clips
    with pytest.raises(ValueError, match=message):
        hold_out_videos(clips, sizes)


def test_holding_out_beside_a_split_of_the_same_name_is_refused(tmp_path):
    clips = csv_clips(table(tmp_path, "video,caption,split\nx.mp4,one,val\ny.mp4,two,train\n")).clips
    with pytest.raises(ValueError, match="--val: the clips have a split 'val' of their own"):
        hold_out_videos(clips, {"val": 1})


@pytest.mark.parametrize("size", ["-1", "0%", "100%", "x", "1.5", "%"])
def test_a_bad_size_of_a_split_is_refused(size, tmp_path, capsys):
    source = table(tmp_path, trimmed(4, 1))
    with pytest.raises(SystemExit):
        main(["prepare", "csv", str(source), str(tmp_path / "m.jsonl"), f"--val={size}"])
    assert "expected a number of clips or a share such as 10%" in capsys.readouterr().err
