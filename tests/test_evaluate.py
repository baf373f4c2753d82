import copy
import json
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Barrier

import av
import numpy as np
import pytest
import torch

from discovla import evaluate as module
from discovla.data.loader import DataConfig, text_batches, video_batches
from discovla.data.manifest import Clip, write_manifest
from discovla.data.video.errors import DecodeError
from discovla.evaluate import (
    EvalOptions,
    evaluate,
    evaluate_matrix,
    evaluation_clips,
    results_table,
    sampling_error,
    training_captions,
)
from discovla.methods.clip import CLIP, CLIPConfig
from discovla.retrieval.metrics import retrieval_metrics
from discovla.testing import tiny_architecture
from discovla.towers.weights import initialise

CAPTIONS = [
    ("a red dot moves left",),
    ("a blue box turns", "the box spins", "a box"),
    ("nothing moves",),
    ("it is dark", "a dark room"),
]


@pytest.fixture
def method():
    """Return a CLIP for real token ids, with random weights."""
    architecture = replace(tiny_architecture(), vocab_size=49408)
    method = CLIP(architecture, CLIPConfig())
    initialise(method, architecture, seed=0)
    return method


@pytest.fixture
def clips(tmp_path):
    generator = np.random.default_rng(0)
    found = []
    for i, captions in enumerate(CAPTIONS):
        path = tmp_path / f"{i}.mp4"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=5)
            stream.height, stream.width, stream.pix_fmt = 32, 32, "yuv420p"
            for frame in generator.integers(0, 256, (6, 32, 32, 3), dtype=np.uint8):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
        found.append(Clip(id=f"c{i}", video=path, captions=captions, split="test"))
    return found


@pytest.fixture
def options(tmp_path):
    data = DataConfig(manifest=tmp_path / "m.jsonl", frames=2, context_length=12, workers=0)
    return EvalOptions(data=data, batch_size=2, rerank=True, bank=["a green dot", "a grey box", "night"])


def similarity(method, clips, data):
    """Compute the matrix from one batch of each side."""
    ids, mask = next(text_batches([c for clip in clips for c in clip.captions], data.context_length, 100))
    batch = next(video_batches(clips, data, method.architecture.image_size, 100))
    text, video = method.encode_text(ids, mask), method.encode_video(batch.frames, batch.frame_mask)
    return method.similarity(text, video).detach().numpy()


def test_clips_are_ranked_by_the_similarity_of_the_method(method, clips, options):
    expected = retrieval_metrics(similarity(method, clips, options.data), [0, 1, 1, 1, 2, 3, 3])
    assert evaluate(method, clips, options)["raw"] == expected


def test_reranked_metrics_are_added_to_the_raw_ones(method, clips, options):
    found = evaluate(method, clips, options)
    assert list(found) == ["raw", "dual softmax", "QB-Norm"]
    assert list(found["dual softmax"]) == ["t2v", "v2t"]
    assert list(found["QB-Norm"]) == ["t2v"]
    assert evaluate(method, clips, replace(options, rerank=False)) == {"raw": found["raw"]}


def test_sets_too_large_for_a_matrix_have_equal_ranks_and_log_it(method, clips, options, monkeypatch, caplog):
    expected = evaluate(method, clips, options)
    monkeypatch.setattr(module, "LARGEST_MATRIX", 1)
    with caplog.at_level(logging.WARNING):
        found = evaluate(method, clips, options)
    assert found == {name: expected[name] for name in ("raw", "dual softmax")}
    assert "7 x 4 scores: ranked without QB-Norm, which needs them all" in caplog.text


def test_large_sets_without_pooled_scores_are_ranked_in_tiles(method, clips, options, monkeypatch, caplog):
    expected = evaluate(method, clips, options)["raw"]
    monkeypatch.setattr(module, "LARGEST_MATRIX", 1)
    monkeypatch.setattr(CLIP, "scores_pooled", False)
    with caplog.at_level(logging.WARNING):
        assert evaluate(method, clips, options) == {"raw": expected}
    assert "7 x 4 scores: ranked in tiles, without re-ranking" in caplog.text


@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_have_the_metrics_of_one(method, clips, options, processes):
    shares, barrier = [None] * processes, Barrier(processes)

    def run(rank):
        def gather(share):
            shares[rank] = share
            barrier.wait(timeout=60)
            collected = list(shares)
            barrier.wait(timeout=60)
            return collected

        setting = replace(options, rank=rank, world_size=processes, gather=gather)
        return evaluate(copy.deepcopy(method), clips, setting)

    with ThreadPoolExecutor(processes) as pool:
        found = list(pool.map(run, range(processes)))
    assert found == [evaluate(method, clips, options)] * processes


def test_the_training_captions_of_a_manifest_are_the_bank_of_qb_norm(method, clips, options, tmp_path):
    train = replace(clips[0], id="t", captions=tuple(options.bank), split="train")
    write_manifest(tmp_path / "m.jsonl", [*clips, train])
    data = options.data.model_copy(update={"manifest": tmp_path / "m.jsonl"})
    assert [clip.id for clip in evaluation_clips(data, "test")] == [clip.id for clip in clips]
    assert training_captions(data, "test") == list(options.bank)
    assert training_captions(data, "train") == []


@pytest.fixture
def reranked(monkeypatch):
    """Return the matrices that `dual_softmax` and `qb_norm` get."""
    matrices = {}
    dual_softmax, qb_norm = module.dual_softmax, module.qb_norm

    def record_dual_softmax(matrix):
        matrices["logits"] = matrix
        return dual_softmax(matrix)

    def record_qb_norm(cosines, bank):
        matrices["cosines"], matrices["bank"] = cosines, bank
        return qb_norm(cosines, bank)

    monkeypatch.setattr(module, "dual_softmax", record_dual_softmax)
    monkeypatch.setattr(module, "qb_norm", record_qb_norm)
    return matrices


def cosines_of(method, captions, clips, data):
    ids, mask = next(text_batches(captions, data.context_length, 100))
    batch = next(video_batches(clips, data, method.architecture.image_size, 100))
    text = method.encode_text(ids, mask).pooled
    video = method.encode_video(batch.frames, batch.frame_mask).pooled
    return torch.nn.functional.cosine_similarity(text[:, None], video[None], dim=-1).detach().numpy()


def test_each_direction_is_ranked_by_its_own_dual_softmax(method, clips, options, monkeypatch):
    """By a text's scores over videos the first text finds its video, by a video's over texts none does."""
    by_text, by_video = np.eye(len(clips)), -np.eye(len(clips))
    monkeypatch.setattr(module, "dual_softmax", lambda _: (by_text, by_video))
    single = [replace(clip, captions=clip.captions[:1]) for clip in clips]
    found = evaluate(method, single, options)["dual softmax"]
    assert (found["t2v"]["R@1"], found["v2t"]["R@1"]) == (100.0, 0.0)


def test_qb_norm_compares_cosines_and_dual_softmax_logits(method, clips, options, reranked):
    evaluate(method, clips, options)
    captions = [caption for clip in clips for caption in clip.captions]
    expected = cosines_of(method, captions, clips, options.data)
    np.testing.assert_allclose(reranked["cosines"], expected, atol=1e-5)
    np.testing.assert_allclose(
        reranked["logits"], expected * method.logit_scale().item(), atol=1e-4 * method.logit_scale().item()
    )
    bank = cosines_of(method, list(options.bank), clips, options.data)
    np.testing.assert_allclose(reranked["bank"], bank, atol=1e-5)


@pytest.mark.parametrize(("largest", "kept"), [(7, 1), (6, 2), (4, 2), (3, 3), (2, 4)])
def test_a_large_bank_is_drawn_evenly_from_all_captions(
    method, clips, options, reranked, monkeypatch, largest, kept
):
    captions = ["red", "a green dot", "night", "a grey box", "it rains", "two men talk", "snow"]
    monkeypatch.setattr(module, "BANK", largest)
    evaluate(method, clips, replace(options, bank=captions))
    expected = cosines_of(method, captions[::kept], clips, options.data)
    np.testing.assert_allclose(reranked["bank"], expected, atol=1e-5)


@pytest.mark.parametrize("split", ["test", "val"])
def test_the_bank_has_the_training_captions_alone_whichever_split_is_measured(
    method, clips, options, tmp_path, reranked, split
):
    train = [replace(clips[i], id=f"t{i}", split="train", captions=(f"number {i}", "it")) for i in range(2)]
    val = replace(clips[2], id="v", captions=("a caption to select by",), split="val")
    write_manifest(tmp_path / "m.jsonl", [val, train[0], *clips, train[1]])
    data = options.data.model_copy(update={"manifest": tmp_path / "m.jsonl"})
    chosen = replace(options, data=data, bank=training_captions(data, split))
    evaluate(method, evaluation_clips(data, split), chosen)
    measured = clips if split == "test" else [val]
    bank = cosines_of(method, ["number 0", "it", "number 1", "it"], measured, options.data)
    np.testing.assert_allclose(reranked["bank"], bank, atol=1e-5)


def test_large_sets_are_reranked_by_the_method_s_logits(method, clips, options, monkeypatch):
    scales, pooled_ranks = [], module.pooled_ranks

    def record(text, video, groups, dual_softmax_scale=None):
        scales.append(dual_softmax_scale)
        return pooled_ranks(text, video, groups, dual_softmax_scale=dual_softmax_scale)

    monkeypatch.setattr(module, "LARGEST_MATRIX", 1)
    monkeypatch.setattr(module, "pooled_ranks", record)
    evaluate(method, clips, options)
    assert scales == [None, method.logit_scale().item()]


def test_a_split_without_clips_is_an_error(clips, options, tmp_path):
    write_manifest(tmp_path / "m.jsonl", clips)
    with pytest.raises(ValueError, match=r"m\.jsonl.*'dev'"):
        evaluation_clips(options.data.model_copy(update={"manifest": tmp_path / "m.jsonl"}), "dev")


def test_an_undecodable_clip_is_an_error_that_names_it(method, clips, options):
    clips[2].video.write_bytes(b"no video")
    with pytest.raises(DecodeError, match=r"2\.mp4"):
        evaluate(method, clips, options)


def test_a_caption_longer_than_the_context_is_an_error_unless_it_may_be_cut(method, clips, options):
    clips[1] = replace(clips[1], captions=("word " * 40,))
    with pytest.raises(ValueError, match="found 1 longer captions, the first of clip 'c1' with 42"):
        evaluate(method, clips, options)
    cut = replace(options, data=options.data.model_copy(update={"long_captions": "truncate"}))
    assert "raw" in evaluate(method, clips, cut)


def test_no_clips_is_an_error(method, options):
    with pytest.raises(ValueError, match="at least one clip, found none"):
        evaluate(method, [], options)


def test_a_matrix_file_with_groups_has_the_metrics_of_its_matrix(tmp_path):
    matrix, groups = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32), [0, 0, 1, 2, 2, 2]
    np.save(tmp_path / "s.npy", matrix)
    (tmp_path / "g.json").write_text(json.dumps(groups))
    assert evaluate_matrix(tmp_path / "s.npy", tmp_path / "g.json") == retrieval_metrics(matrix, groups)


@pytest.mark.parametrize(
    ("matrix", "groups", "message"),
    [
        (b"not numpy", "[0]", r"s\.npy: expected a matrix of similarities"),
        (b"", "[0]", r"s\.npy: expected a matrix.*an empty file"),
        (np.array([[None]]), "[0]", r"s\.npy: expected a matrix.*pickled objects"),
        (np.full((2, 2), np.nan), "[0, 1]", r"s\.npy: similarity: expected finite scores, found 4"),
        (np.zeros((2, 2)), "[0, 1", r"g\.json: expected a JSON list of integers"),
        (np.zeros((2, 2)), "[0, 1.5]", r"g\.json: expected a JSON list of integers"),
        (np.zeros((2, 2)), "[0, 5]", r"s\.npy: groups: expected 0\.\.1, found 5 for text 1"),
    ],
)
def test_bad_matrix_files_are_named(tmp_path, matrix, groups, message):
    path = tmp_path / "s.npy"
    if isinstance(matrix, bytes):
        path.write_bytes(matrix)
    else:
        np.save(path, matrix, allow_pickle=True)
    (tmp_path / "g.json").write_text(groups)
    with pytest.raises(ValueError, match=message):
        evaluate_matrix(path, tmp_path / "g.json")


def test_the_table_has_both_directions_of_every_row():
    eye = retrieval_metrics(np.eye(4))
    lines = results_table({"before": retrieval_metrics(1 - np.eye(4)), "after": eye}).splitlines()
    assert lines[0].split() == ["text", "to", "video", "video", "to", "text"]
    assert lines[1].split() == ["R@1", "R@5", "R@10", "MdR", "MnR"] * 2
    assert lines[2].split() == ["before", *["0.0", "100.0", "100.0", "4.0", "4.0"] * 2]
    assert lines[3].split() == ["after", *["100.0", "100.0", "100.0", "1.0", "1.0"] * 2]
    assert len(lines) == 4


def test_ties_add_one_line_to_the_table_of_many_rows():
    tied, eye = retrieval_metrics(np.ones((2, 2))), retrieval_metrics(np.eye(2))
    lines = results_table({"eye": eye, "constant": tied, "other": tied}).splitlines()
    assert lines[3].split() == ["constant", *["0.0", "100.0", "100.0", "2.0", "2.0"] * 2]
    assert lines[5:] == [
        "Ties count against the query; counted for it, R@1 would be up to 100.0 higher (constant)."
    ]


def test_a_narrow_table_has_one_direction_below_the_other():
    rows = {"zero-shot, mean pooling": retrieval_metrics(np.eye(4)), "b": retrieval_metrics(1 - np.eye(4))}
    wide, narrow = (results_table(rows, width=width).splitlines() for width in (101, 80))
    assert results_table(rows).splitlines() == wide and len(wide) == 4 and max(map(len, wide)) <= 101
    assert max(map(len, narrow)) <= 80 and len(narrow) == 9 and narrow[4] == ""
    assert [narrow[i].split() for i in (0, 5)] == [["text", "to", "video"], ["video", "to", "text"]]
    assert narrow[8].split() == ["b", "0.0", "100.0", "100.0", "4.0", "4.0"]


def test_the_sampling_error_is_that_of_a_share():
    metrics = {"t2v": {"R@1": 50.0}, "v2t": {"R@1": 10.0}}
    assert sampling_error(metrics, 100) == pytest.approx(5.0)
    assert sampling_error({"t2v": {"R@1": 0.0}}, 100) == 0


def test_the_table_has_dashes_for_a_direction_without_metrics():
    only = {"t2v": retrieval_metrics(np.eye(2))["t2v"]}
    assert results_table({"QB-Norm": only}).splitlines()[2].split()[-5:] == ["-"] * 5


@pytest.mark.parametrize("way", ["matrix", "pooled", "large pooled", "tiles"])
def test_every_way_of_ranking_hands_over_the_results_of_each_query(method, clips, options, monkeypatch, way):
    records = []
    matrix = similarity(method, clips, options.data) / method.logit_scale().item()
    if way in {"large pooled", "tiles"}:
        monkeypatch.setattr(module, "LARGEST_MATRIX", 1)
    if way == "tiles":
        monkeypatch.setattr(CLIP, "scores_pooled", False)
        matrix = matrix * method.logit_scale().item()
    found = evaluate(
        method, clips, replace(options, rerank=way in {"matrix", "large pooled"}, on_record=records.append)
    )
    (record,) = records
    assert list(record.ranks) == list(found)
    for setting, directions in record.ranks.items():
        for direction, ranks in directions.items():
            assert found[setting][direction]["MnR"] == ranks.mean()
    np.testing.assert_array_equal(record.top, np.argsort(-matrix, axis=1)[:, :5])
    np.testing.assert_allclose(record.top_scores, -np.sort(-matrix, axis=1)[:, :5], rtol=1e-4)
    np.testing.assert_allclose(record.positive, matrix[np.arange(7), record.groups], rtol=1e-4)
    assert record.captions == [caption for clip in clips for caption in clip.captions]
    assert [clip.id for clip in record.clips] == ["c0", "c1", "c2", "c3"]


def test_features_of_frames_that_are_kept_give_the_same_metrics_without_reading_clips(method, clips, options):
    features = []
    first = evaluate(method, clips, options, features=features)
    assert first == evaluate(method, clips, options)
    for clip in clips:
        clip.video.unlink()
    assert evaluate(method, clips, options, features=features) == first
