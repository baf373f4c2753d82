"""Predicted memory of a training step on one GPU: model and optimiser state by ZeRO stage, and activations.

DeepSpeed's estimators (`estimate_zero2_model_states_mem_needs`, `estimate_zero3_...`) do not replace the
state
formulas: they assume 18 bytes of mixed-precision state for every parameter, and know neither frozen weights
nor other dtypes nor stages 0 and 1.  For DiscoVLA at ViT-B/32 with adapters at stage 2 on one GPU they give
2,896 MiB instead of 299 MiB in bf16.  Tests hold the formulas here to 1 % of what DeepSpeed allocates."""

from __future__ import annotations

from dataclasses import dataclass

from discovla.engine.config import EngineConfig, choose_stage
from discovla.engine.deepspeed import MAX_BUCKET

FP32_BYTES = 4
# bytes per frozen parameter; FP8 keeps the bf16 copy too, and for both directions two 8-bit copies
FROZEN_BYTES = {"auto": FP32_BYTES, "fp32": FP32_BYTES, "bf16": 2, "fp8": 3, "fp8_backward": 4}
MAX_GATHERED = 1_000_000_000  # parameters that stage 3 keeps gathered at once, DeepSpeed's default


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Parameter counts of a run.

    frozen, trained: numbers of parameters.  world_size: number of processes.  largest: size of the largest
    trained parameter, which offload buffers.
    """

    frozen: int
    trained: int
    world_size: int
    largest: int = 0


@dataclass(frozen=True, kw_only=True)
class TokenLayers:
    """Input of a tower on one process in a step: rows (tokens) of `width` numbers through `layers` layers."""

    rows: float
    width: int
    layers: int


def state_bytes(config: EngineConfig, sizes: Sizes) -> dict[str, int]:
    """Return the bytes of parameters, gradients and optimiser state on one GPU, by part.

    For F frozen and T trained parameters of f and t bytes on W processes, with buckets of B elements:

        stage   parameters      masters   moments   gradients (peak)       gathered
        0       f F + t T       0         8 T       2 t T                  0
        1       f F + t T       4 T / W   8 T / W   t (T + B)              0
        2       f F + t T       4 T / W   8 T / W   t min(T, T / W + B)    0
        3       (f F + t T)/W   4 T / W   8 T / W   t (T / W + B)          f F + t T for W > 1

    At stage 0 one of the two gradients is the flat buffer, which stays allocated.  DeepSpeed keeps masters
    also for float32 parameters.  Stage 3 gathers at most `MAX_GATHERED` parameters.

    With offload, masters and moments move to the host, and at stage 3 the gradient slices; stages 1 and 2 add
    a buffer of the largest parameter.  With offloaded parameters the GPU holds the gathered ones for W = 1
    too.

    Args:
        config: of the engine; plain torch counts as stage 0.
        sizes: of the run.
    """
    w, trained = sizes.world_size, sizes.trained
    stage = 0 if config.strategy == "torch" else choose_stage(config, trained, w)
    t = 2 if config.bf16_parameters else FP32_BYTES
    bucket = min(MAX_BUCKET, trained)
    all_parameters, slice_ = FROZEN_BYTES[config.precision] * sizes.frozen + t * trained, -(-trained // w)
    gradients = {
        0: 2 * t * trained,
        1: t * (trained + bucket),
        2: t * min(trained, slice_ + bucket),
        3: t * (slice_ + bucket),
    }[stage]
    offload = config.offload != "none"
    if offload:
        gradients += -t * slice_ if stage == 3 else t * sizes.largest
    parameters = all_parameters
    if stage == 3:
        parameters = 0 if config.offload_parameters else -(-all_parameters // w)
    gathered = 0.0
    if stage == 3 and (w > 1 or config.offload_parameters):
        gathered = all_parameters * min(1.0, MAX_GATHERED / max(1, sizes.frozen + trained))
    return {
        "parameters": parameters,
        "masters": 0 if stage == 0 or offload else FP32_BYTES * slice_,
        "moments": 0 if offload else 2 * FP32_BYTES * (trained if stage == 0 else slice_),
        "gradients": gradients,
        "gathered": round(gathered),
    }


def host_bytes(config: EngineConfig, sizes: Sizes) -> dict[str, int]:
    """Return the bytes that `engine.offload` takes of the host's memory for one process, by part.

    With F, T, f, t and W as in `state_bytes`, and P elements in the largest trained parameter:

        stage   parameters                       masters   moments   gradients     copies
        1, 2    0                                4 T / W   8 T / W   4 T / W       t (T / W + P)
        3       (f F + t T) / W if offloaded     4 T / W   8 T / W   (4 + t) T/W   0

    All parts are 0 without offload.
    """
    if config.offload == "none":
        return dict.fromkeys(("parameters", "masters", "moments", "gradients", "copies"), 0)
    w = sizes.world_size
    stage_3, slice_ = choose_stage(config, sizes.trained, w) == 3, -(-sizes.trained // w)
    t = 2 if config.bf16_parameters else FP32_BYTES
    all_parameters = FROZEN_BYTES[config.precision] * sizes.frozen + t * sizes.trained
    return {
        "parameters": -(-all_parameters // w) if config.offload_parameters else 0,
        "masters": FP32_BYTES * slice_,
        "moments": 2 * FP32_BYTES * slice_,
        "gradients": (FP32_BYTES + t if stage_3 else FP32_BYTES) * slice_,
        "copies": 0 if stage_3 else t * (slice_ + sizes.largest),
    }


def activation_bytes(towers: list[TokenLayers], *, widths: float, element: int, chunks: int = 1) -> int:
    """Return the bytes of activations that the towers keep for backward.

    Args:
        towers: input of each tower.
        widths: numbers kept per row and layer, in multiples of the tower's width.
        element: bytes per number.
        chunks: of gradient caching; activations of one chunk are kept at a time.
    """
    return round(sum(widths * element * x.rows * x.width * x.layers for x in towers) / chunks)
