"""Stand-ins for the candidates of an op and for a GPU's clock, which a sandboxed process imports by name."""

import os
import signal
import time

import torch
from torch import Tensor

from discovla.candidates import Planned
from discovla.ops import dispatch
from discovla.ops.cases import Case

MS = {"reference": 5.0, "right_fast": 2.0, "right_slow": 9.0, "wrong_fast": 1.0, "wrong_gradient": 1.0}
FAILING = ("crash", "hang", "full", "fails")
dispatch.CANDIDATES["fake"] = dict.fromkeys((*MS, *FAILING), "stand-in")


def clock(call, name: str) -> float:
    """Return made-up milliseconds after one call."""
    call()
    return MS[name]


def behave(leaves: list[Tensor], impl: str, masked: bool) -> Tensor:
    """Compute s sin x, or fail as the name says."""
    x, scale = leaves
    dispatch.choose("fake", impl, x.device.type, operands=(x,))
    match impl:
        case "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "hang":
            time.sleep(1000)
        case "full":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 TiB")
        case "fails":
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore lines")
        case "wrong_fast":
            return 1.005 * scale * x.sin()
        case "wrong_gradient":
            return (scale * x.sin()).detach() + 0 * scale * x
    return scale * x.sin()


def plan(n: int = 8) -> Planned:
    """Plan a case of the stand-ins with n rows, checked with four."""
    options = {"op": "fake", "call": behave, "m": 1, "dim": 3, "dtype": torch.float32}
    whole, few = (Case(n=rows, shapes=((rows, 3),), **options) for rows in (n, 4))
    return Planned(case=whole, checked=few, default="reference")


def triton_first(call, name: str) -> float:
    """Return made-up milliseconds by which Triton's kernel is the fastest."""
    call()
    return {"triton": 1.0}.get(name, 5.0)
