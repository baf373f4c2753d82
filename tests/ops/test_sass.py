"""Machine code of kernels, compiled for GPUs that are not here, beside the committed rows."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import discovla_kernels
from benchmarks.measure import RESULTS, ROOT, read_rows

TABLE = RESULTS / "sass/kernels.jsonl"
OF_TOWERS = {
    *("layer_norm", "lora_norm", "adapter", "mlp", "short_attention", "temporal_fusion", "readout_attention"),
    *("frame_patches", "fold_normalisation", "quantise_rows", "merge_tokens", "activation"),
}
# five products of a tile of 64 queries and keys need more than the 255 registers of a thread
SPILLS = {("temporal_fusion backward 1536x50 w=768 bf16", 120): 29}
WHAT_COMPILES_FAST = (
    "lora_norm forward 76800x768 bf16",
    "short_attention backward 1536x50",
    "temporal_fusion backward 1536x50",
    "merge_tokens forward 1536x50",
    "frame_similarity evaluation 128",
    "info_nce forward 128x128 fp32 with",
)


def rows() -> list[dict]:
    return read_rows(TABLE)


def test_every_launched_kernel_has_a_row():
    sources = [
        Path(path).read_text() for folder in discovla_kernels.__path__ for path in Path(folder).glob("*.py")
    ]
    launched = {
        x for text in sources for x in re.findall(r"(?:^ +|_launch\()(_\w+)[\[,]", text, re.MULTILINE)
    }
    assert launched == {row["kernel"] for row in rows()}


def test_towers_do_not_spill_in_bfloat16_and_losses_hardly():
    for row in rows():
        op, size = row["case"].split(maxsplit=1)
        single = "fp32" in size.split() and "beside" not in size
        if op not in OF_TOWERS:
            assert row["spills"] <= 16, row
        elif not single:
            assert row["spills"] <= SPILLS.get((row["case"], row["arch"]), 0), row
        assert row["programs"] > 0, row


@pytest.mark.slow
def test_no_kernel_needs_more_than_its_committed_row():
    triton = pytest.importorskip("triton")
    if (version := rows()[0]["triton"]) != triton.__version__:
        pytest.skip(f"the committed rows are of triton {version}, this is {triton.__version__}")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    words = ["--check", "--jobs", "2", "--arch", "90", "--only", *WHAT_COMPILES_FAST]
    run = subprocess.run(
        [sys.executable, ROOT / "benchmarks/sass.py", *words], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.count("sm_90") >= len(WHAT_COMPILES_FAST)
