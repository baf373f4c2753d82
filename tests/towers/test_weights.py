import json
import logging
import time
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from discovla.methods import build
from discovla.methods.clip import CLIP, CLIPConfig
from discovla.testing import random_captions, relative_error, tiny_architecture
from discovla.towers.architecture import Architecture
from discovla.towers.configs import architecture_from_config
from discovla.towers.weights import (
    ModelConfig,
    initialise,
    load_pretrained,
    openai_weights,
    read_drawn_clip,
    read_weights,
    weights_origin,
    write_drawn_clip,
)

ODD_HEADS = {
    "embed_dim": 24,
    "vision_cfg": {
        "image_size": 30,
        "patch_size": 10,
        "width": 60,
        "layers": 2,
        "head_width": 20,
        "mlp_ratio": 4.3637,
    },
    "text_cfg": {"context_length": 13, "vocab_size": 70, "width": 40, "heads": 5, "layers": 3},
}
ODD_QUICK = {
    "embed_dim": 16,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 24, "patch_size": 8, "width": 64, "layers": 3},
    "text_cfg": {"context_length": 9, "vocab_size": 51, "width": 48, "heads": 3, "layers": 2},
}
VIT_B_32 = open_clip.get_model_config("ViT-B-32-quickgelu")
SHALLOW_B_32 = {
    **VIT_B_32,
    "vision_cfg": {**VIT_B_32["vision_cfg"], "layers": 2},
    "text_cfg": {**VIT_B_32["text_cfg"], "layers": 2, "vocab_size": 3000},
}


def reference(config: dict) -> open_clip.CLIP:
    torch.manual_seed(0)
    arguments = {name: value for name, value in config.items() if name != "custom_text"}
    model = open_clip.CLIP(**arguments).eval()
    with torch.no_grad():  # biases and layer norms start at constants that would hide a swap
        for name, p in model.named_parameters():
            if name != "logit_scale":
                p.add_(torch.randn_like(p) * 0.02)
    return model


def ours(config: dict, model: open_clip.CLIP, folder: Path) -> CLIP:
    (folder / "model.json").write_text(json.dumps(config))
    save_file(model.state_dict(), folder / "weights.safetensors")
    built = build(
        ModelConfig(architecture=str(folder / "model.json"), pretrained=str(folder / "weights.safetensors")),
        CLIPConfig(tune="frozen"),
    )
    assert isinstance(built, CLIP)
    return built


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(SHALLOW_B_32, id="ViT-B-32-quickgelu"),
        pytest.param(ODD_HEADS, id="heads-of-20-gelu"),
        pytest.param(ODD_QUICK, id="quickgelu-24px"),
    ],
)
@torch.no_grad()
def test_towers_equal_open_clips(config, tmp_path):
    model = reference(config)
    method = ours(config, model, tmp_path)
    size, generator = config["vision_cfg"]["image_size"], torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, size, size, generator=generator)
    assert relative_error(method.vision(images[:, None])[:, 0], model.encode_image(images)) <= 1e-5
    # every length of caption, padded to the context
    length, vocab = config["text_cfg"]["context_length"], config["text_cfg"]["vocab_size"]
    lengths = range(2, length + 1) if length < 20 else (2, 3, 11, length)
    for real in lengths:
        ids = torch.randint(1, vocab - 2, (2, length), generator=generator)
        ids[:, real - 1] = vocab - 1
        ids[:, real:] = 0
        mask = (torch.arange(length) < real).expand(2, -1)
        assert relative_error(method.text(ids, mask), model.encode_text(ids)) <= 1e-5


def test_a_config_of_another_architecture_is_refused_by_its_key():
    config = {**VIT_B_32, "vision_cfg": {**VIT_B_32["vision_cfg"], "qk_norm": True}}
    with pytest.raises(ValueError, match=r"^odd: expected a vision transformer, found vision_cfg\.qk_norm$"):
        architecture_from_config("odd", config)


def test_an_error_names_weights_that_do_not_fit(tmp_path):
    model = reference(ODD_QUICK)
    state = model.state_dict()
    state["extra"] = torch.zeros(1)
    state["visual.proj"] = torch.zeros(3, 3)
    del state["ln_final.bias"]
    model.state_dict = lambda: state
    with pytest.raises(ValueError) as error:
        ours(ODD_QUICK, model, tmp_path)
    message = str(error.value)
    assert "missing ln_final.bias" in message
    assert "unexpected extra" in message
    assert "visual.proj: expected (64, 16), found (3, 3)" in message


def test_an_openai_archive_sets_the_activation(tmp_path, caplog):
    model = reference({**ODD_QUICK})
    images, ids = torch.randn(1, 3, 24, 24), torch.ones(1, 9, dtype=torch.long)
    torch.jit.trace(model, (images, ids), check_trace=False).save(tmp_path / "openai.pt")
    weights, activation = read_weights(tmp_path / "openai.pt")
    assert activation == "quick_gelu"
    assert torch.equal(weights["visual.proj"], model.visual.proj)
    (tmp_path / "gelu.json").write_text(json.dumps({**ODD_QUICK, "quick_gelu": False}))
    named = {"architecture": str(tmp_path / "gelu.json"), "pretrained": str(tmp_path / "openai.pt")}
    with caplog.at_level(logging.WARNING):
        assert load_pretrained(ModelConfig(**named)).architecture.activation == "quick_gelu"
    assert "quick_gelu" in caplog.text
    with pytest.raises(ValueError, match=r"model\.activation: expected 'quick_gelu'"):
        load_pretrained(ModelConfig(**named, activation="gelu"))


def test_a_tag_sets_file_and_activation(tmp_path, monkeypatch):
    weights = tmp_path / "downloaded.pt"
    torch.save(reference(ODD_QUICK).state_dict(), weights)  # only read here, not yet fitted to the model
    monkeypatch.setattr("open_clip.pretrained.download_pretrained", lambda config: str(weights))
    monkeypatch.setattr("discovla.towers.weights.reachable", lambda url: True)
    found = load_pretrained(ModelConfig(architecture="ViT-B-32", pretrained="openai"))
    assert found.architecture.activation == "quick_gelu"
    with pytest.raises(ValueError, match=r"model.pretrained: .*'drawn'.*found 'no_such_tag'"):
        load_pretrained(ModelConfig(architecture="ViT-B-32", pretrained="no_such_tag"))


@pytest.mark.parametrize(
    ("model", "name", "source", "licence"),
    [
        (
            {"architecture": "PE-Core-B-16", "pretrained": "meta"},
            "PE-Core-B-16 meta",
            "hf:timm/PE-Core-B-16",
            "Apache-2.0",
        ),
        ({"pretrained": "drawn"}, "drawn", "the package discovla", "Apache-2.0"),
        (
            {"architecture": "EVA02-B-16", "pretrained": "/a/w.pt"},
            "EVA02-B-16 w.pt",
            "/a/w.pt",
            "not known of a file",
        ),
    ],
)
def test_the_origin_of_weights_has_their_licence(model, name, source, licence):
    origin = weights_origin(ModelConfig(**model))
    assert (origin.name, origin.source, origin.licence) == (name, source, licence)


def test_a_training_checkpoint_of_open_clip_with_prefixes_loads(tmp_path):
    model = reference(ODD_QUICK)
    text = ("positional_embedding", "text_projection", "token_embedding", "transformer", "ln_final")
    state = {("text." + n if n.startswith(text) else n): t for n, t in model.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": {f"module.{n}": t for n, t in state.items()}}, tmp_path / "c.pt")
    weights, activation = read_weights(tmp_path / "c.pt")
    assert activation is None
    assert set(weights) == set(model.state_dict())


def test_bare_weights_get_heads_of_width_64_with_a_warning(tmp_path, caplog):
    model = reference({**ODD_QUICK, "text_cfg": {**ODD_QUICK["text_cfg"], "width": 64, "heads": 1}})
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    bare = {"pretrained": str(tmp_path / "w.safetensors")}
    with pytest.raises(ValueError, match="bare weights do not fix the activation"):
        load_pretrained(ModelConfig(**bare))
    with caplog.at_level(logging.WARNING):
        found = load_pretrained(ModelConfig(**bare, activation="quick_gelu")).architecture
    assert (found.vision.heads, found.text.heads, found.image_size) == (1, 1, 24)
    assert "heads of width 64" in caplog.text


def test_random_weights_depend_on_the_seed_only(tmp_path):
    (tmp_path / "model.json").write_text(json.dumps(ODD_QUICK))

    def weights(seed: int) -> dict:
        torch.manual_seed(len(str(seed)) + 7)
        method = build(
            ModelConfig(architecture=str(tmp_path / "model.json"), pretrained="random", seed=seed),
            CLIPConfig(tune="frozen"),
        )
        return openai_weights(method, method.architecture)

    first, again, other = weights(1), weights(1), weights(10)
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert not torch.equal(first["visual.proj"], other["visual.proj"])
    assert all(t.isfinite().all() for t in first.values())


def test_the_drawn_clips_file_round_trips_its_token_rows(tmp_path):
    architecture = tiny_architecture()
    method = CLIP(architecture, CLIPConfig())
    initialise(method, architecture, seed=0)
    weights = {n: t.half().float() for n, t in openai_weights(method, architecture).items()}
    write_drawn_clip(tmp_path / "d.safetensors", architecture, weights, [3, 49, 7])
    read = read_drawn_clip(tmp_path / "d.safetensors")
    assert isinstance(read.architecture, Architecture)
    assert read.architecture == architecture
    assert read.weights is not None
    table = read.weights.pop("token_embedding.weight")
    assert torch.equal(table[[3, 7, 49]], weights["token_embedding.weight"][[3, 7, 49]])
    assert not table[[0, 1, 48]].any()
    assert all(torch.equal(read.weights[n], weights[n]) for n in read.weights)


def test_padding_has_no_effect_on_a_caption():
    architecture = tiny_architecture()
    method = CLIP(architecture, CLIPConfig())
    with torch.no_grad():
        for p in method.parameters():
            p.normal_(std=0.1)
        ids, mask = random_captions(architecture, 6, torch.Generator().manual_seed(0))
        for i, m in zip(ids, mask, strict=True):
            real = int(m.sum())
            alone = method.text(i[None, :real], m[None, :real])
            assert relative_error(method.text(i[None], m[None]), alone) <= 1e-6


def test_position_std_sets_the_deviation_of_vision_positions_only():
    architecture = tiny_architecture()
    methods = [CLIP(architecture, CLIPConfig()) for _ in range(2)]
    for method, position_std in zip(methods, (None, 0.5), strict=True):
        initialise(method, architecture, 0, position_std)
    usual, wide = (method.state_dict() for method in methods)
    changed = {name for name in usual if not torch.equal(usual[name], wide[name])}
    assert changed == {"vision.class_embedding", "vision.position_embedding"}
    assert 0.4 < wide["vision.position_embedding"].std() < 0.6


def test_weights_that_cannot_be_downloaded_are_refused_at_once(monkeypatch, tmp_path):
    import huggingface_hub.constants as hub

    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"pretrained='openai': .* http://127.0.0.1:9/timm/.* found no con"):
        load_pretrained(ModelConfig(architecture="ViT-B-32-quickgelu", pretrained="openai"))
    assert time.monotonic() - began < 20  # the hub's own retries take a minute
    assert not hub.HF_HUB_OFFLINE
