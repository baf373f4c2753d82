"""`discovla preflight`: check every machine of a run before the run begins."""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import statistics
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from discovla.config import RunConfig, read_config
from discovla.data.config import DataConfig
from discovla.data.dataset import read_splits
from discovla.data.manifest import Clip, check_clips
from discovla.data.sampling import clip_sampling
from discovla.data.shards.reader import open_shards
from discovla.data.transfer import check_shared_memory
from discovla.data.video.errors import DecodeError
from discovla.engine.distributed import World, all_reduce_sum, gather_objects, join_world, leave_world
from discovla.engine.log import versions
from discovla.towers.weights import load_pretrained
from discovla.trainer import reads_of_run

TIMEOUT = 120.0  # seconds to wait for all processes, and for each collective
MAX_CLOCK_OFFSET = 5.0  # seconds; above it logs and files of machines cannot be ordered by time
MIN_FREE = 10 * 2**30  # bytes in the run directory
ROUNDS = 8  # timed all-reduces
READ_ATTEMPTS = 5  # clips at each end of a split's shards
PACKAGES = ("python", "torch", "deepspeed", "numpy", "safetensors", "cuda", "git_commit")


@dataclass(frozen=True, kw_only=True)
class RankReport:
    """Result of the checks on one rank; `problem` is one line that names what prevents a run, or None."""

    rank: int
    host: str
    gpu: str
    free: float
    clock: float
    versions: dict[str, Any]
    clips: int | None
    problem: str | None


def add(commands: argparse._SubParsersAction) -> None:
    """Declare the command and its options."""
    text = (
        "check on every rank that a run can start: GPU, all-reduce and its bandwidth, clocks, versions, "
        "clips or shards, weights, disk, shared memory; start it with the launcher of the run"
    )
    parser = commands.add_parser(
        "preflight", help="check every machine of a run before it begins", description=text
    )
    parser.add_argument("config", nargs="?", metavar="CONFIG", help="TOML of the run")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="dotted overrides of it")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), help="default: the config's, else auto")
    mib = "size of the all-reduced tensor in MiB, default: %(default)s"
    parser.add_argument("--mib", type=int, default=64, metavar="N", help=mib)
    need = "disk space needed in the run directory, default: %(default)g"
    parser.add_argument("--free", type=float, default=MIN_FREE / 2**30, metavar="GIB", help=need)
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    config = None if arguments.config is None else read_config(arguments.config, arguments.overrides)
    device = arguments.device or ("auto" if config is None else config.engine.device)
    if arguments.mib < 1:
        raise ValueError(f"--mib: expected at least 1, got {arguments.mib}")
    try:
        world = join_world(device, timeout=timedelta(seconds=TIMEOUT))
    except ValueError as error:
        raise ValueError(f"rank {os.environ.get('RANK', '0')} on {socket.gethostname()}: {error}") from None
    reports = gather_objects(check_rank(world, config, min_free=arguments.free * 2**30), world)
    if problem := first_problem(reports):
        leave_world()
        raise ValueError(problem)
    rate = all_reduce_bandwidth(world, arguments.mib * 2**20)
    if world.first:
        print(format_table(reports, rate))
    leave_world()


def check_rank(world: World, config: RunConfig | None, *, min_free: float) -> RankReport:
    """Check this rank's machine."""
    all_reduce_sum(
        torch.zeros(1, device=world.device), world
    )  # also lets all ranks read their clocks together
    clock, free, clips, problem = time.time(), float("inf"), None, None
    try:
        if config is not None:
            free = free_disk(config.directory, min_free)
            splits = read_splits(config.data)
            clips = _count_clips(splits, config.data)
            size = load_pretrained(config.model).architecture.image_size
            check_shared_memory(*reads_of_run(config, splits, size, world))
    except (OSError, ValueError, DecodeError) as error:
        problem = " ".join(str(error).split())
    gpu = "cpu" if world.device.type == "cpu" else torch.cuda.get_device_name(world.device)
    return RankReport(
        rank=world.rank,
        host=socket.gethostname(),
        gpu=gpu,
        free=free,
        clock=clock,
        versions={name: value for name, value in versions(world).items() if name in PACKAGES},
        clips=clips,
        problem=problem,
    )


def free_disk(directory: Path, needed: float) -> float:
    """Return the free bytes at a run directory, after writing and removing a file there.

    Raises:
        ValueError: less is free than needed.
        OSError: no file can be written there.
    """
    existing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    probe = existing / f".preflight-{uuid.uuid4().hex}"
    try:
        probe.write_bytes(b"x" * 4096)
    finally:
        probe.unlink(missing_ok=True)
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise ValueError(
            f"{existing}: expected {needed / 2**30:.1f} GiB free for checkpoints, found {free / 2**30:.1f}"
        )
    return free


def _count_clips(splits: dict[str, list[Clip]], data: DataConfig) -> int:
    """Count the clips of all splits; check that the files exist, or read both ends of each split's shards."""
    splits = {clips[0].split: clips for clips in splits.values()}
    for clips in splits.values():
        check_clips(clips, files=data.shards is None)
        if data.shards is not None:
            for end in (clips[:READ_ATTEMPTS], clips[::-1][:READ_ATTEMPTS]):
                _read_one(end, data)
    return sum(map(len, splits.values()))


def _read_one(clips: Sequence[Clip], data: DataConfig) -> None:
    """Read frames from the first of these clips that can be decoded; raise DecodeError if none can."""
    assert data.shards is not None
    shards = open_shards(data.shards)
    sampling = clip_sampling(data)
    for number, clip in enumerate(clips, 1):
        try:
            shards.frames(clip, sampling, None, damaged=data.damaged)
            return
        except DecodeError:  # a single clip may be bad; an unreadable shard fails all of them
            if number == len(clips):
                raise


def first_problem(reports: Sequence[RankReport]) -> str | None:
    """Return the first problem, naming rank and host, or None."""
    for report in reports:
        if report.problem is not None:
            return f"rank {report.rank} on {report.host}: {report.problem}"
    median = statistics.median(report.clock for report in reports)
    for report in reports:
        if abs(report.clock - median) > MAX_CLOCK_OFFSET:
            return (
                f"rank {report.rank} on {report.host}: expected a clock within {MAX_CLOCK_OFFSET:g} s of the "
                f"others', found one {report.clock - median:+.1f} s off"
            )
    for name in reports[0].versions:
        counts = Counter(str(report.versions[name]) for report in reports)
        usual = counts.most_common(1)[0][0]
        for report in reports:
            if str(report.versions[name]) != usual:
                return (
                    f"rank {report.rank} on {report.host}: {name}: expected {usual} as on other ranks, "
                    f"found {report.versions[name]}"
                )
    if len({report.clips for report in reports}) > 1:
        counts = ", ".join(f"{report.clips} on rank {report.rank} ({report.host})" for report in reports)
        return f"clips: expected the same number on all ranks, found {counts}"
    return None


def all_reduce_bandwidth(world: World, size: int) -> float | None:
    """Measure the bytes per second through each rank's link in an all-reduce of `size` bytes.

    A ring moves 2 (W - 1) / W of the tensor through every link.

    Returns:
        The median over rounds; None for one rank.

    Raises:
        ValueError: the sum is wrong.
    """
    if world.size == 1:
        return None
    x = torch.ones(size // 4, device=world.device)
    seconds = []
    for _ in range(ROUNDS + 2):
        x.fill_(1.0)
        _synchronize(world)
        began = time.perf_counter()
        dist.all_reduce(x)
        _synchronize(world)
        seconds.append(time.perf_counter() - began)
        if x[0].item() != world.size or x[-1].item() != world.size:
            raise ValueError(
                f"rank {world.rank} on {socket.gethostname()}: all-reduce: expected {world.size}, found "
                f"{x[0].item():g} and {x[-1].item():g}"
            )
    return 2 * (world.size - 1) / world.size * size / statistics.median(seconds[2:])


def _synchronize(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)


def format_table(reports: Sequence[RankReport], rate: float | None) -> str:
    """Format one line per rank, the versions and the bandwidth."""
    median = statistics.median(report.clock for report in reports)
    lines = [f"{'rank':>4}  {'host':<20} {'device':<24} {'free GiB':>9} {'clock':>8} {'clips':>8}"]
    for report in reports:
        free = "-" if report.free == float("inf") else f"{report.free / 2**30:.1f}"
        clips = "-" if report.clips is None else str(report.clips)
        lines.append(
            f"{report.rank:>4}  {report.host:<20} {report.gpu:<24} {free:>9} {report.clock - median:>+7.2f}s "
            f"{clips:>8}"
        )
    lines.append(", ".join(f"{name} {value}" for name, value in reports[0].versions.items() if value))
    if rate is not None:
        lines.append(f"all-reduce over {len(reports)} ranks: {rate / 1e9:.2f} GB/s through each link")
    return "\n".join([*lines, "ready"])
