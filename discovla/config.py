"""One run as typed values: a TOML file, dotted overrides, and the config classes of their owners."""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, ValidationError

from discovla.data.loader import DataConfig
from discovla.engine.config import EngineConfig
from discovla.engine.optim import OptimConfig
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
    "data.cache": "frames are no longer cached; train from shards (discovla shard), which read as fast",
    "data.resident": "frames are no longer held in memory; train from raw shards (discovla shard), which the "
    "system keeps in memory",
}
# Removed value to the value of the same meaning, in a config stored in a checkpoint.
REMOVED_VALUES = {
    ("data.decoder", "auto"): "pyav",
}


class ConfigError(ValueError):
    """A config that cannot be run; the message names the dotted key, what was expected and what was found."""


class RunConfig(BaseModel):
    """Everything a run depends on.

    directory: where checkpoints, logs and results go.
    resume: go on from the newest whole checkpoint in `directory`, if there is one.
    seed: of the order of samples, augmentation and new parameters.
    batch_size: clips in a step over all processes.
    epochs: passes over the training samples; `steps`, where given, overrides them.
    stop_at: leave after this step, as if interrupted (the schedule is that of the whole run).
    evaluate_every, checkpoint_every: steps between; an epoch's end always has both.
    keep_checkpoints: how many of the newest are kept, besides the best.
    eval_batch_size: clips or captions at once in evaluation, per process.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    directory: Path
    resume: bool = False
    seed: int = 42
    batch_size: int = Field(default=128, ge=1)
    epochs: int = Field(default=5, ge=1)
    steps: int | None = Field(default=None, ge=1)
    stop_at: int | None = Field(default=None, ge=1)
    evaluate_every: int | None = Field(default=None, ge=1)
    checkpoint_every: int | None = Field(default=None, ge=1)
    keep_checkpoints: int = Field(default=2, ge=1)
    eval_batch_size: int = Field(default=64, ge=1)
    model: ModelConfig = ModelConfig()
    method: SerializeAsAny[MethodConfig]
    data: DataConfig
    optim: OptimConfig = OptimConfig()
    engine: EngineConfig = EngineConfig()

    def to_json(self) -> str:
        """The resolved config, as it is kept in the run directory."""
        return json.dumps(self.model_dump(mode="json"), indent=2)


def read_config(path: Path | str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run from a TOML file (or a run directory's resolved JSON) with dotted overrides.

    Args:
        path: of the file.
        overrides: words such as "optim.lr=6e-4", applied in order.

    Raises:
        ConfigError: unreadable file, unknown key, wrong type, bad choice; one line with the dotted key.
    """
    path = Path(path)
    try:
        text = path.read_text()
        values = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"{path}: expected a readable config file, found {error.strerror}") from None
    except (tomllib.TOMLDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path}: expected valid TOML, found: {error}") from None
    for word in overrides:
        _override(values, word)
    return parse_config(values, str(path))


def parse_stored_config(values: Mapping[str, Any], source: str) -> RunConfig:
    """Parse a config that this or an older version stored in a checkpoint; old keys are translated."""
    values = json.loads(json.dumps(values))
    for old, new in RENAMED_KEYS.items():
        if _is_field(new) and (value := _pop(values, old)) is not None:
            _set(values, new, value)
    for key in REMOVED_KEYS:
        if not _is_field(key):
            _pop(values, key)
    for (key, value), new in REMOVED_VALUES.items():
        if (stored := _pop(values, key)) is not None:
            _set(values, key, new if stored == value else stored)
    return parse_config(values, source)


def parse_config(values: Mapping[str, Any], source: str = "config") -> RunConfig:
    """A run from plain values; `source` names them in messages."""
    values = dict(values)
    method = values.pop("method", None)
    if not isinstance(method, Mapping) or method.get("name") not in METHODS:
        found = method.get("name") if isinstance(method, Mapping) else method
        raise ConfigError(f"{source}: method.name: expected one of {', '.join(METHODS)}, found {found!r}")
    cls = METHODS[method["name"]].Config
    try:
        parsed = cls.model_validate(dict(method))
    except ValidationError as error:
        raise _config_error(source, "method.", cls, error) from None
    try:
        return RunConfig.model_validate({**values, "method": parsed})
    except ValidationError as error:
        raise _config_error(source, "", RunConfig, error) from None


def _override(values: dict[str, Any], word: str) -> None:
    """Apply one "a.b=value"; the value is read as TOML, or as a string where it is no TOML."""
    key, equals, text = word.partition("=")
    if not equals or not key:
        raise ConfigError(f"override: expected key=value, found {word!r}")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *path, last = key.split(".")
    for part in path:
        values = values.setdefault(part, {})
        if not isinstance(values, dict):
            raise ConfigError(f"override: {key}: expected a table at {part!r}, found {values!r}")
    if key == "method" and isinstance(value, str):
        # another method has other options: only its name is carried over
        same = values.get("method", {}).get("name") == value
        values["method"] = values["method"] if same else {"name": value}
    else:
        values[last] = value


def _config_error(source: str, prefix: str, model: type[BaseModel], error: ValidationError) -> ConfigError:
    """The first complaint as one line."""
    first = error.errors()[0]
    key = prefix + ".".join(str(part) for part in first["loc"])
    more = f" ({error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden" and key in RENAMED_KEYS:
        return ConfigError(f"{source}: {key}: renamed, use {RENAMED_KEYS[key]}{more}")
    if first["type"] == "extra_forbidden" and key in REMOVED_KEYS:
        return ConfigError(f"{source}: {key}: removed: {REMOVED_KEYS[key]}{more}")
    if first["type"] == "extra_forbidden":
        known = _fields(model, first["loc"][:-1])
        close = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(known)}"
        return ConfigError(f"{source}: {key}: unknown key; {hint}{more}")
    if first["type"] == "missing":
        return ConfigError(f"{source}: {key}: expected a value, found none{more}")
    message = first["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    return ConfigError(f"{source}: {key}: {message}; found {first['input']!r}{more}")


def _fields(model: type[BaseModel], path: Sequence[Any]) -> list[str]:
    """Names of the fields at a dotted path."""
    for part in path:
        annotation = model.model_fields[part].annotation
        assert isinstance(annotation, type) and issubclass(annotation, BaseModel)
        model = annotation
    return list(model.model_fields)


def _is_field(key: str) -> bool:
    """True if a config of this version has the key."""
    section, _, name = key.partition(".")
    field = RunConfig.model_fields.get(section)
    if not name or field is None or section == "method":
        return field is not None
    assert isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
    return name in field.annotation.model_fields


def _pop(values: dict[str, Any], key: str) -> Any:
    """Remove a dotted key and return its value, or None without it."""
    *path, last = key.split(".")
    for part in path:
        values = values.get(part, {})
    return values.pop(last, None)


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    for part in path:
        values = values.setdefault(part, {})
    values[last] = value
