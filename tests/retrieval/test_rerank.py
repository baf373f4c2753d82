import numpy as np
import pytest

from discovla.retrieval.ranks import text_to_video_ranks
from discovla.retrieval.rerank import dual_softmax, qb_norm


def test_dual_softmax_equals_its_formula():
    scores = np.array([[2.0, 1.0], [3.0, 0.5]])
    by_text, by_video = dual_softmax(scores)
    assert by_text[0, 0] == pytest.approx(2 * np.exp(2) / (np.exp(2) + np.exp(3)))
    assert by_video[0, 0] == pytest.approx(2 * np.exp(2) / (np.exp(2) + np.exp(1)))


def test_dual_softmax_ranks_a_hub_lower_for_the_texts_of_other_videos():
    scores = np.array([[8.0, 7.5], [9.0, 4.0]])  # video 0 is a hub
    assert text_to_video_ranks(scores, [1, 0]).ties_against.tolist() == [2, 1]
    assert text_to_video_ranks(dual_softmax(scores)[0], [1, 0]).ties_against.tolist() == [1, 1]


def test_dual_softmax_keeps_the_order_of_negative_scores():
    scores = -np.array([[1.0, 9.0], [9.0, 1.0]])
    assert text_to_video_ranks(dual_softmax(scores)[0]).ties_against.tolist() == [1, 1]


def test_qb_norm_equals_its_formula_if_the_best_video_is_active():
    scores, bank = np.array([[0.5, 0.4]]), np.array([[0.6, 0.1], [0.7, 0.2]])
    expected = 20 * scores - np.log(np.exp(20 * bank).sum(axis=0))
    np.testing.assert_allclose(qb_norm(scores, bank), expected, rtol=1e-12)


def test_qb_norm_keeps_scores_of_texts_whose_best_video_is_not_active():
    scores, bank = np.array([[0.1, 0.8]]), np.array([[0.6, 0.1]])
    np.testing.assert_array_equal(qb_norm(scores, bank), 20 * scores)


def test_qb_norm_does_not_overflow_on_logits():
    scores = 100 * np.random.default_rng(0).uniform(size=(5, 5))
    assert np.isfinite(qb_norm(scores, scores)).all()


@pytest.mark.parametrize(
    ("bank", "k", "message"),
    [
        (np.zeros((3, 4)), 1, r"texts x 2 videos, found shape \(3, 4\)"),
        (np.zeros((0, 2)), 1, r"found shape \(0, 2\)"),
        (np.zeros((3, 2)), 3, r"k: expected 1\.\.2, found 3"),
        (np.full((3, 2), np.nan), 1, "found 6 that are not"),
    ],
)
def test_qb_norm_refuses_a_bank_that_does_not_fit(bank, k, message):
    with pytest.raises(ValueError, match=message):
        qb_norm(np.zeros((2, 2)), bank, k=k)
