"""Where the time of one training step goes, by what is computed: on a CPU by ops, on a GPU by kernels."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

LOW = 16  # a product one of whose sizes is at most that is one of a low-rank update
# The first that fits a name counts.
COMPONENTS = {
    "attention": r"scaled_dot_product|flash|fmha|softmax|bmm|(short|readout)_attention|temporal_fusion",
    "layer norms": r"layer_?norm|lora_norm|fusion_norm",
    "activations": r"silu|gelu|sigmoid|quick",
    "products": r"(^|::|_)(add)?mm(_|$)|linear|gemm|cutlass|xmma|cublas|nvjet|conv|matmul",
    "copies, casts, rows": r"copy|memcpy|memset|cat|clone|contiguous|index|gather|scatter|embed|fill|zero",
    "sums and products of elements": r"add|sub|mul|div|pow|exp|log|sum|mean|max|elementwise|reduce|norm|neg",
}


def component(name: str, shapes: Any = ()) -> str:
    """What an op or kernel of that name belongs to; "other" is torch's own work between them."""
    if "Backward" in name or name.startswith("autograd::"):
        return "other"
    for found, pattern in COMPONENTS.items():
        if re.search(pattern, name, re.IGNORECASE):
            sizes = [size for shape in shapes if isinstance(shape, list) for size in shape]
            low = found == "products" and sizes and min(sizes) <= LOW
            return "low-rank products" if low else found
    return "other"


def by_component(call: Callable[[], object], *, cuda: bool) -> dict[str, float]:
    """Milliseconds of one call in each component, the largest first.

    On a GPU a product's sizes are not known of its kernel, so low-rank ones are among the others.
    """
    kind = ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU
    with profile(activities=[kind], record_shapes=not cuda) as recorded:
        call()
        if cuda:
            torch.cuda.synchronize()
    found: dict[str, float] = {}
    for event in recorded.key_averages(group_by_input_shape=not cuda):
        name = component(event.key, event.input_shapes or ())
        spent = event.self_device_time_total if cuda else event.self_cpu_time_total
        found[name] = found.get(name, 0.0) + spent / 1000
    return dict(sorted(found.items(), key=lambda item: -item[1]))
