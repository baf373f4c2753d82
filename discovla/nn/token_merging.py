"""Merging of similar tokens in a vision tower: within frames (ToMe), and across frames (TempMe)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from discovla.nn.block import Attention, Block
from discovla.nn.layout import SequenceLayout, TokenMerge

Merge = Literal["none", "tome", "tempme"]


class MergeConfig(BaseModel):
    """Options of token merging; by default those of TempMe as released."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    per_block: int | tuple[int, ...] = 2
    """r: tokens merged in every frame and block, before the first join in TempMe; or one number for each of
    these blocks."""
    layers: tuple[int, ...] = (8, 9, 10)
    """TempMe: vision blocks, from 0, before which neighbouring sequences of frames are joined to one."""
    factors: tuple[int, ...] = (2, 2, 3)
    """TempMe: number of sequences that each of these blocks joins.  Their product divides the frames of a
    clip."""
    join_share: float = Field(default=0.3, ge=0, le=1)
    """TempMe: share of a joined sequence's tokens that are merged at the join."""
    inner_share: float = Field(default=0.1, ge=0, le=1)
    """TempMe: share of tokens that blocks merge from the first join on."""
    frames: int = Field(default=12, ge=1)
    """TempMe: frames of a clip, for which there are positions."""
    positions: bool = True
    """TempMe: add a learned position, zero at the start, to the rows of every sequence that is joined."""
    proportional_attention: bool = True
    """Add the logarithm of its number of tokens to the attention scores of a merged token."""
    clamp: bool = False
    """TempMe: merge fewer than per_block tokens where a frame has fewer to merge; the release fails there.
    ToMe always does."""
    join_position: Literal["merged", "always"] = "merged"
    """TempMe: add positions where the join merges tokens ("merged", as released), or at every join."""
    join_metric: Literal["rows", "keys"] = "rows"
    """TempMe: what finds similar tokens at a join: the rows, as released, or the block's keys of them."""
    count: Literal["all", "patches"] = "all"
    """TempMe: tokens that the shares refer to: "all", as released, or only patches, which alone can merge."""
    single_join: Literal["official", "plain"] = "official"
    """TempMe: merges of a block in `layers` with factor 1: "official" as many as if a join had merged tokens
    before, "plain" as in other blocks."""

    @model_validator(mode="after")
    def _check_joins(self) -> MergeConfig:
        if len(self.layers) != len(self.factors):
            raise ValueError(
                f"factors: expected {len(self.layers)}, one for each of layers, found {len(self.factors)}"
            )
        if list(self.layers) != sorted(set(self.layers)) or min(self.layers, default=0) < 0:
            raise ValueError(f"layers: expected ascending numbers of blocks, found {list(self.layers)}")
        if min(self.factors, default=1) < 1:
            raise ValueError(f"factors: expected numbers >= 1, found {list(self.factors)}")
        return self


@dataclass(frozen=True, kw_only=True)
class BlockMerges:
    """Merges of one block, for every sequence.

    join: neighbouring sequences joined before the block; 1 for none.  at_join: tokens merged there.
    inner: tokens merged between attention and MLP.  sequences, fixed: sequences of a clip after the join, and
    class rows in each.  attended, left: tokens of a sequence in attention, and after the block.
    """

    join: int
    at_join: int
    inner: int
    sequences: int
    fixed: int
    attended: int
    left: int


def plan_merges(
    kind: Merge, config: MergeConfig, *, tokens: int, frames: int, blocks: int, class_rows: int = 1
) -> tuple[BlockMerges, ...]:
    """Count the merges of every block, from sizes alone.

    Args:
        tokens: of a frame, its class row included.  frames: of a clip.  blocks: of the tower.
        class_rows: of a frame, 1 or 0.

    Raises:
        ValueError: frames that the joins do not divide, or a block with fewer tokens than it should merge.
    """
    joins = dict(zip(config.layers, config.factors, strict=True)) if kind == "tempme" else {}
    if any(layer >= blocks for layer in joins):
        raise ValueError(
            f"method.merging.layers: expected blocks 0 to {blocks - 1}, found {list(config.layers)}"
        )
    first, plan = min(joins, default=blocks), []
    per_block = config.per_block if isinstance(config.per_block, tuple) else (config.per_block,) * first
    if len(per_block) < first:
        raise ValueError(
            f"method.merging.per_block: expected {first} numbers, one a block, found {len(per_block)}"
        )
    n, fixed, sequences = tokens, class_rows, frames
    for layer in range(blocks):
        join = joins.get(layer, 1)
        if sequences % join:
            raise ValueError(
                f"method.merging.factors: expected factors that divide the {frames} frames of a clip one "
                f"after the other, found {list(config.factors)}"
            )
        n, fixed, sequences = n * join, fixed * join, sequences // join
        gone = 0
        if layer in joins and not (join == 1 and config.single_join == "plain"):
            gone = min(_share(n, fixed, config.join_share, config), (n - fixed) // 2)
        if layer < first:
            inner = per_block[layer]
            if kind == "tome" or config.clamp:
                inner = min(inner, (n - fixed) // 2)
            elif inner > (n - fixed) // 2:
                raise ValueError(
                    f"method.merging.per_block: expected at most {(n - fixed) // 2} in block {layer}, which "
                    f"has {n - fixed} patches left, found {inner}; method.merging.clamp = true merges fewer"
                )
        else:
            inner = min(_share(n - gone, fixed, config.inner_share, config), (n - fixed - gone) // 2)
        at_join = gone if join > 1 else 0
        attended = n - at_join
        n = attended - inner
        plan.append(
            BlockMerges(
                join=join,
                at_join=at_join,
                inner=inner,
                sequences=sequences,
                fixed=fixed,
                attended=attended,
                left=n,
            )
        )
    return tuple(plan)


def _share(tokens: int, fixed: int, share: float, config: MergeConfig) -> int:
    """Return the number of tokens in a share; fractions are cut off."""
    return int((tokens if config.count == "all" else tokens - fixed) * share)


class TokenMerging(nn.Module):
    """Run the blocks of a vision tower and merge tokens on the way.

    "tome": every block merges `per_block` tokens of each frame, which stay sequences of their own; the last
    block only if the tower pools all rows, which are then weighed by their sizes.  "tempme": some blocks
    first join the sequences of neighbouring frames and merge the most similar tokens of the whole, so that
    attention sees several frames, in the end the whole clip.  Class rows are never merged; those of a clip,
    in the order of time, are its frames.

    pools: True if features are made of all rows that are left, not of class rows alone.
    positions: a table for each block that joins, P w, with P sequences of a clip before it.

    Source: ToMe (arXiv 2210.09461); TempMe (arXiv 2409.01156), details as in its code.
    """

    def __init__(
        self,
        kind: Merge,
        config: MergeConfig,
        *,
        tokens: int,
        width: int,
        blocks: int,
        class_rows: int = 1,
        pools: bool = False,
    ) -> None:
        super().__init__()
        self.class_rows, self.pools = class_rows, pools
        self.kind: Merge = kind
        self.config, self.tokens, self.blocks = config, tokens, blocks
        plan = self.plan(config.frames)
        rows = {layer: merges.sequences * merges.join for layer, merges in enumerate(plan) if merges.join > 1}
        self.positions = nn.ParameterDict()
        if config.positions:
            self.positions.update(
                {str(layer): nn.Parameter(torch.zeros(p, width)) for layer, p in rows.items()}
            )

    def plan(self, frames: int) -> tuple[BlockMerges, ...]:
        """Count the merges of every block for clips of so many frames; raises as `plan_merges` does."""
        return plan_merges(
            self.kind,
            self.config,
            tokens=self.tokens,
            frames=frames,
            blocks=self.blocks,
            class_rows=self.class_rows,
        )

    def forward(
        self,
        blocks: Sequence[nn.Module],
        x: Tensor,
        layout: SequenceLayout,
        *,
        readout_only: bool = True,
        trace: bool = False,
    ) -> tuple[Tensor, TokenMerge]:
        """Run all blocks.

        Args:
            x: (b f) l w, embedded frames, the class row first.
            layout: of these frames, with `group` frames a clip.
            readout_only: leave out the merges of the last block, which do not change class rows.
            trace: keep `TokenMerge.places`: the row in which each token of a frame lies in the end.

        Returns:
            The class rows of all frames, (b f) w, or all rows that are left, (b f) l w, if the tower pools
            them; and the sizes of what is left.

        Raises:
            ValueError: another number of frames than there are positions for, or than the joins divide.
        """
        frames = layout.group
        if self.positions and frames != self.config.frames:
            raise ValueError(
                f"frames: expected {self.config.frames} a clip (method.merging.frames), found {frames}"
            )
        state = TokenMerge(
            count=0,
            fixed=self.class_rows,
            sizes=x.new_ones(x.shape[:2], dtype=torch.float32),
            visible=layout.fusion_key_mask if self.kind == "tempme" else None,
            places=torch.arange(x.shape[1], device=x.device).repeat(len(x), 1) if trace else None,
        )
        plan = self.plan(frames)
        for layer, (block, merges) in enumerate(zip(blocks, plan, strict=True)):
            x, state = self._join(layer, cast(Block, block), x, state, merges, layout)
            last = readout_only and not self.pools and layer == len(plan) - 1
            state = replace(state, count=0 if last else merges.inner, fixed=merges.fixed)
            own = self._layout(x, layout, state)
            if last and self.kind == "tome":
                return block(x, replace(own, readout_only=True)), state
            result = block(x, own)
            x, state = (result, state) if own.merge is None else result
        return x if self.pools else x[:, : state.fixed].flatten(0, 1), state

    def key_sizes(self, sizes: Tensor) -> Tensor | None:
        """Sizes as attention to merged tokens takes them; None if it does not."""
        return sizes if self.config.proportional_attention else None

    def _layout(self, x: Tensor, layout: SequenceLayout, state: TokenMerge) -> SequenceLayout:
        """Layout of the rows x n l w that a block reads."""
        merged = x.shape[1] != self.tokens * max(1, state.fixed)
        seen = state.visible
        if seen is not None and state.fixed > 1:  # a sequence of masked frames alone sees itself
            seen = seen | ~seen.any(1, keepdim=True)
        frames = layout.fusion_key_mask
        return replace(
            layout,
            key_mask=seen if state.fixed > 1 else None,
            key_sizes=self.key_sizes(state.sizes) if merged else None,
            merge=state if state.count else None,
            readout=layout.readout if state.fixed <= 1 else None,
            fusion_key_mask=None if frames is None or state.fixed > 1 else frames[:, :1].expand(x.shape[:2]),
            cache={},
        )

    def _join(
        self,
        layer: int,
        block: Block,
        x: Tensor,
        state: TokenMerge,
        merges: BlockMerges,
        layout: SequenceLayout,
    ) -> tuple[Tensor, TokenMerge]:
        """Join the sequences that a block sees as one, and merge their most similar tokens."""
        if merges.join == 1:
            return x, state
        n, fixed, length = merges.join, state.fixed, x.shape[1]
        metric = x.detach()
        if self.config.join_metric == "keys":
            metric = _keys(block, metric)
        position = self.positions.get(str(layer))
        if position is not None and (merges.at_join or self.config.join_position == "always"):
            table = position.to(x.dtype).repeat(len(x) // len(position), 1)
            x = x + table[:, None]
        x, metric = (_joined(rows, n, fixed) for rows in (x, metric))
        visible, places = state.visible, state.places
        if places is not None:
            own = (
                torch.arange(length * n, device=x.device).view(n, length).repeat(len(x), 1)
            )  # row of each part
            new = _joined(own[..., None], n, fixed)[..., 0].argsort(1).view(-1, length)
            places = new.gather(1, places).unflatten(0, (-1, n)).flatten(1)
        state = replace(
            state,
            count=merges.at_join,
            fixed=merges.fixed,
            sizes=_joined(state.sizes[..., None], n, fixed)[..., 0],
            visible=None if visible is None else _joined(visible[..., None], n, fixed)[..., 0],
            places=places,
        )
        return state.apply(x, metric, impl=layout.resolve(x).impl) if merges.at_join else (x, state)


@torch.no_grad()
def _keys(block: Block, x: Tensor) -> Tensor:
    """Mean keys, n l c, that a block computes from its input rows n l w."""
    attention = cast(Attention, block.attention)
    return attention.mean_keys(attention.project_normed(block.ln_1(x)))


def _joined(x: Tensor, join: int, fixed: int) -> Tensor:
    """Join every `join` sequences n l c: class rows in the order of time, then patches likewise."""
    parts = x.unflatten(0, (-1, join))
    return torch.cat([parts[:, :, :fixed].flatten(1, 2), parts[:, :, fixed:].flatten(1, 2)], dim=1)
