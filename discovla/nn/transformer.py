"""Pre-norm transformer blocks on sequences: the parts every tower and head is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from discovla.ops.attention import attention

Activation = Literal["quick_gelu", "gelu"]


@dataclass(frozen=True, kw_only=True)
class Sequences:
    """What blocks must know of the n sequences of l tokens they are given.

    causal: a token sees itself and earlier ones only.
    key_mask: n l, or n h l with one for each head, bool, true on tokens that may be seen; None where all may.
    group: how many neighbouring sequences (frames) make one sample whose parts look at each other in fusion
        blocks; 0 where every sequence stands alone.
    readout: n, int64, the row of each sequence that is read at the end (CLS or EOT).
    fusion_key_mask: n l, bool, the tokens that may be seen across the group.
    """

    causal: bool = False
    key_mask: Tensor | None = None
    group: int = 0
    readout: Tensor | None = None
    fusion_key_mask: Tensor | None = None


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


class Linear(nn.Linear):
    """A linear map that computes in its input's dtype, whatever its weights are stored in."""

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return F.linear(input, self.weight.to(input.dtype), bias)


class LayerNorm(nn.LayerNorm):
    """Layer norm in float32 at least; the result has the input's dtype."""

    def forward(self, input: Tensor) -> Tensor:
        work = torch.promote_types(input.dtype, torch.float32)
        weight, bias = self.weight.to(work), self.bias.to(work)
        return F.layer_norm(input.to(work), self.normalized_shape, weight, bias, self.eps).to(input.dtype)


def quick_gelu(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x), OpenAI CLIP's activation."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"quick_gelu": quick_gelu, "gelu": F.gelu}


class Attention(nn.Module):
    """Multi-head self-attention with one fused, biased qkv projection (rows ordered q, k, v).

    `lora`, where set, is a module of the same input and output that is added to the projection.
    """

    def __init__(self, shape: BlockShape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.qkv = Linear(shape.width, 3 * shape.width)
        self.out = Linear(shape.width, shape.width)
        self.lora: nn.Module | None = None

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of n l w, each n h l c."""
        qkv = self.qkv(x)
        if self.lora is not None:
            qkv = qkv + self.lora(x)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # 3 n h l c
        return q, k, v

    def merge(self, heads: Tensor) -> Tensor:
        """Heads n h l c back to rows, through the output projection: n l w."""
        return self.out(heads.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, sequences: Sequences) -> Tensor:
        return self.merge(attend(*self.project(x), sequences))


def attend(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences) -> Tensor:
    """Attention within each sequence, n h l c."""
    mask = sequences.key_mask
    if mask is not None:
        mask = (mask[:, None] if mask.dim() == 2 else mask)[:, :, None]  # n h|1 1 l
    return attention(q, k, v, mask=mask, causal=sequences.causal)


class MLP(nn.Module):
    """down(activation(up x))."""

    def __init__(self, shape: BlockShape) -> None:
        super().__init__()
        self.up = Linear(shape.width, shape.mlp_width)
        self.down = Linear(shape.mlp_width, shape.width)
        self.activation = ACTIVATIONS[shape.activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))


class Block(nn.Module):
    """x + attention(ln_1 x), then x + mlp(ln_2 x), on n l w."""

    def __init__(self, shape: BlockShape, attention: Attention | None = None) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(shape.width, eps=shape.eps)
        self.attention = Attention(shape) if attention is None else attention
        self.ln_2 = LayerNorm(shape.width, eps=shape.eps)
        self.mlp = MLP(shape)

    def forward(self, x: Tensor, sequences: Sequences) -> Tensor:
        x = x + self.attention(self.ln_1(x), sequences)
        return x + self.mlp(self.ln_2(x))
