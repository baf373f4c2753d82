import json
import re
from pathlib import Path

import pytest

from discovla.config import RENAMED_KEYS, ConfigError, parse_config, read_config
from discovla.methods.clip import CLIPConfig
from discovla.methods.discovla import DiscoVLAConfig

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.toml"))
SMALL = """
directory = "runs/x"
[method]
name = "discovla"
lora_rank = 4
[data]
manifest = "m.jsonl"
"""


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(SMALL)
    return path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_of_the_project_is_valid(path):
    read_config(path)


def test_overrides_are_dotted_words_in_order(small):
    config = read_config(
        small, ["optim.lr=3e-4", "epochs=2", "method.alpha=0", "epochs=3", "data.cache=cache/x"]
    )
    assert (config.optim.lr, config.epochs) == (3e-4, 3)
    assert isinstance(config.method, DiscoVLAConfig)
    assert (config.method.alpha, config.method.lora_rank) == (0, 4)
    assert config.data.cache == Path("cache/x")


def test_naming_another_method_drops_the_options_of_the_old_one(small):
    config = read_config(small, ["method=clip", "method.tune=frozen"])
    assert config.method == CLIPConfig(tune="frozen")


def test_the_resolved_config_reads_back_the_same(small, tmp_path):
    config = read_config(small, ["resume=true"])
    (tmp_path / "config.json").write_text(config.to_json())
    assert read_config(tmp_path / "config.json") == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lrr=1", r"optim\.lrr: unknown key; did you mean 'lr'\?"),
        ("nonsense=1", r"nonsense: unknown key; expected one of directory, resume,"),
        ("optim.lr=fast", r"optim\.lr: input should be a valid number.*; found 'fast'"),
        ("method.kl_norm=best", r"method\.kl_norm: input should be 'official' or 'fixed'; found 'best'"),
        ("method.rank=2", r"method\.rank: unknown key; did you mean 'lora_rank'\?"),
        ("method=clap", r"method\.name: expected one of clip, discovla.*, found 'clap'"),
        ("batch_size=0", r"batch_size: input should be greater than or equal to 1; found 0"),
        ("engine.zero_stage=4", r"engine\.zero_stage: "),
        ("epochs", r"override: expected key=value, found 'epochs'"),
        (
            "method.frame_position=true method.fused_vision_blocks=0",
            r"method\.frame_position: expected method\.fused_vision_blocks >= 1",
        ),
        ("seed.x=1", r"seed\.x: input should be|seed: "),
    ],
)
def test_what_is_wrong_is_one_line_with_its_key(small, override, message):
    with pytest.raises(ConfigError, match=message) as error:
        read_config(small, override.split())
    assert "\n" not in str(error.value)


def test_missing_values_and_files_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"config: directory: expected a value, found none"):
        parse_config({"method": {"name": "clip"}, "data": {"manifest": "m"}})
    with pytest.raises(ConfigError, match=r"nowhere\.toml: expected a readable config file"):
        read_config(tmp_path / "nowhere.toml")
    (tmp_path / "bad.toml").write_text("a = = 1")
    with pytest.raises(ConfigError, match=r"bad\.toml: expected valid TOML"):
        read_config(tmp_path / "bad.toml")
    (tmp_path / "bad.json").write_text(json.dumps([1])[:-1])
    with pytest.raises(ConfigError, match=r"bad\.json: expected valid"):
        read_config(tmp_path / "bad.json")


@pytest.mark.parametrize(
    ("old", "new"), [item for item in RENAMED_KEYS.items() if item[0].startswith("engine.")]
)
def test_an_old_key_is_refused_with_its_new_name(small, old, new):
    with pytest.raises(ConfigError, match=rf"{re.escape(old)}: .*{re.escape(new)}$"):
        read_config(small, [f"{old}=1"])
