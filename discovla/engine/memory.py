"""Memory of a training step on one GPU, in closed form: by ZeRO stage, and by what the towers keep."""

from __future__ import annotations

from dataclasses import dataclass

from discovla.engine.config import EngineConfig, choose_stage
from discovla.engine.deepspeed import MAX_BUCKET

FULL = 4  # bytes of a float32
# bytes of a frozen element; FP8 keeps its 16-bit ones too, and both ways the 8-bit ones twice
FROZEN = {"fp32": FULL, "bf16": 2, "fp8": 3, "fp8_backward": 4}
MOST_LIVE = 1_000_000_000  # elements that DeepSpeed's stage 3 keeps gathered at once, its default


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is trained by how many processes.

    frozen, trained: elements of parameters.  world_size: processes.  largest: elements of the largest trained
    parameter, which offload buffers.
    """

    frozen: int
    trained: int
    world_size: int
    largest: int = 0


@dataclass(frozen=True, kw_only=True)
class TokenLayers:
    """What goes through a tower on one process in a step: rows (tokens) of `width` numbers, `layers` deep."""

    rows: float
    width: int
    layers: int


def state_bytes(config: EngineConfig, sizes: Sizes) -> dict[str, int]:
    """Bytes on a GPU that one process holds for parameters, gradients and the optimiser, by part.

    With F frozen and T trained elements of f and t bytes on W processes, and buckets of B elements:

        stage   parameters      masters   moments   gradients at most          gathered
        0       f F + t T       0         8 T       t T, and again for W > 1   0
        1       f F + t T       4 T / W   8 T / W   t (T + B)                  0
        2       f F + t T       4 T / W   8 T / W   t min(T, T / W + B)        0
        3       (f F + t T)/W   4 T / W   8 T / W   t (T / W + B)              f F + t T for W > 1

    Masters are there in float32 too: DeepSpeed's optimiser holds a slice of its own.  Stage 3 gathers at most
    a thousand million elements at once, by DeepSpeed's default.

    With offload masters and moments go, and at stage 3 the slices of gradients; stages 1 and 2 take a buffer
    of the largest parameter.  Where parameters go, what is gathered of them is on the GPU for W = 1 too.

    Args:
        config: of the engine; plain torch is stage 0.
        sizes: of the run.
    """
    w, trained = sizes.world_size, sizes.trained
    stage = choose_stage(config, trained, w) if config.strategy == "deepspeed" else 0
    short = config.bf16_parameters
    t = 2 if short else FULL
    f = FROZEN[config.precision]
    bucket = min(MAX_BUCKET, trained)
    whole, part = f * sizes.frozen + t * trained, _share(trained, w)
    gradients = {
        0: t * trained * (2 if w > 1 else 1),
        1: t * (trained + bucket),
        2: t * min(trained, part + bucket),
        3: t * (part + bucket),
    }[stage]
    away, all_away = config.offload != "none", config.offload_parameters
    if away:
        gradients += -t * part if stage == 3 else t * sizes.largest
    gathers = stage == 3 and (w > 1 or all_away)
    live = min(1.0, MOST_LIVE / max(1, sizes.frozen + trained)) if gathers else 0.0
    kept = 0 if all_away else _share(whole, w)
    return {
        "parameters": kept if stage == 3 else whole,
        "masters": 0 if stage == 0 or away else FULL * part,
        "moments": 0 if away else 2 * FULL * (trained if stage == 0 else part),
        "gradients": gradients,
        "gathered": round(whole * live),
    }


def host_bytes(config: EngineConfig, sizes: Sizes) -> dict[str, int]:
    """Bytes that one process holds in the host's memory because of `engine.offload`, by part.

    With F, T, f, t and W as in `state_bytes`, and P elements in the largest trained parameter:

        stage   parameters               masters   moments   gradients     copies
        1, 2    0                        4 T / W   8 T / W   4 T / W       t (T / W + P)
        3       (f F + t T) / W if too   4 T / W   8 T / W   (4 + t) T/W   0

    Nothing where there is no offload.
    """
    names = ("parameters", "masters", "moments", "gradients", "copies")
    if config.offload == "none":
        return dict.fromkeys(names, 0)
    w = sizes.world_size
    third, part = choose_stage(config, sizes.trained, w) == 3, _share(sizes.trained, w)
    t = 2 if config.bf16_parameters else FULL
    whole = FROZEN[config.precision] * sizes.frozen + t * sizes.trained
    parameters = _share(whole, w) if config.offload_parameters else 0
    gradients = (FULL + t if third else FULL) * part
    copies = 0 if third else t * (part + sizes.largest)
    return dict(zip(names, (parameters, FULL * part, 2 * FULL * part, gradients, copies), strict=True))


def activation_bytes(towers: list[TokenLayers], *, widths: float, element: int, parts: int = 1) -> int:
    """Bytes that the towers keep for backward: `widths` numbers a row, layer and unit of width.

    Args:
        towers: what goes through each.
        widths: kept of a row in a layer, over its width.
        element: bytes of a number.
        parts: in which a process encodes its clips; one part's is kept at a time.
    """
    return round(sum(widths * element * x.rows * x.width * x.layers for x in towers) / parts)


def _share(elements: int, world_size: int) -> int:
    return -(-elements // world_size)
