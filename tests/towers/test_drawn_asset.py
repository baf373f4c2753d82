"""The small CLIP that ships with the package."""

import json
from pathlib import Path

from safetensors.torch import load_file

from discovla.drawn_world.wording import token_ids
from discovla.methods import build
from discovla.methods.clip import CLIPConfig
from discovla.towers.configs import architecture_from_config
from discovla.towers.weights import DRAWN_CLIP, ModelConfig

CONFIG = Path(__file__).parents[2] / "configs/drawn_clip.json"


def test_the_asset_has_the_architecture_that_is_pretrained():
    method = build(ModelConfig(pretrained="drawn"), CLIPConfig())
    assert method.architecture == architecture_from_config(str(CONFIG), json.loads(CONFIG.read_text()))
    assert all(parameter.isfinite().all() for parameter in method.parameters())


def test_the_asset_holds_the_rows_of_every_word_of_the_world_and_no_more():
    assert load_file(DRAWN_CLIP)["token_ids"].tolist() == list(token_ids())


def test_the_asset_is_small_enough_to_ship():
    assert DRAWN_CLIP.stat().st_size <= 4_000_000
