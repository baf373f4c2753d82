"""CLIP's vision transformer on the frames of videos."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from discovla.nn.memory import MemoryPlan
from discovla.nn.sequences import Sequences
from discovla.nn.transformer import Block, LayerNorm
from discovla.ops.dispatch import Impl, Memory, choose
from discovla.ops.frame_patches import frame_patches
from discovla.ops.preprocess_frames import CLIP_MEAN, CLIP_STD, preprocess_frames
from discovla.towers.architecture import Architecture

MakeBlock = Callable[[int], Block]


class VisionTower(nn.Module):
    """embed -> blocks -> project.

    A method may swap blocks through `make_block(layer)`, or walk `blocks` itself between `embed` and
    `project`.  `impl` and `memory` say how blocks are computed; see `ops.dispatch` and
    `nn.memory`.
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

    def pixels(
        self,
        frames: Tensor,
        *,
        mean: tuple[float, ...] = CLIP_MEAN,
        std: tuple[float, ...] = CLIP_STD,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Normalised frames as `embed` takes them: b f c y x, or where a kernel cuts them b f p (c y x).

        Args: as of `ops.preprocess_frames`.
        """
        impl = choose("block", self.impl, frames.device.type)
        if impl == "torch" or frames.is_floating_point():
            return preprocess_frames(frames, mean=mean, std=std, dtype=dtype)
        expected = (self.image_size, self.image_size, 3)
        if frames.shape[2:] != expected:
            raise ValueError(f"frames: expected b x f x {expected}, got {tuple(frames.shape)}")
        rows = frame_patches(
            frames, self.patch_size, statistics=(mean, std), dtype=dtype, impl=cast(Impl, impl)
        )
        return rows.unflatten(0, frames.shape[:2])

    def embed(self, frames: Tensor) -> Tensor:
        """Normalised frames n c y x, or their patches n p (c y x), to tokens n p w, the class token first."""
        dtype, kernel = frames.dtype, self.patch_embedding.to(frames.dtype)
        if frames.dim() == 3:
            patches = F.linear(frames, kernel.flatten(1))  # n p w
        else:
            expected = (3, self.image_size, self.image_size)
            if frames.shape[1:] != expected:
                raise ValueError(f"frames: expected n x {expected}, got {tuple(frames.shape)}")
            patches = F.conv2d(frames, kernel, stride=self.patch_size)  # n w y x
            patches = patches.flatten(2).transpose(1, 2)
        cls = self.class_embedding.to(dtype).expand(len(frames), 1, -1)
        x = torch.cat([cls, patches], dim=1) + self.position_embedding.to(dtype)  # n p w
        return self.ln_pre(x)

    def project(self, cls: Tensor) -> Tensor:
        """Class rows n w to joint features n d."""
        return self.ln_post(cls) @ self.projection.to(cls.dtype)

    def sequences(self, frames: Tensor, group: int, frame_mask: Tensor | None = None) -> Sequences:
        """What the blocks must know of n embedded frames, `group` of them a video.

        frame_mask: b f, bool; where given, padded frames are not seen in fusion blocks.
        """
        n, tokens, _ = frames.shape
        seen = None if frame_mask is None else frame_mask.flatten()[:, None].expand(n, tokens)
        readout = torch.zeros(n, dtype=torch.long, device=frames.device)
        return Sequences(
            group=group,
            readout=readout,
            fusion_key_mask=seen,
            impl=self.impl,
            memory=self.plan.of(self.memory, frames),
        )

    def forward(self, frames: Tensor, frame_mask: Tensor | None = None) -> Tensor:
        """Frame features b f d of what `pixels` gives; frames meet in fusion blocks only."""
        b, f = frames.shape[:2]
        x = self.embed(frames.flatten(0, 1))
        sequences = self.sequences(x, f, frame_mask)
        inner = sequences.inner()
        for block in self.blocks[:-1]:
            x = block(x, inner)
        cls = self.blocks[-1](x, sequences.last())  # n w
        return self.project(cls).unflatten(0, (b, f))
