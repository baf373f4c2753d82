"""Frame captions as a captioner leaves them."""

from __future__ import annotations

import pytest

from discovla.data.captions.frame_captions import frame_captions_of, read_frame_captions


def test_lists_are_found_by_video_and_raw_caption(tmp_path):
    path = tmp_path / "captions.json"
    path.write_text('{"video1_a \\"b\\"": ["x", "y"], "video1_c": ["z", "w"]}')
    lists = read_frame_captions(path)
    assert frame_captions_of(lists, "video1", ("c", "none", 'a "b"')) == (("z", "w"), None, ("x", "y"))


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
def test_what_is_no_list_of_texts_is_named(tmp_path, text, message):
    path = tmp_path / "captions.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_frame_captions(path)


def test_a_folder_instead_of_a_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="expected a JSON file, Is a directory"):
        read_frame_captions(tmp_path)
