"""The golden tests of every method with all ops, and with them the blocks, forced to one implementation."""

import pytest
import torch

from tests.methods import (
    golden_clip2video,
    golden_discovla,
    test_clip2video,
    test_clip4clip,
    test_discovla,
    test_t2vparser,
)
from tests.ops.kernels import force

SINGLE, DOUBLE = torch.float32, torch.float64


def cases(*fast: torch.dtype, slow: tuple[torch.dtype, ...] = ()) -> pytest.MarkDecorator:
    """The plain ops in both dtypes, and the kernels in some: the interpreter takes seconds for them."""
    every = [("reference", dtype, ()) for dtype in (SINGLE, DOUBLE)]
    every += [("triton", dtype, ()) for dtype in fast] + [
        ("triton", dtype, pytest.mark.slow) for dtype in slow
    ]
    names = {SINGLE: "fp32", DOUBLE: "fp64"}
    chosen = [pytest.param(i, d, marks=marks, id=f"{i}-{names[d]}") for i, d, marks in every]
    return pytest.mark.parametrize(("impl", "dtype"), chosen)


@pytest.fixture(autouse=True)
def _forced(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks as chains of ops."""
    force(monkeypatch, impl, blocks=True)


@pytest.fixture
def limit(dtype: torch.dtype):
    return lambda single: single if dtype == SINGLE else 1e-8


@cases(SINGLE, slow=(DOUBLE,))
def test_golden_features_and_losses_of_discovla(golden, dtype):
    file = golden_discovla.read(golden, "model")
    model = golden_discovla.build(file, dtype)
    encoded = model, *model.encode(golden_discovla.batch(file, dtype))
    test_discovla.test_features_equal_the_golden_ones(file, encoded, dtype)
    test_discovla.test_losses_equal_the_golden_ones(file, encoded, dtype)


@cases(slow=(DOUBLE,))
def test_golden_rows_of_every_block_of_discovla(golden, dtype):
    file = golden_discovla.read(golden, "model")
    test_discovla.test_every_blocks_readout_rows_equal_the_golden_ones(file, dtype)


@cases(slow=(SINGLE, DOUBLE))
def test_golden_gradients_of_discovla(golden, dtype):
    file = golden_discovla.read(golden, "model")
    test_discovla.test_gradients_of_every_parameter_equal_the_golden_ones(file, dtype)


@cases()
def test_golden_steps_of_training_of_discovla(golden, dtype):
    file = golden_discovla.read(golden, "model")
    test_discovla.test_six_steps_of_training_equal_the_golden_ones(file, dtype)


@cases()
def test_golden_towers_of_t2vparser(golden, dtype, limit):
    test_t2vparser.test_golden_stan_values_of_trunk_and_branch(golden, dtype, limit)
    test_t2vparser.test_golden_text_tower_without_a_padding_mask(golden, dtype, limit)


@cases(slow=(DOUBLE,))
def test_golden_gradients_of_t2vparser(golden, dtype, limit):
    test_t2vparser.test_golden_stan_gradients(golden, dtype, limit)


@cases(DOUBLE)
def test_golden_heads_of_clip2video(golden, dtype):
    head = golden_clip2video.read(golden, "clip2video_head")
    test_clip2video.test_golden_similarities_losses_and_gradients(head, "raggedofficial", dtype)


@cases(SINGLE)
def test_golden_heads_of_clip4clip(golden, dtype):
    heads = golden_clip2video.read(golden, "clip4clip_heads")
    test_clip4clip.test_golden_similarity_loss_and_gradients(heads, "seqTransf", "ragged", dtype)
