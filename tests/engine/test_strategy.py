"""Every strategy gives the same steps, on one process or two, uninterrupted or resumed."""

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from discovla.batch import Losses
from discovla.engine.config import EngineConfig, choose_stage, choose_strategy
from discovla.engine.deepspeed import deepspeed_settings
from discovla.engine.distributed import World
from discovla.engine.optim import OptimConfig
from discovla.engine.strategies import make_strategy
from discovla.engine.strategy import StepPlan, TorchStrategy, cast_frozen
from discovla.nn.logit_scale import LIMIT, LogitScale
from tests.engine.launch import run_jobs

HALF = 3
STRATEGIES = {
    "torch": {"strategy": "torch"},
    "zero0": {"stage": 0},
    "zero1": {"stage": 1},
    "zero2": {"stage": 2},
    "zero3": {"stage": 3},
}
SOURCES = [(way, size) for way in STRATEGIES for size in (1, 2)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict:
    """Run six steps with every strategy on one and two processes, saved half-way, and resume from there."""
    folder = tmp_path_factory.mktemp("strategy")
    results: dict = {"folder": folder}
    for size in (1, 2):
        jobs, keys = [], []
        for way, job in STRATEGIES.items():
            jobs.append(
                {**job, "save_at": HALF, "save": _half(folder, way, size), "final": _final(folder, way, size)}
            )
            keys.append((way, size))
            jobs.append({**job, "first": HALF, "load": _half(folder, way, size)})
            keys.append((way, size, "resumed"))
            jobs.append({**job, "bf16": True})
            keys.append((way, size, "bf16"))
        for stage in (1, 2, 3):
            name = _half(folder, f"short{stage}", size)
            job = {"stage": stage, "bf16_parameters": True}
            jobs += [{**job, "save_at": HALF, "save": name}, {**job, "first": HALF, "load": name}]
            keys += [(stage, size, "short"), (stage, size, "short resumed")]
        jobs += [{"case": "grad_cache", **STRATEGIES[way]} for way in STRATEGIES]
        keys += [(way, size, "grad_cache") for way in STRATEGIES]
        jobs += [{"case": "overflow", **job} for job in STRATEGIES.values()]
        keys += [(way, size, "overflow") for way in STRATEGIES]
        lopsided = {way: job for way, job in STRATEGIES.items() if way != "zero3"}
        jobs += [{**job, "lopsided": True} for job in lopsided.values()]
        keys += [(way, size, "lopsided") for way in lopsided]
        jobs.append({"case": "reductions", "stage": 0})
        keys.append(("reductions", size))
        if size == 1:
            old = str(folder / "by-tensors.safetensors")
            jobs.append({"case": "write_by_tensors", "save_at": HALF, "save": old})
            keys.append("by tensors")
            jobs += [{**job, "first": HALF, "load": old} for job in STRATEGIES.values()]
            keys += [(way, "from tensors") for way in STRATEGIES]
        if size == 2:  # two processes load the state of one
            jobs += [{**job, "first": HALF, "load": _half(folder, "zero0", 1)} for job in STRATEGIES.values()]
            keys += [(way, "from one") for way in STRATEGIES]
        results |= dict(zip(keys, run_jobs(jobs, folder, size=size), strict=True))
    jobs = [{**job, "first": HALF, "load": _half(folder, "zero2", 2)} for job in STRATEGIES.values()]
    keys = [(way, "from two") for way in STRATEGIES]
    jobs += [{"optim": "adamw", **job, "clip": None} for job in STRATEGIES.values()]
    keys += [(way, "adamw") for way in STRATEGIES]
    jobs += [{"optim": "bert_adam", **job} for job in STRATEGIES.values()]
    keys += [(way, "bert_adam") for way in STRATEGIES]
    return results | dict(zip(keys, run_jobs(jobs, folder, size=1), strict=True))


def _half(folder: Path, way: str, size: int) -> str:
    return str(folder / f"{way}-{size}-half.safetensors")


def _final(folder: Path, way: str, size: int) -> str:
    return str(folder / f"{way}-{size}-final.safetensors")


def _close(values: list[float], expected: list[float], tolerance: float) -> None:
    torch.testing.assert_close(torch.tensor(values), torch.tensor(expected), rtol=tolerance, atol=0)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("way", STRATEGIES)
def test_every_strategy_gives_the_same_losses(runs, way, size):
    _close(runs[way, size]["losses"], runs["torch", size]["losses"], 1e-6)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("way", STRATEGIES)
def test_every_strategy_returns_the_norm_before_clipping(runs, way, size):
    assert min(runs["torch", 1]["norms"]) > 0.05, "the test needs clipping at 0.05 to have an effect"
    _close(runs[way, size]["norms"], runs["torch", 1]["norms"], 1e-5)


@pytest.mark.parametrize("way", STRATEGIES)
def test_two_processes_give_the_losses_of_one(runs, way):
    _close(runs[way, 2]["losses"], runs["torch", 1]["losses"], 1e-5)


@pytest.mark.parametrize(("way", "size"), SOURCES)
def test_every_strategy_ends_with_the_same_states(runs, way, size):
    loaded, expected = (load_file(_final(runs["folder"], *key)) for key in ((way, size), ("torch", 1)))
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            loaded[name], tensor, rtol=1e-4, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize(("way", "size"), SOURCES)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(runs, way, size):
    assert runs[way, size, "resumed"]["losses"] == runs[way, size]["losses"][HALF:]
    assert runs[way, size, "resumed"]["norms"] == runs[way, size]["norms"][HALF:]


@pytest.mark.parametrize("way", STRATEGIES)
def test_a_state_of_one_process_loads_on_two(runs, way):
    _close(runs[way, "from one"]["losses"], runs["torch", 1]["losses"][HALF:], 1e-5)


@pytest.mark.parametrize("way", STRATEGIES)
def test_a_state_of_two_processes_at_stage_2_loads_at_every_stage(runs, way):
    _close(runs[way, "from two"]["losses"], runs["torch", 1]["losses"][HALF:], 1e-5)


@pytest.mark.parametrize("way", ["torch", "zero0"])
def test_steps_equal_those_taken_tensor_by_tensor_bit_for_bit(runs, way):
    assert runs[way, 1]["losses"] == runs["by tensors"]["losses"]


@pytest.mark.parametrize("way", STRATEGIES)
def test_a_checkpoint_written_tensor_by_tensor_goes_on_at_every_stage(runs, way):
    """Bit for bit without sharding; ZeRO sums the norm in another order."""
    losses, expected = runs[way, "from tensors"]["losses"], runs["by tensors"]["losses"][HALF:]
    if way in ("torch", "zero0"):
        assert losses == expected
    _close(losses, expected, 1e-6)


@pytest.mark.parametrize("way", ["zero0", "zero1"])
def test_a_parameter_that_only_one_rank_uses_does_not_hang(runs, way):
    assert runs["torch", 2, "lopsided"]["losses"] != runs["torch", 2]["losses"]
    _close(runs[way, 2, "lopsided"]["losses"], runs["torch", 2, "lopsided"]["losses"], 1e-6)


def test_stage_2_refuses_ranks_that_reach_different_parameters(runs):
    assert (
        "expected every rank's loss to reach the same parameters" in runs["zero2", 2, "lopsided"]["message"]
    )


@pytest.mark.parametrize("way", STRATEGIES)
def test_torchs_adamw_without_clipping_works_in_every_strategy(runs, way):
    _close(runs[way, "adamw"]["losses"], runs["torch", "adamw"]["losses"], 1e-6)


@pytest.mark.parametrize("way", STRATEGIES)
def test_bert_adam_works_in_every_strategy(runs, way):
    assert runs["torch", "bert_adam"]["losses"][-1] != runs["torch", 1]["losses"][-1]
    _close(runs[way, "bert_adam"]["losses"], runs["torch", "bert_adam"]["losses"], 1e-6)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("way", STRATEGIES)
def test_a_nonfinite_gradient_changes_no_state(runs, way, size):
    norms = runs[way, size, "overflow"]["norms"]
    assert [norm in ("nan", "inf") for norm in norms] == [False, True, *[False] * 5]
    assert runs[way, size, "overflow"]["same"]


@pytest.mark.parametrize(("way", "size"), SOURCES)
def test_bf16_keeps_trained_parameters_in_fp32(runs, way, size):
    assert runs[way, size, "bf16"]["dtypes"] == ["False torch.bfloat16", "True torch.float32"]


@pytest.mark.parametrize(("way", "size"), SOURCES)
def test_bf16_compute_gives_the_same_losses_at_every_stage(runs, way, size):
    # the towers round to 8 bits, and a difference in the last bit can flip a rounding
    _close(runs[way, size, "bf16"]["losses"], runs["torch", 1, "bf16"]["losses"], 2e-3)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeeds_bf16_mode_resumes_from_its_fp32_masters(runs, stage, size):
    uninterrupted, resumed = runs[stage, size, "short"], runs[stage, size, "short resumed"]
    assert uninterrupted["dtypes"] == ["False torch.bfloat16", "True torch.bfloat16"]
    assert resumed["losses"] == uninterrupted["losses"][HALF:]
    # weights in bf16 have a relative error of 2^-9, and the losses about as much
    _close(uninterrupted["losses"], runs["torch", 1, "bf16"]["losses"], 1e-2)


@pytest.mark.parametrize(("way", "size"), SOURCES)
def test_the_gathered_module_can_be_evaluated(runs, way, size):
    assert runs[way, size]["evaluated"] == pytest.approx(runs["torch", 1]["evaluated"], rel=1e-4)


@pytest.mark.parametrize(("way", "size"), SOURCES)
def test_the_terms_of_the_loss_keep_their_names(runs, way, size):
    for total, terms in zip(runs[way, size]["losses"], runs[way, size]["terms"], strict=True):
        assert (terms["t2v"] + terms["v2t"]) / 2 == pytest.approx(total, rel=1e-6)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("way", STRATEGIES)
def test_steps_with_gradient_caching_equal_those_of_the_whole_batch(runs, way, size):
    whole, chunked = (runs[way, size, "grad_cache"][key] for key in ("whole", "chunked"))
    _close(chunked["losses"], whole["losses"], 1e-5)
    _close(chunked["norms"], whole["norms"], 1e-5)
    _close(whole["losses"], runs["torch", 1, "grad_cache"]["whole"]["losses"], 1e-5)
    assert chunked["state"].keys() == whole["state"].keys()
    for name, values in whole["state"].items():  # four steps of at most 0.001
        value = torch.tensor(chunked["state"][name])
        torch.testing.assert_close(value, torch.tensor(values), rtol=1e-5, atol=1e-6)


class _Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, batch: torch.Tensor) -> Losses:
        total = self.layer(batch).square().mean()
        return Losses(total=total, terms={})


def _line(**plan):
    world = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
    settings = {
        "engine": EngineConfig(strategy="torch"),
        "optim": OptimConfig(),
        "world": world,
        "batch_size": 2,
    }
    return make_strategy(_Line(), StepPlan(**{**settings, **plan}))


def test_a_bounded_parameter_is_at_most_its_limit_and_others_stay():
    strategy = _line()
    values = {"layer.weight": torch.tensor([[1.0, 5.0], [3.0, -9.0]]), "layer.bias": torch.tensor([5.0, 1.0])}
    strategy.load_trained_state(values)
    strategy.bound("layer.weight", 3.0)
    found = strategy.trained_state()
    assert found["layer.weight"].tolist() == [[1.0, 3.0], [3.0, -9.0]]
    assert torch.equal(found["layer.bias"], values["layer.bias"])


def test_an_indivisible_batch_is_refused():
    with pytest.raises(ValueError, match="batch_size: expected a multiple of the 3 processes, found 8"):
        _line(world=World(rank=0, size=3, local_rank=0, device=torch.device("cpu")), batch_size=8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("layer.bias"), "trained state: expected 'layer.bias', found none"),
        (lambda s: s.update(other=torch.ones(1)), "trained state: expected no 'other', found it"),
        (lambda s: s.update({"layer.bias": torch.ones(3)}), r"layer.bias: expected \(2,\), found \(3,\)"),
    ],
    ids=["missing", "unexpected", "misshaped"],
)
def test_a_trained_state_of_another_module_is_refused(change, message):
    strategy = _line()
    state = strategy.trained_state()
    change(state)
    with pytest.raises(ValueError, match=message):
        strategy.load_trained_state(state)


def test_an_optimizer_state_without_its_step_is_refused():
    strategy = _line()
    state = strategy.optimizer_state()
    del state["step"]
    with pytest.raises(ValueError, match="optimizer state: expected 'step', found none"):
        strategy.load_optimizer_state(state)


def test_saved_states_are_copies():
    strategy = _line()
    before = strategy.trained_state()
    kept = {name: tensor.clone() for name, tensor in before.items()}
    strategy.backward(strategy(torch.ones(2, 2)).total)
    strategy.step(0.1)
    assert all(torch.equal(before[name], kept[name]) for name in kept)
    assert not torch.equal(strategy.trained_state()["layer.weight"], kept["layer.weight"])


def test_cast_frozen_leaves_trained_parameters_and_buffers():
    module = nn.BatchNorm1d(3)
    module.bias.requires_grad_(False)
    cast_frozen(module, torch.bfloat16)
    dtypes = (module.weight.dtype, module.bias.dtype, module.running_mean.dtype)
    assert dtypes == (torch.float32, torch.bfloat16, torch.float32)


def test_cast_frozen_leaves_a_logit_scale_exact():
    scale = LogitScale().requires_grad_(False)
    scale.log.fill_(LIMIT)
    cast_frozen(scale, torch.bfloat16)
    assert scale().item() == pytest.approx(100, rel=1e-5)


def test_deepspeeds_bf16_mode_is_refused_for_adapters():
    module = nn.ModuleList([nn.Linear(9, 9).requires_grad_(False), nn.Linear(2, 2)])
    engine = EngineConfig(precision="bf16", bf16_parameters=True, zero_stage=1)
    world = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
    with pytest.raises(ValueError, match="full fine-tuning, found 6 of 96 parameters trained"):
        make_strategy(module, StepPlan(engine=engine, optim=OptimConfig(), world=world, batch_size=2))


def test_chunks_at_stage_3_are_refused_for_a_module_without_gradient_caching():
    with pytest.raises(
        ValueError, match=r"engine\.grad_cache_chunks: expected 1 with zero_stage 3 .* found 2"
    ):
        _line(engine=EngineConfig(zero_stage=3, grad_cache_chunks=2, device="cpu"))


@pytest.mark.parametrize(
    "bad",
    [
        {"zero_stage": 4},
        {"bf16_parameters": True},
        {"bf16_parameters": True, "precision": "bf16", "zero_stage": 0},
        {"precision": "fp16"},
    ],
    ids=str,
)
def test_bad_engine_settings_are_refused(bad):
    with pytest.raises(ValueError):
        EngineConfig(**bad)


@pytest.mark.parametrize(
    ("config", "trained", "size", "stage"),
    [
        ({}, 561_200, 8, 0),
        ({}, 400_000_000, 1, 0),
        ({}, 400_000_000, 8, 1),
        ({"zero_stage": 3}, 10, 1, 3),
        ({"precision": "bf16", "bf16_parameters": True}, 10, 1, 1),
        ({"capture": "graph"}, 400_000_000, 8, 0),
    ],
    ids=["adapters", "one process", "full fine-tuning", "explicit", "bf16 parameters", "captured"],
)
def test_auto_chooses_the_stage_by_trained_size(config, trained, size, stage):
    assert choose_stage(EngineConfig(**config), trained, size) == stage


@pytest.mark.parametrize(
    ("config", "trained", "size", "name"),
    [
        ({}, 561_200, 1, "torch"),
        ({}, 400_000_000, 1, "torch"),
        ({}, 561_200, 2, "deepspeed"),
        ({"zero_stage": 0}, 10, 1, "torch"),
        ({"zero_stage": 2}, 10, 1, "deepspeed"),
        ({"offload": "cpu"}, 10, 1, "deepspeed"),
        ({"precision": "bf16", "bf16_parameters": True, "zero_stage": 1}, 10, 1, "deepspeed"),
        ({"strategy": "deepspeed"}, 10, 1, "deepspeed"),
        ({"strategy": "torch"}, 10, 8, "torch"),
    ],
    ids=str,
)
def test_auto_takes_deepspeed_where_there_is_something_to_shard(config, trained, size, name):
    assert choose_strategy(EngineConfig(**config), trained, size)[0] == name


def test_the_chosen_strategy_is_logged_in_one_line(caplog):
    with caplog.at_level(logging.INFO):
        strategy = _line(engine=EngineConfig())
    assert isinstance(strategy, TorchStrategy)
    assert [record.getMessage() for record in caplog.records] == [
        "strategy: torch (one process), 6 trained parameters"
    ]


@pytest.mark.parametrize("size", [1, 2])
def test_at_stage_0_deepspeed_copies_no_gradients_and_does_not_wait_for_the_gpu(runs, size):
    assert runs["reductions", size] == {"reductions": 0, "all_reduces": int(size > 1), "timed": False}


def test_deepspeed_clips_from_stage_1_on():
    settings = [
        deepspeed_settings(
            EngineConfig(zero_stage=stage),
            OptimConfig(clip_grad_norm=0.7),
            micro_batch=4,
            world_size=2,
            trained=10,
        )
        for stage in (0, 1, 2, 3)
    ]
    assert [s["gradient_clipping"] for s in settings] == [0.0, 0.7, 0.7, 0.7]
    assert all(s["train_batch_size"] == 8 and not s["bf16"]["enabled"] for s in settings)
