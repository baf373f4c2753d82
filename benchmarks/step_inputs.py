"""Models and batches of noise for the benchmark of a training step."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.step_work import StepSize
from discovla import torchvision_cpu
from discovla.batch import Batch, Losses
from discovla.methods.discovla import DiscoVLA, DiscoVLAConfig
from discovla.towers.architecture import Architecture, TowerShape
from discovla.towers.configs import architecture_from_config
from discovla.towers.weights import initialise

SOT, EOT = 49406, 49407
WORDS = (6, 15)  # of a caption; with start and end 12 tokens on average


def architecture(name: str) -> Architecture:
    """Return the architecture of OpenAI's ViT-B/32, B/16 or L/14, or of a model by open_clip's name."""
    sizes = {
        "ViT-B/32": (768, 12, 512, 512),
        "ViT-B/16": (768, 12, 512, 512),
        "ViT-L/14": (1024, 24, 768, 768),
    }
    if name not in sizes:
        torchvision_cpu.install()
        import open_clip

        config = open_clip.get_model_config(name)
        if config is None:
            raise ValueError(f"model: expected a name of open_clip, found {name!r}")
        return architecture_from_config(name, config)
    width, layers, text, joint = sizes[name]
    return Architecture(
        embed_dim=joint,
        image_size=224,
        patch_size=int(name.split("/")[1]),
        context_length=77,
        vocab_size=EOT + 1,
        activation="quick_gelu",
        vision=TowerShape(width=width, layers=layers, heads=width // 64, mlp_width=4 * width),
        text=TowerShape(width=text, layers=12, heads=text // 64, mlp_width=4 * text),
    )


def method(a: Architecture, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> DiscoVLA:
    """Make the published DiscoVLA with random weights, ready to train, computing in `dtype`.

    Of towers without a class row only the pool fuses.
    """
    torch.manual_seed(0)  # before the model draws its adapters
    made = DiscoVLA(a, DiscoVLAConfig() if a.frames.class_row else DiscoVLAConfig(fused_vision_blocks=1))
    initialise(made, a, seed=0)
    made.freeze()
    with torch.no_grad():  # products of two parameters at zero would have no gradients
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01 * torch.randn_like(parameter))
    made.compute_dtype = dtype
    return made.to(device)


def noise(
    a: Architecture, pairs: int, *, frames: int = 12, length: int = 32, full: bool = False, seed: int = 0
) -> Batch:
    """Make frames of noise and random captions.

    Captions have 8 to 16 tokens, 12 on average, padded to `length`; with `full` they have `length` tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    words = (length - 2, length - 1) if full else WORDS
    ids, mask = _captions(pairs, length, words, generator)
    frame_ids, frame_mask = _captions(pairs * frames, length, words, generator)
    pixels = (pairs, frames, a.image_size, a.image_size, 3)
    return Batch(
        text_ids=ids,
        text_mask=mask,
        frames=torch.randint(0, 256, pixels, generator=generator, dtype=torch.uint8),
        frame_mask=torch.ones(pairs, frames, dtype=torch.bool),
        frame_text_ids=frame_ids.unflatten(0, (pairs, frames)),
        frame_text_mask=frame_mask.unflatten(0, (pairs, frames)),
        video_index=torch.arange(pairs),
        valid=None,
    )


def _captions(
    n: int, length: int, limits: tuple[int, int], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    words = torch.randint(*limits, (n,), generator=generator)
    ids = torch.randint(1, SOT, (n, length), generator=generator)
    ids[:, 0] = SOT
    ids[torch.arange(n), words + 1] = EOT
    mask = torch.arange(length) <= (words + 1)[:, None]
    return ids * mask, mask


def size_of(batch: Batch) -> StepSize:
    """Return the size of a batch for the closed forms of `step_work.py`."""
    assert batch.frame_text_mask is not None
    masks = torch.cat([batch.text_mask, batch.frame_text_mask.flatten(0, 1)])
    lengths = masks.sum(1)
    return StepSize(
        pairs=len(batch),
        frames=batch.frames.shape[1],
        length=masks.shape[1],
        tokens=float(lengths.float().mean()),
        longest=int(lengths.max()),
    )


def step(model: DiscoVLA, batch: Batch) -> Losses:
    """Run forward and backward of our step; gradients are in the parameters."""
    for parameter in model.parameters():
        parameter.grad = None
    losses = model.losses(*model.encode(batch))
    losses.total.backward()
    return losses
