"""The configuration of a run: a TOML file with dotted overrides, parsed into typed config classes."""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, ValidationError, model_validator

from discovla.data.config import DataConfig
from discovla.engine.config import EngineConfig
from discovla.engine.optim import OptimConfig
from discovla.foreign import parse_json
from discovla.methods import METHODS
from discovla.methods.base import MethodConfig
from discovla.towers.weights import ModelConfig

# Old key to new key of the same meaning. In a TOML file or an override the old key is an error that gives the
# new name; in a config stored in a checkpoint it is translated.
RENAMED_KEYS = {
    "engine.accumulate": "engine.grad_cache_chunks",
    "engine.join_within": "engine.rendezvous_timeout",
    "engine.lost_after": "engine.heartbeat_timeout",
    "engine.pace_every": "engine.straggler_check_every",
    "engine.residual": "engine.residual_dtype",
    "engine.wire": "engine.comm_dtype",
}
# Removed key to what replaces it. In a TOML file or an override the key is an error with this line; in a
# stored config it is dropped.
REMOVED_KEYS = {
    "data.cache": "decoded frames are no longer cached: train from raw shards (discovla shard), which read "
    "as fast; data.index_dir keeps frame indices",
    "data.resident": "frames are no longer held in memory: train from raw shards (discovla shard), which the "
    "operating system caches",
}
# Removed value to the value of the same meaning, in a config stored in a checkpoint.
REMOVED_VALUES = {
    ("data.decoder", "auto"): "pyav",
    ("data.decoder", "dali+pyav"): "pyav",
}


class ConfigError(ValueError):
    """A config that cannot be run. The message has the dotted key, what was expected and what was found."""


class RunConfig(BaseModel):
    """Everything a run depends on."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    directory: Path
    """Folder of the run: checkpoints, logs and results."""
    resume: bool = False
    """Continue from the newest complete checkpoint in `directory`, if there is one."""
    allow_changed_data: bool = False
    """Resume though clips, captions, spans or files differ from those the run began with. What differs is
    logged, training goes on at its step in the order of the new clips, the zero-shot rows are measured anew,
    and the best step is selected anew if the validation split has changed."""
    seed: int = 42
    """Seed of new parameters, of the order of training pairs and of augmentation."""
    batch_size: int = Field(default=128, ge=1)
    """Training pairs in a step, over all processes."""
    epochs: int = Field(default=5, ge=1)
    """Passes over the training pairs; `steps` overrides it."""
    steps: int | None = Field(default=None, ge=1)
    """Steps of the run."""
    stop_at: int | None = Field(default=None, ge=1)
    """Stop after this step as if interrupted; the learning rate follows the schedule of the complete run."""
    evaluate_every: int | None = Field(default=None, ge=1)
    """Steps between evaluations on the validation split, besides that of the last step.  None: one after
    every epoch."""
    checkpoint_every: int | None = Field(default=None, ge=1)
    """Steps between checkpoints, besides those of the last and of the best step.  None: one after every
    epoch."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """Number of newest checkpoints to keep, besides the best."""
    eval_batch_size: int = Field(default=64, ge=1)
    """Captions or clips that each process embeds at once in evaluation."""
    model: ModelConfig = ModelConfig()
    method: SerializeAsAny[MethodConfig]
    data: DataConfig
    optim: OptimConfig = OptimConfig()
    engine: EngineConfig = EngineConfig()

    @model_validator(mode="after")
    def _check_order(self) -> RunConfig:
        method = self.method
        stills = self.data.stills is not None
        if stills and (method.reversed_negatives or method.swapped_captions or self.data.reversed_pairs):
            raise ValueError("data.stills: expected clips with losses that teach order, found stills")
        if self.data.reversed_pairs and not method.exclude_same_video:
            raise ValueError(
                "data.reversed_pairs: expected method.exclude_same_video = true, which leaves out captions "
                "that are true of the reversed clip too, found false"
            )
        if self.engine.capture == "graph" and method.swapped_captions:
            raise ValueError(
                "engine.capture: expected 'none' with method.swapped_captions, whose number differs from "
                "batch to batch, found 'graph'"
            )
        return self

    def to_json(self) -> str:
        """Return the resolved config as JSON; `read_config` reads it back."""
        return json.dumps(self.model_dump(mode="json"), indent=2)


def read_config(path: Path | str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a TOML config, or the resolved `config.json` of a run directory, and apply overrides.

    Args:
        path: file that ends in .toml or .json, or the name of a packaged config.
        overrides: words such as "optim.lr=6e-4", applied in order.

    Raises:
        ConfigError: unreadable file, unknown key, wrong type or bad choice, in one line with the dotted key.
    """
    return parse_config(read_values(path, overrides), str(path))


def find_config(name: Path | str) -> Path:
    """Return the file of a config: `name` itself, or the packaged config of that name if there is no file."""
    path = Path(name)
    return path if path.is_file() else packaged_configs().get(str(name), path)


def packaged_configs() -> dict[str, Path]:
    """Return the configs that come with discovla, by name: in the package, or beside it in a checkout."""
    package = Path(str(files("discovla")))
    folders = (package / "configs", package.parent / "configs")
    folder = next((folder for folder in folders if folder.is_dir()), folders[0])
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def read_values(path: Path | str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a config as plain values with overrides applied; the keys are not checked yet."""
    path = find_config(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
        values = translate_stored(parse_json(text)) if path.suffix == ".json" else tomllib.loads(text)
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: expected a readable config file, or the name of a packaged config "
            f"({', '.join(packaged_configs())}), found no file {path.absolute()}"
        ) from None
    except OSError as error:
        raise ConfigError(f"{path}: expected a readable config file, found {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: expected text in UTF-8, found another byte at {error.start}") from None
    except (tomllib.TOMLDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: expected valid TOML, found: {error}") from None
    for word in overrides:
        apply_override(values, word)
    return values


def apply_override(values: dict[str, Any], word: str) -> None:
    """Apply one "a.b=value" in place. The value is parsed as TOML and is a string if it is not valid TOML."""
    key, equals, text = word.partition("=")
    if not equals or not key:
        raise ConfigError(f"override: expected key=value, found {word!r}")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *path, last = key.split(".")
    table = values
    for part in path:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise ConfigError(f"override: {key}: expected a table at {part!r}, found {table!r}")
    if key in ("method", "method.name") and isinstance(value, str):
        # each method has its own options: another method starts from its defaults
        if values.get("method", {}).get("name") != value:
            values["method"] = {"name": value}
    else:
        table[last] = value
    if key in ("data.manifest", "data.shards"):  # a run reads its clips from one of them
        table.pop("shards" if last == "manifest" else "manifest", None)


def parse_config(values: Mapping[str, Any], source: str = "config") -> RunConfig:
    """Parse plain values.

    Args:
        values: nested tables, as TOML gives them.
        source: file that the values are from, for messages.

    Raises:
        ConfigError: as `read_config`.
    """
    values = dict(values)
    method = values.pop("method", None)
    if not isinstance(method, Mapping) or method.get("name") not in METHODS:
        name = method.get("name") if isinstance(method, Mapping) else method
        raise ConfigError(f"{source}: method.name: expected one of {', '.join(METHODS)}, found {name!r}")
    cls = METHODS[method["name"]].Config
    try:
        parsed = cls.model_validate(dict(method))
    except ValidationError as error:
        raise _config_error(source, "method.", cls, error) from None
    try:
        return RunConfig.model_validate({**values, "method": parsed})
    except ValidationError as error:
        raise _config_error(source, "", RunConfig, error) from None


def translate_stored(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config stored by this or an older version in the keys and values of this one."""
    translated: dict[str, Any] = json.loads(json.dumps(values))
    for old, new in RENAMED_KEYS.items():
        table, name = _table(translated, old)
        if name in table:
            new_table, new_name = _table(translated, new)
            new_table[new_name] = table.pop(name)
    for key in REMOVED_KEYS:
        table, name = _table(translated, key)
        table.pop(name, None)
    for (key, value), new in REMOVED_VALUES.items():
        table, name = _table(translated, key)
        if table.get(name) == value:
            table[name] = new
    return translated


def _table(values: dict[str, Any], key: str) -> tuple[dict[str, Any], str]:
    """Return the table that a dotted key is in, made if absent, and the last part of the key."""
    *path, name = key.split(".")
    for part in path:
        values = values.setdefault(part, {})
    return values, name


def _config_error(source: str, prefix: str, model: type[BaseModel], error: ValidationError) -> ConfigError:
    """Make one line of the first of pydantic's errors."""
    first = error.errors()[0]
    key = (prefix + ".".join(str(part) for part in first["loc"])).rstrip(".")
    more = f" ({error.error_count() - 1} more)" if error.error_count() > 1 else ""
    match first["type"]:
        case "extra_forbidden" if key in RENAMED_KEYS:
            message = f"{key}: renamed; use {RENAMED_KEYS[key]}"
        case "extra_forbidden" if key in REMOVED_KEYS:
            message = f"{key}: removed: {REMOVED_KEYS[key]}"
        case "extra_forbidden":
            known = _field_names(model, first["loc"][:-1])
            close = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(known)}"
            message = f"{key}: unknown key; {hint}"
        case "missing":
            message = f"{key}: expected a value, found none"
        case "value_error":  # by a validator of ours
            text = str(first.get("ctx", {})["error"])
            named = re.match(r"([\w.]+): ", text)  # one of a whole table begins with the key
            message = f"{key}.{text}".lstrip(".") if named else f"{key}: {text}"
            if "found " not in text:
                message += f", found {first['input']!r}"
        case _:
            text = first["msg"].replace("Input should be ", "expected ", 1)
            message = f"{key}: {text[:1].lower()}{text[1:]}, found {first['input']!r}"
    return ConfigError(f"{source}: {message}{more}")


def submodel(annotation: Any) -> type[BaseModel] | None:
    """Return the config class of a field that is a table of its own, also if the table is optional."""
    for option in (annotation, *get_args(annotation)):
        if isinstance(option, type) and issubclass(option, BaseModel):
            return option
    return None


def _field_names(model: type[BaseModel], path: Sequence[Any]) -> list[str]:
    """Return the names of the fields at a dotted path."""
    for part in path:
        child = submodel(model.model_fields[part].annotation)
        assert child is not None, path
        model = child
    return list(model.model_fields)
