"""The vision transformer, on the frames of videos."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from discovla.nn.block import Block, run_blocks
from discovla.nn.layers import LayerNorm
from discovla.nn.layout import Residual, SequenceLayout
from discovla.nn.memory import MemoryPlan
from discovla.nn.token_merging import TokenMerging
from discovla.ops.dispatch import Impl, Memory, choose
from discovla.ops.frame_patches import PixelStatistics, fold_normalisation, frame_patches
from discovla.ops.preprocess_frames import preprocess_frames
from discovla.towers.architecture import Architecture
from discovla.towers.pool import AttentionPool, LatentPool, pool_shape
from discovla.towers.stem import ConvolutionalStem

MakeBlock = Callable[[int], Block]


@dataclass(frozen=True, kw_only=True)
class CentredPatches:
    """Patches of frames that the patch embedding normalises.

    rows: b f p (c y x) or n p (c y x), pixel bytes minus 128, which every compute dtype holds exactly.
    statistics: mean and std of each channel, in [0, 1].
    """

    rows: Tensor
    statistics: PixelStatistics

    @property
    def shape(self) -> torch.Size:
        """Shape of the rows."""
        return self.rows.shape

    def flatten(self, start: int, end: int) -> CentredPatches:
        """Flatten axes `start` to `end` of the rows."""
        return replace(self, rows=self.rows.flatten(start, end))


Pixels = Tensor | CentredPatches  # frames as `VisionTower.embed` takes them


@dataclass(frozen=True, kw_only=True)
class FrameTokens:
    """Tokens of frames that the first blocks of a tower have computed.

    rows: b f l w.  blocks: number of these blocks.
    """

    rows: Tensor
    blocks: int


class VisionTower(nn.Module):
    """embed -> blocks -> features.

    What is around the blocks is described by `Architecture.frames`.  A method may replace blocks by
    `make_block(layer)`, or run `blocks` itself between `embed` and `project`.

    impl, memory: how blocks are computed and what they keep for backward; see `ops.dispatch`, `nn.memory`.
    merging: merges tokens on the way through the blocks; None: all tokens stay.

    With kernels and a frozen patch embedding, the normalisation of pixels is folded into the embedding: the
    kernel writes bytes minus 128, and each pass computes W' and b' from the current weights.  In float32
    features agree to 1e-5; in bfloat16 the error is as large as without, from W' instead of the rows.  Plain
    torch normalises the pixels, which costs it one multiplication.
    """

    impl: Impl = "auto"
    memory: Memory = "auto"
    rotation: Tensor | None

    def __init__(self, architecture: Architecture, make_block: MakeBlock | None = None) -> None:
        super().__init__()
        shape, self.form = architecture.vision, architecture.frames
        make_block = make_block or (lambda layer: Block(shape.block(architecture.activation)))
        self.image_size, self.patch_size = architecture.image_size, architecture.patch_size
        self.mean, self.std = architecture.preprocessing.mean, architecture.preprocessing.std
        self._add_embedding(architecture)
        self.ln_pre = LayerNorm(shape.width, eps=shape.eps) if self.form.norm_before else None
        self.blocks = nn.ModuleList(make_block(layer) for layer in range(shape.layers))
        self.plan = MemoryPlan(shape.layers)
        self.pool: AttentionPool | LatentPool | None = None
        pooled = shape.width
        if self.form.pool == "attention":
            self.pool = AttentionPool(pool_shape(architecture))
        elif self.form.pool == "latent":
            self.pool, pooled = LatentPool(architecture), architecture.embed_dim
        self.ln_post = LayerNorm(pooled, eps=shape.eps)
        projection = nn.Parameter(torch.empty(pooled, architecture.embed_dim))
        self.projection = projection if self.form.projection else None
        bias = nn.Parameter(torch.zeros(architecture.embed_dim))
        self.projection_bias = bias if self.form.projection_bias else None
        self.merging: TokenMerging | None = None

    def _add_embedding(self, architecture: Architecture) -> None:
        """Add the parameters that `embed` uses."""
        form, width = self.form, architecture.vision.width
        kernel = (width, 3, self.patch_size, self.patch_size)
        self.patch_embedding = None if form.stem else nn.Parameter(torch.empty(kernel))
        self.patch_bias = nn.Parameter(torch.zeros(width)) if form.patch_bias else None
        self.stem = ConvolutionalStem(width) if form.stem else None
        self.class_embedding = nn.Parameter(torch.empty(width)) if form.class_row else None
        rows = architecture.patches + (form.class_row and form.class_position)
        self.position_embedding = nn.Parameter(torch.empty(rows, width))
        rotation = None
        if form.rotation is not None:
            head_width = width // architecture.vision.heads
            rotation = form.rotation.table(architecture.side, head_width, class_row=form.class_row)
        self.register_buffer("rotation", rotation, persistent=False)

    def pixels(
        self,
        frames: Tensor,
        *,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Pixels:
        """Prepare frames for `embed`: normalised, b f c y x, or with kernels as patches, b f p (c y x).

        Args:
            frames, dtype: as for `ops.preprocess_frames`.
            mean, std: of each channel; None for those that the tower was trained with.
        """
        impl = choose("block", self.impl, frames.device.type)
        impl = "torch" if impl == "compiled" else impl
        mean, std = mean or self.mean, std or self.std
        whole = self.image_size % self.patch_size == 0
        if impl == "torch" or frames.is_floating_point() or self.patch_embedding is None or not whole:
            return preprocess_frames(frames, mean=mean, std=std, dtype=dtype)
        expected = (self.image_size, self.image_size, 3)
        if frames.shape[2:] != expected:
            raise ValueError(f"frames: expected b x f x {expected}, got {tuple(frames.shape)}")
        statistics, frozen = (mean, std), not self.patch_embedding.requires_grad
        rows = frame_patches(
            frames,
            self.patch_size,
            statistics=None if frozen else statistics,
            dtype=dtype,
            impl=cast(Impl, impl),
        ).unflatten(0, frames.shape[:2])
        return CentredPatches(rows=rows, statistics=statistics) if frozen else rows

    def embed(self, frames: Pixels) -> Tensor:
        """Frames n c y x, or their patches n p (c y x), to tokens n l w, the class token first if any."""
        if isinstance(frames, CentredPatches):
            assert self.patch_embedding is not None, "pixels gives patches only to a linear embedding"
            rows, impl = frames.rows, cast(Impl, choose("block", self.impl, frames.rows.device.type))
            folded = fold_normalisation(
                self.patch_embedding, statistics=frames.statistics, dtype=rows.dtype, impl=impl
            )
            return self._tokens(F.linear(rows, *folded))
        if frames.dim() == 3:
            assert self.patch_embedding is not None, "pixels gives patches only to a linear embedding"
            return self._tokens(F.linear(frames, self.patch_embedding.to(frames.dtype).flatten(1)))
        expected = (3, self.image_size, self.image_size)
        if frames.shape[1:] != expected:
            raise ValueError(f"frames: expected n x {expected}, got {tuple(frames.shape)}")
        if self.stem is not None:
            patches = self.stem(frames)  # n w y x
        else:
            assert self.patch_embedding is not None, "a tower without a stem has a linear embedding"
            patches = F.conv2d(frames, self.patch_embedding.to(frames.dtype), stride=self.patch_size)
        return self._tokens(patches.flatten(2).transpose(1, 2))

    def _tokens(self, patches: Tensor) -> Tensor:
        """Prepend the class token, if any, to embedded patches n p w, add positions and norm: n l w."""
        dtype = patches.dtype
        if self.patch_bias is not None:
            patches = patches + self.patch_bias.to(dtype)
        position = self.position_embedding.to(dtype)
        if self.class_embedding is None:
            x = patches + position  # n p w
        else:
            cls = self.class_embedding.to(dtype).expand(patches.shape[0], 1, -1)
            if self.form.class_position:
                x = torch.cat([cls, patches], dim=1) + position  # n 1+p w
            else:
                x = torch.cat([cls, patches + position], dim=1)
        return x if self.ln_pre is None else self.ln_pre.norm_residual(x, self.impl)

    def project(self, pooled: Residual) -> Tensor:
        """Norm and project class rows or means, n w, to joint features n d."""
        return self._to_joint(self.ln_post.norm_residual(pooled, self.impl))

    def _to_joint(self, y: Tensor) -> Tensor:
        """Normed features n w to joint features n d."""
        if self.projection is not None:
            y = y @ self.projection.to(y.dtype)
        return y if self.projection_bias is None else y + self.projection_bias.to(y.dtype)

    def features(
        self, rows: Residual, group: int, frame_mask: Tensor | None, sizes: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Joint features of frames, n d, and those of each frame by itself; they differ if the pool fuses.

        Args:
            rows: what `run_blocks` returns; all rows, unless the class row is read.
            group: frames of a video.  frame_mask: b f, bool, frames that the others of the video see.
            sizes: n l, numbers of tokens merged into each row; None: 1 each.
        """
        if isinstance(self.pool, AttentionPool):
            y = self.ln_post.norm_residual(rows, self.impl)
            fused, own = self.pool(y, group, frame_mask, sizes)
            fused_features = self._to_joint(fused)
            return fused_features, fused_features if own is fused else self._to_joint(own)
        if self.form.pool != "class":
            x = rows[0] + rows[1] if isinstance(rows, tuple) else rows
            rows = self._mean(x, sizes) if self.pool is None else self.pool(x, sizes)
        features = self.project(rows)
        return features, features

    def _mean(self, x: Tensor, sizes: Tensor | None) -> Tensor:
        """Mean of the patches, n w, of rows n l w, weighted by sizes."""
        first = int(self.form.class_row)
        if sizes is None:
            return x[:, first:].mean(1)
        weights = sizes[:, first:, None].to(x.dtype)
        return (x[:, first:] * weights).sum(1) / weights.sum(1)

    def layout(self, frames: Tensor, group: int, frame_mask: Tensor | None = None) -> SequenceLayout:
        """Layout of n embedded frames for the blocks, `group` frames a video.

        Args:
            frame_mask: b f, bool; hides padded frames in fusion blocks.
        """
        n, tokens, _ = frames.shape
        visible = None if frame_mask is None else frame_mask.flatten()[:, None].expand(n, tokens)
        # without a class row no block has a readout row
        readout = torch.zeros(n, dtype=torch.long, device=frames.device) if self.form.class_row else None
        rotation = self.rotation
        if rotation is not None:
            rotation = rotation.to(torch.promote_types(frames.dtype, torch.float32))
        return SequenceLayout(
            group=group,
            readout=readout,
            fusion_key_mask=visible,
            rotation=rotation,
            impl=self.impl,
            memory=self.plan.choose(self.memory, frames),
        )

    def forward(self, frames: Pixels | FrameTokens, frame_mask: Tensor | None = None) -> Tensor:
        """Frame features b f d of the result of `pixels` or `first_blocks`; frames see each other in fusion
        alone."""
        return self.with_unfused(frames, frame_mask)[0]

    def first_blocks(self, frames: Pixels, count: int) -> Tensor:
        """Tokens of frames after `count` blocks that neither fuse nor merge, b f l w."""
        b, f = frames.shape[:2]
        x = self.embed(frames.flatten(0, 1))
        if count:
            rows = run_blocks(self.blocks[:count], x, self.layout(x, f), readout_only=False)
            assert isinstance(rows, Tensor), "only a last block leaves an update pending"
            x = rows
        return x.unflatten(0, (b, f))

    def with_unfused(
        self, frames: Pixels | FrameTokens, frame_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Frame features b f d, and those from a pool that saw each frame by itself; else the same."""
        if isinstance(frames, FrameTokens):
            (b, f), x, blocks = frames.rows.shape[:2], frames.rows.flatten(0, 1), self.blocks[frames.blocks :]
        else:
            (b, f), x, blocks = frames.shape[:2], self.embed(frames.flatten(0, 1)), self.blocks
        layout = self.layout(x, f, frame_mask)
        sizes = None
        if self.merging is None:
            rows = run_blocks(blocks, x, layout, readout_only=self.form.pool == "class")
        else:
            rows, merged = self.merging(self.blocks, x, layout)
            sizes = self.merging.key_sizes(merged.sizes)
        features, own = self.features(rows, f, frame_mask, sizes)
        return features.unflatten(0, (b, f)), own.unflatten(0, (b, f))
