"""The CUDA library: how it is built, that it loads without a GPU, and what is said where it cannot run."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from discovla.ops.cuda import build as builder
from discovla.ops.cuda import library
from discovla.ops.dispatch import KernelUnavailable, choose
from discovla.ops.top_k import top_k


@pytest.fixture
def false_nvcc(tmp_path, monkeypatch) -> Path:
    """An nvcc that only fails."""
    path = tmp_path / "bin/nvcc"
    path.parent.mkdir()
    path.write_text("#!/bin/sh\necho 'x.cu(1): error: it has a fault'\nexit 1\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    return tmp_path / "out.so"


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """The library, compiled by the nvcc of this machine."""
    if builder.find_nvcc() is None:
        pytest.skip("nvcc is not installed: the CUDA kernels cannot be compiled here")
    out = tmp_path_factory.mktemp("cuda") / "discovla_cuda.so"
    assert builder.build(out)
    return out


def test_tensors_on_a_cpu_are_refused_with_the_remedy():
    message = "^top_k: impl='cuda': its tensors are on cpu: move them to a CUDA device"
    with pytest.raises(KernelUnavailable, match=message):
        top_k(torch.eye(3), torch.eye(3), 2, impl="cuda")


def test_a_library_that_is_not_built_is_named_with_its_remedy(monkeypatch, tmp_path):
    monkeypatch.setattr(library, "LIBRARY", tmp_path / "absent.so")
    with pytest.raises(KernelUnavailable, match=r"not built: `python -m discovla\.ops\.cuda\.build`"):
        choose("top_k", "cuda", "cuda")


def test_a_library_that_does_not_load_is_named_with_its_remedy(monkeypatch, tmp_path):
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"no library")
    monkeypatch.setattr(library, "LIBRARY", broken)
    monkeypatch.setattr(library, "_load", library._load.__wrapped__)  # whatever was loaded before
    with pytest.raises(KernelUnavailable, match=r"broken\.so: .*; `python -m discovla"):
        choose("top_k", "cuda", "cuda")


@pytest.mark.parametrize("wish, status, said", [("auto", 0, "warning: no CUDA kernels"), ("1", 1, "error")])
def test_a_failure_of_nvcc_is_one_line(wish, status, said, false_nvcc, monkeypatch, capsys):
    monkeypatch.setenv("DISCOVLA_CUDA", wish)
    assert builder.main(["--out", str(false_nvcc)]) == status
    assert capsys.readouterr().err == f"discovla: {said}: nvcc failed: x.cu(1): error: it has a fault\n"
    assert not false_nvcc.exists()


def test_with_mode_0_nothing_is_built(false_nvcc, monkeypatch, capsys):
    monkeypatch.setenv("DISCOVLA_CUDA", "0")
    assert builder.main(["--out", str(false_nvcc)]) == 0
    assert capsys.readouterr() == ("", "")


def test_auto_without_nvcc_prints_nothing(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(builder, "find_nvcc", lambda: None)
    monkeypatch.setenv("DISCOVLA_CUDA", "auto")
    assert builder.main(["--out", str(tmp_path / "out.so")]) == 0
    monkeypatch.setenv("DISCOVLA_CUDA", "1")
    assert builder.main(["--out", str(tmp_path / "out.so")]) == 1
    assert capsys.readouterr().err.startswith("discovla: error: nvcc is not on PATH")


def test_an_unknown_mode_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("DISCOVLA_CUDA", "yes")
    assert builder.main([]) == 2
    assert capsys.readouterr().err == "DISCOVLA_CUDA: expected auto, 0 or 1, found 'yes'\n"


def test_an_up_to_date_library_is_not_built_again(false_nvcc):
    false_nvcc.touch()
    assert builder.build(false_nvcc) is False
    os.utime(false_nvcc, (0, 0))
    with pytest.raises(builder.BuildError):
        builder.build(false_nvcc)


@pytest.mark.slow
def test_the_library_compiles_loads_without_a_gpu_and_registers_its_ops(built):
    script = Path(__file__).with_name("load_cuda_library.py")  # a process loads one library
    run = subprocess.run([sys.executable, script, built], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout == "1 ops\n"
    code = built.read_bytes()
    assert all(architecture in code for architecture in (b"sm_80", b"sm_90a"))
