"""Rows of unreadable clips have no part in a step."""

import itertools
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch

from discovla.batch import Batch, Embedding, Losses
from discovla.engine.distributed import World
from discovla.engine.optim import OptimConfig
from discovla.engine.transfers import BatchCopier
from discovla.methods.clip import CLIP, CLIPConfig
from discovla.methods.discovla import DiscoVLA, DiscoVLAConfig
from discovla.testing import noise_batch, relative_error, tiny_architecture
from discovla.towers.weights import initialise
from discovla.train_step import TrainStep, same_video
from discovla.trainer import Trainer

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
METHODS = {
    "clip": (CLIP, CLIPConfig()),
    "discovla": (DiscoVLA, DiscoVLAConfig(fused_vision_blocks=1, fused_text_blocks=1, kl_norm="fixed")),
    "discovla, repaired": (
        DiscoVLA,
        DiscoVLAConfig(
            fused_vision_blocks=1, fused_text_blocks=1, mask_padded_frames=True, exclude_same_video=True
        ),
    ),
}


def rows(batch: Batch, kept: torch.Tensor) -> Batch:
    """Return the batch with only these rows, all of them valid."""
    values = {f.name: getattr(batch, f.name) for f in fields(batch)}
    chosen = {name: x[kept] for name, x in values.items() if isinstance(x, torch.Tensor)}
    return replace(batch, **{**chosen, "valid": None})


@pytest.mark.parametrize("name", METHODS)
def test_losses_and_gradients_equal_those_of_the_batch_without_bad_rows(name):
    architecture = tiny_architecture()
    cls, config = METHODS[name]
    method = cls(architecture, config)
    initialise(method, architecture, seed=0)
    method.freeze()
    with torch.no_grad():  # adapters start at zero, where half of their gradients are zero
        for parameter in method.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    step = TrainStep(method.double(), ALONE, "exact")
    method.compute_dtype = torch.float64
    batch = noise_batch(architecture, size=6)
    batch = replace(batch, video_index=torch.tensor([0, 1, 2, 0, 4, 5]))
    kept = torch.tensor([True, False, True, True, False, True])
    frames = batch.frames.clone()
    frames[~kept] = 0  # as a loader fills them
    found = gradients(step, replace(batch, frames=frames, valid=kept))
    wanted = gradients(step, rows(batch, kept))
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert relative_error(found[key], value) < 1e-10, key
    blank = gradients(step, replace(batch, frames=frames, valid=None))
    assert relative_error(blank["loss"], wanted["loss"]) > 1e-3, "bad rows do not change the loss"


def test_captions_that_tell_no_order_are_of_the_reversed_clip_too():
    text = Embedding(pooled=torch.zeros(4, 1), tells_order=torch.tensor([True, False, True, True]))
    index = torch.tensor([5, 5, ~5, 0])
    want = [[1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    assert same_video(text, index, index).tolist() == torch.tensor(want).bool().tolist()
    unknown = same_video(Embedding(pooled=text.pooled), index, index)
    assert unknown.tolist() == torch.tensor([want[0], want[0], want[2], want[3]]).bool().tolist()


def gradients(step: TrainStep, batch: Batch) -> dict[str, torch.Tensor]:
    """Return the loss, its terms and the gradient of every trained parameter."""
    step.zero_grad()
    losses = step(batch)
    losses.total.backward()
    grads = {name: p.grad.clone() for name, p in step.named_parameters() if p.grad is not None}
    return {"loss": losses.total.detach(), **losses.terms, **grads}


def numbers_of_a_step(seed: int, step: int, rank: int) -> tuple[float, ...]:
    """Return random numbers that the model of a trainer draws in one step."""
    drawn: list[torch.Tensor] = []

    class Draws:
        trained = ()

        def take(self, batch: Batch, lr: float) -> tuple[Losses, torch.Tensor]:
            drawn.append(torch.rand(3))
            return Losses(total=torch.zeros(()), terms={}), torch.ones(())

    trainer = object.__new__(Trainer)
    trainer.config = SimpleNamespace(seed=seed, optim=OptimConfig())
    trainer.world = replace(ALONE, rank=rank, size=4)
    trainer.method = SimpleNamespace(logit_scale=SimpleNamespace(bias=None))
    trainer.total_steps = 10
    trainer.quarantine = SimpleNamespace(known={})
    state = SimpleNamespace(step=step, strategy=Draws(), skipped_steps=0, ema=None)
    trainer.copy_batch = BatchCopier(ALONE.device)
    trainer.take_step(state, noise_batch(tiny_architecture(), size=2), began=0.0)
    assert state.step == step + 1
    return tuple(torch.cat(drawn).tolist())


def test_random_numbers_depend_on_seed_step_and_rank_and_on_nothing_before():
    places = list(itertools.product((0, 1, 42), (0, 1, 2, 3), (0, 1, 2, 3)))
    numbers = [numbers_of_a_step(*place) for place in places]
    assert len(set(numbers)) == len(places)
    torch.rand(7)
    assert [numbers_of_a_step(*place) for place in reversed(places)] == numbers[::-1]
