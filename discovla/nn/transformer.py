"""Pre-norm transformer blocks on sequences: the parts every tower and head is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from discovla.nn.autograd import (
    SLOPE,
    normed_lora_projection,
    pad_rows,
    quick_gelu_mlp,
    recomputed,
    take_rows,
)
from discovla.nn.lora import LoRA
from discovla.ops.attention import attention

Activation = Literal["quick_gelu", "gelu"]


@dataclass(frozen=True, kw_only=True)
class Packing:
    """Where the t real tokens of n sequences are, whose rows are stored end to end without padding.

    places: n l, int64, the row of each token, l the longest sequence; at padding that of the last token.
    real: n l, bool, false at padding, which comes last.
    rows: t, int64, the inverse of places: where in the flattened n l each row's token is.
    """

    places: Tensor
    real: Tensor
    rows: Tensor

    @staticmethod
    def of(kept: Tensor) -> Packing:
        """Of the tokens to keep, n k, bool, one in each sequence at least."""
        lengths = kept.sum(1)
        place = torch.arange(int(lengths.max()), device=kept.device)
        starts = lengths.cumsum(0) - lengths
        places = starts[:, None] + torch.minimum(place, lengths[:, None] - 1)
        real = place < lengths[:, None]
        return Packing(places=places, real=real, rows=real.flatten().nonzero()[:, 0])

    def to(self, device: torch.device) -> Packing:
        """The same on `device`."""
        return Packing(places=self.places.to(device), real=self.real.to(device), rows=self.rows.to(device))


@dataclass(frozen=True, kw_only=True)
class Sequences:
    """What blocks must know of the n sequences of l tokens they are given: as n l w, or packed as t w.

    causal: a token sees itself and earlier ones only.
    key_mask: n l, or n h l with one for each head, bool, true on tokens that may be seen; None where all may.
    group: how many neighbouring sequences (frames) make one sample whose parts look at each other in fusion
        blocks; 0 where every sequence stands alone.
    readout: n, int64, the row of each sequence that is read at the end (CLS or EOT).
    fusion_key_mask: n l, bool, the tokens that may be seen across the group.
    packing: where rows are packed; n l, also of the masks, is then its own.
    pruned: the block is the last: it gives the rows that are read alone, n w.
    """

    causal: bool = False
    key_mask: Tensor | None = None
    group: int = 0
    readout: Tensor | None = None
    fusion_key_mask: Tensor | None = None
    packing: Packing | None = None
    pruned: bool = False

    def last(self) -> Sequences:
        """The same for the last block, of which only readout rows are needed."""
        return replace(self, pruned=True)

    def pad(self, x: Tensor) -> Tensor:
        """Rows as n l w."""
        return x if self.packing is None else pad_rows(x, self.packing.places, self.packing.rows)

    def unpad(self, x: Tensor) -> Tensor:
        """The inverse of `pad`."""
        return x if self.packing is None else take_rows(x.flatten(0, 1), self.packing.rows)

    def ends(self, length: int) -> Tensor:
        """n, int64: where the readout row of each sequence is among all rows; length: l of rows n l w."""
        if self.readout is None:
            raise ValueError("sequences.readout: expected the row to read of each sequence, got None")
        if self.packing is not None:
            return self.packing.places.gather(1, self.readout[:, None])[:, 0]
        return torch.arange(0, len(self.readout) * length, length, device=self.readout.device) + self.readout

    def read(self, x: Tensor) -> Tensor:
        """The readout rows n w of all rows; of a pruned block's output, which has no others, itself."""
        ends = self.ends(x.shape[1])
        if x.dim() == 2 and len(x) == len(ends):
            return x
        return take_rows(x.flatten(0, -2), ends)

    @property
    def keys(self) -> Tensor | None:
        """key_mask as scores n h l l are masked: n 1|h 1 l."""
        mask = self.key_mask
        return None if mask is None else (mask[:, None] if mask.dim() == 2 else mask)[:, :, None]

    def seen_by_readout(self, length: int) -> Tensor | None:
        """n 1|h 1 l, bool: the keys that the readout rows may see; None where they may see all."""
        if not self.causal:
            return self.keys
        assert self.readout is not None, "who asks has readout rows"
        earlier = torch.arange(length, device=self.readout.device) <= self.readout[:, None]
        earlier = earlier[:, None, None]  # n 1 1 l
        return earlier if self.keys is None else self.keys & earlier


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

    def forward(self, input: Tensor, outputs: slice | None = None) -> Tensor:
        """outputs: those that are wanted, where not all are."""
        weight, bias = self.weights(input.dtype)
        if outputs is not None:
            weight, bias = weight[outputs], bias[outputs]
        return F.linear(input, weight, bias)

    def weights(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Weight and bias in `dtype`."""
        return self.weight.to(dtype), self.bias.to(dtype)


class LayerNorm(nn.LayerNorm):
    """Layer norm in float32 at least; the result has the input's dtype."""

    def forward(self, input: Tensor) -> Tensor:
        if torch.promote_types(input.dtype, torch.float32) == input.dtype:
            return self.widened(input, self.weight, self.bias)
        return recomputed(self.widened, input, self.weight, self.bias)  # keeps no float32 copy of its input

    def widened(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """The norm in float32 at least."""
        work = torch.promote_types(x.dtype, torch.float32)
        y = F.layer_norm(x.to(work), self.normalized_shape, weight.to(work), bias.to(work), self.eps)
        return y.to(x.dtype)


def quick_gelu(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x), OpenAI CLIP's activation."""
    return F.silu(SLOPE * x) / SLOPE


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"quick_gelu": quick_gelu, "gelu": F.gelu}


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

    def forward(self, x: Tensor, sequences: Sequences, norm: LayerNorm | None = None) -> Tensor:
        """The update of rows n l w or packed t w; in a pruned block that of the readout rows alone, n w.

        norm: what x has still to pass.
        """
        if sequences.pruned:
            return self.out(
                recomputed(partial(self.attend_read, sequences), *self.project_read(x, sequences, norm))
            )
        return self.out(recomputed(partial(self.attend, sequences), self.project(x, norm)))

    def project(self, x: Tensor, norm: LayerNorm | None = None) -> Tensor:
        """Queries, keys and values of every row, side by side: as x, but 3 w wide."""
        if self.lora is not None and norm is not None and frozen(norm, self.qkv):
            lora = self.lora.a.to(x.dtype), self.lora.b.to(x.dtype)
            return normed_lora_projection(
                x, (norm.weight, norm.bias, norm.eps), self.qkv.weights(x.dtype), lora
            )
        y = x if norm is None else norm(x)
        return self.qkv(y) if self.lora is None else self.qkv(y) + self.lora(y)

    def project_read(
        self, x: Tensor, sequences: Sequences, norm: LayerNorm | None = None
    ) -> tuple[Tensor, Tensor]:
        """Queries of the readout rows, n w; keys and values of every row, side by side."""
        y = x if norm is None else norm(x)
        width = x.shape[-1]
        parts = (sequences.read(y), slice(0, width)), (y, slice(width, 3 * width))
        q, kv = (self.qkv(rows, part) for rows, part in parts)
        if self.lora is None:
            return q, kv
        low_q, low_kv = (self.lora(rows, part) for rows, part in parts)
        return q + low_q, kv + low_kv

    def attend(self, sequences: Sequences, qkv: Tensor) -> Tensor:
        """Attention within each sequence of what `project` gives, before the output projection."""
        q, k, v = self.split(sequences.pad(qkv))  # n h l c
        return sequences.unpad(join_heads(attend(q, k, v, sequences)))

    def attend_read(self, sequences: Sequences, q: Tensor, kv: Tensor) -> Tensor:
        """The same of what `project_read` gives, n w."""
        k, v = self.split(sequences.pad(kv))  # n h l c
        queries = self.split(q[:, None])[0]  # n h 1 c
        return join_heads(attention(queries, k, v, mask=sequences.seen_by_readout(k.shape[2])))[:, 0]

    def split(self, x: Tensor) -> list[Tensor]:
        """What stands side by side in rows n l (k w): k tensors n h l c."""
        parts = x.unflatten(-1, (-1, self.heads, self.qkv.in_features // self.heads))  # n l k h c
        return [part.transpose(1, 2) for part in parts.unbind(2)]


def frozen(*modules: nn.Module) -> bool:
    """Whether none of their parameters trains."""
    return not any(p.requires_grad for module in modules for p in module.parameters(recurse=False))


def attend(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences) -> Tensor:
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
        self.activation = ACTIVATIONS[shape.activation]

    def forward(self, x: Tensor) -> Tensor:
        if self.activation is quick_gelu and frozen(self.up, self.down):
            return quick_gelu_mlp(x, self.up.weights(x.dtype), self.down.weights(x.dtype))
        return self.down(self.activation(self.up(x)))


class Block(nn.Module):
    """x + attention(ln_1 x), then x + mlp(ln_2 x), on n l w or packed t w; a pruned one gives n w."""

    def __init__(self, shape: BlockShape, attention: Attention | None = None) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(shape.width, eps=shape.eps)
        self.attention = Attention(shape) if attention is None else attention
        self.ln_2 = LayerNorm(shape.width, eps=shape.eps)
        self.mlp = MLP(shape)

    def forward(self, x: Tensor, sequences: Sequences) -> Tensor:
        update = self.attention(x, sequences, self.ln_1)
        x = (sequences.read(x) if sequences.pruned else x) + update
        return x + self.mlp(self.ln_2(x))
