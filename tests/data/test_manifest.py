"""Reading, writing and checking manifests."""

from __future__ import annotations

import json

import pytest

from discovla.data.manifest import Clip, check_clips, read_manifest, write_manifest

LINE = {"id": "a", "video": "a.mp4", "captions": ["a red circle"], "split": "train"}


def manifest(folder, *rows):
    """Write a manifest of these rows; a string is written unchanged."""
    path = folder / "manifest.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def clip(folder, **changes):
    """Return a clip with an existing video file."""
    video = folder / "a.mp4"
    video.write_bytes(b"not empty")
    return Clip(**({"id": "a", "video": video, "captions": ("a red circle",), "split": "train"} | changes))


def test_a_written_manifest_reads_back_the_same(tmp_path):
    clips = [
        clip(
            tmp_path,
            captions=("a", "ü\u2028 x"),
            start=1.5,
            end=3.0,
            frame_captions=(("x", "y"), None),
            caption_order=(4, 2),
        ),
        clip(tmp_path, id="b", video=tmp_path / "videos/b 1.mp4", split="test"),
    ]
    write_manifest(tmp_path / "manifest.jsonl", clips)
    assert read_manifest(tmp_path / "manifest.jsonl") == clips


def test_videos_below_the_manifest_move_with_it(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    write_manifest(here / "m.jsonl", [clip(tmp_path, video=here / "videos/a.mp4")])
    here.rename(there)
    assert read_manifest(there / "m.jsonl")[0].video == there / "videos/a.mp4"


def test_a_video_elsewhere_keeps_its_absolute_path(tmp_path):
    video = tmp_path / "elsewhere/a.mp4"
    write_manifest(tmp_path / "here/m.jsonl", [clip(tmp_path, video=video)])
    assert json.loads((tmp_path / "here/m.jsonl").read_text())["video"] == str(video)


def test_a_failed_write_leaves_the_old_manifest(tmp_path):
    path = manifest(tmp_path, LINE)
    before = path.read_text()
    with pytest.raises(
        ValueError, match=r"manifest.jsonl:2: captions\[1\]: expected a text that is not empty"
    ):
        write_manifest(path, [clip(tmp_path, id="b"), clip(tmp_path, captions=("a", ""))])
    assert path.read_text() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.mp4", "manifest.jsonl"]


def test_clips_with_the_same_id_are_not_written(tmp_path):
    with pytest.raises(ValueError, match="expected different ids, found repeated: a"):
        write_manifest(tmp_path / "m.jsonl", [clip(tmp_path), clip(tmp_path)])


def test_only_the_clips_of_a_split_are_read(tmp_path):
    path = manifest(tmp_path, LINE, LINE | {"id": "b", "split": "test"})
    assert [c.id for c in read_manifest(path, split="test")] == ["b"]


def test_a_split_without_clips_is_refused_with_the_names_of_the_others(tmp_path):
    path = manifest(tmp_path, LINE, LINE | {"id": "b", "split": "test"})
    with pytest.raises(
        ValueError, match=r"manifest.jsonl: expected clips of the split 'val', found train 1, test 1"
    ):
        read_manifest(path, split="val")


def test_blank_lines_and_a_byte_order_mark_are_skipped(tmp_path):
    path = manifest(tmp_path, "\ufeff" + json.dumps(LINE), "", LINE | {"id": "b"})
    assert [c.id for c in read_manifest(path)] == ["a", "b"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"id": "b", ', r":2: not JSON: .* at column \d+"),
        ("[1]", r":2: expected a JSON object, found list"),
        ({"id": "b", "video": "b.mp4"}, r":2: missing captions, split; found id, video"),
        (LINE | {"caption": "x"}, r":2: unknown caption; expected only id, video, captions"),
        (LINE | {"video": "s3://a/b.mp4"}, r":2: video: expected a file, found the address s3://a/b.mp4"),
        (LINE | {"id": ""}, r":2: id: expected a text that is not empty, found ''"),
        (LINE | {"captions": "x"}, r":2: captions: expected a list of texts, found 'x'"),
        (LINE | {"captions": []}, r":2: captions: expected a list of texts, found \[\]"),
        (LINE | {"captions": ["x", " "]}, r":2: captions\[1\]: expected a text that is not empty, found ' '"),
        (LINE | {"start": "1"}, r":2: start: expected seconds not below 0, found '1'"),
        (LINE | {"end": -1}, r":2: end: expected seconds not below 0, found -1"),
        (LINE | {"frame_captions": [["x"], ["y"]]}, r":2: frame_captions: .* 1 captions, found 2 lists"),
        (
            LINE | {"frame_captions": [["x", ""]]},
            r":2: frame_captions\[0\]\[1\]: expected a text that is not",
        ),
        (LINE | {"caption_order": [1, 2]}, r":2: caption_order: expected 1 whole numbers, found \[1, 2\]"),
        (LINE, r":2: expected a new id, found 'a', the id of line 1"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:24],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path, row, message):
    path = manifest(tmp_path, LINE, row)
    with pytest.raises(ValueError, match="manifest.jsonl" + message):
        read_manifest(path)


def test_a_missing_manifest_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"none.jsonl: expected a manifest, found no file"):
        read_manifest(tmp_path / "none.jsonl")


def test_an_empty_manifest_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected one clip a line, found none"):
        read_manifest(manifest(tmp_path))


def test_a_manifest_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / "m.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"m.jsonl: expected UTF-8 text"):
        read_manifest(tmp_path / "m.jsonl")


def test_usable_clips_pass_the_check(tmp_path):
    check_clips([clip(tmp_path, frame_captions=(("x", "y"),))], frames=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"captions": ("x", "\t")}, "clip 'a': caption 1 is empty"),
        ({"captions": ()}, "clip 'a': expected at least one caption, found none"),
        ({"frame_captions": (("x",),)}, "clip 'a': frame captions of caption 0: expected 2, found 1"),
        ({"frame_captions": (("x", ""),)}, "clip 'a': frame captions of caption 0: one is empty"),
    ],
    ids=["empty caption", "no caption", "too few frame captions", "empty frame caption"],
)
def test_an_unusable_clip_is_named(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        check_clips([clip(tmp_path, **changes)], frames=2)


def test_missing_and_empty_videos_are_named(tmp_path):
    (tmp_path / "empty.mp4").touch()
    clips = [
        clip(tmp_path, id=name, video=tmp_path / name)
        for name in ("none.mp4", "empty.mp4", tmp_path.name + "/..")
    ]
    with pytest.raises(ValueError) as error:
        check_clips(clips)
    text = str(error.value)
    assert "3 faults in 3 clips" in text
    assert "'none.mp4': expected a video file, found nothing" in text
    assert "'empty.mp4': expected a video file, found an empty one" in text


def test_many_faults_make_one_short_message(tmp_path):
    with pytest.raises(ValueError, match=r"8 faults in 8 clips: .*; and 3 more$"):
        check_clips([clip(tmp_path, id=str(i), captions=("",)) for i in range(8)])


def test_an_id_on_two_clips_is_a_fault(tmp_path):
    with pytest.raises(ValueError, match="expected different ids, found 'a' on 2 clips"):
        check_clips([clip(tmp_path), clip(tmp_path)])
