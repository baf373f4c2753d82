"""Threads of a run on a CPU: how they wait for work, and how many there are."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # variables that say how threads wait
COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
ROUNDS = 5


def let_threads_sleep() -> None:
    """Make OpenMP's threads sleep while they wait for work, unless the environment says how they wait.

    By default they spin, and on cores that other processes use, spinning takes time from the work that is
    waited for.  Call it before torch is imported: OpenMP reads the variable when its library is loaded.
    """
    if not any(name in os.environ for name in WAITING):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def choose_threads(
    processes: int, kept: int | None = None, seconds: Callable[[int], float] | None = None
) -> tuple[int, str]:
    """Choose the number of torch's threads in this process.

    The sums of some products depend on it, so a resumed run keeps the number with which it began.

    Args:
        processes: of the run on this machine, which share its cores.
        kept: number of the run that is resumed.
        seconds: returns the time of a sample of work with so many threads; measured by default.

    Returns:
        The number, and the reason in words.
    """
    import torch  # takes seconds to import

    for name in COUNTS:
        if name in os.environ:
            return torch.get_num_threads(), name
    if kept is not None:
        return kept, "as the run began"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    most = max(1, cores // processes)
    if most == 1:
        return 1, f"{cores} cores for {processes} processes"
    counts = sorted({1, most // 2, most} - {0})
    times = measure_threads(counts, seconds or time_sample)
    best = min(counts, key=times.__getitem__)
    timed = ", ".join(f"{1000 * times[count]:.1f} ms with {count}" for count in counts)
    return best, f"a sample of work took {timed}"


def measure_threads(counts: list[int], seconds: Callable[[int], float]) -> dict[int, float]:
    """Return the median time of the sample for each number of threads, which take turns."""
    rounds = [{count: seconds(count) for count in counts} for _ in range(ROUNDS)]
    return {count: statistics.median(times[count] for times in rounds) for count in counts}


def time_sample(count: int) -> float:
    """Return the seconds of some layers of an MLP with `count` threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1024, 256, generator=generator)
        up, down = (torch.randn(*size, generator=generator) for size in ((1024, 256), (256, 1024)))
        began = time.perf_counter()
        for _ in range(4):
            hidden = torch.nn.functional.silu(torch.nn.functional.linear(x, up))
            x = torch.nn.functional.layer_norm(torch.nn.functional.linear(hidden, down), (256,))
        return time.perf_counter() - began
    finally:
        torch.set_num_threads(before)
