"""The pre-norm transformer block of CLIP: attention and MLP, each on a layer norm of the residual stream.

`Block.forward` is the whole data flow.  Each step it calls (`Attention.project`, `Attention.attend`,
`LayerNorm.add`, `MLP`) is computed by the implementation that the layout names: "torch" is plain torch with
backwards that recompute (`nn.recompute`, `nn.padded_attention`), the others are ops (`discovla.ops`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from discovla.nn import padded_attention
from discovla.nn.layers import (
    ACTIVATIONS,
    BlockActivation,
    LayerNorm,
    LayerScale,
    Linear,
    ReadoutAdapter,
    UnbiasedKeys,
    frozen_unquantised,
)
from discovla.nn.layout import Residual, SequenceLayout, TokenMerge
from discovla.nn.lora import LoRA
from discovla.nn.memory import in_memory_mode, recomputing
from discovla.nn.recompute import normed_lora_projection, quick_gelu_mlp
from discovla.nn.rotation import rotate
from discovla.ops.dispatch import Impl, compiled, warn_once
from discovla.ops.fp8_mlp import FP8MLPWeights, fp8_mlp
from discovla.ops.lora_norm import LoRAWeights, lora_norm, lora_projection, lora_weights
from discovla.ops.mlp import MLPWeights, mlp
from discovla.ops.readout_attention import Readout, readout_attention
from discovla.ops.readout_lora_norm import readout_lora_norm, readout_lora_projection
from discovla.ops.short_attention import short_attention

# queries, keys and values side by side, n l 3w or t 3w; in a last block the queries of the readout rows, n w,
# and keys and values of all rows, n l 2w or t 2w
QKV = Tensor | tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class BlockShape:
    """Sizes of one block: width, heads, width of the MLP, activation, epsilon of the layer norms.

    key_bias: False for keys without a bias (EVA).
    inner_norm: True for norms of what the output projection and the second layer of the MLP read (EVA-02).
    layer_scale: True for a trained factor of each channel of both updates.
    """

    width: int
    heads: int
    mlp_width: int
    activation: BlockActivation = "quick_gelu"
    eps: float = 1e-5
    key_bias: bool = True
    inner_norm: bool = False
    layer_scale: bool = False

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not divisible by heads {self.heads}")


class Block(nn.Module):
    """x + attention(ln_1 x), then x + mlp(ln_2 x), on rows n l w or t w; a last block returns n w.

    If its norms have a `compute_dtype`, x is float32 at least, and the updates are of that dtype.
    """

    def __init__(self, shape: BlockShape, attention: Attention | None = None) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(shape.width, eps=shape.eps)
        self.attention = Attention(shape) if attention is None else attention
        self.ln_2 = LayerNorm(shape.width, eps=shape.eps)
        self.mlp = MLP(shape)

    def forward(self, x: Residual, layout: SequenceLayout) -> Any:
        """Return the rows after the block.

        With `layout.defer_update`: the rows and their last update.  With `layout.merge`: the rows left, and
        `TokenMerge` with their sizes.
        """
        layout = layout.resolve(x)
        merge = layout.merge

        def attention(x: Tensor, update: Tensor | None) -> tuple[Tensor, ...]:
            x, qkv = self.attention.project(x, update, self.ln_1, layout)
            keys = () if merge is None else (self.attention.mean_keys(qkv),)
            return x, self.attention.attend(self.attention.rotated(qkv, layout), layout), *keys

        def mlp(x: Tensor, update: Tensor, *keys: Tensor) -> Residual | tuple[Tensor, TokenMerge]:
            if merge is not None:
                x, after = merge.apply(x + update, *keys, impl=layout.impl)
                x, y = self.ln_2.add(x, None, layout.impl)
                return x + self.mlp(y, layout.impl), after
            x, y = self.ln_2.add(x, update, layout.impl, self.attention.readout_adapter(x, layout))
            update = self.mlp(y, layout.impl)
            return (x, update) if layout.defer_update else x + update

        x, update = x if isinstance(x, tuple) else (x, None)
        if self.ln_1.compute_dtype is not None:
            x = x.to(torch.promote_types(x.dtype, torch.float32))
        return in_memory_mode(layout.memory, attention, mlp, x, update)


def run_blocks(
    blocks: nn.ModuleList, x: Tensor, layout: SequenceLayout, *, readout_only: bool = True
) -> Residual:
    """Rows after all blocks of a tower, before its final norm; with readout_only the readout rows alone."""
    run = _run_block
    if layout.compiles(x):
        run, x = compiled(_run_block), layout.for_compile(x)
    layout = with_lora_weights(layout.resolve(x), list(blocks), x)
    defer = layout.impl != "torch" and layout.memory == "keep"
    inner = replace(layout, defer_update=defer)
    last = replace(layout, readout_only=readout_only, defer_update=defer and readout_only)
    rows: Residual = x
    for block in blocks[:-1]:
        rows = run(block, rows, inner)
    return run(blocks[-1], rows, last)


def _run_block(block: nn.Module, rows: Residual, layout: SequenceLayout) -> Residual:
    return block(rows, layout)


def with_lora_weights(layout: SequenceLayout, blocks: Sequence[nn.Module], x: Tensor) -> SequenceLayout:
    """Add the LoRA of all blocks as kernels take it, made in as many launches as that of one block."""
    updated = [b for b in blocks if isinstance(b, Block) and b.attention.fuses_lora(b.ln_1)]
    if layout.impl == "torch" or not updated:
        return layout
    attentions, dtype = [block.attention for block in updated], updated[0].ln_1.result_dtype(x)
    weights = Attention.lora_weights(attentions, dtype, x, layout.impl)
    return replace(layout, lora_weights=dict(zip(attentions, weights, strict=True)))


class Attention(nn.Module):
    """Multi-head self-attention with one biased projection to queries, keys and values, in that order.

    `lora`, if set, is a low-rank update of that projection.  Backward recomputes scores and outputs from q, k
    and v.
    """

    fuses = False  # True if the sequences of a group see each other

    def __init__(self, shape: BlockShape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.qkv = (Linear if shape.key_bias else UnbiasedKeys)(shape.width, 3 * shape.width)
        self.ln_inner = LayerNorm(shape.width, eps=shape.eps) if shape.inner_norm else None
        self.out = Linear(shape.width, shape.width)
        self.layer_scale = LayerScale(shape.width) if shape.layer_scale else None
        self.lora: LoRA | None = None

    def forward(self, y: Tensor, layout: SequenceLayout) -> Tensor:
        """Attention of normed rows y, n l w or t w, as an update of the same shape."""
        return self.attend(self.project_normed(y), layout.resolve(y))

    def project(
        self, x: Tensor, update: Tensor | None, norm: LayerNorm, layout: SequenceLayout
    ) -> tuple[Tensor, QKV]:
        """Return x + update (of the readout rows only in a last block) and the projection of its norm."""
        if self.fuses_lora(norm) and not (layout.impl == "torch" and layout.readout_only):
            return self._project_with_lora(x, update, norm, layout)
        x, y = norm.add(x, update, layout.impl)
        if not layout.readout_only:
            return x, self.project_normed(y)
        width = x.shape[-1]
        q = self.project_normed(layout.read(y), slice(0, width))
        return layout.read(x), (q, self.project_normed(y, slice(width, 3 * width)))

    def project_normed(self, y: Tensor, outputs: slice | None = None) -> Tensor:
        """The projection of normed rows, LoRA included; `outputs` selects some of its columns."""
        qkv = self.qkv(y, outputs)
        return qkv if self.lora is None else qkv + self.lora(y, outputs)

    def mean_keys(self, qkv: QKV) -> Tensor:
        """Mean over heads of the keys, n l c, without gradient: the metric by which tokens merge."""
        assert isinstance(qkv, Tensor), "a last block that returns readout rows alone merges nothing"
        width = qkv.shape[-1] // 3
        return qkv.detach()[..., width : 2 * width].unflatten(-1, (self.heads, -1)).mean(-2)

    def fuses_lora(self, norm: LayerNorm) -> bool:
        """Return True if norm, projection and LoRA are computed together."""
        return self.lora is not None and frozen_unquantised(norm, self.qkv)

    def _project_with_lora(
        self, x: Tensor, update: Tensor | None, norm: LayerNorm, layout: SequenceLayout
    ) -> tuple[Tensor, QKV]:
        """`project` with norm, projection and LoRA in one function."""
        dtype, affine = norm.result_dtype(x), (norm.weight, norm.bias)
        if layout.impl == "torch":
            assert self.lora is not None, "fuses_lora"
            x = x if update is None else x + update
            lora = self.lora.a.to(dtype), self.lora.b.to(dtype)
            return x, normed_lora_projection(x, (*affine, norm.eps), self.qkv.weights(dtype), lora)
        weights = layout.lora_weights.get(self)
        if weights is None:
            weights = self.lora_weights([self], dtype, x, layout.impl)[0]
        options = {"affine": affine, "eps": norm.eps, "dtype": dtype, "impl": layout.impl}
        if not layout.readout_only:
            x, z, low = lora_norm(x, weights.a, update, **options)
            return x, lora_projection(z, low, weights)
        readout_rows, readout_index = layout.readout_rows(x.shape[1]), layout.readout_index(x)
        x, z, low, z_readout = readout_lora_norm(x, weights.a, update, readout_rows, readout_index, **options)
        return x, readout_lora_projection(z, low, z_readout, weights)

    @staticmethod
    def lora_weights(
        attentions: Sequence[Attention], dtype: torch.dtype, x: Tensor, impl: Impl
    ) -> list[LoRAWeights]:
        """The projections and LoRA of several blocks as kernels take them, for rows x; all have LoRA."""
        loras = [(part.lora.a, part.lora.b) for part in attentions if part.lora is not None]
        linears = [part.qkv.weights(dtype) for part in attentions]
        return lora_weights(linears, loras, x=x, dtype=dtype, impl=impl)

    def rotated(self, qkv: QKV, layout: SequenceLayout) -> QKV:
        """Turn queries and keys by the layout's rotary embedding, if it has one."""
        if layout.rotation is None:
            return qkv
        if isinstance(qkv, tuple):  # queries of the readout rows, which are not turned
            return qkv[0], rotate(qkv[1], self.heads, layout.rotation, parts=1)
        return rotate(qkv, self.heads, layout.rotation, parts=2)

    def attend(self, qkv: QKV, layout: SequenceLayout) -> Tensor:
        """Attention within each sequence and the output projection, n l w or t w; in a last block n w."""
        if isinstance(qkv, tuple):
            return self.output(self._attend_readout(*qkv, layout))
        return self.output(self._attend(qkv, layout))

    def output(self, heads: Tensor) -> Tensor:
        """Map the results of all heads, ... w, to an update of the residual stream."""
        update = self.out(heads if self.ln_inner is None else self.ln_inner(heads))
        return update if self.layer_scale is None else self.layer_scale(update)

    def _attend(self, qkv: Tensor, layout: SequenceLayout) -> Tensor:
        impl = layout.attention_impl
        if impl == "torch":
            return padded_attention.self_attention(qkv, self.heads, layout)
        return short_attention(
            qkv,
            self.heads,
            packing=layout.packing,
            causal=layout.causal,
            key_mask=layout.mask_rows(layout.key_mask),
            key_sizes=layout.mask_rows(layout.key_sizes),
            impl=impl,
        )

    def _attend_readout(self, q: Tensor, kv: Tensor, layout: SequenceLayout) -> Tensor:
        if layout.readout_impl == "torch":
            return padded_attention.readout_attention(q, kv, self.heads, layout)
        return readout_attention(q, kv, self.readout(kv, layout), impl=layout.impl)

    def readout(self, kv: Tensor, layout: SequenceLayout) -> Readout:
        """The layout as the kernel of a last block takes it."""
        return Readout(
            heads=self.heads,
            rows=layout.readout_rows(kv.shape[1]),
            group=layout.group if self.fuses else 0,
            ungrouped=layout.ungrouped,
            packing=layout.packing,
            causal=layout.causal,
            key_mask=layout.mask_rows(layout.key_mask),
            group_mask=layout.mask_rows(layout.fusion_key_mask),
        )

    def readout_adapter(self, x: Tensor, layout: SequenceLayout) -> ReadoutAdapter | None:
        """The adapter that is applied while the update of `attend` is added to x; None for none."""
        return None


class MLP(nn.Module):
    """down(activation(up y)).

    With "swiglu", `up` gives a gate and a value side by side, and the activation is silu(gate) value.
    """

    def __init__(self, shape: BlockShape) -> None:
        super().__init__()
        gated = shape.activation == "swiglu"
        self.up = Linear(shape.width, shape.mlp_width * (2 if gated else 1))
        self.ln_inner = LayerNorm(shape.mlp_width, eps=shape.eps) if shape.inner_norm else None
        self.down = Linear(shape.mlp_width, shape.width)
        self.layer_scale = LayerScale(shape.width) if shape.layer_scale else None
        self.activation: BlockActivation = shape.activation

    def forward(self, y: Tensor, impl: Impl = "torch") -> Tensor:
        update = self._update(y, impl)
        return update if self.layer_scale is None else self.layer_scale(update)

    def _update(self, y: Tensor, impl: Impl) -> Tensor:
        activation, up, down = self.activation, self.up.fp8, self.down.fp8
        if self.ln_inner is not None or activation in ("gelu_tanh", "swiglu"):
            if impl != "torch":
                warn_once(f"mlp: plain torch instead of the kernel: it has no {activation} or no inner norm")
            hidden = ACTIVATIONS[activation](self.up(y))
            return self.down(hidden if self.ln_inner is None else self.ln_inner(hidden))
        options = {"activation": activation, "output_needed": not recomputing()}
        if up is not None and down is not None:
            fp8_weights = FP8MLPWeights(up=up, up_bias=self.up.bias, down=down, down_bias=self.down.bias)
            return fp8_mlp(y, fp8_weights, impl=self.up.fp8_impl, **options)
        if impl != "torch" and up is None and down is None:
            (up, up_bias), (down, down_bias) = self.up.weights(y.dtype), self.down.weights(y.dtype)
            weights = MLPWeights(up=up, up_bias=up_bias, down=down, down_bias=down_bias)
            return mlp(y, weights, impl=impl, **options)
        if activation == "quick_gelu" and frozen_unquantised(self.up, self.down):
            weights = self.up.weights(y.dtype), self.down.weights(y.dtype)
            return quick_gelu_mlp(y, *weights, output_needed=not recomputing())
        return self.down(ACTIVATIONS[activation](self.up(y)))
