import importlib.util
import logging

import pytest
import torch

from discovla.ops import dispatch
from discovla.ops.dispatch import AUTO, IMPLEMENTATIONS, KERNELS, KernelUnavailable, choose


def test_every_choice_in_the_table_exists():
    for op, devices in AUTO.items():
        assert set(devices.values()) <= set(IMPLEMENTATIONS[op])
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


def test_auto_takes_plain_torch_for_what_the_kernel_does_not_and_says_so_once(caplog):
    dispatch._warn_once.cache_clear()
    too_many = torch.zeros(1, 300, 2)
    with caplog.at_level(logging.WARNING):
        chosen = {choose("frame_similarity", "auto", "cuda", operands=(too_many, too_many)) for _ in range(2)}
    assert chosen == {"torch"}
    assert [record.getMessage() for record in caplog.records] == [
        "frame_similarity: plain torch instead of the kernel: expected at most 256 parts of a text, found 300"
    ]


def test_one_block_on_a_cpu_is_left_to_the_reference():
    assert choose("info_nce", "auto", "cpu", small=True) == "reference"
    assert choose("info_nce", "auto", "cpu") == "torch"
    assert choose("info_nce", "auto", "cuda", small=True) == "triton"
