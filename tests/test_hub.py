"""Share a run on the hub: adapter, config and card go up; the same model comes down."""

import json
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, file_download, hf_api

import discovla
from discovla.config import ConfigError, parse_config
from discovla.export import push_to_hub
from discovla.methods import build
from discovla.model import ADAPTER, LoadedRun
from tests.hub import serve_hub
from tests.runs import TINY

METRICS = {"R@1": 41.25, "R@5": 70.0, "R@10": 80.0, "MdR": 2.0, "MnR": 9.5}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with serve_hub() as (address, repositories):
        for module in (constants, hf_api, file_download):
            if hasattr(module, "ENDPOINT"):
                monkeypatch.setattr(module, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(huggingface_hub.utils, "get_token", lambda: "token", raising=False)
        yield repositories


def run(folder: Path, seed: int = 0) -> LoadedRun:
    """A run of DiscoVLA on random towers, off its start."""
    (folder / "tiny.json").write_text(json.dumps(TINY))
    config = parse_config(
        {
            "directory": str(folder / "run"),
            "model": {"architecture": str(folder / "tiny.json"), "pretrained": "random", "seed": seed},
            "method": {"name": "discovla", "fused_vision_blocks": 1, "fused_text_blocks": 1, "lora_rank": 2},
            "data": {"manifest": "clips.jsonl", "frames": 3},
        }
    )
    method = build(config.model, config.method)
    with torch.no_grad():
        for p in method.trained_state().values():
            p.normal_(0, 0.1)
    return LoadedRun(config=config, method=method, step=7)


def test_a_pushed_run_is_loaded_by_its_name(hub, tmp_path):
    results = tmp_path / "results.json"
    results.write_text(json.dumps({"discovla, step 7": {"t2v": METRICS, "v2t": METRICS}}))
    pushed = run(tmp_path)
    url = push_to_hub(pushed, tmp_path / "out", "user/small", results)
    assert url.endswith("/commit/" + "0" * 39 + "1")
    assert set(hub["user/small"]) == {ADAPTER, "config.json", "README.md"}
    card = hub["user/small"]["README.md"].decode()
    assert "| discovla, step 7 | text to video | 41.2 | 70.0 |" in card
    assert 'discovla.load("hf:user/small")' in card and "clips.jsonl" in card and str(tmp_path) not in card
    config = json.loads(hub["user/small"]["config.json"])
    assert config["base_weights_crc32"] == pushed.method.fingerprint()["frozen"] and config["step"] == 7
    model = discovla.load("hf:user/small", device="cpu")
    found = model.method.trained_state()
    assert all(torch.equal(found[name], p) for name, p in pushed.method.trained_state().items())
    assert len(hub["user/small"][ADAPTER]) < 200_000  # the towers are not in it


def test_an_adapter_of_other_base_weights_is_refused(hub, tmp_path):
    push_to_hub(run(tmp_path), tmp_path / "out", "user/small")
    (tmp_path / "tiny.json").write_text(json.dumps({**TINY, "embed_dim": 16}))
    with pytest.raises(Exception, match="architecture"):
        discovla.load("hf:user/small", device="cpu")


def test_a_card_without_results_says_so(hub, tmp_path):
    push_to_hub(run(tmp_path), tmp_path / "out", "user/small")
    assert "No evaluation of this run is recorded." in hub["user/small"]["README.md"].decode()


def test_a_repository_that_does_not_exist_is_one_line(hub):
    with pytest.raises(ConfigError, match=r"^hf:user/none: expected adapter\.safetensors on the hub, found"):
        discovla.load("hf:user/none", device="cpu")
