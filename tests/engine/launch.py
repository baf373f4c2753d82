"""Start the ranks of a run as a launcher would, with a time limit."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("worker.py")
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR")


def run_jobs(jobs: list[dict], folder: Path, *, size: int, timeout: float = 120) -> list[dict]:
    """Return the results of `jobs` (see worker.py) on `size` processes; one has no launcher variables."""
    asked, answered = folder / f"jobs{size}.json", folder / f"results{size}.json"
    asked.write_text(json.dumps(jobs))
    answered.unlink(missing_ok=True)
    command = [sys.executable, str(WORKER), str(asked), str(answered)]
    port = free_port()
    processes = [
        subprocess.Popen(
            command,
            env=environment(rank, size, port),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(size)
    ]
    deadline = time.monotonic() + timeout
    try:
        outputs = [
            process.communicate(timeout=max(1.0, deadline - time.monotonic()))[0] for process in processes
        ]
    finally:
        for process in processes:
            process.kill()
    for rank, (process, output) in enumerate(zip(processes, outputs, strict=True)):
        assert process.returncode == 0, f"rank {rank} ended with {process.returncode}:\n{output[-4000:]}"
        assert rank == 0 or not output, f"rank {rank} is not quiet:\n{output[-4000:]}"
    return json.loads(answered.read_text())


def environment(rank: int, size: int, port: int) -> dict[str, str]:
    """Return the launcher variables of one rank."""
    env = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
    env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    if size > 1:
        env |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return env


def free_port() -> int:
    """Return a port without a listener."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
