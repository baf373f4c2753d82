"""Load a finished run: its config and its method with the trained parameters."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from discovla.config import ConfigError, RunConfig, parse_config, translate_stored
from discovla.engine import checkpoint
from discovla.methods import build
from discovla.methods.base import Method


@dataclass(frozen=True, kw_only=True)
class LoadedRun:
    """A trained method with the config of its run.

    method: with the trained parameters, or their moving average if the run has one.
    step: of the checkpoint.
    """

    config: RunConfig
    method: Method
    step: int


def load_run(path: Path | str) -> LoadedRun:
    """Load a run, on the CPU.

    Args:
        path: one checkpoint, or a run directory: its best checkpoint, or the newest if none was selected.

    Raises:
        ConfigError: no checkpoint there.
        CheckpointError: a broken checkpoint, or one of other pretrained weights than its config names.
    """
    path = Path(path)
    if (path / checkpoint.STATE).is_file():
        stored = checkpoint.load(path)
    else:
        best = checkpoint.best(path / "checkpoints")
        stored = checkpoint.load(best[0]) if best else checkpoint.latest(path / "checkpoints")
    if stored is None:
        raise ConfigError(f"{path}: expected a run directory or a checkpoint, found no checkpoint there")
    config = parse_config(translate_stored(stored.meta["config"]), str(stored.path / checkpoint.STATE))
    method = build(config.model, config.method)
    checkpoint.check_fingerprint(stored.meta["fingerprint"], method.fingerprint(), str(stored.path))
    method.load_trained_state(checkpoint.selected_weights(stored))
    return LoadedRun(config=config, method=method, step=stored.step)
