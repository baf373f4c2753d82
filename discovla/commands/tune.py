"""`discovla tune`: check and time the implementations of each op on this machine's GPU."""

from __future__ import annotations

import argparse
import logging


def add(commands: argparse._SubParsersAction) -> None:
    """Declare the command and its options."""
    text = (
        "Check the implementations of each op of a run against float64 on this machine's GPU, time them, "
        "keep the choices for runs of the same sizes, and print all of it. A run does so at its first start."
    )
    parser = commands.add_parser("tune", help=text, description=text)
    parser.add_argument("config", metavar="CONFIG", help="TOML of a run, or the name of a packaged config")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="dotted overrides of it")
    gpus = "number of GPUs of the run, which share its batch, default: %(default)s"
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help=gpus)
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    from discovla.config import read_config

    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    config = read_config(arguments.config, arguments.overrides)
    if arguments.gpus < 1:
        raise ValueError(f"--gpus: expected at least 1, found {arguments.gpus}")

    from discovla.commands.zero import sketch
    from discovla.engine.config import resolve_precision
    from discovla.engine.distributed import World, choose_device
    from discovla.train_step import set_precision
    from discovla.tune import format_table, tune

    device = choose_device(config.engine.device)
    if device.type != "cuda":
        raise ValueError(f"engine.device: expected a GPU to measure on, found {device.type}")
    engine = resolve_precision(config.engine, device).model_copy(update={"tune": "auto"})
    config = config.model_copy(
        update={"engine": engine, "batch_size": max(1, config.batch_size // arguments.gpus)}
    )
    method = sketch(config)
    set_precision(method, engine, device)
    world = World(rank=0, size=1, local_rank=0, device=device)
    print(format_table(tune(config, method, world, anew=True)))
