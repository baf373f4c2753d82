"""Run every Triton kernel once, at ragged sizes: `python -m ttsem.sanitize FILE [WORD ...]` with this file.

ttsem executes what Triton's compiler makes of a kernel, program by program, on tensors of a CPU.  It stops at
an access outside a tensor, and where two programs of a launch touch one element that one of them writes.
"""

import re
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

import discovla_kernels
from discovla.ops.cases import Case, case
from discovla.ops.frame_patches import fold_normalisation
from discovla.ops.merge_tokens import merge_tokens
from discovla.ops.preprocess_frames import preprocess_frames
from discovla.ops.short_attention import short_attention
from discovla.ops.tower_cases import patch_case, rounding_case, row_case, sequence_case

ROWS, WIDTH = 37, 40  # of no tile's size
PAIRS, GROUPS = 150, 36  # more than a tile of pairs has, and of groups of frames
SINGLE = {"dtype": torch.float32}


def cases() -> Iterator[Case]:
    """Yield a ragged case of every op that has kernels, masked or packed where it can be."""
    for op in ("layer_norm", "lora_norm", "readout_lora_norm", "fusion_norm", "unit_mean", "mlp"):
        yield row_case(op, ROWS if op != "unit_mean" else 5, WIDTH, **SINGLE)
    for op in ("short_attention", "temporal_fusion", "readout_attention"):
        for packed in (False, True):
            yield sequence_case(op, 6, 7, WIDTH, 4, packed=packed, **SINGLE)
    yield patch_case(2, 64, torch.float32)
    yield rounding_case(ROWS, WIDTH, masked=True, **SINGLE)
    yield case("info_nce", PAIRS, dim=WIDTH, masked=True, **SINGLE)
    yield case("rank_of_positive", PAIRS, dim=WIDTH, masked=True, backward=False, **SINGLE)
    for op in ("frame_similarity", "late_interaction", "token_similarity", "token_training_similarity"):
        yield case(op, GROUPS, frames=(3, 5), dim=WIDTH, masked=True, **SINGLE)
    yield case("alignment_losses", GROUPS, frames=(3, 5), dim=WIDTH, masked=True, **SINGLE)
    yield case("soft_vlad", 9, frames=(5, 1), dim=WIDTH, masked=True, **SINGLE)


@triton.jit
def _past_the_end(x_ptr, y_ptr, N, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + place, tl.load(x_ptr + place, mask=place < N, other=0.0))


@triton.jit
def _same_element(x_ptr, y_ptr, N, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    source = tl.program_id(0) * BLOCK + place
    tl.store(y_ptr + place, tl.load(x_ptr + source, mask=source < N, other=0.0), mask=source < N)


def finds(kernel: Any, kind: str) -> bool:
    """Return True if a fault of a kernel is found."""
    x = torch.randn(100, device="cuda")
    try:
        kernel[(2,)](x, torch.empty_like(x), 100, BLOCK=64)
    except Exception as error:
        return kind in str(error)
    return False


class HostGenerator(torch.Generator):
    """A generator on the CPU for tensors that say they are on a GPU, for which a CPU's torch has none."""

    def __new__(cls, device: object = None) -> torch.Generator:
        return super().__new__(cls)


def works() -> dict[str, Callable[[], object]]:
    """Return what launches kernels, by name."""
    x, metric = torch.randn(3, 11, WIDTH, requires_grad=True), torch.randn(3, 11, 8)
    frames = torch.randint(256, (2, 1, 48, 48, 3), dtype=torch.uint8)
    weight = torch.randn(WIDTH, 3, 16, 16)
    qkv, sizes = torch.randn(6, 7, 3 * WIDTH, requires_grad=True), torch.rand(6, 7) + 1
    activation = row_case("mlp", ROWS, WIDTH, **SINGLE)
    return {
        **{case.name: lambda case=case: case.step(case.leaves("cpu"), "triton") for case in cases()},
        "activation": lambda: activation.step(activation.leaves("cpu"), "cublas"),
        "merge_tokens": lambda: (
            merge_tokens(x, torch.ones(3, 11), metric, 2, impl="triton").rows.sum().backward()
        ),
        "short_attention of sizes": lambda: (
            short_attention(qkv, 4, key_sizes=sizes, impl="triton").sum().backward()
        ),
        "preprocess_frames": lambda: preprocess_frames(frames, impl="triton"),
        "fold_normalisation": lambda: fold_normalisation(weight, impl="triton"),
    }


def launched_kernels() -> set[str]:
    """Return the names of the kernels that are launched from now on, as a set that grows."""
    names: set[str] = set()
    run = JITFunction.run

    def noted(kernel: Any, *arguments: Any, **options: Any) -> Any:
        names.add(kernel.__name__)
        return run(kernel, *arguments, **options)

    JITFunction.run = noted
    return names


def all_kernels() -> set[str]:
    """Return the names of the kernels that a launcher of discovla_kernels launches."""
    texts = [path.read_text() for folder in discovla_kernels.__path__ for path in Path(folder).glob("*.py")]
    return {x for text in texts for x in re.findall(r"(?:^ +|_launch\()(_\w+)[\[,]", text, re.MULTILINE)}


def run() -> None:
    """Print one line for each op, then the number of ops with a fault."""
    torch.Generator = HostGenerator
    if not finds(_past_the_end, "past the end") or not finds(_same_element, "_same_element"):
        print("ttsem misses a store past the end of a tensor, or one element written by two programs")
        return
    faults, launched, words = 0, launched_kernels(), sys.argv[1:]
    for name, work in works().items():
        if words and not any(word in name for word in words):
            continue
        try:
            work()
            print(f"{name}: no fault", flush=True)
        except Exception as error:  # of ttsem, whose classes a machine without it does not have
            faults += 1
            print(f"{name}: {type(error).__name__}: {error}", flush=True)
            traceback.print_exc(limit=-4)
    print(f"{faults} faults; kernels not launched: {', '.join(sorted(all_kernels() - launched)) or 'none'}")


if __name__ == "__main__":  # ttsem gives a function of the name main words of its own
    run()
