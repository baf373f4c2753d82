"""Real annotation files, compared with an independent reading of each."""

import csv
import json
import pickle
import shutil
from collections import Counter
from pathlib import Path

import pytest

from discovla.data.datasets import DATASETS
from discovla.data.datasets.report import prepare
from discovla.data.manifest import read_manifest

activitynet, didemo, lsmdc, msrvtt, msvd, vatex = (
    DATASETS[name].read for name in ("activitynet", "didemo", "lsmdc", "msrvtt", "msvd", "vatex")
)


@pytest.fixture
def files(realdata: Path) -> Path:
    return realdata / "annotations"


def named(folder: Path, sources: Path, names: dict[str, str]) -> Path:
    """Copy files under the names that datasets expect; skip the test if one is missing."""
    for source, name in names.items():
        path = sources / source
        if not path.exists():
            pytest.skip(f"no {path}")
        shutil.copy(path, folder / name)
    return folder


def column(path: Path, name: str = "video_id") -> list[str]:
    return [row[name] for row in csv.DictReader(path.read_text().splitlines())]


MSRVTT_SAMPLE = {"MSRVTT_data.rebuilt_sample.json": "MSRVTT_data.json"}
TEST_FILES = ["MSRVTT_JSFUSION_test.csv", "msrvtt_ret_test1k.json"]


@pytest.mark.parametrize("test_file", TEST_FILES)
@pytest.mark.parametrize(("protocol", "number"), [("1k-A-9k", 9000), ("1k-A-7k", 7010)])
def test_realdata_1k_a_keeps_the_test_pairs_in_order_and_the_lists_complete(
    files, tmp_path, protocol, number, test_file
):
    source = files / "msrvtt"
    table = f"MSRVTT_train.{protocol[-2:]}.csv"
    named(tmp_path, source, MSRVTT_SAMPLE | {table: table, test_file: test_file})
    annotations = msrvtt(tmp_path, protocol=protocol, videos="V")
    rows = list(csv.DictReader((source / "MSRVTT_JSFUSION_test.csv").read_text().splitlines()))
    test = [(c.id, *c.captions) for c in annotations.clips if c.split == "test"]
    assert test == [(row["video_id"], row["sentence"]) for row in rows]
    assert len(test) == 1000
    assert list(annotations.listed["train"]) == column(source / table)
    assert len(annotations.listed["train"]) == number
    report = prepare(annotations, tmp_path / "m.jsonl")
    assert not [line for line in report.differences if "ids" in line or line.startswith("test")]
    counts = Counter(row["sentence"] for row in rows)
    assert len(counts) == 995
    assert report.splits["test"].shared_captions == {text: n for text, n in counts.items() if n > 1}
    sentences = json.loads((tmp_path / "MSRVTT_data.json").read_text())["sentences"]
    trained = Counter(s["video_id"] for s in sentences if s["video_id"] in set(annotations.listed["train"]))
    assert {c.id: len(c.captions) for c in annotations.clips if c.split == "train"} == trained


def test_realdata_1k_a_by_index_is_checked_against_the_captions(files, tmp_path):
    index = "jsfusion_val_caption_idx.pkl"
    names = MSRVTT_SAMPLE | {index: index, "MSRVTT_train.9k.csv": "MSRVTT_train.9k.csv"}
    named(tmp_path, files / "msrvtt", names)
    with pytest.raises(
        ValueError, match=r"idx.pkl: video\d+: expected the number of one of its \d+ captions"
    ):
        msrvtt(tmp_path, protocol="1k-A-9k", videos="V")  # the sample has not all captions of a video
    chosen = pickle.loads((tmp_path / index).read_bytes())
    sentences = [
        {"video_id": v, "caption": f"{i} of {v}"} for i in range(20) for v in [*chosen, "video0", "video1"]
    ]
    (tmp_path / "MSRVTT_data.json").write_text(json.dumps({"sentences": sentences}))
    annotations = msrvtt(tmp_path, protocol="1k-A-9k", videos="V")
    want = [(v, f"{i} of {v}") for v, i in chosen.items()]
    assert [(c.id, *c.captions) for c in annotations.clips if c.split == "test"] == want
    assert len(want) == 1000


def test_realdata_full_has_complete_lists(files, tmp_path):
    source = files / "msrvtt"
    tables = {split: f"MSRVTT_{split}.full.csv" for split in ("train", "val", "test")}
    named(tmp_path, source, MSRVTT_SAMPLE | {name: name for name in tables.values()})
    annotations = msrvtt(tmp_path, protocol="full", videos="V")
    assert {split: len(ids) for split, ids in annotations.listed.items()} == {
        "train": 6513,
        "val": 497,
        "test": 2990,
    }
    assert annotations.listed == {split: column(source / name) for split, name in tables.items()}
    assert not [line for line in prepare(annotations, tmp_path / "m.jsonl").differences if "ids" in line]
    splits = {c.id: c.split for c in annotations.clips}
    written = json.loads((tmp_path / "MSRVTT_data.json").read_text())["videos"]
    named_as = {"train": "train", "validate": "val", "test": "test"}
    assert splits == {v["video_id"]: named_as[v["split"]] for v in written}


def test_realdata_a_table_saved_again_gives_the_same_ids(files, tmp_path):
    named(tmp_path, files / "msrvtt", MSRVTT_SAMPLE)
    for name in ("MSRVTT_train.9k.csv", "MSRVTT_JSFUSION_test.csv"):
        rows = list(csv.reader((files / "msrvtt" / name).read_text().splitlines()))
        text = "\r\n".join(";".join('"' + cell.replace('"', '""') + '"' for cell in row) for row in rows)
        (tmp_path / name).write_bytes(text.encode())  # no line end at the end
    annotations = msrvtt(tmp_path, protocol="1k-A-9k", videos="V")
    report = prepare(annotations, tmp_path / "m.jsonl")
    assert not [line for line in report.differences if "ids" in line or line.startswith("test")]


@pytest.mark.parametrize(
    "captions", ["captions_msvd.sample.json", "raw-captions.rebuilt_sample.pkl"], ids=["json", "pickle"]
)
def test_realdata_msvd_has_complete_lists_and_the_captions_of_the_file(files, tmp_path, captions):
    lists = {f"{split}_list.txt": f"{split}_list.txt" for split in ("train", "val", "test")}
    name = "captions_msvd.json" if captions.endswith("json") else "raw-captions.pkl"
    named(tmp_path, files / "msvd", lists | {captions: name})
    annotations = msvd(tmp_path, videos="V")
    numbers = {split: len(ids) for split, ids in annotations.listed.items()}
    assert numbers == {"train": 1200, "val": 100, "test": 670}
    assert not [line for line in prepare(annotations, tmp_path / "m.jsonl").differences if "ids" in line]
    want = json.loads((files / "msvd/captions_msvd.sample.json").read_text())
    assert {c.id: list(c.captions) for c in annotations.clips} == want
    for clip in annotations.clips:
        assert clip.id in (tmp_path / f"{clip.split}_list.txt").read_text().split("\n")


def vatex_folder(folder: Path, files: Path) -> tuple[Path, dict[str, list[str]]]:
    """Copy the lists, and read the sample's captions by id."""
    lists = ("val_list.txt", "test_list.txt", "test1k5_sec_list.txt")
    named(folder, files / "vatex", {name: name for name in lists})
    source = json.loads((files / "vatex/vatex_data.synthetic.json").read_text())
    return folder, {name: row["enCap"] for name, row in source.items()}


def test_realdata_vatex_has_complete_lists(files, tmp_path):
    folder, captions = vatex_folder(tmp_path, files)
    shutil.copy(files / "vatex/vatex_data.synthetic.json", folder / "vatex_data.json")
    (folder / "train_list.txt").write_text("absent_000000_000010\n")  # the real one is not at hand
    annotations = vatex(folder, protocol="hgr", videos="V")
    assert {split: len(ids) for split, ids in annotations.listed.items()} == {
        "train": 1,
        "val": 1500,
        "test": 1500,
    }
    assert {c.id: list(c.captions) for c in annotations.clips} == {
        name: texts
        for name, texts in captions.items()
        if name in {*annotations.listed["val"], *annotations.listed["test"]}
    }
    report = prepare(annotations, folder / "m.jsonl")
    assert not [line for line in report.differences if "ids" in line]
    mixed = vatex(folder, protocol="mixed-1k5", videos="V")
    assert len(mixed.listed["val"]) == 1500 - 776
    assert "of the 1500 test clips 776 are in val_list.txt and 724 in test_list.txt" in mixed.notes[0]
    assert not [line for line in prepare(mixed, folder / "m.jsonl").differences if "ids" in line]


def test_realdata_vatex_from_the_release_has_the_same_captions(files, tmp_path):
    folder, captions = vatex_folder(tmp_path, files)
    source = files / "vatex/vatex_validation.synthetic.json"
    shutil.copy(source, folder / "vatex_validation_v1.0.json")
    row = {"videoID": "absent_000000_000010", "enCap": ["one"], "chCap": []}
    (folder / "vatex_training_v1.0.json").write_text(json.dumps([row]))
    annotations = vatex(folder, protocol="hgr", videos="V")
    names = [row["videoID"] for row in json.loads(source.read_text())]
    assert {c.id for c in annotations.clips if c.split != "train"} == set(names)
    assert all(list(c.captions) == captions[c.id] for c in annotations.clips if c.split != "train")


def test_realdata_didemo_joins_the_rows_of_a_video(files, tmp_path):
    sample = json.loads((files / "didemo/val_data.sample.json").read_text())
    for split in ("train", "test"):
        row = {"video": f"{split}.mp4", "description": "one"}
        (tmp_path / f"{split}_data.json").write_text(json.dumps([row]))
    named(tmp_path, files / "didemo", {"val_data.sample.json": "val_data.json"})
    annotations = didemo(tmp_path, protocol="paragraph", videos="V")
    val = [c for c in annotations.clips if c.split == "val"]
    videos = list(dict.fromkeys(row["video"] for row in sample))
    assert [c.id for c in val] == videos
    assert annotations.rows["val"] == len(sample)
    for clip in val:
        texts = [row["description"] for row in sample if row["video"] == clip.id]
        assert " ".join(clip.captions[0].split()) == " ".join(" ".join(texts).split())
    suffixes = {c.id: c.video.suffix.lower() for c in val}
    assert all(suffixes[name] == ".mp4" for name in videos if name.endswith("."))
    assert {".mov", ".avi", ".3gp", ".mts"} <= set(suffixes.values())


@pytest.mark.parametrize("second", [False, True], ids=["val_1", "val_2"])
def test_realdata_activitynet_joins_the_sentences_of_a_video(files, tmp_path, second):
    val = "val_2" if second else "val_1"
    names = {"train.sample.json": "train.json", f"{val}.sample.json": f"{val}.json"}
    named(tmp_path, files / "activitynet", names | {"val_ids.sample.json": "val_ids.json"})
    protocol = "paragraph-val_2" if second else "paragraph"
    annotations = activitynet(tmp_path, protocol=protocol, videos="V")
    sources = {
        s: json.loads((tmp_path / f"{n}.json").read_text()) for s, n in (("train", "train"), ("test", val))
    }
    for split, rows in sources.items():
        clips = {c.id: c.captions for c in annotations.clips if c.split == split}
        assert {k: v[0].split() for k, v in clips.items()} == {
            name: " ".join(row["sentences"]).split() for name, row in rows.items()
        }
        assert annotations.rows[split] == sum(len(row["sentences"]) for row in rows.values())
    ids = json.loads((tmp_path / "val_ids.json").read_text())
    assert annotations.uncaptioned == {"test": [name for name in ids if name not in sources["test"]]}
    assert annotations.uncaptioned["test"]
    prepare(annotations, tmp_path / "m.jsonl")
    assert [c.captions for c in read_manifest(tmp_path / "m.jsonl")] == [
        c.captions for c in annotations.clips
    ]


def test_realdata_lsmdc_rows_become_clips(files, tmp_path):
    source = files / "lsmdc/LSMDC16.synthetic.csv"
    named(tmp_path, files / "lsmdc", {"LSMDC16.synthetic.csv": "LSMDC16_annos_training.csv"})
    row = "\t".join(["9_Other_00.00.00.000-00.00.01.000", *["0"] * 4, "one"])
    (tmp_path / "LSMDC16_annos_val.csv").write_text(row)
    (tmp_path / "LSMDC16_challenge_1000_publictect.csv").write_text(row.replace("9_Other", "8_Other"))
    annotations = lsmdc(tmp_path, videos="V")
    rows = [line.split("\t") for line in source.read_text().strip().split("\n")]
    want: dict[str, list[str]] = {}
    for cells in rows:
        if not cells[0].startswith("1012_Unbreakable"):
            want.setdefault(cells[0], []).append(cells[5])
    assert {c.id: list(c.captions) for c in annotations.clips if c.split == "train"} == want
    assert any(len(texts) > 1 for texts in want.values())
    assert len(annotations.notes) == 1
