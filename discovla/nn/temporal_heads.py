"""Heads on the features of a video's frames: transformers, LSTM, pair scorer, soft VLAD."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from discovla.nn.block import Block, BlockShape
from discovla.nn.layers import LayerNorm, Linear, quick_gelu
from discovla.nn.layout import SequenceLayout
from discovla.ops.soft_vlad import soft_vlad

M = TypeVar("M", bound=nn.Module)


class Table(nn.Module):
    """A table of learned rows (positions, types); `forward(n)` returns the first n."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(rows, width) * 0.02)

    def forward(self, count: int) -> Tensor:
        if count > len(self.weight):
            raise ValueError(f"positions: expected at most {len(self.weight)}, got {count}")
        return self.weight[:count]

    @torch.no_grad()
    def copy(self, rows: Tensor) -> bool:
        """Copy the first of `rows` if they are as wide and enough; return True if they were copied."""
        fits = rows.shape[1] == self.weight.shape[1] and len(rows) >= len(self.weight)
        if fits:
            self.weight.copy_(rows[: len(self.weight)])
        return fits


class Transformer(nn.Module):
    """Blocks on n l w with a key mask and without a final norm."""

    def __init__(self, shape: BlockShape, layers: int) -> None:
        super().__init__()
        self.heads = shape.heads
        self.blocks = nn.ModuleList(fresh(Block(shape)) for _ in range(layers))

    def forward(self, x: Tensor, key_mask: Tensor) -> Tensor:
        """Return the rows of the last block; key_mask: n l, or n h l with a mask for each head.

        If a mask hides every key, all are visible, as with the additive -1e6 of the released heads; pooling
        leaves such rows out.
        """
        layout = SequenceLayout(key_mask=key_mask | ~key_mask.any(-1, keepdim=True))
        for block in self.blocks:
            x = block(x, layout)
        return x

    def copy(self, blocks: Sequence[nn.Module]) -> bool:
        """Copy the first of `blocks` that have this shape; return True if every own block was copied."""
        copied = [_copy_block(own, other) for own, other in zip(self.blocks, blocks, strict=False)]
        return all(copied) and len(copied) == len(self.blocks)


class TemporalBasis(nn.Module):
    """Adds to every frame linear maps of it that depend on its place in the clip.

    x_t -> x_t + sum_(k = 1..K) sqrt(2) cos(pi k (t + 1/2) / F) W_k x_t, where t counts the real frames and F
    is their number.  W starts at zero, and with it the change.  The cosines are those of the DCT-II: over the
    frames of a clip of more than K frames they are orthogonal.  Odd k change sign when a clip is reversed.

    Parameters: weight, K d d.
    """

    def __init__(self, width: int, terms: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(terms, width, width))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Return frames b f d; padded frames, where mask b f is false, stay as they are."""
        terms = torch.arange(1, len(self.weight) + 1, device=x.device, dtype=x.dtype)
        place = (mask.cumsum(1) - 0.5).to(x.dtype)  # b f, of real frames
        count = mask.sum(1, keepdim=True).to(x.dtype).clamp(min=1)
        waves = math.sqrt(2) * torch.cos(math.pi * terms * (place / count)[..., None])  # b f k
        waves = waves * mask[..., None]
        changes = (x @ self.weight.to(x.dtype).flatten(0, 1).T).unflatten(-1, (len(self.weight), -1))
        return x + (waves[..., None] * changes).sum(-2)


class LSTM(nn.LSTM):
    """An LSTM of one layer and one direction that returns the hidden states only."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width, batch_first=True)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)[0]


class PairScorer(nn.Module):
    """A transformer on a caption and a video's frames as one sequence, which returns their score.

    y = S([g, x_0 .. x_f-1] + E; mask [1, m]);  score = w2 q(W1 ln(y_0) + b1) + b2, q = quick_gelu.
    """

    def __init__(self, shape: BlockShape, layers: int, positions: int) -> None:
        super().__init__()
        self.positions = Table(positions, shape.width)
        self.dropout = nn.Dropout(0.1)
        self.transformer = Transformer(shape, layers)
        self.norm = LayerNorm(shape.width, eps=shape.eps)
        self.dense = fresh(Linear(shape.width, shape.width))
        self.score = fresh(Linear(shape.width, 1))

    def forward(self, text: Tensor, frames: Tensor, mask: Tensor) -> Tensor:
        """Scores of p pairs, p: text p d, frames p f d, mask p f."""
        x = torch.cat([text[:, None], frames], dim=1)  # p f+1 d
        x = self.dropout(x + self.positions(x.shape[1]).to(x.dtype))
        y = self.transformer(x, torch.cat([mask.new_ones(mask.shape[0], 1), mask], dim=1))
        return self.score(quick_gelu(self.dense(self.norm(y[:, 0]))))[:, 0]


class SoftVLAD(nn.Module):
    """`ops.soft_vlad` with learned assignment and centres."""

    def __init__(self, centres: int, width: int) -> None:
        super().__init__()
        self.assignment = nn.Parameter(torch.randn(centres, width) / 8)
        self.centres = nn.Parameter(torch.randn(centres, width) / 8)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Aggregate tokens n l d with mask n l into unit vectors n d."""
        return soft_vlad(tokens, mask, self.assignment, self.centres)


@torch.no_grad()
def fresh(module: M) -> M:
    """Initialise the linear maps of a module: weights normal (0, 0.02), biases zero."""
    for part in module.modules():
        if isinstance(part, Linear):
            nn.init.normal_(part.weight, std=0.02)
            nn.init.zeros_(part.bias)
    return module


def _copy_block(own: nn.Module, other: nn.Module) -> bool:
    """Copy the parameters that both have, if their shapes agree; return True if they do."""
    source = other.state_dict()
    state = {name: source[name] for name in own.state_dict()}
    fits = all(tensor.shape == state[name].shape for name, tensor in own.state_dict().items())
    if fits:
        own.load_state_dict(state)
    return fits
