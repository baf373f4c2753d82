import json
from pathlib import Path

import pytest

from discovla.commands.config import config_keys
from discovla.config import (
    REMOVED_KEYS,
    RENAMED_KEYS,
    ConfigError,
    RunConfig,
    parse_config,
    read_config,
    read_values,
    submodel,
    translate_stored,
)
from discovla.data.config import DataConfig
from discovla.methods import METHODS
from discovla.methods.clip import CLIPConfig
from discovla.methods.discovla import DiscoVLAConfig

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.toml"))
KEYS = {key.key for key in config_keys()}
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


def test_overrides_apply_in_order(small):
    config = read_config(
        small, ["optim.lr=3e-4", "epochs=2", "method.alpha=0", "epochs=3", "data.quarantine=bad/x"]
    )
    assert (config.optim.lr, config.epochs) == (3e-4, 3)
    assert isinstance(config.method, DiscoVLAConfig)
    assert (config.method.alpha, config.method.lora_rank) == (0, 4)
    assert config.data.quarantine == Path("bad/x")


def test_an_override_of_the_manifest_replaces_the_shards_of_a_config_and_the_other_way_round(small):
    config = read_config(small, ["data.shards=folder"])
    assert (config.data.shards, config.data.manifest) == ("folder", None)
    config = read_config(small, ["data.shards=folder", "data.manifest=other.jsonl"])
    assert (config.data.shards, config.data.manifest) == (None, Path("other.jsonl"))


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
        ("optim.lr=fast", r"optim\.lr: expected a valid number.*, found 'fast'"),
        ("method.kl_norm=best", r"method\.kl_norm: expected 'official' or 'fixed', found 'best'"),
        ("method.rank=2", r"method\.rank: unknown key; did you mean 'lora_rank'\?"),
        ("method=clap", r"method\.name: expected one of clip, discovla.*, found 'clap'"),
        ("batch_size=0", r"batch_size: expected greater than or equal to 1, found 0"),
        ("engine.zero_stage=4", r"engine\.zero_stage: "),
        ("epochs", r"override: expected key=value, found 'epochs'"),
        (
            "method.frame_position=true method.fused_vision_blocks=0",
            r"method\.frame_position: expected method\.fused_vision_blocks >= 1",
        ),
        ("seed.x=1", r"seed: expected a valid integer"),
        ("data.decoder=auto", r"data\.decoder: expected a decoder that .* --bench. measures, found 'auto'"),
        (
            "data.stills={count=3,each=4}",
            r"data\.stills\.each: unknown key; expected one of count, easy_epochs",
        ),
        (
            "data.reversed_pairs=true method.exclude_same_video=false",
            r"data\.reversed_pairs: expected method\.exclude_same_video = true, .*, found false",
        ),
        (
            "engine.capture=graph engine.zero_stage=2",
            r"engine\.capture: expected 'none' with zero_stage = 2, found 'graph'$",
        ),
        (
            "engine.capture=graph method.swapped_captions=1",
            r"engine\.capture: expected 'none' with method\.swapped_captions, .*, found 'graph'$",
        ),
    ],
)
def test_an_error_is_one_line_with_its_key(small, override, message):
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


@pytest.mark.parametrize("old", RENAMED_KEYS)
def test_a_renamed_key_is_one_line_with_the_new_name(small, old):
    with pytest.raises(ConfigError) as error:
        read_config(small, [f"{old}=1"])
    assert str(error.value).startswith(f"{small}: {old}: renamed; use {RENAMED_KEYS[old]}")


@pytest.mark.parametrize("key", REMOVED_KEYS)
def test_a_removed_key_is_one_line_that_says_what_replaces_it(small, key):
    with pytest.raises(ConfigError) as error:
        read_config(small, [f"{key}=x"])
    assert str(error.value).startswith(f"{small}: {key}: removed: {REMOVED_KEYS[key]}")


@pytest.mark.parametrize("decoder", ["auto", "dali+pyav"])
def test_a_config_stored_by_an_older_version_is_translated(decoder, tmp_path):
    stored = {
        "directory": "runs/x",
        "method": {"name": "clip"},
        "data": {"manifest": "m.jsonl", "cache": "c", "resident": "cpu", "decoder": decoder},
        "engine": {"accumulate": 4},
    }
    (tmp_path / "config.json").write_text(json.dumps(stored))
    for config in (parse_config(translate_stored(stored)), read_config(tmp_path / "config.json")):
        assert config.engine.grad_cache_chunks == 4
        assert config.data.decoder == "pyav"


@pytest.mark.parametrize("new", RENAMED_KEYS.values())
def test_every_new_name_is_a_key_of_today(new):
    assert new in KEYS


CLASSES = [RunConfig, *(method.Config for method in METHODS.values())]
CLASSES += [submodel(f.annotation) for cls in (RunConfig, DataConfig) for f in cls.model_fields.values()]
CLASSES = sorted({cls for cls in CLASSES if cls is not None}, key=lambda cls: cls.__name__)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_field_of_every_config_class_has_a_docstring(cls):
    if not cls.model_config.get("use_attribute_docstrings"):
        pytest.skip("its fields are described in the docstring of the class")
    bare = [
        name
        for name, field in cls.model_fields.items()
        if not field.description and submodel(field.annotation) is None
    ]
    assert not bare


@pytest.mark.parametrize("word", ["method=clip4clip", "method.name=clip4clip"])
def test_both_words_that_choose_a_method_start_from_its_defaults(word):
    values = read_values("quickstart", [word])
    assert values["method"] == {"name": "clip4clip"}
    unchanged = read_values("discovla_msrvtt", ["method.name=discovla"])
    assert unchanged == read_values("discovla_msrvtt")


def test_a_number_as_weights_is_refused_with_the_seed_s_key():
    with pytest.raises(ConfigError, match=r"model\.pretrained: .* model\.pretrained=random model\.seed=7"):
        read_config("quickstart", ["model.pretrained=7"])


def test_a_missing_config_is_named_by_its_absolute_path_with_the_packaged_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"own, .*quickstart.* found no file " + str(tmp_path / "none")):
        read_config("none")
    (tmp_path / "own").write_text("")  # a file of that name comes first
    assert read_values("own") == {}
