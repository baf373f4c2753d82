"""Launches of every kernel at the sizes of the recipes, on tensors without storage, for `benchmarks/sass.py`.

Sizes: a step of 128 clips of 12 frames of ViT-B/32 (50 tokens a frame), B/16 (197) and L/14 (257, or 577 at
336 pixels), with 13 captions a clip of 12 tokens each; losses of 128, 1,024 and more pairs of 512 dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from discovla_kernels import activation as elements
from discovla_kernels import (
    alignment_block,
    contrastive,
    frame_similarity,
    fusion_norm,
    late_interaction,
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
    token_similarity,
    unit_mean,
)

BF16, F32, I32, I64, BOOL, U8 = (
    torch.bfloat16,
    torch.float32,
    torch.int32,
    torch.int64,
    torch.bool,
    torch.uint8,
)
PAIRS, FRAMES, TOKENS, LONGEST, RANK, DIM = 128, 12, 12, 18, 8, 512
CLIP_FRAMES, CAPTIONS = PAIRS * FRAMES, PAIRS * (FRAMES + 1)
TF32_COST = 6.0  # a float32 product is three TF32 products, each at half the rate of bfloat16
Products = dict[str, float]  # kernel -> floating-point operations that its formula needs


@dataclass(frozen=True, kw_only=True)
class SassCase:
    """The launches of one op at one size.

    products_cost: time of a product of its dtype beside one in bfloat16.
    only: the kernels to audit; empty for all that are launched.
    """

    name: str
    launch: Callable[[], Any]
    products: Products = field(default_factory=dict)
    products_cost: float = 1.0
    only: tuple[str, ...] = ()


def like(dtype: torch.dtype, *shape: int) -> Tensor:
    """Return a tensor without storage."""
    return torch.empty(shape, dtype=dtype, device="meta")


def kind(dtype: torch.dtype) -> str:
    return "bf16" if dtype == BF16 else "fp32"


def cost_of(dtype: torch.dtype) -> float:
    return 1.0 if dtype == BF16 else TF32_COST


def sass_cases() -> list[SassCase]:
    """Return all cases: the towers', then those of losses and evaluation."""
    return [*row_cases(), *attention_cases(), *input_cases(), *loss_cases(), *evaluation_cases()]


def row_cases() -> list[SassCase]:
    """Norms, LoRA, adapter and MLP on rows."""
    b32, l14, text = 50 * CLIP_FRAMES, 257 * CLIP_FRAMES, TOKENS * CAPTIONS
    cases = []
    for rows, width, stream in ((b32, 768, BF16), (b32, 768, F32), (l14, 1024, BF16), (text, 512, BF16)):
        cases += _layer_norm(rows, width, stream)
    for rows, width, stream, dtype, readout in (
        (b32, 768, BF16, BF16, False),
        (b32, 768, F32, BF16, False),
        (b32, 768, BF16, BF16, True),
        (l14, 1024, BF16, BF16, False),
        (text, 512, BF16, BF16, False),
        (text, 512, F32, F32, False),
    ):
        cases += _lora_norm(rows, width, stream, dtype, readout)
    for width, dtype in ((768, BF16), (512, BF16), (512, F32)):
        cases += _adapter(CLIP_FRAMES, width, dtype)
    for rows, width, dtype in ((b32, 768, BF16), (text, 512, BF16), (l14, 1024, BF16), (text, 512, F32)):
        cases += _mlp(rows, width, dtype)
    return cases + _activation(b32, 4 * 768, BF16)


def _layer_norm(rows: int, width: int, stream: torch.dtype) -> list[SassCase]:
    x, u, stats = like(stream, rows, width), like(BF16, rows, width), like(F32, 2, rows)
    gain, shift = like(BF16, width), like(BF16, width)
    du = like(BF16, rows, width) if stream == F32 else like(BF16, 0)
    forward = partial(layer_norm.forward, x, u, gain, shift, 1e-5, BF16)
    backward = partial(layer_norm.backward, u, like(stream, rows, width), x, stats, gain, du)
    size = f"{rows}x{width} {kind(stream)}"
    return [
        SassCase(name=f"layer_norm forward {size}", launch=forward),
        SassCase(name=f"layer_norm backward {size}", launch=backward),
    ]


def _lora_norm(
    rows: int, width: int, stream: torch.dtype, dtype: torch.dtype, readout: bool
) -> list[SassCase]:
    x, u, a, gain = like(stream, rows, width), like(dtype, rows, width), like(F32, RANK, width), None
    gain, shift, stats = like(dtype, width), like(dtype, width), like(F32, 2, rows)
    columns, index, count = width + lora_norm.padded_rank(RANK), like(I32, rows), rows // 50
    forward_options, backward_options = {}, {}
    if readout:
        forward_options = {"readout_index": index, "readout_count": count}
        backward_options = {"readout_index": index, "grad_readout_x": like(stream, count, width)}
        backward_options |= {"grad_readout_z": like(dtype, count, columns)}
    copies = a.expand(lora_norm.programs(rows), -1, -1)
    grad_z, grad_total = like(dtype, rows, columns), None if readout else like(stream, rows, width)
    forward = partial(lora_norm.forward, x, u, a, gain, shift, 1e-5, dtype, **forward_options)
    backward = partial(
        lora_norm.backward, grad_z, grad_total, x, stats, copies, gain, shift, **backward_options
    )
    mixed = f" beside {kind(stream)}" if stream != dtype else ""
    size = f"{rows}x{width} {kind(dtype)}{mixed}{' readout' if readout else ''}"
    return [
        SassCase(name=f"lora_norm forward {size}", launch=forward),
        SassCase(name=f"lora_norm backward {size}", launch=backward),
    ]


def _adapter(rows: int, width: int, dtype: torch.dtype) -> list[SassCase]:
    x, down, up = like(dtype, rows, width), like(F32, RANK, width), like(F32, width, RANK)
    biases = like(F32, RANK), like(F32, width)
    forward = partial(fusion_norm.forward, x, down, biases[0], up, biases[1], copy=like(dtype, rows, width))
    backward = partial(
        fusion_norm.backward, like(dtype, rows, width), x, down, biases[0], up, like(dtype, rows, width)
    )
    one = 2.0 * rows * width * RANK
    cost = cost_of(dtype)
    return [
        SassCase(
            name=f"adapter {way} {rows}x{width} {kind(dtype)}",
            launch=launch,
            products={f"_adapter_{way}": passes * one},
            products_cost=cost,
        )
        for way, launch, passes in (("forward", forward, 2), ("backward", backward, 5))
    ]


def _mlp(rows: int, width: int, dtype: torch.dtype) -> list[SassCase]:
    x, up, bias, down = (
        like(dtype, rows, width),
        like(dtype, 4 * width, width),
        like(dtype, 4 * width),
        like(dtype, width, 4 * width),
    )
    forward = partial(mlp.hidden, x, up, bias, False, True)
    backward = partial(mlp.hidden_gradient, x, down, like(dtype, rows, 4 * width), False)
    return [
        SassCase(
            name=f"mlp {way} {rows}x{width} {kind(dtype)}",
            launch=launch,
            products={f"_mlp_{way}": 2.0 * rows * width * 4 * width},
            products_cost=cost_of(dtype),
        )
        for way, launch in (("forward", forward), ("backward", backward))
    ]


def _activation(rows: int, hidden: int, dtype: torch.dtype) -> list[SassCase]:
    h, grad = like(dtype, rows, hidden), like(dtype, rows, hidden)
    launches = {
        "forward": partial(elements.activation, h, False),
        "backward": partial(elements.activation_gradient, grad, h, False),
    }
    return [
        SassCase(name=f"activation {way} {rows}x{hidden} {kind(dtype)}", launch=launch)
        for way, launch in launches.items()
    ]


def attention_cases() -> list[SassCase]:
    """Attention of frames of 50 to 577 tokens and of packed captions, with and without groups."""
    cases = []
    for length, width, heads, dtype in (
        (50, 768, 12, BF16),
        (197, 768, 12, BF16),
        (257, 1024, 16, BF16),
        (577, 1024, 16, BF16),
        (50, 768, 12, F32),
    ):
        cases += _short_attention(CLIP_FRAMES, length, width, heads, dtype, packed=False)
    cases += _short_attention(CAPTIONS, TOKENS, 512, 8, BF16, packed=True)
    cases += _short_attention(PAIRS, 77, 512, 8, F32, packed=True)
    for length, width, heads, packed in (
        (50, 768, 12, False),
        (197, 768, 12, False),
        (257, 1024, 16, False),
        (TOKENS, 512, 8, True),
    ):
        cases += _temporal_fusion(length, width, heads, packed)
        cases += _readout_attention(length, width, heads, packed)
    return cases


def _short_attention(
    n: int, length: int, width: int, heads: int, dtype: torch.dtype, *, packed: bool
) -> list[SassCase]:
    rows, longest = n * length, LONGEST if length == TOKENS else length
    qkv, offsets = like(dtype, rows, 3 * width), like(I32, n + 1) if packed else None
    options = offsets, None, None, heads, longest, packed
    forward = partial(short_attention.forward, qkv, *options)
    backward = partial(short_attention.backward, like(dtype, rows, width), qkv, *options)
    one = 2.0 * n * length**2 * width
    return [
        SassCase(
            name=f"short_attention {way} {n}x{length} w={width} {kind(dtype)}{' packed' if packed else ''}",
            launch=launch,
            products={f"_short_attention_{way}": passes * one},
            products_cost=cost_of(dtype),
        )
        for way, launch, passes in (("forward", forward, 2), ("backward", backward, 5))
    ]


def _temporal_fusion(length: int, width: int, heads: int, packed: bool) -> list[SassCase]:
    n, ungrouped = CLIP_FRAMES, PAIRS if packed else 0
    rows, longest = (n + ungrouped) * length, LONGEST if packed else length
    qkv, readout = like(BF16, rows, 3 * width), like(I64, PAIRS, FRAMES)
    offsets, mask = like(I32, n + ungrouped + 1) if packed else None, like(BOOL, rows) if packed else None
    common = qkv, readout, offsets, None, mask, like(F32, FRAMES, width) if packed else None
    last = heads, longest, packed, ungrouped
    forward = partial(temporal_fusion.forward, *common, *last)
    saved = like(F32, n, width), like(F32, n, heads)
    backward = partial(temporal_fusion.backward, like(BF16, rows + n, width), *common, *saved, *last)
    one = 2.0 * rows * width * (length + FRAMES)
    return [
        SassCase(
            name=f"temporal_fusion {way} {n}x{length} w={width} bf16{' packed' if packed else ''}",
            launch=launch,
            products={f"_temporal_fusion_{way}": passes * one},
        )
        for way, launch, passes in (("forward", forward, 2), ("backward", backward, 5))
    ]


def _readout_attention(length: int, width: int, heads: int, packed: bool) -> list[SassCase]:
    n, ungrouped = CLIP_FRAMES, PAIRS if packed else 0
    rows, longest = (n + ungrouped) * length, LONGEST if packed else length
    q, kv, readout = like(BF16, n + ungrouped, width), like(BF16, rows, 2 * width), like(I64, n + ungrouped)
    offsets, mask = like(I32, n + ungrouped + 1) if packed else None, like(BOOL, rows) if packed else None
    common = q, kv, readout, offsets, None, mask, like(F32, FRAMES, width) if packed else None
    last = heads, longest, packed, ungrouped, FRAMES
    forward = partial(readout_attention.forward, *common, *last)
    grad = like(BF16, 2 * (n + ungrouped) - ungrouped, width)
    backward = partial(readout_attention.backward, grad, *common, *last)
    one = 2.0 * rows * width * (1 + FRAMES)
    return [
        SassCase(
            name=f"readout_attention {way} {n}x{length} w={width} bf16{' packed' if packed else ''}",
            launch=launch,
            products={f"_readout_attention_{way}": passes * one},
        )
        for way, launch, passes in (("forward", forward, 2), ("backward", backward, 5))
    ]


def input_cases() -> list[SassCase]:
    """Patches, folded weights, FP8 rows, merged tokens and means of frames."""
    frames, weight = like(U8, CLIP_FRAMES, 224, 224, 3), like(F32, 768, 3, 32, 32)
    constants = (0.1, 0.2, 0.3), (1.0, 2.0, 3.0)
    cases = [
        SassCase(
            name=f"frame_patches {CLIP_FRAMES}x224 bf16",
            launch=partial(preprocess_frames.patches, frames, (32, 32), *constants, BF16),
        ),
        SassCase(
            name="fold_normalisation 768x32x32 bf16",
            launch=partial(preprocess_frames.fold_normalisation, weight, *constants, BF16),
        ),
    ]
    rows = 50 * CLIP_FRAMES
    for width, activation in ((768, ""), (3072, "quick_gelu")):
        launch = partial(quantise_rows.quantise_rows, like(BF16, rows, width), None, activation, None, 448.0)
        cases += [SassCase(name=f"quantise_rows {rows}x{width} {activation or 'plain'}", launch=launch)]
    hidden = like(BF16, rows, 3072)
    launch = partial(
        quantise_rows.quantise_rows, hidden, like(F32, 3072), "quick_gelu", hidden.clone(), 448.0
    )
    cases += [SassCase(name=f"quantise_rows {rows}x3072 slope", launch=launch)]
    for n, length, count, fixed in ((CLIP_FRAMES, 50, 2, 1), (CLIP_FRAMES // 2, 68, 20, 2)):
        x, sizes, metric = like(BF16, n, length, 768), like(F32, n, length), like(F32, n, length, 64)
        left = length - count
        sources = (length + 1) // 2 - (fixed + 1) // 2
        products = 2.0 * n * sources * (length - fixed - sources) * 64
        cases += [
            SassCase(
                name=f"merge_tokens forward {n}x{length}-{count} w=768 bf16",
                launch=partial(merge_tokens.forward, x, sizes, metric, count, fixed),
                products={"_merge_forward": products},
                products_cost=TF32_COST,
            ),
            SassCase(
                name=f"merge_tokens backward {n}x{length}-{count} w=768 bf16",
                launch=partial(
                    merge_tokens.backward, like(BF16, n, left, 768), sizes, like(F32, n, left),
                    like(I64, n, length),
                ),
            ),
        ]  # fmt: skip
    x, mask = like(F32, PAIRS, FRAMES, DIM), like(BOOL, PAIRS, FRAMES)
    return [
        *cases,
        SassCase(name=f"unit_mean forward {PAIRS}x{FRAMES} fp32", launch=partial(unit_mean.forward, x, mask)),
        SassCase(
            name=f"unit_mean backward {PAIRS}x{FRAMES} fp32",
            launch=partial(unit_mean.backward, like(F32, PAIRS, DIM), x, mask),
        ),
    ]


def loss_cases() -> list[SassCase]:
    """Losses and similarities of a batch, and of a block of a large one."""
    cases = []
    for n, dtype in ((PAIRS, F32), (1024, F32), (512, BF16)):
        cases += _frame_similarity(n, dtype)
    for n, dtype, teacher in (
        (PAIRS, F32, True),
        (1024, F32, True),
        (4096, BF16, True),
        (PAIRS, F32, False),
        (4096, BF16, False),
    ):
        cases += _contrastive(n, dtype, teacher)
    cases += _alignment_block(PAIRS)
    # T2VParser: 77 words, or 12 frames, and 8 views
    cases += _pair_cases("token_similarity", token_similarity, 64, (85, 20), F32, 100.0, "ranking")
    cases += _pair_cases("token_training_similarity", token_similarity, 32, (85, 20), F32, 100.0, "official")
    for dtype in (F32, BF16):
        cases += _pair_cases("late_interaction", late_interaction, 512, (32, 12), dtype)
    return cases


def _frame_similarity(n: int, dtype: torch.dtype) -> list[SassCase]:
    text, video, scale = like(dtype, n, FRAMES, DIM), like(dtype, n, FRAMES, DIM), like(F32)
    masks = like(BOOL, n, FRAMES), like(BOOL, n, FRAMES)
    maxima = frame_similarity.Maxima(
        similarity=like(F32, n, n),
        text_best=like(F32, n, FRAMES, n),
        text_index=like(torch.int16, n, FRAMES, n),
        video_best=like(F32, n, n, FRAMES),
        video_index=like(torch.int16, n, n, FRAMES),
        pools=like(F32, 5, n, n),
    )
    size, cost = f"{n}x{n} F={FRAMES} {kind(dtype)}", cost_of(dtype)
    products = {"_frame_similarity_forward": 2.0 * n * n * FRAMES**2 * DIM}
    cases = [
        SassCase(
            name=f"frame_similarity {name} {size}",
            launch=partial(frame_similarity.maxima, text, video, scale, *masks, keep=keep),
            products=products,
            products_cost=cost,
        )
        for name, keep in (("forward", True), ("evaluation", False))
    ]
    backward = partial(frame_similarity.match_gradient, maxima.similarity, maxima, scale, *masks, dtype)
    return [*cases, SassCase(name=f"frame_similarity backward {size}", launch=backward)]


def _contrastive(n: int, dtype: torch.dtype, with_teacher: bool) -> list[SassCase]:
    rows = [(like(dtype, n, DIM), like(F32, n)) for _ in "tv"]
    teacher, kinds = like(F32, n, n) if with_teacher else None, 3 if with_teacher else 1
    common, sums = (*rows, like(F32), teacher, None, 0), [like(F32, kinds, n) for _ in "tv"]
    forward = partial(contrastive.statistics, *common)
    backward = partial(contrastive.derivative_parts, *common, *sums, like(F32, 3), False)
    return [
        SassCase(
            name=f"info_nce {way} {n}x{n} {kind(dtype)}{' with teacher' if with_teacher else ''}",
            launch=launch,
            products={f"_contrastive_{way}": 2.0 * n * n * DIM},
            products_cost=cost_of(dtype),
        )
        for way, launch in (("forward", forward), ("backward", backward))
    ]


def _alignment_block(n: int) -> list[SassCase]:
    """The kernels of a batch that is one block; those that it shares with others have cases of their own."""
    pooled = like(F32, n, DIM), like(F32, n, DIM)
    parts = like(F32, n, FRAMES, DIM), like(F32, n, FRAMES, DIM)
    options = None, None, like(F32), None

    def forward() -> Any:
        return alignment_block.forward(*pooled, *parts, *options, 1.0, 1.0, 1.0)

    def backward() -> Any:
        saved = forward()[1].tensors()
        return alignment_block.backward(like(F32, 3), *pooled, *parts, *options, saved, False, False)

    kernels = "_alignment_block_norms", "_alignment_block_losses", "_alignment_block_radial"
    return [SassCase(name=f"alignment_losses {n}x{n} fp32", launch=backward, only=kernels)]


def _pair_cases(
    name: str, kernels: Any, n: int, rows: tuple[int, int], dtype: torch.dtype, *last: Any
) -> list[SassCase]:
    """Return forward and backward of a similarity of n texts and n videos with some rows each."""
    sides, masks = [like(dtype, n, k, DIM) for k in rows], [like(BOOL, n, k) for k in rows]
    forward = partial(kernels.scores, *sides, *masks, *last)
    backward = partial(kernels.gradients, like(F32, n, n), *sides, *masks, *last)
    stem = name.replace("_training", "")
    return [
        SassCase(
            name=f"{name} {way} {n}x{n} {rows[0]}x{rows[1]} {kind(dtype)}",
            launch=launch,
            products={f"_{stem}_{way}": 2.0 * n * n * rows[0] * rows[1] * DIM},
            products_cost=cost_of(dtype),
        )
        for way, launch in (("forward", forward), ("backward", backward))
    ]


def evaluation_cases() -> list[SassCase]:
    """Pooling of tokens by CLIP2Video, and ranks."""
    tokens, mask, tables = like(F32, PAIRS, 32, DIM), like(BOOL, PAIRS, 32), [like(F32, 5, DIM) for _ in "ac"]
    products = 2.0 * PAIRS * 32 * 5 * DIM
    cases = [
        SassCase(
            name=f"soft_vlad {way} {PAIRS}x32 K=5 fp32",
            launch=launch,
            products={f"_soft_vlad_{way}": passes * products},
            products_cost=TF32_COST,
        )
        for way, launch, passes in (
            ("forward", partial(soft_vlad.forward, tokens, mask, *tables), 2),
            ("backward", partial(soft_vlad.gradients, like(F32, PAIRS, DIM), tokens, mask, *tables), 5),
        )
    ]
    for queries, items, dtype in ((59_800, 1000, F32), (100_000, 100_000, F32), (100_000, 100_000, BF16)):
        rows = like(dtype, queries, DIM), like(dtype, items, DIM), like(I64, queries)
        cases += [
            SassCase(
                name=f"rank_of_positive {queries}x{items} {kind(dtype)}",
                launch=partial(rank_of_positive.count_better, *rows, None, None),
                products={"_rank_of_positive_forward": 2.0 * queries * items * DIM},
                products_cost=cost_of(dtype),
            )
        ]
    return cases
