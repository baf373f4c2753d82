"""Files of a wrong kind in place of a run's own are one line that names them, never a library's raw error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file

from discovla.cli import main
from discovla.config import ConfigError, read_config, read_values
from discovla.data.manifest import read_manifest
from discovla.foreign import printable, to_json
from discovla.model import ADAPTER
from discovla.retrieval.embeddings import Embeddings
from discovla.towers.weights import ModelConfig, load_pretrained

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 1\n"


def whole() -> bytes:
    """Return the bytes of a small safetensors file."""
    return save({"x": torch.ones(40)})


CONTENTS = {
    "empty": b"",
    "LFS pointer": LFS,
    "web page": b"<html></html>",
    "half": whole()[:100],
    "other": whole(),
}


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
def test_embeddings_of_another_format_are_named(content, tmp_path):
    (tmp_path / "e.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"e\.safetensors: expected embeddings, found"):
        Embeddings.load(tmp_path / "e.safetensors")


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
def test_an_export_of_another_format_is_named(content, tmp_path, capsys):
    (tmp_path / ADAPTER).write_bytes(content)
    assert main(["evaluate", str(tmp_path)]) == 2
    line = capsys.readouterr().err
    assert f"{tmp_path / ADAPTER}: expected the " in line
    assert line.count("\n") == 1


@pytest.mark.parametrize("content", [b"\xff\xfea\0", b"[data\n", b"caf\xe9 = 1\n"], ids=repr)
def test_a_config_that_is_no_text_or_toml_is_named(content, tmp_path):
    (tmp_path / "c.toml").write_bytes(content)
    with pytest.raises(ConfigError, match=r"c\.toml: expected"):
        read_config(tmp_path / "c.toml")


def test_a_config_with_a_byte_order_mark_is_read(tmp_path):
    text = 'directory = "r"\n[data]\nmanifest = "m.jsonl"\n'
    for name, encoding in (("plain.toml", "utf-8"), ("marked.toml", "utf-8-sig")):
        (tmp_path / name).write_text(text, encoding=encoding)
    assert read_values(tmp_path / "plain.toml") == read_values(tmp_path / "marked.toml")


def test_a_tag_is_no_folder_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("no_such_tag").mkdir()
    with pytest.raises(ValueError, match=r"model\.pretrained: expected a file"):
        load_pretrained(ModelConfig(architecture="ViT-B-32", pretrained="no_such_tag"))


def test_weights_without_a_named_architecture_name_their_file(tmp_path):
    save_file({"x": torch.ones(1)}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"w\.safetensors: expected the weights of a CLIP ViT"):
        load_pretrained(ModelConfig(pretrained=str(tmp_path / "w.safetensors"), activation="gelu"))


@pytest.mark.parametrize(
    ("text", "shown"), [("é", "é"), ("bad\udce9.mp4", r"bad\xe9.mp4"), ("\ud83d", r"\ud83d"), ("", "")]
)
def test_any_text_can_be_printed(text, shown):
    assert printable(text) == shown
    printable(text).encode()


def test_json_of_a_file_name_that_is_not_utf8_can_be_written_and_read_back():
    value = {"video": "caf\u00e9/bad\udce9.mp4", "frames": [1]}
    assert json.loads(to_json(value).encode()) == value
    assert to_json({"video": "caf\u00e9.mp4"}) == '{"video": "caf\u00e9.mp4"}'


def test_clips_are_prepared_into_a_file_whose_name_is_not_utf8(tmp_path):
    (tmp_path / "t.csv").write_text("video,caption\na.mp4,one\n")
    out = tmp_path / "bad\udce9.jsonl"
    assert main(["prepare", "csv", str(tmp_path / "t.csv"), "--out", str(out)]) == 0
    assert [clip.id for clip in read_manifest(out)] == ["a.mp4"]
