"""open_clip's CoCa as a captioner, on a small random model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from discovla.data.captions.captioning import NoCaption, as_caption
from discovla.data.captions.coca import CoCaCaptioner
from tests.data.captions.tiny_coca import tiny_coca

MAX_TOKENS = 6


def pictures() -> list[np.ndarray]:
    """A black, a red and a patterned picture."""
    pattern = np.indices((40, 50)).sum(0)[..., None] * np.array([1, 5, 20])
    return [
        np.zeros((40, 50, 3), np.uint8),
        np.full((40, 50, 3), (250, 0, 0), np.uint8),
        pattern.astype(np.uint8),
    ]


def test_a_caption_is_one_line_and_not_empty():
    assert as_caption(" a dog\n runs ") == "a dog runs"
    assert as_caption(" \n") == NoCaption(reason="the model's answer is empty")


@pytest.fixture(scope="module")
def coca(tmp_path_factory) -> CoCaCaptioner:
    return CoCaCaptioner(tiny_coca(tmp_path_factory.mktemp("coca")), MAX_TOKENS)


@torch.inference_mode()
def test_coca_takes_the_most_likely_token_for_each_picture_of_a_batch(coca):
    captions = coca(pictures())
    for picture, caption in zip(pictures(), captions, strict=True):
        pixels = coca._preprocess(Image.fromarray(picture))[None]
        ids = [49406]
        while len(ids) <= MAX_TOKENS and ids[-1] != 49407:
            logits = coca.model(pixels, torch.tensor([ids]), output_labels=False)["logits"]
            ids.append(int(logits[0, len(ids) - 1].argmax()))
        words = coca._tokenizer.decode([i for i in ids[1:] if i != 49407])
        assert caption == " ".join(words.split())
    assert len(set(captions)) > 1


def test_coca_stops_at_the_end_token(coca, monkeypatch):
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


def test_the_identity_of_a_coca_depends_on_its_weights_and_length(tmp_path):
    name = tiny_coca(tmp_path)
    first = CoCaCaptioner(name, MAX_TOKENS).identity
    assert CoCaCaptioner(name, MAX_TOKENS).identity == first
    assert CoCaCaptioner(name, 5).identity != first
    weights = torch.load(tmp_path / "coca.pt")
    torch.save(weights | {"logit_scale": weights["logit_scale"] + 1}, tmp_path / "coca.pt")
    assert CoCaCaptioner(name, MAX_TOKENS).identity != first


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("coca_ViT-B-32", "expected coca:ARCHITECTURE@WEIGHTS, found no weights"),
        ("coca_of_mine@x", "expected an architecture of open_clip, found coca_of_mine"),
    ],
)
def test_a_bad_name_of_a_coca_is_refused(name, message):
    with pytest.raises(ValueError, match=message):
        CoCaCaptioner(name)
