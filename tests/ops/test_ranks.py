import numpy as np
import pytest
import torch
from torch import Tensor

from discovla.ops.dispatch import KernelUnavailable
from discovla.ops.rank_of_positive import rank_of_positive
from discovla.ops.top_k import top_k, top_of_scores
from discovla.retrieval.ranks import text_to_video_ranks, video_to_text_ranks
from discovla.retrieval.rerank import dual_softmax
from tests.ops.kernels import DEVICE, runnable, skip_what_no_gpu_kernel_takes

SIZES = [1, 7, 63, 130]
RANKS = runnable("rank_of_positive")


def signs(rows: int, seed: int) -> Tensor:
    """Rows of ±1 in 16 dimensions: of length 4, so cosines are exact and many tie."""
    generator = torch.Generator().manual_seed(seed + rows)
    return torch.randint(0, 2, (rows, 16), generator=generator).double() * 2 - 1


def ranks(impl: str, query: Tensor, items: Tensor, right: Tensor, **options) -> tuple[Tensor, Tensor]:
    """On the device that has the impl."""
    skip_what_no_gpu_kernel_takes(impl, query.dtype)
    where = DEVICE if impl in ("triton", "cuda") else "cpu"
    given = {name: x.to(where) if isinstance(x, Tensor) else x for name, x in options.items()}
    actual = rank_of_positive(query.to(where), items.to(where), right.to(where), **given, impl=impl)
    return actual[0].cpu(), actual[1].cpu()


def assert_ranks(actual: tuple[Tensor, Tensor], expected) -> None:
    np.testing.assert_array_equal(actual[0].numpy(), expected.ties_against)
    np.testing.assert_array_equal(actual[1].numpy(), expected.optimistic)


@pytest.mark.parametrize("impl", RANKS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("n", SIZES)
def test_ranks_of_texts_are_those_of_the_matrix(n, dtype, impl):
    text, video = signs(n, 0), signs(n, 1)
    actual = ranks(impl, text.to(dtype), video.to(dtype), torch.arange(n))
    assert_ranks(actual, text_to_video_ranks((text @ video.T).numpy()))


@pytest.mark.parametrize("impl", RANKS)
def test_texts_of_one_video_share_their_positive_item(impl):
    groups = torch.arange(40) % 13
    text, video = signs(40, 0), signs(13, 1)
    actual = ranks(impl, text.float(), video.float(), groups)
    assert_ranks(actual, text_to_video_ranks((text @ video.T).numpy(), groups.numpy()))


@pytest.mark.parametrize("impl", RANKS)
def test_a_video_ranks_groups_of_captions_by_their_best(impl):
    groups = torch.arange(40).roll(3) % 13
    text, video = signs(40, 0), signs(13, 1)
    dtype = torch.float32 if impl == "cuda" else torch.float64
    actual = ranks(impl, video.to(dtype), text.to(dtype), torch.arange(13), groups=groups)
    assert_ranks(actual, video_to_text_ranks((text @ video.T).numpy(), groups.numpy()))


@pytest.mark.parametrize("impl", RANKS)
def test_dual_softmax_ranks_of_groups_are_those_of_the_matrix(impl):
    generator = torch.Generator().manual_seed(3)
    groups = torch.tensor([3, 0, 1, 2, 2, 4, 0, 2, 5, 3, 2])  # of one caption to four
    sides = [torch.randn(n, 9, generator=generator, dtype=torch.float64) for n in (len(groups), 6)]
    text, video = (torch.nn.functional.normalize(x) for x in sides)
    _, to_text = dual_softmax((20 * text @ video.T).numpy())
    dtype = torch.float32 if impl == "cuda" else torch.float64
    actual = ranks(
        impl, video.to(dtype), text.to(dtype), torch.arange(6), groups=groups, dual_softmax_scale=20
    )
    assert_ranks(actual, video_to_text_ranks(to_text, groups.numpy()))


@pytest.mark.parametrize("impl", RANKS)
@pytest.mark.parametrize("n", SIZES)
def test_dual_softmax_ranks_are_those_of_the_matrix(n, impl):
    generator = torch.Generator().manual_seed(n)
    text, video = (
        torch.nn.functional.normalize(torch.randn(n, 9, generator=generator).double()) for _ in "tv"
    )
    to_video, to_text = dual_softmax((20 * text @ video.T).numpy())
    every = torch.arange(n)
    assert_ranks(ranks(impl, text, video, every, dual_softmax_scale=20), text_to_video_ranks(to_video))
    assert_ranks(ranks(impl, video, text, every, dual_softmax_scale=20), video_to_text_ranks(to_text))


def test_chunks_of_queries_rank_as_all_at_once(monkeypatch):
    groups = torch.arange(40) % 13
    text, video = signs(40, 0), signs(13, 1)
    arguments = (video, text, torch.arange(13))
    whole = rank_of_positive(*arguments, groups=groups, dual_softmax_scale=5)
    monkeypatch.setattr("discovla.ops.streamed.scores.ELEMENTS", 100)
    cut = rank_of_positive(*arguments, groups=groups, dual_softmax_scale=5)
    for a, b in zip(cut, whole, strict=True):
        torch.testing.assert_close(a, b)


def test_one_score_for_every_pair_is_last_and_optimistically_first():
    same = torch.ones(5, 3)
    against, optimistic = rank_of_positive(same, same, torch.arange(5))
    assert against.tolist() == [5] * 5
    assert optimistic.tolist() == [1] * 5


def test_a_group_too_large_for_a_tile_is_refused_by_the_kernel():
    with pytest.raises(KernelUnavailable, match="expected at most 128 items of a group, found 129"):
        one = torch.zeros(129, dtype=torch.long)
        rank_of_positive(signs(3, 0), signs(129, 1), one[:3], groups=one, impl="triton")


def test_a_positive_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"positive: expected 3 indices in 0\.\.2"):
        rank_of_positive(signs(3, 0), signs(3, 1), torch.tensor([0, 1, 3]))


@pytest.mark.parametrize("impl", runnable("top_k"))
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("grouped", [False, True], ids=["items", "groups"])
def test_the_best_items_come_in_order_and_of_equal_ones_the_lowest_index_first(n, grouped, impl, monkeypatch):
    monkeypatch.setattr("discovla.ops.streamed.scores.ELEMENTS", 1000)
    query, items = signs(n, 0), signs(130, 1)
    groups = torch.arange(130) % 50 if grouped else None
    scores = (query @ items.T / 16).numpy()
    if grouped:
        scores = np.stack([scores[:, groups == g].max(1) for g in range(50)], axis=1)
    want = np.argsort(-scores, axis=1, kind="stable")[:, :20]
    where, dtype = (DEVICE, torch.float32) if impl == "cuda" else ("cpu", torch.float64)
    groups = None if groups is None else groups.to(where)
    values, indices = top_k(query.to(where, dtype), items.to(where, dtype), 20, groups=groups, impl=impl)
    np.testing.assert_array_equal(indices.cpu().numpy(), want)
    np.testing.assert_array_equal(
        values.cpu().numpy(), np.take_along_axis(scores, want, axis=1).astype(np.float32)
    )


@pytest.mark.parametrize("name", ["query", "items"])
@pytest.mark.parametrize(
    "call", [lambda q, i: top_k(q, i, 1), lambda q, i: rank_of_positive(q, i, torch.arange(3))]
)
def test_a_zero_row_is_refused_by_its_number(call, name, monkeypatch):
    monkeypatch.setattr("discovla.ops.streamed.scores.ROWS", 2)
    rows = {"query": signs(3, 1), "items": signs(3, 0)}
    rows[name][2] = 0
    with pytest.raises(ValueError, match=f"{name}: expected finite rows that are not 0, found row 2"):
        call(rows["query"], rows["items"])


def test_more_items_than_there_are_is_refused():
    with pytest.raises(ValueError, match=r"k: expected 1\.\.3, found 4"):
        top_k(signs(2, 0), signs(3, 1), 4)


@pytest.mark.parametrize(
    ("k", "count", "lowest"),
    [(1, 12, -2), (3, 12, -2), (7, 12, -2), (12, 12, -2), (7, 300, -2), (7, 300, -4)],
)
def test_equal_scores_are_selected_in_order_of_their_index(k, count, lowest):
    generator = torch.Generator().manual_seed(k)
    # many ties, also at the border; of 300 the best are all positive, or all 0
    scores = torch.randint(lowest, lowest + 5, (50, count), generator=generator).float()
    scores[:, 5] = -torch.inf
    values, indices = top_of_scores(scores, k)
    expected = scores.sort(dim=1, descending=True, stable=True)
    assert torch.equal(values, expected.values[:, :k])
    assert torch.equal(indices, expected.indices[:, :k])
