"""Work for sandboxed processes in tests: every way in which an item can end."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from typing import Any

from discovla.data.doctor import ExamineRequest, examine


class Unsendable(Exception):
    """An error that pickles and cannot be made again."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(first + second)


def task(item: str) -> Any:
    """End in the way that the item names."""
    match item:
        case "hang":
            time.sleep(60)
        case "hang in native code":
            ctypes.PyDLL(None).sleep(60)  # holds the interpreter
        case "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "exit":
            os._exit(3)
        case "raise":
            raise ValueError("not this one")
        case "unsendable value":
            return lambda: None
        case "unsendable error":
            raise Unsendable("no ", "way")
        case "large":
            return bytes(50_000_000)
        case "print":
            print("to the standard output", flush=True)
    return item, os.getpid()


def stopped(_: str) -> None:
    """Neither end nor answer, and ignore the alarm."""
    signal.signal(signal.SIGALRM, signal.SIG_IGN)
    time.sleep(60)


def examination(request: ExamineRequest) -> dict[str, Any]:
    """Examine a file whose name says how its decoding ends."""
    task(request.path.stem)
    return examine(request)
