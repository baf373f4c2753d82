"""Annotation files turned into clips."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest

from discovla.data.datasets import csv_clips, first_captions, hold_out, msrvtt, prepare, report
from discovla.data.manifest import read_manifest
from discovla.data.samples import samples


def anns(golden: Path) -> Path:
    return golden / "discovla/anns_fixture"


def expected(golden: Path, split: str) -> dict:
    return json.loads((anns(golden) / "expected.json").read_text())["expected"][split]


def listed(clips, pairs) -> list[dict]:
    """Samples in the form of the golden file."""
    rows = []
    for pair in pairs:
        clip = clips[pair.clip]
        texts = None if clip.frame_captions is None else clip.frame_captions[pair.caption]
        rows.append(
            {
                "video_id": clip.id,
                "caption": clip.captions[pair.caption],
                "pseudo_captions": None if texts is None else list(texts),
            }
        )
    return rows


def videos(clips, pairs) -> list[list[str]]:
    """Ids and paths in the order of their first sample."""
    return [list(row) for row in dict.fromkeys((clips[p.clip].id, str(clips[p.clip].video)) for p in pairs)]


def placed(rows: list[list[str]]) -> list[list[str]]:
    """The golden file's videos with its folder "V" as ours is found."""
    return [[name, str(Path(path).resolve())] for name, path in rows]


def golden_clips(golden: Path, split: str, **options):
    clips = msrvtt(anns(golden), protocol="1k-A-9k", videos="V", **options)
    return [clip for clip in clips if clip.split == split]


def test_training_samples_are_those_of_the_golden_file(golden):
    clips = golden_clips(golden, "train", frame_captions=anns(golden) / "pseudo_captions.json")
    pairs = samples(clips, frame_captions=True, missing="drop")
    want = expected(golden, "train")
    assert listed(clips, pairs) == want["samples"]
    assert videos(clips, pairs) == placed(want["videos"])
    assert report(clips)["train"].without_frame_captions == want["dropped_without_pseudo_captions"]


def test_test_samples_are_those_of_the_golden_file(golden):
    clips = golden_clips(golden, "test", frame_captions=anns(golden) / "pseudo_captions.json")
    pairs = samples(clips, frame_captions=False, missing="error")
    want = expected(golden, "test")
    assert listed(clips, pairs) == want["samples"]
    assert videos(clips, pairs) == placed(want["videos"])


def test_one_caption_of_each_training_clip_is_the_golden_train_test(golden):
    clips = first_captions(golden_clips(golden, "train"))
    pairs = samples(clips, frame_captions=False, missing="error")
    want = expected(golden, "train_test")
    assert listed(clips, pairs) == want["samples"]
    assert videos(clips, pairs) == placed(want["videos"])


def test_samples_without_frame_captions_are_an_error_by_default(golden):
    clips = golden_clips(golden, "train", frame_captions=anns(golden) / "pseudo_captions.json")
    with pytest.raises(
        ValueError, match=r"frame captions: 4 of 13 captions have none, the first of clip 'video5'"
    ):
        samples(clips, frame_captions=True, missing="error")


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["no BOM", "BOM"])
def test_a_table_saved_again_reads_the_same_golden(golden, tmp_path, separator, mark):
    shutil.copytree(anns(golden), tmp_path / "anns")
    for path in (tmp_path / "anns").glob("*.csv"):
        rows = list(csv.reader(path.read_text().splitlines()))
        text = "\r\n".join(separator.join('"' + c.replace('"', '""') + '"' for c in row) for row in rows)
        path.write_bytes((mark + text).encode())
    again = msrvtt(tmp_path / "anns", protocol="1k-A-9k", videos="V")
    assert again == msrvtt(anns(golden), protocol="1k-A-9k", videos="V")


def msrvtt_folder(folder: Path, splits: dict[str, str], tables: dict[str, list[str]]) -> Path:
    """A small MSR-VTT: one sentence `s of <id>` for each video."""
    (folder / "MSRVTT_data.json").write_text(
        json.dumps(
            {
                "videos": [{"video_id": v, "split": s} for v, s in splits.items()],
                "sentences": [{"video_id": v, "caption": f"s of {v}"} for v in splits],
            }
        )
    )
    for name, ids in tables.items():
        (folder / name).write_text("video_id\n" + "\n".join(ids))
    return folder


SPLITS = {"video0": "train", "video1": "validate", "video2": "test"}


def test_the_full_protocol_follows_its_tables(tmp_path):
    tables = {
        "MSRVTT_train.full.csv": ["video1"],
        "MSRVTT_val.full.csv": ["video2"],
        "MSRVTT_test.full.csv": ["video0"],
    }
    clips = msrvtt(msrvtt_folder(tmp_path, SPLITS, tables), protocol="full", videos="V")
    assert {c.id: c.split for c in clips} == {"video0": "test", "video1": "train", "video2": "val"}


def test_the_full_protocol_without_tables_follows_the_annotations(tmp_path):
    clips = msrvtt(msrvtt_folder(tmp_path, SPLITS, {}), protocol="full", videos="V")
    assert {c.id: c.split for c in clips} == {"video0": "train", "video1": "val", "video2": "test"}


def test_a_full_table_that_is_missing_is_named(tmp_path):
    folder = msrvtt_folder(tmp_path, SPLITS, {"MSRVTT_train.full.csv": ["video0"]})
    with pytest.raises(ValueError, match=r"MSRVTT_val.full.csv: expected a table, No such file"):
        msrvtt(folder, protocol="full", videos="V")


def test_a_test_video_that_is_trained_on_is_refused(tmp_path):
    folder = msrvtt_folder(tmp_path, SPLITS, {"MSRVTT_train.7k.csv": ["video0", "video1"]})
    (folder / "MSRVTT_JSFUSION_test.csv").write_text("video_id,sentence\nvideo2,a\nvideo1,b\n")
    with pytest.raises(ValueError, match=r"test.csv:3: the test video video1 is a training video too"):
        msrvtt(folder, protocol="1k-A-7k", videos="V")


def test_videos_without_a_sentence_are_told(tmp_path, caplog):
    folder = msrvtt_folder(tmp_path, SPLITS, {"MSRVTT_train.9k.csv": ["video0", "video9"]})
    (folder / "MSRVTT_JSFUSION_test.csv").write_text("video_id,sentence\nvideo2,a\n")
    clips = msrvtt(folder, protocol="1k-A-9k", videos="V")
    assert [c.id for c in clips] == ["video0", "video2"]
    assert "1 of 2 videos have no sentence and are left out: video9" in caplog.text


def test_annotations_without_sentences_are_named(tmp_path):
    msrvtt_folder(tmp_path, SPLITS, {"MSRVTT_train.9k.csv": ["video0"]})
    (tmp_path / "MSRVTT_data.json").write_text("{}")
    with pytest.raises(ValueError, match=r"MSRVTT_data.json: expected `sentences`"):
        msrvtt(tmp_path, protocol="1k-A-9k", videos="V")


def test_an_unknown_protocol_names_the_known(golden):
    with pytest.raises(ValueError, match=r"protocol: expected 1k-A-9k, 1k-A-7k or full, got '1k-B'"):
        msrvtt(anns(golden), protocol="1k-B", videos="V")


def table(folder: Path, text: str) -> Path:
    path = folder / "clips.csv"
    path.write_text(text)
    return path


def test_rows_of_one_video_become_one_clip(tmp_path):
    clips = csv_clips(table(tmp_path, 'video,caption\na/x.mp4,one\nb.mp4,"two, more"\na/x.mp4,three\n'))
    assert [(c.id, c.captions, c.split) for c in clips] == [
        ("a/x.mp4", ("one", "three"), "train"),
        ("b.mp4", ("two, more",), "train"),
    ]
    assert clips[0].video == tmp_path / "a/x.mp4"


def test_spans_of_one_video_are_clips_of_their_own(tmp_path):
    text = (
        "video;start;end;split;caption\nx.mp4;0;2.5;train;one\nx.mp4;2.5;;test;two\nx.mp4;0;2.5;train;three"
    )
    clips = csv_clips(table(tmp_path, text))
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
        ('video,caption\nx.mp4,"one\n', "clips.csv: not a table"),
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
    clips = hold_out(csv_clips(table(tmp_path, text)), 2)
    assert [(c.id, c.captions) for c in clips if c.split == "val"] == [
        ("0.mp4", ("one",)),
        ("3.mp4", ("one",)),
    ]
    assert sum(c.split == "train" for c in clips) == 4


def test_holding_out_everything_is_refused(tmp_path):
    clips = csv_clips(table(tmp_path, "video,caption\nx.mp4,one\n"))
    with pytest.raises(ValueError, match="val: expected fewer than the 1 training clips, got 1"):
        hold_out(clips, 1)


def test_prepare_writes_a_manifest_and_says_what_is_missing(tmp_path):
    (tmp_path / "x.mp4").write_bytes(b"x")
    clips = csv_clips(
        table(tmp_path, "video,caption,split\nx.mp4,one,train\ny.mp4,two,train\nz.mp4,three,test\n")
    )
    told = prepare(clips, tmp_path / "out/m.jsonl")
    assert read_manifest(tmp_path / "out/m.jsonl") == clips
    assert told.lines()[1:] == [
        f"train: 2 clips, 2 captions, 1 videos missing ({tmp_path / 'y.mp4'})",
        f"test: 1 clips, 1 captions, 1 videos missing ({tmp_path / 'z.mp4'})",
    ]


def test_prepare_counts_captions_without_frame_captions_golden(golden, tmp_path):
    clips = msrvtt(
        anns(golden), protocol="1k-A-9k", videos="V", frame_captions=anns(golden) / "pseudo_captions.json"
    )
    line = prepare(clips, tmp_path / "m.jsonl").lines()[1]
    assert line.startswith("train: 4 clips, 13 captions, 4 without frame captions")


def test_realdata_1k_a_has_its_pairs_in_order(realdata):
    folder = realdata / "annotations/msrvtt"
    pairs = json.loads((folder / "msrvtt_ret_test1k.json").read_text())
    assert len(pairs) == 1000
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("discovla.data.datasets.read_json", _sample_of(folder))
        for protocol, others in (("1k-A-9k", "9k"), ("1k-A-7k", "7k")):
            clips = msrvtt(folder, protocol=protocol, videos="V")
            test = [c for c in clips if c.split == "test"]
            assert [(f"{c.id}.mp4", *c.captions) for c in test] == [(p["video"], p["caption"]) for p in pairs]
            trained = {c.id for c in clips if c.split == "train"}
            assert trained
            assert trained <= set((folder / f"MSRVTT_train.{others}.csv").read_text().split())


def _sample_of(folder: Path):
    """A reader that finds the sample of the annotations where the whole file would be."""
    return lambda path: json.loads((folder / "MSRVTT_data.rebuilt_sample.json").read_text())
