"""Compile every kernel to machine code for the GPU of a compute capability: no GPU is needed for that.

Run by test_compile.py in a process of its own, since TRITON_INTERPRET is read when kernels are defined.
"""

import sys
from typing import Any

import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as compile_kernel

from discovla_kernels import (
    contrastive,
    frame_similarity,
    late_interaction,
    rank_of_positive,
    soft_vlad,
    token_similarity,
)

MODULES = (
    contrastive,
    frame_similarity,
    late_interaction,
    rank_of_positive,
    soft_vlad,
    token_similarity,
)

INTEGERS = {
    "mask_ptr": "*u8",
    "ignore_ptr": "*u8",
    "index_ptr": "*i16",
    "positive_ptr": "*i64",
    "count_ptr": "*i32",
    "table_ptr": "*i32",
}
ROWS = ("text_ptr", "video_ptr", "query_ptr", "item_ptr", "token_ptr", "dx_ptr")
SHARED = {80: 163 << 10, 90: 227 << 10}  # bytes a program may have
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
        constants = constants | {"ACC": tl.float32}
        constants.setdefault("BLOCK_D", 64 if half else 32)
        constants["PRECISION"] = "ieee" if half and "token_ptr" not in kernel.arg_names else "tf32x3"
    names, constants = kernel.arg_names, dict(constants)
    options = {"num_warps": constants.pop("num_warps", 8), "num_stages": constants.pop("num_stages", 3)}
    signature = {name: "constexpr" if name in constants else argument(name, rows) for name in names}
    values = {(names.index(name),): value for name, value in constants.items()}
    built = compile_kernel(ASTSource(kernel, signature, values), target=target, options=options)
    if built.metadata.shared > SHARED[target.arch]:
        sys.exit(f"{kernel.__name__}: {built.metadata.shared} bytes of shared memory are too many")


def entries() -> set[str]:
    """The kernels that are launched, by their names; what they call has other names."""
    actual = {name for module in MODULES for name in vars(module)}
    return {x for x in actual if x.endswith(("_forward", "_backward")) and x.startswith("_")}


def main(capability: int) -> None:
    target = GPUTarget("cuda", capability, 32)
    dense = FRAMES | {"BLOCK_R": 32, "BLOCK_C": 128}
    cases: list[tuple[Any, dict[str, Any]]] = [(frame_similarity._frame_similarity_backward, dense)]
    for parts in (12, 1, 63):
        tile = frame_similarity._tile(1 << 10, 1 << 10, parts, parts)
        forward = frame_similarity._frame_similarity_forward
        cases += [(forward, FRAMES | tile | {"KEEP": keep}) for keep in (True, False)]
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
        cases += [(late_interaction._late_interaction_forward, pair)]
        cases += [(late_interaction._late_interaction_backward, pair)]
    for length, width in ((32, 64), (128, 64)):
        tables = {"L_BLOCK": length, "K_BLOCK": 16, "BLOCK_D": width}
        cases += [(soft_vlad._soft_vlad_forward, tables), (soft_vlad._soft_vlad_backward, tables)]
    for switch in (True, False):
        ranks = {"TARGET": switch, "DUAL": True, "BLOCK": 128}
        cases += [(rank_of_positive._rank_of_positive_forward, ranks | {"SLOTS": n}) for n in (1, 32)]
    if missing := entries() - {kernel.__name__ for kernel, _ in cases}:
        sys.exit(f"never compiled: {sorted(missing)}")
    for kernel, constants in cases:
        for rows in ("*bf16", "*fp32"):
            build(kernel, constants, rows, target)
    print(f"{2 * len(cases)} compiled")


if __name__ == "__main__":
    main(int(sys.argv[1]))
