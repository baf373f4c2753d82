"""Expected errors of a program: one line on stderr, once for all ranks, and an exit status."""

from __future__ import annotations

import io
import os
import re
import select
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from discovla import terminal
from discovla.data.video.errors import DecodeError
from discovla.foreign import printable

EXIT_BUG = 1
EXIT_FAILED = 2
EXIT_READER_LEFT = 141  # 128 + SIGPIPE, as of other programs whose output goes to `head`
EXIT_STOPPED = 75  # a signal stopped the run and it can resume: EX_TEMPFAIL of sysexits.h
EXPECTED = (ValueError, DecodeError, OSError, FloatingPointError)
RANK_ZERO_SECONDS = 10.0  # other ranks wait so long before they print: rank 0 may report the same error
_WORKER_LOST = re.compile(r"DataLoader worker \(pid.*(is killed by signal|exited unexpectedly)")  # of torch
_CONNECTION_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")  # of gloo


class PeerLost(Exception):
    """Another process of the run is lost; the message names it."""


class RunStopped(Exception):
    """The run stopped because of a signal, with everything saved that it needs to resume."""


def run_program(run: Callable[[], None], program: str) -> int:
    """Call `run` and turn expected errors into one line on stderr.

    An error on all ranks is printed by rank 0: the others wait first, and the launcher ends them once rank 0
    has failed.  An error on one rank only is printed by that rank, before it leaves the collectives in which
    the others wait.  A lost process is printed by every other rank at once, a lost data-loading process by
    the rank that it loads for.

    Returns:
        Exit status: 0, `EXIT_FAILED` after an expected error, `EXIT_STOPPED` after a stop signal,
        `EXIT_READER_LEFT` if the program that reads the output has ended, `EXIT_BUG` after any other error,
        whose traceback is printed.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # it was closed
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115 - it stays open
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that has not all letters
    try:
        try:
            run()
            sys.stdout.flush()
        finally:
            terminal.close()
        return 0
    except RunStopped as stopped:
        if not _rank():
            sys.stderr.write(f"{program}: {stopped}\n")
        return EXIT_STOPPED
    except PeerLost as error:
        print_error(str(error), program)
        return EXIT_FAILED
    except UnicodeError as error:  # a ValueError that names no file
        encoding = sys.getfilesystemencoding()
        of_text = isinstance(error, UnicodeEncodeError | UnicodeDecodeError)
        if not of_text or encoding == "utf-8" or error.encoding != encoding:
            return _report_bug(program)
        line = (
            f"expected file names in UTF-8, found that this terminal's are in {encoding}, which has no "
            f"{str(error.object)[error.start : error.end]!a}; set LC_ALL=C.UTF-8"
        )
    except EXPECTED as error:
        if isinstance(error, BrokenPipeError) and _reader_left():
            sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 - Python flushes it when it ends
            return EXIT_READER_LEFT
        line = one_line(error)
    except RuntimeError as error:
        if _WORKER_LOST.search(str(error)):
            print_error(
                "a data-loading process of this rank has ended, possibly for lack of memory or of /dev/shm "
                f"(data.workers): {one_line(error)}",
                program,
            )
            return EXIT_FAILED
        if not is_connection_lost(error):
            return _report_bug(program)
        line = "another process of this run ended; see its own message"
    except Exception:
        return _report_bug(program)
    if _rank():
        time.sleep(RANK_ZERO_SECONDS)
    print_error(line, program)
    return EXIT_FAILED


def _reader_left() -> bool:
    """Return True if standard output is a pipe that no program reads any more."""
    poll = select.poll()
    try:
        poll.register(sys.stdout.fileno(), 0)
    except (OSError, ValueError):  # it is no file, or is closed
        return False
    return any(events & select.POLLERR for _, events in poll.poll(0))


def _report_bug(program: str) -> int:
    """Print the traceback of the error being handled and where to report it, and return the exit status."""
    traceback.print_exc()
    print_error("this is a bug in discovla; report it with the lines above", program)
    return EXIT_BUG


def print_error(line: str, program: str) -> None:
    """Print one line on stderr, with the rank if it is not 0."""
    terminal.clear()
    rank = _rank()
    sys.stderr.write(f"{program}: error{f' (rank {rank})' if rank else ''}: {line}\n")
    sys.stderr.flush()


def exit_process(line: str, before_exit: Callable[[], None]) -> None:
    """Print a line, call `before_exit` and end this process at once, from any thread."""
    try:
        with suppress(OSError):  # stderr may be closed
            print_error(line, "train.py")
        before_exit()
    finally:
        os._exit(EXIT_FAILED)


def one_line(error: Exception) -> str:
    """Return the message of an error on one line, after the file's name if the system gives one."""
    if isinstance(error, OSError) and error.filename is not None:
        return printable(f"{os.fsdecode(error.filename)}: {error.strerror}")
    text = str(error).strip()
    if text.startswith("Caught ") and ("Traceback" in text or "\nOriginal " in text):
        # a data-loading process sends its whole traceback, or the error of a batch that cannot be sent
        text = re.sub(r"^Original \w+: ", "", text.splitlines()[-1])
    return printable(" ".join(text.split()))


def is_connection_lost(error: RuntimeError) -> bool:
    """Return True if a collective failed because another process is gone."""
    import torch.distributed as dist  # takes seconds to import, and not every program has it loaded

    return isinstance(error, dist.DistError) or any(words in str(error) for words in _CONNECTION_LOST)


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))
