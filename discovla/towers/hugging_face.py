"""CLIP weights by Hugging Face's names, as papers built on that library release them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from discovla.towers.weights import misfit_text

Rules = Sequence[tuple[str, str]]

# our names -> Hugging Face's, as regular expressions, applied in this order
BLOCK_RULES: Rules = (
    (r"\.attention\.qkv\.", ".self_attn.qkv_proj."),
    (r"\.attention\.out\.", ".self_attn.out_proj."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.mlp\.up\.", ".mlp.fc1."),
    (r"\.mlp\.down\.", ".mlp.fc2."),
)
CLIP_RULES: Rules = (
    (r"^vision\.projection$", "visual_projection.weight"),
    (r"^vision\.(patch|position)_embedding$", r"\1_embedding.weight"),
    (r"^vision\.ln_pre\.", "pre_layrnorm."),
    (r"^vision\.ln_post\.", "post_layernorm."),
    (r"^vision\.blocks\.", "layers."),
    (r"^vision\.", ""),
    (r"^text\.projection$", "text_projection.weight"),
    (r"^text\.token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^text\.position_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^text\.ln_final\.", "text_model.final_layer_norm."),
    (r"^text\.blocks\.", "text_model.encoder.layers."),
)
# entries of such files that are not parameters of ours
UNUSED = r"(.*\.)?(position_ids|logit_scale)"


def from_hugging_face(
    own: Mapping[str, Tensor], rules: Rules, state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Convert a state dict to our parameters, each exactly once.

    Separate query, key and value projections become one; projections to the joint space are transposed.

    Args:
        own: our parameters by name.
        rules: from our names to theirs, for modules beside plain CLIP; applied before `BLOCK_RULES` and
            `CLIP_RULES`.
        state: tensors by their names, without prefixes (`without_prefixes`).

    Raises:
        ValueError: tensors are missing or unexpected; the first few are named.
    """
    theirs = {name: _theirs(name, (*rules, *BLOCK_RULES, *CLIP_RULES)) for name in own}
    expected = {part for parts in theirs.values() for part in parts}
    misfits = misfit_text(
        missing=[part for parts in theirs.values() for part in parts if part not in state],
        unexpected=[n for n in state if n not in expected and not re.fullmatch(UNUSED, n)],
    )
    if misfits:
        raise ValueError(f"checkpoint does not fit: {misfits}")
    joined = {name: torch.cat([state[part] for part in parts]) for name, parts in theirs.items()}
    return {
        name: tensor.T if name in ("vision.projection", "text.projection") else tensor
        for name, tensor in joined.items()
    }


def without_prefixes(state: Mapping[str, Tensor], anchors: Iterable[str]) -> dict[str, Tensor]:
    """Remove the prefix of each part of a model from the names of a state dict.

    Args:
        state: tensors by names such as "backbone.vision.layers.0.mlp.fc1.bias".
        anchors: one bare name from each part; its prefix in the state is that of the whole part.

    Raises:
        ValueError: an anchor is missing or occurs more than once, or two names become one.
    """
    prefixes = []
    for anchor in anchors:
        matches = [name for name in state if name == anchor or name.endswith(f".{anchor}")]
        if len(matches) != 1:
            raise ValueError(f"checkpoint: expected one tensor named ...{anchor}, found {len(matches)}")
        prefixes.append(matches[0].removesuffix(anchor))
    prefixes.sort(key=len, reverse=True)
    bare: dict[str, Tensor] = {}
    for name, tensor in state.items():
        prefix = next((p for p in prefixes if name.startswith(p)), "")
        short = name.removeprefix(prefix)
        if short in bare:
            raise ValueError(f"checkpoint: expected one tensor named ...{short}, found another, {name}")
        bare[short] = tensor
    return bare


def _theirs(name: str, rules: Rules) -> tuple[str, ...]:
    """Hugging Face's names of one of our parameters: three for a qkv projection."""
    for ours, theirs in rules:
        name = re.sub(ours, theirs, name)
    if "qkv_proj" in name:
        return tuple(name.replace("qkv_proj", f"{part}_proj") for part in "qkv")
    return (name,)
