"""A run can be loaded, evaluated and exported."""

import json
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from discovla.cli import main
from discovla.config import ConfigError
from discovla.load import load_run
from discovla.testing import relative_error
from discovla.towers.weights import read_drawn_clip
from tests.runs import train, write_config


@pytest.fixture(scope="module")
def run(tmp_path_factory, drawn) -> Path:
    """Return the directory of a short run."""
    folder = tmp_path_factory.mktemp("run")
    train([write_config(folder, drawn), "steps=2"])
    return folder / "run"


def test_a_loaded_run_has_the_results_of_its_best_checkpoint(run, capsys):
    assert main(["evaluate", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    kept = json.loads((run / "results.json").read_text())
    name = next(name for name in kept if name.startswith("discovla, step") and "+" not in name)
    assert found["raw"] == kept[name]
    assert {"dual softmax", "QB-Norm"} <= set(found)


def test_a_single_checkpoint_can_be_loaded(run):
    checkpoint = next((run / "checkpoints").glob("step-*"))
    loaded = load_run(checkpoint)
    assert loaded.step == int(checkpoint.name.removeprefix("step-"))
    stored = load_file(checkpoint / "trained.safetensors")
    assert all(torch.equal(stored[n], p) for n, p in loaded.method.trained_state().items())


def test_an_export_has_the_adapter_and_an_open_clip_model(run, tmp_path, capsys):
    assert main(["export", str(run), str(tmp_path / "out"), "--merge"]) == 0
    assert capsys.readouterr().out.count("wrote ") == 3
    with safe_open(tmp_path / "out" / "adapter.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["config"])["method"]["name"] == "discovla"
    loaded = load_run(run)
    sizes = json.loads((tmp_path / "out" / "open_clip.json").read_text())
    reference = open_clip.CLIP(**sizes).eval()
    reference.load_state_dict(load_file(tmp_path / "out" / "open_clip.safetensors"))
    ids = torch.tensor([[49406, 320, 1615, 49407, 0, 0], [49406, 786, 533, 4161, 320, 49407]])
    padded = torch.zeros(2, 32, dtype=torch.long)
    padded[:, :6] = ids
    with torch.no_grad():
        ours = loaded.method.encode_text(padded, padded > 0).pooled
        assert relative_error(ours, reference.encode_text(padded)) <= 1e-5


def test_a_drawn_export_has_the_format_of_the_shipped_asset(run, tmp_path):
    assert main(["export", str(run), str(tmp_path / "drawn.safetensors"), "--drawn"]) == 0
    assert read_drawn_clip(tmp_path / "drawn.safetensors").architecture == load_run(run).method.architecture


def test_a_folder_without_a_run_is_named(tmp_path, capsys):
    with pytest.raises(ConfigError, match="expected a run directory or a checkpoint"):
        load_run(tmp_path)
    assert main(["evaluate", str(tmp_path / "nothing")]) == 2
    assert "found no checkpoint there" in capsys.readouterr().err


def test_evaluating_needs_a_run_or_a_matrix(capsys):
    assert main(["evaluate"]) == 2
    assert "expected either a RUN or --matrix" in capsys.readouterr().err
