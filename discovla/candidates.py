"""The ops of a training run at its sizes, as cases whose implementations `tune` measures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from discovla.methods.base import Method
from discovla.nn.block import Block, BlockShape, run_blocks
from discovla.nn.layers import Linear
from discovla.nn.layout import SequenceLayout
from discovla.nn.lora import LoRA
from discovla.ops import dispatch
from discovla.ops.cases import Case, case
from discovla.ops.short_attention import Packing
from discovla.ops.tower_cases import TOKENS, TowerCase, packed_captions, row_case, sequence_case

CHECKED_ROWS = 2048  # float64 is slow on most GPUs, so a smaller case is checked
CHECKED_PAIRS = 24


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A case of a run, the smaller one that is checked, and the implementation that `auto` has by default.

    calls: of the op in a step.
    """

    case: Case
    checked: Case
    default: str
    calls: int = 1

    @property
    def cost(self) -> float:
        """Seconds in a step that no implementation falls short of, on a GPU of 800 TFLOP/s and 4 TB/s."""
        moved = sum(self.case.dtype.itemsize * math.prod(shape) for shape in self.case.shapes)
        return self.calls * (self.case.flops / 8e14 + 4 * moved / 4e12)


def planned(
    make: Callable[..., Case], n: int, checked: int, *args: Any, calls: int = 1, **options: Any
) -> Planned:
    """Plan the case make(n, ...), checked at a smaller size."""
    whole = make(n, *args, **options)
    default = dispatch.AUTO.get(whole.op, {}).get("cuda", "reference")
    few = make(min(n, checked), *args, **options)
    return Planned(case=whole, checked=few, default=default, calls=calls)


def cases_of_run(method: Method, pairs: int, frames: int, context_length: int) -> list[Planned]:
    """Return the cases of a training step, those that cost most first, and blocks last, after their ops.

    Args:
        pairs: of a process in a step.  frames: of a clip.  context_length: most tokens of a caption.
    """
    a, config, dtype = method.architecture, method.config, method.compute_dtype
    captions = pairs * (1 + frames) if method.needs_frame_captions else pairs
    lora = any(isinstance(module, LoRA) for module in method.modules())
    fp8 = any(isinstance(module, Linear) and module.fp8_bits is not None for module in method.modules())
    half: dict[str, Any] = {"dtype": dtype}
    ops: list[Planned] = []
    blocks: list[Planned] = []
    class_row = a.frames.class_row
    for tower, n, rows, packed, fused in (
        (a.vision, pairs * frames, class_row + a.patches, False, class_row * config.fused_vision_blocks),
        (a.text, captions, min(TOKENS, context_length), True, config.fused_text_blocks),
    ):
        w, heads, layers = tower.width, tower.heads, tower.layers
        few = max(1, CHECKED_ROWS // rows)
        row_ops = {
            "fp8_linear" if fp8 else "mlp": layers,
            "lora_norm" if lora else "layer_norm": layers,
            "fusion_norm": fused,
        }
        row_ops["layer_norm"] = row_ops.get("layer_norm", 0) + layers - fused
        for op, calls in row_ops.items():
            make = partial_case(row_case, op)
            ops.append(planned(make, n * rows, CHECKED_ROWS, w, calls=calls, **half))
        last = int(packed or a.frames.pool == "class")  # the last block computes the readout row alone
        fusing = max(0, fused - last)
        sequence_ops = {"short_attention": layers - fusing - last, "temporal_fusion": fusing}
        sequence_ops |= {"readout_attention": last, "attention": 0 if packed else layers - last}
        for op, calls in sequence_ops.items():
            make = partial_case(sequence_case, op)
            ops.append(planned(make, n, few, rows, w, heads, packed=packed, calls=calls, **half))
        shape = {"rows": rows, "width": w, "heads": heads, "hidden": tower.mlp_width, "packed": packed}
        blocks.append(planned(block_case, n, few, lora=lora, **shape, **half))
    ops += [
        planned(partial_case(make, op), pairs, CHECKED_PAIRS, **options, dtype=torch.float32)
        for make, op, options in _heads(method, frames, context_length)
    ]
    distinct = {x.case.name: x for x in ops if x.calls}
    return [*sorted(distinct.values(), key=lambda x: -x.cost), *blocks]


def _heads(
    method: Method, frames: int, context_length: int
) -> Iterator[tuple[Callable[..., Case], str, dict[str, Any]]]:
    """Yield the function that makes a case, the op and the sizes of what follows the towers."""
    config, dim = method.config, {"dim": method.architecture.embed_dim}
    if method.scores_pooled:
        yield row_case, "unit_mean", {"frames": frames, **dim}
    elif (op := method.token_op) is not None:
        yield case, op, {"frames": method.token_rows(context_length, frames), **dim}
    if method.needs_frame_captions:
        yield case, "alignment_losses", {"frames": (frames, frames), **dim}
    elif method.scores_pooled:
        yield case, "sigmoid_loss" if config.loss == "sigmoid" else "info_nce", dim


def partial_case(make: Callable[..., Case], op: str) -> Callable[..., Case]:
    """Return a function of the size n and the rest that makes a case of one op."""
    return lambda n, *args, **options: make(op, n, *args, **options)


@dataclass(frozen=True, kw_only=True)
class BlockCase(TowerCase):
    """A transformer block, frozen but for its LoRA, whose gradients are compared too."""

    shape: BlockShape
    packed: bool
    lora: bool

    @property
    def limits(self) -> tuple[float, float]:
        value, gradient = super().limits  # of one op
        return 2 * value, 2 * gradient

    def run(self, leaves: list[Tensor], impl: Any) -> list[Tensor]:
        generator = torch.Generator(leaves[0].device).manual_seed(1)
        noise = torch.randn(leaves[0].shape, generator=generator, device=leaves[0].device)
        return self._gradients(leaves, impl, noise.to(torch.bfloat16).to(leaves[0].dtype))

    def step(self, leaves: list[Tensor], impl: Any) -> list[Tensor]:
        return self._gradients(leaves, impl, torch.ones_like(leaves[0]))

    def _gradients(self, leaves: list[Tensor], impl: Any, direction: Tensor) -> list[Tensor]:
        x = leaves[0]
        block = _block(self.shape, self.lora, x.dtype, x.device)
        out = self.call(leaves, impl, self.packed)
        trained = [p for p in block.parameters() if p.requires_grad]
        return [out.detach(), *torch.autograd.grad(out, [x, *trained], direction)]


@cache
def _block(shape: BlockShape, lora: bool, dtype: torch.dtype, device: torch.device) -> Block:
    """Make a block with weights that bf16 holds exactly."""
    torch.manual_seed(0)
    made = Block(shape).requires_grad_(False)
    if lora:
        made.attention.lora = LoRA(shape.width, 3 * shape.width, 8)
        nn.init.normal_(made.attention.lora.b, std=0.02)
    wide = torch.promote_types(dtype, torch.float32)
    for parameter in made.parameters():
        exact = parameter.data.to(torch.bfloat16)
        parameter.data = exact.to(device, wide if parameter.requires_grad else dtype)
    return made


def _run_block(
    leaves: list[Tensor], impl: Any, packed: bool, *, shape: tuple[BlockShape, bool, int]
) -> Tensor:
    x, (sizes, lora, n) = leaves[0], shape
    packing: Packing | None = packed_captions(n, x.device) if packed else None
    block = _block(sizes, lora, x.dtype, x.device)
    layout = SequenceLayout(causal=packed, packing=packing, impl=impl)
    rows = run_blocks(nn.ModuleList([block]), x, layout, readout_only=False)
    return rows[0] + rows[1] if isinstance(rows, tuple) else rows


def block_case(
    n: int, *, rows: int, width: int, heads: int, hidden: int, packed: bool, lora: bool, dtype: torch.dtype
) -> BlockCase:
    """Make a case of a block on n sequences of `rows` rows, or on packed captions."""
    shape = BlockShape(width=width, heads=heads, mlp_width=hidden)
    count = int(packed_captions(n, torch.device("cpu")).offsets[-1]) if packed else n * rows
    return BlockCase(
        op="block", call=partial(_run_block, shape=(shape, lora, n)), n=n, m=n, dim=width, rows=rows,
        products=24.0 * count * width**2 * 2, shapes=(((count, width) if packed else (n, rows, width)),),
        dtype=dtype, masked=packed, shape=shape, packed=packed, lora=lora,
    )  # fmt: skip
