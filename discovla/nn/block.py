"""Pre-norm transformer blocks on sequences: the parts every tower and head is made of.

A block is computed in one of two ways that `ops.dispatch` chooses between: in plain torch with backwards of
its own (`nn.recompute`), or as a chain of ops, all of one implementation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from discovla.nn.layers import ACTIVATIONS, LayerNorm, Linear, frozen, quick_gelu
from discovla.nn.layout import Rows, SequenceLayout
from discovla.nn.lora import LoRA
from discovla.nn.memory import checkpointed, recomputing
from discovla.nn.recompute import normed_lora_projection, quick_gelu_mlp, recompute_in_backward
from discovla.ops.attention import attention
from discovla.ops.dispatch import Impl, choose
from discovla.ops.fp8_mlp import FP8MLPWeights, fp8_mlp
from discovla.ops.fusion_norm import AdapterWeights
from discovla.ops.lora_norm import (
    LoRAWeights,
    lora_norm,
    lora_projection,
    lora_weights,
)
from discovla.ops.mlp import Activation, MLPWeights, mlp
from discovla.ops.readout_attention import Readout, readout_attention
from discovla.ops.readout_lora_norm import readout_lora_norm, readout_lora_projection
from discovla.ops.short_attention import short_attention

# rows, their update by attention, and of a fused block by ops the adapter of what follows the rows in it
Attended = tuple[Tensor, Tensor, AdapterWeights | None]


@dataclass(frozen=True, kw_only=True)
class BlockShape:
    """Sizes of one block: width, heads, width of the MLP, activation, epsilon of the layer norms."""

    width: int
    heads: int
    mlp_width: int
    activation: Activation = "quick_gelu"
    eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not divisible by heads {self.heads}")


class Attention(nn.Module):
    """Multi-head self-attention with one fused, biased qkv projection (rows ordered q, k, v).

    `lora`, where set, is a low-rank update of the projection.  Of the scores nothing is kept for backward,
    nor is the output: they are computed again from q, k and v.
    """

    fuses = False  # whether the sequences of a group see each other

    def __init__(self, shape: BlockShape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.qkv = Linear(shape.width, 3 * shape.width)
        self.out = Linear(shape.width, shape.width)
        self.lora: LoRA | None = None

    def forward(self, x: Tensor, sequences: SequenceLayout, norm: LayerNorm | None = None) -> Tensor:
        """The update of rows n l w or packed t w; in a pruned block that of the readout rows alone, n w.

        norm: what x has still to pass.
        """
        if sequences.pruned:
            return self.out(
                recompute_in_backward(
                    partial(self.attend_read, sequences), *self.project_read(x, sequences, norm)
                )
            )
        return self.out(self.attend_rows(self.project(x, norm), sequences, chosen(x, sequences)))

    def chain(
        self, rows: tuple[Tensor, Tensor | None], norm: LayerNorm, sequences: SequenceLayout, impl: Impl
    ) -> Attended:
        """`forward` of the norm of x + u by ops; rows: x, and u or None."""
        x, parts = self.projections(rows, norm, sequences, impl)
        if not sequences.pruned:
            return x, self.out(self.attend_rows(parts[0], sequences, impl)), None
        return x, self.out(self.read_rows(parts, sequences, impl)), None

    def projections(
        self, rows: tuple[Tensor, Tensor | None], norm: LayerNorm, sequences: SequenceLayout, impl: Impl
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """x + u, and what `project` gives of its norm; in a pruned block readout rows and `project_read`."""
        (x, u), width = rows, self.qkv.in_features
        if not self.updated_by_op(norm):
            x, y = norm.of_sum(x, u, impl)
            if not sequences.pruned:
                return x, (self.project_normed(y),)
            queries = self.project_normed(sequences.read(y), slice(0, width))
            return sequences.read(x), (queries, self.project_normed(y, slice(width, 3 * width)))
        weights = sequences.lora.get(self)
        if weights is None:
            weights = self.lora_weights([self], norm.compute or x.dtype, x[..., 0].numel(), impl)[0]
        how = {"affine": (norm.weight, norm.bias), "eps": norm.eps, "dtype": norm.compute, "impl": impl}
        if not sequences.pruned:
            x, z, low = lora_norm(x, weights.a, u, **how)
            return x, (lora_projection(z, low, weights),)
        readout_rows, readout_index = sequences.ends(x.shape[1]), sequences.slots(x)
        x, z, low, read = readout_lora_norm(x, weights.a, u, readout_rows, readout_index, **how)
        return x, readout_lora_projection(z, low, read, weights)

    def updated_by_op(self, norm: LayerNorm) -> bool:
        """Whether `lora_norm` and `lora_projection` compute the projection of the norm's rows."""
        return self.lora is not None and plain(norm, self.qkv)

    @staticmethod
    def lora_weights(
        parts: Sequence[Attention], dtype: torch.dtype, rows: int, impl: Impl
    ) -> list[LoRAWeights]:
        """What the ops take of the updates of several blocks, put together at once; they all have one."""
        loras = [(part.lora.a, part.lora.b) for part in parts if part.lora is not None]
        linears = [part.qkv.weights(dtype) for part in parts]
        return lora_weights(linears, loras, rows=rows, dtype=dtype, impl=impl)

    def read_rows(
        self, parts: tuple[Tensor, ...], sequences: SequenceLayout, impl: Impl, position: Tensor | None = None
    ) -> Tensor:
        """`readout_attention` of what `projections` gave; masks of single heads have no kernel."""
        (q, kv), mask = parts, sequences.key_mask
        if mask is not None and mask.dim() == 3:
            if self.fuses and sequences.group:
                raise ValueError("key_mask: expected one for all heads in a block that fuses, found n h l")
            return recompute_in_backward(partial(self.attend_read, sequences), q, kv)
        readout = Readout(
            heads=self.heads,
            rows=sequences.ends(kv.shape[1]),
            group=sequences.group if self.fuses else 0,
            ungrouped=sequences.alone,
            packing=sequences.packing,
            causal=sequences.causal,
            key_mask=sequences.of_rows(mask),
            group_mask=sequences.of_rows(sequences.fusion_key_mask),
        )
        return readout_attention(q, kv, readout, position=position, impl=impl)

    def attend_rows(self, qkv: Tensor, sequences: SequenceLayout, impl: Impl) -> Tensor:
        """`attend`, of which q, k and v alone are kept for backward; masks of single heads have no kernel."""
        mask = sequences.key_mask
        if impl == "torch" or (mask is not None and mask.dim() == 3):
            return recompute_in_backward(partial(self.attend, sequences), qkv)
        seen, packing, causal = sequences.of_rows(mask), sequences.packing, sequences.causal
        return short_attention(qkv, self.heads, packing=packing, causal=causal, key_mask=seen, impl=impl)

    def project(self, x: Tensor, norm: LayerNorm | None = None) -> Tensor:
        """Queries, keys and values of every row, side by side: as x, but 3 w wide."""
        if self.lora is not None and norm is not None and plain(norm, self.qkv):
            dtype = norm.compute or x.dtype
            lora = self.lora.a.to(dtype), self.lora.b.to(dtype)
            return normed_lora_projection(
                x, (norm.weight, norm.bias, norm.eps), self.qkv.weights(dtype), lora
            )
        return self.project_normed(x if norm is None else norm(x))

    def project_normed(self, y: Tensor, outputs: slice | None = None) -> Tensor:
        """The projection of normed rows with its update added, or those `outputs` of it."""
        qkv = self.qkv(y, outputs)
        return qkv if self.lora is None else qkv + self.lora(y, outputs)

    def project_read(
        self, x: Tensor, sequences: SequenceLayout, norm: LayerNorm | None = None
    ) -> tuple[Tensor, Tensor]:
        """Queries of the readout rows, n w; keys and values of every row, side by side."""
        y = x if norm is None else norm(x)
        width = x.shape[-1]
        queries = self.project_normed(sequences.read(y), slice(0, width))
        return queries, self.project_normed(y, slice(width, 3 * width))

    def attend(self, sequences: SequenceLayout, qkv: Tensor) -> Tensor:
        """Attention within each sequence of what `project` gives, before the output projection."""
        q, k, v = self.split(sequences.pad(qkv))  # n h l c
        return sequences.unpad(join_heads(attend(q, k, v, sequences)))

    def attend_read(self, sequences: SequenceLayout, q: Tensor, kv: Tensor) -> Tensor:
        """The same of what `project_read` gives, n w."""
        k, v = self.split(sequences.pad(kv))  # n h l c
        queries = self.split(q[:, None])[0]  # n h 1 c
        return join_heads(attention(queries, k, v, mask=sequences.seen_by_readout(k.shape[2])))[:, 0]

    def split(self, x: Tensor) -> list[Tensor]:
        """What stands side by side in rows n l (k w): k tensors n h l c."""
        parts = x.unflatten(-1, (-1, self.heads, self.qkv.in_features // self.heads))  # n l k h c
        return [part.transpose(1, 2) for part in parts.unbind(2)]


def plain(*modules: nn.Module) -> bool:
    """Whether one op may compute with their weights and others': they are frozen, and none is in FP8."""
    return frozen(*modules) and not any(isinstance(m, Linear) and m.fp8 is not None for m in modules)


def attend(q: Tensor, k: Tensor, v: Tensor, sequences: SequenceLayout) -> Tensor:
    """Attention within each sequence, n h l c."""
    return attention(q, k, v, mask=sequences.keys, causal=sequences.causal)


def join_heads(x: Tensor) -> Tensor:
    """n h l c -> n l w."""
    return x.transpose(1, 2).flatten(2)


class MLP(nn.Module):
    """down(activation(up x))."""

    def __init__(self, shape: BlockShape) -> None:
        super().__init__()
        self.up = Linear(shape.width, shape.mlp_width)
        self.down = Linear(shape.mlp_width, shape.width)
        self.kind: Activation = shape.activation
        self.activation = ACTIVATIONS[shape.activation]

    def forward(self, x: Tensor) -> Tensor:
        up, down = self.up.fp8, self.down.fp8
        if up is not None and down is not None:
            weights = FP8MLPWeights(up=up, up_bias=self.up.bias, down=down, down_bias=self.down.bias)
            needed, impl = not recomputing(), self.up.fp8_impl
            return fp8_mlp(x, weights, activation=self.kind, output_needed=needed, impl=impl)
        if self.activation is quick_gelu and plain(self.up, self.down):
            weights = self.up.weights(x.dtype), self.down.weights(x.dtype)
            return quick_gelu_mlp(x, *weights, needed=not recomputing())
        return self.down(self.activation(self.up(x)))

    def chain(self, x: Tensor, impl: Impl) -> Tensor:
        """`forward` by the op, which knows no FP8."""
        if self.up.fp8 is not None or self.down.fp8 is not None:
            return self(x)
        up, down = self.up.weights(x.dtype), self.down.weights(x.dtype)
        weights = MLPWeights(up=up[0], up_bias=up[1], down=down[0], down_bias=down[1])
        return mlp(x, weights, activation=self.kind, output_needed=not recomputing(), impl=impl)


class Block(nn.Module):
    """x + attention(ln_1 x), then x + mlp(ln_2 x), on n l w or packed t w; a pruned one gives n w.

    Where its layer norms have a `compute` dtype, x is float32 at least and what is added to it is of that.
    """

    def __init__(self, shape: BlockShape, attention: Attention | None = None) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(shape.width, eps=shape.eps)
        self.attention = Attention(shape) if attention is None else attention
        self.ln_2 = LayerNorm(shape.width, eps=shape.eps)
        self.mlp = MLP(shape)

    def forward(self, x: Rows, sequences: SequenceLayout) -> Rows:
        """The rows after the block; as x and what is still to be added to it where that is `deferred`."""
        impl = chosen(x[0] if isinstance(x, tuple) else x, sequences)
        rows, update = x if isinstance(x, tuple) else (x, None)
        if self.ln_1.compute is not None:
            rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        attend, feed = partial(self.attend, sequences, impl), partial(self.feed, sequences, impl)
        match sequences.memory:
            case "recompute_mlp":
                return checkpointed(added(feed), *attend(rows, update))
            case "recompute_projections":
                return checkpointed(added(feed), *checkpointed(attend, rows, update))
            case "recompute_blocks":
                return checkpointed(lambda rows, update: added(feed)(*attend(rows, update)), rows, update)
        x, update = feed(*attend(rows, update))
        return (x, update) if sequences.deferred and impl != "torch" else x + update

    def attend(self, sequences: SequenceLayout, impl: Impl, x: Tensor, u: Tensor | None) -> Attended:
        """x + u, and attention's update of it."""
        if impl != "torch":
            return self.attention.chain((x, u), self.ln_1, sequences, impl)
        x = x if u is None else x + u
        update = self.attention(x, sequences, self.ln_1)
        return (sequences.read(x) if sequences.pruned else x), update, None

    def feed(
        self, sequences: SequenceLayout, impl: Impl, x: Tensor, update: Tensor, adapter: AdapterWeights | None
    ) -> tuple[Tensor, Tensor]:
        """The sum of what `attend` gives, and the MLP's update of it."""
        if impl == "torch":
            x = x + update
            return x, self.mlp(self.ln_2(x))
        if adapter is None:
            x, y = self.ln_2.of_sum(x, update, impl)
        else:
            slots = sequences.slots(x), sequences.alone
            x, y = self.ln_2.of_fusion(x, (update, adapter), slots, impl)
        return x, self.mlp.chain(y, impl)


def added(feed: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., Tensor]:
    """The sum of the two that `feed` gives."""

    def total(*parts: Tensor | None) -> Tensor:
        x, update = feed(*parts)
        return x + update

    return total


def prepared(sequences: SequenceLayout, blocks: Iterable[nn.Module], x: Tensor) -> SequenceLayout:
    """The same for rows x of these blocks, whose updates are put together once where ops compute them."""
    impl = chosen(x, sequences)
    blocks = [b for b in blocks if isinstance(b, Block) and b.attention.updated_by_op(b.ln_1)]
    if impl == "torch" or not blocks:
        return sequences
    parts, dtype = [block.attention for block in blocks], blocks[0].ln_1.compute or x.dtype
    weights = Attention.lora_weights(parts, dtype, x[..., 0].numel(), impl)
    return replace(sequences, lora=dict(zip(parts, weights, strict=True)))


def chosen(x: Tensor, sequences: SequenceLayout) -> Impl:
    """What computes blocks on these rows.

    Raises:
        KernelUnavailable: the implementation asked for by name cannot run here.
    """
    return cast(Impl, choose("block", sequences.impl, x.device.type, operands=(x,)))
