"""Names and forms in which open_clip stores the parameters of two towers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from discovla.towers.architecture import Architecture

Rules = Sequence[tuple[str, str]]

# our names -> OpenAI's, which are open_clip's too, applied in this order
OPENAI_NAMES: Rules = (
    ("logit_scale.log", "logit_scale"),
    ("logit_scale.bias", "logit_bias"),
    ("vision.patch_embedding", "visual.conv1.weight"),
    ("vision.projection", "visual.proj"),
    ("vision.", "visual."),
    ("text.projection", "text_projection"),
    ("text.class_embedding", "cls_emb"),
    ("text.", ""),
    ("position_embedding", "positional_embedding"),
    ("blocks.", "transformer.resblocks."),
    ("attention.layer_scale.", "ls_1."),
    ("mlp.layer_scale.", "ls_2."),
    ("attention.qkv.", "attn.in_proj_"),
    ("attention.out.", "attn.out_proj."),
    ("mlp.up.", "mlp.c_fc."),
    ("mlp.down.", "mlp.c_proj."),
)
# our names of a vision tower -> those of timm's, as regular expressions, applied in this order
TIMM_NAMES: Rules = (
    (r"^vision\.patch_embedding$", "vision.patch_embed.proj.weight"),
    (r"^vision\.patch_bias$", "vision.patch_embed.proj.bias"),
    (r"^vision\.stem\.", "vision.patch_embed.backbone."),
    (r"^vision\.class_embedding$", "vision.cls_token"),
    (r"^vision\.position_embedding$", "vision.pos_embed"),
    (r"^vision\.ln_pre\.", "vision.norm_pre."),
    (r"^vision\.ln_post\.", "vision.norm."),
    (r"^vision\.projection$", "vision.head.weight"),
    (r"^vision\.projection_bias$", "vision.head.bias"),
    (r"^vision\.pool\.", "vision.attn_pool."),
    (r"attn_pool\.query\.", "attn_pool.q."),
    (r"attn_pool\.key_value\.", "attn_pool.kv."),
    (r"attn_pool\.out\.", "attn_pool.proj."),
    (r"attn_pool\.ln\.", "attn_pool.norm."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.attention\.qkv\.", ".attn.qkv."),
    (r"\.attention\.out\.", ".attn.proj."),
    (r"\.attention\.ln_inner\.", ".attn.norm."),
    (r"\.mlp\.ln_inner\.", ".mlp.norm."),
    (r"\.mlp\.up\.", ".mlp.fc1."),
    (r"\.mlp\.down\.", ".mlp.fc2."),
    (r"^vision\.", "visual.trunk."),
)
# CoCa's pool: our name -> tensors to join along the first axis, and the rows of the result, in units of the
# width of the features
LATENT_POOL: Mapping[str, tuple[tuple[str, ...], slice | None]] = {
    "latent": (("query",), None),
    "query.weight": (("attn.q_proj_weight",), None),
    "query.bias": (("attn.in_proj_bias",), slice(0, 1)),
    "key_value.weight": (("attn.k_proj_weight", "attn.v_proj_weight"), None),
    "key_value.bias": (("attn.in_proj_bias",), slice(1, 3)),
    "out.weight": (("attn.out_proj.weight",), None),
    "out.bias": (("attn.out_proj.bias",), None),
    "ln_query.weight": (("ln_q.weight",), None),
    "ln_query.bias": (("ln_q.bias",), None),
    "ln_rows.weight": (("ln_k.weight",), None),
    "ln_rows.bias": (("ln_k.bias",), None),
}
# entries of open_clip's files that are no parameters of the towers: a counter of batch norms
COUNTER = r".*\.num_batches_tracked"
CAPTIONER = r"text_decoder\..*"  # of CoCa


@dataclass(frozen=True, kw_only=True)
class Stored:
    """Form of one of our parameters in a file.

    names: tensors that are joined along their first axis.
    transposed: the file holds outputs by inputs, we hold inputs by outputs.
    leading: axes of length 1 before ours.
    rows: part of the joined tensor along its first axis; None for all of it.
    """

    names: tuple[str, ...]
    transposed: bool = False
    leading: int = 0
    rows: slice | None = None

    def read(self, state: Mapping[str, Tensor]) -> Tensor:
        """Return our parameter from tensors by their names."""
        parts = [state[name] for name in self.names]
        tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
        tensor = tensor if self.rows is None else tensor[self.rows]
        if self.leading and tensor.dim() > self.leading and set(tensor.shape[: self.leading]) == {1}:
            tensor = tensor.flatten(0, self.leading)
        return tensor.T if self.transposed else tensor

    def write(self, tensor: Tensor) -> dict[str, Tensor]:
        """Return the tensors of a file from our parameter.

        Raises:
            ValueError: our parameter is a part of a tensor.
        """
        if self.rows is not None:
            raise ValueError(f"{self.names[0]}: expected a whole tensor to write, found a part of one")
        tensor = (tensor.T if self.transposed else tensor)[(None,) * self.leading]
        parts = tensor.chunk(len(self.names)) if len(self.names) > 1 else (tensor,)
        return {name: part.clone() for name, part in zip(self.names, parts, strict=True)}


def openai_name(name: str) -> str:
    """Convert our name of a parameter of a plain CLIP to OpenAI's, which is open_clip's too."""
    for ours, theirs in OPENAI_NAMES:
        name = name.replace(ours, theirs)
    return name


def stored_names(architecture: Architecture, names: Iterable[str]) -> dict[str, Stored]:
    """Return the form of each of our parameters in a file of open_clip; "text." is left out."""
    return {name: _stored(architecture, name) for name in names}


def unused_names(architecture: Architecture) -> str:
    """Return a regular expression for entries of a file that the towers do not use."""
    return f"{COUNTER}|{CAPTIONER}" if architecture.captions.readout == "class" else COUNTER


def _stored(architecture: Architecture, name: str) -> Stored:
    frames, captions = architecture.frames, architecture.captions
    if name.startswith("text.projection") and captions.projection_bias:
        part = "bias" if name.endswith("bias") else "weight"
        return Stored(names=(f"text_projection.{part}",), transposed=part == "weight")
    if name.startswith("vision.pool.") and frames.pool == "latent":
        return _latent_pool(architecture, name.removeprefix("vision.pool."))
    if not name.startswith("vision.") or frames.names == "open_clip":
        return Stored(names=(openai_name(name),))
    theirs = name
    for ours, replacement in TIMM_NAMES:
        theirs = re.sub(ours, replacement, theirs)
    if name in ("vision.class_embedding", "vision.pool.latent"):
        return Stored(names=(theirs,), leading=2)
    if name == "vision.position_embedding":
        return Stored(names=(theirs,), leading=1)
    return Stored(names=_parts(architecture, theirs), transposed=name == "vision.projection")


def _parts(architecture: Architecture, theirs: str) -> tuple[str, ...]:
    """Names of the tensors that timm's EVA keeps apart."""
    shape = architecture.vision
    kind = theirs.rpartition(".")[2]
    if ".attn.qkv." in theirs and not shape.key_bias:
        stem = theirs.removesuffix(f"qkv.{kind}")
        if shape.inner_norm:
            return tuple(f"{stem}{part}_proj.{kind}" for part in ("qkv" if kind == "weight" else "qv"))
        return (theirs,) if kind == "weight" else (f"{stem}q_bias", f"{stem}v_bias")
    if ".mlp.fc1." in theirs and shape.activation == "swiglu" and "attn_pool" not in theirs:
        return tuple(theirs.replace("fc1", part) for part in ("fc1_g", "fc1_x"))
    return (theirs,)


def _latent_pool(architecture: Architecture, name: str) -> Stored:
    parts, units = LATENT_POOL[name]
    width = architecture.embed_dim
    rows = None if units is None else slice(units.start * width, units.stop * width)
    return Stored(names=tuple(f"visual.attn_pool.{part}" for part in parts), rows=rows)
