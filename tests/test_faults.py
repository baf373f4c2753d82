"""Faults of a run: signals, lost and slow processes, broken checkpoints, non-finite gradients."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from discovla.cli import main
from discovla.data.config import DataConfig
from discovla.data.dataset import read_clips
from discovla.data.loader import BatchSpec, TrainLoader
from discovla.engine import checkpoint
from discovla.errors import EXIT_STOPPED
from tests import runs

STEP = "discovla.trainer:learning_rate"  # called once a step
PIXELS = "discovla.towers.vision:preprocess_frames"  # twice before training, then once a step
WRITE = "discovla.engine.checkpoint:_write_tensors"  # twice a checkpoint
LEAVING = "SIGTERM:discovla.processes:leave_world:1"  # launchers repeat it to ranks that end later
NOTICE = 30.0  # seconds for all other ranks to end; 10 are enough on an idle machine
SHORT = ("data.val_split=", "checkpoint_every=2")
ZERO2 = ("engine.strategy=deepspeed", "engine.zero_stage=2")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, drawn) -> Path:
    """The directory of an uninterrupted run on two processes."""
    folder = tmp_path_factory.mktemp("whole")
    runs.train([runs.write_config(folder, drawn), *SHORT], size=2)
    return folder / "run"


def assert_same(run: Path, expected: Path) -> None:
    """Assert that all records of steps and the trained parameters of two runs are equal."""
    assert runs.records(run) == runs.records(expected)
    ours, theirs = runs.tensors(run, 6), runs.tensors(expected, 6)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (f"SIGTERM:{STEP}:4 {LEAVING}", "train.py: stopped by SIGTERM after step 4 of 6, which is saved"),
        pytest.param(f"SIGUSR1:{STEP}:2", "stopped by SIGUSR1 after step 2 of 6", marks=pytest.mark.slow),
        pytest.param(f"SIGTERM:{PIXELS}:1", "stopped by SIGTERM after step 0 of 6", marks=pytest.mark.slow),
    ],
    ids=["in a step", "warning of SLURM", "before training"],
)
def test_a_signal_to_one_rank_stops_all_after_the_same_step_and_the_run_resumes(
    fault, message, tmp_path, drawn, whole
):
    words = [runs.write_config(tmp_path, drawn), *SHORT]
    job = runs.start(words, size=2, fault=fault, rank=1)
    assert job.wait() == [EXIT_STOPPED, EXIT_STOPPED]
    assert message in job.output().splitlines()[-1]
    assert "error" not in job.output() + job.output(rank=1)
    runs.train([*words, "resume=true"], size=2)
    assert_same(tmp_path / "run", whole)


def test_a_signal_to_a_rank_and_its_loader_workers_stops_the_rank_only_once(tmp_path, drawn, whole):
    words = [runs.write_config(tmp_path, drawn), *SHORT, "data.workers=2"]
    job = runs.start(words, size=2, fault=f"tree:{STEP}:4", rank=1)
    assert job.wait() == [EXIT_STOPPED, EXIT_STOPPED], job.output() + job.output(rank=1)
    assert "train.py: stopped by SIGTERM after step 4 of 6, which is saved" in job.output()
    assert "error" not in job.output() + job.output(rank=1)
    runs.train([*words, "resume=true"], size=2)
    assert_same(tmp_path / "run", whole)


@pytest.mark.slow
def test_a_signal_during_a_save_leaves_complete_checkpoints(tmp_path, drawn, whole):
    words = [runs.write_config(tmp_path, drawn), *SHORT]
    job = runs.start(words, size=2, fault=f"SIGTERM:{WRITE}:2")
    assert job.wait() == [EXIT_STOPPED, EXIT_STOPPED]
    kept = tmp_path / "run/checkpoints"
    assert all(path.name.startswith("step-") for path in kept.iterdir()), list(kept.iterdir())
    runs.train([*words, "resume=true"], size=2)
    assert_same(tmp_path / "run", whole)


def lost(rank: int, reason: str) -> str:
    return rf"error(?: \(rank \d\))?: rank {rank} \({re.escape(socket.gethostname())}, process \d+\) {reason}"


@pytest.mark.parametrize(
    ("size", "rank"), [(2, 1), *(pytest.param(4, rank, marks=pytest.mark.slow) for rank in (0, 2))]
)
def test_every_other_rank_names_the_killed_one_and_ends(size, rank, tmp_path, drawn, whole):
    words = [runs.write_config(tmp_path, drawn), *SHORT]
    job = runs.start(words, size=size, fault=f"kill:{STEP}:4", rank=rank)
    job.processes[rank].join(90)
    died = time.monotonic()
    assert job.wait() == [-9 if r == rank else 2 for r in range(size)]
    assert time.monotonic() - died < NOTICE
    for other in set(range(size)) - {rank}:
        lines = [line for line in job.output(other).splitlines() if "error" in line]
        assert len(lines) == 1
        assert re.search(lost(rank, "has ended before the run was over"), lines[0])
    runs.train([*words, "resume=true"], size=size)
    if size == 2:
        assert_same(tmp_path / "run", whole)
    assert_close(runs.losses(tmp_path / "run"), runs.losses(whole), rtol=1e-5, atol=0)


MISSING = "expected {} processes to join within 4 s, found "


@pytest.mark.parametrize(
    ("size", "rank", "where", "message"),
    [
        (3, 1, "discovla.processes:join_world", MISSING.format(3) + "2: rank 1 missing"),
        pytest.param(
            *(2, 0, "discovla.processes:join_world", MISSING.format(2) + "no listener at 127.0.0.1:"),
            marks=pytest.mark.slow,
        ),
        (3, 2, "discovla.engine.distributed:_backend", ""),
    ],
    ids=["before joining", "rank 0 before joining", "after joining"],
)
def test_a_rank_that_dies_before_all_have_joined_is_named(size, rank, where, message, tmp_path, drawn):
    words = [runs.write_config(tmp_path, drawn), "engine.rendezvous_timeout=4"]
    job = runs.start(words, size=size, fault=f"kill:{where}:1", rank=rank)
    assert job.wait(45) == [-9 if r == rank else 2 for r in range(size)]
    for other in set(range(size)) - {rank}:
        (line,) = [line for line in job.output(other).splitlines() if "error" in line]
        assert (
            message in line if message else re.search(lost(rank, "has ended before the run was over"), line)
        )


def test_a_rank_whose_loader_worker_was_killed_prints_one_line(tmp_path, drawn):
    words = [runs.write_config(tmp_path, drawn), *SHORT, "data.workers=2"]
    job = runs.start(words, size=2, fault=f"reader:{STEP}:2", rank=1)
    assert job.wait() == [2, 2]
    (line,) = job.output(rank=1).splitlines()
    assert line.startswith("train.py: error (rank 1): a data-loading process of this rank has ended, ")
    assert re.search(r"\(data.workers\): DataLoader worker \(pid \d+\) is killed by signal: Killed", line)
    assert re.search(lost(1, "has ended before the run was over"), job.output())


@pytest.mark.slow
def test_a_signal_is_obeyed_while_a_suspended_reader_process_is_awaited(tmp_path, drawn):
    words = [runs.write_config(tmp_path, drawn), *SHORT, "data.workers=1"]
    job = runs.start(words, fault=f"pause:{STEP}:2")
    assert job.wait(60) == [EXIT_STOPPED], job.output()
    stopped = re.search(r"stopped by SIGTERM after step (\d) of 6, which is saved", job.output())
    assert stopped, job.output()
    runs.train([*words, "resume=true"])
    assert len(runs.losses(tmp_path / "run")) == 6


@pytest.mark.slow
def test_a_rank_without_heartbeat_is_named_and_the_last_checkpoint_is_complete(tmp_path, drawn):
    """The checkpoint is still being written when rank 0, which waits for rank 1 forever, ends."""
    words = [runs.write_config(tmp_path, drawn), "data.val_split=", "checkpoint_every=1"]
    job = runs.start(
        [*words, "engine.heartbeat_timeout=11"], size=2, fault=f"stop:{STEP}:2 0@late:{WRITE}:1", rank=1
    )
    job.processes[0].join(60)
    job.processes[1].kill()
    assert job.wait() == [2, -9]
    assert re.search(lost(1, "sent no heartbeat for 11 seconds"), job.output())
    found = checkpoint.latest(tmp_path / "run/checkpoints")
    assert found is not None and found.step == 1


def test_a_truncated_newest_checkpoint_is_skipped_for_the_one_before(tmp_path, drawn, whole):
    words = [runs.write_config(tmp_path, drawn), *SHORT]
    runs.train([*words, "stop_at=4"], size=2)
    broken = tmp_path / "run/checkpoints/step-00000004/trained.safetensors"
    size = broken.stat().st_size
    with broken.open("r+b") as file:
        file.truncate(size // 2)
    job = runs.train([*words, "resume=true"], size=2)
    assert f"checkpoint skipped: {broken}: expected bytes {size}, found {size // 2}" in job.output()
    assert "resuming at step 2 of 6" in job.output()
    assert_same(tmp_path / "run", whole)


@pytest.mark.slow
@pytest.mark.parametrize("way", [("engine.strategy=torch",), ZERO2], ids=["torch", "zero2"])
def test_any_number_of_processes_resumes_with_the_same_losses(way, tmp_path, drawn, whole):
    config = runs.write_config(tmp_path, drawn)
    first = tmp_path / "first"
    runs.train([config, *SHORT, *way, "stop_at=2", f"directory={first}"], size=2)
    for size in (1, 2, 4):
        directory = shutil.copytree(first, tmp_path / f"on{size}")
        runs.train([config, *SHORT, *way, "resume=true", f"directory={directory}"], size=size)
        assert_close(runs.losses(directory), runs.losses(whole), rtol=1e-5, atol=0)


@pytest.fixture(scope="module")
def shards(tmp_path_factory, drawn) -> Path:
    """The drawn world in shards; 3 to train on, of 10, 10 and 4 clips."""
    folder = tmp_path_factory.mktemp("shards")
    config = runs.write_config(folder, drawn)
    words = ["shard", drawn, folder / "raw", "--config", config, "--clips-per-shard", 10, "--workers", 0]
    assert main([str(word) for word in words]) == 0
    assert len(list((folder / "raw").glob("train-*.tar"))) == 3
    return folder / "raw"


def test_shards_that_do_not_divide_by_ranks_and_workers_give_every_rank_its_clips(
    tmp_path, drawn, shards, whole
):
    words = [runs.write_config(tmp_path, drawn), *SHORT, f"data.shards={shards}", "data.workers=2"]
    runs.train(words, size=2)
    assert_same(tmp_path / "run", whole)


@pytest.mark.slow
def test_any_number_of_processes_resumes_from_shards_in_mid_epoch(tmp_path, drawn, shards, whole):
    words = [runs.write_config(tmp_path, drawn), *SHORT, f"data.shards={shards}"]
    runs.train([*words, "data.workers=2", "stop_at=3", f"directory={tmp_path}/first"], size=2)
    for size, workers in ((1, 2), (4, 1)):  # 3 shards for 2, 2 x 2 and 4 x 1 workers
        directory = shutil.copytree(tmp_path / "first", tmp_path / f"on{size}")
        again = ["resume=true", f"data.workers={workers}", f"directory={directory}"]
        runs.train([*words, *again], size=size)
        assert_close(runs.losses(directory), runs.losses(whole), rtol=1e-5, atol=0)


def test_any_number_of_ranks_sees_the_same_pairs_in_the_same_order(drawn, shards):
    data = DataConfig(shards=str(shards), frames=8, workers=0)
    clips = read_clips(data, "train")

    def seen(size: int, epoch: int, start: int) -> list[list[torch.Tensor]]:
        """Return texts and frames of the steps, concatenated over ranks."""
        common = {"batch_size": 16, "world_size": size, "seed": 3, "image_size": 64, "context_length": 32}
        shapes = [BatchSpec(rank=rank, frame_captions=False, **common) for rank in range(size)]
        ranks = [TrainLoader(clips, data, shape).epoch(epoch, start=start) for shape in shapes]
        fields = ("video_index", "text_ids", "frames")
        return [
            [torch.cat([getattr(b, f) for b in step]) for f in fields] for step in zip(*ranks, strict=True)
        ]

    for epoch, start in ((0, 3), (1, 0)):
        wanted = seen(1, epoch, start)
        assert len(wanted) == 4 - start
        for size in (2, 4):
            for ours, theirs in zip(seen(size, epoch, start), wanted, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_slow_rank_is_named(tmp_path, drawn):
    words = [runs.write_config(tmp_path, drawn), *SHORT, "steps=4", "engine.straggler_check_every=4"]
    job = runs.start(words, size=2, fault="drag:discovla.data.dataset:draw_light:1", rank=1)
    assert job.wait() == [0, 0]
    (found,) = runs.records(tmp_path / "run", "slow")
    name = rf"rank 1 \({re.escape(socket.gethostname())}, process \d+\)"
    assert re.match(
        rf"{name} is slow: \d\.\d+ s a step on its own \(0\.[4-9]\d* waiting for batches, ", found["rank"]
    )
    assert f"step 4: {found['rank']}" in job.output()


def strategies() -> list:
    """Return the strategies as parameters; the slow ones are marked."""
    zero = [("engine.strategy=deepspeed", f"engine.zero_stage={stage}") for stage in range(4)]
    slow = [pytest.param(zero[stage], marks=pytest.mark.slow, id=f"zero{stage}") for stage in (0, 1, 3)]
    return [pytest.param(("engine.strategy=torch",), id="torch"), pytest.param(zero[2], id="zero2"), *slow]


@pytest.mark.parametrize("way", strategies())
def test_a_nonfinite_gradient_on_one_rank_is_skipped_on_all(way, tmp_path, drawn, skipped):
    """The step has no effect, also if the run is resumed after it."""
    words = [runs.write_config(tmp_path, drawn), *SHORT, *way, "optim.skip_nonfinite=1"]
    runs.train([*words, "stop_at=4"], size=2, fault=f"nan:{PIXELS}:4", rank=1)
    runs.train([*words, "resume=true"], size=2)
    found = runs.records(tmp_path / "run")
    assert [("loss" in record, record.get("skipped_steps", 0)) for record in found] == [
        (True, 0),
        (False, 1),
        *[(True, 1)] * 4,
    ]
    losses = torch.tensor([record["loss"] for record in found if "loss" in record])
    assert_close(losses, skipped, rtol=1e-5, atol=0)


@pytest.fixture(scope="module")
def skipped(tmp_path_factory, drawn) -> torch.Tensor:
    """The losses of a run on one process that skipped its second step."""
    folder = tmp_path_factory.mktemp("skipped")
    words = [runs.write_config(folder, drawn), *SHORT, "optim.skip_nonfinite=1"]
    runs.train(words, fault=f"nan:{PIXELS}:4")
    return torch.tensor([record["loss"] for record in runs.records(folder / "run") if "loss" in record])


def test_one_nonfinite_gradient_too_many_stops_the_run(tmp_path, drawn):
    words = [runs.write_config(tmp_path, drawn), *SHORT, "optim.skip_nonfinite=1"]
    runs.train([*words, "stop_at=3"], fault=f"nan:{PIXELS}:4")
    job = runs.start([*words, "resume=true"], fault=f"nan:{PIXELS}:1")
    assert job.wait() == [2]
    assert (
        "step 3: optim.skip_nonfinite: expected at most 1 steps to leave out, found one more" in job.output()
    )


@pytest.mark.slow
def test_without_skip_nonfinite_a_nonfinite_loss_stops_the_run(tmp_path, drawn):
    job = runs.start([runs.write_config(tmp_path, drawn), *SHORT], fault=f"nan:{PIXELS}:4")
    assert job.wait() == [2]
    assert "step 1: expected a finite loss, found nan" in job.output()


def test_a_process_exits_even_if_stderr_is_closed():
    """The launcher that reads it may be gone."""
    code = (
        "import os, threading, discovla.errors as f\n"
        "threading.Thread(target=f.exit_process, args=('lost', lambda: os.write(1, b'last'))).start()\n"
        "threading.Event().wait(30)\n"
    )
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=write, timeout=60)
    os.close(write)
    assert (done.returncode, done.stdout) == (2, b"last")
