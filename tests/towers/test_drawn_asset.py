"""The small towers that ship with the package."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from discovla.drawn_world.wording import token_ids
from discovla.methods import build
from discovla.methods.clip import CLIPConfig
from discovla.towers.weights import DRAWN, ModelConfig, load_pretrained

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize("name", DRAWN)
def test_the_asset_has_the_architecture_that_is_pretrained(name):
    method = build(ModelConfig(pretrained=name), CLIPConfig())
    config = CONFIGS / DRAWN[name].with_suffix(".json").name
    trained = ModelConfig(architecture=str(config), pretrained="random")
    assert method.architecture == load_pretrained(trained).architecture
    assert all(parameter.isfinite().all() for parameter in method.parameters())


@pytest.mark.parametrize("path", DRAWN.values(), ids=DRAWN)
def test_the_asset_holds_the_rows_of_every_word_of_the_world_and_no_more(path):
    assert load_file(path)["token_ids"].tolist() == list(token_ids())


@pytest.mark.parametrize("path", DRAWN.values(), ids=DRAWN)
def test_the_asset_is_small_enough_to_ship(path):
    assert path.stat().st_size <= 4_000_000
