"""Opening what a run left: its config, its method with the trained parameters in place, and exports."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file

from discovla.config import ConfigError, RunConfig, parse_config
from discovla.drawn_world.wording import token_ids
from discovla.engine import checkpoint
from discovla.methods import build
from discovla.methods.base import Method
from discovla.towers.architecture import config_from_architecture
from discovla.towers.weights import write_drawn_clip


@dataclass(frozen=True, kw_only=True)
class Run:
    """A trained method, ready to evaluate or export: the config of its run, and how many steps it took."""

    config: RunConfig
    method: Method
    step: int


def open_run(path: Path | str) -> Run:
    """Open a run directory (its best checkpoint, or the newest where none was selected) or one checkpoint.

    Raises:
        ConfigError: no checkpoint there.
        CheckpointError: a checkpoint that is broken, or that fits other weights than its config names.
    """
    path = Path(path)
    found = checkpoint.load(path) if (path / checkpoint.STATE).is_file() else _selected(path)
    config = parse_config(found.meta["config"], str(found.path / checkpoint.STATE))
    method = build(config.model, config.method)
    checkpoint.check_fingerprint(found.meta["fingerprint"], method.fingerprint(), str(found.path))
    method.load_trained_state(checkpoint.evaluated(found))
    return Run(config=config, method=method, step=found.step)


def _selected(path: Path) -> checkpoint.Checkpoint:
    directory = path / "checkpoints"
    best = checkpoint.best(directory)
    found = checkpoint.load(best[0]) if best else checkpoint.latest(directory)
    if found is None:
        raise ConfigError(f"{path}: expected a run directory or a checkpoint, found no checkpoint there")
    return found


def export(run: Run, out: Path, *, merged: bool = False) -> list[Path]:
    """Write what a run trained, for other programs.

    `adapter.safetensors` holds the trained parameters by our names, with the run's config as metadata.  With
    `merged`, `open_clip.safetensors` holds a plain CLIP under open_clip's names with LoRA merged in, and
    `open_clip.json` its sizes: its text tower is the trained one exactly; what a method computes beyond plain
    blocks on the vision side (fusion adapters, heads) is in the adapter alone.

    Returns:
        The files written.
    """
    out.mkdir(parents=True, exist_ok=True)
    adapter = out / "adapter.safetensors"
    trained = {name: tensor.contiguous() for name, tensor in run.method.trained_state().items()}
    save_file(trained, adapter, metadata={"config": run.config.to_json(), "step": str(run.step)})
    if not merged:
        return [adapter]
    weights, sizes = out / "open_clip.safetensors", out / "open_clip.json"
    save_file({n: t.contiguous() for n, t in run.method.plain_weights().items()}, weights)
    sizes.write_text(json.dumps(config_from_architecture(run.method.architecture), indent=2))
    return [adapter, weights, sizes]


def export_drawn(run: Run, out: Path) -> Path:
    """Write a CLIP that was trained on the drawn world as the small file that ships with the package."""
    method = run.method
    write_drawn_clip(out, method.architecture, method.plain_weights(), token_ids())
    return out
