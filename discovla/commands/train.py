"""`discovla train`: run a config, in this process or on several by DeepSpeed's launcher."""

from __future__ import annotations

import argparse
import io
import logging
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from discovla import terminal
from discovla.config import RunConfig, find_config, read_config

logger = logging.getLogger(__name__)

DRAWN_WORLD = Path("data/drawn_world")  # as the packaged configs name it


def add(commands: argparse._SubParsersAction) -> None:
    """Declare the command and its options."""
    text = (
        "Train a config and measure retrieval before and after. Relative paths, also those in the config, are"
        " relative to the current folder."
    )
    options = _options()
    parser = commands.add_parser("train", help=text, description=text, parents=[options])
    name = "TOML file, config.json of an earlier run, or a packaged config such as `own` or `quickstart`"
    parser.add_argument("config", metavar="CONFIG", help=name)
    overrides = "values that replace those of the config (`discovla config` prints all keys)"
    parser.add_argument("words", nargs=argparse.REMAINDER, metavar="a.b=c", help=overrides)
    parser.set_defaults(run=_run)


def _options() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    number = "processes on this machine; default: one for each GPU, or one"
    options.add_argument("--processes", type=int, metavar="N", help=number)
    quiet = "print warnings and the table of results only"
    options.add_argument("--quiet", action="store_true", help=quiet)
    as_json = "print JSON lines on stdout: the start, each step, evaluations, and the results"
    options.add_argument("--json", action="store_true", help=as_json)
    return options


def _run(arguments: argparse.Namespace) -> None:
    """Launch the processes of the run, or be one of them."""
    rest = argparse.ArgumentParser(prog="discovla train CONFIG", parents=[_options()])
    rest.add_argument("overrides", nargs="*", metavar="a.b=c")
    arguments = rest.parse_intermixed_args(arguments.words, arguments)  # options may follow CONFIG
    output = {name: hasattr(arguments, name) for name in ("quiet", "json")}
    terminal.start(quiet=output["quiet"], as_json=output["json"])
    config = read_config(arguments.config, arguments.overrides)
    if "RANK" not in os.environ:  # else a launcher has started this process
        words = [arguments.config, *arguments.overrides]
        make_drawn_shards(config, arguments.config)
        processes = getattr(arguments, "processes", None) or default_processes(config)
        if processes < 1:
            raise ValueError(f"--processes: expected at least 1, found {processes}")
        if processes > 1:
            launch(config, [*(f"--{name}" for name, on in output.items() if on), *words], processes)
    train(config)


def train(config: RunConfig) -> None:
    """Run a config in this process and print the results on rank 0."""
    from discovla.trainer import run  # torch takes seconds to import

    results = run(config)
    if results is None:
        return
    if terminal.is_json():
        terminal.event({"kind": "results", "directory": str(config.directory), "rows": results})
    else:
        print_results(config.directory, results)


def print_results(directory: Path, results: Mapping[str, Any]) -> None:
    """Print the table of a finished run, and where to look next."""
    from discovla.engine import checkpoint
    from discovla.evaluate import results_table, sampling_error
    from discovla.report.data import RunFacts
    from discovla.trainer import VAL_IS_TEST

    print(f"\n{results_table(results, width=terminal.width())}")
    facts = RunFacts.load(directory)
    assert facts is not None, "written when the run began"
    test = facts.splits["test"]
    error = max(sampling_error(metrics, test.clips) for metrics in results.values())
    print(f"\n{test.clips:,} clips of {test.name!r}: R@1 has a standard error of up to {error:.1f} points")
    if "val" in facts.splits and test.name == facts.splits["val"].name:
        print(f"no test split: {VAL_IS_TEST % test.name}")
    best = checkpoint.best(directory / "checkpoints")
    terminal.facts(
        {
            "report": str(directory / "report.html"),
            "checkpoint": str(directory / "checkpoints" if best is None else best[0]),
            "evaluate": f"discovla evaluate {directory}",
            "export": f"discovla export {directory} FOLDER",
            "curves": f"tensorboard --logdir {directory}",
        }
    )


def default_processes(config: RunConfig) -> int:
    """Return the number of GPUs that the run may use, or 1."""
    if config.engine.device == "cpu":
        return 1
    import torch

    return max(1, torch.cuda.device_count())


def launch(config: RunConfig, words: Sequence[str], processes: int) -> None:
    """Replace this process by DeepSpeed's launcher of so many, each of which runs `discovla train` words."""
    with socket.socket() as free:  # two runs on one machine may not share a port
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ["-m", "deepspeed.launcher.runner", "-q", "--num_accelerators", str(processes)]
    launcher += ["--master_port", str(port), "--no_local_rank", "--module", "discovla"]
    if config.engine.device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it finds no GPU
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *launcher, "train", *words])


def make_drawn_shards(config: RunConfig, name: str) -> None:
    """Draw the clips of the drawn world, and write its shards, if the config reads them and there are none.

    Args:
        name: of the config, whose own sampling the shards have, whatever the overrides.

    Raises:
        ValueError, OSError: a file cannot be written.
    """
    source = Path(config.data.shards) if config.data.shards is not None else config.data.manifest
    if source is None or DRAWN_WORLD not in source.parents:
        return
    from discovla.commands import draw, shard

    manifest = DRAWN_WORLD / "manifest.jsonl"
    shards = [] if config.data.shards is None else [config.data.shards]
    commands = []
    if not manifest.is_file():
        logger.info("%s: no clips there yet, drawing them", DRAWN_WORLD.absolute())
        commands.append(["draw", str(DRAWN_WORLD)])
    if shards and not (Path(shards[0]) / "shards.json").is_file():
        commands.append(["shard", str(manifest), shards[0], "--config", str(find_config(name))])
    parser = argparse.ArgumentParser(prog="discovla")
    subparsers = parser.add_subparsers()
    draw.add(subparsers)
    shard.add(subparsers)
    for words in commands:
        arguments = parser.parse_args(words)
        with redirect_stdout(io.StringIO()):  # stdout is for the results of the run
            arguments.run(arguments)
