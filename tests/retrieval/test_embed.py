from dataclasses import fields

import pytest
import torch

from discovla.batch import Embedding
from discovla.methods.clip import CLIP, CLIPConfig
from discovla.retrieval.embed import concatenate, embed_texts, embed_videos, in_order
from discovla.testing import noise_batch, tiny_architecture
from discovla.towers.weights import initialise

ARCHITECTURE = tiny_architecture()


@pytest.fixture
def method():
    method = CLIP(ARCHITECTURE, CLIPConfig())
    initialise(method, ARCHITECTURE, seed=0)
    return method


def test_several_batches_have_the_embeddings_of_one(method):
    batch = noise_batch(ARCHITECTURE, size=5)
    parts = [(batch.text_ids[i : i + 2], batch.text_mask[i : i + 2]) for i in (0, 2, 4)]
    expected = method.encode_text(batch.text_ids, batch.text_mask).pooled
    torch.testing.assert_close(embed_texts(method, parts, "cpu").pooled, expected.detach())


def test_videos_are_embedded_without_gradients_and_in_evaluation_mode(method):
    batch = noise_batch(ARCHITECTURE)
    modes = []
    method.vision.register_forward_hook(lambda module, inputs, output: modes.append(module.training))
    method.train()
    found = embed_videos(method, [(batch.frames, batch.frame_mask)], "cpu")
    assert modes == [False]
    assert method.training
    assert not found.pooled.requires_grad


def test_no_batch_is_an_error(method):
    with pytest.raises(ValueError, match="at least one batch, found none"):
        embed_texts(method, [], "cpu")


def test_every_field_is_concatenated():
    names = [field.name for field in fields(Embedding)]
    parts = [Embedding(**{name: torch.full((n, 2), n) for name in names}) for n in (1, 2)]
    found = concatenate(parts)
    for name in names:
        assert getattr(found, name)[:, 0].tolist() == [1, 2, 2], name


def test_tokens_in_some_batches_only_are_an_error():
    rows = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="expected tokens in all 2 batches, found 1"):
        concatenate([Embedding(pooled=rows, tokens=rows[None]), Embedding(pooled=rows)])


def test_shares_of_processes_are_joined_in_order_without_repeated_rows():
    shares = [
        (torch.tensor([0, 2, 4]), Embedding(pooled=torch.tensor([[0.0], [2.0], [4.0]]))),
        (torch.tensor([1, 3, 0]), Embedding(pooled=torch.tensor([[1.0], [3.0], [0.0]]))),
    ]
    assert in_order(shares, 5).pooled[:, 0].tolist() == [0, 1, 2, 3, 4]


def test_a_row_that_no_process_embedded_is_an_error():
    shares = [(torch.tensor([0, 2]), Embedding(pooled=torch.zeros(2, 1)))]
    with pytest.raises(ValueError, match="expected 3 rows, found 2; row 1 is missing"):
        in_order(shares, 3)
