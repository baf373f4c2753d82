"""Check and time the kernels on this machine's GPU.

    python benchmarks/gpu.py                      checks, times and training steps, within ten minutes
    python benchmarks/gpu.py --suite check        only the checks
    python benchmarks/gpu.py --suite small        sizes up to 1024
    python benchmarks/gpu.py --suite step         checks of the towers' kernels, then training steps
    python benchmarks/gpu.py --suite data         no kernels: frames a second of all decoders and shards
    python benchmarks/gpu.py --only frame         only cases whose name contains the word
    python benchmarks/gpu.py --gate               exit 1 if worse than earlier results of the same GPU
    python benchmarks/gpu.py --table FILE         the table of a results file; needs no GPU

One call compares every Triton and CUDA kernel with the reference in float64; measures ceilings; times the
kernels, torch (the same blocks in plain torch), reference (eager), the libraries in peers.py and compiled
(the reference under torch.compile); then times the training steps of step.py. Cases that are unavailable, do
not fit into memory or miss the deadline have a row with the reason. Rows go to benchmarks/results/<gpu>/,
one JSON a line. The exit status is 2 without a GPU, and 1 if a kernel is wrong; then nothing is timed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # a script starts with its own folder there
sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

from benchmarks.case_lists import checked_cases, checked_tower_cases, timed_cases, timed_tower_cases
from benchmarks.data import measure_machine
from benchmarks.gpu_report import earlier_rows, regressions, report
from benchmarks.measure import (
    Times,
    extra_gpu_bytes,
    gpu_ceilings,
    gpu_launches,
    machine,
    measure_times,
    peak_tflops,
    read_rows,
    relative_frobenius,
    results_file,
    write_row,
)
from benchmarks.peers import PEERS, Peer
from benchmarks.step import MODELS, Comparison
from benchmarks.step import compare as compare_steps
from benchmarks.step import show as show_step
from discovla.ops.cases import Case
from discovla.ops.dispatch import IMPLEMENTATIONS, KernelUnavailable

# Largest ‖error‖ / ‖truth‖ of values and of gradients. A float32 product is three TF32 products.
# Half-precision inputs are exact in float32, and a gradient is rounded to its input's dtype.
BUDGET = {torch.float32: (2e-5, 2e-4), torch.float16: (2e-5, 2e-3), torch.bfloat16: (2e-5, 8e-3)}
LARGE = (4e-3, 8e-3)  # from 4096 pairs on, where bf16 rows are multiplied in bf16
DEVICE = "cuda"
SECONDS = 0.5  # of timing for each row, or a little more for 50 calls
CHECKING = 0.6  # largest share of the time for checks
OPS = 0.8  # largest share of the time for checks and ops, before training steps
ROUNDS = 50  # of a training step, or as many as its share of the time allows
KERNELS = ("triton", "cuda")
INTEGERS = ("rank_of_positive", "top_k")  # ops whose results must be equal
# In the order of timing; the last ones may miss the deadline.
BUILT_IN = ("triton", "cuda", "torch", "reference")
Row = dict[str, Any]


def truth(case: Case, leaves: list[Tensor]) -> list[Tensor]:
    """Return the reference in float64 on the same numbers."""
    wide = [x.detach().double().requires_grad_(case.backward) for x in leaves]
    return case.run(wide, "reference")


def errors(case: Case, impl: Any, leaves: list[Tensor], want: list[Tensor]) -> dict[str, float]:
    """Return relative errors: of the value, the largest of any gradient, and of the value's worst entry."""
    (got, *gradients), (value, *true_gradients) = case.run(leaves, impl), want
    if case.scaled:  # the derivative by the scale is a sum of numbers that nearly cancel
        gradients, true_gradients = gradients[:-1], true_gradients[:-1]
    gradient_errors = [
        relative_frobenius(g, w)
        for g, w in zip(gradients, true_gradients, strict=True)
        if w.double().norm() > 1e-9
    ]
    worst = (got.double() - value).abs().max() / value.abs().max().clamp(min=1e-30)
    value_error = relative_frobenius(got, value) if value.double().norm() > 1e-9 else 0.0
    return {
        "err_fro": value_error,
        "err_gradient": max(gradient_errors, default=0.0),
        "err_max": worst.item(),
    }


def check(case: Case, impl: Any) -> Row:
    """Compare a kernel with the truth; bf16 products flip maxima, so 1.2 x plain torch's error is allowed."""
    row: Row = {"name": case.name, "op": case.op, "impl": impl}
    try:
        if case.op in INTEGERS:
            return row | check_integers(case, impl)
        leaves = case.leaves(DEVICE)
        want = truth(case, leaves)
        error = errors(case, impl, leaves, want)
    except KernelUnavailable as unavailable:
        return row | {"left_out": str(unavailable)}
    limits = case.limits or BUDGET[case.dtype]
    if case.n >= 4096 and case.dtype == torch.bfloat16:
        plain = errors(case, "torch", leaves, want)
        limits = max(LARGE[0], 1.2 * plain["err_fro"]), max(LARGE[1], 1.2 * plain["err_gradient"])
    ok = error["err_fro"] <= limits[0] and error["err_gradient"] <= limits[1]
    return row | error | {"ok": ok}


def check_integers(case: Case, impl: Any) -> Row:
    """Compare ranks and indices for equality, on rows of ±1, whose cosines are exact in every dtype.

    The width is a power of four, so that the norm is a power of two.
    """
    width = 1 << (case.dim.bit_length() - 1) // 2 * 2
    leaves = [(x.sign() + (x == 0))[:, :width].contiguous() for x in case.leaves(DEVICE)[:2]]
    got = case.call(leaves, impl, case.masked)
    want = case.call([x.double() for x in leaves], "reference", case.masked)
    wrong = int((got != want).sum())
    return {"wrong_integers": wrong, "ok": wrong == 0}


def impls_of(op: str) -> list[str]:
    """Return the implementations of an op to time, kernels first."""
    return [impl for impl in BUILT_IN if impl in IMPLEMENTATIONS[op]]


def does_not_fit(case: Case, impl: str | Peer) -> str:
    """Return why memory is too small for an implementation that stores whole matrices; empty if it fits."""
    free, _ = torch.cuda.mem_get_info()
    streams = not impl.stores if isinstance(impl, Peer) else impl in (*KERNELS, "torch")
    if streams or case.reference_bytes < 0.8 * free:
        return ""
    return f"it holds at least {case.reference_bytes / 1e9:.0f} GB at once, {free / 1e9:.0f} GB are free"


def step_of(case: Case, function: Callable[[list[Tensor]], Tensor]) -> Callable[[list[Tensor]], list[Tensor]]:
    """Make a function that returns the result of `function` and its gradients."""

    def step(leaves: list[Tensor]) -> list[Tensor]:
        with torch.set_grad_enabled(case.backward):
            out = function(leaves)
        if not case.backward:
            return [out]
        results = [out] if isinstance(out, Tensor) else list(out)
        ones = [torch.ones_like(x) for x in results]
        gradients = torch.autograd.grad(results, leaves, ones, allow_unused=True)
        return [*(x.detach() for x in results), *(g for g in gradients if g is not None)]

    return step


def compile_anew(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Compile without the cache of earlier cases: after eight of them torch would run the next eagerly."""
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


def compilable(case: Case) -> Callable[..., Tensor]:
    """Return the reference as a function of its leaves."""

    def reference(*leaves: Tensor) -> Tensor:
        return case.call(list(leaves), "reference", case.masked)

    return reference


def runner(case: Case, impl: str | Peer) -> Callable[[int], list[Tensor]]:
    """Return a numbered call that takes four inputs in turn, so that none is in the GPU's cache."""
    inputs = [case.leaves(DEVICE, seed) for seed in range(4 if case.n <= 4096 else 1)]
    if isinstance(impl, Peer):
        step = step_of(case, impl.call)
    elif impl == "compiled":
        compiled = compile_anew(compilable(case))
        step = step_of(case, lambda leaves: compiled(*leaves))
    else:
        step = step_of(case, lambda leaves: case.call(leaves, impl, case.masked))  # type: ignore[arg-type]
    return lambda number: step(inputs[number % len(inputs)])


def time_case(case: Case, impl: str | Peer, ceilings: dict[str, float]) -> tuple[Row, Times]:
    """Time one implementation at one size."""
    call = runner(case, impl)
    times = measure_times(call, cuda=DEVICE == "cuda", seconds=SECONDS)
    tflops = case.flops / times.ms_p50 / 1e9
    peak = peak_tflops(torch.cuda.get_device_name())
    # bytes moved at least: inputs, and with backward their gradients
    moved = sum(x.numel() * x.element_size() for x in case.leaves(DEVICE)) * (2 if case.backward else 1)
    gbps = moved / times.ms_p50 / 1e6
    row = {
        "dtype": str(case.dtype)[6:],
        "shapes": case.shapes,
        "tflops_needed": tflops,
        "tflops_ref": tflops * (3 / 4 if case.backward else 1),  # the reference needs no second forward
        "mfu": None if peak is None else tflops / peak,
        "frac_gemm": tflops / ceilings["gemm_bf16"],
        "gbps": gbps,
        "frac_copy": gbps / 1000 / ceilings["copy"],
        "extra_gb": extra_gpu_bytes(lambda: call(0)) / 1e9,
        "launches": gpu_launches(lambda: call(0)),
        "target_ms": case.target_ms,
        "target_gb": case.target_gb,
        "ceilings": ceilings,
    }
    return row, times


def show(row: Row) -> None:
    """Print a timed row."""
    target = f"{row['target_ms']:8.2f}" if row["target_ms"] else " " * 8
    spread = f"[{row['ms_p20']:.3f}, {row['ms_p80']:.3f}]"
    print(
        f"{row['name']:58} {row['impl']:10} {row['ms_p50']:9.3f} ms {spread} "
        f"target {target} {row['tflops_needed']:7.1f} TFLOP/s {row['extra_gb']:8.3f} GB "
        f"{row['launches']:5d} launches",
        flush=True,
    )


def check_all(cases: Sequence[Case], path: Path, where: Row, deadline: float) -> bool:
    """Check every kernel, print wrong and unchecked ones; return True if all are right."""
    rows: list[Row] = []
    pairs = [(case, impl) for case in cases for impl in KERNELS if impl in IMPLEMENTATIONS[case.op]]
    for case, impl in pairs:
        late = time.monotonic() > deadline
        row = {"name": case.name, "op": case.op, "impl": impl, "left_out": "time is up before its check"}
        rows.append(row if late else check(case, impl))
        write_row(path, {**where, **rows[-1]})
        if rows[-1].get("ok") is False:
            print("WRONG", rows[-1], flush=True)
    for reason, count in Counter(row["left_out"] for row in rows if "left_out" in row).items():
        print(f"{count} not checked: {reason}", flush=True)
    checked = [row for row in rows if "ok" in row]
    good = all(row["ok"] for row in checked)
    print(f"{len(checked)} checks, {'all within budget' if good else 'SOME WRONG'}", flush=True)
    return good


def plan(cases: Sequence[Case]) -> list[tuple[Case, str | Peer]]:
    """Return what to time, in order: ours, other libraries, and torch.compile, which takes longest."""
    pairs: list[tuple[Case, str | Peer]] = []
    for impl in BUILT_IN:
        pairs += [(case, impl) for case in cases if impl in impls_of(case.op)]
    for peer in PEERS:
        pairs += [(case, peer) for case in cases if case.op == peer.op and not case.masked]
    return [*pairs, *((case, "compiled") for case in cases)]


def time_all(cases: Sequence[Case], path: Path, where: Row, deadline: float) -> list[Row]:
    """Time all that fits into memory before the deadline; other rows have the reason."""
    ceilings = gpu_ceilings()
    print("ceilings:", {name: round(value, 1) for name, value in ceilings.items()}, flush=True)
    rows = []
    for case, impl in plan(cases):
        name = impl.name if isinstance(impl, Peer) else impl
        row: Row = {"name": case.name, "op": case.op, "impl": name}
        reason = "time is up" if time.monotonic() > deadline else does_not_fit(case, impl)
        reason = reason or (impl.absent() if isinstance(impl, Peer) else "")
        if isinstance(impl, Peer) and impl.differs:
            row["differs"] = impl.differs
        rows.append(row | ({"left_out": reason} if reason else timed(case, impl, ceilings)))
        write_row(path, {**where, **rows[-1]})
        if "ms_p50" in rows[-1]:
            show(rows[-1])
        torch.cuda.empty_cache()
    return rows


def step_sizes(suite: str) -> list[tuple[str, int]]:
    """Return models and batch sizes of a suite's training steps; the last ones may miss the deadline."""
    if suite == "step":
        return [(model, pairs) for pairs in (128, 1, 16, 512, 1024) for model in MODELS]
    return [("ViT-B/32", 128), ("ViT-B/32", 1)] if suite == "full" else []


def time_steps(suite: str, path: Path, where: Row, deadline: float, only: str = "") -> list[Row]:
    """Time training steps; each comparison has its share of the remaining time."""
    comparisons = [Comparison(model=model, pairs=pairs, rounds=ROUNDS) for model, pairs in step_sizes(suite)]
    comparisons = [comparison for comparison in comparisons if only in comparison.name]
    ceilings = gpu_ceilings() if comparisons else {}
    rows = []
    for number, comparison in enumerate(comparisons):
        left = deadline - time.monotonic()
        if left <= 0:
            left_out = {"name": comparison.name, "impl": "all", "op": "step", "left_out": "time is up"}
            new: list[Row] = [left_out]
        else:
            share = left / (len(comparisons) - number) / 2
            new = compare_steps(replace(comparison, seconds=share), DEVICE)
        for row in new:
            if "ms_p50" in row:
                row["frac_gemm"] = row["tflops_needed"] / ceilings["gemm_bf16"]
            write_row(path, {**where, **row, "ceilings": ceilings})
            show_step(row)
        rows += new
        torch.cuda.empty_cache()
    return rows


def timed(case: Case, impl: str | Peer, ceilings: dict[str, float]) -> Row:
    """Time a case; a failing baseline gives a row with the reason, a failing kernel of ours raises."""
    try:
        row, times = time_case(case, impl, ceilings)
    except (KernelUnavailable, torch.OutOfMemoryError) as error:
        return {"left_out": str(error).splitlines()[0]}
    except Exception as error:
        if impl in BUILT_IN:
            raise
        return {"left_out": f"fails: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"}
    return row | vars(times)


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", choices=["check", "small", "full", "step", "data"], default="full")
    parser.add_argument("--only", default="", metavar="WORD", help="cases whose name contains this word")
    parser.add_argument("--seconds", type=float, default=570, help="time limit of checks and times")
    parser.add_argument("--gate", action="store_true", help="exit 1 if worse than earlier results")
    parser.add_argument(
        "--table", type=Path, metavar="FILE", help="print the table of a results file and run nothing"
    )
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """Check, time, report."""
    options = parse(words)
    if options.table:
        print(report(read_rows(options.table)))
        return 0
    if not torch.cuda.is_available():
        print("benchmarks/gpu.py needs a CUDA device, and torch finds none here", file=sys.stderr)
        return 2
    begin = time.monotonic()
    share = 1.0 if options.suite == "check" else CHECKING
    where = machine(DEVICE)
    if options.suite == "data":
        measure_machine(results_file(where, "data"), where)
        return 0
    path = results_file(where, "gpu")
    before = earlier_rows(path.parent, where["time"])
    checked = [*(checked_cases() if options.suite != "step" else []), *checked_tower_cases()]
    checked = [case for case in checked if options.only in case.name]
    if not check_all(checked, path, where, begin + share * options.seconds):
        return 1
    if options.suite in ("small", "full"):
        timed_ones = [*timed_tower_cases(options.suite), *timed_cases(options.suite)]
        timed_ones = [case for case in timed_ones if options.only in case.name]
        until = OPS if options.suite == "full" else 1.0
        time_all(timed_ones, path, where, begin + until * options.seconds)
    time_steps(options.suite, path, where, begin + options.seconds, options.only)
    rows = [row for row in read_rows(path) if row["time"] == where["time"]]
    print("", report(rows), sep="\n")
    worse = [line for row in rows for line in regressions(row, before.get((row["name"], row["impl"]), []))]
    print(*(f"WORSE {line}" for line in worse), f"results: {path}", sep="\n")
    return 1 if options.gate and worse else 0


if __name__ == "__main__":
    sys.exit(main())
