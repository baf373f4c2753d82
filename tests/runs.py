"""Start real training processes, forked from a server with everything imported; read their output."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file

from discovla import errors, trainer
from tests.engine.launch import LAUNCHER, free_port

TINY = {
    "embed_dim": 32,
    "quick_gelu": True,
    "vision_cfg": {
        "image_size": 64,
        "patch_size": 32,
        "width": 64,
        "layers": 2,
        "head_width": 32,
        "mlp_ratio": 2.0,
    },
    "text_cfg": {
        "context_length": 32,
        "vocab_size": 49408,
        "width": 64,
        "heads": 2,
        "layers": 2,
        "mlp_ratio": 2.0,
    },
}
CONFIG = """
directory = "{folder}/run"
seed = 3
batch_size = 16
steps = 6
[model]
architecture = "{folder}/tiny.json"
pretrained = "random"
[method]
name = "discovla"
lora_rank = 2
fused_vision_blocks = 1
fused_text_blocks = 1
[data]
manifest = "{manifest}"
frames = 8
workers = 0
augment = "light"
[optim]
lr = 1e-3
[engine]
device = "cpu"
strategy = "torch"
"""
# overrides for small runs of the other methods, and of combinations
METHODS = {
    "meanP": ["method=clip4clip"],
    "seqLSTM": ["method=clip4clip", "method.head=seqLSTM"],
    "seqTransf": ["method=clip4clip", "method.head=seqTransf", "method.head_layers=1", "method.tune=lora"],
    "tightTransf": ["method=clip4clip", "method.head=tightTransf", "method.head_layers=1"],
    "clip2video": ["method=clip2video", "method.head_layers=1", "method.tune=lora", "method.alpha=0.3"],
    "t2vparser": [
        "method=t2vparser",
        "method.stan_layers=1",
        "method.decomposition_layers=1",
        "method.decomposition_heads=2",
    ],
    "tokens": ["method.similarity=tokens", "method.frame_position=true"],
}
_SERVER = multiprocessing.get_context("forkserver")
# with what optimizers import on first use, which takes as long as all other imports
_PRELOADED = ("tests.runs", "train", "discovla.commands.train", "discovla.engine.deepspeed", "torch._dynamo")
_SERVER.set_forkserver_preload(list(_PRELOADED))


@dataclass
class Job:
    """The started ranks of one run."""

    processes: list[Any]
    logs: list[Path]
    began: float = field(default_factory=time.monotonic)

    def wait(self, timeout: float = 90) -> list[int]:
        """Return the exit status of every rank; fail the test if one still runs after `timeout` seconds."""
        deadline = self.began + timeout
        for process in self.processes:
            process.join(max(0.1, deadline - time.monotonic()))
        hung = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        for process in self.processes:
            process.kill()
            process.join()
        assert not hung, f"ranks {hung} hung:\n{self.output()}"
        return [process.exitcode for process in self.processes]

    def output(self, rank: int = 0) -> str:
        """Return stdout and stderr of a rank."""
        return self.logs[rank].read_text()


def write_config(folder: Path, manifest: Path) -> Path:
    """Write the config of a tiny model on a manifest; its run directory is `folder`/run."""
    (folder / "tiny.json").write_text(json.dumps(TINY))
    path = folder / "small.toml"
    path.write_text(CONFIG.format(folder=folder, manifest=manifest))
    return path


def start(
    words: Sequence[object],
    *,
    size: int = 1,
    fault: str | None = None,
    rank: int = 0,
    report: bool = False,
) -> Job:
    """Start `train.py words` as `size` ranks.

    Args:
        report: write report.html and send its plots to TensorBoard, as users' runs do. Left out by default:
            it takes most of the time of so small a run.
        fault: "kind:module:function:n", or several, separated by spaces: injected into `rank` (rank 0 with
            "0@" in front) at the n-th call of the function. Kinds: "kill" (kill -9), "stop" (SIGSTOP, as if
            the machine were gone), "SIGTERM", "SIGUSR1" ("SIGTERM^2" goes to the grandparent), "tree"
            (SIGTERM to the rank and its children, as the DeepSpeed launcher sends it), "reader" (kill -9 of
            a loader process), "pause" (SIGSTOP of one, and SIGTERM to the rank a second later), "full" (a
            full disk), "nan" (the result times NaN), "drag" (slow from this call on), "late" (20 seconds
            once).
    """
    words = [str(word) for word in words]
    logs = [Path(words[0]).parent / f"output.{rank}.txt" for rank in range(size)]
    port = free_port()
    processes = []
    for number, log in enumerate(logs):
        log.unlink(missing_ok=True)
        env = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        if size > 1:
            env |= {"RANK": str(number), "WORLD_SIZE": str(size), "LOCAL_RANK": str(number)}
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        all_faults = [one if "@" in one else f"{rank}@{one}" for one in (fault or "").split()]
        own_faults = [one.partition("@")[2] for one in all_faults if one.startswith(f"{number}@")]
        processes.append(_SERVER.Process(target=_rank, args=(words, str(log), env, own_faults, report)))
        processes[-1].start()
    return Job(processes, logs)


def train(
    words: Sequence[object],
    *,
    size: int = 1,
    timeout: float = 90,
    fault: str | None = None,
    rank: int = 0,
    report: bool = False,
) -> Job:
    """Run `train.py words` and require exit status 0 of every rank, also with an injected fault."""
    job = start(words, size=size, fault=fault, rank=rank, report=report)
    status = job.wait(timeout)
    assert status == [0] * size, "\n".join(f"rank {r}: {status[r]}\n{job.output(r)}" for r in range(size))
    return job


def _rank(words: list[str], log: str, env: dict[str, str], faults: list[str], report: bool) -> None:
    """Run train.py's main as one rank, with its output in a file."""
    for name in LAUNCHER:
        os.environ.pop(name, None)
    os.environ.update(env)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    errors.RANK_ZERO_SECONDS = 0.3  # no launcher is waiting to end the others
    if not report:
        trainer.try_report = lambda *_, **__: {}
    for fault in faults:
        _inject(*fault.split(":"))
    sys.exit(import_module("train").main(words))


def _inject(kind: str, module: str, name: str, call: str) -> None:
    """Inject a fault into this process at the n-th call of a function."""
    owner: Any = import_module(module)
    original: Callable[..., Any] = getattr(owner, name)
    calls = [0]
    signals = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}
    signals |= {name: signal.Signals[name] for name in ("SIGTERM", "SIGUSR1")}
    kind, _, generations = kind.partition("^")
    this = psutil.Process()
    target = this.parents()[int(generations) - 1].pid if generations else this.pid

    def faulty(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if kind == "drag" and calls[0] >= int(call):
            time.sleep(0.05)
        due = calls[0] == int(call)
        if due and kind == "late":
            time.sleep(20)
        if due and kind in signals:
            os.kill(target, signals[kind])
        if due and kind == "tree":
            pids = [str(process.pid) for process in (*this.children(recursive=True), this)]
            subprocess.run(["kill", "-TERM", *pids], check=True)  # sent by another process
        if due and kind == "reader":
            this.children()[0].kill()
        if due and kind == "pause":
            this.children()[0].suspend()
            threading.Timer(1.0, os.kill, (this.pid, signal.SIGTERM)).start()
        if due and kind == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        result = original(*args, **kwargs)
        return result * float("nan") if due and kind == "nan" else result

    setattr(owner, name, faulty)


def records(directory: Path, kind: str = "train") -> list[dict[str, Any]]:
    """Return the records of one kind in metrics.jsonl, without times."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    clock = ("seconds", "clips_per_second")
    return [{k: v for k, v in line.items() if k not in clock} for line in lines if line["kind"] == kind]


def losses(directory: Path) -> torch.Tensor:
    """Return the loss of every step."""
    steps = records(directory)
    assert [record["step"] for record in steps] == list(range(len(steps)))
    return torch.tensor([record["loss"] for record in steps], dtype=torch.float64)


def tensors(directory: Path, step: int) -> dict[str, torch.Tensor]:
    """Return trained parameters and optimizer state in the checkpoint of a step."""
    folder = directory / "checkpoints" / f"step-{step:08d}"
    parts = ("trained", "optimizer")
    return {f"{part}/{n}": x for part in parts for n, x in load_file(folder / f"{part}.safetensors").items()}
