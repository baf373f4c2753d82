"""Work of a DiscoVLA training step in closed form: floating-point operations, and bytes kept for backward.

Operations are those of matrix products, two for each multiplication and addition, as torch's FlopCounterMode
counts them.  `reference_flops` is the published step.  `needed_flops` is ours: captions without padding, the
last block only for the rows that are read, no gradients of frozen weights, attention recomputed in backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from discovla.methods.discovla import DiscoVLAConfig
from discovla.nn.memory import WIDTHS
from discovla.ops.dispatch import Memory
from discovla.towers.architecture import Architecture, TowerShape


@dataclass(frozen=True, kw_only=True)
class StepSize:
    """Size of a batch."""

    pairs: int
    frames: int
    length: int
    """Tokens of a padded caption."""
    tokens: float
    """Tokens of a caption without padding, on average."""
    longest: int
    """Tokens of the longest caption without padding; attention pads the others to it."""


@dataclass(frozen=True, kw_only=True)
class _Pass:
    """`n` sequences through a tower: `rows` in all, `keys` of each; `group` > 0 if the last blocks fuse."""

    tower: TowerShape
    rank: int
    n: int
    rows: float
    keys: int
    group: int
    fused: int

    def flops(self, *, pruned: bool) -> float:
        """Return the operations of all blocks, forward and backward."""
        total = 0.0
        for layer in range(self.tower.layers):
            last = pruned and layer == self.tower.layers - 1
            total += self.last(layer == 0) if last else self.block(layer == 0, recompute=pruned)
            if self.group and layer >= self.tower.layers - self.fused:
                total += self.fusion(recompute=pruned)
        return total

    def block(self, first: bool, *, recompute: bool) -> float:
        """One block; the first has no gradient by its input, `recompute` computes attention twice."""
        w, m, t = self.tower.width, self.tower.mlp_width, self.rows
        frozen = 2 * (2 * t * (4 * w * w + 2 * w * m)) - (2 * t * 3 * w * w if first else 0)
        scores = 2 * 2 * self.n * self.keys**2 * w
        return frozen + self.lora(t, 3 * w, first) + scores * (4 if recompute else 3)

    def last(self, first: bool) -> float:
        """The last block if only n rows are read: keys and values of all rows, everything else of those."""
        w, m, t, n = self.tower.width, self.tower.mlp_width, self.rows, self.n
        inputs = 2 * (t * 2 * w * w + n * w * w)
        frozen = 2 * (inputs + 2 * n * (w * w + 2 * w * m)) - (inputs if first else 0)
        lora = self.lora(t, 2 * w, first) + self.lora(n, w, first)
        return frozen + lora + 2 * 2 * n * self.keys * w * 4

    def lora(self, rows: float, outputs: int, first: bool) -> float:
        """A low-rank update: forward, gradients of its factors, and by the input except in block 0."""
        down, up = 2 * rows * self.tower.width * self.rank, 2 * rows * self.rank * outputs
        return (2 if first else 3) * down + 3 * up

    def fusion(self, *, recompute: bool) -> float:
        """Added work of a fused block: n queries over their group, their output projection, the adapter."""
        w, n = self.tower.width, self.n
        scores = 2 * 2 * n * self.group * self.keys * w
        return scores * (4 if recompute else 3) + 2 * 2 * n * w * w + 3 * 2 * n * 2 * w * self.rank


def _passes(a: Architecture, config: DiscoVLAConfig, size: StepSize, *, packed: bool) -> list[_Pass]:
    """Return the passes of captions, frame captions and frames."""
    tokens, keys = (size.tokens, size.longest) if packed else (size.length, size.length)
    b, bf, patches = size.pairs, size.pairs * size.frames, 1 + a.patches
    text = {"tower": a.text, "rank": config.lora_rank, "keys": keys, "fused": config.fused_text_blocks}
    return [
        _Pass(**text, n=b, rows=b * tokens, group=0),
        _Pass(**text, n=bf, rows=bf * tokens, group=size.frames),
        _Pass(
            tower=a.vision,
            rank=config.lora_rank,
            n=bf,
            rows=bf * patches,
            keys=patches,
            group=size.frames,
            fused=config.fused_vision_blocks,
        ),
    ]


def reference_flops(a: Architecture, config: DiscoVLAConfig, size: StepSize) -> float:
    """Return the operations of the published step; each of its two similarities has two gradients."""
    passes = _passes(a, config, size, packed=False)
    projections = sum(2 * 2 * one.rows * one.tower.width * a.embed_dim for one in passes)
    similarities = 3 * 2 * size.pairs**2 * (1 + size.frames**2) * a.embed_dim
    return sum(one.flops(pruned=False) for one in passes) + projections + _patches(a, size) + similarities


def needed_flops(a: Architecture, config: DiscoVLAConfig, size: StepSize) -> float:
    """Return the operations of our step."""
    passes = _passes(a, config, size, packed=True)
    projections = sum(2 * 2 * one.n * one.tower.width * a.embed_dim for one in passes)
    similarities = 3 * 2 * size.pairs**2 * (1 + size.frames**2) * a.embed_dim
    return sum(one.flops(pruned=True) for one in passes) + projections + _patches(a, size) + similarities


def frozen_matmuls(
    a: Architecture, config: DiscoVLAConfig, size: StepSize
) -> Iterator[tuple[int, int, int, bool]]:
    """Yield the products of our step with frozen weights, most of `needed_flops`.

    Each is rows, inputs, outputs, and True if there is a gradient by the input.
    """
    for one in _passes(a, config, size, packed=True):
        w, m, every = one.tower.width, one.tower.mlp_width, round(one.rows)
        for layer in range(one.tower.layers):
            inner, n = layer > 0, every
            if layer == one.tower.layers - 1:
                n = one.n
                yield every, w, 2 * w, inner
                yield n, w, w, inner
            else:
                yield every, w, 3 * w, inner
            yield from ((n, w, w, True), (n, w, m, True), (n, m, w, True))


def kept_bytes(
    a: Architecture, config: DiscoVLAConfig, size: StepSize, element: int, memory: Memory = "keep"
) -> float:
    """Return an upper bound of the bytes that our blocks keep for backward: 9 widths a token and layer.

    These are the block's input, q, k and v, the input of the MLP, and its hidden layer (four widths), each
    number of `element` bytes; other modes of memory keep 5, 2 and 1 widths.
    """
    passes = _passes(a, config, size, packed=True)
    return sum(WIDTHS[memory] * element * one.tower.width * one.tower.layers * one.rows for one in passes)


def _patches(a: Architecture, size: StepSize) -> float:
    return 2 * size.pairs * size.frames * a.patches * a.vision.width * 3 * a.patch_size**2
