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

from discovla.ops.top_k import top_k_reference

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent / "cuda"
ORDERS = pytest.mark.parametrize("backwards", [False, True], ids=["threads forwards", "threads backwards"])


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


def host_top_k(host, query, items, k, *, groups=None, chunks=1, backwards=False) -> tuple[Tensor, Tensor]:
    """Scores and indices of the k best items of each query, as `discovla.ops.cuda.top_k` asks for them."""
    n, m = len(query), len(items)
    query, items, lists = walled(query), walled(items), torch.full((n, chunks, k), -1)
    values, indices = torch.full((n, k), float("nan")), torch.full((n, k), -1)
    run(
        host, "top_k", query.dtype, backwards, query, items, groups, lists, values, indices, n, m,
        query.shape[1], k, chunks,
    )  # fmt: skip
    return values, indices


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
    values, indices = host_top_k(host, query, items, k, groups=groups, chunks=chunks, backwards=backwards)
    assert torch.equal(indices, want[1])
    assert torch.equal(values, want[0])


@pytest.mark.parametrize("width", [16, 33, 65])
def test_the_best_items_in_bfloat16_and_of_rows_whose_width_is_no_multiple_of_a_copy(width, host):
    query, items = signs(20, 0, torch.bfloat16, width), signs(70, 1, torch.bfloat16, width)
    want = top_k_reference(query.double(), items.double(), 9, None)
    values, indices = host_top_k(host, query, items, 9)
    assert torch.equal(indices, want[1])
    assert torch.equal(values.double(), want[0])


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
