import pytest
import torch

from discovla.batch import Batch
from discovla.ops.buckets import MIN_ROWS, bucketed_rows, fill_bucket
from discovla.testing import random_captions, relative_error, tiny_architecture
from tests import steps
from tests.nn.test_block import results


def captions(n: int, length: int, seed: int = 0) -> torch.Tensor:
    """Masks of n captions, each of 8 to 16 tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.arange(length) < torch.randint(8, 17, (n, 1), generator=generator)


@pytest.mark.parametrize("pairs", [64, 128, 1024])
def test_at_most_5_percent_is_waste_and_few_row_counts_occur(pairs):
    actual = set()
    for seed in range(40):
        masks = captions(pairs, 32, seed), captions(12 * pairs, 32, seed + 1000)
        rows, tokens = bucketed_rows(masks), [int(mask.sum()) for mask in masks]
        ours = [rows[len(mask), 32] for mask in masks]
        assert all(own >= real for own, real in zip(ours, tokens, strict=True))
        assert rows[13 * pairs, 32] == sum(ours) <= 1.05 * sum(tokens)
        actual.add(tuple(ours))
    assert len(actual) <= 8


def test_a_small_batch_is_rounded_up_to_at_most_its_places():
    few, full = captions(1, 32), torch.ones(3, 5, dtype=torch.bool)
    assert bucketed_rows([few]) == {(1, 32): 32}
    assert bucketed_rows([captions(12, 32)]) == {
        (12, 32): -(-int(captions(12, 32).sum()) // MIN_ROWS) * MIN_ROWS
    }
    assert bucketed_rows([full]) == {(3, 5): 15}
    holes = torch.tensor([[True, False, True, False], [True, True, False, False]])
    assert bucketed_rows([holes]) == {(2, 4): 7}, "a place before the last token would be seen"


def test_masks_of_one_shape_share_their_rows():
    some, more = captions(20, 32), torch.ones(20, 32, dtype=torch.bool)
    assert bucketed_rows([some, more], fewest=1) == {(20, 32): 640, (40, 32): 1280}


@pytest.mark.parametrize("rows", [6, 7, 9])
def test_a_filled_mask_has_the_rows_asked_for_and_adds_none_before_a_token(rows):
    mask = torch.tensor([[True, False, True, False], [True, False, False, False], [True, True, True, False]])
    actual = fill_bucket(mask, rows)
    assert actual.sum() == rows and (actual | ~mask).all()
    assert not actual[0, 1]


@pytest.mark.parametrize("variant", steps.VARIANTS)
@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_added_rows_change_no_loss_and_no_gradient(variant, impl):
    method, batch = steps.make(variant), garbled(steps.whole_batch(bad=False))
    want = results(method, batch, impl)
    masks = [
        batch.text_mask,
        *([] if batch.frame_text_mask is None else [batch.frame_text_mask.flatten(0, 1)]),
    ]
    exact, rounded = (bucketed_rows(masks, fewest) for fewest in (1, 16))
    method.text.rows = rounded
    passed = []
    method.text.blocks[0].register_forward_pre_hook(lambda _, inputs: passed.append(inputs[0].shape[:-1]))
    got = results(method, batch, impl)
    packed = {shape[0] for shape in passed if len(shape) == 1}
    exchanged = batch.false_text_mask[batch.has_false_text].sum().item()  # has as many rows as it has tokens
    assert packed - {exchanged} <= set(rounded.values()) - set(exact.values())
    assert packed or variant == "t2vparser, communicating", "which sees padding"
    assert got.keys() == want.keys() and len(want) > 4
    for name, value in want.items():
        assert relative_error(got[name], value) <= 1e-12 or value.abs().max() < 1e-12, name


def test_filling_a_mask_does_not_sync_with_its_device():
    method, batch = steps.make("discovla"), steps.whole_batch(bad=False)
    assert batch.frame_text_mask is not None
    method.text.rows = bucketed_rows([batch.text_mask, batch.frame_text_mask.flatten(0, 1)])
    text = method.to("meta").encode_texts(batch.map(lambda x: x.to("meta")))
    assert all(x.is_meta for x in text.tensors().values())


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_added_rows_change_no_word_feature(impl):
    method, (ids, mask) = steps.make("tokens"), random_captions(tiny_architecture(), 5, torch.Generator())
    method.text.impl = impl
    want = method.text(ids, mask, words=True, dtype=torch.float64)
    method.text.rows = bucketed_rows([mask], fewest=8)
    got = method.text(ids, mask, words=True, dtype=torch.float64)
    torch.testing.assert_close(got[0], want[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got[1][mask], want[1][mask], rtol=1e-12, atol=1e-12)


def garbled(batch: Batch) -> Batch:
    """The batch with any ids (but that of the end) where captions are padded."""
    for ids, mask in ((batch.text_ids, batch.text_mask), (batch.frame_text_ids, batch.frame_text_mask)):
        if ids is not None and mask is not None:
            ids[~mask] = torch.randint(1, 48, (int((~mask).sum()),))
    return batch
