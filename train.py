"""Train: `deepspeed train.py CONFIG [a.b=c ...]`, by torchrun, or as plain `python train.py`.

`discovla train CONFIG [a.b=c ...]` does the same, and starts the processes itself.
"""

from __future__ import annotations

import sys

from discovla import terminal
from discovla.commands.train import train
from discovla.config import read_config
from discovla.errors import run_program


def main(words: list[str]) -> int:
    """Run the config named by the first word, with the other words as overrides."""
    words = [word for word in words if not word.startswith("--local_rank=")]  # of the DeepSpeed launcher
    terminal.start()
    if not words or words[0].startswith("-"):
        print("usage: deepspeed train.py CONFIG [a.b=c ...]", file=sys.stderr)
        return 2
    return run_program(lambda: train(read_config(words[0], words[1:])), "train.py")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
