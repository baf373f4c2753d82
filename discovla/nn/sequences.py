"""What blocks must know of the sequences they are given besides their rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from discovla.nn.autograd import pad_rows, take_rows
from discovla.ops.dispatch import Impl, Memory
from discovla.ops.lora_norm import LoRAWeights
from discovla.ops.short_attention import Packing

# rows n l w or packed t w; of a chain of ops also with what is still to be added to them, of the same shape
Rows = Tensor | tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class Sequences:
    """What blocks must know of the n sequences of l tokens they are given: as n l w, or packed as t w.

    causal: a token sees itself and earlier ones only.
    key_mask: n l, or n h l with one for each head, bool, true on tokens that may be seen; None where all may.
    group: how many neighbouring sequences (frames) make one sample whose parts look at each other in fusion
        blocks; 0 where every sequence stands alone.
    alone: how many sequences stand alone all the same; they come before the groups.
    readout: n, int64, the row of each sequence that is read at the end (CLS or EOT).
    fusion_key_mask: n l, bool, the tokens that may be seen across the group.
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

    def inner(self) -> Sequences:
        """The same for the blocks of a tower before its last."""
        return replace(self, deferred=self.memory == "keep")

    def last(self, *, pruned: bool = True) -> Sequences:
        """The same for the last block, of which only readout rows are needed where it is pruned."""
        return replace(self, pruned=pruned, deferred=False)

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
        readout = self.readout
        return self._once(f"ends of {length}", lambda: self._ends(readout, length))

    def _ends(self, readout: Tensor, length: int) -> Tensor:
        if self.packing is not None:
            return self.packing.offsets[:-1] + readout
        return torch.arange(0, len(readout) * length, length, device=readout.device) + readout

    def slots(self, x: Tensor) -> Tensor:
        """Of each row of x (n l w or t w) the grouped sequence whose readout row it is, int32; < 0 of none.

        In a pruned block x is n w.
        """
        rows, device = x[..., 0].numel(), x.device
        if self.pruned:
            return torch.arange(-self.alone, rows - self.alone, dtype=torch.int32, device=device)

        def find() -> Tensor:
            ends = self.ends(x.shape[1])[self.alone :]
            order = torch.arange(len(ends), dtype=torch.int32, device=device)
            return torch.full((rows,), -1, dtype=torch.int32, device=device).index_copy_(0, ends, order)

        return self._once("slots", find)

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

    def of_rows(self, mask: Tensor | None) -> Tensor | None:
        """A mask n l as the rows are: n l, or t; None where it hides nothing but padding."""
        if mask is None or self.packing is None:
            return mask
        return None if mask is self.packing.real else mask.flatten()[self.packing.rows]

    def seen_by_readout(self, length: int) -> Tensor | None:
        """n 1|h 1 l, bool: the keys that the readout rows may see; None where they may see all."""
        if not self.causal:
            return self.keys
        assert self.readout is not None, "who asks has readout rows"
        earlier = torch.arange(length, device=self.readout.device) <= self.readout[:, None]
        earlier = earlier[:, None, None]  # n 1 1 l
        return earlier if self.keys is None else self.keys & earlier
