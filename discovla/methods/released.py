"""Load checkpoints that the papers' own code wrote, by the names of their tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from discovla.methods.base import Method
from discovla.towers.names import openai_name
from discovla.towers.weights import clip_names, misfit_text, read_weights

# our names -> OpenAI's, inside a block
BLOCK_NAMES = (
    (".blocks.", ".resblocks."),
    ("attention.qkv.", "attn.in_proj_"),
    ("attention.out.", "attn.out_proj."),
    ("mlp.up.", "mlp.c_fc."),
    ("mlp.down.", "mlp.c_proj."),
)
# entries of released checkpoints that are not weights
NOT_WEIGHTS = r"clip\.(input_resolution|context_length|vocab_size)"


def load_released(method: Method, path: Path | str) -> None:
    """Load a checkpoint of the paper's own code into a method, strictly.

    Args:
        method: parameters that the release does not have (LoRA, fusion) keep their values.
        path: .bin, .pt or .safetensors; the prefix "module." of names is dropped.

    Raises:
        ValueError: parameters are missing, unexpected or of another shape; the first few are named.
    """
    weights, _ = read_weights(Path(path))
    try:
        released = method.released_parameters(weights)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    own = dict(method.named_parameters())
    misfits = [
        f"{name}: expected {tuple(own[name].shape)}, found {tuple(tensor.shape)}"
        for name, tensor in released.items()
        if own[name].shape != tensor.shape
    ]
    if misfits:
        raise ValueError(f"{path}: {misfit_text(shapes=misfits)}")
    with torch.no_grad():
        for name, tensor in released.items():
            own[name].copy_(tensor)


def by_name(
    method: Method, state: Mapping[str, Tensor], heads: Sequence[tuple[str, str]], unused: str = "(?!)"
) -> dict[str, Tensor]:
    """Rename the tensors of a checkpoint to our names, each exactly once.

    Args:
        method: its CLIP is stored under "clip." or without a prefix.
        state: tensors by released names.
        heads: our prefix and the released prefix of each module that the method adds.
        unused: regular expression of released names that the paper's code does not use.

    Raises:
        ValueError: a tensor is missing or unexpected; the first few are named.
    """
    return renamed(method, state, released_names(method, heads), unused)


def renamed(
    method: Method, state: Mapping[str, Tensor], theirs: Mapping[str, str], unused: str = "(?!)"
) -> dict[str, Tensor]:
    """Rename the tensors of a checkpoint; `theirs` maps our names to the released ones, else as `by_name`."""
    bare = {name.removeprefix("clip.") for name in theirs.values() if name.startswith("clip.")}
    state = {f"clip.{name}" if name in bare else name: tensor for name, tensor in state.items()}
    expected = set(theirs.values())
    misfits = misfit_text(
        missing=[name for name in theirs.values() if name not in state],
        unexpected=[
            name
            for name in state
            if name not in expected and not re.fullmatch(f"{unused}|{NOT_WEIGHTS}", name)
        ],
    )
    if misfits:
        raise ValueError(f"checkpoint does not fit {method.config.name}: {misfits}")
    return {ours: state[name] for ours, name in theirs.items()}


def released_names(method: Method, heads: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Released names of those of our parameters that the release has; `heads` as in `by_name`."""
    theirs = {name: f"clip.{openai_name(name)}" for name in clip_names(method.architecture)}
    for name, _ in method.named_parameters():
        match = [(ours, prefix) for ours, prefix in heads if name.startswith(ours)]
        if match and name not in theirs:
            ours, prefix = match[0]
            theirs[name] = _block_name(prefix + name.removeprefix(ours))
    return theirs


def _block_name(name: str) -> str:
    for ours, theirs in BLOCK_NAMES:
        name = name.replace(ours, theirs)
    return name
