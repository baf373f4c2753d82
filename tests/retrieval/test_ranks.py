from functools import partial

import numpy as np
import pytest
import torch

from discovla.ops.rank_of_positive import rank_of_positive
from discovla.retrieval.ranks import (
    Ranks,
    Tiles,
    streamed_ranks,
    text_to_video_ranks,
    video_to_text_ranks,
)
from discovla.retrieval.similarity import pooled_ranks


def tile_of(matrix):
    return lambda texts, videos: matrix[texts, videos]


def rank_by_definition(row, right):
    """Ties against and optimistic rank of item `right` among the scores of one query."""
    others = np.delete(row, right)
    return 1 + (others >= row[right]).sum(), 1 + (others > row[right]).sum()


def ranks_by_definition(matrix, groups):
    """Both directions, one query at a time."""
    best = np.stack([matrix[groups == g].max(0) for g in range(matrix.shape[1])])  # g v
    to_video = [rank_by_definition(row, g) for row, g in zip(matrix, groups, strict=True)]
    to_text = [rank_by_definition(column, v) for v, column in enumerate(best.T)]
    return np.array(to_video).T, np.array(to_text).T


def matrix_ranks(text, video, groups):
    matrix = (text @ video.T).numpy()
    return text_to_video_ranks(matrix, groups), video_to_text_ranks(matrix, groups)


def tile_ranks(block, text, video, groups):
    matrix = (text @ video.T).numpy()
    return streamed_ranks(tile_of(matrix), *matrix.shape, groups, block=block)


def op_ranks(impl, text, video, groups):
    right, every = torch.from_numpy(groups), torch.arange(len(video))
    to_video = rank_of_positive(text, video, right, impl=impl)
    to_text = rank_of_positive(video, text, every, groups=right, impl=impl)
    return tuple(Ranks(ties_against=x[0].numpy(), optimistic=x[1].numpy()) for x in (to_video, to_text))


IMPLEMENTATIONS = {
    "matrix": matrix_ranks,
    **{f"tiles of {block}": partial(tile_ranks, block) for block in (1, 3, 100)},
    **{f"op, {impl}": partial(op_ranks, impl) for impl in ("reference", "torch")},
    "pooled features": pooled_ranks,
}


@pytest.mark.parametrize("captions", [[1] * 9, [1, 4, 2, 12, 1, 3, 1, 5, 2]], ids=["pairs", "groups"])
@pytest.mark.parametrize("ranks", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
def test_every_implementation_ranks_ties_by_the_rule(ranks, captions):
    generator = np.random.default_rng(0)
    groups = generator.permutation(np.repeat(np.arange(9), captions))
    # rows of ±1 of one length: cosines are exact, and many tie
    text, video = (torch.from_numpy(generator.choice([-1.0, 1.0], (n, 16))) for n in (len(groups), 9))
    for ours, expected in zip(
        ranks(text, video, groups), ranks_by_definition((text @ video.T).numpy(), groups), strict=True
    ):
        np.testing.assert_array_equal(ours.ties_against, expected[0])
        np.testing.assert_array_equal(ours.optimistic, expected[1])


def assert_same_ranks(matrix, groups, block):
    streamed = streamed_ranks(tile_of(matrix), len(matrix), len(matrix.T), groups, block=block)
    expected = text_to_video_ranks(matrix, groups), video_to_text_ranks(matrix, groups)
    for ours, theirs in zip(streamed, expected, strict=True):
        np.testing.assert_array_equal(ours.ties_against, theirs.ties_against)
        np.testing.assert_array_equal(ours.optimistic, theirs.optimistic)


@pytest.mark.parametrize("block", [1, 2, 7, 100])
@pytest.mark.parametrize("size", [1, 7, 20])
def test_streamed_ranks_equal_those_of_the_matrix(size, block):
    matrix = np.random.default_rng(size).integers(0, 5, (size, size)).astype(np.float32)  # many ties
    assert_same_ranks(matrix, None, block)


@pytest.mark.parametrize("block", [1, 3, 8, 100])
def test_streamed_ranks_equal_those_of_the_matrix_with_scattered_groups(block):
    generator = np.random.default_rng(0)
    groups = generator.permutation(np.repeat(np.arange(9), [1, 4, 2, 12, 1, 3, 1, 5, 2]))
    matrix = generator.normal(size=(len(groups), 9)).round(1)
    assert_same_ranks(matrix, groups, block)


@pytest.mark.parametrize("block", [1, 3, 100])
def test_tiles_cover_every_text_and_every_video_once(block):
    groups = np.array([2, 0, 1, 2, 2, 0])
    tiles = Tiles(groups=groups, videos=3, block=block)
    rows = list(tiles.rows())
    assert sorted(np.concatenate([texts for texts, _ in rows])) == list(range(6))
    assert np.concatenate([np.arange(3)[own] for _, own in rows]).tolist() == [0, 1, 2]
    for texts, own in rows:
        assert set(groups[texts]) == set(range(3)[own])
        assert len(texts) <= block or own.stop - own.start == 1


def test_a_score_that_is_not_finite_is_named_by_its_position_in_the_matrix():
    matrix = np.zeros((6, 6), np.float32)
    matrix[5, 4] = np.nan
    with pytest.raises(ValueError, match="found 1 that are not, the first nan at text 5, video 4"):
        streamed_ranks(tile_of(matrix), 6, 6, block=4)
