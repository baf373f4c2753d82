import pytest
import torch

from discovla.nn.block import Block, BlockShape
from discovla.nn.stan import MAX_FRAMES, STAN, StanLayer, StanState, drop_path

SHAPE = BlockShape(width=16, heads=2, mlp_width=32)


def state(b=2, f=3, p=4, w=16) -> StanState:
    return StanState(cls=torch.randn(b, w), patches=torch.randn(b, f, p, w))


def branch() -> STAN:
    """A branch whose temporal halves do something."""
    stan = STAN(SHAPE, 2).eval()
    for layer in stan.layers:
        torch.nn.init.normal_(layer.temporal_fc.weight, std=0.1)
    return stan


def test_a_new_temporal_half_changes_nothing():
    layer, x = StanLayer(SHAPE, 0.1).train(), state()
    assert not layer._among_frames(x.patches, None).any()


def test_a_new_time_table_is_standard_normal_with_a_row_per_frame():
    table = STAN(BlockShape(width=256, heads=2, mlp_width=32), 1).time_embedding
    assert table.shape == (MAX_FRAMES, 256)
    assert table.std().item() == pytest.approx(1, abs=0.03)


def test_drop_path_rates_rise_evenly_to_a_tenth():
    assert [layer.drop_path for layer in STAN(SHAPE, 4).layers] == pytest.approx([0, 1 / 30, 2 / 30, 0.1])


def test_drop_path_drops_whole_entries_of_the_first_axis_and_keeps_the_mean():
    x = torch.ones(20000, 3, 2)
    dropped = drop_path(x, 0.1, training=True)
    assert {round(v, 5) for v in dropped.unique().tolist()} == {0.0, round(1 / 0.9, 5)}
    assert torch.equal(dropped.amin((1, 2)), dropped.amax((1, 2)))
    assert dropped.mean().item() == pytest.approx(1, abs=0.02)
    assert torch.equal(drop_path(x, 0.1, training=False), x)


def test_a_dropped_temporal_path_still_adds_the_bias_of_its_last_map():
    layer, x = StanLayer(SHAPE, 1.0).train(), state()
    torch.nn.init.normal_(layer.temporal_fc.bias)
    layer.drop_path = 0.999999
    update = layer._among_frames(x.patches, None)
    torch.testing.assert_close(update, layer.temporal_fc.bias.expand_as(update))


def test_spatial_halves_start_as_the_last_blocks_of_the_trunk():
    stan, trunk = STAN(SHAPE, 2), [Block(SHAPE) for _ in range(3)]
    stan.copy_trunk(trunk)
    for layer, block in zip(stan.layers, trunk[1:], strict=True):
        for name, value in layer.spatial.state_dict().items():
            assert torch.equal(value, block.state_dict()[name]), name


def test_padded_frames_are_seen_by_no_part_of_the_branch():
    stan = branch()
    trunk, tables = torch.randn(2, 5, 7, 16), (torch.randn(16), torch.randn(7, 16))
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])

    def run(trunk, mask):
        x = stan.layers[0](stan.start(trunk, *tables, mask), mask)
        return stan.layers[1](stan.next_state(x, trunk, mask), mask)

    whole = run(trunk, mask)
    noise = torch.where(mask[..., None, None], trunk, torch.randn_like(trunk))
    torch.testing.assert_close(run(noise, mask).cls, whole.cls)
    torch.testing.assert_close(run(trunk[1:, :2], None).cls, whole.cls[1:], atol=1e-5, rtol=1e-5)


def test_the_branch_knows_the_order_of_frames():
    stan = branch()
    trunk, tables = torch.randn(1, 4, 7, 16), (torch.randn(16), torch.randn(7, 16))
    forward, backward = (stan.layers[0](stan.start(x, *tables)).cls for x in (trunk, trunk.flip(1)))
    assert (forward - backward).abs().max() > 1e-3


def test_more_frames_than_the_time_table_has_are_refused():
    with pytest.raises(ValueError, match=f"at most {MAX_FRAMES} with STAN, got {MAX_FRAMES + 1}"):
        STAN(SHAPE, 1).start(torch.randn(1, MAX_FRAMES + 1, 3, 16), torch.randn(16), torch.randn(3, 16))
