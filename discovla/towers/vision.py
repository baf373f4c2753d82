"""CLIP's vision transformer on the frames of videos."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from discovla.nn.transformer import Block, LayerNorm, Sequences
from discovla.towers.architecture import Architecture

MakeBlock = Callable[[int], Block]


class VisionTower(nn.Module):
    """embed -> blocks -> project.

    A method may swap blocks through `make_block(layer)`, or walk `blocks` itself between `embed` and
    `project`.
    """

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
        self.ln_post = LayerNorm(shape.width)
        self.projection = nn.Parameter(torch.empty(shape.width, architecture.embed_dim))

    def embed(self, frames: Tensor) -> Tensor:
        """Normalised frames n c y x to tokens n p w, the class token first."""
        expected = (3, self.image_size, self.image_size)
        if frames.shape[1:] != expected:
            raise ValueError(f"frames: expected n x {expected}, got {tuple(frames.shape)}")
        dtype = frames.dtype
        patches = F.conv2d(frames, self.patch_embedding.to(dtype), stride=self.patch_size)  # n w y x
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
        return Sequences(
            group=group, readout=torch.zeros(n, dtype=torch.long, device=frames.device), fusion_key_mask=seen
        )

    def forward(self, frames: Tensor, frame_mask: Tensor | None = None) -> Tensor:
        """Frame features b f d of normalised frames b f c y x; frames meet in fusion blocks only."""
        b, f = frames.shape[:2]
        x = self.embed(frames.flatten(0, 1))
        sequences = self.sequences(x, f, frame_mask)
        for block in self.blocks[:-1]:
            x = block(x, sequences)
        cls = self.blocks[-1](x, sequences.last())  # n w
        return self.project(cls).unflatten(0, (b, f))
