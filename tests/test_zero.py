"""`discovla zero` prints a run's DeepSpeed settings and the predicted memory of a GPU."""

import json
from dataclasses import replace

import pytest
import torch

from benchmarks.measure import bytes_kept
from discovla.cli import main
from discovla.commands.zero import predicted, sketch
from discovla.config import parse_config
from discovla.engine.deepspeed import deepspeed_settings
from discovla.engine.memory import Sizes
from discovla.methods import build
from discovla.testing import noise_batch
from tests.engine.launch import ROOT

CONFIG = str(ROOT / "configs/discovla_msrvtt.toml")
TOWER = {"width": 192, "layers": 6, "mlp_ratio": 4.0}
ARCHITECTURE = {
    "embed_dim": 64,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 112, "patch_size": 16, "head_width": 64, **TOWER},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "heads": 3, **TOWER},
}


def test_the_printed_settings_are_those_of_a_run(capsys):
    assert main(["zero", CONFIG, "engine.zero_stage=2", "--gpus", "4", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    sizes = report["parameters"]
    assert (sizes["trained"], sizes["world_size"]) == (561_200, 4)  # as the release trains at ViT-B/32
    config = parse_config({"directory": "x", "method": {"name": "discovla"}, "data": {"manifest": "y"}})
    engine = config.engine.model_copy(update={"zero_stage": 2})
    settings = deepspeed_settings(engine, config.optim, micro_batch=32, world_size=4, trained=561_200)
    assert report["deepspeed"] == settings
    assert set(report["bytes"]) == {
        "parameters",
        "masters",
        "moments",
        "gradients",
        "gathered",
        "activations",
    }


def test_the_table_ends_with_the_total(capsys):
    assert main(["zero", CONFIG]) == 0
    lines = capsys.readouterr().out.splitlines()
    settings = json.loads("\n".join(lines[: lines.index("}") + 1]))
    assert settings["zero_optimization"]["stage"] == 0
    sizes = {name: float(size.replace(",", "")) for name, size in map(str.split, lines[-7:])}
    total = sizes.pop("total")
    assert total == pytest.approx(sum(sizes.values()), abs=0.5)


def test_offloaded_state_has_a_table_of_its_own(capsys):
    words = ["zero", CONFIG, "method.tune=full", "engine.offload=cpu", "--gpus", "2"]
    assert main([*words, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    trained = report["parameters"]["trained"]
    assert report["deepspeed"]["zero_optimization"]["stage"] == 1
    assert report["bytes"]["masters"] == report["bytes"]["moments"] == 0
    assert report["host_bytes"]["moments"] == pytest.approx(8 * trained / 2, abs=8)
    assert report["parameters"]["largest"] == 49408 * 512  # the token embedding
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    host = lines[lines.index("in the host's memory for each GPU, in MiB:") + 1 :]
    sizes = {name: float(size.replace(",", "")) for name, size in map(str.split, host)}
    assert sizes["total"] == pytest.approx(sum(report["host_bytes"].values()) / 2**20, abs=0.5)


@pytest.mark.parametrize(
    ("words", "place", "share"),
    [
        ([], "bytes", 1),
        (["engine.zero_stage=3"], "bytes", 4),
        (["engine.zero_stage=3", "engine.offload=cpu"], "host_bytes", 4),
    ],
    ids=["unsharded", "sharded", "offloaded"],
)
def test_the_ema_counts_where_it_is_stored(capsys, words, place, share):
    assert main(["zero", CONFIG, "optim.ema=0.9", *words, "--gpus", "4", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report[place]["average"] == 4 * 561_200 / share
    assert sum("average" in report[name] for name in ("bytes", "host_bytes")) == 1


def test_a_number_of_gpus_that_does_not_divide_the_batch_is_refused(capsys):
    assert main(["zero", CONFIG, "--gpus", "3"]) == 2
    assert "--gpus: expected a number that divides batch_size = 128, got 3" in capsys.readouterr().err


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_predicted_activations_exceed_the_real_ones_by_less_than_a_third(tune, tmp_path):
    (tmp_path / "sizes.json").write_text(json.dumps(ARCHITECTURE))
    config = parse_config(
        {
            "directory": "x",
            "batch_size": 2,
            "model": {"architecture": str(tmp_path / "sizes.json"), "pretrained": "random"},
            "method": {"name": "discovla", "tune": tune, "fused_vision_blocks": 1, "fused_text_blocks": 1},
            "data": {"manifest": "y", "frames": 3, "context_length": 16},
        }
    )
    method = build(config.model, config.method)
    assert {n: p.shape for n, p in sketch(config).named_parameters()} == {
        n: p.shape for n, p in method.named_parameters()
    }
    batch = replace(noise_batch(method.architecture, size=2), valid=None)
    full = {name: torch.ones_like(getattr(batch, name)) for name in ("text_mask", "frame_text_mask")}
    batch = replace(batch, **full)  # captions of full length
    method, batch = method.to("meta"), batch.to("meta")  # a CPU keeps the outputs of attention, too
    kept = bytes_kept(lambda: method.encode(batch), list(method.parameters()))
    trained = sum(p.numel() for p in method.parameters() if p.requires_grad)
    sizes = Sizes(frozen=0, trained=trained, world_size=1)
    assert kept <= predicted(config, method, sizes)["activations"] <= 4 / 3 * kept
