"""The kernels of csrc/ against the references, run by a C++ compiler's program on the CPU, barriers and all.

What that leaves to a GPU: what lanes hold of a matrix, and time.  `benchmarks/gpu.py` checks them there.
"""

import ctypes
import shutil
import subprocess
from ctypes import c_bool, c_float, c_int, c_void_p
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from discovla.ops.rank_of_positive import rank_of_positive_reference
from discovla.ops.streamed import frame_similarity as streamed
from discovla.ops.top_k import top_k_reference
from discovla.testing import relative_error

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent / "cuda"
ORDERS = pytest.mark.parametrize("backwards", [False, True], ids=["threads forwards", "threads backwards"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@pytest.fixture(scope="module")
def host(tmp_path_factory) -> ctypes.CDLL:
    """The kernels as a library of plain C++."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    out = tmp_path_factory.mktemp("host") / "host.so"
    options = ["-std=c++17", "-O2", "-U_FORTIFY_SOURCE", "-Wno-unknown-pragmas", "-fPIC", "-shared"]
    folders = [f"-I{ROOT / 'csrc'}", f"-I{HERE}"]
    subprocess.run(["g++", *options, *folders, HERE / "host_library.cpp", "-o", out], check=True)
    library = ctypes.CDLL(str(out))
    library.error.restype = ctypes.c_char_p
    return library


def run(host: ctypes.CDLL, name: str, dtype: torch.dtype, backwards: bool, *arguments) -> None:
    """Call a function of host_library.cpp; tensors go as pointers, floats as floats."""
    given = [c_bool(dtype == torch.bfloat16), c_int(backwards)]
    for x in arguments:
        if isinstance(x, Tensor):
            assert x.is_contiguous()
        as_pointer = c_void_p(x.data_ptr() if isinstance(x, Tensor) else None)
        given.append(c_float(x) if isinstance(x, float) else c_int(x) if isinstance(x, int) else as_pointer)
    assert getattr(host, name)(*given) == 0, host.error().decode()


def walled(x: Tensor) -> Tensor:
    """Copy rows between NaNs, padded with zeros to a multiple of 16 bytes as the launchers expect."""
    x = F.pad(x, (0, -x.shape[-1] % (16 // x.element_size())))
    room = torch.full((64 + x.numel() + 64,), float("nan"), dtype=x.dtype)
    room[64:-64] = x.flatten()
    return room[64:-64].view(x.shape)


def signs(rows: int, seed: int, dtype: torch.dtype, width: int = 16) -> Tensor:
    """Unit rows of ±1/4: their cosines are exact, and many tie."""
    generator = torch.Generator().manual_seed(seed)
    return ((torch.randint(0, 2, (rows, width), generator=generator) * 2 - 1) / 4).to(dtype)


def units(shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(shape, generator=generator, dtype=torch.float64), dim=-1).to(dtype)


def host_ranks(host, query, items, positive, *, groups=None, dual=None, chunks=1, backwards=False) -> Tensor:
    """1 + both counts; items of a group put side by side, as `discovla.ops.cuda.rank_of_positive` does."""
    n, m, count = len(query), len(items), len(items) if groups is None else int(groups.max()) + 1
    group = starts = lse = lowest = None
    if groups is not None:
        group, order = groups.sort(stable=True)
        items = items[order]
        starts = F.pad(torch.bincount(groups).cumsum(0), (1, 0))
    scale = 1.0
    if dual is not None:
        logits = dual * query.float() @ items.float().T
        lse, lowest, scale = logits.logsumexp(0), logits.min().clamp(max=0), float(dual)
    query, items, counts = walled(query), walled(items), torch.zeros(2, n, dtype=torch.int32)
    run(
        host, "rank_of_positive", query.dtype, backwards, query, items, positive, group, starts, lse, lowest,
        scale, torch.full((n,), float("nan")), counts, n, m, count, query.shape[1], chunks,
    )  # fmt: skip
    return counts + 1


@ORDERS
@DTYPES
@pytest.mark.parametrize("n, m, chunks", [(1, 1, 1), (7, 63, 1), (63, 7, 1), (130, 130, 2), (3, 300, 3)])
def test_ranks_are_the_references_with_ties_against_the_query(n, m, chunks, dtype, backwards, host):
    query, items = signs(n, 0, dtype), signs(m, 1, dtype)
    positive = torch.arange(n) % m
    want = rank_of_positive_reference(query.double(), items.double(), positive, None, None)
    got = host_ranks(host, query, items, positive, chunks=chunks, backwards=backwards)
    assert torch.equal(got, torch.stack(want).int())


@pytest.mark.parametrize(
    "m, kinds, chunks", [(7, 3, 1), (130, 130, 2), (300, 13, 3), (300, 2, 2), (40, 1, 1)]
)
def test_ranks_of_groups_count_a_group_once(m, kinds, chunks, host):
    query, items = signs(20, 0, torch.float32), signs(m, 1, torch.float32)
    groups = torch.arange(m).roll(3) % kinds
    positive = torch.arange(20) % kinds
    want = rank_of_positive_reference(query.double(), items.double(), positive, groups, None)
    got = host_ranks(host, query, items, positive, groups=groups, chunks=chunks)
    assert torch.equal(got, torch.stack(want).int())


@DTYPES
def test_ranks_of_rows_whose_width_is_no_multiple_of_a_copy(dtype, host):
    query, items = units((20, 65), 0, dtype), units((70, 65), 1, dtype)
    positive = torch.arange(20)
    want = rank_of_positive_reference(query.double(), items.double(), positive, None, None)
    assert torch.equal(host_ranks(host, query, items, positive), torch.stack(want).int())


def test_dual_softmax_ranks_are_the_references(host):
    query, items = units((30, 12), 0, torch.float32), units((40, 12), 1, torch.float32)
    positive = torch.arange(30)
    want = rank_of_positive_reference(query.double(), items.double(), positive, None, 20.0)
    assert torch.equal(host_ranks(host, query, items, positive, dual=20.0), torch.stack(want).int())


@ORDERS
@pytest.mark.parametrize(
    "n, m, k, chunks, kinds",
    [
        (1, 1, 1, 1, None),
        (7, 63, 63, 1, None),
        (130, 130, 20, 1, None),
        (5, 300, 70, 3, None),
        (5, 300, 9, 3, 40),
        (3, 130, 40, 2, 40),
    ],
)
def test_the_best_items_are_the_references_in_order(n, m, k, chunks, kinds, backwards, host):
    query, items = signs(n, 0, torch.float32), signs(m, 1, torch.float32)
    groups = None if kinds is None else torch.arange(m).roll(3) % kinds
    want = top_k_reference(query.double(), items.double(), k, groups)
    values, indices = torch.full((n, k), float("nan")), torch.full((n, k), -1)
    query, items, lists = walled(query), walled(items), torch.full((n, chunks, k), -1)
    run(
        host, "top_k", query.dtype, backwards, query, items, groups, lists, values, indices, n, m,
        query.shape[1], k, chunks,
    )  # fmt: skip
    assert torch.equal(indices, want[1])
    assert torch.equal(values, want[0])


def mask(rows: int, parts: int) -> Tensor:
    """Ragged, with holes, and no real part in the last row."""
    real = torch.rand(rows, parts, generator=torch.Generator().manual_seed(parts)) < 0.6
    real[-1] = False
    return real


def host_frames(host, text: Tensor, video: Tensor, scale: Tensor, masks, grad: Tensor, backwards: bool):
    """Similarity, the derivative by all products, and that by the scale."""
    (t, i, _), (v, j, _) = text.shape, video.shape
    text, video = walled(text), walled(video)
    nan = float("nan")
    floats = [torch.full(shape, nan) for shape in ((t, v), (t, i, v), (t, v, j), (5, t, v))]
    indices = [torch.full(shape, -9, dtype=torch.int16) for shape in ((t, i, v), (t, v, j))]
    arguments = (text, video, scale, *masks, *floats, *indices, t, v, i, j, text.shape[-1])
    run(host, "frame_similarity", text.dtype, backwards, *arguments, None, None)
    derivative = torch.full((t * i, v * j), nan, dtype=text.dtype)
    run(host, "frame_similarity", text.dtype, backwards, *arguments, grad, derivative)
    return floats[0], derivative, (grad * floats[3][4]).sum()


FRAMES = [(1, 1, 1, 1), (9, 17, 12, 12), (3, 5, 7, 1), (2, 3, 63, 130), (3, 2, 100, 4), (130, 3, 1, 2)]


@ORDERS
@DTYPES
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("t, v, i, j", FRAMES)
def test_frame_similarity_and_its_derivatives_are_the_references(t, v, i, j, masked, dtype, backwards, host):
    text, video = units((t, i, 20), 0, dtype), units((v, j, 20), 1, dtype)
    masks = (mask(t, i), mask(v, j)) if masked else (None, None)
    scale, grad = torch.tensor(9.0), torch.randn(t, v)
    got = host_frames(host, text, video, scale, masks, grad, backwards)
    rows = (text.double(), video.double(), scale.double())
    actual = streamed.maxima(*rows, *masks, keep=True)
    want = streamed.gradients(grad.double(), actual, *rows, *masks)
    products = got[1].double()
    text_grad = (products @ rows[1].flatten(0, 1)).view(t, i, 20)
    video_grad = (products.T @ rows[0].flatten(0, 1)).view(v, j, 20)
    rounded = 1e-5 if dtype == torch.float32 else 8e-3  # the derivative is written in the dtype of the rows
    assert (got[0] - actual.similarity).abs().max() < 2e-6
    assert close(text_grad, want[0], rounded)
    assert close(video_grad, want[1], rounded)
    assert close(got[2], want[2], 1e-4)


def test_of_equal_matches_the_lowest_index_takes_the_gradient(host):
    text, video = signs(6, 0, torch.float32).view(2, 3, 16), signs(12, 1, torch.float32).view(3, 4, 16)
    text, video = text[:, [0, 1, 0, 2, 1]].contiguous(), video[:, [3, 3, 0, 1]].contiguous()
    grad, scale = torch.ones(2, 3), torch.tensor(3.0)
    _, derivative, _ = host_frames(host, text, video, scale, (None, None), grad, False)
    derivative = derivative.view(2, 5, 3, 4)
    rows = (text.double(), video.double(), scale.double())
    actual = streamed.maxima(*rows, None, None, keep=True)
    want = torch.zeros(2, 5, 3, 4, dtype=torch.float64)
    want.scatter_add_(3, actual.text_index[..., None], actual.text_slope[..., None])
    want.scatter_add_(1, actual.video_index[:, None], actual.video_slope[:, None])
    torch.testing.assert_close(derivative.double(), want, atol=1e-6, rtol=1e-5)


def close(got: Tensor, want: Tensor, tolerance: float) -> bool:
    return want.abs().max() < 1e-9 or relative_error(got, want) < tolerance


def test_a_barrier_that_not_all_threads_reach_is_an_error(host):
    assert host.barrier_for_some() == 1
    assert host.error() == b"a barrier is not reached by all threads"


@ORDERS
def test_a_missing_barrier_shows_in_one_order_of_threads_at_least(backwards, host):
    got = torch.zeros(64)
    run(host, "neighbours", torch.float32, backwards, got, 1)
    assert torch.equal(got, torch.arange(64.0).roll(-1))
    run(host, "neighbours", torch.float32, backwards, got, 0)
    assert torch.equal(got, torch.arange(64.0).roll(-1)) is False
