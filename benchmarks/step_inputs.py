"""Towers, batches and counts that the benchmark of a training step and its tests share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.step_work import StepSize
from discovla.batch import Batch, Losses
from discovla.methods.discovla import DiscoVLA, DiscoVLAConfig
from discovla.towers.architecture import Architecture, TowerShape
from discovla.towers.weights import initialise

SOT, EOT = 49406, 49407
# ops that start no kernel though they are no views
STILL = {"_unsafe_view", "detach", "empty", "empty_like", "empty_strided", "new_empty"}
# ops of our own that start more than one kernel; the last has four more where the logit scale trains
SEVERAL = {
    "mlp": 2,
    "fusion_norm": 2,
    "fusion_norm_backward": 3,
    "alignment_block": 4,
    "alignment_block_backward": 7,
}
WORDS = (6, 15)  # of a caption; with start and end 12 tokens on average


def architecture(name: str) -> Architecture:
    """OpenAI's ViT-B/32, B/16 or L/14."""
    sizes = {
        "ViT-B/32": (768, 12, 512, 512),
        "ViT-B/16": (768, 12, 512, 512),
        "ViT-L/14": (1024, 24, 768, 768),
    }
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
    """The published DiscoVLA with noise for weights, ready to train, computing in `dtype`."""
    made = DiscoVLA(a, DiscoVLAConfig())
    torch.manual_seed(0)
    initialise(made, a, seed=0)
    made.freeze()
    with torch.no_grad():  # what starts at zero has no gradient where it is multiplied by itself
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01 * torch.randn_like(parameter))
    made.compute_dtype = dtype
    return made.to(device)


def noise(a: Architecture, pairs: int, *, frames: int = 12, length: int = 32, seed: int = 0) -> Batch:
    """Noise frames and captions of 8 to 16 tokens, 12 on average, padded to `length`."""
    generator = torch.Generator().manual_seed(seed)
    ids, mask = _captions(pairs, length, generator)
    frame_ids, frame_mask = _captions(pairs * frames, length, generator)
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


def _captions(n: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    words = torch.randint(*WORDS, (n,), generator=generator)
    ids = torch.randint(1, SOT, (n, length), generator=generator)
    ids[:, 0] = SOT
    ids[torch.arange(n), words + 1] = EOT
    mask = torch.arange(length) <= (words + 1)[:, None]
    return ids * mask, mask


def size_of(batch: Batch) -> StepSize:
    """The size of a batch, as the closed forms take it."""
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
    """Forward and backward of our step; gradients are then in the parameters."""
    for parameter in model.parameters():
        parameter.grad = None
    losses = model.losses(*model.encode(batch))
    losses.total.backward()
    return losses


def flops(call: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products of a call, on meta tensors."""
    in_place = {torch.ops.aten.addmm_: _addmm_flops}  # which torch leaves out
    with FlopCounterMode(display=False, custom_mapping=in_place) as counted:
        call()
    return counted.get_total_flops()


def _addmm_flops(c: torch.Size, a: torch.Size, b: torch.Size, **options: object) -> int:
    return 2 * a[0] * a[1] * b[1]


def bytes_kept(call: Callable[[], object], parameters: list[Tensor]) -> int:
    """Bytes of the distinct tensors that autograd keeps for backward, but parameters."""
    own = {p.untyped_storage()._cdata for p in parameters}
    found: dict[int, Any] = {}  # held, lest a freed one's address be taken again

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in own:
            found[storage._cdata] = storage
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        kept = call()
    del kept
    return sum(storage.nbytes() for storage in found.values())


class Launches(TorchDispatchMode):
    """Counts the ops that would start a kernel on a GPU: all but views and allocations.

    device: where its tensors are; what is computed elsewhere (masks, on the CPU) starts none.
    """

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        self.count, self.device = 0, device
        self.ops: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        found = [x for x in (out if isinstance(out, tuple | list) else [out]) if isinstance(x, Tensor)]
        here = any(x.device.type == self.device and x.numel() for x in found)
        name = func.overloadpacket.__name__
        if here and not func.is_view and name not in STILL:
            launches = SEVERAL.get(name, 1) if func.namespace == "discovla" else 1
            self.count += launches
            self.ops[name] += launches
        return out
