"""The GPU benchmark without a GPU: every part runs on the CPU, with made-up ceilings."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from benchmarks import gpu
from benchmarks.case_lists import timed_cases
from benchmarks.measure import read_rows
from benchmarks.peers import PEERS
from discovla.ops.alignment_losses import AlignmentInputs, alignment_losses
from discovla.ops.cases import case

ROOT = Path(__file__).parents[2]
SMALL = {"dim": 8, "dtype": torch.float32}


@pytest.fixture
def on_cpu(monkeypatch, tmp_path) -> Path:
    """Let the CPU stand in for the GPU; return the results file."""
    path = tmp_path / "20260101-abc-gpu.jsonl"
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    monkeypatch.setattr(gpu, "SECONDS", 0.001)
    monkeypatch.setattr(gpu, "PEERS", [peer for peer in PEERS if peer.name != "open_clip"])  # a slow import
    monkeypatch.setattr(gpu, "machine", lambda device: {"device": device, "time": "2026-01-01"})
    monkeypatch.setattr(gpu, "results_file", lambda where, subject: path)
    monkeypatch.setattr(gpu, "gpu_ceilings", lambda: {"gemm_bf16": 100.0, "copy": 1.0})
    monkeypatch.setattr(gpu, "extra_gpu_bytes", lambda call: len(call()))
    monkeypatch.setattr(gpu, "gpu_launches", lambda call: len(call()))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(1e9), int(1e9)))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(gpu, "compile_anew", lambda function: function)
    return path


def run(monkeypatch, checked, timed, *words) -> int:
    monkeypatch.setattr(gpu, "checked_cases", lambda: checked)
    monkeypatch.setattr(gpu, "timed_cases", lambda suite: timed)
    monkeypatch.setattr(gpu, "checked_tower_cases", lambda: [])
    monkeypatch.setattr(gpu, "timed_tower_cases", lambda suite: [])
    monkeypatch.setattr(gpu, "step_sizes", lambda suite: [])
    return gpu.main(words)


def test_one_call_checks_times_and_reports(on_cpu, monkeypatch, capsys):
    checked = [case("info_nce", 7, **SMALL), case("frame_similarity", 3, frames=(2, 3), **SMALL)]
    checked += [case("rank_of_positive", 9, **SMALL)]
    timed = [
        case("info_nce", 5, target_ms=1e9, **SMALL),
        case("rank_of_positive", 5, backward=False, **SMALL),
    ]
    timed += [case("alignment_losses", 10_000, frames=(12, 12), **SMALL)]  # 288 GB in the reference
    monkeypatch.setattr(gpu, "IMPLEMENTATIONS", gpu.IMPLEMENTATIONS | {"alignment_losses": ("reference",)})
    assert run(monkeypatch, checked, timed) == 0
    rows = read_rows(on_cpu)
    assert [row["impl"] for row in rows if row.get("ok")] == ["triton"] * 3
    measured = {(row["op"], row["impl"]): row for row in rows if "ok" not in row}
    assert {impl for op, impl in measured if op == "info_nce"} == {
        *("triton", "torch", "reference", "inf_cl", "compiled")
    }
    assert "it holds at least 288 GB" in measured["alignment_losses", "compiled"]["left_out"]
    assert "its tensors are on cpu" in measured["rank_of_positive", "cuda"]["left_out"]
    said = capsys.readouterr().out
    assert "3 checks, all within budget" in said
    assert "1 not checked: frame_similarity: impl='cuda': its tensors are on cpu" in said
    assert "info_nce step 5x5 D=8 float32 (" in said and "target 1e+09: met" in said
    assert "Beside the best baseline:\ninfo_nce" in said


def test_a_wrong_kernel_is_reported_and_nothing_is_timed(on_cpu, monkeypatch, capsys):
    monkeypatch.setitem(gpu.BUDGET, torch.float32, (0.0, 0.0))
    assert run(monkeypatch, [case("info_nce", 7, **SMALL)], [case("info_nce", 5, **SMALL)]) == 1
    assert "1 checks, SOME WRONG" in capsys.readouterr().out
    assert all("ms_p50" not in row for row in read_rows(on_cpu))


def test_cases_past_the_deadline_are_in_the_results(on_cpu, monkeypatch):
    cases = [case("info_nce", 5, **SMALL)]
    assert run(monkeypatch, cases, cases, "--seconds", "0") == 0
    assert {row["left_out"] for row in read_rows(on_cpu)} == {"time is up", "time is up before its check"}


def test_the_gate_fails_if_a_run_is_worse(on_cpu, monkeypatch, capsys):
    fast = {"name": "info_nce step 5x5 D=8 float32", "impl": "torch", "ms_p50": 1e-9, "ms_p80": 1e-9}
    line = json.dumps(fast | {"time": "2025-12-31"})
    (on_cpu.parent / "20251231-abc-gpu.jsonl").write_text(line + "\n")
    timed = [case("info_nce", 5, **SMALL)]
    assert run(monkeypatch, [], timed, "--gate") == 1
    assert "WORSE info_nce step 5x5 D=8 float32 torch: ms" in capsys.readouterr().out
    assert run(monkeypatch, [], timed) == 0


def test_the_table_of_a_results_file_needs_no_gpu(on_cpu, monkeypatch, capsys):
    run(monkeypatch, [], [case("info_nce", 5, **SMALL)], "--seconds", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    capsys.readouterr()
    assert gpu.main(["--table", str(on_cpu)]) == 0
    assert "- compiled, 1 rows: time is up (info_nce step 5x5 D=8 float32 first)" in capsys.readouterr().out


def test_training_steps_are_in_the_results_with_their_target(on_cpu, monkeypatch, capsys):
    def steps(contest, device):
        asked.append(contest.seconds)
        row = {"name": contest.name, "op": "step", "tflops_needed": 50.0, "extra_gb": 16.0, "kept_mb": 1.0}
        row |= {"launches": 500, "target_ms": 52.0, "samples_s": 2000.0}
        times = {"reference": 900.0, "ours bf16": 60.0, "ours fp8": 40.0}
        measured = [row | {"impl": x, "ms_p50": t, "ms_p20": t, "ms_p80": t} for x, t in times.items()]
        return [*measured[:2], measured[2] | {"target_ms": 36.0}]

    asked = []
    monkeypatch.setattr(gpu, "compare_steps", steps)
    monkeypatch.setattr(gpu, "checked_tower_cases", lambda: [])
    assert gpu.main(["--suite", "step", "--only", " b1", "--seconds", "1000"]) == 0
    assert len(asked) == 12 and asked[0] < asked[-1], "1, 16, 128, 1024 pairs; the last may take what is left"
    said = capsys.readouterr().out
    assert "| step ViT-L/14 b1024 | ours bf16 | 60.000 |" in said
    assert "step ViT-B/32 b128 (ours bf16): 60 ms, target 52: missed by 15%" in said
    assert "step ViT-B/32 b128 (ours fp8): 40 ms, target 36: missed by 11%" in said
    assert "step ViT-B/32 b128: ours fp8 is 22.50 x as fast as reference, the best baseline" in said
    assert {row["frac_gemm"] for row in read_rows(on_cpu)} == {0.5}


def test_training_steps_past_the_deadline_are_named(on_cpu):
    rows = gpu.time_steps("full", on_cpu, {"time": "now"}, deadline=0.0)
    assert [(row["name"], row["left_out"]) for row in rows] == [
        ("step ViT-B/32 b128", "time is up"),
        ("step ViT-B/32 b1", "time is up"),
    ]


def test_small_sizes_and_every_target_are_timed():
    cases = timed_cases("full")
    assert {16, 128} <= {x.n for x in cases if x.op == "info_nce"}
    assert {(x.op, x.target_ms) for x in cases if x.target_ms} >= {
        ("frame_similarity", 5.2),
        ("frame_similarity", 25),
        ("info_nce", 40),
        ("rank_of_positive", 20),
    }


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
def test_a_peer_computes_the_result_of_our_op_or_gives_a_reason(peer):
    if reason := peer.absent():
        assert importlib.util.find_spec(peer.module) is None or "does not import" in reason
        pytest.skip(f"{peer.name}: {reason}")
    if peer.name != "open_clip" and not torch.cuda.is_available():
        pytest.skip(f"{peer.name} has kernels for GPUs only")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ours = case(peer.op, 9, frames=(3, 3), dim=256, dtype=torch.float32)
    leaves = ours.leaves(device)
    torch.testing.assert_close(peer.call(leaves), ours.call(leaves, "reference", False), rtol=1e-4, atol=1e-5)


def test_the_liger_baseline_is_the_alignment_losses(monkeypatch):
    kl_div = F.kl_div
    module = type("module", (), {"LigerKLDIVLoss": lambda **options: lambda x, y: kl_div(x, y, **options)})
    monkeypatch.setattr("benchmarks.peers._module", lambda name: module)
    peer = next(peer for peer in PEERS if peer.name == "liger")
    leaves = case("alignment_losses", 6, frames=(2, 3), **SMALL).leaves("cpu")
    inputs = AlignmentInputs(text=leaves[0], video=leaves[1], text_frames=leaves[2], video_frames=leaves[3])
    want = alignment_losses(inputs, leaves[4], impl="reference")
    torch.testing.assert_close(peer.call(leaves), want.video + 0.3 * want.frame + want.distill)
