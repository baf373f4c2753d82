"""Adaptive Decomposition Tokens: learned tokens are decoded into views of a caption or a video."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from discovla.nn.layers import Linear
from discovla.ops.attention import attention

DROPOUT = 0.1
HEADS = 4
TOKEN_STD = 0.1  # standard deviation of the initial tokens


class FeedForward(nn.Module):
    """drop(down(drop(gelu(up x)))) with four times the width inside, without skip and norm."""

    def __init__(self, width: int, dropout: float = DROPOUT) -> None:
        super().__init__()
        self.up, self.down = Linear(width, 4 * width), Linear(4 * width, width)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.dropout(F.gelu(self.up(x)), self.dropout, self.training)
        return F.dropout(self.down(hidden), self.dropout, self.training)


class Projection(nn.Linear):
    """One stacked, biased projection, rows ordered q, k, v: queries of x, keys and values of memory."""

    def __init__(self, width: int) -> None:
        super().__init__(width, 3 * width)
        nn.init.xavier_uniform_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        width = self.in_features
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        q = F.linear(x, weight[:width], bias[:width])
        k, v = F.linear(memory, weight[width:], bias[width:]).chunk(2, dim=-1)
        return q, k, v


class MemoryAttention(nn.Module):
    """Multi-head attention of x (n q w) over a memory (n m w), with dropout on its weights in training."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"decomposition: expected a width divisible by {heads} heads, got {width}")
        self.heads, self.dropout = heads, dropout
        self.qkv, self.out = Projection(width), Linear(width, width)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend from x to memory; mask: n m, bool, true on visible rows of the memory."""
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x, memory))
        keys = None if mask is None else mask[:, None, None]  # n 1 1 m
        dropout = self.dropout if self.training else 0.0
        read = attention(q, k, v, mask=keys, dropout=dropout)  # n h q c
        return self.out(read.transpose(1, 2).flatten(2))


class DecompositionLayer(nn.Module):
    """x + self-attention, then + attention over the memory, then + FFN; there is no layer norm anywhere."""

    def __init__(self, width: int, heads: int = HEADS) -> None:
        super().__init__()
        self.itself = MemoryAttention(width, heads, dropout=0.0)
        self.memory = MemoryAttention(width, heads, dropout=DROPOUT)
        self.ffn = FeedForward(width)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.itself(x, x)
        x = x + self.memory(x, memory, mask)
        return x + self.ffn(x)


class Stack(nn.Module):
    """Layers that decode tokens against one memory."""

    def __init__(self, width: int, depth: int, heads: int = HEADS) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecompositionLayer(width, heads) for _ in range(depth))

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            x = layer(x, memory, mask)
        return x


class Decomposition(nn.Module):
    """Views of captions and videos: tokens that both sides share, decoded by one stack for each side.

    Source: T2VParser, Adaptive Decomposition Tokens; specification, section 3, as in its code.
    """

    def __init__(self, width: int, tokens: int, depth: int, heads: int = HEADS) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(tokens, width) * TOKEN_STD)
        self.text, self.video = Stack(width, depth, heads), Stack(width, depth, heads)

    def views_of_text(self, words: Tensor, mask: Tensor | None = None) -> Tensor:
        """Views n q d of captions from their words n l d and mask n l, bool; None: all are visible."""
        return self.text(self._tokens(words), words, mask)

    def views_of_video(self, memory: Tensor, mask: Tensor | None = None) -> Tensor:
        """Views n q d of videos from rows made of their frames, n f d, and mask n f, bool."""
        return self.video(self._tokens(memory), memory, mask)

    def _tokens(self, memory: Tensor) -> Tensor:
        return self.tokens.to(memory.dtype).expand(memory.shape[0], -1, -1)
