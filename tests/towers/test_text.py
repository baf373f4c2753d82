import pytest
import torch

from discovla.batch import Batch
from discovla.methods.discovla import DiscoVLA, DiscoVLAConfig
from discovla.testing import noise_batch, relative_error, tiny_architecture
from discovla.towers.text import TextTower, distinct_rows
from tests.nn.test_block import results

PLAIN = (("torch", 0), ("torch", 1), ("torch", 2), ("reference", 2))  # fused blocks by an implementation


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


@pytest.mark.parametrize(
    ("impl", "fused", "distinct"),
    [
        *((impl, n, d) for impl, n in PLAIN for d in (False, True)),
        pytest.param("triton", 2, False, marks=pytest.mark.slow),
        ("triton", 2, True),
    ],
)
def test_captions_and_frame_captions_encode_the_same_together_and_apart(impl, fused, distinct):
    method = made_fusing(fused)
    tower, batch = method.text, repeated(noise_batch(method.architecture, size=3, frames=4))
    tower.impl, tower.distinct = impl, distinct
    captions = batch.text_ids[:, :9], batch.text_mask[:, :9]  # padded to another length than the others
    captions[0][:, 8], captions[1][:] = batch.text_ids.max(), True
    others = batch.frame_captions()
    got = [x.flatten(0, -2) for x in tower.encode_with_groups(captions, others, torch.float64)]
    want = [tower(*captions, dtype=torch.float64)]
    want += [tower(*(x.flatten(0, 1) for x in others), group=4, dtype=torch.float64)]
    weights = [torch.randn_like(x) for x in want]
    names, parameters = zip(*((n, p) for n, p in tower.named_parameters() if p.requires_grad), strict=True)
    sums = [sum((x * w).sum() for x, w in zip(side, weights, strict=True)) for side in (got, want)]
    grads = [torch.autograd.grad(x, parameters) for x in sums]
    for name, a, b in zip(("captions", "frames", *names), (*got, *grads[0]), (*want, *grads[1]), strict=True):
        assert relative_error(a, b) <= 1e-10, name


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("fused", [0, 1, 2])
def test_computing_identical_captions_once_changes_nothing(fused, impl):
    method = made_fusing(fused)
    method.text.impl = impl
    batch = repeated(noise_batch(method.architecture, size=3, frames=4))
    want = results(method, batch, impl)
    method.text.distinct = True
    got = results(method, batch, impl)
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert relative_error(got[name], value) < 1e-11, name


def test_identical_captions_are_computed_once_below_the_first_block_that_fuses():
    method = made_fusing(1)
    method.text.distinct = True
    batch = repeated(noise_batch(method.architecture, size=3, frames=4))
    rows: list[int] = []
    for block in method.text.blocks:
        block.register_forward_hook(lambda block, inputs, output: rows.append(len(inputs[0])))
    method.encode_frame_captions(batch)
    mask = batch.frame_text_mask
    assert rows == [int(mask[:, 0].sum() + mask[0, 3].sum()), int(mask.sum())]


def test_distinct_rows_returns_the_first_row_of_each_kind():
    first, of = distinct_rows(torch.tensor([[3, 1, -1], [2, 1, 0], [3, 1, -1], [2, 1, 0], [3, 1, 1]]))
    assert sorted(first.tolist()) == [0, 1, 4] and first[of].tolist() == [0, 1, 0, 1, 4]


def made_fusing(fused: int) -> DiscoVLA:
    config = DiscoVLAConfig(lora_rank=3, fused_vision_blocks=1, fused_text_blocks=fused)
    method = DiscoVLA(tiny_architecture(), config)
    with torch.no_grad():
        for name, p in method.named_parameters():
            p.normal_(std=0.15).add_(1.0 if ".ln_" in name and name.endswith("weight") else 0.0)
    method.freeze()
    method.compute_dtype = torch.float64
    return method.double()


def repeated(batch: Batch) -> Batch:
    """One caption for all frames of a clip, but for the last frame of the first."""
    last = batch.frame_text_ids[0, 3].clone(), batch.frame_text_mask[0, 3].clone()
    for x, other in zip((batch.frame_text_ids, batch.frame_text_mask), last, strict=True):
        x[:] = x[:, :1].clone()
        x[0, 3] = other
    return batch
