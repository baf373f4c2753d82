"""`discovla preflight`: is every machine of a run fit for it, before the run begins."""

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
from discovla.data.dataset import read_clips
from discovla.data.manifest import Clip, check_clips
from discovla.data.sampling import clip_sampling
from discovla.data.shards.reader import open_shards
from discovla.data.video.errors import DecodeError
from discovla.engine.distributed import World, all_reduce_sum, gather_objects, join_world, leave_world
from discovla.engine.log import versions

JOIN = 120.0  # seconds for all processes to come together, and for each collective
SKEW = 5.0  # seconds between clocks above which logs and files of machines cannot be put in order
DISK = 10 * 2**30  # bytes that shall be free where a run is kept
ROUNDS = 8  # of the all-reduce that is timed
TRIES = 5  # clips
PACKAGES = ("python", "torch", "deepspeed", "numpy", "safetensors", "cuda", "git_commit")


@dataclass(frozen=True, kw_only=True)
class Found:
    """What one rank found on its machine; `wrong` is why a run cannot go there, in one line, or None."""

    rank: int
    host: str
    gpu: str
    free: float
    clock: float
    versions: dict[str, Any]
    clips: int | None
    wrong: str | None


def add(commands: argparse._SubParsersAction) -> None:
    """Declare the command and its options."""
    text = (
        "check on every rank that a run can start: its GPU, the all-reduce and its bandwidth, clocks, "
        "versions, clips or shards, disk; to be started by the launcher of the run"
    )
    parser = commands.add_parser(
        "preflight", help="check every machine of a run before it begins", description=text
    )
    parser.add_argument("config", nargs="?", metavar="CONFIG", help="TOML of the run")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="dotted overrides of it")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), help="default: the config's, else auto")
    mib = "of the tensor that is reduced, default: %(default)s"
    parser.add_argument("--mib", type=int, default=64, metavar="N", help=mib)
    need = "GiB to be free where the run is kept, default: %(default)g"
    parser.add_argument("--free", type=float, default=DISK / 2**30, metavar="GIB", help=need)
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    config = None if arguments.config is None else read_config(arguments.config, arguments.overrides)
    device = arguments.device or ("auto" if config is None else config.engine.device)
    if arguments.mib < 1:
        raise ValueError(f"--mib: expected at least 1, got {arguments.mib}")
    try:
        world = join_world(device, timeout=timedelta(seconds=JOIN))
    except ValueError as error:
        raise ValueError(f"rank {os.environ.get('RANK', '0')} on {socket.gethostname()}: {error}") from None
    everyone = gather_objects(look(world, config, free=arguments.free * 2**30), world)
    if wrong := complaint(everyone):
        leave_world()
        raise ValueError(wrong)
    rate = bandwidth(world, arguments.mib * 2**20)
    if world.first:
        print(table(everyone, rate))
    leave_world()


def look(world: World, config: RunConfig | None, *, free: float) -> Found:
    """What this rank finds on its machine."""
    all_reduce_sum(torch.zeros(1, device=world.device), world)  # it works, and clocks are read at one time
    clock, there, clips, wrong = time.time(), float("inf"), None, None
    try:
        if config is not None:
            there = room(config.directory, free)
            clips = _clips(config)
    except (OSError, ValueError, DecodeError) as error:
        wrong = " ".join(str(error).split())
    gpu = "cpu" if world.device.type == "cpu" else torch.cuda.get_device_name(world.device)
    return Found(
        rank=world.rank,
        host=socket.gethostname(),
        gpu=gpu,
        free=there,
        clock=clock,
        versions={name: value for name, value in versions(world).items() if name in PACKAGES},
        clips=clips,
        wrong=wrong,
    )


def room(directory: Path, needed: float) -> float:
    """Bytes free where a run is to be kept, once a file could be written there and was removed again.

    Raises:
        ValueError: there is less than needed.
        OSError: nothing can be written there.
    """
    place = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    probe = place / f".preflight-{uuid.uuid4().hex}"
    try:
        probe.write_bytes(b"x" * 4096)
    finally:
        probe.unlink(missing_ok=True)
    free = shutil.disk_usage(place).free
    if free < needed:
        raise ValueError(
            f"{place}: expected {needed / 2**30:.1f} GiB free for checkpoints, found {free / 2**30:.1f}"
        )
    return free


def _clips(config: RunConfig) -> int:
    """How many clips the splits have here: all files are there, or the ends of each split's shards read."""
    data = config.data
    names = [data.val_split, data.test_split, *([] if data.stills is not None else [data.train_split])]
    splits = [read_clips(data, name) for name in names if name]
    for clips in splits:
        check_clips(clips, files=data.shards is None)
        if data.shards is not None:
            for end in (clips[:TRIES], clips[::-1][:TRIES]):
                _read_one(end, data)
    return sum(map(len, splits))


def _read_one(clips: Sequence[Clip], data: DataConfig) -> None:
    """Read the frames of the first of these clips that gives any; DecodeError where none does."""
    assert data.shards is not None
    shards = open_shards(data.shards)
    sampling = clip_sampling(data)
    for number, clip in enumerate(clips, 1):
        try:
            shards.frames(clip, sampling, None, damaged=data.damaged)
            return
        except DecodeError:  # a clip may be bad; a shard that cannot be read fails them all
            if number == len(clips):
                raise


def complaint(everyone: Sequence[Found]) -> str | None:
    """The first thing that stands in the way, naming rank and host."""
    for one in everyone:
        if one.wrong is not None:
            return f"rank {one.rank} on {one.host}: {one.wrong}"
    middle = statistics.median(one.clock for one in everyone)
    for one in everyone:
        if abs(one.clock - middle) > SKEW:
            return (
                f"rank {one.rank} on {one.host}: expected a clock within {SKEW:g} s of the others', "
                f"found one {one.clock - middle:+.1f} s off"
            )
    for name in everyone[0].versions:
        counts = Counter(str(one.versions[name]) for one in everyone)
        usual = counts.most_common(1)[0][0]
        for one in everyone:
            if str(one.versions[name]) != usual:
                found = one.versions[name]
                return f"rank {one.rank} on {one.host}: {name}: expected {usual} as elsewhere, found {found}"
    clips = {one.clips for one in everyone}
    if len(clips) > 1:
        told = ", ".join(f"{one.clips} on rank {one.rank} ({one.host})" for one in everyone)
        return f"clips: expected the same number on all ranks, found {told}"
    return None


def bandwidth(world: World, size: int) -> float | None:
    """Bytes a second that an all-reduce of `size` bytes moves through each rank's link; None for one rank.

    A ring moves 2 (W - 1) / W of the tensor through every link; the median of some rounds counts.

    Raises:
        ValueError: the sum is wrong.
    """
    if world.size == 1:
        return None
    x = torch.ones(size // 4, device=world.device)
    seconds = []
    for _ in range(ROUNDS + 2):
        x.fill_(1.0)
        _settle(world)
        began = time.perf_counter()
        dist.all_reduce(x)
        _settle(world)
        seconds.append(time.perf_counter() - began)
        if x[0].item() != world.size or x[-1].item() != world.size:
            raise ValueError(
                f"rank {world.rank} on {socket.gethostname()}: all-reduce: expected {world.size}, found "
                f"{x[0].item():g} and {x[-1].item():g}"
            )
    return 2 * (world.size - 1) / world.size * size / statistics.median(seconds[2:])


def _settle(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)


def table(everyone: Sequence[Found], rate: float | None) -> str:
    """One line a rank, and what holds for all."""
    middle = statistics.median(one.clock for one in everyone)
    lines = [f"{'rank':>4}  {'host':<20} {'device':<24} {'free GiB':>9} {'clock':>8} {'clips':>8}"]
    for one in everyone:
        free = "-" if one.free == float("inf") else f"{one.free / 2**30:.1f}"
        clips = "-" if one.clips is None else str(one.clips)
        lines.append(
            f"{one.rank:>4}  {one.host:<20} {one.gpu:<24} {free:>9} {one.clock - middle:>+7.2f}s {clips:>8}"
        )
    lines.append(", ".join(f"{name} {value}" for name, value in everyone[0].versions.items() if value))
    if rate is not None:
        lines.append(f"all-reduce over {len(everyone)} ranks: {rate / 1e9:.2f} GB/s through each link")
    return "\n".join([*lines, "ready"])
