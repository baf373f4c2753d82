"""Folders as file systems and notebooks leave them: every file is a clip, or noted, or an error."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from discovla.cli import main
from discovla.data.datasets.generic import folder_clips


def add(folder: Path, *names: str, caption: str = "a cat") -> None:
    """Write a video and a text for each name without a suffix, or one file."""
    for name in names:
        for path in (
            (f"{name}.mp4", f"{name}.txt") if "." not in name.rpartition("/")[2].lstrip(".") else (name,)
        ):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(caption)


def splits(folder: Path) -> dict[str, str]:
    return {clip.id: clip.split for clip in folder_clips(folder).clips}


@pytest.fixture
def root(tmp_path) -> Path:
    add(tmp_path / "root", "train/x")
    return tmp_path / "root"


def test_a_linked_split_is_followed(root, tmp_path):
    add(tmp_path / "disk", "y")
    (root / "val").symlink_to(tmp_path / "disk")
    assert splits(root) == {"train/x.mp4": "train", "val/y.mp4": "val"}


def test_links_alone_are_followed(tmp_path):
    add(tmp_path / "disk", "y")
    (tmp_path / "root").mkdir()
    (tmp_path / "root/test").symlink_to(tmp_path / "disk")
    (tmp_path / "link").symlink_to(tmp_path / "root")
    assert splits(tmp_path / "link") == {"test/y.mp4": "test"}


def test_a_loop_of_links_ends_and_is_noted(root):
    (root / "train/again").symlink_to(root)
    annotations = folder_clips(root)
    assert [clip.id for clip in annotations.clips] == ["train/x.mp4"]
    assert annotations.notes == [
        "1 links lead to a folder that was read already, and are left out: train/again"
    ]


def test_a_folder_and_a_link_to_it_are_read_once_by_the_folders_name(root):
    (root / "a_link").symlink_to(root / "train")
    annotations = folder_clips(root)
    assert [clip.id for clip in annotations.clips] == ["train/x.mp4"]
    assert "a_link" in annotations.notes[0]


def test_a_link_to_a_split_deep_in_another_does_not_take_its_clips(root):
    add(root, "val/y")
    (root / "train/link").symlink_to(root / "val")
    assert splits(root) == {"train/x.mp4": "train", "val/y.mp4": "val"}


@pytest.mark.parametrize("target", ["gone.mp4", "y.mp4"], ids=["missing", "itself"])
def test_a_broken_link_is_noted(target, root):
    (root / "train/y.mp4").symlink_to(root / "train" / target)
    assert folder_clips(root).notes == ["1 links lead nowhere and are left out: train/y.mp4"]


def test_a_text_whose_accents_are_stored_in_another_way_is_that_of_the_video(tmp_path):
    add(tmp_path / "root", "cafe\u0301.mp4", "caf\u00e9.txt")
    assert len(folder_clips(tmp_path / "root").clips) == 1


def test_a_linked_video_is_a_clip(root, tmp_path):
    add(tmp_path / "disk", "y")
    for name in ("y.mp4", "y.txt"):
        (root / "train" / name).symlink_to(tmp_path / "disk" / name)
    assert set(splits(root)) == {"train/x.mp4", "train/y.mp4"}


def test_hidden_files_and_folders_are_left_out_and_noted(root):
    add(root, "train/._x", ".ipynb_checkpoints/x-checkpoint", "train/.part.mp4")
    (root / "train/._x.txt").write_bytes(b"\0\5\x16\7\xff Mac OS X")
    annotations = folder_clips(root)
    assert [clip.id for clip in annotations.clips] == ["train/x.mp4"]
    assert annotations.notes == [
        "4 hidden files and folders are left out: .ipynb_checkpoints, train/._x.mp4, train/._x.txt, ..."
    ]


def test_a_hidden_root_is_read(tmp_path):
    add(tmp_path / ".data", "x")
    assert set(splits(tmp_path / ".data")) == {"x.mp4"}


def test_a_name_that_is_not_utf8_is_named_and_the_others_are_read(root):
    for suffix in (b".mp4", b".txt"):
        Path(os.fsdecode(os.fsencode(root) + b"/train/bad\xe9byte" + suffix)).write_text("a dog")
    annotations = folder_clips(root)
    assert [clip.id for clip in annotations.clips] == ["train/x.mp4"]
    assert annotations.notes == [
        r"2 names are not UTF-8 and are left out; rename them: train/bad\xe9byte.mp4, train/bad\xe9byte.txt"
    ]


def test_a_root_whose_name_is_not_utf8_is_named(tmp_path, capsys):
    root = Path(os.fsdecode(os.fsencode(tmp_path) + b"/r\xe9"))
    add(root, "x")
    assert main(["prepare", "folder", str(root), "--out", str(tmp_path / "out/m.jsonl")]) == 2
    error = capsys.readouterr().err
    assert r"r\xe9/x.mp4" in error
    assert "codec" not in error


def test_files_of_other_kinds_are_noted(root):
    add(root, "train/x.json", "train/y.mp4.part", "readme.md")
    assert folder_clips(root).notes == [
        "3 files are neither videos nor texts: readme.md, train/x.json, train/y.mp4.part"
    ]


def test_a_text_of_another_case_is_that_of_the_video(root):
    add(root, "val/A.MP4", "val/a.TXT")
    assert splits(root) == {"train/x.mp4": "train", "val/A.MP4": "val"}
    assert not folder_clips(root).notes


def test_two_videos_of_one_text_are_noted(root):
    add(root, "train/x.mkv")
    assert folder_clips(root).notes == ["1 videos share the text of another video: train/x.mp4"]


def test_files_of_systems_and_disks_are_noted(root):
    os.mkfifo(root / "train/pipe.mp4")
    add(root, "__MACOSX/train/._x", "train/Thumbs.db", "@eaDir/x.mp4/thumb.jpg")
    annotations = folder_clips(root)
    assert [clip.id for clip in annotations.clips] == ["train/x.mp4"]
    assert annotations.notes == [
        "2 files are neither videos nor texts: @eaDir/x.mp4/thumb.jpg, train/Thumbs.db",
        "2 hidden files and folders are left out: __MACOSX/train/._x.mp4, __MACOSX/train/._x.txt",
        "1 pipes, sockets or devices are left out: train/pipe.mp4",
    ]


def test_a_folder_named_almost_like_a_split_is_noted(root):
    add(root, "validation/y", "Test/z")
    annotations = folder_clips(root)
    assert {clip.split for clip in annotations.clips} == {"train"}
    assert annotations.notes == [
        "2 folders are named like a split, but their clips are in 'train': Test, validation"
    ]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"one\nnan\n", r"x\.txt:2: caption: expected a text, found 'nan'"),
        (b"one\ncaf\xe9\n", r"x\.txt:2: .*UTF-8, found byte 0xe9"),
        (b"one\0two\n", r"x\.txt:1: caption: .*null character"),
        (b"\0\0\n", r"x\.txt: .*null characters, as in UTF-16"),
        (b"\n \n", r"x\.txt: expected a caption a line, found none"),
    ],
)
def test_a_bad_text_is_named_by_line(text, reason, root):
    (root / "train/x.txt").write_bytes(text)
    with pytest.raises(ValueError, match=reason):
        folder_clips(root)


def test_a_folder_of_hidden_files_alone_says_so(tmp_path):
    add(tmp_path / "root", "._x")
    with pytest.raises(ValueError, match="found 0 videos without one; 2 hidden files"):
        folder_clips(tmp_path / "root")
