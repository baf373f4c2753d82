"""Check that frames and captions are prepared as the towers of a method need them."""

from __future__ import annotations

from discovla.data.config import DataConfig
from discovla.data.tokens import split_tokenizer
from discovla.towers.architecture import Architecture


def check_inputs(architecture: Architecture, data: DataConfig) -> None:
    """Refuse options of the data with which the towers would read something else than in their training.

    Raises:
        ValueError: the first such option, with the value that the towers need.
    """
    longest = architecture.context_length
    if data.context_length > longest:
        raise ValueError(f"data.context_length: expected at most {longest}, found {data.context_length}")
    if architecture.captions.reads_padding and data.context_length != longest:
        raise ValueError(
            f"data.context_length: expected {longest}, since this text tower reads padding, "
            f"found {data.context_length}"
        )
    given = {
        "tokenizer": split_tokenizer(data.tokenizer)[0],
        "resize": data.resize,
        "interpolation": data.interpolation,
    }
    needed = tower_inputs(architecture)
    for name, value in given.items():
        if value != needed[name]:
            raise ValueError(f"data.{name}: expected {needed[name]!r} for these towers, found {value!r}")


def tower_inputs(architecture: Architecture) -> dict[str, str | int]:
    """Return the options of the data that `check_inputs` accepts."""
    return {
        "context_length": architecture.context_length,
        "tokenizer": architecture.captions.tokenizer,
        "resize": architecture.preprocessing.resize,
        "interpolation": architecture.preprocessing.interpolation,
    }
