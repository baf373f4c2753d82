"""Bytes that a training step reads and writes, counted on tensors without storage.

    python benchmarks/step_traffic.py                      ViT-B/32, 128 pairs, bf16, plain torch and kernels
    python benchmarks/step_traffic.py --model ViT-L/14 --pairs 1024
    python benchmarks/step_traffic.py --model PE-Core-B-16      any model, by open_clip's name

Each op counts its operands once; attention counts as one fused op. Caches of a GPU save some of these bytes,
and products need some of their operands twice. Operations are those of plain torch's matrix products and
attention, two for each multiplication and addition. Captions have 12 of 32 tokens on average; towers that
read padding compute their whole context. Rows go to benchmarks/results/cpu/, one JSON a line.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))  # a script starts with its own folder there
sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

from benchmarks import step_inputs
from benchmarks.measure import Launches, Traffic, machine, results_file, write_row
from discovla.batch import Batch
from discovla.engine.config import EngineConfig
from discovla.methods.discovla import DiscoVLA
from discovla.ops import dispatch
from discovla.ops.buckets import bucketed_rows
from discovla.ops.dispatch import Impl
from discovla.towers.architecture import Architecture
from discovla.train_step import set_precision

KINDS = {  # the first whose names match an op counts it
    "copies of another dtype": ("_to_copy",),
    "layer norms": ("layer_norm", "lora_norm", "fusion_norm"),
    "activations": ("silu", "sigmoid", "gelu"),
    "attention": ("attention", "temporal_fusion"),
    "products": ("mm", "mlp", "hidden", "convolution"),
}


@torch.library.custom_op("discovla_benchmarks::attention", mutates_args=())
def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Stand in for torch's fused attention, which on meta tensors would be counted by its formula."""
    return torch.empty_like(q)


@_attention.register_fake
def _(q, k, v):
    return torch.empty_like(q)


@torch.library.custom_op("discovla_benchmarks::attention_backward", mutates_args=())
def _attention_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by q, k and v."""
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


@_attention_backward.register_fake
def _(grad, q, k, v):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


_attention.register_autograd(
    lambda ctx, grad: _attention_backward(grad, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def _attention_flops(q: tuple[int, ...], k: tuple[int, ...], *_: object, **options: object) -> int:
    """Operations of two products of b h l c: forward."""
    *batch, queries, channels = q
    return 4 * math.prod(batch) * queries * k[-2] * channels


def _attention_backward_flops(
    grad: object, q: tuple[int, ...], k: tuple[int, ...], *_: object, **o: object
) -> int:
    """Operations of five products: the scores again, and the gradients."""
    return _attention_flops(q, k) * 5 // 2


FLOPS = {
    torch.ops.discovla_benchmarks.attention: _attention_flops,
    torch.ops.discovla_benchmarks.attention_backward: _attention_backward_flops,
}


@contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    """Let `auto` choose on meta tensors as on a GPU, and count attention as one op."""
    choices = {op: {**by_device, "meta": by_device["cuda"]} for op, by_device in dispatch.AUTO.items()}
    fused = patch.object(F, "scaled_dot_product_attention", lambda q, k, v, **options: _attention(q, k, v))
    with patch.dict(dispatch.AUTO, choices), fused:
        yield


def step_traffic(
    architecture: Architecture, pairs: int, *, precision: str = "bf16", impl: Impl = "torch"
) -> tuple[Counter[str], int]:
    """Return the bytes of a DiscoVLA step by kind of op, and the number of ops that start a kernel.

    Args:
        impl: of the towers' blocks.
    """
    model, batch = _on_meta(architecture, pairs, impl, precision)
    with _as_on_a_gpu(), Traffic("meta") as traffic, Launches("meta") as launches:
        step_inputs.step(model, batch)
    kinds: Counter[str] = Counter()
    for name, count in traffic.bytes.items():
        kinds[next((kind for kind, words in KINDS.items() if any(w in name for w in words)), "others")] += (
            count
        )
    return kinds, launches.count


def step_flops(architecture: Architecture, pairs: int) -> int:
    """Return the operations of a DiscoVLA step in plain torch."""
    model, batch = _on_meta(architecture, pairs, "torch")
    with _as_on_a_gpu(), FlopCounterMode(display=False, custom_mapping=FLOPS) as counter:
        step_inputs.step(model, batch)
    return counter.get_total_flops()


def _on_meta(
    architecture: Architecture, pairs: int, impl: Impl, precision: str = "bf16"
) -> tuple[DiscoVLA, Batch]:
    """Return the model and a batch without storage."""
    model = step_inputs.method(architecture)
    set_precision(model, EngineConfig.model_validate({"precision": precision}), torch.device("cpu"))
    model.to("meta")
    model.vision.impl = model.text.impl = impl
    length = architecture.context_length
    length = length if architecture.captions.reads_padding else min(32, length)
    batch = step_inputs.noise(architecture, pairs, length=length)
    assert batch.frame_text_mask is not None
    model.text.rows = bucketed_rows([batch.text_mask, batch.frame_text_mask.flatten(0, 1)])
    return model, batch.to("meta")


def main(words: Sequence[str] | None = None) -> int:
    """Count plain torch and the kernels."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="ViT-B/32")
    parser.add_argument("--pairs", type=int, default=128)
    options = parser.parse_args(words)
    where = machine("cpu")
    path = results_file(where, "traffic")
    architecture = step_inputs.architecture(options.model)
    flops = step_flops(architecture, options.pairs)
    for impl in ("torch", "triton"):
        kinds, launches = step_traffic(architecture, options.pairs, impl=impl)
        row = {"name": f"step {options.model} b{options.pairs}", "impl": f"ours bf16 {impl}"}
        row |= {"gb": {kind: count / 1e9 for kind, count in kinds.most_common()}, "launches": launches}
        row |= {"total_gb": sum(kinds.values()) / 1e9, "tflop": flops / 1e12}
        print(row)
        write_row(path, {**where, **row})
    return 0


if __name__ == "__main__":
    sys.exit(main())
