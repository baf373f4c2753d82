"""Offloaded runs take the same steps, and their states are exchangeable with those of other runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from discovla.engine.config import EngineConfig, choose_stage
from discovla.engine.deepspeed import deepspeed_settings
from discovla.engine.memory import Sizes, host_bytes, state_bytes
from discovla.engine.optim import OptimConfig
from tests.engine.launch import run_jobs

HALF = 3
PLAIN = {"stage": 1}
OFFLOADS = {
    "zero1": {"stage": 1, "offload": "cpu"},
    "zero2": {"stage": 2, "offload": "cpu"},
    "zero3": {"stage": 3, "offload": "cpu"},
    "zero3, parameters too": {"stage": 3, "offload": "cpu", "offload_parameters": True},
}
LAYER = 300 * 300  # elements of each layer of the worker's module: one frozen, eight trained


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict:
    """Run six steps with every kind of offload, saved half-way, and resume from their and others' states."""
    folder = tmp_path_factory.mktemp("offload")
    results: dict = {"folder": folder}
    for size in (1, 2):
        jobs = [
            {**PLAIN, "save_at": HALF, "save": _half(folder, "plain", size), "final": _final(folder, size)}
        ]
        keys: list = [("plain", size)]
        for way, job in OFFLOADS.items():
            saved = _half(folder, way, size)
            jobs.append({**job, "save_at": HALF, "save": saved, "final": saved.replace("half", "final")})
            jobs.append({**job, "first": HALF, "load": saved})
            jobs.append({**job, "first": HALF, "load": _half(folder, "plain", 1)})
            jobs.append({**PLAIN, "first": HALF, "load": _half(folder, way, 1)})
            jobs += [{"case": "overflow", **job}, {"case": "grad_cache", **job}, {"case": "held", **job}]
            names = ("steps", "resumed", "from plain", "to plain", "overflow", "grad_cache", "held")
            keys += [(way, size, name) for name in names]
        short = [{**job, "bf16_parameters": True} for job in (PLAIN, *OFFLOADS.values())]
        jobs, keys = jobs + short, keys + [(way, size, "bf16") for way in ("plain", *OFFLOADS)]
        results |= dict(zip(keys, run_jobs(jobs, folder, size=size, timeout=240), strict=True))
    return results


def _half(folder: Path, way: str, size: int) -> str:
    return str(folder / f"{way}-{size}-half.safetensors")


def _final(folder: Path, size: int, way: str = "plain") -> str:
    return _half(folder, way, size).replace("half", "final")


def _close(values: list[float], expected: list[float], tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(torch.tensor(values), torch.tensor(expected), rtol=tolerance, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("way", OFFLOADS)
def test_steps_and_states_equal_those_without_offload(runs, way, size):
    plain = runs["plain", 1]
    for key in ("losses", "norms"):
        _close(runs[way, size, "steps"][key], plain[key])
    loaded, expected = (load_file(_final(runs["folder"], *at)) for at in ((size, way), (1, "plain")))
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(loaded[name], tensor, rtol=1e-4, atol=1e-7)
    assert runs[way, size, "steps"]["evaluated"] == pytest.approx(plain["evaluated"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("way", OFFLOADS)
def test_runs_resume_with_or_without_offload_on_one_process_or_two(runs, way, size):
    assert runs[way, size, "resumed"]["losses"] == runs[way, size, "steps"]["losses"][HALF:]
    for name in ("from plain", "to plain"):
        _close(runs[way, size, name]["losses"], runs["plain", 1]["losses"][HALF:])


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("way", OFFLOADS)
def test_a_nonfinite_gradient_changes_no_parameter(runs, way, size):
    norms = runs[way, size, "overflow"]["norms"]
    assert [norm in ("nan", "inf") for norm in norms] == [False, True, *[False] * 5]
    assert runs[way, size, "overflow"]["same"]


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("way", OFFLOADS)
def test_steps_with_gradient_caching_equal_those_of_the_whole_batch(runs, way, size):
    whole, chunked = (runs[way, size, "grad_cache"][key] for key in ("whole", "chunked"))
    for key in ("losses", "norms"):
        _close(chunked[key], whole[key])


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("way", OFFLOADS)
def test_deepspeeds_bf16_mode_takes_the_same_steps_with_offload(runs, way, size):
    # weights in bf16 have a relative error of 2^-9, and the last bit of a master can flip a rounding
    _close(runs[way, size, "bf16"]["losses"], runs["plain", size, "bf16"]["losses"], 1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("way", OFFLOADS)
def test_gpu_and_host_together_hold_the_predicted_bytes(runs, way, size):
    job, held = OFFLOADS[way], runs[way, size, "held"]
    config = EngineConfig(
        zero_stage=job["stage"], offload="cpu", offload_parameters="offload_parameters" in job
    )
    sizes = Sizes(frozen=LAYER, trained=8 * LAYER, world_size=size, largest=LAYER)
    gpu, host = state_bytes(config, sizes), host_bytes(config, sizes)
    total = sum(gpu.values()) + sum(host.values())
    # after a step the gradient buckets are freed below stage 3, and gathered parameters may be
    least = total - gpu["gathered"] - (0 if job["stage"] == 3 else gpu["gradients"] - 4 * LAYER)
    assert 0.99 * least <= held["after"] <= 1.01 * (least + gpu["gathered"])
    assert 0.7 * total <= held["most"] <= 1.01 * total


def test_the_gpu_keeps_what_is_not_offloaded():
    sizes = Sizes(frozen=10, trained=1000, world_size=2, largest=100)
    for stage in (1, 2, 3):
        plain = state_bytes(EngineConfig(zero_stage=stage), sizes)
        config = EngineConfig(zero_stage=stage, offload="cpu")
        gpu, host = state_bytes(config, sizes), host_bytes(config, sizes)
        assert (gpu["masters"], gpu["moments"]) == (0, 0)
        assert (host["masters"], host["moments"]) == (plain["masters"], plain["moments"])
        assert gpu["parameters"] == plain["parameters"]
    config = EngineConfig(zero_stage=3, offload="cpu", offload_parameters=True)
    gpu, host = state_bytes(config, sizes), host_bytes(config, sizes)
    assert (gpu["parameters"], host["parameters"]) == (0, 2020)
    assert not any(host_bytes(EngineConfig(zero_stage=3), sizes).values())


def test_the_settings_name_the_offload_device():
    config = EngineConfig(zero_stage=3, offload="cpu", offload_parameters=True)
    sizes = {"micro_batch": 1, "world_size": 1, "trained": 10}
    zero = deepspeed_settings(config, OptimConfig(), **sizes)["zero_optimization"]
    assert zero["offload_optimizer"] == zero["offload_param"] == {"device": "cpu", "pin_memory": True}
    config = EngineConfig(zero_stage=2, offload="cpu")
    zero = deepspeed_settings(config, OptimConfig(), **sizes)["zero_optimization"]
    assert zero["offload_optimizer"]["device"] == "cpu"
    assert "offload_param" not in zero


def test_auto_chooses_stage_1_for_offload():
    assert choose_stage(EngineConfig(offload="cpu"), 10, 1) == 1


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"offload": "cpu", "zero_stage": 0}, "offload: expected strategy deepspeed and zero_stage >= 1"),
        ({"offload": "cpu", "strategy": "torch"}, "offload: .* found torch"),
        ({"offload_parameters": True, "zero_stage": 3}, "offload_parameters: expected offload 'cpu'"),
        ({"offload_parameters": True, "offload": "cpu"}, "and zero_stage 3, found 'cpu' and auto"),
        ({"offload": "nvme"}, "expected .none. or .cpu.: checkpoints cannot include optimiser state"),
        ({"offload": "cpu", "capture": "graph"}, "capture: expected 'none' with offload = 'cpu'"),
    ],
    ids=str,
)
def test_invalid_combinations_are_refused(bad, message):
    with pytest.raises(ValidationError, match=message):
        EngineConfig(**bad)
