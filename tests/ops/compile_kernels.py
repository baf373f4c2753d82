"""Compile every kernel to machine code for the GPU of a compute capability: no GPU is needed for that.

Run by test_compile.py in a process of its own, since TRITON_INTERPRET is read when kernels are defined.
"""

import sys
from typing import Any

import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as compile_kernel

from discovla_kernels import contrastive, frame_similarity, rank_of_positive, sigmoid_loss, token_similarity

INTEGERS = {
    "mask_ptr": "*u8",
    "ignore_ptr": "*u8",
    "index_ptr": "*i16",
    "positive_ptr": "*i64",
    "count_ptr": "*i32",
}
ROWS = ("text_ptr", "video_ptr", "query_ptr", "item_ptr", "dx_ptr")
FRAMES = {"HAS_TEXT_MASK": True, "HAS_VIDEO_MASK": True}
TILE = {"BLOCK_R": 128, "BLOCK_C": 128}


def argument(name: str, rows: str) -> str:
    """The type of a kernel's argument by its name."""
    for end, kind in INTEGERS.items():
        if name.endswith(end):
            return kind
    if not name.endswith("_ptr"):
        return "fp32" if name == "scale" else "i32"
    return rows if name in ROWS else "*fp32"


def build(kernel: Any, constants: dict[str, Any], rows: str, target: GPUTarget) -> None:
    """Compile one kernel with rows of one type."""
    if "PRECISION" in kernel.arg_names:
        half = rows == "*bf16"
        constants = constants | {"BLOCK_D": 64 if half else 32, "ACC": tl.float32}
        constants["PRECISION"] = "ieee" if half else "tf32x3"
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else argument(name, rows) for name in names}
    values = {(names.index(name),): value for name, value in constants.items()}
    compile_kernel(ASTSource(kernel, signature, values), target=target, options={"num_warps": 8})


def main(capability: int) -> None:
    target = GPUTarget("cuda", capability, 32)
    dense = FRAMES | {"BLOCK_R": 32, "BLOCK_C": 128}
    cases: list[tuple[Any, dict[str, Any]]] = [(frame_similarity._frame_similarity_backward, dense)]
    for first, second, texts in ((8, 4, 16), (1, 0, 128)):
        parts = FRAMES | {"FIRST": first, "SECOND": second, "BLOCK_T": texts, "BLOCK_V": 64}
        forward = frame_similarity._frame_similarity_forward
        cases += [(forward, parts | {"KEEP": keep}) for keep in (True, False)]
    for teacher in (True, False):
        options = TILE | {"HAS_TEACHER": teacher, "HAS_IGNORE": teacher}
        cases += [(contrastive._contrastive_forward, options)]
        cases += [(contrastive._contrastive_backward, options | {"DETACH": False})]
    for i, j in ((64, 32), (1, 128)):
        pair = FRAMES | {"I_BLOCK": i, "J_BLOCK": j, "BLOCK_T": max(1, 64 // i), "BLOCK_V": max(1, 64 // j)}
        for training in (True, False):
            options = pair | {"TRAINING": training, "OFFICIAL": training}
            cases += [(token_similarity._token_similarity_forward, options)]
            cases += [(token_similarity._token_similarity_backward, options)]
    for switch in (True, False):
        cases += [
            (rank_of_positive._rank_of_positive_forward, {"TARGET": switch, "DUAL": True, "BLOCK": 128})
        ]
        cases += [(sigmoid_loss._sigmoid_loss, {"BACKWARD": switch, "BLOCK": 128})]
    for kernel, constants in cases:
        for rows in ("*bf16", "*fp32"):
            build(kernel, constants, rows, target)
    print(f"{2 * len(cases)} compiled")


if __name__ == "__main__":
    main(int(sys.argv[1]))
