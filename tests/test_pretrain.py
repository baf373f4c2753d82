"""The pretraining recipes train from shards; their averaged parameters are evaluated and exported."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close

from discovla.cli import main
from discovla.engine.ema import EMA
from discovla.model import load_run
from tests import runs
from tests.engine.launch import ROOT

SMALL = (
    "seed=3",
    "batch_size=8",
    "steps=4",
    "evaluate_every=2",
    "checkpoint_every=2",
    "model.pretrained=random",
    "data.frames=8",
    "data.workers=0",
    "optim.lr=1e-3",
    "optim.ema=0.75",
    "engine.device=cpu",
)
RECIPES = {
    "adapter": ("method.lora_rank=2", "method.fused_vision_blocks=1", "method.fused_text_blocks=1"),
    "full": (),
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory, drawn) -> str:
    """Write shards of the drawn clips for a tiny model."""
    folder = tmp_path_factory.mktemp("pretrain")
    config = runs.write_config(folder, drawn)
    words = ["shard", drawn, folder / "raw", "--config", config, "--clips-per-shard", 10, "--workers", 0]
    assert main([str(word) for word in words]) == 0
    return str(folder / "raw")


@pytest.mark.parametrize(
    ("name", "size"), [("adapter", 1), *(pytest.param(n, 2, marks=pytest.mark.slow) for n in RECIPES)]
)
def test_a_recipe_trains_from_shards_and_resumes_bit_for_bit(name, size, tmp_path, drawn, shards):
    runs.write_config(tmp_path, drawn)
    words = [ROOT / f"configs/pretrain_{name}.toml", *SMALL, *RECIPES[name], f"data.shards={shards}"]
    words.append(f"model.architecture={tmp_path}/tiny.json")
    log = tmp_path / "logs"
    log.mkdir()
    config = log / "recipe.toml"  # logs are written beside it
    config.write_text(words.pop(0).read_text())
    runs.train([config, *words, f"directory={tmp_path}/whole"], size=size)
    assert [r["step"] for r in runs.records(tmp_path / "whole", "val")] == [0, 2, 4]
    runs.train([config, *words, f"directory={tmp_path}/run", "stop_at=3"], size=size)
    runs.train([config, *words, f"directory={tmp_path}/run", "resume=true"], size=size)
    for kind in ("train", "val"):
        assert runs.records(tmp_path / "run", kind) == runs.records(tmp_path / "whole", kind)
    parts = [
        load_file(tmp_path / directory / "checkpoints/step-00000004/average.safetensors")
        for directory in ("run", "whole")
    ]
    assert all(torch.equal(parts[0][key], parts[1][key]) for key in parts[1])
    assert_average_is_evaluated(tmp_path / "whole")


def assert_average_is_evaluated(directory) -> None:
    loaded = load_run(directory)
    folder = directory / "checkpoints" / f"step-{loaded.step:08d}"
    average, trained = (load_file(folder / f"{part}.safetensors") for part in ("average", "trained"))
    state = loaded.method.trained_state()
    assert all(torch.equal(state[name], average[name]) for name in average)
    assert any(not torch.equal(average[name], trained[name]) for name in average)
    before = json.loads((directory / "results.json").read_text())
    assert any(name.endswith(f"step {loaded.step}") for name in before)


def test_an_average_follows_its_formula_and_parameters_are_restored():
    weight = nn.Parameter(torch.tensor([1.0, 2.0]))
    average = EMA({"w": weight}, 0.75)
    expected = weight.detach().clone()
    for _ in range(3):
        with torch.no_grad():
            weight.add_(1.0)
        average.update(torch.ones(()))
        expected = 0.75 * expected + 0.25 * weight.detach()
    average.update(torch.tensor(torch.inf))  # a step that was left out
    assert_close(average.state()["w"], expected)
    trained = weight.detach().clone()
    with average.applied():
        assert_close(weight.detach(), expected)
    assert torch.equal(weight.detach(), trained)


def test_an_average_of_other_parameters_is_refused():
    average = EMA({"w": nn.Parameter(torch.ones(2))}, 0.5)
    with pytest.raises(ValueError, match="average: expected 'w', found none"):
        average.load({"v": torch.ones(2)})


@pytest.mark.slow
def test_an_average_of_sharded_parameters_resumes_on_another_number_of_processes(tmp_path, drawn):
    words = [runs.write_config(tmp_path, drawn), "steps=4", "optim.ema=0.75", "checkpoint_every=2"]
    runs.train([*words, f"directory={tmp_path}/whole"])
    words += ["engine.strategy=deepspeed", "engine.zero_stage=3", "engine.grad_cache_chunks=2"]
    offload = ["engine.offload=cpu", "engine.offload_parameters=true"]
    runs.train([*words, *offload, f"directory={tmp_path}/split", "stop_at=2"], size=2)
    runs.train([*words, f"directory={tmp_path}/split", "resume=true"])
    found, wanted = (
        load_file(tmp_path / name / "checkpoints/step-00000004/average.safetensors")
        for name in ("split", "whole")
    )
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert_close(found[name], value, rtol=1e-4, atol=1e-6)
    assert_average_is_evaluated(tmp_path / "split")
