"""Towers of open_clip beside plain CLIP: features and gradients are those of open_clip's own code."""

import dataclasses

import open_clip
import pytest
import torch

from discovla.towers.architecture import Architecture
from discovla.towers.configs import architecture_from_config
from discovla.towers.names import stored_names
from discovla.towers.weights import clip_names, load_weights, openai_weights
from tests.towers.open_clip_towers import build_theirs, differences, loaded, pair, small_config

# the smallest model of each kind of tower
SMALL = (
    "PE-Core-T-16-384",
    "ViT-B-16-SigLIP",
    "ViT-B-32-SigLIP2-256",
    "EVA02-B-16",
    "MobileCLIP2-B",
    "coca_ViT-B-32",
    "ViT-M-16-alt",
    "ViT-L-14-CLIPA",
    "ViT-L-14-worldwide",
)


def taken() -> dict[str, Architecture]:
    """Return the architectures of open_clip's models that are taken."""
    architectures = {}
    for name in open_clip.list_models():
        try:
            architectures[name] = architecture_from_config(name, open_clip.get_model_config(name))
        except ValueError:
            continue
    return architectures


TAKEN = taken()


def kinds() -> list[str]:
    """Return the narrowest model for each distinct combination of features."""
    narrowest: dict[str, tuple[int, str]] = {}
    for name, architecture in TAKEN.items():
        kind, model = repr(without_sizes(architecture)), (architecture.vision.width, name)
        narrowest[kind] = min(narrowest.get(kind, model), model)
    return sorted(name for _, name in narrowest.values())


def without_sizes(architecture: Architecture) -> tuple:
    """Return what `small_config` does not change of an architecture and does not take from its frames."""
    sizes = {"width": 0, "layers": 0, "heads": 0, "mlp_width": 0}
    rotation = architecture.frames.rotation
    return (
        architecture.activation,
        architecture.logit_bias,
        architecture.image_size % architecture.patch_size > 0,
        dataclasses.replace(architecture.vision, **sizes),
        dataclasses.replace(architecture.text, **sizes),
        dataclasses.replace(
            architecture.frames,
            pool_heads=0,
            pool_mlp_width=0,
            rotation=None if rotation is None else dataclasses.replace(rotation, grid=0),
        ),
        dataclasses.replace(architecture.captions, tokenizer="", start_token=False),
    )


@pytest.mark.parametrize("name", kinds())
def test_features_and_every_gradient_are_those_of_open_clip(name):
    errors = differences(pair(name))
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] <= 1e-10, f"{worst}: {errors[worst]}"


LARGE = ("ViT-g-14", "PE-Core-L-14-336", "ViT-SO400M-16-SigLIP2-512", "EVA02-L-14", "coca_ViT-L-14")


@pytest.mark.parametrize(
    "name", [*LARGE, *(pytest.param(n, marks=pytest.mark.slow) for n in TAKEN if n not in LARGE)]
)
def test_whole_models_have_the_weights_and_heads_of_open_clips(name):
    architecture = TAKEN[name]
    with torch.device("meta"):
        theirs = build_theirs(open_clip.get_model_config(name))
        loaded(architecture, theirs)  # refuses other names and shapes
    trunk = getattr(theirs.visual, "trunk", theirs.visual)
    text = theirs.text.transformer if hasattr(theirs, "text") else theirs.transformer
    vision_blocks = trunk.blocks if hasattr(trunk, "blocks") else trunk.transformer.resblocks
    heads = vision_blocks[0].attn.num_heads, text.resblocks[0].attn.num_heads
    assert (architecture.vision.heads, architecture.text.heads) == heads
    if architecture.frames.pool == "attention":
        assert architecture.frames.pool_heads == trunk.attn_pool.num_heads
    if architecture.frames.rotation is not None:
        assert tuple(trunk.rope.ref_feat_shape) == (architecture.frames.rotation.grid,) * 2


@pytest.mark.parametrize("name", ["EVA02-B-16", "MobileCLIP2-B", "coca_ViT-B-32"])
def test_an_unknown_or_missing_weight_is_named(name):
    config, architecture = small_config(name, layers=1, side=2)
    models = build_theirs(config, architecture=architecture)
    state = {n.removeprefix("text."): t for n, t in models.state_dict().items()}
    ours = loaded(architecture, models)
    with pytest.raises(ValueError, match=r"unexpected visual\.trunk\.rest"):
        load_weights(ours, architecture, {**state, "visual.trunk.rest": torch.zeros(1)})
    for form in stored_names(architecture, clip_names(architecture)).values():
        part = form.names[-1]
        with pytest.raises(ValueError, match=f"missing {part}"):
            load_weights(ours, architecture, {n: t for n, t in state.items() if n != part})


@pytest.mark.parametrize("name", ["PE-Core-T-16-384", "EVA02-B-16", "MobileCLIP2-B"])
def test_weights_are_written_as_open_clip_reads_them(name):
    config, architecture = small_config(name, layers=1, side=2)
    theirs = build_theirs(config, architecture=architecture)
    ours = loaded(architecture, theirs)
    want = {n.removeprefix("text."): t for n, t in theirs.state_dict().items()}
    got = openai_weights(ours, architecture)
    assert {n for n in want if "num_batches" not in n and "attn_mask" not in n} == set(got)
    assert all(torch.equal(got[n], want[n]) for n in got)


@pytest.mark.parametrize("name", SMALL)
def test_an_architecture_survives_its_plain_values(name):
    architecture = architecture_from_config(name, open_clip.get_model_config(name))
    assert Architecture.from_dict(architecture.to_dict()) == architecture


def test_plain_values_of_clip_are_its_sizes():
    architecture = architecture_from_config("ViT-B-32", open_clip.get_model_config("ViT-B-32"))
    assert set(architecture.to_dict()) == {
        *("embed_dim", "image_size", "patch_size", "context_length", "vocab_size", "activation"),
        *("vision", "text"),
    }
    assert not dataclasses.replace(architecture, logit_bias=True).plain


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("MobileCLIP2-S0", "FastViT, a convolutional tower"),
        ("RN50", "a ResNet"),
        ("EVA02-E-14", "norms after attention and MLP"),
        ("roberta-ViT-B-32", "Hugging Face's roberta-base"),
    ],
)
def test_other_towers_are_refused_with_the_reason(name, reason):
    with pytest.raises(ValueError, match=reason):
        architecture_from_config(name, open_clip.get_model_config(name))
