"""The kernels on this machine's GPU: are they right, what can the GPU do, how fast are they.

    python benchmarks/gpu.py                      everything, within ten minutes
    python benchmarks/gpu.py --suite check        only whether they are right
    python benchmarks/gpu.py --suite small        sizes up to 1024
    python benchmarks/gpu.py --suite step         the towers' kernels, then training steps of every size
    python benchmarks/gpu.py --suite data         no kernels: frames a second of DALI and of all other ways
    python benchmarks/gpu.py --only frame         cases whose name has the word
    python benchmarks/gpu.py --gate               exit 1 where worse than the last results of the same GPU
    python benchmarks/gpu.py --table FILE         the table of a results file; needs no GPU

One call: every kernel, Triton's and CUDA's, against the reference in float64; ceilings; times of the
kernels, of torch (the same blocks in plain torch), reference (eager), the peers of peers.py and compiled (the
reference under torch.compile); then the training step of train_step.py. What is not installed, does not fit
into memory or is not reached in time is in the results and in the table as such. Rows go to
benchmarks/results/<gpu>/, one JSON a line. Without a GPU it says so and exits with 2. It exits with 1 if a
kernel is wrong, and then times nothing.
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

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script it starts with its own folder there
sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

from benchmarks.cases import Case, checked_cases, timed_cases
from benchmarks.gate import earlier, regressions, report
from benchmarks.gpu_data import measure_data
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
from benchmarks.tower_cases import checked_tower_cases, timed_tower_cases
from discovla.ops.dispatch import IMPLEMENTATIONS, KernelUnavailable

# ‖error‖ / ‖truth‖ of values and of gradients. float32 is three TF32 products. Half-precision inputs are
# exact in float32, a gradient is rounded to its input's dtype. From 4096 pairs on, bf16 rows are multiplied.
BUDGET = {torch.float32: (2e-5, 2e-4), torch.float16: (2e-5, 2e-3), torch.bfloat16: (2e-5, 8e-3)}
LARGE = (4e-3, 8e-3)
DEVICE = "cuda"
SECONDS = 0.5  # of timing for each row, or what 50 calls take if that is not much more
CHECKING = 0.6  # of the seconds there are, at most, before times are taken
OPS = 0.8  # of the seconds there are, at most, before training steps are timed
ROUNDS = 50  # of a training step, as many as its share of the time allows
KERNELS = ("triton", "cuda")
INTEGERS = ("rank_of_positive", "top_k")  # ops of which the result is compared for equality
# The order they are timed in: what time may be too short for comes last.
BUILT_IN = ("triton", "cuda", "torch", "reference")
Row = dict[str, Any]


def truth(case: Case, leaves: list[Tensor]) -> list[Tensor]:
    """The reference in float64 on the same numbers."""
    wide = [x.detach().double().requires_grad_(case.backward) for x in leaves]
    return case.run(wide, "reference")


def errors(case: Case, impl: Any, leaves: list[Tensor], want: list[Tensor]) -> dict[str, float]:
    """Relative errors: of the value, the largest of any gradient, and of the value's worst entry."""
    (got, *gradients), (value, *wanted) = case.run(leaves, impl), want
    if case.scaled:  # the derivative by the scale is a sum that all but cancels
        gradients, wanted = gradients[:-1], wanted[:-1]
    found = [
        relative_frobenius(g, w) for g, w in zip(gradients, wanted, strict=True) if w.double().norm() > 1e-9
    ]
    worst = (got.double() - value).abs().max() / value.abs().max().clamp(min=1e-30)
    value_error = relative_frobenius(got, value) if value.double().norm() > 1e-9 else 0.0
    return {"err_fro": value_error, "err_gradient": max(found, default=0.0), "err_max": worst.item()}


def check(case: Case, impl: Any) -> Row:
    """Whether a kernel is right; products in bf16 flip maxima, so 1.2 x plain torch's error is allowed."""
    row: Row = {"name": case.name, "op": case.op, "impl": impl}
    try:
        if case.op in INTEGERS:
            return row | check_integers(case, impl)
        leaves = case.leaves(DEVICE)
        want = truth(case, leaves)
        found = errors(case, impl, leaves, want)
    except KernelUnavailable as error:
        return row | {"left_out": str(error)}
    limits = case.limits or BUDGET[case.dtype]
    if case.n >= 4096 and case.dtype == torch.bfloat16:
        plain = errors(case, "torch", leaves, want)
        limits = max(LARGE[0], 1.2 * plain["err_fro"]), max(LARGE[1], 1.2 * plain["err_gradient"])
    ok = found["err_fro"] <= limits[0] and found["err_gradient"] <= limits[1]
    return row | found | {"ok": ok}


def check_integers(case: Case, impl: Any) -> Row:
    """Ranks and places are integers: rows of ±1 have cosines exact in every dtype, so they must be equal.

    Their length is a power of two, hence their width one of four.
    """
    width = 1 << (case.dim.bit_length() - 1) // 2 * 2
    leaves = [(x.sign() + (x == 0))[:, :width].contiguous() for x in case.leaves(DEVICE)[:2]]
    got = case.call(leaves, impl, case.masked)
    want = case.call([x.double() for x in leaves], "reference", case.masked)
    wrong = int((got != want).sum())
    return {"wrong_integers": wrong, "ok": wrong == 0}


def impls_of(op: str) -> list[str]:
    """What is timed of an op, the kernels first."""
    return [impl for impl in BUILT_IN if impl in IMPLEMENTATIONS[op]]


def does_not_fit(case: Case, impl: str | Peer) -> str:
    """Why memory is too small for an impl that holds everything; empty where it is not."""
    free, _ = torch.cuda.mem_get_info()
    streams = not impl.stores if isinstance(impl, Peer) else impl in (*KERNELS, "torch")
    if streams or case.reference_bytes < 0.8 * free:
        return ""
    return f"it holds at least {case.reference_bytes / 1e9:.0f} GB at once, {free / 1e9:.0f} GB are free"


def step_of(case: Case, function: Callable[[list[Tensor]], Tensor]) -> Callable[[list[Tensor]], list[Tensor]]:
    """The result of a function of the leaves, and its gradients by all that have one."""

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
    """torch.compile without memory of earlier cases: after eight of them it would run the next eagerly."""
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


def compilable(case: Case) -> Callable[..., Tensor]:
    """The reference as a function of its leaves."""

    def reference(*leaves: Tensor) -> Tensor:
        return case.call(list(leaves), "reference", case.masked)

    return reference


def runner(case: Case, impl: str | Peer) -> Callable[[int], list[Tensor]]:
    """A numbered call on inputs in turn, so that none lies in the cache unless the case is launch-bound."""
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
    """Figures of one impl at one size."""
    call = runner(case, impl)
    times = measure_times(call, cuda=DEVICE == "cuda", seconds=SECONDS)
    tflops = case.flops / times.ms_p50 / 1e9
    peak = peak_tflops(torch.cuda.get_device_name())
    # what has to be moved at least: inputs, and with backward their gradients
    moved = sum(x.numel() * x.element_size() for x in case.leaves(DEVICE)) * (2 if case.backward else 1)
    gbps = moved / times.ms_p50 / 1e6
    row = {
        "dtype": str(case.dtype)[6:],
        "shapes": case.shapes,
        "tflops_needed": tflops,
        "tflops_ref": tflops * (3 / 4 if case.backward else 1),  # which needs no second forward
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
    """One line for a timed row."""
    target = f"{row['target_ms']:8.2f}" if row["target_ms"] else " " * 8
    spread = f"[{row['ms_p20']:.3f}, {row['ms_p80']:.3f}]"
    print(
        f"{row['name']:58} {row['impl']:10} {row['ms_p50']:9.3f} ms {spread} "
        f"target {target} {row['tflops_needed']:7.1f} TFLOP/s {row['extra_gb']:8.3f} GB "
        f"{row['launches']:5d} launches",
        flush=True,
    )


def check_all(cases: Sequence[Case], path: Path, where: Row, deadline: float) -> bool:
    """Every kernel against the truth; prints what is wrong, and what is not checked and why."""
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
    """What is timed, in order: our impls, then peers, and torch.compile, which takes longest, last."""
    found: list[tuple[Case, str | Peer]] = []
    for impl in BUILT_IN:
        found += [(case, impl) for case in cases if impl in impls_of(case.op)]
    for peer in PEERS:
        found += [(case, peer) for case in cases if case.op == peer.op and not case.masked]
    return [*found, *((case, "compiled") for case in cases)]


def time_all(cases: Sequence[Case], path: Path, where: Row, deadline: float) -> list[Row]:
    """Time what fits into memory and before the deadline; rows of that and of what does not."""
    ceilings = gpu_ceilings()
    print("ceilings:", {name: round(value, 1) for name, value in ceilings.items()}, flush=True)
    rows = []
    for case, impl in plan(cases):
        name = impl.name if isinstance(impl, Peer) else impl
        row: Row = {"name": case.name, "op": case.op, "impl": name}
        why_not = "time is up" if time.monotonic() > deadline else does_not_fit(case, impl)
        why_not = why_not or (impl.absent() if isinstance(impl, Peer) else "")
        if isinstance(impl, Peer) and impl.differs:
            row["differs"] = impl.differs
        rows.append(row | ({"left_out": why_not} if why_not else timed(case, impl, ceilings)))
        write_row(path, {**where, **rows[-1]})
        if "ms_p50" in rows[-1]:
            show(rows[-1])
        torch.cuda.empty_cache()
    return rows


def contests(suite: str) -> list[tuple[str, int]]:
    """Models and pairs of the training steps of a suite, in order: what time may be too short for is last."""
    if suite == "step":
        return [(model, pairs) for pairs in (128, 1, 16, 512, 1024) for model in MODELS]
    return [("ViT-B/32", 128), ("ViT-B/32", 1)] if suite == "full" else []


def time_steps(suite: str, path: Path, where: Row, deadline: float, only: str = "") -> list[Row]:
    """Training steps, all implementations in turns; each contest has its share of the time that is left."""
    asked = [Comparison(model=model, pairs=pairs, rounds=ROUNDS) for model, pairs in contests(suite)]
    asked = [contest for contest in asked if only in contest.name]
    ceilings = gpu_ceilings() if asked else {}
    rows = []
    for number, contest in enumerate(asked):
        left = deadline - time.monotonic()
        if left <= 0:
            found: list[Row] = [{"name": contest.name, "impl": "all", "op": "step", "left_out": "time is up"}]
        else:
            found = compare_steps(replace(contest, seconds=left / (len(asked) - number) / 2), DEVICE)
        for row in found:
            if "ms_p50" in row:
                row["frac_gemm"] = row["tflops_needed"] / ceilings["gemm_bf16"]
            write_row(path, {**where, **row, "ceilings": ceilings})
            show_step(row)
        rows += found
        torch.cuda.empty_cache()
    return rows


def timed(case: Case, impl: str | Peer, ceilings: dict[str, float]) -> Row:
    """Figures, or why there are none: a baseline that fails is a finding, one of ours an error."""
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
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", choices=["check", "small", "full", "step", "data"], default="full")
    parser.add_argument("--only", default="", metavar="WORD", help="cases whose name holds this word")
    parser.add_argument("--seconds", type=float, default=570, help="when to stop, checks and times")
    parser.add_argument("--gate", action="store_true", help="exit 1 where worse than the last results")
    parser.add_argument(
        "--table", type=Path, metavar="FILE", help="print the table of these results, run nothing"
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
        measure_data(results_file(where, "data"), where)
        return 0
    path = results_file(where, "gpu")
    before = earlier(path.parent, where["time"])
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
