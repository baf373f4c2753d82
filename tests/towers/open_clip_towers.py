"""open_clip's own models with random weights, shallow and narrow, and the same model of ours."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import open_clip
import timm
import torch
from open_clip import timm_model
from torch import Tensor, nn

from discovla.methods.clip import CLIP, CLIPConfig
from discovla.towers.architecture import Architecture, TowerShape
from discovla.towers.configs import architecture_from_config
from discovla.towers.names import stored_names
from discovla.towers.weights import clip_names, load_weights

VOCABULARY = 300


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One model in both libraries, in float64."""

    theirs: Any
    ours: CLIP
    architecture: Architecture


def small_config(name: str, *, layers: int, side: int) -> tuple[dict[str, Any], Architecture]:
    """Return open_clip's config and our architecture, with few layers, heads, patches and token ids.

    Heads keep their width and MLPs their ratio; only MobileCLIP's stem fixes the width of its tower.
    """
    config = copy.deepcopy(open_clip.get_model_config(name))
    whole = architecture_from_config(name, config)
    vision = whole.vision if whole.frames.stem else narrow(whole.vision)
    architecture = replace(
        whole,
        embed_dim=64 if whole.frames.projection else vision.width,
        image_size=side * whole.patch_size + whole.image_size % whole.patch_size,
        vocab_size=VOCABULARY,
        vision=replace(vision, layers=layers),
        text=replace(narrow(whole.text), layers=layers),
    )
    frames, pool_mlp = whole.frames, whole.frames.pool_mlp_width / whole.vision.width
    if frames.pool == "attention":
        heads = vision.heads if frames.pool_heads == whole.vision.heads else frames.pool_heads
        frames = replace(frames, pool_heads=heads, pool_mlp_width=scaled(pool_mlp, vision.width))
    architecture = replace(architecture, frames=frames)
    config["embed_dim"] = architecture.embed_dim
    config["vision_cfg"]["image_size"] = architecture.image_size
    if "layers" in config["vision_cfg"]:
        config["vision_cfg"] |= {"layers": layers, "width": vision.width}
    text = architecture.text
    sizes = {"vocab_size": VOCABULARY, "layers": layers, "width": text.width, "heads": text.heads}
    config["text_cfg"] |= sizes
    if "multimodal_cfg" in config:
        config["multimodal_cfg"] |= sizes | {"layers": 1}
    return config, architecture


def narrow(tower: TowerShape) -> TowerShape:
    """Return a tower with two heads of the same width."""
    width = 2 * tower.width // tower.heads
    return replace(tower, width=width, heads=2, mlp_width=scaled(tower.mlp_width / tower.width, width))


def scaled(ratio: float, width: int) -> int:
    """Return ratio * width, rounded down as both libraries do, but for errors of rounding."""
    return int(ratio * width + 1e-6)


def build_theirs(
    config: dict[str, Any], *, architecture: Architecture | None = None, seed: int = 0
) -> nn.Module:
    """Build open_clip's model with every parameter random; timm's tower with the sizes of `architecture`."""
    torch.manual_seed(seed)
    arguments = {k: v for k, v in config.items() if k not in ("custom_text", "multimodal_cfg")}
    extra = {}
    if architecture is not None:
        extra = {"img_size": architecture.image_size, "depth": architecture.vision.layers}
    if architecture is not None and not architecture.frames.stem:
        extra |= {"embed_dim": architecture.vision.width, "num_heads": architecture.vision.heads}
    before = timm.create_model

    def small(*names: Any, **options: Any) -> nn.Module:
        return before(*names, **extra, **options)

    timm_model.timm.create_model = small
    try:
        if "multimodal_cfg" in config:
            model = open_clip.CoCa(**arguments, multimodal_cfg=config["multimodal_cfg"])
        elif config.get("custom_text"):
            model = open_clip.CustomTextCLIP(**arguments)
        else:
            model = open_clip.CLIP(**arguments)
    finally:
        timm_model.timm.create_model = before
    with torch.no_grad():  # constants would hide an exchange of two parameters
        for key, value in [*model.named_parameters(), *model.named_buffers()]:
            if value.is_floating_point() and "mask" not in key and "rope" not in key:
                noise = torch.randn_like(value) * 0.05
                value.add_(noise.abs() if "running_var" in key else noise)
    return model.eval()


def whole_pair(name: str) -> Pair:
    """Return a model of open_clip at its full size, and ours with its weights, in float64."""
    config = open_clip.get_model_config(name)
    architecture = architecture_from_config(name, config)
    theirs = build_theirs(config).double()
    return Pair(theirs=theirs, ours=loaded(architecture, theirs), architecture=architecture)


def pair(name: str, *, layers: int = 2, side: int = 3) -> Pair:
    """Return a model of open_clip by its name, narrow, and ours with its weights, in float64."""
    config, architecture = small_config(name, layers=layers, side=side)
    theirs = build_theirs(config, architecture=architecture).double()
    return Pair(theirs=theirs, ours=loaded(architecture, theirs), architecture=architecture)


def loaded(architecture: Architecture, theirs: nn.Module) -> CLIP:
    """Return our model with the weights of theirs, read by their names."""
    dtype = next(theirs.parameters()).dtype
    ours = CLIP(architecture, CLIPConfig()).to(dtype).eval()
    ours.compute_dtype = dtype
    state = {name.removeprefix("text."): tensor for name, tensor in theirs.state_dict().items()}
    load_weights(ours, architecture, state)
    return ours


def captions(architecture: Architecture, n: int = 3) -> Tensor:
    """Return ids n l with the tower's own end and padding; the first caption fills the context."""
    generator = torch.Generator().manual_seed(1)
    length, form = architecture.context_length, architecture.captions
    ids = torch.randint(3, architecture.vocab_size - 2, (n, length), generator=generator)
    largest = form.readout in ("largest", "class")
    end = architecture.vocab_size - 1 if largest else form.end_id
    padding = 1 if form.readout == "end" and form.end_id == 2 else 0
    for row in range(n):
        last = max(1, (length - 1) // (row + 1))
        ids[row, last] = end
        ids[row, last + 1 :] = padding
    return ids


def differences(models: Pair) -> dict[str, float]:
    """Return the relative error of features and of every gradient.

    Their weights are released before our backward pass, so that whole models fit in memory.
    """
    theirs, ours, architecture = models.theirs, models.ours, models.architecture
    generator = torch.Generator().manual_seed(2)
    size = architecture.image_size
    dtype = ours.compute_dtype
    images = torch.randn(2, 3, size, size, generator=generator, dtype=dtype)
    ids = captions(architecture)
    options = {"normalize": False}
    want = theirs.encode_image(images, **options), theirs.encode_text(ids, **options)
    weights = [torch.randn(x.shape, generator=generator, dtype=dtype) for x in want]
    sum((x * w).sum() for x, w in zip(want, weights, strict=True)).backward()
    want = [x.detach() for x in want]
    their_grads = {n.removeprefix("text."): p.grad for n, p in theirs.named_parameters()}
    theirs.to("meta")
    got = ours.vision(images[:, None])[:, 0], ours.text(ids, None, dtype=dtype)
    errors = {"image": error(got[0], want[0]), "text": error(got[1], want[1])}
    sum((x * w).sum() for x, w in zip(got, weights, strict=True)).backward()
    own = dict(ours.named_parameters())
    for name, form in stored_names(architecture, clip_names(architecture)).items():
        if name not in own or name.startswith("logit_scale"):
            continue
        want_grad = form.read(their_grads).reshape(own[name].shape)
        errors[name] = error(own[name].grad, want_grad)
    return errors


def error(got: Tensor, want: Tensor) -> float:
    """Return the largest difference, relative to the largest value."""
    return ((got - want).abs().max() / want.abs().max().clamp(min=1e-12)).item()
