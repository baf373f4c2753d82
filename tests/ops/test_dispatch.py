import importlib.util
import logging

import pytest
import torch

from discovla.ops import dispatch
from discovla.ops.alignment_losses import AlignmentInputs, alignment_losses
from discovla.ops.dispatch import AUTO, IMPLEMENTATIONS, KERNELS, KernelUnavailable, choose, implementations
from discovla.ops.frame_similarity import frame_similarity
from discovla.ops.info_nce import info_nce
from discovla.ops.late_interaction import late_interaction
from discovla.ops.rank_of_positive import rank_of_positive
from discovla.ops.token_similarity import TokenInputs, token_similarity, token_training_similarity


def test_every_choice_in_the_table_exists():
    for op, devices in AUTO.items():
        assert set(devices.values()) <= set(implementations(op))
    assert {op for op, impls in IMPLEMENTATIONS.items() if "triton" in impls} == set(KERNELS)


def test_a_missing_triton_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        KernelUnavailable, match="info_nce: impl='triton': triton is not installed: pip install"
    ):
        choose("info_nce", "triton", "cuda")


def test_a_kernel_on_a_cpu_needs_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(KernelUnavailable, match="needs a CUDA device, or TRITON_INTERPRET=1"):
        choose("info_nce", "triton", "cpu")


def test_auto_falls_back_to_torch_for_unsupported_tensors_and_warns_once(caplog, monkeypatch):
    monkeypatch.setitem(AUTO, "frame_similarity", {"cuda": "triton"})
    dispatch.warn_once.cache_clear()
    too_many = torch.zeros(1, 300, 2)
    with caplog.at_level(logging.WARNING):
        chosen = {choose("frame_similarity", "auto", "cuda", operands=(too_many, too_many)) for _ in range(2)}
    assert chosen == {"torch"}
    assert [record.getMessage() for record in caplog.records] == [
        "frame_similarity: plain torch instead of the kernel: expected at most 16384 products "
        "of a pair's rows, counts rounded up to powers of two, found 512 x 512"
    ]


@pytest.mark.parametrize("impl", ["reference", "torch", "triton"])
def test_shapes_that_do_not_fit_are_refused_by_name(impl):
    x, s = torch.ones(3, 4), torch.tensor(1.0)
    frames, mask = torch.ones(3, 2, 4), torch.ones(3, 3, dtype=torch.bool)
    cases = [
        ("video", lambda: info_nce(x, x[:2], s, impl=impl)),
        ("ignore", lambda: info_nce(x, x, s, ignore=mask[:2], impl=impl)),
        ("video_mask", lambda: frame_similarity(frames, frames, s, video_mask=mask, impl=impl)),
        ("items", lambda: rank_of_positive(x, x[:, :3], torch.arange(3), impl=impl)),
        ("text_frames", lambda: alignment_losses(inputs(x, frames[:2], frames), s, impl=impl)),
    ]
    for name, call in cases:
        with pytest.raises(ValueError, match=f"^{name}: expected shape"):
            call()


def inputs(x, text_frames, video_frames):
    return AlignmentInputs(text=x, video=x, text_frames=text_frames, video_frames=video_frames)


def test_auto_takes_the_reference_for_one_block_unless_a_kernel_is_chosen(monkeypatch):
    assert choose("info_nce", "auto", "cpu", small=True) == "reference"
    assert choose("info_nce", "auto", "cpu") == "torch"
    monkeypatch.setitem(AUTO, "info_nce", {"cuda": "triton"})
    assert choose("info_nce", "auto", "cuda", small=True) == "triton"


@pytest.mark.parametrize("op", [token_similarity, token_training_similarity, late_interaction])
def test_auto_takes_the_reference_of_token_similarities_for_128_pairs_of_any_width(op, monkeypatch):
    """Streaming them took 1.2 to 1.5 times as long on a CPU (T2VParser's 8 views, widths 64 and 512)."""
    taken = []
    record = dispatch._automatic
    monkeypatch.setattr(dispatch, "_automatic", lambda *given: taken.append(record(*given)) or taken[-1])
    for n, dim in ((128, 8), (128, 512), (300, 8)):
        tokens = torch.empty(n, 8, dim, device="meta")
        with monkeypatch.context() as patch:
            patch.setitem(AUTO[op.__name__], "meta", AUTO[op.__name__]["cpu"])
            op(TokenInputs(text=tokens, video=tokens))
    assert taken == ["reference", "reference", "torch"]
