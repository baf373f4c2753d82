"""Compile the kernels of the towers as they are launched, for the GPU of a compute capability without it.

Run by test_compile_towers.py in a process of its own: TRITON_INTERPRET is read when kernels are defined.
"""

import sys
from typing import Any

import torch
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as compile_kernel

from discovla_kernels import (
    alignment_block,
    attention_tiles,
    fusion_norm,
    layer_norm,
    lora_norm,
    mlp,
    preprocess_frames,
    unit_mean,
)
from discovla_kernels import quantise_rows as quantised
from discovla_kernels import readout_attention as readout
from discovla_kernels import short_attention as attention
from discovla_kernels import temporal_fusion as fusion

HALF, SINGLE = torch.bfloat16, torch.float32
TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}
OTHERS = {  # of arguments that are not rows, by how their names end
    "readout_z_ptr": "",  # these are
    "part_grad_ptr": "",
    "down_ptr": "*fp32",
    "up_ptr": "*fp32",
    "bias_ptr": "*fp32",
    "part_ptr": "*fp32",
    "index_ptr": "*i32",
    "offsets_ptr": "*i32",
    "readout_ptr": "*i64",
    "mask_ptr": "*u8",
    "frames_ptr": "*u8",
    "bytes_ptr": "*u8",
    "columns_ptr": "*fp32",
    "scale_ptr": "*fp32",
    "stat_ptr": "*fp32",
    "da_ptr": "*fp32",
    "lse_ptr": "*fp32",
    "mean_ptr": "*fp32",
    "sizes_ptr": "*fp32",
    "fused_ptr": "*fp32",
    "readout_x_ptr": "*fp32",
    "position_ptr": "*fp32",
}
STREAM = ("x_ptr", "sum_ptr", "dsum_ptr", "dx_ptr")  # of the norms, float32 beside bfloat16
SHARED = {80: 163 << 10, 90: 227 << 10}  # bytes a program may have
Case = tuple[Any, torch.dtype, dict[str, Any]]  # kernel, dtype of rows, constants and launch options


def argument(kernel: Any, name: str, dtype: torch.dtype) -> str:
    """The type of a kernel's argument by its name."""
    for end, kind in OTHERS.items():
        if name.endswith(end):
            return kind or TYPES[dtype]
    if not name.endswith("_ptr"):
        return "fp32" if name in ("scale", "eps", "kl", "alpha", "beta") else "i32"
    stream = "norm" in kernel.__name__ and name in STREAM
    return "*fp32" if stream else TYPES[dtype]


def build(case: Case, target: GPUTarget) -> None:
    """Compile one kernel, strides and pointers being multiples of 16 as they are in towers."""
    kernel, dtype, constants = case
    names = kernel.arg_names
    options = {name: constants[name] for name in ("num_warps", "num_stages") if name in constants}
    constants = {name: value for name, value in constants.items() if name not in options}
    if "ACC" in names:
        constants |= {"ACC": tl.float32}
    if "PRECISION" in names:
        constants |= {"PRECISION": "tf32x3" if dtype == SINGLE else "ieee"}
    signature = {n: "constexpr" if n in constants else argument(kernel, n, dtype) for n in names}
    values = {(names.index(name),): value for name, value in constants.items()}
    aligned = [i for i, n in enumerate(names) if signature[n][0] in "*i"]
    hints = {(i,): [["tt.divisibility", 16]] for i in aligned}
    built = compile_kernel(ASTSource(kernel, signature, values, hints), target=target, options=options)
    if built.metadata.shared > SHARED[target.arch]:
        sys.exit(
            f"{kernel.__name__}: {built.metadata.shared} bytes of shared memory, {SHARED[target.arch]} there"
        )


def row_cases() -> list[Case]:
    """Kernels without attention, at the sizes of ViT-B."""
    norm = layer_norm._tile(768)
    cases: list[Case] = [
        (
            layer_norm._layer_norm_forward,
            HALF,
            norm | {"HAS_U": True, "HAS_ADDED": True, "HAS_AFFINE": True},
        ),
        (
            layer_norm._layer_norm_backward,
            HALF,
            norm | {"HAS_DSUM": True, "HAS_DU": True, "HAS_ADDED": True, "HAS_AFFINE": True},
        ),
    ]
    for dtype, width in ((HALF, 768), (SINGLE, 512)):
        for read in (False, True):
            flags = {"HAS_AFFINE": True, "HAS_READOUT": read}
            forward = lora_norm._tile(width, 8, lora_norm.FORWARD) | flags | {"HAS_U": True}
            backward = lora_norm._tile(width, 8, lora_norm.BACKWARD) | flags
            cases += [(lora_norm._lora_norm_forward, dtype, forward)]
            cases += [
                (lora_norm._lora_norm_backward, dtype, backward | {"HAS_DSUM": not read, "HAS_DU": True})
            ]
    for dtype, gelu in ((HALF, False), (SINGLE, True)):
        x = torch.empty(1, dtype=dtype)
        tile = mlp._tile(x, 1 << 12, 1 << 12) | {"GELU": gelu}
        cases += [(mlp._mlp_forward, dtype, tile | {"KEEP": True, "stride_wk": 1})]
        cases += [(mlp._mlp_backward, dtype, tile | {"stride_wn": 1})]
        cases += [(fusion_norm._adapter_forward, dtype, fusion_norm._tile(x, 8))]
        cases += [(fusion_norm._adapter_backward, dtype, fusion_norm._tile(x, 8))]
    colours = {"SCALE": (0.1, 0.2, 0.3), "SHIFT": (1.0, 2.0, 3.0), "C": 3, "BLOCK": 1024}
    folding = {"SCALE": (0.1, 0.2, 0.3), "OFFSET": (1.0, 2.0, 3.0), "C": 3, "BLOCK": 1024}
    cases += [(preprocess_frames._fold_normalisation_forward, HALF, folding)]
    flags = ("HAS_COLUMNS", "ACTIVATES", "HAS_HIDDEN", "GELU")
    for dtype, given in ((HALF, (False, False, False, False)), (HALF, (True, True, True, False)),
                         (SINGLE, (False, True, False, True))):  # fmt: skip
        rows = {"LARGEST": 448.0, "BLOCK_T": 1, "BLOCK_W": 4096, **dict(zip(flags, given, strict=True))}
        cases += [(quantised._quantise_rows_forward, dtype, rows)]
    rows = alignment_block._rows(1536, 512)[1]
    cases += [(alignment_block._alignment_block_norms, SINGLE, rows)]
    cases += [(alignment_block._alignment_block_radial, SINGLE, rows)]
    cases += [(alignment_block._alignment_block_losses, SINGLE, {"BLOCK": alignment_block.SAMPLES})]
    pooling = {"HAS_MASK": True, "BLOCK_D": 512, "num_warps": 4}
    cases += [(unit_mean._unit_mean_forward, SINGLE, pooling)]
    cases += [(unit_mean._unit_mean_backward, SINGLE, pooling)]
    return [*cases, (preprocess_frames._preprocess_frames_forward, HALF, colours)]


def attention_cases() -> list[Case]:
    """Frames of one tile and of several, and packed captions."""
    cases: list[Case] = []
    for dtype, length, causal in (
        (HALF, 50, False),
        (HALF, 257, False),
        (HALF, 32, True),
        (SINGLE, 77, True),
    ):
        tile = attention_tiles.settings(torch.empty(1, dtype=dtype), 64, length)
        tile |= {"HAS_OFFSETS": causal, "HAS_MASK": causal, "CAUSAL": causal}
        forward = {name: value for name, value in tile.items() if name != "ONE"}
        sizes = {"HAS_SIZES": not causal}
        cases += [(attention._short_attention_forward, dtype, forward | sizes)]
        cases += [(attention._short_attention_backward, dtype, tile | sizes)]
        if dtype == HALF and length < 257:
            groups = {"HAS_GROUP_MASK": True, "HAS_POSITION": causal, "BLOCK_F": 16}
            split = {"SPLIT": not causal, "RELOAD": not causal}
            cases += [(fusion._temporal_fusion_forward, dtype, tile | groups)]
            cases += [(fusion._temporal_fusion_backward, dtype, tile | groups | split)]
            read = forward | groups | {"GROUPED": True}
            cases += [(readout._readout_attention_forward, dtype, read)]
            cases += [(readout._readout_attention_backward, dtype, read)]
    return cases


def with_arguments_of_one(case: Case) -> Case:
    """One head, one row, one frame: Triton makes constants of integers that are 1, without their methods."""
    kernel, dtype, constants = case
    ones = {
        name: 1
        for name in ("LENGTH", "UNGROUPED", "F", "PARTS", "EACH", "H", "C")
        if name in kernel.arg_names
    }
    return kernel, dtype, constants | ones


def main(capability: int) -> None:
    target = GPUTarget("cuda", capability, 32)
    cases = row_cases() + attention_cases()
    cases += [with_arguments_of_one(case) for case in attention_cases() if case[2]["BLOCK"] == 32]
    for case in cases:
        build(case, target)
    print(f"{len(cases)} compiled")


if __name__ == "__main__":
    main(int(sys.argv[1]))
