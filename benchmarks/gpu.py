"""The similarity kernels on this machine's GPU: are they right, what can the GPU do, how fast are they.

    python benchmarks/gpu.py                      everything, within ten minutes
    python benchmarks/gpu.py --suite small        sizes up to 1024
    python benchmarks/gpu.py --only frame         cases whose name has the word
    python benchmarks/gpu.py --gate               exit 1 where slower than the best earlier results

One call: every kernel against the reference in float64; ceilings; times of triton, torch (the same blocks in
plain torch), reference (eager) and compiled (the reference under torch.compile), where they fit into memory.
Rows go to benchmarks/results/<gpu>/, one JSON a line; the table is printed. Without a GPU it says so and
exits with 2. It exits with 1 if a kernel is wrong, and then times nothing.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script it starts with its own folder there
sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

from benchmarks.cases import Case, checked_cases, timed_cases
from benchmarks.measure import (
    earlier,
    extra_gpu_bytes,
    gpu_ceilings,
    gpu_launches,
    machine,
    measure_times,
    relative_frobenius,
    results_file,
    write_row,
)
from discovla.ops.dispatch import Impl

# ‖error‖ / ‖truth‖ of values and of gradients. float32 is three TF32 products. Half-precision inputs are
# exact in float32, a gradient is rounded to its input's dtype. From 4096 pairs on, bf16 rows are multiplied.
BUDGET = {torch.float32: (2e-5, 2e-4), torch.float16: (2e-5, 2e-3), torch.bfloat16: (2e-5, 8e-3)}
LARGE = (4e-3, 8e-3)
IMPLS: tuple[Impl | Literal["compiled"], ...] = ("triton", "torch", "reference", "compiled")


def truth(case: Case, leaves: list[Tensor]) -> list[Tensor]:
    """The reference in float64 on the same numbers."""
    wide = [x.detach().double().requires_grad_(case.backward) for x in leaves]
    return case.run(wide, "reference")


def errors(case: Case, impl: Impl, leaves: list[Tensor], want: list[Tensor]) -> tuple[float, float]:
    """Relative errors: of the value, and the largest of any gradient."""
    got = case.run(leaves, impl)
    found = [relative_frobenius(g, w) for g, w in zip(got, want, strict=True) if w.double().norm() > 1e-9]
    return found[0] if found else 0.0, max(found[1:-1], default=0.0)


def check(case: Case) -> dict[str, Any]:
    """Whether the kernel is right; products in bf16 flip maxima, so 1.2 x plain torch's error is allowed."""
    if case.op == "rank_of_positive":
        return check_ranks(case)
    leaves = case.leaves("cuda")
    want = truth(case, leaves)
    value, gradient = errors(case, "triton", leaves, want)
    limits = BUDGET[case.dtype]
    if case.n >= 4096 and case.dtype == torch.bfloat16:
        plain = errors(case, "torch", leaves, want)
        limits = max(LARGE[0], 1.2 * plain[0]), max(LARGE[1], 1.2 * plain[1])
    ok = value <= limits[0] and gradient <= limits[1]
    return {"name": case.name, "impl": "triton", "err_value": value, "err_gradient": gradient, "ok": ok}


def check_ranks(case: Case) -> dict[str, Any]:
    """Ranks are integers: rows of ±1 have cosines that are exact in every dtype, so they must be equal."""
    leaves = [x.sign() + (x == 0) for x in case.leaves("cuda")[:2]]
    leaves = [x[:, :64].contiguous() for x in leaves]  # 64 entries: the norm is 8
    got, want = (
        case.call(leaves, "triton", False),
        case.call([x.double() for x in leaves], "reference", False),
    )
    wrong = int((got != want).sum())
    return {"name": case.name, "impl": "triton", "wrong_ranks": wrong, "ok": wrong == 0}


def fits(case: Case, impl: str) -> bool:
    """Whether an impl that holds everything has room for it."""
    free, _ = torch.cuda.mem_get_info()
    return impl in ("triton", "torch") or case.reference_bytes < 0.8 * free


def compilable(case: Case) -> Callable[..., Tensor]:
    """The reference as a function of its leaves."""

    def reference(*leaves: Tensor) -> Tensor:
        return case.call(list(leaves), "reference", case.masked)

    return reference


def runner(case: Case, impl: Impl | Literal["compiled"]) -> Callable[[int], list[Tensor]]:
    """A numbered call on inputs in turn, so that none lies in the cache unless the case is launch-bound."""
    inputs = [case.leaves("cuda", seed) for seed in range(4 if case.n <= 4096 else 1)]
    if impl != "compiled":
        return lambda number: case.run(inputs[number % len(inputs)], impl)
    torch._dynamo.reset()  # or after eight cases it would run them eagerly
    compiled = torch.compile(compilable(case), dynamic=False)

    def step(number: int) -> list[Tensor]:
        leaves = inputs[number % len(inputs)]
        out = compiled(*leaves)
        return [out, *torch.autograd.grad(out, leaves, torch.ones_like(out))] if case.backward else [out]

    return step


def time_case(case: Case, impl: Impl | Literal["compiled"], ceilings: dict[str, float]):
    """One row of results."""
    call = runner(case, impl)
    times = measure_times(call, cuda=True, seconds=1.0)
    tflops = case.flops / times.ms_p50 / 1e9
    row = {
        "name": case.name,
        "op": case.op,
        "impl": impl,
        "tflops_needed": tflops,
        "frac_gemm": tflops / ceilings["gemm_bf16"],
        "extra_gb": extra_gpu_bytes(lambda: call(0)) / 1e9,
        "launches": gpu_launches(lambda: call(0)),
        "target_ms": case.target_ms,
        "target_gb": case.target_gb,
    }
    return row, times


def show(row: dict[str, Any], ms: float, spread: tuple[float, float]) -> None:
    target = f"{row['target_ms']:8.2f}" if row["target_ms"] else " " * 8
    print(
        f"{row['name']:58} {row['impl']:10} {ms:9.3f} ms [{spread[0]:.3f}, {spread[1]:.3f}] target {target} "
        f"{row['tflops_needed']:7.1f} TFLOP/s {row['extra_gb']:8.3f} GB {row['launches']:5d} launches",
        flush=True,
    )


def check_all(cases: list[Case], path: Path, where: dict[str, Any]) -> bool:
    """Every kernel against the truth; prints what is wrong."""
    good = True
    for case in cases:
        row = check(case)
        write_row(path, {**where, **row})
        good = good and row["ok"]
        if not row["ok"]:
            print("WRONG", row, flush=True)
    print(f"{len(cases)} checks, {'all within budget' if good else 'SOME WRONG'}", flush=True)
    return good


def time_all(cases: list[Case], path: Path, where: dict[str, Any], deadline: float) -> list[str]:
    """Time what fits into memory and before the deadline; returns what is slower than ever before."""
    ceilings = gpu_ceilings()
    print("ceilings:", {name: round(value, 1) for name, value in ceilings.items()}, flush=True)
    best, slower = earlier(path), []
    for impl in IMPLS:
        for case in (case for case in cases if fits(case, impl)):
            if time.monotonic() > deadline:
                print(f"time is up before {case.name} {impl}", flush=True)
                return slower
            row, times = time_case(case, impl, ceilings)
            write_row(path, {**where, **row, "ceilings": ceilings}, times)
            show(row, times.ms_p50, (times.ms_p20, times.ms_p80))
            before = best.get((case.name, impl))
            if before and times.ms_p50 > 1.05 * before["ms_p50"] and times.ms_p20 > before["ms_p80"]:
                slower.append(f"{case.name} {impl}: {times.ms_p50:.3f} ms, was {before['ms_p50']:.3f}")
            torch.cuda.empty_cache()
    return slower


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", choices=["check", "small", "full"], default="full")
    parser.add_argument("--only", default="", help="cases whose name holds this word")
    parser.add_argument("--seconds", type=float, default=570, help="when to stop")
    parser.add_argument("--gate", action="store_true", help="exit 1 where slower than ever before")
    return parser.parse_args()


def main() -> int:
    options = parse()
    if not torch.cuda.is_available():
        print("benchmarks/gpu.py needs a CUDA device, and torch finds none here", file=sys.stderr)
        return 2
    deadline = time.monotonic() + options.seconds
    where = machine("cuda")
    path = results_file(where, "gpu")
    chosen = [case for case in checked_cases() if options.only in case.name]
    if not check_all(chosen, path, where):
        return 1
    if options.suite == "check":
        return 0
    chosen = [case for case in timed_cases(options.suite) if options.only in case.name]
    slower = time_all(chosen, path, where, deadline)
    print(*slower, f"results: {path}", sep="\n")
    return 1 if options.gate and slower else 0


if __name__ == "__main__":
    sys.exit(main())
