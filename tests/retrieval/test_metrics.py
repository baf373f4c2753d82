import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from discovla.retrieval.metrics import retrieval_metrics
from discovla.retrieval.ranks import text_to_video_ranks, video_to_text_ranks


def test_ranks_of_a_matrix_worked_by_hand():
    scores = np.array([[0.9, 0.1, 0.5], [0.8, 0.2, 0.3], [0.7, 0.6, 0.4]])
    assert text_to_video_ranks(scores).ties_against.tolist() == [1, 3, 3]
    assert video_to_text_ranks(scores).ties_against.tolist() == [1, 2, 2]


def test_metrics_of_ranks_worked_by_hand():
    scores = np.zeros((12, 12))
    for text, rank in enumerate([1, 1, 1, 2, 3, 5, 6, 8, 10, 11, 12, 12]):
        better = [video for video in range(12) if video != text][: rank - 1]
        scores[text, better] = 2.0
        scores[text, text] = 1.0
    found = retrieval_metrics(scores)["t2v"]
    assert found["R@1"] == 25.0
    assert found["R@5"] == 50.0
    assert found["R@10"] == 75.0
    assert found["R@50"] == 100.0
    assert found["MdR"] == 5.5
    assert found["MnR"] == 72 / 12


def test_a_tie_counts_against_the_query():
    scores = np.array([[3, 3, 1], [0, 2, 2], [5, 5, 5]])
    ranks = text_to_video_ranks(scores)
    assert ranks.ties_against.tolist() == [2, 2, 3]
    assert ranks.optimistic.tolist() == [1, 1, 1]


def test_a_constant_matrix_ranks_every_query_last_and_optimistically_first():
    found = retrieval_metrics(np.ones((4, 4)))
    for direction in ("t2v", "v2t"):
        assert found[direction]["MnR"] == 4
        assert found[direction]["optimistic"]["MnR"] == 1
        assert found[direction]["optimistic"]["R@1"] == 100


def test_a_video_is_represented_by_its_best_caption():
    scores = np.array([[0.1, 0.7], [0.6, 0.9], [0.5, 0.8]])  # texts 0 and 2 are of video 1, text 1 of video 0
    groups = [1, 0, 1]
    assert text_to_video_ranks(scores, groups).ties_against.tolist() == [1, 2, 1]
    # U: video 0 sees (0.6, 0.5), video 1 sees (0.9, 0.8)
    assert video_to_text_ranks(scores, groups).ties_against.tolist() == [1, 2]


def test_groups_of_the_diagonal_change_nothing():
    scores = np.random.default_rng(0).normal(size=(9, 9)).round(1)
    assert retrieval_metrics(scores, range(9)) == retrieval_metrics(scores)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=str)
def test_scores_that_are_not_finite_are_refused_with_their_position(bad):
    scores = np.zeros((3, 4))
    scores[1, 2] = scores[2, 0] = bad
    with pytest.raises(ValueError, match=f"found 2 that are not, the first {bad} at text 1, video 2"):
        retrieval_metrics(scores, [0, 1, 2])


@pytest.mark.parametrize(
    ("shape", "groups", "message"),
    [
        ((3, 4), None, "as many texts as videos without groups, found 3 and 4"),
        ((3,), None, r"a matrix of texts x videos, found shape \(3,\)"),
        ((0, 0), None, r"found shape \(0, 0\)"),
        ((3, 2), [0, 1], "the video of each of 3 texts"),
        ((3, 2), [0.0, 1.0, 1.0], "integers, found float64"),
        ((3, 2), [0, 1, 2], r"expected 0\.\.1, found 2 for text 2"),
        ((3, 2), [0, -1, 1], r"expected 0\.\.1, found -1 for text 1"),
        ((3, 3), [0, 2, 2], "a text for every video, found none for 1, e.g. video 1"),
    ],
)
def test_shapes_and_groups_that_do_not_fit_are_refused(shape, groups, message):
    with pytest.raises(ValueError, match=message):
        retrieval_metrics(np.zeros(shape), groups)


def test_complex_scores_are_refused():
    with pytest.raises(ValueError, match="expected real numbers, found complex128"):
        retrieval_metrics(np.zeros((2, 2), dtype=complex))


def released_list(ranks):
    """Return our two ranks as the released routine lists them: positions from first to last, from 0."""
    runs = zip(ranks.optimistic, ranks.ties_against, strict=True)
    return [position for first, last in runs for position in range(first - 1, last)]


def assert_metrics(found, released):
    """Compare with the released routine's names MedianR and MeanR."""
    names = {"R1": "R@1", "R5": "R@5", "R10": "R@10", "R50": "R@50", "MedianR": "MdR", "MeanR": "MnR"}
    for theirs, ours in names.items():
        assert theirs not in released or found[ours] == pytest.approx(released[theirs], abs=1e-10)


def test_golden_discovla_rank_lists_and_metrics(golden):
    scores = load_file(golden / "discovla/metrics.safetensors")
    expected = json.loads((golden / "discovla/metrics.json").read_text())["expected"]
    assert expected.keys() == scores.keys()
    for name, case in expected.items():
        found = retrieval_metrics(scores[name])
        ranks = {"t2v": text_to_video_ranks(scores[name]), "v2t": video_to_text_ranks(scores[name])}
        for way, released in ((way, case[way]) for way in ranks):
            assert released_list(ranks[way]) == released["cols"], (name, way)
            assert np.mean(ranks[way].ties_against) == found[way]["MnR"]
            if released["num_ranks"] == case["n"]:  # no ties
                assert_metrics(found[way], released)
                assert_metrics(found[way]["optimistic"], released)


@pytest.mark.parametrize("case", ["square", "square_ties", "multi", "multi_ties"])
def test_golden_clip2video_ranks(golden, case):
    scores = load_file(golden / "clip2video/metrics.safetensors")
    expected = json.loads((golden / "clip2video/metrics.json").read_text())["expected"][case]
    if case.startswith("multi"):
        similarity = scores[f"{case}.sim"]
        groups = np.repeat(np.arange(similarity.shape[1]), expected["captions_per_video"])
        names = "caption_ranks", "video_ranks"
    else:
        similarity, groups = scores[case], None
        names = "ranks_t2v", "ranks_v2t"
    found = text_to_video_ranks(similarity, groups), video_to_text_ranks(similarity, groups)
    for ranks, name in zip(found, names, strict=True):
        assert ranks.ties_against.tolist() == expected[name]["pessimistic"]
        assert ranks.optimistic.tolist() == expected[name]["optimistic"]


@pytest.mark.parametrize("case", ["square", "multi"])
def test_golden_clip2video_metrics_without_ties(golden, case):
    scores = load_file(golden / "clip2video/metrics.safetensors")
    expected = json.loads((golden / "clip2video/metrics.json").read_text())["expected"][case]
    similarity = scores[case if case in scores else f"{case}.sim"]
    texts, videos = similarity.shape
    groups = np.repeat(np.arange(videos), expected.get("captions_per_video", [1] * texts))
    found = retrieval_metrics(similarity, groups)
    assert_metrics(found["t2v"], expected["t2v"])
    assert_metrics(found["v2t"], expected["v2t"])


def test_realdata_similarity_has_the_expected_metrics(realdata):
    folder = realdata / "annotations/similarity"
    for name, expected in json.loads((folder / "expected.json").read_text()).items():
        if not name.endswith(".npy"):
            continue
        found = retrieval_metrics(np.load(folder / name))
        by_rule = {
            key.split(" (")[0]: figures for key, figures in expected.items() if isinstance(figures, dict)
        }
        assert found["t2v"] == {**by_rule["t2v"], "optimistic": by_rule["t2v"]}
        assert found["v2t"] == {**by_rule["v2t ties worst"], "optimistic": by_rule["v2t ties best"]}
