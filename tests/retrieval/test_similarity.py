import numpy as np
import pytest
import torch

from discovla.batch import Embedding
from discovla.methods.clip import CLIP, CLIPConfig
from discovla.methods.clip4clip import CLIP4Clip, CLIP4ClipConfig
from discovla.retrieval.ranks import streamed_ranks, text_to_video_ranks, video_to_text_ranks
from discovla.retrieval.rerank import dual_softmax
from discovla.retrieval.similarity import pooled_ranks, similarity_matrix, similarity_tile
from discovla.testing import tiny_architecture
from discovla.towers.weights import initialise


def tile_of(matrix):
    return lambda texts, videos: matrix[texts, videos]


def test_similarity_matrix_joins_its_tiles():
    matrix = np.random.default_rng(0).normal(size=(11, 5))
    np.testing.assert_array_equal(similarity_matrix(tile_of(matrix), 11, 5, block=3), matrix)


def test_tiles_have_the_similarity_of_the_method():
    method = CLIP(tiny_architecture(), CLIPConfig())
    text, video = Embedding(pooled=torch.randn(5, 16)), Embedding(pooled=torch.randn(4, 16))
    tile = similarity_tile(method, text, video, "cpu")
    expected = method.similarity(text, video).detach().numpy()
    np.testing.assert_allclose(similarity_matrix(tile, 5, 4, block=2), expected, rtol=1e-6, atol=1e-6)


def test_a_method_has_equal_ranks_streamed_and_from_the_matrix():
    method = CLIP(tiny_architecture(), CLIPConfig())
    text, video = Embedding(pooled=torch.randn(40, 16)), Embedding(pooled=torch.randn(20, 16))
    groups = torch.arange(40) % 20
    tile = similarity_tile(method, text, video, "cpu")
    streamed, _ = streamed_ranks(tile, 40, 20, groups.numpy(), block=8)
    whole = text_to_video_ranks(similarity_matrix(tile, 40, 20), groups.numpy())
    np.testing.assert_array_equal(streamed.ties_against, whole.ties_against)


def assert_ranks_of(found, by_text, by_video, groups):
    wanted = text_to_video_ranks(by_text, groups), video_to_text_ranks(by_video, groups)
    for ours, expected in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(ours.ties_against, expected.ties_against)
        np.testing.assert_array_equal(ours.optimistic, expected.optimistic)


def test_pooled_features_are_reranked_like_their_matrix():
    groups = np.array([3, 0, 1, 2, 2, 4, 0, 2, 5, 3, 2])
    text, video = (torch.randn(n, 9, dtype=torch.float64) for n in (len(groups), 6))
    cosines = torch.nn.functional.normalize(text) @ torch.nn.functional.normalize(video).T
    by_text, by_video = dual_softmax(20 * cosines.numpy())
    assert_ranks_of(pooled_ranks(text, video, groups, dual_softmax_scale=20), by_text, by_video, groups)


def test_a_method_with_pooled_scores_has_equal_ranks_with_and_without_its_matrix():
    method = CLIP(tiny_architecture(), CLIPConfig())
    text, video = Embedding(pooled=torch.randn(60, 16)), Embedding(pooled=torch.randn(20, 16))
    groups = (torch.arange(60) % 20).numpy()
    matrix = similarity_matrix(similarity_tile(method, text, video, "cpu"), 60, 20)
    assert method.scores_pooled
    assert_ranks_of(pooled_ranks(text.pooled, video.pooled, groups), matrix, matrix, groups)


def test_a_pooled_feature_that_is_not_finite_is_named():
    text = torch.randn(3, 4)
    text[1, 2] = torch.nan
    with pytest.raises(ValueError, match="expected finite rows that are not 0, found row 1"):
        pooled_ranks(text, torch.randn(3, 4))


def test_a_method_in_training_is_scored_without_its_dropout():
    config = CLIP4ClipConfig(head="tightTransf", head_layers=1)
    method = CLIP4Clip(tiny_architecture(), config)
    initialise(method, method.architecture, seed=0)
    width = method.architecture.embed_dim
    text = Embedding(pooled=torch.randn(3, width))
    video = Embedding(
        pooled=torch.randn(4, width), tokens=torch.randn(4, 2, width), mask=torch.ones(4, 2) > 0
    )
    with torch.no_grad():
        expected = method.eval().similarity(text, video).numpy()
    tile = similarity_tile(method.train(), text, video, "cpu")
    np.testing.assert_array_equal(tile(np.arange(3), slice(0, 4)), expected)
    assert method.training
