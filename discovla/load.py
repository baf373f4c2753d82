"""Load a finished run: its config and its method with the trained parameters."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from discovla.config import ConfigError, RunConfig, parse_stored_config
from discovla.engine import checkpoint
from discovla.methods import build
from discovla.methods.base import Method


@dataclass(frozen=True, kw_only=True)
class LoadedRun:
    """A trained method, ready to evaluate or export: the config of its run, and how many steps it took."""

    config: RunConfig
    method: Method
    step: int


def load_run(path: Path | str) -> LoadedRun:
    """Open a run directory (its best checkpoint, or the newest where none was selected) or one checkpoint.

    Raises:
        ConfigError: no checkpoint there.
        CheckpointError: a checkpoint that is broken, or that fits other weights than its config names.
    """
    path = Path(path)
    found = checkpoint.load(path) if (path / checkpoint.STATE).is_file() else _selected(path)
    config = parse_stored_config(found.meta["config"], str(found.path / checkpoint.STATE))
    method = build(config.model, config.method)
    checkpoint.check_fingerprint(found.meta["fingerprint"], method.fingerprint(), str(found.path))
    method.load_trained_state(checkpoint.selected_weights(found))
    return LoadedRun(config=config, method=method, step=found.step)


def _selected(path: Path) -> checkpoint.Checkpoint:
    directory = path / "checkpoints"
    best = checkpoint.best(directory)
    found = checkpoint.load(best[0]) if best else checkpoint.latest(directory)
    if found is None:
        raise ConfigError(f"{path}: expected a run directory or a checkpoint, found no checkpoint there")
    return found
