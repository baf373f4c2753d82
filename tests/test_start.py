"""A run starts without modules that its first step does not use."""

import subprocess
import sys

import pytest

from tests import runs

UNUSED = (
    *("torch._dynamo", "torch._inductor", "triton", "deepspeed", "open_clip", "transformers", "timm"),
    *("torchvision", "matplotlib", "jinja2", "pandas", "sklearn", "lancedb", "fastapi"),
)
PROGRAM = f"""
import os, sys
from discovla.cli import main
from discovla.trainer import Trainer

def after_step(*_):
    print("loaded:", *(name for name in {UNUSED} if name in sys.modules), file=sys.stderr)
    os._exit(0)

Trainer.write_report = after_step  # follows the first steps
main(["train", *sys.argv[1:]])
"""


@pytest.mark.slow
def test_the_first_step_imports_neither_compilers_nor_plots_nor_other_libraries(tmp_path, drawn):
    words = [runs.write_config(tmp_path, drawn), "method=basis", "data.augment=none", "engine.device=cpu"]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, words)], capture_output=True, text=True, check=True
    )
    assert done.stderr.splitlines()[-1] == "loaded:", done.stderr
