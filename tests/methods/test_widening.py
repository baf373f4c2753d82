"""Features leave the towers in float32 at least, so that similarities and losses are computed in it."""

import pytest
import torch

from discovla.engine.strategy import cast_frozen
from discovla.methods.clip import CLIP, CLIPConfig
from discovla.methods.clip2video import CLIP2Video, CLIP2VideoConfig
from discovla.methods.clip4clip import CLIP4Clip, CLIP4ClipConfig
from discovla.methods.discovla import DiscoVLA, DiscoVLAConfig
from discovla.methods.t2vparser import T2VParser, T2VParserConfig
from discovla.nn.features import widen
from discovla.testing import noise_batch, tiny_architecture
from discovla.towers.weights import initialise

METHODS = {
    "clip": (CLIP, CLIPConfig()),
    "clip, tokens": (CLIP, CLIPConfig(similarity="tokens")),
    "clip, tokens, aligned": (CLIP, CLIPConfig(similarity="tokens", alpha=0.3, beta=0.5)),
    "clip4clip": (CLIP4Clip, CLIP4ClipConfig(head_layers=1)),
    "clip2video": (CLIP2Video, CLIP2VideoConfig(head_layers=1)),
    "discovla": (DiscoVLA, DiscoVLAConfig(fused_vision_blocks=1, fused_text_blocks=1)),
    "t2vparser": (T2VParser, T2VParserConfig(stan_layers=1)),
}


@pytest.mark.parametrize("name", METHODS)
def test_embeddings_scores_and_losses_of_a_method_in_bfloat16_are_float32(name):
    cls, config = METHODS[name]
    architecture = tiny_architecture()
    method = cls(architecture, config)
    initialise(method, architecture, seed=0)
    method.freeze()
    method.compute_dtype = torch.bfloat16
    cast_frozen(method, torch.bfloat16)
    text, video = method.encode(noise_batch(architecture, frames=4))
    for side in (text, video):
        kinds = {key: x.dtype for key, x in side.tensors().items() if x.is_floating_point()}
        assert set(kinds.values()) == {torch.float32}, kinds
    losses = method.losses(text, video)
    assert losses.total.dtype == torch.float32
    assert method.similarity(text, video).dtype == torch.float32


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
    ids=str,
)
def test_features_are_widened_to_float32_and_float64_stays(dtype, wide):
    assert widen(torch.ones(2, dtype=dtype)).dtype == wide
