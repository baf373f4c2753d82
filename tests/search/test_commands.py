"""The commands index and search videos, and measure an index as `evaluate` measures the run."""

import json
from collections import Counter

import numpy as np
import pytest
import torch

from discovla.cli import main
from discovla.config import read_config
from discovla.data.manifest import read_manifest, write_manifest
from discovla.evaluate import EvalOptions, evaluate
from discovla.methods import build
from discovla.model import Model, load
from discovla.search.index import Index
from discovla.search.sources import SourceVideo
from tests.runs import METHODS, write_config


def call(*words: object) -> int:
    return main([str(word) for word in words])


def test_index_and_search_from_the_command_line(folder, tmp_path, capsys):
    out = tmp_path / "my.index"
    assert call("index", "clip:drawn", folder, tmp_path / "none.mp4", "--out", out) == 0
    printed = capsys.readouterr().out
    assert "3 videos added" in printed and "1 refused" in printed
    assert f"{tmp_path / 'none.mp4'}: there is no such file" in printed
    assert call("search", out, "a red circle", "-k", 2, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert len(result["hits"]) == 2
    assert {"video", "start", "end", "best_frame", "score", "probability"} <= set(result["hits"][0])
    moment = result["hits"][0]["moment_id"]
    assert call("search", out, "--like", moment, "-k", 1) == 0
    assert "(moment " in capsys.readouterr().out
    assert call("index", out, "--status", "--json") == 0
    status = json.loads(capsys.readouterr().out)
    assert (status["videos"], status["moments"], status["refused"]) == (3, 7, 1)
    assert status["not_indexed"][0]["reason"] == "there is no such file"
    assert call("index", out, "--compact") == 0
    assert call("index", out, "--prune") == 0
    assert "removed 1 videos" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("search", "none", "a"), "expected an index, found nothing"),
        (("search", "INDEX"), "expected one of TEXT, --image, --video and --like, found none"),
        (("search", "INDEX", "a", "--like", 1), "found TEXT, --like"),
        (("search", "INDEX", "a", "--where", "1; drop table"), "where: expected a column"),
        (("search", "INDEX", "a", "--start", 1), "expected --video"),
        (("search", "INDEX", "--video", "a.mp4", "--start", 3, "--end", 1), "a.mp4: expected a start before"),
        (("search", "INDEX", "--like", 12345), "expected one of the index, found 12345"),
        (("search", "INDEX", "--image", "none.png"), "none.png: No such file"),
        (("index", "clip:drawn", "a.mp4"), "expected --out INDEX"),
        (
            ("index", "clip:drawn", "a.mp4", "--out", "INDEX", "--moments", "whole"),
            "expected --moments shots",
        ),
        (("index", "clip:drawn", "a.mp4", "--out", "INDEX", "--merge", 2), "expected no --merge"),
    ],
)
def test_wrong_use_is_one_line(words, line, read_only, capsys):
    assert call(*(read_only.path if word == "INDEX" else word for word in words)) == 2
    error = capsys.readouterr().err
    assert line in error and Counter(error)["\n"] == 1


def test_an_index_of_merged_tokens_is_that_of_the_merged_model(folder, model, tmp_path):
    out, video = tmp_path / "my.index", folder / "one.mp4"
    assert call("index", "clip:drawn", video, "--out", out, "--moments", "whole", "--merge", 3) == 0
    merged = load("clip:drawn", merge=3)
    with Index.open(out) as index:
        stored = index.stored_embedding([SourceVideo(video=str(video))]).pooled
        torch.testing.assert_close(stored, merged.embed_videos([video]).pooled)
    assert not torch.allclose(stored, model.embed_videos([video]).pooled, atol=1e-3)
    with pytest.raises(ValueError, match="another model; --rebuild"):
        Index.open(out, model=model)


def test_without_the_extra_one_line_says_what_to_install(read_only, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "lancedb", None)
    assert call("search", read_only.path, "a") == 2
    assert "pip install 'discovla[search]'" in capsys.readouterr().err


def small_model(tmp_path, drawn, words: list[str]) -> Model:
    """Return an untrained small model of a method, with random heads."""
    config = read_config(write_config(tmp_path, drawn), words)
    torch.manual_seed(0)
    method = build(config.model, config.method)
    with torch.no_grad():
        for parameter in method.parameters():  # parts that start at 0 must count too
            parameter.add_(0.02 * torch.randn_like(parameter))
    return Model(method, config.data, batch_size=5, device="cpu")


@pytest.mark.parametrize("method", ["discovla", *METHODS])
def test_an_index_has_the_metrics_of_the_model(method, drawn, tmp_path):
    model = small_model(tmp_path, drawn, METHODS.get(method, []))
    clips = read_manifest(drawn, split="test")
    write_manifest(tmp_path / "test.jsonl", clips)
    options = EvalOptions(data=model.data, batch_size=model.batch_size)
    expected = evaluate(model.method, clips, options)
    with Index.create(tmp_path / "index", model) as index:
        index.add([tmp_path / "test.jsonl"])
        videos = index.stored_embedding([SourceVideo(video=str(clip.video)) for clip in clips])
        assert evaluate(model.method, clips, options, videos=videos) == expected
        # search by all texts, in exact mode, has the same ranks
        captions = [(clip, clip.captions[0]) for clip in clips]
        first = [index.search(text, k=1, exact=True).hits[0].columns["id"] for _, text in captions]
    text = model.embed_texts([text for _, text in captions])
    scores = model.similarity(text, model.embed_videos([clip.video for clip in clips])).numpy()
    assert first == [clips[i].id for i in np.argmax(scores, axis=1)]
