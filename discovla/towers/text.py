"""CLIP's text transformer."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, overload

import torch
from torch import Tensor, nn

from discovla.nn.autograd import take_rows
from discovla.nn.features import expect, on
from discovla.nn.memory import MemoryPlan
from discovla.nn.sequences import Sequences
from discovla.nn.transformer import Block, LayerNorm
from discovla.ops.dispatch import Impl, Memory
from discovla.ops.short_attention import Packing
from discovla.towers.architecture import Architecture
from discovla.towers.vision import MakeBlock


class TextTower(nn.Module):
    """embed -> blocks -> project; a caption is read at its end-of-text token, the largest id.

    `impl` and `memory` say how blocks are computed; see `ops.dispatch` and `nn.memory`.
    """

    impl: Impl = "auto"
    memory: Memory = "auto"

    def __init__(self, architecture: Architecture, make_block: MakeBlock | None = None) -> None:
        super().__init__()
        shape = architecture.text
        make_block = make_block or (lambda layer: Block(shape.block(architecture.activation)))
        table = torch.empty(architecture.vocab_size, shape.width)  # its own start imports torch._dynamo
        self.token_embedding = nn.Embedding.from_pretrained(table, freeze=False)
        self.position_embedding = nn.Parameter(torch.empty(architecture.context_length, shape.width))
        self.blocks = nn.ModuleList(make_block(layer) for layer in range(shape.layers))
        self.plan = MemoryPlan(shape.layers)
        self.ln_final = LayerNorm(shape.width)
        self.projection = nn.Parameter(torch.empty(shape.width, architecture.embed_dim))

    def embed(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Token ids n l to tokens n l w."""
        length = ids.shape[1]
        if length > len(self.position_embedding):
            raise ValueError(f"ids: expected at most {len(self.position_embedding)} tokens, got {length}")
        return (self.token_embedding(ids) + self.position_embedding[:length]).to(dtype)

    def project(self, x: Tensor) -> Tensor:
        """Rows of width w to joint features of width d."""
        return self.ln_final(x) @ self.projection.to(x.dtype)

    def sequences(self, ids: Tensor, mask: Tensor | None, group: int = 0) -> Sequences:
        """What the blocks must know of the captions, packed without what `mask` leaves out.

        Raises:
            ValueError: the mask leaves an end-of-text token out.
        """
        at_end = ids.argmax(-1, keepdim=True)
        plain = Sequences(causal=True, group=group, readout=at_end[:, 0], impl=self.impl)
        if mask is None:
            return plain
        packing = Packing.of(mask).to(ids.device)
        mask = on(ids.device, mask)
        expect(mask.gather(1, at_end), "mask: expected true at the end-of-text token of each caption")
        readout = mask.cumsum(1).gather(1, at_end)[:, 0] - 1
        return replace(plain, readout=readout, fusion_key_mask=packing.real, packing=packing)

    @overload
    def forward(
        self,
        ids: Tensor,
        mask: Tensor | None,
        *,
        group: int = 0,
        dtype: torch.dtype = torch.float32,
        words: Literal[False] = False,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        ids: Tensor,
        mask: Tensor | None,
        *,
        group: int = 0,
        dtype: torch.dtype = torch.float32,
        words: Literal[True],
    ) -> tuple[Tensor, Tensor]: ...

    def forward(
        self,
        ids: Tensor,
        mask: Tensor | None,
        *,
        group: int = 0,
        dtype: torch.dtype = torch.float32,
        words: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Caption features n d; with `words` those of every position too, n l d.

        Args:
            ids: n l, int64.  mask: n l, bool, true on real tokens; padding is neither seen nor computed, and
                its words are those of some real token.  None leaves the causal mask alone, as CLIP has it:
                rows of padding, which come last, see padding then.  A mask on the CPU beside ids on a GPU
                spares waiting for it: how many tokens there are is read from the mask.
            group: how many neighbouring captions make one sample in fusion blocks; 0 for none.
            dtype: to compute in.
        """
        if mask is None and not words and not group:
            mask = torch.arange(ids.shape[1], device=ids.device) <= ids.argmax(-1)[:, None]
        sequences = self.sequences(ids, mask, group)
        x = self.embed(ids, dtype)
        if mask is not None:
            kept = mask.flatten().nonzero()[:, 0].to(ids.device, non_blocking=True)
            x = take_rows(x.flatten(0, 1), kept)  # t w
        sequences = replace(sequences, memory=self.plan.of(self.memory, x))
        inner = sequences.inner()
        for block in self.blocks[:-1]:
            x = block(x, inner)
        x = self.project(self.blocks[-1](x, sequences.last(pruned=not words)))
        if not words:
            return x
        pooled = sequences.read(x)
        if mask is not None:
            places = (mask.flatten().cumsum(0) - 1).view(ids.shape)
            x = x[places.to(ids.device, non_blocking=True)]
        return pooled, x
