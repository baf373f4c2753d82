"""CLIP's vision transformer on the frames of videos."""

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
from discovla.ops.preprocess_frames import CLIP_MEAN, CLIP_STD, preprocess_frames
from discovla.towers.architecture import Architecture

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


class VisionTower(nn.Module):
    """embed -> blocks -> project.

    A method may replace blocks by `make_block(layer)`, or run `blocks` itself between `embed` and `project`.

    impl, memory: how blocks are computed and what they keep for backward; see `ops.dispatch`, `nn.memory`.
    merging: merges tokens on the way through the blocks; None: all tokens stay.

    With kernels and a frozen patch embedding, the normalisation of pixels is folded into the embedding: the
    kernel writes bytes minus 128, and each pass computes W' and b' from the current weights.  In float32
    features agree to 1e-5; in bfloat16 the error is as large as without, from W' instead of the rows.  Plain
    torch normalises the pixels, which costs it one multiplication.
    """

    impl: Impl = "auto"
    memory: Memory = "auto"

    def __init__(self, architecture: Architecture, make_block: MakeBlock | None = None) -> None:
        super().__init__()
        shape = architecture.vision
        make_block = make_block or (lambda layer: Block(shape.block(architecture.activation)))
        self.image_size, self.patch_size = architecture.image_size, architecture.patch_size
        self.patch_embedding = nn.Parameter(torch.empty(shape.width, 3, self.patch_size, self.patch_size))
        self.class_embedding = nn.Parameter(torch.empty(shape.width))
        self.position_embedding = nn.Parameter(torch.empty(1 + architecture.patches, shape.width))
        self.ln_pre = LayerNorm(shape.width)
        self.blocks = nn.ModuleList(make_block(layer) for layer in range(shape.layers))
        self.plan = MemoryPlan(shape.layers)
        self.ln_post = LayerNorm(shape.width)
        self.projection = nn.Parameter(torch.empty(shape.width, architecture.embed_dim))
        self.merging: TokenMerging | None = None

    def pixels(
        self,
        frames: Tensor,
        *,
        mean: tuple[float, ...] = CLIP_MEAN,
        std: tuple[float, ...] = CLIP_STD,
        dtype: torch.dtype = torch.float32,
    ) -> Pixels:
        """Prepare frames for `embed`: normalised, b f c y x, or with kernels as patches, b f p (c y x).

        Args: as for `ops.preprocess_frames`.
        """
        impl = choose("block", self.impl, frames.device.type)
        impl = "torch" if impl == "compiled" else impl
        if impl == "torch" or frames.is_floating_point():
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
        """Frames n c y x, or their patches n p (c y x), to tokens n 1+p w, the class token first."""
        if isinstance(frames, CentredPatches):
            rows, impl = frames.rows, cast(Impl, choose("block", self.impl, frames.rows.device.type))
            folded = fold_normalisation(
                self.patch_embedding, statistics=frames.statistics, dtype=rows.dtype, impl=impl
            )
            return self._tokens(F.linear(rows, *folded))
        kernel = self.patch_embedding.to(frames.dtype)
        if frames.dim() == 3:
            return self._tokens(F.linear(frames, kernel.flatten(1)))
        expected = (3, self.image_size, self.image_size)
        if frames.shape[1:] != expected:
            raise ValueError(f"frames: expected n x {expected}, got {tuple(frames.shape)}")
        patches = F.conv2d(frames, kernel, stride=self.patch_size)  # n w y x
        return self._tokens(patches.flatten(2).transpose(1, 2))

    def _tokens(self, patches: Tensor) -> Tensor:
        """Prepend the class token to embedded patches n p w, add positions and norm: n 1+p w."""
        dtype = patches.dtype
        cls = self.class_embedding.to(dtype).expand(patches.shape[0], 1, -1)
        x = torch.cat([cls, patches], dim=1) + self.position_embedding.to(dtype)  # n 1+p w
        return self.ln_pre.norm_residual(x, self.impl)

    def project(self, cls: Residual) -> Tensor:
        """Norm and project class rows n w to joint features n d."""
        y = self.ln_post.norm_residual(cls, self.impl)
        return y @ self.projection.to(y.dtype)

    def layout(self, frames: Tensor, group: int, frame_mask: Tensor | None = None) -> SequenceLayout:
        """Layout of n embedded frames for the blocks, `group` frames a video.

        Args:
            frame_mask: b f, bool; hides padded frames in fusion blocks.
        """
        n, tokens, _ = frames.shape
        visible = None if frame_mask is None else frame_mask.flatten()[:, None].expand(n, tokens)
        readout = torch.zeros(n, dtype=torch.long, device=frames.device)
        return SequenceLayout(
            group=group,
            readout=readout,
            fusion_key_mask=visible,
            impl=self.impl,
            memory=self.plan.choose(self.memory, frames),
        )

    def forward(self, frames: Pixels, frame_mask: Tensor | None = None) -> Tensor:
        """Frame features b f d of the result of `pixels`; frames see each other in fusion blocks only."""
        b, f = frames.shape[:2]
        x = self.embed(frames.flatten(0, 1))
        layout = self.layout(x, f, frame_mask)
        if self.merging is None:
            cls = run_blocks(self.blocks, x, layout)  # n w
        else:
            cls, _ = self.merging(self.blocks, x, layout)
        return self.project(cls).unflatten(0, (b, f))
