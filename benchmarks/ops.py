"""Count memory and matrix products of the similarity ops, and time them.

    python benchmarks/ops.py                on a GPU if there is one, else on the CPU
    python benchmarks/ops.py --device cpu

Memory is that beside inputs and outputs. Counts on a CPU are exact and repeat; times on a shared machine vary
by a factor of two. Rows go to benchmarks/results/<device>/, one JSON a line. The last line of an op has the
exponent of memory over batch size.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # a script starts with its own folder there
sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

from benchmarks.measure import (
    extra_gpu_bytes,
    gpu_launches,
    machine,
    measure_times,
    product_flops,
    results_file,
    write_row,
)
from discovla.ops.cases import Case, case
from discovla.ops.dispatch import Impl, KernelUnavailable
from discovla.testing import exponent, peak_bytes

OPS = {"info_nce": (1, 1), "frame_similarity": (12, 12), "alignment_losses": (12, 12)}
# samples, from sizes that exceed one block
SIZES = {
    "info_nce": (1024, 2048, 4096),
    "frame_similarity": (128, 256, 512),
    "alignment_losses": (128, 256, 512),
}
IMPLS: dict[str, tuple[Impl, ...]] = {
    "cpu": ("torch", "reference"),
    "cuda": ("triton", "cuda", "torch", "reference"),
}


def count(which: Case, impl: Impl, device: str, seconds: float) -> dict[str, Any]:
    """Return counts and times of forward and backward."""
    leaves = which.leaves(device)

    def call(_: int = 0) -> list[torch.Tensor]:
        return which.run(leaves, impl)

    times = measure_times(call, cuda=device == "cuda", seconds=seconds, least=3)
    row = {
        "name": which.name,
        "op": which.op,
        "n": which.n,
        "impl": impl,
        "ms_p50": times.ms_p50,
        "calls": times.n,
    }
    row |= {"ms_p20": times.ms_p20, "ms_p80": times.ms_p80}
    if device == "cuda":
        return row | {"extra_mb": extra_gpu_bytes(call) / 1e6, "launches": gpu_launches(call)}
    outputs = sum(x.numel() * x.element_size() for x in call())
    passes = product_flops(call) / (which.flops / 4) if impl != "reference" else None
    return row | {"extra_mb": (peak_bytes(call) - outputs) / 1e6, "passes": passes}


def show(row: dict[str, Any]) -> None:
    passes = f"{row['passes']:.2f} passes" if row.get("passes") else f"{row.get('launches', '')}"
    print(
        f"{row['name']:52} {row['impl']:10} {row['extra_mb']:10.2f} MB {row['ms_p50']:10.2f} ms  {passes}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--seconds", type=float, default=1.0, help="of timing for each row")
    options = parser.parse_args()
    device = ("cuda" if torch.cuda.is_available() else "cpu") if options.device == "auto" else options.device
    where = machine(device)
    path = results_file(where, "ops")
    for op, frames in OPS.items():
        for impl in IMPLS[device]:
            cases = [case(op, n, frames=frames, dim=64, dtype=torch.float32) for n in SIZES[op]]
            try:
                rows = [count(which, impl, device, options.seconds) for which in cases]
            except KernelUnavailable as error:
                print(error, flush=True)
                continue
            for row in rows:
                write_row(path, {**where, **row})
                show(row)
            slope = exponent(SIZES[op], [row["extra_mb"] for row in rows])
            print(f"{op} {impl}: memory grows with exponent {slope:.2f}", flush=True)


if __name__ == "__main__":
    main()
