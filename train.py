"""Train: `deepspeed train.py CONFIG [a.b=c ...]`, by torchrun, or as plain `python train.py`.

`discovla train CONFIG [a.b=c ...]` does the same, and starts the processes itself.
"""

from __future__ import annotations

import sys

from discovla import cpu, terminal
from discovla.errors import run_program


def main(words: list[str]) -> int:
    """Run the config named by the first word, with the other words as overrides."""
    words = [word for word in words if not word.startswith("--local_rank=")]  # of the DeepSpeed launcher
    cpu.let_threads_sleep()
    terminal.start()
    if not words or words[0].startswith("-"):
        print("usage: deepspeed train.py CONFIG [a.b=c ...]", file=sys.stderr)
        return 2
    from discovla.commands.train import train  # with torch, which reads how its threads wait
    from discovla.config import read_config

    return run_program(lambda: train(read_config(words[0], words[1:])), "train.py")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
