"""A row that odd quoting hides is an error with its line, and what is left out is noted."""

from __future__ import annotations

import csv
import random

import pytest

from discovla.data.datasets.generic import csv_clips, jsonl_clips
from discovla.data.datasets.tables import read_table

HEAD = "video,caption\n"

REFUSED = {
    "a stray quote opens": (
        f'{HEAD}a.mp4,"Hello, a man says\nb.mp4,a dog says hi"\nc.mp4,cat\n',
        r":2: a quoted cell begins here and runs over line 3, a row of its own \(b.mp4\)",
    ),
    "a stray quote closes with another row's": (
        f'{HEAD}x.mp4,one\na.mp4,"Hello\nb.mp4,"a dog"\n',
        ":3: not a table: a quoted cell begins here and ends at line 4, without a comma",
    ),
    "numbered videos": (
        'video_id,sentence\nvideo1,one\nvideo2,"two\nvideo3,three"\nvideo4,four\n',
        r":3: a quoted cell begins here and runs over line 4, a row of its own \(video3\)",
    ),
    "never closes": (f'{HEAD}a.mp4,one\nb.mp4,"two\nc.mp4,x\n', ":3: not a table: .*never ends"),
    "quote in a tab table": (
        'video\tcaption\na.mp4\tone\nb.mp4\t"hello" is said\n',
        ":3: not a table: a quoted cell begins here, without a tab after its last quote",
    ),
    "backslash": (f'{HEAD}a.mp4,"say \\"hi\\", man"\n', ":2: not a table: .*written twice"),
    "space before a quote": (f'{HEAD}a.mp4, "two"\n', ":2: a space before the first quote"),
    "space before a quote and a comma": (f'{HEAD}a.mp4, "two, more"\n', ":2: expected 2 columns, found 3"),
    "not UTF-8": (f"{HEAD}a.mp4,one\nb.mp4,caf\xe9\n".encode("latin-1"), ":3: .*UTF-8, found byte 0xe9"),
    **{
        coding: (f"{HEAD}a.mp4,one\n".encode(coding), ": expected .* UTF-16 or UTF-32; save it")
        for coding in ("utf-16", "utf-16-be", "utf-32")
    },
    "web page": ("<!DOCTYPE html><html>404</html>", ": expected .* found a web page"),
    "spreadsheet": (b"PK\x03\x04" + bytes(range(256)), ": expected .* found a zip archive, as spreadsheets"),
    "gzip": (b"\x1f\x8b\x08" + bytes(30), ": expected .* found a gzip archive; unpack it"),
    "Git LFS pointer": ("version https://git-lfs.github.com/spec/v1\noid sha256:aa\n", "a Git LFS pointer"),
    "address": (
        f"{HEAD}https://host/a.mp4,one\n",
        ":2: video: expected a file, found the address https://host/",
    ),
    "invisible": (f"{HEAD}a.mp4,\u200b\n", ":2: caption: expected a text, found invisible characters only"),
    "minutes": ("video,caption,start,end\na.mp4,one,0:01,0:02\n", ":2: start: expected seconds .*'0:01'"),
    "decimal comma": ('video,caption,start\na.mp4,one,"0,5"\n', ":2: start: expected seconds .*'0,5'"),
    "negative start": ("video,caption,start\na.mp4,one,-1\n", ":2: start: expected seconds not below 0"),
    "no time": ("video,caption,start\na.mp4,one,nan\n", ":2: start: expected seconds not below 0"),
    "header twice": (
        "video,caption,caption\na.mp4,one,two\n",
        ":1: .*once each, found video, caption, caption",
    ),
    "no header": ("a.mp4,a cat\n", ":1: expected the column video, caption, found a.mp4, a cat"),
    "comma in a caption": (f"{HEAD}a.mp4,a cat, a dog\n", ":2: expected 2 columns, found 3"),
    "long cell": (f"{HEAD}a.mp4,{'x ' * 70_000}\n", ":2: not a table: a cell is longer than the limit"),
    "null character": (f"{HEAD}a.mp4,o\0ne\n", ":2: caption: .*null character"),
    "digits of another script": ("video,caption,start\na.mp4,one,\uff11\n", ":2: start: expected seconds"),
    "header again": (f"{HEAD}a.mp4,one\n{HEAD}", ":3: expected a row, found the header again"),
    "null character in a name": (f"{HEAD}a\0.mp4,one\n", ":2: video: .*null character"),
    "no split": ("video,caption,split\na.mp4,one,nan\n", ":2: split: expected a name, found 'nan'"),
    "spreadsheet's error": (f"{HEAD}a.mp4,#REF!\n", ":2: caption: expected a text, found '#REF!'"),
    "nan": (f"{HEAD}a.mp4,nan\n", ":2: caption: expected a text, found 'nan'"),
    "None": (f"{HEAD}a.mp4,one\nb.mp4,None\n", ":3: caption: expected a text, found 'None'"),
    "empty": (f"{HEAD}a.mp4,\n", ":2: caption is empty"),
    "start at the end": ("video,caption,start,end\na.mp4,one,4,4\n", ":2: expected a start before the end"),
    "end before the start": ("video,caption,start,end\na.mp4,one,5,2\n", "found start 5 and end 2"),
    "end at nothing": ("video,caption,end\na.mp4,one,0\n", "found start 0 and end 0"),
}


@pytest.mark.parametrize(("text", "reason"), REFUSED.values(), ids=REFUSED)
def test_a_bad_row_is_named_by_its_first_line(text, reason, tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=reason) as error:
        if "video_id" in str(text):
            read_table(path, required=("video_id", "sentence"))
        else:
            csv_clips(path)
    assert str(error.value).startswith(f"{path}:")


def test_a_caption_on_several_lines_and_rows_of_empty_cells_are_noted(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text(f'{HEAD}a.mp4,"a man walks,\nthen runs, and\nfalls"\n,\nb.mp4,two\n\n')
    annotations = csv_clips(path)
    assert [clip.captions for clip in annotations.clips] == [
        ("a man walks,\nthen runs, and\nfalls",),
        ("two",),
    ]
    assert annotations.notes == [
        "1 rows have a cell on several lines: line 2",
        "1 rows of empty cells are left out: line 5",
    ]


@pytest.mark.parametrize("seed", range(20))
def test_whatever_a_csv_writer_writes_is_read_back(tmp_path, seed):
    draw = random.Random(seed)
    letters = 'ab"",;\t\n\r\' é\u2028\ufeff\\'
    captions = ["x" + "".join(draw.choices(letters, k=draw.randrange(12))) for _ in range(30)]
    path = tmp_path / "t.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(
            [("video", "caption"), *((f"clip {i}", c) for i, c in enumerate(captions))]
        )
    rows = read_table(path, required=("video", "caption"))
    assert [row["caption"] for _, row in rows] == captions


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"video": "a.mp4", "caption": "nan"}', ":1: caption: expected a text, found 'nan'"),
        ('{"video": "a.mp4", "caption": NaN}', ":1: caption: expected a text that is not empty, found nan"),
        ('{"video": "a.mp4", "captions": ["one", null]}', "expected a text that is not empty, found None"),
        ('{"video": "a.mp4", "caption": "x", "start": 3, "end": 3}', ":1: expected a start before the end"),
        ('{"video": "a.mp4", "caption": "\\ud83d"}', ":1: caption: expected UTF-8"),
        ('{"video": "a\\udce9.mp4", "caption": "x"}', r":1: video: expected UTF-8, found a\\xe9\.mp4"),
        (
            '{"video": "a.mp4", "video": "b.mp4", "caption": "x"}',
            ":1: not JSON: expected the key 'video' once",
        ),
        ('{"video": "a.mp4", "caption": "x", "start": 1' + "0" * 400 + "}", ":1: start: expected seconds"),
        ('{"video": "a.mp4", "caption": "x", "start": 1' + "0" * 5000 + "}", ":1: not JSON: .*5001 digits"),
        ('{"video": ' + "[" * 100_000, ":1: not JSON: lists or objects nested too deeply"),
    ],
)
def test_a_json_line_without_a_caption_or_span_is_refused(line, reason, tmp_path):
    (tmp_path / "t.jsonl").write_text(line)
    with pytest.raises(ValueError, match=reason):
        jsonl_clips(tmp_path / "t.jsonl")


def test_splits_named_as_other_programs_do_are_noted(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("video,caption,split\na.mp4,one,Train\nb.mp4,two,validation\nc.mp4,three,test\n")
    assert csv_clips(path).notes == [
        "2 splits are named almost like 'train', 'val' or 'test': Train, validation"
    ]
