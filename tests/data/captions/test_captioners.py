"""Captioners in this process, on small random models."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils import _device

from discovla.data.captions.captioners import Asking, CoCaCaptioner, Failed, HuggingFaceCaptioner, said
from tests.data.captions import tiny_captioners

ASKING = Asking(max_tokens=6)


def pictures() -> list[np.ndarray]:
    """Dark, red and a pattern."""
    pattern = np.indices((40, 50)).sum(0)[..., None] * np.array([1, 5, 20])
    return [
        np.zeros((40, 50, 3), np.uint8),
        np.full((40, 50, 3), (250, 0, 0), np.uint8),
        pattern.astype(np.uint8),
    ]


def test_a_caption_is_one_line_that_says_something():
    assert said(" a dog\n runs ") == "a dog runs"
    assert said(" \n") == Failed(reason="the model said nothing")


@pytest.fixture(scope="module")
def coca(tmp_path_factory) -> CoCaCaptioner:
    return CoCaCaptioner(tiny_captioners.coca(tmp_path_factory.mktemp("coca")), ASKING)


@torch.inference_mode()
def test_coca_says_the_likeliest_words_of_each_picture_alone(coca):
    found = coca(pictures())
    for picture, caption in zip(pictures(), found, strict=True):
        pixels = coca._prepare(Image.fromarray(picture))[None]
        ids = [49406]
        while len(ids) <= ASKING.max_tokens and ids[-1] != 49407:
            logits = coca.model(pixels, torch.tensor([ids]), output_labels=False)["logits"]
            ids.append(int(logits[0, len(ids) - 1].argmax()))
        words = coca._tokenizer.decode([i for i in ids[1:] if i != 49407])
        assert caption == " ".join(words.split())
    assert len(set(found)) > 1


def test_coca_stops_at_its_end(coca, monkeypatch):
    def ends(image, text=None, **_):
        if text is None:
            return {"image_features": image, "image_embs": image}
        logits = torch.zeros(len(text), text.shape[1], 49408)
        logits[:, :, 320] = 1  # "a"
        logits[0, 1:, 49407] = 2
        logits[1, 2:, 49407] = 2
        return {"logits": logits}

    ends.pad_id, ends.context_length = 0, 16  # type: ignore[attr-defined]
    monkeypatch.setattr(coca, "model", ends)
    assert coca(pictures()) == ["a", "a a", "a a a a a a"]


def test_coca_is_known_by_its_weights(tmp_path):
    name = tiny_captioners.coca(tmp_path)
    first = CoCaCaptioner(name, ASKING).identity
    assert CoCaCaptioner(name, ASKING).identity == first
    assert CoCaCaptioner(name, Asking(max_tokens=5)).identity != first
    weights = torch.load(tmp_path / "coca.pt")
    torch.save(weights | {"logit_scale": weights["logit_scale"] + 1}, tmp_path / "coca.pt")
    assert CoCaCaptioner(name, ASKING).identity != first


@pytest.mark.parametrize(
    ("name", "prompt", "message"),
    [
        ("coca_ViT-B-32", None, "expected coca:ARCHITECTURE@WEIGHTS, found no weights"),
        ("coca_ViT-B-32@x", "what is it", "--prompt: expected none with a CoCa model"),
        ("coca_of_mine@x", None, "expected an architecture open_clip knows, found coca_of_mine"),
    ],
)
def test_a_coca_that_is_none_is_named(name, prompt, message):
    with pytest.raises(ValueError, match=message):
        CoCaCaptioner(name, Asking(prompt=prompt))


_EMPTY = {name: getattr(torch, name) for name in ("empty", "empty_like")}


@pytest.fixture
def plain_empty(monkeypatch) -> None:
    """torch.empty as it is: models on the meta device need the one that torch knows."""
    for name, function in _EMPTY.items():
        monkeypatch.setattr(torch, name, function)
    _device._device_constructors.cache_clear()


@pytest.fixture(scope="module", params=["blip2", "qwen2_vl"])
def hugging_face(request, tmp_path_factory) -> tuple[str, str]:
    pytest.importorskip("transformers", reason="needs transformers: pip install 'discovla[captions]'")
    return request.param, getattr(tiny_captioners, request.param)(tmp_path_factory.mktemp(request.param))


PROMPTS = {"blip2": "", "qwen2_vl": "Describe this picture in one short sentence."}


@pytest.mark.usefixtures("plain_empty")
@pytest.mark.parametrize("prompt", [None, "w1 w2"], ids=["own way", "prompt"])
def test_a_hugging_face_model_says_of_each_picture_what_it_says_of_it_alone(hugging_face, prompt):
    kind, folder = hugging_face
    ask = HuggingFaceCaptioner(folder, Asking(max_tokens=6, prompt=prompt))
    found = ask(pictures())
    assert ask.prompt == (PROMPTS[kind] if prompt is None else prompt)
    assert found == [ask([picture])[0] for picture in pictures()]
    assert all(isinstance(text, str) and 1 <= len(text.split()) <= 6 for text in found)
    assert not any(str(text).startswith("w1 w2") for text in found)
    assert len(set(found)) > 1


@pytest.mark.usefixtures("plain_empty")
def test_a_hugging_face_model_is_known_by_its_prompt_and_files(hugging_face):
    _, folder = hugging_face
    first, second = (HuggingFaceCaptioner(folder, Asking(prompt=p)).identity for p in (None, "w1"))
    assert first != second
    assert folder in first


@pytest.mark.usefixtures("plain_empty")
def test_a_hugging_face_model_that_is_none_is_named(tmp_path):
    try:
        import transformers  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        expected = r"expected transformers \(pip install 'discovla\[captions\]'\)"
    else:
        expected = "it does not load"
    with pytest.raises(ValueError, match=expected):
        HuggingFaceCaptioner(str(tmp_path), ASKING)
