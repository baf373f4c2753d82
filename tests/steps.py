"""Train steps of every method on one or several processes in float64, with their work and traffic."""

from __future__ import annotations

import multiprocessing
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from discovla.batch import Batch
from discovla.engine.distributed import World, gather_objects, join_world, leave_world
from discovla.methods import METHODS
from discovla.methods.base import Method
from discovla.testing import noise_batch, tiny_architecture
from discovla.towers.weights import initialise
from discovla.train_step import TrainStep
from tests import runs  # its fork server has everything imported
from tests.engine.launch import LAUNCHER, free_port

BATCH, FRAMES = 8, 3
BAD = [1, 6, 7]  # of four ranks, the last has no readable clip
ALIGNED = {"alpha": 0.3, "beta": 0.5}
VARIANTS: dict[str, dict[str, Any]] = {
    "clip": {"name": "clip", "exclude_same_video": True},
    "discovla": {"name": "discovla", "fused_vision_blocks": 1, "fused_text_blocks": 1},
    "discovla, repaired": {
        "name": "discovla",
        "fused_vision_blocks": 1,
        "fused_text_blocks": 1,
        "mask_padded_frames": True,
        "exclude_same_video": True,
        "detach_teacher": True,
        "kl_norm": "fixed",
    },
    "discovla, in groups": {
        "name": "discovla",
        "fused_vision_blocks": 1,
        "fused_text_blocks": 1,
        "frame_group": 3,
        "exclude_same_video": True,
    },
    "order": {"name": "clip", "temporal": "basis", "reversed_negatives": 0.7, "swapped_captions": 0.6},
    "order, aligned": {
        "name": "discovla",
        "fused_vision_blocks": 1,
        "fused_text_blocks": 1,
        "frame_position": True,
        "reversed_negatives": 0.7,
        "swapped_captions": 0.6,
    },
    "order, pairs": {
        "name": "clip4clip",
        "head": "tightTransf",
        "head_layers": 1,
        "temporal": "basis",
        "reversed_negatives": 0.7,
        "reversed_when": "always",
        "swapped_captions": 0.6,
        **ALIGNED,
    },
    "order, tokens": {
        "name": "t2vparser",
        "stan_layers": 1,
        "decomposition_layers": 1,
        "decomposition_heads": 2,
        "temporal": "basis",
        "reversed_negatives": 0.7,
        "swapped_captions": 0.6,
    },
    "tokens": {"name": "clip", "similarity": "tokens", "exclude_same_video": True, **ALIGNED},
    "seqTransf": {"name": "clip4clip", "head": "seqTransf", "head_layers": 1},
    "tightTransf": {"name": "clip4clip", "head": "tightTransf", "head_layers": 1, **ALIGNED},
    "clip2video": {
        "name": "clip2video",
        "head_layers": 1,
        "exclude_same_video": True,
        "frame_group": 2,
        **ALIGNED,
    },
    "t2vparser": {
        "name": "t2vparser",
        "stan_layers": 1,
        "decomposition_layers": 1,
        "decomposition_heads": 2,
        "exclude_same_video": True,
        **ALIGNED,
    },
    "t2vparser, communicating": {
        "name": "t2vparser",
        "stan_layers": 1,
        "decomposition_layers": 1,
        "decomposition_heads": 2,
        "communication": True,
        "padding": "official",
    },
}


def make(variant: str | dict[str, Any]) -> Method:
    """Make a tiny method in float64 without dropout or zero weights, from a name of VARIANTS or a config."""
    architecture = tiny_architecture()
    config = VARIANTS[variant] if isinstance(variant, str) else variant
    cls = METHODS[config["name"]]
    torch.manual_seed(0)
    method = cls(architecture, cls.Config(**config))
    initialise(method, architecture, seed=0)
    method.initialise_from_clip()
    method.freeze()
    with torch.no_grad():
        for parameter in method.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    method.compute_dtype = torch.float64
    return method.double().eval()


def whole_batch(*, bad: bool | Sequence[int]) -> Batch:
    """Return the batch of all ranks: two clips occur twice and one also backwards, some frames are padding,
    some rows unreadable.

    bad: rows that are unreadable; True for `BAD`.
    """
    made = noise_batch(tiny_architecture(), size=BATCH, frames=FRAMES)
    other = noise_batch(tiny_architecture(), size=BATCH, frames=FRAMES, seed=1)
    other_mask = other.text_mask.clone()
    other_mask[:, :2] = True
    text_mask, frame_mask, valid = (
        made.text_mask.clone(),
        made.frame_mask.clone(),
        made.text_mask[:, 0].clone(),
    )
    text_mask[:, :2] = True
    frame_mask[2, 2:] = frame_mask[5, 1:] = False
    valid[BAD if isinstance(bad, bool) else list(bad)] = False
    return replace(
        made,
        text_mask=text_mask,
        frame_mask=frame_mask,
        video_index=torch.tensor([0, 1, 2, 0, ~1, 2, 6, 7]),
        tells_order=torch.tensor([True, False, True, True, False, True, True, False]),
        false_text_ids=other.text_ids,
        false_text_mask=other_mask,
        has_false_text=torch.tensor([True, False, False, True, False, False, True, False]),
        valid=valid if bad else None,
    )


def share(batch: Batch, world: World) -> Batch:
    """Return the rows of a rank."""
    rows = len(batch) // world.size
    return batch[slice(world.rank * rows, (world.rank + 1) * rows)]


def take(step: TrainStep, batch: Batch) -> dict[str, Tensor]:
    """Return the loss, its terms and every gradient as a strategy averages it, equal on all ranks."""
    trained = {name: p for name, p in step.named_parameters() if p.requires_grad}
    step.zero_grad()
    losses = step(batch)
    if trained:
        losses.total.backward()
    for p in trained.values():
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    if step.world.size > 1:
        for p in trained.values():
            dist.all_reduce(p.grad)
            p.grad /= step.world.size
    grads = {name: p.grad.clone() for name, p in trained.items()}
    return {"loss": losses.total.detach(), **losses.terms, **grads}


def counted_losses(step: TrainStep, batch: Batch) -> int:
    """Count the FLOPs of the forward of a step's losses on this rank, without the towers."""
    found: list[int] = []
    losses = step.method.losses

    def counted(*args: Any, **kwargs: Any) -> Any:
        with FlopCounterMode(display=False) as mode:
            result = losses(*args, **kwargs)
        found.append(mode.get_total_flops())
        return result

    step.method.losses = counted
    step(batch)
    del step.method.losses
    return found[0]


class Sent:
    """Context that counts the bytes a rank sends in ring collectives; an all-reduce sends 2 (W - 1) / W.

    `order`: names of the collectives in order, and "waited: NAME" at the wait for an asynchronous one.
    """

    def __init__(self, size: int) -> None:
        self.size, self.bytes, self.order = size, Counter(), []

    def __enter__(self) -> Sent:
        self.originals = {}
        for name, payload in (
            ("all_gather_single", lambda whole, own: self.size * own.nbytes),
            ("reduce_scatter_single", lambda own, whole: whole.nbytes),
            ("all_to_all_single", lambda got, sent: sent.nbytes),
            ("all_reduce", lambda x: 2 * x.nbytes),
        ):
            self.originals[name] = getattr(dist, name)
            setattr(dist, name, self._counting(name, payload))
        return self

    def _counting(self, name: str, payload: Callable[..., int]) -> Callable[..., Any]:
        def counted(*tensors: Tensor, **options: Any) -> Any:
            self.bytes[name] += payload(*tensors) * (self.size - 1) // self.size
            self.order.append(name)
            return _Work(
                self.originals[name](*tensors, **options), lambda: self.order.append(f"waited: {name}")
            )

        return counted

    def __exit__(self, *error: object) -> None:
        for name, function in self.originals.items():
            setattr(dist, name, function)


class _Work:
    def __init__(self, work: Any, note: Callable[[], None]) -> None:
        self.work, self.note = work, note

    def wait(self) -> None:
        self.note()
        self.work.wait()


def on_ranks(
    case: Callable[[World], Any], size: int, folder: Path, *, seconds: float = 120, start: str = "forkserver"
) -> Any:
    """Run `case`, a function of a module, on several ranks and return the result of the first.

    start: "fork" starts them at once, for cases that use no other thread's work.
    """
    server, port = multiprocessing.get_context(start), free_port()
    arguments = [(case, rank, size, port, str(folder / f"of{size}.pt")) for rank in range(size)]
    processes = [server.Process(target=_rank, args=each) for each in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(seconds)
    for process in processes:
        process.kill()
    assert [process.exitcode for process in processes] == [0] * size
    return torch.load(folder / f"of{size}.pt")


def _rank(case: Callable[[World], Any], rank: int, size: int, port: int, path: str) -> None:
    for name in LAUNCHER:
        os.environ.pop(name, None)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    world = join_world("cpu")
    result = case(world)
    losses = gather_objects(result["loss"], world)
    assert all(loss == result["loss"] for loss in losses), "ranks have different losses"
    if world.first:
        torch.save(result, path)
    leave_world()


assert runs
