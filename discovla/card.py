"""Model card of a run, made from its config and the results of its evaluation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from discovla.config import RunConfig
from discovla.methods.base import Method
from discovla.towers.weights import weights_origin

# metrics of a card, in both directions
METRICS = ("R@1", "R@5", "R@10", "MdR", "MnR")
DIRECTIONS = {"t2v": "text to video", "v2t": "video to text"}


def base_model(config: RunConfig) -> str:
    """Return the weights that a run started from, as "MODEL TAG"; of files the names without folders."""
    model = config.model
    return " ".join(Path(part).name for part in (model.architecture, model.pretrained) if part is not None)


def adapter_config(config: RunConfig, method: Method, step: int) -> dict[str, Any]:
    """Return name, architecture and checksum of the weights that an adapter belongs to."""
    model, fingerprint = config.model, method.fingerprint()
    return {
        "library_name": "discovla",
        "method": config.method.name,
        "step": step,
        "base_model": {"architecture": model.architecture, "pretrained": model.pretrained},
        "architecture": fingerprint["architecture"],
        "base_weights_crc32": fingerprint["frozen"],
    }


def model_card(
    config: RunConfig, method: Method, step: int, repository: str, results: Path | None = None
) -> str:
    """Return a README.md with the figures of a run, its data and its licence.

    Args:
        repository: USER/NAME on the hub.
        results: the results.json of the run; None says that there are no figures.

    Raises:
        ValueError: a results file without metrics.
    """
    data = config.data
    head = {"library_name": "discovla", "tags": ["video-text-retrieval", config.method.name]}
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in head.items()), "---", ""]
    parameters = sum(p.numel() for p in method.trained_state().values())
    base, name = base_model(config), config.method.name
    lines += [
        f"# {repository}",
        "",
        f"{parameters:,} trained parameters of {name}, step {step}, for {base}.",
        "The weights that they belong to are not included: they are loaded by name, and their checksum is "
        "compared.",
        "",
        "```python",
        "import discovla",
        "",
        f'model = discovla.load("hf:{repository}")',
        "```",
        "",
        f"- Licence of the weights of {base}: {weights_origin(config.model).licence}",
        f"- Data: {_source(config)}; {data.frames} frames a clip, sampling {data.sampling!r}, captions of at "
        f"most {data.context_length} tokens",
        "- Protocol: several captions of a clip form one group; ties count against the query; the test split "
        f"is {data.test_split or data.val_split!r}",
        "",
    ]
    return "\n".join([*lines, *_figures(results), ""])


def _source(config: RunConfig) -> str:
    """Return the name of the manifest or shards, without folders, and the training split."""
    data = config.data
    source = Path(data.shards).name if data.shards else data.manifest.name if data.manifest else "none"
    return f"{source}, training split {data.train_split!r}"


def _figures(results: Path | None) -> list[str]:
    """Return the table of the results, or a line that there are none."""
    if results is None:
        return ["No evaluation of this run is recorded."]
    rows = json.loads(results.read_text())
    lines = [
        "| result | direction | " + " | ".join(METRICS) + " |",
        "|---|---|" + "---|" * len(METRICS),
    ]
    for name, row in rows.items():
        for direction, words in DIRECTIONS.items():
            if isinstance(row, Mapping) and direction in row:
                figures = " | ".join(f"{row[direction][metric]:.1f}" for metric in METRICS)
                lines.append(f"| {name} | {words} | {figures} |")
    if len(lines) == 2:
        raise ValueError(f"{results}: expected metrics in both directions, found none")
    return lines
