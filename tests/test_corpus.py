"""`discovla embed` writes embeddings of a manifest, continues after kill -9 and lists refused clips."""

import json
import os
import signal
from dataclasses import replace
from multiprocessing import get_context

import numpy as np
import pytest
import torch

import discovla
from discovla import corpus
from discovla.cli import main
from discovla.corpus import embed_manifest
from discovla.data.manifest import read_manifest, write_manifest
from tests.holders import holder

CLIP = ["clip:drawn", "--device", "cpu", "--batch-size", "3"]


@pytest.fixture(scope="module")
def model() -> discovla.Model:
    """Return the small CLIP that ships with discovla."""
    return discovla.load("clip:drawn", device="cpu", batch_size=3, data={"frames": 4, "workers": 0})


@pytest.fixture
def manifest(drawn, tmp_path):
    """Return a manifest of 14 clips, two of which cannot be read."""
    clips = [clip for clip in read_manifest(drawn) if clip.split != "train"]
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    clips[1] = replace(clips[1], video=broken)
    clips[7] = replace(clips[7], video=tmp_path / "absent.mp4")
    write_manifest(tmp_path / "clips.jsonl", clips)
    return tmp_path / "clips.jsonl"


def lines(path):
    """Return the objects of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_manifest_is_embedded_with_a_line_for_each_row(model, manifest, tmp_path):
    clips, out = read_manifest(manifest), tmp_path / "out"
    result = embed_manifest(model, manifest, out, part=3)
    good = [clip for clip in clips if clip.video.name not in ("broken.mp4", "absent.mp4")]
    videos, texts = (discovla.Embeddings.load(out / f"{name}.safetensors") for name in ("videos", "texts"))
    assert [line["id"] for line in lines(out / "videos.jsonl")] == [clip.id for clip in good]
    assert [line["video"] for line in lines(out / "videos.jsonl")] == [str(clip.video) for clip in good]
    assert [clips[place].id for place in videos.index.tolist()] == [clip.id for clip in good]
    for line in lines(out / "texts.jsonl"):
        assert line["row"] is None or lines(out / "videos.jsonl")[line["row"]]["id"] == line["id"]
    captions = [caption for clip in clips for caption in clip.captions]
    assert [line["caption"] for line in lines(out / "texts.jsonl")] == captions
    assert torch.equal(texts.pooled, model.embed_texts(captions).pooled)
    np.testing.assert_allclose(videos.numpy(), model.embed_videos([c.video for c in good]).numpy(), atol=1e-5)
    assert {bad["id"] for bad in lines(out / "refused.jsonl")} == {clips[1].id, clips[7].id}
    assert "no such file" in lines(out / "refused.jsonl")[1]["reason"]
    assert (result.videos, result.texts, len(result.refused)) == (len(good), len(captions), 2)
    assert not (out / "parts").exists()
    written = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert embed_manifest(model, manifest, out, part=3) == result
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == written


def killed(model, manifest, out):
    """Embed, and kill this process when it begins the third part."""
    torch.set_num_threads(1)
    embed_videos, calls = model.embed_videos, []

    def counted(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return embed_videos(*arguments, **options)

    model.embed_videos = counted
    embed_manifest(model, manifest, out, part=3)


def test_a_killed_command_continues_where_it_was_with_the_same_bytes(model, manifest, tmp_path, monkeypatch):
    process = get_context("fork").Process(target=killed, args=(model, manifest, tmp_path / "out"))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "out" / "videos.safetensors").exists()
    calls, embed_videos = [], model.embed_videos

    def counted(videos, **options):
        calls.append(len(videos))
        return embed_videos(videos, **options)

    monkeypatch.setattr(model, "embed_videos", counted)
    embed_manifest(model, manifest, tmp_path / "out", part=3)
    resumed, calls[:] = list(calls), []
    embed_manifest(model, manifest, tmp_path / "whole", part=3)
    assert resumed == calls[2:]
    for name in ("videos.safetensors", "videos.jsonl", "texts.safetensors", "texts.jsonl", "refused.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_part_of_broken_clips_only_is_skipped_but_not_a_whole_manifest(model, manifest, tmp_path):
    clips = read_manifest(manifest)
    write_manifest(tmp_path / "few.jsonl", [clips[1], clips[7], replace(clips[1], id="x"), clips[0]])
    assert embed_manifest(model, tmp_path / "few.jsonl", tmp_path / "few", part=3).videos == 1
    write_manifest(tmp_path / "none.jsonl", [clips[1], clips[7]])
    with pytest.raises(ValueError, match=r"can be read, found none of 2; the first: .*broken"):
        embed_manifest(model, tmp_path / "none.jsonl", tmp_path / "none")


def test_a_folder_of_other_embeddings_is_refused(model, manifest, tmp_path):
    embed_manifest(model, manifest, tmp_path / "out", split="val")
    with pytest.raises(ValueError, match=r"embed\.json: expected the same clips to continue, found others"):
        embed_manifest(model, manifest, tmp_path / "out")
    other = discovla.load("clip:drawn", device="cpu", batch_size=3, data={"frames": 3, "workers": 0})
    with pytest.raises(ValueError, match="expected the same data to continue"):
        embed_manifest(other, manifest, tmp_path / "out", split="val")


def test_a_folder_to_which_another_process_writes_is_refused_until_that_has_ended(model, manifest, tmp_path):
    out = tmp_path / "out"
    with holder(out, "discovla embed") as other:
        with pytest.raises(ValueError, match=rf"another discovla embed \(process {other.pid} on "):
            embed_manifest(model, manifest, out, split="val")
        assert [path.name for path in out.iterdir()] == ["writer.lock"]
    embed_manifest(model, manifest, out, split="val")
    assert not (out / "writer.lock").exists()
    with holder(out, "discovla embed"):  # a complete folder is only read
        embed_manifest(model, manifest, out, split="val")


def test_the_command_prints_what_it_wrote_and_refused(manifest, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(corpus, "PART", 3)
    run, *options = CLIP
    assert main(["embed", run, str(manifest), str(tmp_path / "out"), *options, "--split", "val"]) == 0
    printed = capsys.readouterr().out
    assert "videos.safetensors: 5 videos" in printed and "refused 1 clips, listed with reasons" in printed
    assert main(["embed", run, str(manifest), str(tmp_path / "o"), *options, "--split", "dev"]) == 2
    assert main(["embed", run, str(manifest), str(tmp_path / "o"), "--batch-size", "0"]) == 2
    assert "batch_size: expected at least 1, found 0" in capsys.readouterr().err
