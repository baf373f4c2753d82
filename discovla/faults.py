"""What went wrong, told by each program in one line and once for all its processes."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable

from discovla.data.decode import DecodeError

EXPECTED = (ValueError, DecodeError, OSError, FloatingPointError)
FAILED = 2  # exit status
GRACE = 10.0  # seconds that ranks > 0 leave rank 0 to tell of the same fault, and the launcher to end them
_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")  # in gloo's words


def run_told(run: Callable[[], None], program: str) -> int:
    """Run a program; what is wrong with its input or its machine is one line on stderr.

    A fault on all ranks is told by the first: the others wait, and are ended by the launcher, which ends all
    processes once one has failed.  A fault on one rank alone is told by that rank, before it leaves the
    collectives in which the others wait.

    Returns:
        The exit status, 0 or 2.
    """
    try:
        run()
        return 0
    except EXPECTED as error:
        line = one_line(error)
    except RuntimeError as error:
        if not _lost_process(error):
            raise
        line = "another process of this run ended; its own message says why"
    rank = int(os.environ.get("RANK", "0"))
    if rank:
        time.sleep(GRACE)
    sys.stderr.write(f"{program}: error{f' (rank {rank})' if rank else ''}: {line}\n")
    sys.stderr.flush()
    return FAILED


def one_line(error: Exception) -> str:
    """The message of an error on one line, with the file first where the system names one."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    text = str(error).strip()
    if text.startswith("Caught ") and "Traceback" in text:
        text = text.splitlines()[-1]  # a worker that reads data sends all of its traceback
    return " ".join(text.split())


def _lost_process(error: RuntimeError) -> bool:
    """Whether a collective failed because another process is gone."""
    import torch.distributed as dist  # not every program has it loaded, and it takes seconds

    return isinstance(error, dist.DistError) or any(words in str(error) for words in _LOST)
