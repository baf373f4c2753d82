"""What blocks must know of the sequences they are given besides their rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from discovla.nn.recompute import pad_rows, take_rows
from discovla.ops.dispatch import Impl, Memory
from discovla.ops.lora_norm import LoRAWeights
from discovla.ops.short_attention import Packing

# rows n l w or packed t w; of a chain of ops also with what is still to be added to them, of the same shape
Rows = Tensor | tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class SequenceLayout:
    """What blocks must know of the n sequences of l tokens they are given: as n l w, or packed as t w.

    causal: a token sees itself and earlier ones only.
    key_mask: n l, or n h l with one for each head, bool, true on tokens that may be seen; None where all may.
    group: how many neighbouring sequences (frames) make one sample whose parts look at each other in fusion
        blocks; 0 where every sequence stands alone.
    alone: how many sequences stand alone all the same; they come before the groups.
    readout: n, int64, the row of each sequence that is read at the end (CLS or EOT).
    fusion_key_mask: n l, bool, the tokens that may be seen across the group; None where all may.
    packing: where rows are packed; n l, also of the masks, is then its own.
    pruned: the block is the last: it gives the rows that are read alone, n w.
    impl: of the blocks, a choice of `ops.dispatch`.
    memory: what a block keeps for backward; "auto" is "keep".
    deferred: a chain of ops may leave its last sum to the block that follows.
    lora: of blocks' attention, what ops need of its update, where that was put together for all of them.
    """

    causal: bool = False
    key_mask: Tensor | None = None
    group: int = 0
    alone: int = 0
    readout: Tensor | None = None
    fusion_key_mask: Tensor | None = None
    packing: Packing | None = None
    pruned: bool = False
    impl: Impl = "auto"
    memory: Memory = "keep"
    deferred: bool = False
    lora: Mapping[nn.Module, LoRAWeights] = field(default_factory=dict, repr=False, compare=False)
    known: dict[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def inner(self) -> SequenceLayout:
        """The same for the blocks of a tower before its last."""
        return replace(self, deferred=self.memory == "keep")

    def last(self, *, pruned: bool = True) -> SequenceLayout:
        """The same for the last block; of a pruned one, whose rows are normed next, readout rows alone."""
        return replace(self, pruned=pruned, deferred=pruned and self.memory == "keep")

    def pad(self, x: Tensor) -> Tensor:
        """Rows as n l w."""
        return x if self.packing is None else pad_rows(x, self.packing.pad_index, self.packing.pack_index)

    def unpad(self, x: Tensor) -> Tensor:
        """The inverse of `pad`."""
        return x if self.packing is None else take_rows(x.flatten(0, 1), self.packing.pack_index)

    def ends(self, length: int) -> Tensor:
        """n, int64: where the readout row of each sequence is among all rows; length: l of rows n l w."""
        if self.readout is None:
            raise ValueError("sequences.readout: expected the row to read of each sequence, got None")
        readout = self.readout
        name = "ends" if self.packing is not None else f"ends of {length}"
        return self._once(name, lambda: self._ends(readout, length))

    def _ends(self, readout: Tensor, length: int) -> Tensor:
        if self.packing is not None:
            return self.packing.offsets[:-1] + readout
        return torch.arange(0, len(readout) * length, length, device=readout.device) + readout

    def slots(self, x: Tensor) -> Tensor:
        """Of each row of x (n l w or t w) the sequence whose readout row it is, int32; -1 where of none.

        Where x holds readout rows alone, n w, each is that of its own.
        """
        assert self.readout is not None, "who asks has readout rows"
        rows, n = x[..., 0].numel(), len(self.readout)
        order = self._once("order", lambda: torch.arange(n, dtype=torch.int32, device=x.device))
        if x.dim() == 2 and rows == n:
            return order
        ends = self.ends(x.shape[1])
        return self._once("slots", lambda: order.new_full((rows,), -1).index_copy_(0, ends, order))

    def _once(self, name: str, find: Callable[[], Tensor]) -> Tensor:
        """What `find` gives, found once for all blocks."""
        if name not in self.known:
            self.known[name] = find()
        return self.known[name]

    def read(self, x: Rows) -> Tensor:
        """The readout rows n w of all rows; of a pruned block's output, which has no others, itself."""
        if isinstance(x, tuple):
            return self.read(x[0]) + self.read(x[1])
        if x.dim() == 2 and self.readout is not None and len(x) == len(self.readout):
            return x
        return take_rows(x.flatten(0, -2), self.ends(x.shape[1]))

    @property
    def keys(self) -> Tensor | None:
        """key_mask as scores n h l l are masked: n 1|h 1 l."""
        mask = self.key_mask
        return None if mask is None else (mask[:, None] if mask.dim() == 2 else mask)[:, :, None]

    @property
    def across(self) -> Tensor | None:
        """fusion_key_mask, without padding; None where there is none."""
        if self.fusion_key_mask is None and self.packing is not None:
            return self.packing.mask
        return self.fusion_key_mask

    def of_rows(self, mask: Tensor | None) -> Tensor | None:
        """A mask n l as the rows are: n l, or t; None where it hides nothing but padding."""
        if mask is None or self.packing is None:
            return mask
        return None if mask is self.packing.mask else mask.flatten()[self.packing.pack_index]

    def seen_by_readout(self, length: int) -> Tensor | None:
        """n 1|h 1 l, bool: the keys that the readout rows may see; None where they may see all."""
        if not self.causal:
            return self.keys
        assert self.readout is not None, "who asks has readout rows"
        earlier = torch.arange(length, device=self.readout.device) <= self.readout[:, None]
        earlier = earlier[:, None, None]  # n 1 1 l
        return earlier if self.keys is None else self.keys & earlier
