"""Towers of open_clip beside plain CLIP: features and gradients are those of open_clip's own code."""

import dataclasses

import open_clip
import pytest
import torch

from discovla.towers.architecture import Architecture
from discovla.towers.configs import architecture_from_config
from discovla.towers.names import stored_names
from discovla.towers.weights import clip_names, load_weights, openai_weights
from tests.towers.open_clip_towers import build_theirs, differences, error, loaded, pair, small_config

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


def taken() -> list[str]:
    """Return the names of open_clip's models that are taken."""
    names = []
    for name in open_clip.list_models():
        try:
            architecture_from_config(name, open_clip.get_model_config(name))
        except ValueError:
            continue
        names.append(name)
    return names


@pytest.mark.parametrize("name", SMALL)
def test_features_and_every_gradient_are_those_of_open_clip(name):
    errors = differences(pair(name, layers=1))
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] <= 1e-10, f"{worst}: {errors[worst]}"


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(taken()) - set(SMALL)))
def test_features_and_every_gradient_of_all_models_are_those_of_open_clip(name):
    errors = differences(pair(name, side=2))
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] <= 1e-10, f"{worst}: {errors[worst]}"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["PE-Core-B-16", "ViT-B-16-SigLIP2", "EVA02-B-16", "MobileCLIP2-B"])
def test_features_of_whole_models_are_those_of_open_clip(name):
    config = open_clip.get_model_config(name)
    architecture = architecture_from_config(name, config)
    theirs = build_theirs(config).double()
    ours, size = loaded(architecture, theirs), architecture.image_size
    images = torch.randn(1, 3, size, size, dtype=torch.float64)
    ids = torch.randint(3, architecture.vocab_size - 2, (2, architecture.context_length))
    with torch.no_grad():
        assert error(ours.vision(images[:, None])[:, 0], theirs.encode_image(images)) <= 1e-10
        assert error(ours.text(ids, None, dtype=torch.float64), theirs.encode_text(ids)) <= 1e-10


@pytest.mark.parametrize("name", ["EVA02-B-16", "MobileCLIP2-B", "coca_ViT-B-32"])
def test_an_unknown_or_missing_weight_is_named(name):
    config, architecture = small_config(name, layers=1, side=2)
    models = build_theirs(config, layers=1)
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
    theirs = build_theirs(config, layers=1)
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
