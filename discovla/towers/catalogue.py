"""All models of open_clip: taken, or refused and why; their licences, sizes and operations."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from discovla import torchvision_cpu
from discovla.nn.block import BlockShape
from discovla.towers.architecture import Architecture, TowerShape
from discovla.towers.configs import architecture_from_config
from discovla.towers.licences import licence
from discovla.towers.pool import pool_shape
from discovla.towers.stem import KERNELS
from discovla.towers.text import TextTower
from discovla.towers.vision import VisionTower

FRAMES = 12  # of a video whose operations are counted


@dataclass(frozen=True, kw_only=True)
class ModelRow:
    """One model of open_clip.

    refused: why it is not taken; None if it is.
    licences: those of its weights; empty if open_clip names none.
    parameters: of both towers, and vision_operations: multiplications and additions of `FRAMES` frames,
    text_operations: of a caption that fills the context; None if it is refused.
    """

    name: str
    refused: str | None = None
    licences: tuple[str, ...] = ()
    image_size: int | None = None
    context_length: int | None = None
    parameters: int | None = None
    vision_operations: int | None = None
    text_operations: int | None = None


def list_models() -> list[ModelRow]:
    """Return a row for each of open_clip's models, by name."""
    torchvision_cpu.install()
    import open_clip
    from open_clip.pretrained import list_pretrained_tags_by_model

    rows = []
    for name in open_clip.list_models():
        licences = tuple(dict.fromkeys(licence(name, tag) for tag in list_pretrained_tags_by_model(name)))
        try:
            architecture = architecture_from_config(name, open_clip.get_model_config(name) or {})
        except ValueError as error:
            reason = str(error).removeprefix(f"{name}: ")
            rows.append(ModelRow(name=name, refused=reason, licences=licences))
            continue
        rows.append(
            ModelRow(
                name=name,
                licences=licences,
                image_size=architecture.image_size,
                context_length=architecture.context_length,
                parameters=count_parameters(architecture),
                vision_operations=FRAMES * frame_operations(architecture),
                text_operations=caption_operations(architecture),
            )
        )
    return rows


def count_parameters(architecture: Architecture) -> int:
    """Return the number of parameters of both towers and the logit scale."""
    total = 1 + architecture.logit_bias
    shallow = replace(
        architecture,
        vision=replace(architecture.vision, layers=1),
        text=replace(architecture.text, layers=1),
    )
    with torch.device("meta"):
        towers = VisionTower(shallow), TextTower(shallow)
    for tower, layers in zip(towers, (architecture.vision.layers, architecture.text.layers), strict=True):
        block = sum(p.numel() for p in tower.blocks.parameters())
        total += sum(p.numel() for p in tower.parameters()) + (layers - 1) * block
    return total


def frame_operations(architecture: Architecture) -> int:
    """Return the multiplications and additions of matrix products for one frame.

    A product of m x k and k x n counts 2 m k n; norms and activations are not counted.  All rows of the last
    block are counted, though a tower that reads the class row computes fewer.
    """
    form, width, patches = architecture.frames, architecture.vision.width, architecture.patches
    rows = patches + form.class_row
    total = _embedding(architecture) + _blocks(architecture.vision, architecture, rows)
    pooled = width
    if form.pool == "attention":
        shape = pool_shape(architecture)
        total += 2 * (2 * rows * width**2 + 2 * width**2 + 2 * rows * width) + _mlp(shape, 1)
    elif form.pool == "latent":
        pooled = architecture.embed_dim
        total += 2 * (2 * rows * width * pooled + 2 * pooled**2 + 2 * rows * pooled)
    return total + (2 * pooled * architecture.embed_dim if form.projection else 0)


def caption_operations(architecture: Architecture) -> int:
    """Return the same for a caption of as many tokens as the context has."""
    form, shape = architecture.captions, architecture.text
    rows = architecture.context_length + (form.readout == "class")
    projection = 2 * shape.width * architecture.embed_dim if form.projection else 0
    return _blocks(shape, architecture, rows) + projection


def _embedding(architecture: Architecture) -> int:
    """Operations of the patch embedding of a frame."""
    width, patches = architecture.vision.width, architecture.patches
    if not architecture.frames.stem:
        return 2 * patches * 3 * architecture.patch_size**2 * width
    total, cells, inputs = 0, patches * 16, 3
    for kernel, outputs in zip(KERNELS, (width // 4, width // 4, width), strict=True):
        total += 2 * cells * inputs * kernel**2 * outputs
        cells, inputs = cells // 4, outputs
    return total


def _blocks(tower: TowerShape, architecture: Architecture, rows: int) -> int:
    """Operations of all blocks of a tower on so many rows."""
    shape = tower.block(architecture.activation)
    attention = 2 * (4 * rows * shape.width**2 + 2 * rows**2 * shape.width)
    return tower.layers * (attention + _mlp(shape, rows))


def _mlp(shape: BlockShape, rows: int) -> int:
    products = 3 if shape.activation == "swiglu" else 2
    return 2 * products * rows * shape.width * shape.mlp_width
