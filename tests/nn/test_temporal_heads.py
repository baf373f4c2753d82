import pytest
import torch

from discovla.nn.block import Block, BlockShape
from discovla.nn.fusion import MAX_FRAMES, FusionAttention
from discovla.nn.layout import SequenceLayout
from discovla.nn.padded_attention import fusion_attention
from discovla.nn.temporal_heads import LSTM, PairScorer, Table, Transformer

SHAPE = BlockShape(width=16, heads=4, mlp_width=64, eps=1e-12)


def test_hidden_keys_change_nothing():
    head, x = Transformer(SHAPE, 2).double(), torch.randn(3, 5, 16, dtype=torch.float64)
    mask = torch.arange(5) < torch.tensor([[2], [5], [1]])
    other = torch.where(mask[..., None], x, torch.randn_like(x))
    assert torch.equal(head(x, mask)[mask], head(other, mask)[mask])
    short = head(x[:1, :2], torch.ones(1, 2, dtype=torch.bool))
    torch.testing.assert_close(head(x, mask)[:1, :2], short)


def test_queries_see_all_keys_if_the_mask_hides_every_key():
    head, x = Transformer(SHAPE, 1), torch.randn(2, 5, 16)
    none, all_ = torch.zeros(2, 5, dtype=torch.bool), torch.ones(2, 5, dtype=torch.bool)
    assert torch.equal(head(x, none), head(x, all_))


def test_each_head_may_have_a_mask_of_its_own():
    head, x = Transformer(SHAPE, 1), torch.randn(2, 5, 16)
    same = torch.arange(5) < torch.tensor([[3], [5]])
    torch.testing.assert_close(head(x, same[:, None].expand(2, 4, 5)), head(x, same))
    apart = same[:, None].repeat(1, 4, 1)
    apart[0, 1] = True
    assert not torch.allclose(head(x, apart)[0], head(x, same)[0])
    assert torch.allclose(head(x, apart)[1], head(x, same)[1])


def test_a_block_with_adapters_is_copied_without_them():
    head, sources = Transformer(SHAPE, 1), [Block(SHAPE, FusionAttention(SHAPE, 2))]
    assert head.copy(sources)
    assert torch.equal(head.blocks[0].attention.qkv.weight, sources[0].attention.qkv.weight)


@pytest.mark.parametrize("sources", [0, 1], ids=["none", "one"])
def test_copying_too_few_or_other_blocks_returns_false(sources):
    wide = BlockShape(width=32, heads=4, mlp_width=64)
    assert not Transformer(SHAPE, 2).copy([Block(SHAPE)] * sources)
    assert not Transformer(SHAPE, 1).copy([Block(wide)])


def test_a_table_copies_the_first_rows():
    table, rows = Table(3, 4), torch.randn(5, 4)
    assert table.copy(rows) and torch.equal(table(2), rows[:2])
    assert not table.copy(rows[:2]) and not table.copy(rows[:, :3])
    with pytest.raises(ValueError, match="positions: expected at most 3, got 4"):
        table(4)


def test_states_of_an_lstm_do_not_look_ahead():
    lstm, x = LSTM(16), torch.randn(2, 5, 16)
    torch.testing.assert_close(lstm(x)[:, :3], lstm(x[:, :3]))


def test_a_pair_is_scored_by_itself():
    scorer = PairScorer(SHAPE, 2, positions=7).eval()
    text, frames = torch.randn(3, 16), torch.randn(3, 6, 16)
    mask = torch.arange(6) < torch.tensor([[6], [2], [1]])
    together = scorer(text, frames, mask)
    apart = torch.cat([scorer(text[i : i + 1], frames[i : i + 1], mask[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, apart)
    with pytest.raises(ValueError, match="positions: expected at most 7, got 8"):
        scorer(text, torch.randn(3, 7, 16), torch.ones(3, 7, dtype=torch.bool))


def test_frame_positions_are_added_to_the_keys_that_a_group_sees():
    plain, positioned = FusionAttention(SHAPE, 2), FusionAttention(SHAPE, 2, positions=True)
    positioned.load_state_dict(plain.state_dict(), strict=False)
    x, layout = torch.randn(6, 3, 16), SequenceLayout(group=3, readout=torch.zeros(6, dtype=torch.long))
    assert torch.equal(plain(x, layout), positioned(x, layout))
    position = positioned.frame_position.data.normal_()
    qkv = positioned.qkv(x)
    shifted = qkv.clone()
    for sequence in range(6):
        shifted[sequence, :, 16:32] += position[sequence % 3]
    want_local, want_group = (
        fusion_attention(qkv, None, 4, layout)[0],
        fusion_attention(shifted, None, 4, layout)[1],
    )
    local, group = fusion_attention(qkv, position, 4, layout)
    assert torch.equal(local, want_local)
    torch.testing.assert_close(group, want_group)
    assert len(position) == MAX_FRAMES
