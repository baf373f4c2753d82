"""Export the trained parameters of a run as files for other programs."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file

from discovla.drawn_world.wording import token_ids
from discovla.model import LoadedRun
from discovla.towers.architecture import config_from_architecture
from discovla.towers.weights import write_drawn_clip


def export(run: LoadedRun, out: Path, *, merged: bool = False) -> list[Path]:
    """Write the trained parameters of a run.

    `adapter.safetensors` has the trained parameters under discovla's names, and the run's config as metadata.
    With `merged`, `open_clip.safetensors` has a plain CLIP under open_clip's names with LoRA merged in, and
    `open_clip.json` its architecture. Its text tower equals the trained one; what a method adds to the vision
    tower (fusion adapters, heads) is in the adapter only.

    Returns:
        The files written.
    """
    out.mkdir(parents=True, exist_ok=True)
    adapter = out / "adapter.safetensors"
    trained = {name: tensor.contiguous() for name, tensor in run.method.trained_state().items()}
    save_file(trained, adapter, metadata={"config": run.config.to_json(), "step": str(run.step)})
    if not merged:
        return [adapter]
    weights, architecture = out / "open_clip.safetensors", out / "open_clip.json"
    save_file({n: t.contiguous() for n, t in run.method.plain_weights().items()}, weights)
    architecture.write_text(json.dumps(config_from_architecture(run.method.architecture), indent=2))
    return [adapter, weights, architecture]


def export_drawn(run: LoadedRun, out: Path) -> Path:
    """Write a CLIP trained on the drawn world as the small file that the package ships."""
    method = run.method
    write_drawn_clip(out, method.architecture, method.plain_weights(), token_ids())
    return out
