"""Gradient caching: chunks encoded twice train as the whole batch does, in the memory of one chunk."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from discovla.engine.config import EngineConfig
from discovla.engine.distributed import World
from discovla.engine.optim import OptimConfig
from discovla.engine.strategy import StepPlan
from discovla.methods.clip2video import CLIP2Video, CLIP2VideoConfig
from discovla.testing import noise_batch, peak_bytes, relative_error, tiny_architecture
from discovla.train_step import TrainStep
from tests import runs, steps

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))


def test_dropout_is_the_same_in_both_passes(monkeypatch):
    step = TrainStep(steps.make("t2vparser").train(), ALONE, "exact", grad_cache_chunks=3)
    batch = steps.whole_batch(bad=True)
    torch.manual_seed(5)
    cached = steps.take(step, batch)
    after = torch.rand(1)
    other = steps.take(step, batch)
    assert relative_error(other["loss"], cached["loss"]) > 1e-6, "the test needs dropout to have an effect"
    monkeypatch.setattr("discovla.engine.grad_cache._encode_recomputed", lambda encode, chunk: encode(chunk))
    torch.manual_seed(5)
    expected = steps.take(step, batch)
    assert torch.equal(torch.rand(1), after), "the second pass drew random numbers of its own"
    assert cached["loss"] == expected["loss"]
    largest = max(x.abs().max() for name, x in expected.items() if name.startswith("method."))
    for name, value in expected.items():
        assert (cached[name] - value).abs().max() <= 1e-12 * largest, name


def test_activations_are_those_of_one_chunk():
    method, batch = steps.make("discovla"), replace(noise_batch(tiny_architecture(), size=32), valid=None)
    peaks = []
    for chunks in (1, 8):
        step = TrainStep(method, ALONE, "exact", grad_cache_chunks=chunks)
        steps.take(step, batch)
        peaks.append(peak_bytes(lambda step=step: step(batch).total.backward()))
    assert peaks[1] < 0.25 * peaks[0]


def test_evaluation_without_gradients_needs_no_second_pass():
    method, batch = steps.make("clip"), steps.whole_batch(bad=False)
    with torch.no_grad():
        whole, chunked = (TrainStep(method, ALONE, "exact", chunks)(batch).total for chunks in (1, 4))
    torch.testing.assert_close(chunked, whole, rtol=1e-12, atol=0)


def test_more_chunks_than_clips_are_refused():
    plan = {"optim": OptimConfig(), "world": replace(ALONE, size=2), "batch_size": 8}
    StepPlan(engine=EngineConfig(grad_cache_chunks=4), **plan)
    with pytest.raises(
        ValueError, match=r"engine\.grad_cache_chunks: expected at most the 4 clips .*, found 5"
    ):
        StepPlan(engine=EngineConfig(grad_cache_chunks=5), **plan)


def test_heads_that_see_other_videos_refuse_chunks():
    method = CLIP2Video(tiny_architecture(), CLIP2VideoConfig(mask_mode="official", head_layers=1))
    with pytest.raises(
        ValueError, match=r"grad_cache_chunks: expected 1 with method\.mask_mode = 'official', .* found 2"
    ):
        TrainStep(method, ALONE, "exact", grad_cache_chunks=2)


@pytest.mark.slow
def test_a_run_in_chunks_has_the_losses_of_one_without(tmp_path, drawn):
    words = [runs.write_config(tmp_path, drawn), "steps=3"]
    for chunks, size in ((1, 1), (4, 1), (4, 2)):
        extra = [f"engine.grad_cache_chunks={chunks}", f"directory={tmp_path}/{chunks}-{size}"]
        runs.train([*words, *extra], size=size)
    expected = runs.losses(tmp_path / "1-1")
    for name in ("4-1", "4-2"):
        torch.testing.assert_close(runs.losses(tmp_path / name), expected, rtol=1e-5, atol=0)
