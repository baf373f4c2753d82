"""`discovla zero`: print the DeepSpeed settings of a config and the predicted memory of each GPU."""

from __future__ import annotations

import argparse
import json

import torch

from discovla.config import RunConfig, read_config
from discovla.engine.config import choose_stage, choose_strategy
from discovla.engine.deepspeed import deepspeed_settings
from discovla.engine.memory import FP32_BYTES, Sizes, TokenLayers, activation_bytes, host_bytes, state_bytes
from discovla.engine.strategy import trained_size
from discovla.methods import METHODS
from discovla.methods.base import Method
from discovla.nn.memory import WIDTHS
from discovla.towers.weights import DRAWN, load_pretrained

FULL_TUNING_FACTOR = 2  # trained weights of the blocks keep the inputs of their matrix products too


def add(commands: argparse._SubParsersAction) -> None:
    """Declare the command and its options."""
    text = "print the DeepSpeed settings that follow from a config, and the predicted memory of each GPU"
    parser = commands.add_parser("zero", help=text, description=text)
    parser.add_argument("config", metavar="CONFIG", help="TOML of a run")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="dotted overrides of it")
    parser.add_argument(
        "--gpus", type=int, default=1, metavar="N", help="number of GPUs, default: %(default)s"
    )
    parser.add_argument("--json", action="store_true", help="print settings and memory as one JSON object")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    config = read_config(arguments.config, arguments.overrides)
    if config.engine.precision == "auto":  # as on a GPU that has bf16
        engine = config.engine.model_copy(update={"precision": "bf16"})
        config = config.model_copy(update={"engine": engine})
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
        sharded = choose_stage(config.engine, trained, arguments.gpus) == 3
        place = host if sharded and config.engine.offload != "none" else memory
        place["average"] = FP32_BYTES * (-(-trained // arguments.gpus) if sharded else trained)
    if arguments.json:
        report = {"deepspeed": settings, "parameters": vars(sizes), "bytes": memory, "host_bytes": host}
        print(json.dumps(report, indent=2))
        return
    print(json.dumps(settings, indent=2))
    print(_table(config, sizes, memory))
    if any(host.values()):
        print("\n".join(["in the host's memory for each GPU, in MiB:", *_lines(host)]))


def sketch(config: RunConfig) -> Method:
    """Build the method of a run on the meta device; with sizes in the config no weights are read."""
    model = config.model
    if model.architecture is not None and model.pretrained not in DRAWN:
        model = model.model_copy(update={"pretrained": "random", "activation": "auto"})
    architecture = load_pretrained(model).architecture
    with torch.device("meta"):
        method = METHODS[config.method.name](architecture, config.method)
    method.freeze()
    return method


def predicted(config: RunConfig, method: Method, sizes: Sizes) -> dict[str, int]:
    """Return the predicted bytes on each GPU, by part.

    Captions count with their longest length, although padding is skipped.  `engine.memory` = "auto" counts as
    "keep"; a GPU with less memory recomputes some activations.
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
    factor = FULL_TUNING_FACTOR if config.method.tune == "full" and mode != "recompute_blocks" else 1
    activations = activation_bytes(
        towers,
        widths=WIDTHS[mode] * factor,
        element=4 if config.engine.precision in ("auto", "fp32") else 2,
        chunks=config.engine.grad_cache_chunks,
    )
    return {**state_bytes(config.engine, sizes), "activations": activations}


def _table(config: RunConfig, sizes: Sizes, memory: dict[str, int]) -> str:
    """Format the prediction."""
    stage = choose_stage(config.engine, sizes.trained, sizes.world_size)
    name, _ = choose_strategy(config.engine, sizes.trained, sizes.world_size)
    strategy = f"ZeRO {stage}" if name == "deepspeed" else "plain torch"
    lines = [
        f"{sizes.trained:,} parameters trained, {sizes.frozen:,} frozen; {sizes.world_size} GPU(s), "
        f"{config.batch_size // sizes.world_size} clips each, {strategy}, {config.engine.precision}",
        "predicted on each GPU, in MiB (towers and optimiser, without losses and library buffers):",
    ]
    return "\n".join([*lines, *_lines(memory)])


def _lines(memory: dict[str, int]) -> list[str]:
    """Format each part and the total."""
    named = {**memory, "total": sum(memory.values())}
    return [f"{name:>12} {size / 2**20:12,.1f}" for name, size in named.items()]
