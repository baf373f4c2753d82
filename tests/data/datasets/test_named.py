"""MSVD, VATEX, DiDeMo, LSMDC and ActivityNet Captions, on drawn files."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

from discovla.data.datasets import DATASETS
from discovla.data.datasets.files import VideoFolder

activitynet, didemo, lsmdc, msvd, vatex = (
    DATASETS[name].read for name in ("activitynet", "didemo", "lsmdc", "msvd", "vatex")
)


def written(folder: Path, **files: object) -> Path:
    """Write files: `__` in a name becomes a dot; texts are written verbatim, other values as JSON."""
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def test_a_video_is_found_with_any_extension(tmp_path):
    for name in ("a.webm", "a.avi", "b.MOV", "c.d.mkv", "bare", "e.txt", "films/f.avi"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    videos = VideoFolder(tmp_path, ".avi")
    files = {name: videos.find(name).relative_to(tmp_path).as_posix() for name in ("a", "b", "c.d", "bare")}
    assert files == {"a": "a.avi", "b": "b.MOV", "c.d": "c.d.mkv", "bare": "bare"}
    assert videos.find("e") == tmp_path / "e.avi"  # which is not there
    assert videos.find("x.mp4", "a") == tmp_path / "a.avi"
    assert videos.find("x.mp4", "x") == tmp_path / "x.mp4"
    assert videos.find("films/f", "f") == tmp_path / "films/f.avi"


MSVD_LISTS = {
    "train_list__txt": "-a_b_1_2\nc_3_4",
    "val_list__txt": "d_5_6\n",
    "test_list__txt": "e_7_8\nnone_0_1\n",
}
MSVD = {"-a_b_1_2": ["a dog", "a cat"], "c_3_4": ["a cow"], "d_5_6": ["one"], "e_7_8": ["x"], "f_0_0": ["y"]}


@pytest.mark.parametrize("layout", ["pickle", "json"])
def test_msvd_is_the_same_from_both_its_caption_files(tmp_path, layout):
    written(tmp_path, **MSVD_LISTS)
    if layout == "pickle":
        words = {name: [text.split() for text in texts] for name, texts in MSVD.items()}
        (tmp_path / "raw-captions.pkl").write_bytes(pickle.dumps(words, protocol=2))
    else:
        written(tmp_path, captions_msvd__json=MSVD)
    annotations = msvd(tmp_path, videos="V")
    assert [(c.id, c.captions, c.split) for c in annotations.clips] == [
        ("-a_b_1_2", ("a dog", "a cat"), "train"),
        ("c_3_4", ("a cow",), "train"),
        ("d_5_6", ("one",), "val"),
        ("e_7_8", ("x",), "test"),
    ]
    assert annotations.clips[0].video == Path("V").resolve() / "-a_b_1_2.avi"
    assert annotations.uncaptioned == {"test": ["none_0_1"]}
    assert annotations.unlisted == ["f_0_0"]


def test_splits_that_share_a_video_are_refused(tmp_path):
    written(tmp_path, captions_msvd__json=MSVD, **(MSVD_LISTS | {"val_list__txt": "c_3_4"}))
    with pytest.raises(ValueError, match="found 1 in train and in val, the first c_3_4"):
        msvd(tmp_path, videos="V")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("captions_msvd__json", {"a": "text"}, r"captions_msvd.json: 'a': expected a list of texts"),
        ("captions_msvd__json", {"a": [" "]}, r"captions_msvd.json: 'a': expected a list of texts"),
        ("captions_msvd__json", [], r"captions_msvd.json: expected an object of captions by video"),
        ("raw-captions__pkl", "", r"raw-captions.pkl: not a pickle of plain values"),
        ("raw-captions__pkl", "text\n", r"raw-captions.pkl: not a pickle of plain values"),
        ("test_list__txt", "\n", r"test_list.txt: expected at least one video id, found none"),
    ],
)
def test_a_bad_file_is_named(tmp_path, name, content, message):
    written(tmp_path, **({"captions_msvd__json": MSVD} | MSVD_LISTS | {name: content}))
    with pytest.raises(ValueError, match=message):
        msvd(tmp_path, videos="V")


def test_missing_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"expected raw-captions.pkl or captions_msvd.json, found none"):
        msvd(tmp_path, videos="V")
    with pytest.raises(ValueError, match=r"no: expected a folder of annotation files, found none"):
        msvd(tmp_path / "no", videos="V")


def vatex_row(name: str) -> dict:
    return {"videoID": name, "enCap": [f"{i} of {name}" for i in range(10)], "chCap": ["x"] * 10}


VATEX_LISTS = {
    "val_list__txt": "c_000001_000011\nd_000001_000011",
    "test_list__txt": "e_000001_000011\nf_000001_000011",
    "test1k5_sec_list__txt": "d_000001_000011\nf_000001_000011",
}
VATEX_IDS = [f"{name}_000001_000011" for name in "abcdef"]


@pytest.mark.parametrize("layout", ["clip2video", "release", "release and list"])
def test_vatex_is_the_same_from_each_file_layout(tmp_path, layout):
    written(tmp_path, **VATEX_LISTS)
    if layout == "clip2video":
        rows = {name: vatex_row(name) for name in VATEX_IDS}
        written(tmp_path, vatex_data__json=rows, train_list__txt="\n".join(VATEX_IDS[:2]))
    else:
        (tmp_path / "vatex_training_v1.0.json").write_text(json.dumps(list(map(vatex_row, VATEX_IDS[:2]))))
        (tmp_path / "vatex_validation_v1.0.json").write_text(json.dumps(list(map(vatex_row, VATEX_IDS[2:]))))
    if layout == "release and list":
        written(tmp_path, train_list__txt="\n".join(VATEX_IDS[:2]))
    annotations = vatex(tmp_path, protocol="hgr", videos="V")
    splits = dict(zip(VATEX_IDS, ["train", "train", "val", "val", "test", "test"], strict=True))
    assert {c.id: c.split for c in annotations.clips} == splits
    assert all(c.captions == tuple(vatex_row(c.id)["enCap"]) for c in annotations.clips)
    assert annotations.notes == ()


def test_vatex_mixed_1k5_notes_the_leak_and_removes_test_clips_from_val(tmp_path):
    rows = {name: vatex_row(name) for name in VATEX_IDS}
    written(tmp_path, vatex_data__json=rows, train_list__txt="\n".join(VATEX_IDS[:2]), **VATEX_LISTS)
    annotations = vatex(tmp_path, protocol="mixed-1k5", videos="V")
    assert [(c.id[0], c.split) for c in annotations.clips[2:]] == [("c", "val"), ("d", "test"), ("f", "test")]
    assert "leaking: of the 2 test clips 1 are in val_list.txt and 1 in test_list.txt" in annotations.notes[0]


def test_a_bad_row_of_vatex_is_named(tmp_path):
    written(tmp_path, vatex_data__json={"a": {"enCap": []}}, train_list__txt="a", **VATEX_LISTS)
    with pytest.raises(ValueError, match=r"vatex_data.json: 'a': enCap: expected texts"):
        vatex(tmp_path, protocol="hgr", videos="V")
    written(tmp_path, vatex_data__json=["a"])
    with pytest.raises(ValueError, match=r"vatex_data.json: expected objects with videoID and enCap"):
        vatex(tmp_path, protocol="hgr", videos="V")
    with pytest.raises(ValueError, match="protocol: expected one of hgr, mixed-1k5, got 'x'"):
        vatex(tmp_path, protocol="x", videos="V")


def moments(*rows: tuple[str, str]) -> list[dict]:
    return [
        {"video": video, "description": text, "times": [[0, 0]] * 4, "num_segments": 6}
        for video, text in rows
    ]


def didemo_folder(folder: Path) -> Path:
    return written(
        folder,
        train_data__json=moments(("1@N_a.mov", "one "), ("2@N_b.", "two"), ("1@N_a.mov", "three.")),
        val_data__json=moments(("3@N_c.3gp", "four")),
        test_data__json=moments(("4@N_d.", "five"), ("5.x.avi", "six")),
    )


def test_didemo_joins_the_descriptions_of_a_video_into_a_paragraph(tmp_path):
    (tmp_path / "V").mkdir()
    for name in ("1@N_a.mp4", "2@N_b", "5.x.avi"):
        (tmp_path / "V" / name).write_text("")
    annotations = didemo(didemo_folder(tmp_path), protocol="paragraph", videos=tmp_path / "V")
    assert [(c.id, c.captions, c.split, c.video.name, c.end) for c in annotations.clips] == [
        ("1@N_a.mov", ("one three.",), "train", "1@N_a.mp4", 30.0),  # encoded again
        ("2@N_b.", ("two",), "train", "2@N_b", 30.0),
        ("3@N_c.3gp", ("four",), "val", "3@N_c.3gp", 30.0),  # not there
        ("4@N_d.", ("five",), "test", "4@N_d.mp4", 30.0),
        ("5.x.avi", ("six",), "test", "5.x.avi", 30.0),
    ]
    assert annotations.rows == {"train": 3, "val": 1, "test": 2}


def test_didemo_matches_listed_ids_without_extensions(tmp_path):
    written(
        didemo_folder(tmp_path),
        train_list__txt="1@N_a\n9@N_x",
        val_list__txt="3@N_c",
        test_list__txt="5.x.avi",
    )
    annotations = didemo(tmp_path, protocol="paragraph-listed", videos="V")
    assert [(c.id, c.split) for c in annotations.clips] == [
        ("1@N_a.mov", "train"),
        ("3@N_c.3gp", "val"),
        ("5.x.avi", "test"),
    ]
    assert annotations.uncaptioned == {"train": ["9@N_x"]}


def test_a_bad_row_of_didemo_is_named(tmp_path):
    written(didemo_folder(tmp_path), val_data__json=[{"video": "x"}])
    with pytest.raises(ValueError, match=r"val_data.json: expected a list of objects with video and descri"):
        didemo(tmp_path, protocol="paragraph", videos="V")


def lsmdc_row(name: str, text: str) -> str:
    return "\t".join([name, *["00.00.00.000"] * 4, text])


A, B, C = (f"000{i}_A_Film_{i}_00.0{i}.00.000-00.0{i}.02.500" for i in (1, 2, 3))


def lsmdc_folder(folder: Path, train: str) -> Path:
    return written(
        folder,
        LSMDC16_annos_training__csv=train,
        LSMDC16_annos_val__csv=lsmdc_row(B, "SOMEONE's \"odd, sentence"),
        LSMDC16_challenge_1000_publictect__csv=lsmdc_row(C, "He looks back.") + "\n",
    )


def test_lsmdc_keeps_dots_in_clip_ids_and_quotes_in_sentences(tmp_path):
    skipped = "1012_Unbreakable_00.05.16.065-00.05.21.941"
    rows = [lsmdc_row(A, "one"), lsmdc_row(skipped, "skipped"), lsmdc_row(A, "two")]
    (tmp_path / "V/0001_A_Film_1").mkdir(parents=True)
    (tmp_path / f"V/0001_A_Film_1/{A}.avi").write_text("")
    (tmp_path / f"V/{C}.mp4").write_text("")
    annotations = lsmdc(lsmdc_folder(tmp_path, "\r\n".join(rows)), videos=tmp_path / "V")
    assert [(c.id, c.captions, c.split) for c in annotations.clips] == [
        (A, ("one", "two"), "train"),
        (B, ("SOMEONE's \"odd, sentence",), "val"),
        (C, ("He looks back.",), "test"),
    ]
    assert [c.video.relative_to(tmp_path / "V").as_posix() for c in annotations.clips] == [
        f"0001_A_Film_1/{A}.avi",
        f"0002_A_Film_2/{B}.avi",
        f"{C}.mp4",
    ]
    assert annotations.notes == [f"train: left out {skipped}, as loaders of the field do"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("x,y", "training.csv:2: expected 6 columns by tab, found 1"),
        (lsmdc_row("film", "a"), "training.csv:2: expected a clip id <movie>_<start>-<end>, found 'film'"),
        (lsmdc_row(B, " "), "training.csv:2: the sentence is empty"),
    ],
)
def test_a_bad_row_of_lsmdc_is_named(tmp_path, row, message):
    with pytest.raises(ValueError, match=message):
        lsmdc(lsmdc_folder(tmp_path, f"{lsmdc_row(A, 'one')}\n{row}\n"), videos="V")


def paragraph(*sentences: str) -> dict:
    return {"duration": 3.0, "timestamps": [[2, 1]] * len(sentences), "sentences": list(sentences)}


def test_activitynet_joins_sentences_and_finds_videos_without_their_prefix(tmp_path):
    (tmp_path / "V").mkdir()
    for name in ("a.mkv", "v_b.mp4"):
        (tmp_path / "V" / name).write_text("")
    written(
        tmp_path,
        train__json={"v_a": paragraph("One.", "  Two é.")},
        val_1__json={"v_b": paragraph("Three."), "v_c": paragraph("Four.", " Five.")},
        val_2__json={"v_b": paragraph("Six.")},
        val_ids__json=["v_c", "v_b", "v_none"],
    )
    annotations = activitynet(tmp_path, protocol="paragraph", videos=tmp_path / "V")
    assert [(c.id, c.captions, c.split, c.video.name) for c in annotations.clips] == [
        ("v_a", ("One. Two é.",), "train", "a.mkv"),
        ("v_c", ("Four. Five.",), "test", "c.mp4"),
        ("v_b", ("Three.",), "test", "v_b.mp4"),
    ]
    assert annotations.rows == {"train": 2, "test": 3}
    assert annotations.uncaptioned == {"test": ["v_none"]}
    second = activitynet(tmp_path, protocol="paragraph-val_2", videos="V")
    assert [(c.id, c.captions) for c in second.clips if c.split == "test"] == [("v_b", ("Six.",))]
    assert second.uncaptioned == {"test": ["v_c", "v_none"]}


def test_activitynet_without_sentences_is_named(tmp_path):
    written(tmp_path, train__json={"v_a": paragraph(" ")}, val_1__json={})
    with pytest.raises(ValueError, match=r"train.json: 'v_a': expected sentences, found none"):
        activitynet(tmp_path, protocol="paragraph", videos="V")
    written(tmp_path, train__json={"v_a": {"duration": 1}})
    with pytest.raises(ValueError, match=r"train.json: expected an object of objects with sentences"):
        activitynet(tmp_path, protocol="paragraph", videos="V")
