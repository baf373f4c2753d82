"""Layout of sequences in rows: packing, masks, groups and readout rows, shared by all blocks of a tower."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Tensor, nn

from discovla.nn.recompute import pad_rows, take_rows
from discovla.ops.dispatch import Impl, Memory, choose, compile_fails, warn_once
from discovla.ops.lora_norm import LoRAWeights
from discovla.ops.merge_tokens import merge_tokens
from discovla.ops.short_attention import Packing

# the residual stream: rows n l w or packed t w; a pair is (rows, an update not yet added to them)
Residual = Tensor | tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class TokenMerge:
    """Tokens that a block merges, and those that have been merged before.

    count: tokens of each sequence that go into others.  fixed: class rows, which stay as they are.
    sizes: n l, numbers of tokens merged into each.
    visible: n l, bool, as `ops.merge_tokens` takes it.
    places: n k, int64, the rows in which the k tokens that a sequence had at first lie now; None: not traced.
    """

    count: int
    fixed: int
    sizes: Tensor
    visible: Tensor | None = None
    places: Tensor | None = None

    def apply(self, x: Tensor, metric: Tensor, impl: Impl) -> tuple[Tensor, TokenMerge]:
        """Return the rows n l-count w, and their sizes, visibility and places.

        Args:
            metric: n l c, by which similar rows are found.
        """
        impl = "torch" if self.visible is not None and impl == "triton" else impl
        merged = merge_tokens(
            x, self.sizes, metric, self.count, fixed=self.fixed, visible=self.visible, impl=impl
        )
        visible, places, target = self.visible, self.places, merged.target
        if visible is not None:
            visible = (
                torch.zeros_like(merged.sizes, dtype=torch.int32).scatter_add_(1, target, visible.int()) > 0
            )
        if places is not None:
            places = target.gather(1, places)
        return merged.rows, replace(self, sizes=merged.sizes, visible=visible, places=places)


@dataclass(frozen=True, kw_only=True)
class SequenceLayout:
    """n sequences of at most l tokens, as padded rows n l w or packed rows t w.

    causal: a token sees itself and earlier tokens only.
    key_mask: n l, or n h l with a mask for each head; bool, true on visible tokens.  None: all are visible.
    key_sizes: n l; attention adds the logarithm to the scores of each key (proportional attention of ToMe).
    merge: tokens that the block merges between attention and MLP; it then returns (rows, TokenMerge).
    group: number of neighbouring sequences (the frames of a video) that see each other in fusion blocks; 0
        for none.
    ungrouped: number of sequences before the groups; fusion blocks treat them as ordinary blocks do.
    readout: n, int64, the place of the readout token (CLS or EOT) in each sequence.
    fusion_key_mask: n l, bool, the tokens visible across a group.  None: all are.
    packing: how packed rows lie; None for padded rows.  Masks are padded (n l) in both cases.
    rotation: l c/2 2, cosine and sine by which blocks turn queries and keys (`nn.rotation`); None for none.
        The readout token then comes first and is not turned.
    readout_only: True for the last block of a tower, which returns the readout rows alone, n w.
    impl, memory: how blocks are computed and what they keep for backward; see `ops.dispatch`.
    defer_update: a block returns its last update beside its rows, so that the next norm adds it in one pass.
    lora_weights: of each Attention, its LoRA as kernels take it, if it was prepared for all blocks at once.
    cache: index tensors that all blocks share.
    """

    causal: bool = False
    key_mask: Tensor | None = None
    key_sizes: Tensor | None = None
    merge: TokenMerge | None = None
    group: int = 0
    ungrouped: int = 0
    readout: Tensor | None = None
    fusion_key_mask: Tensor | None = None
    packing: Packing | None = None
    rotation: Tensor | None = None
    readout_only: bool = False
    impl: Impl = "auto"
    memory: Memory = "keep"
    defer_update: bool = False
    lora_weights: Mapping[nn.Module, LoRAWeights] = field(default_factory=dict, repr=False, compare=False)
    cache: dict[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def resolve(self, x: Residual) -> SequenceLayout:
        """Replace impl = "auto" by the implementation that computes blocks on rows x.

        Raises:
            KernelUnavailable: the implementation asked for by name cannot run here.
        """
        impl = resolve_impl(x, self.impl)
        return self if impl == self.impl else replace(self, impl=impl)

    def compiles(self, x: Tensor) -> bool:
        """Return True if blocks run under torch.compile: in training, where backward recomputes nothing.

        Evaluation, with its batches of other sizes, runs the same plain torch without the compiler.
        """
        if not torch.is_grad_enabled() or self.memory != "keep":
            return False
        return choose_blocks(self.impl, x) == "compiled"

    def for_compile(self, x: Tensor) -> Tensor:
        """Compute the index tensors that blocks share, and mark the number of packed rows as dynamic."""
        if self.readout is not None:
            self.readout_rows(x.shape[1])
        if self.packing is None:
            return x
        _ = self.packing.pad_index, self.packing.pack_index
        torch._dynamo.maybe_mark_dynamic(x, 0)
        return x

    @property
    def attention_impl(self) -> Impl:
        """`impl` for attention within sequences, whose kernel has no masks of single heads."""
        masked_heads = self.key_mask is not None and self.key_mask.dim() == 3
        return "torch" if masked_heads else self.impl

    @property
    def readout_impl(self) -> Impl:
        """`impl` for attention of readout rows and of groups, whose kernels also have no sizes or merges."""
        sized = self.key_sizes is not None or self.merge is not None
        return "torch" if sized else self.attention_impl

    def pad(self, x: Tensor) -> Tensor:
        """Rows as n l w."""
        return x if self.packing is None else pad_rows(x, self.packing.pad_index, self.packing.pack_index)

    def unpad(self, x: Tensor) -> Tensor:
        """Padded rows n l w as this layout has them: the inverse of `pad`."""
        return x if self.packing is None else take_rows(x.flatten(0, 1), self.packing.pack_index)

    def mask_rows(self, mask: Tensor | None) -> Tensor | None:
        """A mask n l in the shape of the rows: n l, or t if they are packed."""
        if mask is None or self.packing is None:
            return mask
        return mask.flatten()[self.packing.pack_index]

    def read(self, x: Residual) -> Tensor:
        """Readout rows n w of all rows, a pending update added; x itself if a last block has returned it."""
        if isinstance(x, tuple):
            return self.read(x[0]) + self.read(x[1])
        if x.dim() == 2 and self.readout is not None and x.shape[0] == self.readout.shape[0]:
            return x
        return take_rows(x.flatten(0, -2), self.readout_rows(x.shape[1]))

    def readout_rows(self, length: int) -> Tensor:
        """n, int64: the readout row of each sequence among all rows; length: l of padded rows."""
        if self.readout is None:
            raise ValueError("layout.readout: expected the place of the readout token, found None")
        readout = self.readout
        if self.packing is not None:
            offsets = self.packing.offsets
            return self._cached("readout_rows", lambda: offsets[:-1] + readout)
        device = readout.device
        return self._cached(
            f"readout_rows of {length}",
            lambda: torch.arange(0, readout.shape[0] * length, length, device=device) + readout,
        )

    def readout_index(self, x: Tensor) -> Tensor:
        """Inverse of `readout_rows`: for each row of x the sequence it is the readout row of, int32, or -1.

        If x holds the readout rows alone, n w, these are 0 to n - 1.
        """
        assert self.readout is not None, "readout_index is used only with readout rows"
        rows, n = x[..., 0].numel(), self.readout.shape[0]
        sequences = self._cached("sequences", lambda: torch.arange(n, dtype=torch.int32, device=x.device))
        if x.dim() == 2 and rows == n:
            return sequences
        readout_rows = self.readout_rows(x.shape[1])
        return self._cached(
            "readout_index",
            lambda: sequences.new_full((rows,), -1).index_copy_(0, readout_rows, sequences),
        )

    def _cached(self, name: str, compute: Callable[[], Tensor]) -> Tensor:
        if name not in self.cache:
            self.cache[name] = compute()
        return self.cache[name]


def resolve_impl(x: Residual, impl: str) -> Impl:
    """The implementation that computes blocks, and the norms around them, on rows x; "torch" if compiled.

    Raises:
        KernelUnavailable: the implementation asked for by name cannot run here.
    """
    rows = x[0] if isinstance(x, tuple) else x
    chosen = cast(Impl, choose("block", impl, rows.device.type, operands=(rows,)))
    return "torch" if chosen == "compiled" else chosen


def choose_blocks(impl: str, x: Tensor) -> Impl:
    """The implementation of blocks on rows x; plain torch, with a warning, if torch.compile fails here."""
    chosen = cast(Impl, choose("block", impl, x.device.type, operands=(x,)))
    if chosen == "compiled" and impl == "auto" and (reason := compile_fails(x.device)):
        warn_once(f"blocks run without torch.compile, which fails here: {reason}")
        return "torch"
    return chosen
