import pytest
import torch
from torch import Tensor

from discovla.ops.dispatch import IMPLEMENTATIONS, KernelUnavailable
from discovla.ops.short_attention import Packing, _short_attention, short_attention
from discovla_kernels import attention_tiles
from tests.ops.kernels import DEVICE, skip_what_no_gpu_kernel_takes

IMPLS = IMPLEMENTATIONS["short_attention"]
SIZES = [1, 7, 16, 32, 63, 64, 128, 130]
# fp32: sums over 130 keys.  fp16: weights and gradients are rounded to 11 bits
BUDGET = {torch.float64: 1e-12, torch.float32: 5e-6, torch.float16: 4e-3}
HEADS, CHANNELS = 2, 5
CASES = [(size, causal, masked) for size in SIZES for causal in (False, True) for masked in (False, True)]
CASES = [case for case in CASES if case[0] < 16 or case[1] == case[2]]


def plain(
    qkv: Tensor, lengths: list[int], causal: bool, mask: Tensor | None, sizes: Tensor | None = None
) -> Tensor:
    """Rows r 3w to r w, one sequence, one head and one query at a time, as a reader would do it by hand."""
    out, first = [], 0
    q, k, v = qkv.unflatten(-1, (3, HEADS, CHANNELS)).unbind(1)  # r h c
    for length in lengths:
        for i in range(first, first + length):
            seen = [
                j for j in range(first, i + 1 if causal else first + length) if mask is None or bool(mask[j])
            ]
            if not seen:
                out.append(0 * q[i].flatten())
                continue
            scores = torch.einsum("hc,jhc->hj", q[i], k[seen]) / CHANNELS**0.5
            weights = (scores if sizes is None else scores + sizes[seen].log()).softmax(-1)
            out.append(torch.einsum("hj,jhc->hc", weights, v[seen]).flatten())
        first += length
    return torch.stack(out)


def rows(lengths: list[int], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(sum(lengths))
    noise = torch.randn(sum(lengths), 3 * HEADS * CHANNELS, generator=generator, dtype=torch.float64)
    return noise.to(DEVICE, dtype).requires_grad_()


def ragged(lengths: list[int]) -> Packing:
    ends = torch.tensor([0, *lengths]).cumsum(0).to(DEVICE, torch.int32)
    return Packing(offsets=ends, max_length=max(lengths), num_rows=sum(lengths))


def some_keys(lengths: list[int]) -> Tensor:
    """Every second row of a sequence, and none of its first where that leaves queries without a key."""
    return torch.cat([torch.arange(length) % 2 == 1 for length in lengths]).to(DEVICE)


def assert_close(got: Tensor, want: Tensor, budget: float, name: str) -> None:
    assert (got.double() - want).abs().max() <= budget * max(1, want.abs().max()), name


def check(
    lengths: list[int],
    dtype: torch.dtype,
    impl: str,
    *,
    causal=False,
    masked=False,
    packed=False,
    sizes: Tensor | None = None,
):
    skip_what_no_gpu_kernel_takes(impl, dtype)
    x = rows(lengths, dtype)
    truth = x.detach().double().requires_grad_()
    mask = some_keys(lengths) if masked else None
    want = plain(truth, lengths, causal, mask, None if sizes is None else sizes.double())
    options = {"causal": causal, "impl": impl}
    if packed:
        packing = ragged(lengths)
        got = short_attention(x, HEADS, packing=packing, key_mask=mask, key_sizes=sizes, **options)
    else:
        shape = (len(lengths), lengths[0])
        seen, counts = (None if rows is None else rows.view(shape) for rows in (mask, sizes))
        got = short_attention(x.view(*shape, -1), HEADS, key_mask=seen, key_sizes=counts, **options)
    assert got.dtype == dtype
    assert_close(got.reshape(want.shape), want, BUDGET[dtype], "value")
    direction = torch.randn(want.shape, dtype=torch.float64, device=DEVICE)
    (expected,) = torch.autograd.grad((want * direction).sum(), truth)
    (actual,) = torch.autograd.grad((got * direction.to(dtype).view(got.shape)).sum(), x)
    assert_close(actual, expected, 2 * BUDGET[dtype], "gradient")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("size", "causal", "masked"), CASES)
def test_values_and_gradients_are_those_of_the_formula(size, causal, masked, impl):
    check([size] * (1 if size > 7 else 3), torch.float32, impl, causal=causal, masked=masked)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_values_and_gradients_in_every_dtype(dtype, impl):
    for lengths in ([7, 7], [70]):
        check(lengths, dtype, impl, causal=True, masked=True)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("lengths", [[3, 1, 12, 7], [5, 70]], ids=["one-tile", "tiles"])
def test_sequences_of_different_lengths_lie_end_to_end(lengths, causal, impl):
    check(lengths, torch.float32, impl, causal=causal, packed=True, masked=causal)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("lengths", [[7, 7], [70], [3, 12, 7]], ids=["one-tile", "tiles", "packed"])
def test_a_key_of_size_n_counts_like_n_equal_keys(lengths, causal, impl):
    sizes = 1.0 + torch.arange(sum(lengths), device=DEVICE) % 4
    packed = len(set(lengths)) > 1
    for dtype in (torch.float32, torch.float64):
        check(lengths, dtype, impl, causal=causal, masked=causal, packed=packed, sizes=sizes)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_query_that_sees_no_key_is_zero_and_has_no_gradient(impl):
    x = rows([4, 4], torch.float32).view(2, 4, -1)
    mask = torch.tensor([[False] * 4, [True] * 4], device=DEVICE)
    out = short_attention(x, HEADS, key_mask=mask, impl=impl)
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert not out[0].any() and not grad[0].any()
    assert out[1].all() and grad[1].any()


def test_the_kernel_keeps_nothing_but_its_input():
    x = rows([7, 7], torch.float32).view(2, 7, -1)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        short_attention(x, HEADS, causal=True, impl="triton")
    assert {t.untyped_storage().data_ptr() for t in kept} == {x.untyped_storage().data_ptr()}


def test_two_runs_are_bitwise_equal():
    for length in (50, 70):
        x = rows([length], torch.float32)
        grads = []
        for _ in range(2):
            out = short_attention(x[None], HEADS, impl="triton")
            grads.append(torch.autograd.grad(out.square().sum(), x)[0])
        assert torch.equal(*grads)


def test_logits_far_apart_neither_overflow_nor_vanish():
    x = rows([70], torch.float32).detach()
    x[:, : 2 * HEADS * CHANNELS] *= 30
    for impl in IMPLS:
        out = short_attention(x[None], HEADS, impl=impl)
        assert_close(out[0], plain(x.double(), [70], False, None), 2e-4, impl)


def test_the_reference_passes_gradcheck():
    x = rows([3, 2], torch.float64)
    packing = ragged([3, 2])
    assert torch.autograd.gradcheck(
        lambda x: short_attention(x, HEADS, packing=packing, causal=True, impl="reference"), [x]
    )


def test_the_op_is_registered_soundly():
    skip_what_no_gpu_kernel_takes("triton", torch.float64)
    x = rows([3, 2], torch.float64)
    sizes = torch.arange(1.0, 6.0, dtype=torch.float64, device=DEVICE)
    arguments = (x, ragged([3, 2]).offsets, some_keys([3, 2]), sizes, HEADS, 3, True)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(_short_attention, arguments, test_utils=tests)


@pytest.mark.parametrize("impl", IMPLS)
def test_shapes_that_do_not_fit_are_refused_by_name(impl):
    x = rows([4], torch.float32)
    wide = Packing(offsets=torch.tensor([0, 4]), max_length=4, num_rows=4)
    short = Packing(offsets=torch.tensor([0, 3], dtype=torch.int32), max_length=3, num_rows=3)
    cases = [
        ("qkv: expected n l 3w, w a multiple of 2 heads, found", lambda: short_attention(x, 2, impl=impl)),
        ("qkv: expected n l 3w, w a multiple of 3", lambda: short_attention(x[None], 3, impl=impl)),
        ("key_mask", lambda: short_attention(x[None], 2, key_mask=torch.ones(4) > 0, impl=impl)),
        (
            r"key_sizes: expected shape \(1, 4\)",
            lambda: short_attention(x[None], 2, key_sizes=x[:, 0], impl=impl),
        ),
        ("key_mask: expected bool", lambda: short_attention(x[None], 2, key_mask=x[None, :, 0], impl=impl)),
        ("packing.offsets: .* int32, found", lambda: short_attention(x, 2, packing=wide, impl=impl)),
        (
            "packing.num_rows: expected 4, the rows of qkv, found 3",
            lambda: short_attention(x, 2, packing=short, impl=impl),
        ),
    ]
    for message, call in cases:
        with pytest.raises(ValueError, match=f"^{message}"):
            call()


def test_heads_too_wide_for_the_kernel_are_refused():
    with pytest.raises(KernelUnavailable, match="heads of at most 128 channels, found 200"):
        short_attention(torch.zeros(1, 3, 600), 1, impl="triton")


def test_one_tile_holds_sequences_of_up_to_its_rows():
    qkv = torch.ones(2, 3, 16)
    tiles = {length: attention_tiles.settings(qkv, 16, length) for length in (16, 17, 64, 65)}
    assert {length: (x["BLOCK"], x["ONE"]) for length, x in tiles.items()} == {
        16: (16, True),
        17: (32, True),
        64: (64, True),
        65: (64, False),
    }
