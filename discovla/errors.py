"""What went wrong, told by each program in one line and once for all its processes."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable
from contextlib import suppress

from discovla.data.video.errors import DecodeError

EXPECTED = (ValueError, DecodeError, OSError, FloatingPointError)
FAILED = 2  # exit status
STOPPED = 75  # exit status of a run that a signal ended and that can go on: "try again later" of sysexits.h
GRACE = 10.0  # seconds that ranks > 0 leave rank 0 to tell of the same fault, and the launcher to end them
_READER = re.compile(
    r"DataLoader worker \(pid.*(is killed by signal|exited unexpectedly)"
)  # in torch's words
_GONE = "a process that reads for this one has ended, as where memory or /dev/shm is short (data.workers)"
_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")  # in gloo's words


class PeerLost(Exception):
    """Another process of the run is gone; the message names it."""


class RunStopped(Exception):
    """A signal asked the run to stop, and it did, with all that it needs to go on."""


def run_program(run: Callable[[], None], program: str) -> int:
    """Run a program; what is wrong with its input or its machine is one line on stderr.

    A fault on all ranks is told by the first: the others wait, and are ended by the launcher, which ends all
    processes once one has failed.  A fault on one rank alone is told by that rank, before it leaves the
    collectives in which the others wait.  That a process is lost is told by every other, at once, and that
    one that read data is, by the rank that it read for.

    Returns:
        The exit status: 0, 2 where something is wrong, 75 where a signal stopped the run.
    """
    try:
        run()
        return 0
    except RunStopped as stopped:
        if not _rank():
            sys.stderr.write(f"{program}: {stopped}\n")
        return STOPPED
    except PeerLost as error:
        tell(str(error), program)
        return FAILED
    except EXPECTED as error:
        line = one_line(error)
    except RuntimeError as error:
        if _READER.search(str(error)):
            tell(f"{_GONE}: {one_line(error)}", program)
            return FAILED
        if not lost_connection(error):
            raise
        line = "another process of this run ended; its own message says why"
    if _rank():
        time.sleep(GRACE)
    tell(line, program)
    return FAILED


def tell(line: str, program: str) -> None:
    """One line on stderr; ranks above the first say which they are."""
    rank = _rank()
    sys.stderr.write(f"{program}: error{f' (rank {rank})' if rank else ''}: {line}\n")
    sys.stderr.flush()


def end(line: str, last: Callable[[], None]) -> None:
    """End this process, from whichever thread, for the run cannot go on: after its line, and `last`."""
    try:
        with suppress(OSError):  # nobody may be left to read it
            tell(line, "train.py")
        last()
    finally:
        os._exit(FAILED)


def one_line(error: Exception) -> str:
    """The message of an error on one line, with the file first where the system names one."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    text = str(error).strip()
    if text.startswith("Caught ") and "Traceback" in text:
        text = text.splitlines()[-1]  # a worker that reads data sends all of its traceback
    return " ".join(text.split())


def lost_connection(error: RuntimeError) -> bool:
    """Whether a collective failed because another process is gone."""
    import torch.distributed as dist  # not every program has it loaded, and it takes seconds

    return isinstance(error, dist.DistError) or any(words in str(error) for words in _LOST)


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))
