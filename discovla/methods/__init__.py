"""Retrieval methods, one paper per file; METHODS names them."""

from __future__ import annotations

from discovla.methods.base import Method
from discovla.methods.basis import Basis
from discovla.methods.clip import CLIP
from discovla.methods.clip2video import CLIP2Video
from discovla.methods.clip4clip import CLIP4Clip
from discovla.methods.config import MethodConfig
from discovla.methods.discovla import DiscoVLA
from discovla.methods.released import load_released
from discovla.methods.t2vparser import T2VParser
from discovla.methods.tempme import TempMe
from discovla.towers.weights import ModelConfig, initialise, load_pretrained, load_weights

METHODS: dict[str, type[Method]] = {
    "clip": CLIP,
    "discovla": DiscoVLA,
    "clip4clip": CLIP4Clip,
    "clip2video": CLIP2Video,
    "t2vparser": T2VParser,
    "tempme": TempMe,
    "basis": Basis,
}


def build(model: ModelConfig, method: MethodConfig) -> Method:
    """Build a method with pretrained, random or released weights, frozen but for what it trains."""
    pretrained = load_pretrained(model)
    built = METHODS[method.name](pretrained.architecture, method)
    if pretrained.weights is None:
        initialise(built, pretrained.architecture, model.seed, model.position_std)
    else:
        try:
            load_weights(built, pretrained.architecture, pretrained.weights)
        except ValueError as error:
            raise ValueError(f"{model.pretrained}: {error}") from error
    built.check_loss()
    built.initialise_from_clip()
    if method.released is not None:
        load_released(built, method.released)
    built.freeze()
    return built
