"""CLIP weights under Hugging Face's names, as papers built on it release them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

Rules = Sequence[tuple[str, str]]

# ours -> Hugging Face's, as regular expressions, applied in this order
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
# what such files hold beside weights of ours
UNUSED = r"(.*\.)?(position_ids|logit_scale)"


def from_hugging_face(
    own: Mapping[str, Tensor], rules: Rules, state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Our parameters from a state dict, each exactly once.

    Separate query, key and value projections become one; projections to the joint space are transposed.

    Args:
        own: our parameters by name; only their shapes are looked at.
        rules: from our names to theirs, of what is not plain CLIP; `BLOCK_RULES` and `CLIP_RULES` follow.
        state: by their names, without prefixes (`without_prefixes`).

    Raises:
        ValueError: tensors are missing or unexpected; the first few are named.
    """
    theirs = {name: _theirs(name, (*rules, *BLOCK_RULES, *CLIP_RULES)) for name in own}
    expected = {part for parts in theirs.values() for part in parts}
    wrong = [f"missing {part}" for parts in theirs.values() for part in parts if part not in state]
    wrong += [f"unexpected {n}" for n in state if n not in expected and not re.fullmatch(UNUSED, n)]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(f"checkpoint does not fit: {'; '.join(wrong[:5])}{more}")
    found = {name: torch.cat([state[part] for part in parts]) for name, parts in theirs.items()}
    return {
        name: tensor.T if name in ("vision.projection", "text.projection") else tensor
        for name, tensor in found.items()
    }


def without_prefixes(state: Mapping[str, Tensor], anchors: Iterable[str]) -> dict[str, Tensor]:
    """The state with what stands before its parts' names taken away.

    Args:
        state: by names such as "backbone.vision.layers.0.mlp.fc1.bias".
        anchors: one name of each part, bare; what precedes it in the state precedes the whole part.

    Raises:
        ValueError: an anchor is missing, or there more than once.
    """
    prefixes = []
    for anchor in anchors:
        found = [name for name in state if name == anchor or name.endswith(f".{anchor}")]
        if len(found) != 1:
            raise ValueError(f"checkpoint: expected one tensor named ...{anchor}, found {len(found)}")
        prefixes.append(found[0].removesuffix(anchor))
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
    """Hugging Face's names of one of our parameters: three for a joint projection."""
    for ours, theirs in rules:
        name = re.sub(ours, theirs, name)
    if "qkv_proj" in name:
        return tuple(name.replace("qkv_proj", f"{part}_proj") for part in "qkv")
    return (name,)
