"""Frame captions in DiscoVLA's JSON."""

from __future__ import annotations

import pytest

from discovla.data.datasets.annotations import read_frame_captions, with_frame_captions
from discovla.data.manifest import Clip


def test_frame_captions_are_looked_up_by_clip_id_and_raw_caption(tmp_path):
    path = tmp_path / "captions.json"
    path.write_text('{"video1_a \\"b\\"": ["x", "y"], "video1_c": ["z", "w"]}')
    lists = read_frame_captions(path)
    clip = Clip(id="video1", video=tmp_path, captions=("c", "none", 'a "b"'), split="train")
    assert with_frame_captions([clip], lists)[0].frame_captions == (("z", "w"), None, ("x", "y"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "expected an object of lists of frame captions, found list"),
        ("{}", "expected an object of lists of frame captions, found an empty object"),
        ('{"v_a": "x"}', "'v_a': expected a list of texts, found x"),
        ('{"v_a": []}', "'v_a': expected a list of texts"),
        ('{"v_a": ["x", 1]}', "'v_a': expected a list of texts"),
        ('{"v_a": [\n"x"', r"captions.json:2: not JSON: .* at column"),
    ],
    ids=["a list", "nothing", "a text", "an empty list", "a number", "cut off"],
)
def test_a_file_without_lists_of_texts_is_refused(tmp_path, text, message):
    path = tmp_path / "captions.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_frame_captions(path)


def test_a_folder_instead_of_a_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected a JSON file, Is a directory"):
        read_frame_captions(tmp_path)
