"""CLIP's text transformer."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, cast, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from discovla.nn.block import Block, run_blocks
from discovla.nn.features import expect, on, widen
from discovla.nn.layers import LayerNorm
from discovla.nn.layout import Residual, SequenceLayout
from discovla.nn.memory import MemoryPlan
from discovla.nn.recompute import take_rows
from discovla.ops.buckets import PackedRows, fill_bucket
from discovla.ops.dispatch import Impl, Memory
from discovla.ops.short_attention import Packing
from discovla.towers.architecture import Architecture
from discovla.towers.vision import MakeBlock

Tokens = tuple[Tensor, Tensor]  # ids, int64, and the mask of real ones, bool


class TextTower(nn.Module):
    """embed -> blocks -> project; a caption is read at its end-of-text token, the largest id.

    `impl` and `memory` say how blocks are computed; see `ops.dispatch` and `nn.memory`.  With `distinct`
    identical captions pass the blocks below the first that fuses as one; on a GPU they are waited for.  Off
    unless asked for: of the frame captions of the drawn world 3.5 % repeat within a clip, and 5.0 % within
    128 clips.  `rows` may settle how many rows packed captions take, see `ops.buckets`: what is more than
    their tokens nobody sees.
    """

    impl: Impl = "auto"
    memory: Memory = "auto"
    distinct: bool = False

    def __init__(self, architecture: Architecture, make_block: MakeBlock | None = None) -> None:
        super().__init__()
        shape = architecture.text
        make_block = make_block or (lambda layer: Block(shape.block(architecture.activation)))
        table = torch.empty(architecture.vocab_size, shape.width)  # its own start imports torch._dynamo
        self.rows: PackedRows = {}
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

    def project(self, x: Residual) -> Tensor:
        """Rows of width w to joint features of width d."""
        y = self.ln_final.norm_residual(x, self.impl)
        return y @ self.projection.to(y.dtype)

    def layout(self, ids: Tensor, mask: Tensor | None, group: int = 0, alone: int = 0) -> SequenceLayout:
        """What the blocks must know of the captions, packed without what `mask` leaves out.

        Raises:
            ValueError: the mask leaves an end-of-text token out.
        """
        at_end = ids.argmax(-1, keepdim=True)
        plain = SequenceLayout(
            causal=True, group=group, ungrouped=alone, readout=at_end[:, 0], impl=self.impl
        )
        if mask is None:
            return plain
        kept, count = self._kept(mask)
        packing = Packing.from_mask(kept, count).to(ids.device)
        places = on(ids.device, torch.where(mask, kept.cumsum(1) - 1, -1))
        readout = places.gather(1, at_end)[:, 0]
        expect(readout >= 0, "mask: expected true at the end-of-text token of each caption")
        seen = None
        if count is not None:  # real tokens come before the others that are kept
            lengths = on(ids.device, mask.sum(1, keepdim=True))
            seen = torch.arange(packing.max_length, device=ids.device) < lengths
        return replace(plain, readout=readout, fusion_key_mask=seen, packing=packing)

    def _kept(self, mask: Tensor) -> tuple[Tensor, int | None]:
        """Which tokens n l are computed, and how many where `rows` settles that."""
        count = self.rows.get((len(mask), mask.shape[1]))
        return (mask, None) if count is None else (fill_bucket(mask, count), count)

    @overload
    def forward(
        self,
        ids: Tensor,
        mask: Tensor | None,
        *,
        group: int = 0,
        alone: int = 0,
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
        alone: int = 0,
        dtype: torch.dtype = torch.float32,
        words: Literal[True],
    ) -> tuple[Tensor, Tensor]: ...

    def forward(
        self,
        ids: Tensor,
        mask: Tensor | None,
        *,
        group: int = 0,
        alone: int = 0,
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
            alone: how many captions come before those and have no group; without words.
            dtype: to compute in.
        """
        if mask is None and not words and not group:
            mask = torch.arange(ids.shape[1], device=ids.device) <= ids.argmax(-1)[:, None]
        if self.distinct and mask is not None and not words:
            return self._distinct(ids, mask, (group, alone), dtype)
        layout = self.layout(ids, mask, group, alone)
        x = self.project(
            self._through(self.blocks, self._rows(ids, mask, dtype), layout, readout_only=not words)
        )
        if not words:
            return x
        pooled = layout.read(x)
        if mask is not None:
            places = (self._kept(mask)[0].flatten().cumsum(0) - 1).view(ids.shape)
            x = x[places.to(ids.device, non_blocking=True)]
        return pooled, x

    def together(
        self, captions: Tokens, grouped: Tokens, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor]:
        """Features n d of captions and b f d of others that fuse in groups of f, in one pass; widened.

        Args:
            captions: ids and mask, n l, as in `forward`.  grouped: the same, b f l.
        """
        count, (b, f) = len(captions[0]), grouped[0].shape[:2]
        ids, mask = joined(captions, (grouped[0].flatten(0, 1), grouped[1].flatten(0, 1)))
        features = widen(self(ids, mask, group=f, alone=count, dtype=dtype))
        first, others = features.split([count, b * f])
        return first, others.unflatten(0, (b, f))

    def _rows(self, ids: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Embedded tokens n l w, or packed t w."""
        x = self.embed(ids, dtype)
        if mask is None:
            return x
        kept, count = self._kept(mask)
        flat = kept.flatten()
        places = flat.nonzero() if count is None else flat.nonzero_static(size=count)
        return take_rows(x.flatten(0, 1), places[:, 0].to(ids.device, non_blocking=True))

    def _through(
        self, blocks: nn.ModuleList, x: Tensor, layout: SequenceLayout, *, readout_only: bool
    ) -> Residual:
        """Rows after some of the blocks; with readout_only the readout rows alone."""
        layout = replace(layout, memory=self.plan.choose(self.memory, x))
        return run_blocks(blocks, x, layout, readout_only=readout_only)

    def _distinct(self, ids: Tensor, mask: Tensor, groups: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Features n d of captions, the same ones going together as far as no caption sees another.

        groups: `group` and `alone` of `forward`.
        """
        fusing = [groups[0] > 0 and cast(Block, block).attention.fuses for block in self.blocks]
        below = fusing.index(True) if any(fusing) else len(fusing)
        first, of = distinct_rows(torch.where(on(ids.device, mask), ids, -1))
        few_ids, few_mask = ids[first], mask[first.to(mask.device)]
        few, x = self.layout(few_ids, few_mask), self._rows(few_ids, few_mask, dtype)
        if below == len(fusing):
            return self.project(self._through(self.blocks, x, few, readout_only=True)).index_select(0, of)
        x = self._through(self.blocks[:below], x, few, readout_only=False) if below else x
        every = self.layout(ids, mask, *groups)
        assert few.packing is not None and every.packing is not None, "they have masks"
        assert isinstance(x, Tensor), "neither the tokens nor rows that are not pruned are left as two"
        rows = few.packing.pad_index[of].flatten()[every.packing.pack_index]
        x = self._through(self.blocks[below:], x.index_select(0, rows), every, readout_only=True)
        return self.project(x)


def joined(captions: Tokens, others: Tokens) -> Tokens:
    """Two lots of captions as one, those of fewer places padded: ids n l, masks n l."""
    length = max(captions[0].shape[1], others[0].shape[1])
    ids, masks = (
        torch.cat([F.pad(x, (0, length - x.shape[1])) if x.shape[1] < length else x for x in parts])
        for parts in zip(captions, others, strict=True)
    )
    return ids, masks


def distinct_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Of n rows the first of each kind, u, and for every row which of those it is, n; int64."""
    kinds, of = x.unique(dim=0, return_inverse=True)
    every = torch.arange(len(x), device=x.device)
    return every.new_full((len(kinds),), len(x)).scatter_reduce_(0, of, every, "amin"), of
