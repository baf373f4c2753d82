"""The text transformer."""

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

Tokens = tuple[Tensor, Tensor]  # ids, int64, and the mask of real tokens, bool


class TextTower(nn.Module):
    """embed -> blocks -> project.

    What is around the blocks is described by `Architecture.captions`; CLIP reads a caption from end-of-text,
    the largest id.  Captions are packed, and padding is not computed, unless the tower reads it.

    impl, memory: how blocks are computed and what they keep for backward; see `ops.dispatch`, `nn.memory`.
    distinct: compute identical captions once below the first block that fuses; on a GPU this syncs.  It pays
        only if many repeat: in the drawn world 3.5 % of frame captions do within a clip, 5.0 % within 128.
    rows: number of packed rows for captions of a shape, see `ops.buckets`; surplus rows hold padding that no
        token sees.
    """

    impl: Impl = "auto"
    memory: Memory = "auto"
    distinct: bool = False

    def __init__(self, architecture: Architecture, make_block: MakeBlock | None = None) -> None:
        super().__init__()
        shape, self.form = architecture.text, architecture.captions
        make_block = make_block or (lambda layer: Block(shape.block(architecture.activation)))
        # from_pretrained: the default initialisation of nn.Embedding imports torch._dynamo
        table = torch.empty(architecture.vocab_size, shape.width)
        self.rows: PackedRows = {}
        self.token_embedding = nn.Embedding.from_pretrained(table, freeze=False)
        self.context_length = architecture.context_length
        last = self.form.readout == "class"  # a class token after the context
        self.class_embedding = nn.Parameter(torch.empty(shape.width)) if last else None
        self.position_embedding = nn.Parameter(torch.empty(self.context_length + last, shape.width))
        self.blocks = nn.ModuleList(make_block(layer) for layer in range(shape.layers))
        self.plan = MemoryPlan(shape.layers)
        self.ln_final = LayerNorm(shape.width, eps=shape.eps)
        projection = nn.Parameter(torch.empty(shape.width, architecture.embed_dim))
        self.projection = projection if self.form.projection else None
        bias = nn.Parameter(torch.zeros(architecture.embed_dim))
        self.projection_bias = bias if self.form.projection_bias else None

    def embed(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Token ids n l to tokens n l w; with a class token after them n l+1 w.

        Raises:
            ValueError: more tokens than the context, or fewer where padding is read.
        """
        length, most = ids.shape[1], self.context_length
        if length > most:
            raise ValueError(f"ids: expected at most {most} tokens, got {length}")
        if self.form.reads_padding and length < most:
            raise ValueError(f"ids: expected {most} tokens, of which padding is read, got {length}")
        x = self.token_embedding(ids)
        if self.class_embedding is not None:
            x = torch.cat([x, self.class_embedding.to(x.dtype).expand(len(x), 1, -1)], 1)
        return (x + self.position_embedding[: x.shape[1]]).to(dtype)

    def project(self, x: Residual) -> Tensor:
        """Norm and project rows of width w to joint features of width d."""
        y = self.ln_final.norm_residual(x, self.impl)
        if self.projection is not None:
            y = y @ self.projection.to(y.dtype)
        return y if self.projection_bias is None else y + self.projection_bias.to(y.dtype)

    def readout(self, ids: Tensor) -> Tensor:
        """Place of the token that a caption is read from, n, int64."""
        match self.form.readout:
            case "largest":
                return ids.argmax(-1)
            case "end":
                return (ids == self.form.end_id).int().argmax(-1)
            case "first":
                return ids.new_zeros(len(ids))
            case "last":
                return ids.new_full((len(ids),), self.context_length - 1)
            case "class":
                return ids.new_full((len(ids),), self.context_length)

    def layout(self, ids: Tensor, mask: Tensor | None, group: int = 0, ungrouped: int = 0) -> SequenceLayout:
        """Layout of captions for the blocks, packed if there is a mask; arguments as in `forward`.

        Raises:
            ValueError: the mask hides the token that a caption is read from.
        """
        end = self.readout(ids)[:, None]
        key_mask = None
        if self.form.readout == "class":  # as open_clip's CoCa: key i is seen if token i - 1 is no padding
            real = ids != self.form.padding_id
            key_mask = torch.cat([real.new_ones(len(ids), 1), real], 1)
        padded = SequenceLayout(
            causal=self.form.causal,
            key_mask=key_mask,
            group=group,
            ungrouped=ungrouped,
            readout=end[:, 0],
            fusion_key_mask=key_mask,
            impl=self.impl,
        )
        if mask is None or self.form.reads_padding:
            return padded
        packed, num_rows = self._packed_tokens(mask)
        packing = Packing.from_mask(packed, num_rows).to(ids.device)
        packed_place = on(ids.device, torch.where(mask, packed.cumsum(1) - 1, -1))
        readout = packed_place.gather(1, end)[:, 0]
        expect(readout >= 0, "mask: expected true at the end-of-text token of each caption")
        fusion_key_mask = None
        if num_rows is not None:  # real tokens come first, surplus rows after them
            lengths = on(ids.device, mask.sum(1, keepdim=True))
            fusion_key_mask = torch.arange(packing.max_length, device=ids.device) < lengths
        return replace(padded, readout=readout, fusion_key_mask=fusion_key_mask, packing=packing)

    def _packed_tokens(self, mask: Tensor) -> tuple[Tensor, int | None]:
        """The tokens n l that get a row, and the number of rows if `rows` fixes it."""
        num_rows = self.rows.get((len(mask), mask.shape[1]))
        return (mask, None) if num_rows is None else (fill_bucket(mask, num_rows), num_rows)

    @overload
    def forward(
        self,
        ids: Tensor,
        mask: Tensor | None,
        *,
        group: int = 0,
        ungrouped: int = 0,
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
        ungrouped: int = 0,
        dtype: torch.dtype = torch.float32,
        words: Literal[True],
    ) -> tuple[Tensor, Tensor]: ...

    def forward(
        self,
        ids: Tensor,
        mask: Tensor | None,
        *,
        group: int = 0,
        ungrouped: int = 0,
        dtype: torch.dtype = torch.float32,
        words: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Caption features n d; with `words` also those of every position, n l d.

        Args:
            ids: n l, int64.
            mask: n l, bool, true on real tokens.  Padding is neither visible nor computed, and its words are
                those of some real token.  None: the causal mask alone, as in CLIP; padding, which comes last,
                sees padding.  With ids on a GPU, a mask on the CPU avoids a sync.  A tower that reads padding
                does not use it.
            group: number of neighbouring captions that make one sample in fusion blocks; 0 for none.
            ungrouped: number of captions before the groups; not with `words`.
            dtype: to compute in.
        """
        if self.form.reads_padding:
            mask = None
        elif mask is None and not words and not group:
            mask = torch.arange(ids.shape[1], device=ids.device) <= self.readout(ids)[:, None]
        if self.distinct and mask is not None and not words:
            return self._forward_distinct(ids, mask, group, ungrouped, dtype)
        layout, x = self.layout(ids, mask, group, ungrouped), self._embed_packed(ids, mask, dtype)
        x = self.project(self._run(self.blocks, x, layout, readout_only=not words))
        if not words:
            return x
        pooled = layout.read(x)
        if self.class_embedding is not None:
            x = x[:, :-1]
        if mask is not None:
            row = (self._packed_tokens(mask)[0].flatten().cumsum(0) - 1).view(ids.shape)
            x = x[row.to(ids.device, non_blocking=True)]
        return pooled, x

    def encode_with_groups(
        self, captions: Tokens, grouped: Tokens, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor]:
        """Encode captions, and other captions that fuse in groups of f, in one pass.

        Args:
            captions: ids and mask, n l, as in `forward`.  grouped: ids and mask, b f l.

        Returns:
            n d and b f d, in float32 at least.
        """
        n, (b, f) = len(captions[0]), grouped[0].shape[:2]
        ids, mask = concatenate_captions(captions, (grouped[0].flatten(0, 1), grouped[1].flatten(0, 1)))
        features = widen(self(ids, mask, group=f, ungrouped=n, dtype=dtype))
        first, others = features.split([n, b * f])
        return first, others.unflatten(0, (b, f))

    def _embed_packed(self, ids: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Embedded tokens n l w, or t w without padding if there is a mask."""
        x = self.embed(ids, dtype)
        if mask is None:
            return x
        packed, num_rows = self._packed_tokens(mask)
        flat = packed.flatten()
        index = flat.nonzero() if num_rows is None else flat.nonzero_static(size=num_rows)
        return take_rows(x.flatten(0, 1), index[:, 0].to(ids.device, non_blocking=True))

    def _run(
        self, blocks: nn.ModuleList, x: Tensor, layout: SequenceLayout, *, readout_only: bool
    ) -> Residual:
        """`run_blocks` in this tower's memory mode."""
        layout = replace(layout, memory=self.plan.choose(self.memory, x))
        return run_blocks(blocks, x, layout, readout_only=readout_only)

    def _forward_distinct(
        self, ids: Tensor, mask: Tensor, group: int, ungrouped: int, dtype: torch.dtype
    ) -> Tensor:
        """`forward` that computes identical captions once, in the blocks before the first that fuses."""
        fuses = [group > 0 and cast(Block, block).attention.fuses for block in self.blocks]
        first_fused = fuses.index(True) if any(fuses) else len(fuses)
        first, kind = distinct_rows(torch.where(on(ids.device, mask), ids, -1))
        few_ids, few_mask = ids[first], mask[first.to(mask.device)]
        few, x = self.layout(few_ids, few_mask), self._embed_packed(few_ids, few_mask, dtype)
        if first_fused == len(fuses):
            return self.project(self._run(self.blocks, x, few, readout_only=True)).index_select(0, kind)
        if first_fused:
            rows = self._run(self.blocks[:first_fused], x, few, readout_only=False)
            assert isinstance(rows, Tensor), "only a last block and inner blocks leave an update pending"
            x = rows
        every = self.layout(ids, mask, group, ungrouped)
        assert few.packing is not None and every.packing is not None, "both have a mask"
        index = few.packing.pad_index[kind].flatten()[every.packing.pack_index]
        x = x.index_select(0, index)
        return self.project(self._run(self.blocks[first_fused:], x, every, readout_only=True))


def concatenate_captions(captions: Tokens, others: Tokens) -> Tokens:
    """Concatenate ids n l and masks n l, the shorter ones padded."""
    length = max(captions[0].shape[1], others[0].shape[1])
    ids, masks = (
        torch.cat([F.pad(x, (0, length - x.shape[1])) if x.shape[1] < length else x for x in parts])
        for parts in zip(captions, others, strict=True)
    )
    return ids, masks


def distinct_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Index of the first of each kind of n equal rows, u, and the kind of every row, n; int64."""
    kinds, kind = x.unique(dim=0, return_inverse=True)
    index = torch.arange(len(x), device=x.device)
    return index.new_full((len(kinds),), len(x)).scatter_reduce_(0, kind, index, "amin"), kind
