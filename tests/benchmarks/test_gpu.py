"""The GPU benchmark without a GPU: its parts on the CPU, and its flow with played cases."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from benchmarks import gpu
from benchmarks.case_lists import timed_cases
from benchmarks.measure import read_rows
from benchmarks.peers import PEERS
from benchmarks.step import IMPLS
from discovla.ops import cases
from discovla.ops.alignment_losses import AlignmentInputs, alignment_losses
from discovla.ops.cases import case
from discovla.ops.dispatch import CANDIDATES
from discovla.ops.tower_cases import row_case

ROOT = Path(__file__).parents[2]
SMALL = {"dim": 8, "dtype": torch.float32}
CEILINGS = {"gemm_bf16": 100.0, "copy": 1.0}


def played(*kinds: str) -> list[gpu.Task]:
    options = {"group": "towers", "impl": "triton", "work": gpu.simulated}
    return [gpu.Task(name=kind, arguments=(kind,), **options) for kind in kinds]


def runner(folder: Path) -> gpu.Runner:
    files = [folder / "a-gpu.jsonl", folder / "out/a-gpu.jsonl"]
    return gpu.Runner(files, {"time": "now"}, {"towers": 30.0})


def test_it_imports_nothing_that_a_bare_gpu_machine_lacks():
    lacking = ("av", "pydantic", "deepspeed", "open_clip", "torchvision", "safetensors", "fsspec")
    code = f"import sys; sys.modules.update(dict.fromkeys({lacking})); from benchmarks import gpu"
    code += "; gpu.op_tasks('towers', gpu.checked_tower_cases(), gpu.timed_tower_cases('full'), {}, 'cpu')"
    code += "; [sys.modules.pop(name) for name in ('pydantic', 'safetensors')]; from benchmarks import step"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=300)


def test_each_case_has_its_row_at_once_whatever_becomes_of_it(tmp_path, capsys):
    run = runner(tmp_path)
    run.run(played("right", "lies", "crashes", "out of memory", "timed"), time.monotonic() + 500)
    run.run(played("late"), time.monotonic())
    run.close()
    rows = {row["name"]: row for row in read_rows(tmp_path / "a-gpu.jsonl")}
    assert rows["right"]["ok"] and not rows["lies"]["ok"] and rows["timed"]["ms_p50"] == 2.0
    assert rows["crashes"]["left_out"] == "fails: its process died of SIGSEGV"
    assert rows["out of memory"]["left_out"].startswith("CUDA out of memory")
    assert rows["late"]["left_out"] == "time is up"
    assert read_rows(tmp_path / "out/a-gpu.jsonl") == read_rows(tmp_path / "a-gpu.jsonl")
    assert gpu.finish(run, {}, gate=False) == 1
    printed = capsys.readouterr().out
    assert "2 checks, 1 wrong\nWRONG lies triton" in printed and "| timed | triton | 2.000 |" in printed


@pytest.mark.slow
def test_the_simulation_shows_the_flow_and_leaves_its_table_in_out(tmp_path):
    words = [sys.executable, ROOT / "benchmarks/gpu.py", "--simulate", "--seconds", "300"]
    environment = {**os.environ, "OUT": str(tmp_path)}
    run = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=500)
    assert run.returncode == 1, run.stderr
    for line in ("1 of 2 kernels compiled", "took longer than 10 s", "died of SIGSEGV", "illegal memory"):
        assert line in run.stdout
    rows = read_rows(tmp_path / "simulated-gpu.jsonl")
    timed = {(row["op"], row["impl"]) for row in rows if "ms_p50" in row}
    missing = {(row["op"], row["impl"]) for row in rows if "not installed" in row.get("left_out", "")}
    named = timed | missing | {(row["op"], row["impl"]) for row in rows if "left_out" in row}
    for op in {op for op, _ in timed} - {"step", "data"}:
        assert {(op, impl) for impl in CANDIDATES[op]} <= named, op
    assert {(peer.op, peer.name) for peer in PEERS} <= named
    assert ("step", "ours bf16 triton captured whole") in timed and ("data", "all") in timed
    assert ("short_attention", "flash_attn") in missing and ("mlp", "quack") in missing


def test_the_limit_of_a_case_fits_into_the_time_that_is_left(tmp_path, monkeypatch):
    seen = []

    class Fake:
        def __init__(self, work, *, limit):
            self.limit = limit

        def __call__(self, task):
            seen.append(self.limit)
            return []

        def close(self):
            pass

    monkeypatch.setattr(gpu, "Sandbox", Fake)
    run = runner(tmp_path)
    (task,) = played("right")
    for left in (100.0, 20.0, 6.0):
        run.outcome(task, left)
    assert seen == [30.0, 15.0, 3.75]


def test_kernels_are_checked_against_float64_and_wrong_ones_marked(monkeypatch):
    for op, frames in (("info_nce", (1, 1)), ("frame_similarity", (2, 3)), ("rank_of_positive", (1, 1))):
        (row,) = gpu.check(case(op, 7, frames=frames, **SMALL), "triton", "cpu")
        assert row["ok"], (op, row)
    monkeypatch.setitem(cases.BUDGET, torch.float32, (0.0, 0.0))
    (row,) = gpu.check(case("info_nce", 7, **SMALL), "triton", "cpu")
    assert row["ok"] is False and row["err_gradient"] > 0


def test_rounding_that_exchanges_two_near_ties_is_no_error():
    """Their gradients differed by 1.4e-3 to 1.8e-3 where 2e-4 is allowed."""
    tied = case("late_interaction", 20, frames=(4, 4), dim=16, dtype=torch.float32)
    leaves = tied.leaves("cpu")
    with torch.no_grad():  # two frames of a video match every caption's rows equally well, but for 1e-6
        leaves[1][0, 1] = leaves[1][0, 0] + 1e-6
    truth = tied.truth(leaves)
    with torch.no_grad():  # as rounding would, put the other one in front
        leaves[1][0, 0] -= 1e-6
        leaves[1][0, 1] -= 2e-6
    assert tied.errors("torch", leaves, truth)["err_gradient"] < 2e-4


def test_a_wrong_gradient_is_found_although_near_ties_are_left_out():
    tied = case("late_interaction", 20, frames=(4, 4), dim=16, dtype=torch.float32)
    leaves = tied.leaves("cpu")
    assert tied._direction(leaves, torch.zeros(20, 20)).mean() > 0.9
    wrong = [leaves[0], leaves[1].detach().mul(1.01).requires_grad_()]
    assert tied.errors("torch", wrong, tied.truth(leaves))["err_gradient"] > 5e-3


def test_a_row_of_times_has_work_and_ceilings():
    op = case("info_nce", 5, target_ms=9.0, **SMALL)
    (row,) = gpu.time_case(op, "torch", CEILINGS, "cpu", 0.001)
    assert row["target_ms"] == 9.0 and row["ceilings"] == CEILINGS and row["frac_gemm"] > 0
    assert row["ms_p20"] <= row["ms_p50"] <= row["ms_p80"]


def test_a_matrix_that_does_not_fit_is_left_out_before_it_is_tried(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(1e9), int(1e9)))
    large = case("alignment_losses", 10_000, frames=(12, 12), **SMALL)
    assert gpu.time_case(large, "reference", CEILINGS, "cuda", 1)[0]["left_out"] == (
        "it holds at least 288 GB at once, 1 GB are free"
    )


def test_the_order_is_compile_ceilings_steps_towers_losses_data(tmp_path, monkeypatch):
    groups, compiled = [], []
    run = runner(tmp_path)
    monkeypatch.setattr(run, "compile", lambda tasks, *rest: compiled.extend(tasks))

    def note(tasks, deadline):
        groups.extend(task.group for task in tasks)
        return [{"ceilings": CEILINGS}]

    monkeypatch.setattr(run, "run", note)
    gpu.run_all(run, Namespace(seconds=200.0, only="", workers=2), "cuda")
    assert list(dict.fromkeys(groups)) == ["ceilings", "steps", "towers", "losses", "data"]
    assert {task.impl for task in compiled} == {"triton"} and len(compiled) > 100
    assert set(gpu.STEPS) <= set(IMPLS)
    names = [task.impl for task in gpu.step_tasks(CEILINGS, 1.0)][:4]
    assert names == ["matmul only bf16", "ours bf16", "ours bf16 compiled", "ours bf16 triton"]


def test_the_gate_fails_if_a_run_is_worse(tmp_path, capsys):
    run = runner(tmp_path)
    run.write(played("timed")[0], gpu.simulated("timed"))
    before = {("timed", "triton"): [{"ms_p50": 1.0, "ms_p80": 1.0}]}
    assert gpu.finish(run, before, gate=True) == 1 and gpu.finish(run, before, gate=False) == 0
    assert "WORSE timed triton: ms 2, was 1" in capsys.readouterr().out


def test_the_table_of_a_results_file_needs_no_gpu(tmp_path, capsys):
    row = {"name": "info_nce", "impl": "compiled", "op": "info_nce", "left_out": "time is up"}
    (tmp_path / "x-gpu.jsonl").write_text(json.dumps(row) + "\n")
    assert gpu.main(["--table", str(tmp_path / "x-gpu.jsonl")]) == 0
    assert "- compiled, 1 rows: time is up (info_nce first)" in capsys.readouterr().out


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
    if peer.op == "layer_norm":
        ours = row_case(peer.op, 9, 256, dtype=torch.float32)
    else:
        ours = case(peer.op, 9, frames=(3, 3), dim=256, dtype=torch.float32)
    leaves = ours.leaves(device)
    torch.testing.assert_close(peer.call(leaves), ours.call(leaves, "reference", False), rtol=1e-4, atol=1e-5)


def test_peers_get_unit_rows_and_scalars_as_they_document_them(monkeypatch):
    """Stand-ins compute by the formulas in the documentation of siglip-kernel, memeff and Liger."""

    class ClipLoss:
        def __init__(self, temperature):
            self.temperature = temperature

        def __call__(self, x, y):
            logits = F.normalize(x, dim=-1) @ F.normalize(y, dim=-1).T / self.temperature
            target = torch.arange(len(x))
            return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    def siglip(images, texts, log_temperature, bias):
        sign = 2 * torch.eye(len(images)) - 1
        return -F.logsigmoid(sign * (images @ texts.T * log_temperature.exp() + bias)).sum() / len(images)

    functions = {"fused_siglip_loss": siglip, "MemoryEfficientCLIPLoss": ClipLoss}
    functions["liger_layer_norm"] = lambda x, gain, shift, eps: F.layer_norm(x, gain.shape, gain, shift, eps)
    module = type("module", (), {name: staticmethod(x) for name, x in functions.items()})
    monkeypatch.setattr("benchmarks.peers._module", lambda name: module)
    cases = {op: case(op, 6, dim=8, dtype=torch.float32) for op in ("sigmoid_loss", "info_nce")}
    cases["layer_norm"] = row_case("layer_norm", 6, 8, dtype=torch.float32)
    for name, op in (("siglip_kernel", "sigmoid_loss"), ("memeff", "info_nce"), ("liger", "layer_norm")):
        (peer,) = (peer for peer in PEERS if peer.name == name and peer.op == op)
        leaves = cases[op].leaves("cpu")
        torch.testing.assert_close(peer.call(leaves), cases[op].call(leaves, "reference", False))


def test_the_liger_baseline_is_the_alignment_losses(monkeypatch):
    kl_div = F.kl_div
    module = type("module", (), {"LigerKLDIVLoss": lambda **options: lambda x, y: kl_div(x, y, **options)})
    monkeypatch.setattr("benchmarks.peers._module", lambda name: module)
    peer = next(peer for peer in PEERS if peer.name == "liger" and peer.op == "alignment_losses")
    leaves = case("alignment_losses", 6, frames=(2, 3), **SMALL).leaves("cpu")
    inputs = AlignmentInputs(text=leaves[0], video=leaves[1], text_frames=leaves[2], video_frames=leaves[3])
    want = alignment_losses(inputs, leaves[4], impl="reference")
    torch.testing.assert_close(peer.call(leaves), want.video + 0.3 * want.frame + want.distill)
