"""The table of ops: their candidates, what bounds them, their machine code, and who is expected to win."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from discovla.ops.dispatch import implementations

Row = dict[str, Any]
GPU = "H100"
ARCH, OTHERS = 90, (80, 100, 120)
HEADS = (
    *("op", "candidates", "size", f"bound on an {GPU}"),
    *(f"sm_{ARCH}: warps, registers, spills, programs", "tensor cores"),
    f"spills on sm_{', '.join(map(str, OTHERS))}",
    *("padding", "measured", "expected to win, because"),
)
# op -> products of its tiles over those of its formula, forward and backward, at the size of the table
PADDING = {
    "fusion_norm": (16 / 8,) * 2,  # rank
    "short_attention": (64**2 / 50**2,) * 2,
    "temporal_fusion": (64**2 / (50 * (50 + 12)),) * 2,  # tokens x (tokens and readout rows)
    # two softmaxes of 16 queries for 1 + 12; backward takes sums along keys first: 7 products for 5
    "readout_attention": (2 * 16 * 64 / (13 * 50), 7 / 5 * 2 * 16 * 64 / (13 * 50)),
    "merge_tokens": (32 * 32 / (24 * 25), 1.0),  # sources x destinations
    "token_similarity": (128 * 32 / (85 * 20),) * 2,
    "token_training_similarity": (128 * 32 / (85 * 20),) * 2,
    "late_interaction": (32 * 16 / (32 * 12),) * 2,
    "soft_vlad": (16 / 5,) * 2,  # centres
}
# op -> a case of benchmarks/sass_cases.py, none where it has no kernel in Triton, and the expectation
EXPECTED: dict[str, tuple[str, str]] = {
    "layer_norm": ("layer_norm {} 76800x768 bf16", "triton: one pass with the residual sum; gain is frozen"),
    "lora_norm": ("lora_norm {} 76800x768 bf16", "triton: others write y and read it again for H"),
    "readout_lora_norm": ("lora_norm {} 76800x768 bf16 readout", "triton: as `lora_norm`, no gather"),
    "fusion_norm": ("adapter {} 1536x768 bf16", "triton: both products and the norm in two launches"),
    "mlp": ("mlp {} 76800x768 bf16", "quack or torch: vendors' loops over k; triton only where rows are few"),
    "short_attention": (
        "short_attention {} 1536x50 w=768 bf16",
        "triton at 50 tokens: keeps no output and no sums; flash at 197 and more",
    ),
    "temporal_fusion": (
        "temporal_fusion {} 1536x50 w=768 bf16",
        "triton: keys of a frame serve its own queries and the group's",
    ),
    "readout_attention": ("readout_attention {} 1536x50 w=768 bf16", "triton: reads k and v once for both"),
    "frame_patches": ("frame_patches 1536x224 bf16", "triton: bytes to patches in one pass"),
    "quantise_rows": ("quantise_rows 76800x768 plain", "triton: scale and bytes in one pass"),
    "merge_tokens": ("merge_tokens {} 1536x50-2 w=768 bf16", "triton: match, rank and mean in one launch"),
    "unit_mean": ("unit_mean {} 128x12 fp32", "triton or compiled: both are one pass"),
    "frame_similarity": (
        "frame_similarity {} 512x512 F=12 bf16",
        "triton: maxima of products in registers; others write all products",
    ),
    "info_nce": (
        "info_nce {} 4096x4096 bf16",
        "torch (products of cuBLAS in blocks) for large batches, triton for small ones",
    ),
    "alignment_losses": ("info_nce {} 4096x4096 bf16 with teacher", "triton: one block needs 14 launches"),
    "token_similarity": ("token_similarity {} 64x64 85x20 fp32", "triton: cosines stay in registers"),
    "token_training_similarity": ("token_training_similarity {} 32x32 85x20 fp32", "triton: likewise"),
    "late_interaction": ("late_interaction {} 512x512 32x12 bf16", "triton: maxima stay in registers"),
    "soft_vlad": ("soft_vlad {} 128x32 K=5 fp32", "torch: five centres leave tensor cores idle"),
    "rank_of_positive": (
        "rank_of_positive 100000x100000 bf16",
        "triton: scores are compared in registers; others write them",
    ),
    "top_k": ("", "cuda: writes no scores (`csrc/README.md`); torch where items are few"),
    "sigmoid_loss": ("", "chunks: the vendor's products, the rest fused"),
    "attention": ("", "flash or cudnn, as their authors report"),
    "fp8_linear": ("", "fast: sums in the tensor cores; rows by `quantise_rows`"),
    "token_communication": ("", "torch: its only candidate beside the reference"),
    "preprocess_frames": ("", "triton: as `frame_patches`, with the same kernel"),
    "block": ("", "ops: each of the above by its own choice"),
}


def kernel_table(rows: Sequence[Row]) -> tuple[Sequence[str], list[list[str]]]:
    """Return head and body: a line for each direction of an op.  rows: of benchmarks/sass.py."""
    audited = {(row["case"], row["arch"]): row for row in rows}
    body = []
    for op, (name, expectation) in EXPECTED.items():
        ways = ("forward", "backward") if "{}" in name else ("forward",)
        for way, first in zip(ways, (True, False), strict=False):
            cells = _audit_cells(op, name.format(way), way, audited) if name else ["-"] * 6
            body.append([
                f"`{op}`" if first else "",
                ", ".join(implementations(op)) if first else "",
                *cells,
                "-",
                expectation if first else "",
            ])  # fmt: skip
    return HEADS, body


def _audit_cells(op: str, case: str, way: str, audited: Mapping[tuple[str, int], Row]) -> list[str]:
    """Return the cells from size to padding."""
    row = audited[case, ARCH]
    bound = row["floor"][GPU]
    padding = PADDING.get(op, (1.0, 1.0))[way == "backward"]
    return [
        case.removeprefix(op).strip(),
        f"{bound['bound']}, {bound['us']:,.4g} us",
        ", ".join(str(row[column]) for column in ("warps", "registers", "spills", "programs")),
        ", ".join(row["tensor_cores"]) or "-",
        ", ".join(str(audited[case, arch]["spills"]) for arch in OTHERS),
        f"{padding:.2f}" if padding > 1 else "-",
    ]
