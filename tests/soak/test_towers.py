"""Whole models of open_clip with random weights: features and every gradient are those of open_clip's code.

pytest -m soak tests/soak/test_towers.py                 four models in float64, up to 12 GB of memory
python tests/soak/test_towers.py NAME ... [--out FILE]   rows for benchmarks/results/cpu/whole-towers.jsonl
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))  # as a script it starts with its own folder there

from benchmarks.measure import machine, write_row
from discovla import torchvision_cpu

NAMES = ("PE-Core-B-16", "ViT-B-16-SigLIP2", "EVA02-B-16", "MobileCLIP2-B")
BOUND = 1e-10  # of the largest difference, relative to the largest value of a tensor


def compare(name: str) -> dict[str, Any]:
    """Compare a model, and return the largest errors of features and gradients."""
    torchvision_cpu.install()  # before open_clip is imported
    from tests.towers.open_clip_towers import differences, whole_pair

    began = time.process_time()
    models = whole_pair(name)
    errors = differences(models)
    features = {side: errors.pop(side) for side in ("image", "text")}
    worst = max(errors, key=errors.__getitem__)
    return {
        "name": name,
        "parameters": sum(p.numel() for p in models.ours.parameters()),
        "dtype": "float64",
        "features": features,
        "gradients": len(errors),
        "worst_gradient": {worst: errors[worst]},
        "cpu_seconds": round(time.process_time() - began, 1),
        "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 1),
    }


@pytest.mark.soak
@pytest.mark.parametrize("name", NAMES)
def test_features_and_every_gradient_of_whole_models_are_those_of_open_clip(name):
    row = compare(name)
    assert max(*row["features"].values(), *row["worst_gradient"].values()) <= BOUND, row


def main(words: Sequence[str] | None = None) -> int:
    """Compare the models that are named."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", default=NAMES, metavar="NAME")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(words)
    for name in options.names:
        row = compare(name)
        print(row, flush=True)
        if options.out is not None:
            write_row(options.out, machine("cpu") | row)
    return 0


if __name__ == "__main__":
    sys.exit(main())
