"""Checkpoints of the papers' own code, read by their names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from discovla.methods.base import Method
from discovla.towers.weights import clip_names, openai_name, read_weights

# ours -> OpenAI's, inside a block
BLOCK_NAMES = (
    (".blocks.", ".resblocks."),
    ("attention.qkv.", "attn.in_proj_"),
    ("attention.out.", "attn.out_proj."),
    ("mlp.up.", "mlp.c_fc."),
    ("mlp.down.", "mlp.c_proj."),
)
# attributes of released models that are no weights of theirs
NO_WEIGHTS = r"clip\.(input_resolution|context_length|vocab_size)"


def load_released(method: Method, path: Path | str) -> None:
    """Load a checkpoint that the paper's own code wrote, strictly.

    Args:
        method: its own parameters (LoRA, fusion) that no release has are left alone.
        path: .bin, .pt or .safetensors; the prefix "module." is dropped.

    Raises:
        ValueError: parameters are missing, unexpected or of another shape; the first few are named.
    """
    found = method.released_parameters(read_weights(Path(path))[0])
    own = dict(method.named_parameters())
    wrong = [
        f"{name}: expected {tuple(own[name].shape)}, found {tuple(tensor.shape)}"
        for name, tensor in found.items()
        if own[name].shape != tensor.shape
    ]
    if wrong:
        raise ValueError(f"{path}: {_first(wrong)}")
    with torch.no_grad():
        for name, tensor in found.items():
            own[name].copy_(tensor)


def by_name(
    method: Method, state: Mapping[str, Tensor], heads: Sequence[tuple[str, str]], unused: str = "(?!)"
) -> dict[str, Tensor]:
    """A checkpoint's tensors by our names, each exactly once.

    Args:
        method: whose CLIP the release keeps under "clip." (or under nothing).
        state: the checkpoint's.
        heads: our prefix of what the method adds, and the release's.
        unused: regular expression of names that a release holds and does not use.

    Raises:
        ValueError: a tensor is missing or unexpected; the first few are named.
    """
    theirs = released_names(method, heads)
    bare = {name.removeprefix("clip.") for name in theirs.values() if name.startswith("clip.")}
    state = {f"clip.{name}" if name in bare else name: tensor for name, tensor in state.items()}
    expected = set(theirs.values())
    wrong = [f"missing {name}" for name in theirs.values() if name not in state]
    wrong += [
        f"unexpected {name}"
        for name in state
        if name not in expected and not re.fullmatch(f"{unused}|{NO_WEIGHTS}", name)
    ]
    if wrong:
        raise ValueError(f"checkpoint does not fit {method.config.name}: {_first(wrong)}")
    return {ours: state[name] for ours, name in theirs.items()}


def released_names(method: Method, heads: Sequence[tuple[str, str]]) -> dict[str, str]:
    """The release's names of our parameters, of those it has; `heads` as in `by_name`."""
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


def _first(wrong: list[str]) -> str:
    more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
    return "; ".join(wrong[:5]) + more
