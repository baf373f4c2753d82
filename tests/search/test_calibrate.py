"""Probabilities of hits follow from the best scores of captions whose answer is not in the index."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest

import discovla
from discovla.search.calibrate import Calibration, note, random_captions, recall_of, standardised
from discovla.search.index import Index
from discovla.search.reliability import measure_reliability, reliability_bins
from discovla.search.sources import SourceVideo


def test_a_gumbel_distribution_is_recovered():
    draws = np.random.default_rng(0).gumbel(2.0, 0.3, 20_000)
    fitted = Calibration.fit(draws, 100, 0.5)
    assert (fitted.location, fitted.scale) == (pytest.approx(2.0, abs=0.02), pytest.approx(0.3, abs=0.01))


def test_probability_is_that_of_bayes_with_the_bound_on_the_odds():
    calibration = Calibration(location=0.0, scale=1.0, count=256, moments=100, recall=1.0)
    z = -math.log(-math.log(1 - 0.01))  # where one of a hundred other captions reaches
    assert calibration.probability(z) == pytest.approx(1 / (1 - math.e * 0.01 * math.log(0.01)))
    rarely_first = Calibration(location=0.0, scale=1.0, count=256, moments=100, recall=0.4)
    odds = calibration.probability(z) / (1 - calibration.probability(z))
    assert rarely_first.probability(z) == pytest.approx(odds * 0.25 / (1 + odds * 0.25))


@pytest.mark.parametrize("recall", [0.1, 0.5, 1.0])
def test_probability_rises_with_the_score_from_0_to_1(recall):
    calibration = Calibration(location=2.0, scale=0.3, count=256, moments=100, recall=recall)
    values = [calibration.probability(z) for z in np.linspace(-20, 80, 4001)]
    assert values == sorted(values)
    assert values[0] == pytest.approx(0, abs=1e-9) and values[-1] == 1
    steps = np.diff([calibration.probability(z) for z in np.linspace(1, 5, 4001)])
    assert steps.max() < 0.01  # no jump between the two formulas


def test_scores_are_measured_in_standard_deviations():
    assert standardised(np.array([3.0]), np.array([1.0, -1.0])) == pytest.approx([3])


def test_a_note_says_that_probably_nothing_was_found():
    assert "probably nothing found" in note(0.2, 3)
    assert note(0.6, 3) == note(None, 3) == ""
    assert "nothing to search" in note(None, 0)


def test_captions_of_the_drawn_world_calibrate_its_clip(model):
    captions = random_captions(model)
    assert len(captions) == 256 and len(set(captions)) > 200
    assert recall_of(model) == 0.5


def test_a_small_index_has_no_probability_and_a_larger_one_has(read_only, folder, model, tmp_path):
    assert read_only.search("a red circle").probability_best is None
    rows = [(folder / "below/long.mp4", 0.8 * i, 0.8 * i + 0.8) for i in range(24)]
    with Index.create(tmp_path / "index", model) as index:
        index.add(rows)
        result = index.search("a red circle moves to the left")
        assert index.status().calibrated == 256
        assert 0 <= result.probability_best <= 1
        before = result.probability_best
        sources = [SourceVideo(video=str(path), start=start, end=end, clip=True) for path, start, end in rows]
        first = [index.search(f"red {number}", 1, merge=False).hits[0] for number in range(24)]
        bins = measure_reliability(index, [(f"red {number}", one) for number, one in enumerate(sources)])
        assert sum(one.queries for one in bins) == 48
        right = sum(hit.start == one.start for hit, one in zip(first, sources, strict=True))
        assert sum(one.queries * one.right for one in bins) == pytest.approx(right)
        index.calibrate(
            [f"a {c} {s}" for c in ("red", "blue", "green") for s in map(str, range(9))], recall=0.1
        )
        assert index.status().calibrated == 27
        assert index.search("a red circle moves to the left").probability_best != before
        corrected = index.search("a red circle", correction="qb-norm", merge=False)
        assert corrected.probability_best is None and len(corrected.hits) == 10
    with Index.open(tmp_path / "index", model=discovla.load("clip:drawn")) as index:
        assert index.status().calibrated == 27


def test_reliability_is_the_share_of_right_hits_by_their_probability():
    bins = reliability_bins(np.array([0.0, 0.05, 0.3, 1.0]), np.array([False, True, True, True]))
    spans = [(one.low, one.high, one.queries, one.probability, one.right) for one in bins]
    assert spans == [(0.0, 0.1, 2, 0.025, 0.5), (0.3, 0.5, 1, 0.3, 1.0), (0.9, 1.0, 1, 1.0, 1.0)]


def test_recall_is_that_of_the_test_of_the_run(tmp_path):
    rows = {
        "zero-shot, mean pooling": {"t2v": {"R@1": 20.0}},
        "basis, step 9": {"t2v": {"R@1": 36.0}},
        "basis, step 9 + dual softmax": {"t2v": {"R@1": 43.0}},
    }
    (tmp_path / "results.json").write_text(json.dumps(rows))
    (tmp_path / "checkpoints/step-9").mkdir(parents=True)
    for source in (tmp_path, tmp_path / "checkpoints/step-9"):
        assert recall_of(SimpleNamespace(source=str(source), run=object())) == 0.36
