"""MSR-VTT in its layouts and by its protocols."""

from __future__ import annotations

import csv
import json
import pickle
import shutil
from pathlib import Path

import pytest

from discovla.data.dataset import training_pairs
from discovla.data.datasets import DATASETS
from discovla.data.datasets.annotations import first_captions, read_frame_captions, with_frame_captions
from discovla.data.datasets.report import split_reports

msrvtt = DATASETS["msrvtt"].read


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
    """The golden file's videos with its folder "V" made absolute."""
    return [[name, str(Path(path).resolve())] for name, path in rows]


def golden_clips(golden: Path, split: str):
    clips = msrvtt(anns(golden), protocol="1k-A-9k", videos="V").clips
    clips = with_frame_captions(clips, read_frame_captions(anns(golden) / "pseudo_captions.json"))
    return [clip for clip in clips if clip.split == split]


def test_training_samples_are_those_of_the_golden_file(golden):
    clips = golden_clips(golden, "train")
    pairs = training_pairs(clips, frame_captions=True, missing="drop")
    want = expected(golden, "train")
    assert listed(clips, pairs) == want["samples"]
    assert videos(clips, pairs) == placed(want["videos"])
    assert split_reports(clips)["train"].without_frame_captions == want["dropped_without_pseudo_captions"]


def test_test_samples_are_those_of_the_golden_file(golden):
    clips = golden_clips(golden, "test")
    pairs = training_pairs(clips, frame_captions=False, missing="error")
    want = expected(golden, "test")
    assert listed(clips, pairs) == want["samples"]
    assert videos(clips, pairs) == placed(want["videos"])


def test_one_caption_of_each_training_clip_is_the_golden_train_test(golden):
    clips = first_captions(golden_clips(golden, "train"))
    pairs = training_pairs(clips, frame_captions=False, missing="error")
    want = expected(golden, "train_test")
    assert listed(clips, pairs) == want["samples"]
    assert videos(clips, pairs) == placed(want["videos"])


def test_samples_without_frame_captions_are_an_error_by_default(golden):
    clips = golden_clips(golden, "train")
    with pytest.raises(
        ValueError,
        match=r"expected one list for each of 13 captions, found 4 .* of clip 'video5'",
    ):
        training_pairs(clips, frame_captions=True, missing="error")


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["no BOM", "BOM"])
def test_a_table_saved_again_by_another_program_reads_the_same_golden(golden, tmp_path, separator, mark):
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
    clips = msrvtt(msrvtt_folder(tmp_path, SPLITS, tables), protocol="full", videos="V").clips
    assert {c.id: c.split for c in clips} == {"video0": "test", "video1": "train", "video2": "val"}


def test_the_full_protocol_without_tables_follows_the_annotations(tmp_path):
    clips = msrvtt(msrvtt_folder(tmp_path, SPLITS, {}), protocol="full", videos="V").clips
    assert {c.id: c.split for c in clips} == {"video0": "train", "video1": "val", "video2": "test"}


def test_a_full_table_that_is_missing_is_named(tmp_path):
    folder = msrvtt_folder(tmp_path, SPLITS, {"MSRVTT_train.full.csv": ["video0"]})
    with pytest.raises(ValueError, match=r"expected MSRVTT_val.full.csv or val_list_full.txt, found none"):
        msrvtt(folder, protocol="full", videos="V")


def test_a_test_video_that_is_trained_on_is_refused(tmp_path):
    folder = msrvtt_folder(tmp_path, SPLITS, {"MSRVTT_train.7k.csv": ["video0", "video1"]})
    (folder / "MSRVTT_JSFUSION_test.csv").write_text("video_id,sentence\nvideo2,a\nvideo1,b\n")
    with pytest.raises(ValueError, match=r"test.csv:3: the test video video1 is a training video too"):
        msrvtt(folder, protocol="1k-A-7k", videos="V")


def test_listed_videos_without_a_sentence_and_unlisted_videos_are_reported(tmp_path):
    folder = msrvtt_folder(tmp_path, SPLITS, {"MSRVTT_train.9k.csv": ["video0", "video9"]})
    (folder / "MSRVTT_JSFUSION_test.csv").write_text("video_id,sentence\nvideo2,a\n")
    annotations = msrvtt(folder, protocol="1k-A-9k", videos="V")
    assert [c.id for c in annotations.clips] == ["video0", "video2"]
    assert annotations.uncaptioned == {"train": ["video9"]}
    assert annotations.unlisted == ["video1"]


def test_annotations_without_sentences_are_named(tmp_path):
    msrvtt_folder(tmp_path, SPLITS, {"MSRVTT_train.9k.csv": ["video0"]})
    (tmp_path / "MSRVTT_data.json").write_text("{}")
    with pytest.raises(ValueError, match=r"MSRVTT_data.json: expected `sentences`"):
        msrvtt(tmp_path, protocol="1k-A-9k", videos="V")


def test_an_unknown_protocol_names_the_known(golden):
    with pytest.raises(ValueError, match=r"expected one of 1k-A-9k, 1k-A-7k, 1k-B, full, got '1k-C'"):
        msrvtt(anns(golden), protocol="1k-C", videos="V")


def test_1k_b_tests_on_the_first_caption_of_each_clip_of_its_test_list(tmp_path):
    videos = [f"video{i}" for i in range(8)]
    sentences = [(v, f"{n} of {v}") for n in ("first", "second") for v in videos]
    (tmp_path / "structured-symlinks").mkdir()
    (tmp_path / "structured-symlinks/train_list_miech.txt").write_text("video4\nvideo0\nvideo6")
    (tmp_path / "structured-symlinks/test_list_miech.txt").write_text("video7\nvideo2\n")
    (tmp_path / "annotation").mkdir()
    rows = [{"image_id": v, "caption": c} for v, c in sentences]
    (tmp_path / "annotation/MSR_VTT.json").write_text(json.dumps({"annotations": rows}))
    annotations = msrvtt(tmp_path, protocol="1k-B", videos="V")
    assert [(c.id, c.split, c.captions) for c in annotations.clips] == [
        ("video0", "train", ("first of video0", "second of video0")),
        ("video4", "train", ("first of video4", "second of video4")),
        ("video6", "train", ("first of video6", "second of video6")),
        ("video7", "test", ("first of video7",)),
        ("video2", "test", ("first of video2",)),
    ]
    assert annotations.unlisted == ["video1", "video3", "video5"]


def test_1k_a_is_the_same_from_all_three_file_layouts(tmp_path):
    captions = {f"video{i}": [f"{n} of video{i}" for n in "abc"] for i in range(4)}
    (tmp_path / "raw-captions.pkl").write_bytes(
        pickle.dumps({v: [text.split() for text in texts] for v, texts in captions.items()}, protocol=2)
    )
    (tmp_path / "train_list_jsfusion.txt").write_text("video0\nvideo1\n")
    pairs = {"video3": "b of video3", "video2": "c of video2"}
    layouts = {
        "jsfusion_val_caption_idx.pkl": pickle.dumps({"video3": 1, "video2": 2}, protocol=2),
        "msrvtt_ret_test1k.json": json.dumps(
            [{"video": f"{v}.mp4", "caption": c, "duration": 1.5} for v, c in pairs.items()]
        ).encode(),
        "MSRVTT_JSFUSION_test.csv": "key,vid_key,video_id,sentence\n{}".format(
            "\n".join(f"ret{i},msr,{v},{c}" for i, (v, c) in enumerate(pairs.items()))
        ).encode(),
    }
    for name, content in layouts.items():  # a later one takes precedence over those before
        (tmp_path / name).write_bytes(content)
        clips = msrvtt(tmp_path, protocol="1k-A-9k", videos="V").clips
        assert [(c.id, c.captions) for c in clips if c.split == "test"] == [
            (v, (c,)) for v, c in pairs.items()
        ]
        assert [(c.id, c.captions) for c in clips if c.split == "train"] == [
            (v, tuple(captions[v])) for v in ("video0", "video1")
        ]


def test_a_caption_number_out_of_range_is_named(tmp_path):
    (tmp_path / "raw-captions.pkl").write_bytes(pickle.dumps({"video0": [["a"]], "video1": [["b"]]}))
    (tmp_path / "train_list_jsfusion.txt").write_text("video0")
    (tmp_path / "jsfusion_val_caption_idx.pkl").write_bytes(pickle.dumps({"video1": 4}))
    with pytest.raises(ValueError, match=r"idx.pkl: video1: expected the number of one of its 1 captions"):
        msrvtt(tmp_path, protocol="1k-A-9k", videos="V")


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    class Runs:
        def __reduce__(self):
            return (print, ("it ran",))

    (tmp_path / "raw-captions.pkl").write_bytes(pickle.dumps({"video0": Runs()}))
    with pytest.raises(
        ValueError, match=r"raw-captions.pkl: not a pickle of plain values: it names builtins"
    ):
        msrvtt(tmp_path, protocol="full", videos="V")
