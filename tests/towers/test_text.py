import pytest
import torch

from discovla.testing import noise_batch, tiny_architecture
from discovla.towers.text import TextTower


@pytest.fixture
def tower() -> TextTower:
    tower = TextTower(tiny_architecture())
    for parameter in (tower.token_embedding.weight, tower.position_embedding, tower.projection):
        torch.nn.init.normal_(parameter, std=0.5)
    return tower


def test_words_are_projected_beside_the_caption(tower):
    batch = noise_batch(tiny_architecture())
    pooled, words = tower(batch.text_ids, batch.text_mask, words=True)
    end = torch.arange(len(pooled)), batch.text_ids.argmax(1)
    assert torch.equal(words[end], pooled)
    torch.testing.assert_close(pooled, tower(batch.text_ids, batch.text_mask))


def test_without_a_mask_only_padding_sees_padding(tower):
    batch = noise_batch(tiny_architecture())
    masked, causal = (tower(batch.text_ids, mask, words=True)[1] for mask in (batch.text_mask, None))
    torch.testing.assert_close(masked[batch.text_mask], causal[batch.text_mask])
    last = ~batch.text_mask[:, -2]  # captions with two places of padding or more
    assert last.any() and not torch.allclose(masked[last, -1], causal[last, -1])


def test_a_caption_longer_than_the_positions_is_refused(tower):
    with pytest.raises(ValueError, match="ids: expected at most 12 tokens, got 13"):
        tower(torch.ones(1, 13, dtype=torch.long), None)
