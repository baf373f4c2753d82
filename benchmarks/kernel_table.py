"""The table of ops: their candidates, what bounds them, their machine code, and who is expected to win."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from discovla.ops.dispatch import implementations

Row = dict[str, Any]
GPU = "H100"
ARCH = 90
HEADS = (
    *("op", "candidates", "size", f"bound on an {GPU}"),
    *("warps, registers, spills", "programs", "tensor cores", "measured", "expected to win, because"),
)
# op -> a case of benchmarks/sass_cases.py, and the expectation
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
        "triton: no matrix of all products; cuda where its tile of 96 x 96 is faster",
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
    "rank_of_positive": ("rank_of_positive 100000x100000 bf16", "cuda or triton: open, both count tiles"),
}


def kernel_table(rows: Sequence[Row]) -> tuple[Sequence[str], list[list[str]]]:
    """Return head and body: a line for each direction of an op.  rows: of benchmarks/sass.py."""
    audited = {row["case"]: row for row in rows if row["arch"] == ARCH}
    body = []
    for op, (name, expectation) in EXPECTED.items():
        candidates = ", ".join(implementations(op))
        for way in ("forward", "backward") if "{}" in name else ("forward",):
            row = audited[name.format(way)]
            bound = row["floor"][GPU]
            first = way == "forward"
            body.append([
                f"`{op}`" if first else "",
                candidates if first else "",
                row["case"].removeprefix(op).strip(),
                f"{bound['bound']}, {bound['us']:,.4g} us",
                f"{row['warps']}, {row['registers']}, {row['spills']}",
                str(row["programs"]),
                ", ".join(row["tensor_cores"]) or "-",
                "-",
                expectation if first else "",
            ])  # fmt: skip
    return HEADS, body
