"""`discovla zero`: the DeepSpeed settings that follow from a config, and the memory a GPU will need."""

from __future__ import annotations

import argparse
import json

import torch

from discovla.config import RunConfig, read_config
from discovla.engine.config import choose_stage
from discovla.engine.deepspeed import deepspeed_settings
from discovla.engine.memory import FULL, Sizes, TokenLayers, activation_bytes, host_bytes, state_bytes
from discovla.engine.strategy import trained_size
from discovla.methods import METHODS
from discovla.methods.base import Method
from discovla.nn.memory import WIDTHS
from discovla.towers.weights import load_pretrained

FULL_TUNING = 2  # times as much is kept where the blocks' own weights train: the inputs of their products


def add(commands: argparse._SubParsersAction) -> None:
    """Declare the command and its options."""
    text = "print the DeepSpeed settings that follow from a config, and the predicted memory of each GPU"
    parser = commands.add_parser("zero", help=text, description=text)
    parser.add_argument("config", metavar="CONFIG", help="TOML of a run")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="dotted overrides of it")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="processes, default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print one JSON with both")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    config = read_config(arguments.config, arguments.overrides)
    if arguments.gpus < 1 or config.batch_size % arguments.gpus:
        raise ValueError(
            f"--gpus: expected a number that divides batch_size = {config.batch_size}, got {arguments.gpus}"
        )
    method = sketch(config)
    trained = trained_size(method)
    frozen = sum(p.numel() for p in method.parameters()) - trained
    largest = max((p.numel() for p in method.parameters() if p.requires_grad), default=0)
    sizes = Sizes(frozen=frozen, trained=trained, world_size=arguments.gpus, largest=largest)
    settings = deepspeed_settings(
        config.engine,
        config.optim,
        micro_batch=config.batch_size // arguments.gpus,
        world_size=arguments.gpus,
        trained=trained,
    )
    memory, host = predicted(config, method, sizes), host_bytes(config.engine, sizes)
    if config.optim.ema is not None:
        whole = choose_stage(config.engine, trained, arguments.gpus) < 3
        lies = memory if whole or config.engine.offload == "none" else host
        lies["average"] = FULL * (trained if whole else -(-trained // arguments.gpus))
    if arguments.json:
        found = {"deepspeed": settings, "parameters": vars(sizes), "bytes": memory, "host_bytes": host}
        print(json.dumps(found, indent=2))
        return
    print(json.dumps(settings, indent=2))
    print(_table(config, sizes, memory))
    if any(host.values()):
        print("\n".join(["and for each GPU in its machine's memory, in MiB:", *_lines(host)]))


def sketch(config: RunConfig) -> Method:
    """The method of a run without its weights, which are neither read nor held where sizes are named."""
    model = config.model
    if model.architecture is not None and model.pretrained != "drawn":
        model = model.model_copy(update={"pretrained": "random", "activation": "auto"})
    architecture = load_pretrained(model).architecture
    with torch.device("meta"):
        method = METHODS[config.method.name](architecture, config.method)
    method.freeze()
    return method


def predicted(config: RunConfig, method: Method, sizes: Sizes) -> dict[str, int]:
    """Bytes on each GPU, by part; captions count as long as they may be, though padding is left out.

    Where `engine.memory` is "auto", all is kept: a GPU that cannot hold it computes the rest again.
    """
    a, data = method.architecture, config.data
    pairs = config.batch_size // sizes.world_size
    frames = pairs * data.frames
    captions = pairs + (frames if method.needs_frame_captions else 0)
    towers = [
        TokenLayers(rows=frames * (1 + a.patches), width=a.vision.width, layers=a.vision.layers),
        TokenLayers(rows=captions * data.context_length, width=a.text.width, layers=a.text.layers),
    ]
    mode = "keep" if config.engine.memory == "auto" else config.engine.memory
    more = FULL_TUNING if config.method.tune == "full" and mode != "recompute_blocks" else 1
    kept = activation_bytes(
        towers,
        widths=WIDTHS[mode] * more,
        element=4 if config.engine.precision == "fp32" else 2,
        parts=config.engine.grad_cache_chunks,
    )
    return {**state_bytes(config.engine, sizes), "activations": kept}


def _table(config: RunConfig, sizes: Sizes, memory: dict[str, int]) -> str:
    """The prediction as lines."""
    stage = choose_stage(config.engine, sizes.trained, sizes.world_size)
    how = f"ZeRO {stage}" if config.engine.strategy == "deepspeed" else "plain torch"
    lines = [
        f"{sizes.trained:,} parameters trained, {sizes.frozen:,} frozen; {sizes.world_size} GPU(s), "
        f"{config.batch_size // sizes.world_size} clips each, {how}, {config.engine.precision}",
        "predicted on each GPU, in MiB (towers and optimiser; not the losses, the library and its buffers):",
    ]
    return "\n".join([*lines, *_lines(memory)])


def _lines(memory: dict[str, int]) -> list[str]:
    """Each part and their sum."""
    named = {**memory, "total": sum(memory.values())}
    return [f"{name:>12} {size / 2**20:12,.1f}" for name, size in named.items()]
