"""Loads, stores and products of kernels, counted in the interpreter, equal their formulas."""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from benchmarks.measure import product_flops
from discovla.ops.alignment_losses import AlignmentInputs, alignment_losses
from discovla.ops.frame_similarity import frame_similarity
from discovla.ops.info_nce import info_nce
from discovla.ops.late_interaction import late_interaction
from discovla.ops.token_similarity import TokenInputs, token_similarity, token_training_similarity
from discovla_kernels import (
    contrastive,
    fusion_norm,
    layer_norm,
    lora_norm,
    merge_tokens,
    mlp,
    preprocess_frames,
    quantise_rows,
    rank_of_positive,
    readout_attention,
    short_attention,
    soft_vlad,
    temporal_fusion,
)
from discovla_kernels import frame_similarity as frames
from discovla_kernels import late_interaction as interaction
from discovla_kernels import token_similarity as tokens
from tests.ops.counting import Counts, counted

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here, not interpreted"),
]
SCALE = torch.tensor(10.0)
# more than one tile each way, and a ragged last one: t i v j d
SHAPE = (5, 12, 40, 2, 24)


def sides(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    t, i, v, j, d = shape
    return torch.randn(t, i, d), torch.randn(v, j, d)


def masks(shape: tuple[int, ...], masked: bool) -> tuple[Tensor | None, Tensor | None]:
    """With every part real, so that what is loaded of the rest does not change."""
    t, i, v, j, _ = shape
    return tuple(torch.ones(s, dtype=torch.bool) if masked else None for s in ((t, i), (v, j)))  # type: ignore


def assert_counts(actual: Counts, formula) -> None:
    assert actual.loads == pytest.approx(formula.loads, rel=0.1)
    assert actual.stores == pytest.approx(formula.stores, rel=0.1)


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("shape", [SHAPE, (9, 7, 35, 3, 16)], ids=str)
def test_traffic_of_the_frame_similarity(shape, masked):
    given, (text, video) = masks(shape, masked), sides(shape)
    for keep in (False, True):
        with counted() as actual:
            maxima = frames.maxima(text, video, SCALE, *given, keep=keep)
        assert_counts(actual, frames.traffic(shape, masked=masked, keep=keep))
    with counted() as actual:
        frames.gradients(torch.ones(len(text), len(video)), maxima, text, video, SCALE, *given)
    assert_counts(actual, frames.traffic_backward(shape, masked=masked))


@pytest.mark.parametrize("given", ["alone", "teacher", "ignore"])
def test_traffic_of_the_contrastive_losses(given):
    r, c, d = shape = (40, 50, 24)
    rows = [(torch.randn(n, d), torch.ones(n)) for n in (r, c)]
    teacher = torch.randn(r, c) if given == "teacher" else None
    ignore = torch.zeros(r, c, dtype=torch.bool) if given == "ignore" else None
    with counted() as actual:
        contrastive.statistics(*rows, SCALE, teacher, ignore, 0)
    options = {"teacher": teacher is not None, "ignore": ignore is not None}
    assert_counts(actual, contrastive.traffic(shape, backward=False, **options))
    sums = torch.full((3, r), 99.0), torch.full((3, c), 99.0)
    with counted() as actual:
        contrastive.derivative(*rows, SCALE, teacher, ignore, 0, *sums, torch.ones(3), True)
    assert_counts(actual, contrastive.traffic(shape, backward=True, **options))


@pytest.mark.parametrize("grouped", [False, True], ids=["items", "groups"])
def test_traffic_of_ranks(grouped):
    query, items = torch.randn(40, 24), torch.randn(78, 24)
    groups = torch.arange(78) % 26 if grouped else None  # three of each, in four places
    with counted() as actual:
        rank_of_positive.count_better(query, items, torch.arange(40) % 26, groups, None)
    assert_counts(actual, rank_of_positive.traffic(40, (78, 26, 4) if grouped else (78, 78, 1), 24))


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("mode", ["ranking", "official"])
def test_traffic_of_token_similarities(mode, masked):
    given, (text, video) = masks(SHAPE, masked), sides(SHAPE)
    with counted() as actual:
        tokens.scores(text, video, *given, 10.0, mode)
    assert_counts(actual, tokens.traffic(SHAPE, masked=masked, backward=False))
    with counted() as actual:
        tokens.gradients(torch.ones(len(text), len(video)), text, video, *given, 10.0, mode)
    assert_counts(actual, tokens.traffic(SHAPE, masked=masked, backward=True))


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_traffic_of_late_interaction(masked):
    given, (text, video) = masks(SHAPE, masked), sides(SHAPE)
    with counted() as actual:
        interaction.scores(text, video, *given)
    assert_counts(actual, interaction.traffic(SHAPE, masked=masked, backward=False))
    with counted() as actual:
        interaction.gradients(torch.ones(len(text), len(video)), text, video, *given)
    assert_counts(actual, interaction.traffic(SHAPE, masked=masked, backward=True))


def test_traffic_of_soft_vlad():
    n, length, k, d = 3, 20, 5, 80
    x, mask = torch.randn(n, length, d), torch.arange(length) < torch.tensor([[20], [7], [1]])
    tables = torch.randn(k, d), torch.randn(k, d)
    with counted() as actual:
        soft_vlad.forward(x, mask, *tables)
    assert_counts(actual, soft_vlad.traffic(n, (length, 28), k, d, backward=False))
    with counted() as actual:
        soft_vlad.gradients(torch.randn(n, d), x, mask, *tables)
    assert_counts(actual, soft_vlad.traffic(n, (length, 28), k, d, backward=True))


def leaves(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape).requires_grad_() for shape in shapes]


def token_inputs(x: list[Tensor]) -> TokenInputs:
    return TokenInputs(text=x[0], video=x[1])


def aligned(x: list[Tensor]) -> Tensor:
    inputs = AlignmentInputs(text=x[0], video=x[1], text_frames=x[2], video_frames=x[3])
    losses = alignment_losses(inputs, SCALE, impl="triton")
    return losses.video + losses.frame + losses.distill


POOLED = ((32, 32), (32, 32))
PARTS = ((4, 12, 32), (32, 2, 32))  # 12 parts are 8 and 4
WHOLE = ((8, 8, 32), (8, 8, 32))  # one tile of 64 x 64
STEPS = {
    "info_nce": (POOLED, lambda x: info_nce(*x, SCALE, impl="triton")),
    "frame_similarity": (PARTS, lambda x: frame_similarity(*x, SCALE, impl="triton")),
    "alignment_losses": ((*POOLED, (32, 4, 32), (32, 2, 32)), aligned),
    "token_similarity": (WHOLE, lambda x: token_similarity(token_inputs(x), impl="triton")),
    "token_training_similarity": (
        WHOLE,
        lambda x: token_training_similarity(token_inputs(x), impl="triton"),
    ),
    "late_interaction": (WHOLE, lambda x: late_interaction(token_inputs(x), impl="triton")),
}


def step_of(op: str) -> tuple[Counts, float, int]:
    """Count the kernels of a step, the flops of torch's products beside them, and those of one pass."""
    shapes, call = STEPS[op]
    x = leaves(*shapes)

    def step() -> None:
        out = call(x)
        torch.autograd.grad(out, x, torch.ones_like(out))

    with counted() as actual:
        products = product_flops(step)
    pairs = [(x[0], x[1])] + ([(x[2], x[3])] if op == "alignment_losses" else [])
    return actual, products, sum(2 * a.numel() * b.numel() // a.shape[-1] for a, b in pairs)


@pytest.mark.parametrize("op", STEPS)
def test_a_step_multiplies_in_four_passes_without_padding(op, monkeypatch):
    """One pass forward, one again in backward, one for each side's gradient."""
    streamed = importlib.import_module("discovla.ops.alignment_losses")
    monkeypatch.setattr(streamed, "fits_one_block", lambda *_: False)
    actual, products, one_pass = step_of(op)
    assert actual.flops == 2 * one_pass
    assert products == 2 * one_pass


def test_losses_of_one_block_multiply_no_more_than_streamed_ones():
    actual, products, one_pass = step_of("alignment_losses")
    assert one_pass <= actual.flops < 2 * one_pass and products == 2 * one_pass


class Step(NamedTuple):
    """A launch; the rows that it has to read; the products it takes.

    again: rows that the program which has read them reads again, from a cache.
    """

    call: Callable[[], Any]
    rows: tuple[Tensor, ...]
    flops: int = 0
    again: tuple[Tensor, ...] = ()


def steps_of_norms() -> dict[str, Step]:
    x, u, z = torch.randn(32, 64), torch.randn(32, 64), torch.randn(32, 64 + 16)
    a, gain, shift, stats = torch.randn(8, 64), torch.randn(64), torch.randn(64), torch.randn(2, 32)
    affine, none = (gain, shift), x.new_empty(0)
    forward, dsum = (1e-5, torch.float32), torch.randn(32, 64)
    return {
        "layer_norm forward": Step(lambda: layer_norm.forward(x, u, *affine, *forward), (x, u)),
        "layer_norm backward": Step(lambda: layer_norm.backward(u, dsum, x, stats, gain, none), (u, dsum, x)),
        "lora_norm forward": Step(lambda: lora_norm.forward(x, u, a, *affine, *forward), (x, u)),
        "lora_norm backward": Step(lambda: lora_norm.backward(z, u, x, stats, a[None], *affine), (z, u, x)),
    }


def steps_of_the_adapter() -> dict[str, Step]:
    """Return the steps of an adapter of rank 16, to which one of rank 8 is padded."""
    x, dz, copy = torch.randn(32, 128), torch.randn(32, 128), torch.empty(32, 128)
    down, up, bias, shift = torch.randn(16, 128), torch.randn(128, 16), torch.randn(16), torch.randn(128)
    product = 2 * 32 * 128 * 16

    def forward() -> tuple[Tensor, ...]:
        return fusion_norm.forward(x, down, bias, up, shift, copy=copy), copy

    def backward() -> tuple[Tensor, ...]:
        return fusion_norm.backward(dz, x, down, bias, up, copy), copy

    return {
        "adapter forward": Step(forward, (x,), 2 * product, (x,)),
        "adapter backward": Step(backward, (x, dz), 5 * product, (x,)),
    }


def steps_of_readout_attention() -> dict[str, Step]:
    """Two groups of 16 frames of 16 tokens.

    A tile of 16 queries has two softmaxes, of each query in its own frame and in all frames of its group.
    Backward reads the keys twice: for the sums along them, two products, and for the gradients, five.
    """
    q, kv, rows = torch.randn(32, 16), torch.randn(32 * 16, 2 * 16), torch.arange(0, 32 * 16, 16)
    grad, options = torch.randn(2 * 32, 16), (rows, None, None, None, None, 1, 16, False, 0, 16)
    product = 2 * 2 * 16 * (32 * 16) * 16
    return {
        "readout forward": Step(lambda: readout_attention.forward(q, kv, *options), (q, kv), 2 * product),
        "readout backward": Step(
            lambda: readout_attention.backward(grad, q, kv, *options), (grad, q, kv), 7 * product, (kv,)
        ),
    }


def steps_of_inputs() -> dict[str, Step]:
    frames, weight = torch.ones(2, 64, 64, 3, dtype=torch.uint8), torch.randn(8, 3, 32, 32)
    rows, hidden, colours = torch.randn(16, 256), torch.randn(16, 256), ((0.1, 0.2, 0.3), (1.0, 2.0, 3.0))
    x, sizes, metric = torch.randn(2, 33, 128), torch.ones(2, 33), torch.randn(2, 33, 32)
    grad, target = torch.randn(2, 29, 128), torch.randint(0, 29, (2, 33))
    match, mean = 2 * 2 * 16 * 32 * 32, 2 * 2 * 16 * 32 * 128  # destinations, 16, fill half a tile
    single = torch.float32
    return {
        "frame_patches": Step(
            lambda: preprocess_frames.patches(frames, (32, 32), *colours, single), (frames,)
        ),
        "fold_normalisation": Step(
            lambda: preprocess_frames.fold_normalisation(weight, *colours, single), (weight,)
        ),
        "quantise_rows": Step(lambda: quantise_rows.quantise_rows(rows, None, "", None, 448.0), (rows,)),
        "quantise_rows slope": Step(
            lambda: quantise_rows.quantise_rows(rows, None, "quick_gelu", hidden, 448.0), (rows, hidden)
        ),
        "merge_tokens forward": Step(
            lambda: merge_tokens.forward(x, sizes, metric, 4, 1), (x, metric), match + mean
        ),
        "merge_tokens backward": Step(
            lambda: merge_tokens.backward(grad, sizes, torch.ones(2, 29), target), (grad,)
        ),
    }


STEPS_OF_ROWS = steps_of_norms() | steps_of_the_adapter() | steps_of_readout_attention() | steps_of_inputs()


@pytest.mark.parametrize("name", STEPS_OF_ROWS)
def test_towers_read_and_write_every_row_once_and_multiply_no_more_than_their_formula(name):
    step = STEPS_OF_ROWS[name]
    with counted(step.rows) as actual:
        results = step.call()
    results = [results] if isinstance(results, Tensor) else results
    floor = sum(x.numel() for x in (*step.rows, *step.again, *results))
    assert actual.flops == step.flops
    assert 0.9 * floor < actual.loads + actual.stores < 1.1 * floor


def test_products_of_the_mlp_are_those_of_its_formula():
    x, w, bias = torch.randn(64, 32), torch.randn(128, 32), torch.randn(128)
    with counted() as actual:
        h, _ = mlp.hidden(x, w, bias, False, True)
        mlp.hidden_gradient(x, w.T.contiguous(), h, False)
    assert actual.flops == 2 * 2 * 64 * 32 * 128


@pytest.mark.parametrize("length", [64, 52], ids=["without padding", "with guests"])
def test_attention_of_one_tile_has_two_products_and_five_in_backward(length):
    """52 tokens, and 12 readout queries in rows of the same tile."""
    frames, channels, tile = 12, 16, 2 * 64 * 64 * 16
    qkv = torch.randn(frames * length, 3 * channels)
    options = None, None, None, 1, length, False
    readout = torch.arange(0, frames * length, length)[None]
    if length == 64:
        with counted([qkv]) as forward:
            out = short_attention.forward(qkv, *options)
        with counted([qkv, out]) as backward:
            short_attention.backward(out, qkv, *options)
    else:
        options = readout, None, None, None, None
        with counted([qkv]) as forward:
            out, fused, lse = temporal_fusion.forward(qkv, *options, 1, length, False, 0)
        with counted([qkv, out]) as backward:
            temporal_fusion.backward(out, qkv, *options, fused, lse, 1, length, False, 0)
    assert (forward.flops, backward.flops) == (2 * frames * tile, 5 * frames * tile)
    floor = qkv.numel() + out.numel()
    assert floor <= forward.loads + forward.stores < 1.1 * floor + 2 * frames * channels
    assert (
        floor + qkv.numel()
        <= backward.loads + backward.stores
        < 1.1 * (floor + qkv.numel()) + (0 if length == 64 else 4 * frames * frames * channels)
    )
