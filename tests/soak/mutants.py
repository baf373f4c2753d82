"""Put faults into a copy of the code, one at a time, and report which of them the fast tests catch.

    python -m tests.soak.mutants [--only WORD] [--seconds N] [--total N] [--processes N] [--rows FILE]
                                [--control]

Prints a line for every fault and a table at the end.  Ends with status 1 if less than 95 % are caught.
A fault whose tests take longer than their limit, or that is not in the code, counts as not caught.
With --rows a run goes on where the last one stopped: each result is appended to the file at once, and faults
that it has are not tried again; the table is of the whole file.  With --control the tests that caught a
fault are run without any at the end: one that does not pass then has caught nothing.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import resource
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
COPIED = (
    *("discovla", "kernels", "csrc", "tests", "benchmarks", "configs", "docs"),
    *("pyproject.toml", "train.py", "README.md", "CONTRIBUTING.md"),
)
LEAST = 0.95  # share of faults that are caught
LIMIT = 120.0  # seconds of CPU time for the tests of one fault
FAILED = re.compile(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", re.MULTILINE)  # lines of pytest's summary
LIBRARIES = ("triton", "numpy", "av", "PIL.Image", "pydantic", "safetensors.torch")


@dataclass(frozen=True)
class Mutant:
    """A fault: `old` becomes `new` in a file; `tests` are those of `make test` that concern it."""

    file: str
    old: str
    new: str
    tests: str

    @property
    def title(self) -> str:
        old, new = (" ".join(text.split()) for text in (self.old, self.new))
        return f"{self.file}: {old[:48]} -> {new[:48] or 'nothing'}"


def _engine(
    old: str, new: str, tests: str = "tests/engine/test_checkpoint.py tests/test_durability.py"
) -> Mutant:
    return Mutant("discovla/engine/checkpoint.py", old, new, tests)


EVALUATE, METRICS = (
    "tests/test_evaluate.py -k 'qb_norm or bank or rerank or own_dual_softmax'",
    "tests/retrieval",
)
WIDE, HOST = "tests/methods/test_widening.py", "tests/ops/test_cuda_on_host.py"
TRAINING = "tests/data/shards/test_training.py -k 'before_training or random_training or small'"
SHARDS = "tests/test_durability.py tests/data/shards/test_writer.py tests/data/shards/test_reader.py"
CLIP2VIDEO = "tests/methods/test_clip2video.py -k 'weight or golden_similarities'"
FUSION = "tests/ops/test_temporal_fusion.py -k 'formula and triton'"
STEP, TRANSFER = "tests/test_train_step.py", "tests/data/test_transfer.py"

MUTANTS = (
    # wiring above tested functions
    Mutant(
        "discovla/evaluate.py", "cosines = matrix / method.logit_scale().item()", "cosines = matrix", EVALUATE
    ),
    Mutant("discovla/evaluate.py", "len(video)) / method.logit_scale().item()", "len(video))", EVALUATE),
    Mutant("discovla/evaluate.py", "options.bank[::step]", "options.bank[:BANK]", EVALUATE),
    Mutant("discovla/evaluate.py", "if clip.split == data.train_split", "if clip.split == split", EVALUATE),
    Mutant("discovla/evaluate.py", "if clip.split == data.train_split", "if clip.split != split", EVALUATE),
    Mutant("discovla/evaluate.py", "dual_softmax(matrix)", "dual_softmax(matrix / 100)", EVALUATE),
    Mutant("discovla/evaluate.py", "dual_softmax_scale=scale", "dual_softmax_scale=1.0", EVALUATE),
    Mutant(
        "discovla/evaluate.py",
        "text_to_video_ranks(by_text, groups)",
        "text_to_video_ranks(by_video, groups)",
        EVALUATE,
    ),
    Mutant("discovla/data/dataset.py", 'seed = "" if training else None', "seed = None", TRAINING),
    Mutant("discovla/data/dataset.py", "size = None if training and", "size = None if", TRAINING),
    Mutant(
        "discovla/data/shards/reader.py",
        "np.unique(indices))",
        "np.unique(indices)[:1])",
        "tests/data/shards",
    ),
    Mutant("discovla/retrieval/metrics.py", "ranks <= k", "ranks < k", METRICS),
    Mutant("discovla/retrieval/metrics.py", "np.median", "np.mean", METRICS),
    Mutant("discovla/retrieval/rerank.py", "beta * bank, axis=0", "bank, axis=0", METRICS),
    Mutant(
        "discovla/retrieval/similarity.py",
        "v2t = rank_of_positive(video, text, every, groups=own,",
        "v2t = rank_of_positive(video, text, every, groups=None,",
        f"{METRICS} {EVALUATE}",
    ),
    # constants that are symmetric in published settings
    Mutant(
        "discovla/methods/clip2video.py",
        "return self.config.center_weight * glob + (1 - self.config.center_weight) * aligned",
        "return (1 - self.config.center_weight) * glob + self.config.center_weight * aligned",
        CLIP2VIDEO,
    ),
    Mutant(
        "discovla/methods/clip2video.py",
        "excluded(w * glob + (1 - w) * aligned, ignore)",
        "excluded((1 - w) * glob + w * aligned, ignore)",
        CLIP2VIDEO,
    ),
    Mutant(
        "discovla/methods/clip2video.py",
        'w * terms["global"] + (1 - w) * terms["aligned"]',
        '(1 - w) * terms["global"] + w * terms["aligned"]',
        CLIP2VIDEO,
    ),
    Mutant(
        "discovla/nn/features.py",
        "return x.to(torch.promote_types(x.dtype, torch.float32))",
        "return x",
        WIDE,
    ),
    Mutant(
        "discovla/methods/base.py",
        "return widen(self.vision(self._tower_input(frames), visible))",
        "return self.vision(self._tower_input(frames), visible)",
        WIDE,
    ),
    Mutant(
        "discovla/methods/base.py",
        "self.embed_text(widen(pooled), widen(words),",
        "self.embed_text(widen(pooled), words,",
        WIDE,
    ),
    Mutant(
        "discovla/methods/base.py",
        "return widen(features).unflatten(0, (b, f))",
        "return features.unflatten(0, (b, f))",
        WIDE,
    ),
    Mutant(
        "discovla/ops/info_nce.py",
        "F.cross_entropy(logits.T, target)",
        "F.cross_entropy(logits, target)",
        "tests/ops/test_contrastive.py -k '7 and torch' tests/methods/test_clip2video.py",
    ),
    Mutant(
        "discovla/engine/strategy.py",
        "self.trained[name].clamp_(max=limit)",
        "self.trained[name].clamp_(min=limit)",
        "tests/engine/test_strategy.py -k bounded",
    ),
    # exact tiles and half precision
    Mutant(
        "kernels/discovla_kernels/temporal_fusion.py",
        "if first + BLOCK >= length:",
        "if first + BLOCK > length:",
        FUSION,
    ),
    Mutant(
        "kernels/discovla_kernels/attention_tiles.py",
        '"ONE": length <= block',
        '"ONE": length <= block + 1',
        "tests/ops/test_short_attention.py -k one_tile",
    ),
    Mutant(
        "kernels/discovla_kernels/attention_tiles.py",
        "min(64, max(16, triton.next_power_of_2(length)))",
        "min(64, max(16, triton.next_power_of_2(length) // 2))",
        "tests/ops/test_short_attention.py -k one_tile",
    ),
    Mutant(
        "kernels/discovla_kernels/temporal_fusion.py",
        "here = (readout >= first) &",
        "here = ((readout > first) | (first == 0)) &",
        FUSION,
    ),
    Mutant(
        "kernels/discovla_kernels/temporal_fusion.py",
        "max(16, triton.next_power_of_2(readout_rows.shape[1]))",
        "16",
        FUSION,
    ),
    Mutant(
        "kernels/discovla_kernels/merge_tokens.py",
        "tl.where(highest > best, lowest",
        "tl.where(highest >= best, lowest",
        "tests/ops/test_merge_tokens.py -k equal_cosines",
    ),
    Mutant(
        "kernels/discovla_kernels/readout_attention.py",
        "max(16, triton.next_power_of_2(max(1, group)))",
        "16",
        "tests/ops/test_readout_attention.py -k 'formula and triton'",
    ),
    Mutant(
        "kernels/discovla_kernels/tiles.py",
        "else tl.float32",
        "else tl.float16",
        "tests/ops/test_accumulators.py",
    ),
    Mutant(
        "kernels/discovla_kernels/unit_mean.py",
        '"ACC": accumulator(x)',
        '"ACC": tl.float16',
        "tests/ops/test_accumulators.py tests/ops/test_unit_mean.py",
    ),
    Mutant(
        "csrc/top_k.cu",
        "const bool there = tile + c < end;",
        "const bool there = tile + c <= end;",
        f"{HOST} -k best",
    ),
    Mutant("csrc/top_k.cu", "(0xFFFFFFFFu - index)", "index", f"{HOST} -k best"),
    # durability
    _engine("        file.flush()\n        os.fsync(file.fileno())\n", "        file.flush()\n"),
    _engine("    write_tensors(path, named)\n    _flush(path)", "    write_tensors(path, named)"),
    _engine("        _flush(writing)\n        _put_in_place", "        _put_in_place"),
    _engine("    os.rename(writing, final)\n    _flush(final.parent)", "    os.rename(writing, final)"),
    _engine("    os.rename(writing, final)\n", "    shutil.copytree(writing, final)\n"),
    _engine(
        "        os.replace(writing, pointer)\n        _flush(pointer.parent)",
        "        os.replace(writing, pointer)",
    ),
    _engine("        os.replace(writing, pointer)\n", "        shutil.copy(writing, pointer)\n"),
    _engine(
        "    if final.exists():\n        os.rename(final, old)",
        "    if final.exists():\n        shutil.rmtree(final)",
    ),
    _engine("        if not final.exists():\n            os.rename(path, final)", "        pass"),
    _engine('    for key in ("bytes", "sha256"):', '    for key in ("bytes",):'),
    Mutant(
        "discovla/data/shards/writer.py",
        "        file.flush()\n        os.fsync(file.fileno())\n    _write",
        "    _write",
        SHARDS,
    ),
    Mutant(
        "discovla/data/shards/writer.py",
        "            file.flush()\n            os.fsync(file.fileno())\n        unfinished.replace(path)",
        "        unfinished.replace(path)",
        SHARDS,
    ),
    Mutant(
        "discovla/trainer.py",
        "    part.replace(path)",
        "    path.write_bytes(part.read_bytes())",
        "tests/test_durability.py",
    ),
    Mutant(
        "discovla/data/manifest.py",
        "        part.replace(path)",
        "        path.write_bytes(part.read_bytes())",
        "tests/test_durability.py",
    ),
    Mutant(
        "discovla/retrieval/record.py",
        "            part.replace(path)",
        "            path.write_bytes(part.read_bytes())",
        "tests/test_durability.py",
    ),
    Mutant(
        "discovla/engine/log.py",
        "    os.replace(writing, path)",
        "    path.write_bytes(writing.read_bytes())",
        "tests/test_durability.py",
    ),
    Mutant(
        "discovla/features.py",
        "            hidden.replace(path)",
        "            path.write_bytes(hidden.read_bytes())",
        "tests/test_durability.py",
    ),
    Mutant(
        "discovla/features.py",
        "((array, lambda file: np.save(file, features)), (described, None))",
        "((described, None), (array, lambda file: np.save(file, features)))",
        "tests/test_durability.py",
    ),
    Mutant(
        "discovla/data/quarantine.py",
        "        part.replace(path)",
        "        path.write_bytes(part.read_bytes())",
        "tests/test_durability.py",
    ),
    Mutant(
        "discovla/data/video/index.py",
        "            part.replace(path)",
        "            path.write_bytes(part.read_bytes())",
        "tests/test_durability.py",
    ),
    Mutant(
        "discovla/corpus.py",
        "    writing.replace(final)",
        "    final.write_bytes(writing.read_bytes())",
        "tests/test_durability.py",
    ),
    # randomness of a step, and the optimiser
    Mutant(
        "discovla/trainer.py",
        "* 1_000_003 + step) * 4_096 + self.world.rank)",
        "* 1_000_003 + step) * 4_096)",
        STEP,
    ),
    Mutant("discovla/trainer.py", "* 1_000_003 + step) * 4_096", "* 1_000_003) * 4_096", STEP),
    Mutant("discovla/trainer.py", "(self.config.seed * 1_000_003 + step)", "(self.config.seed + step)", STEP),
    Mutant(
        "discovla/engine/optim.py",
        'keep=1 - lr * group["weight_decay"]',
        'keep=1 + lr * group["weight_decay"]',
        "tests/engine/test_optim.py",
    ),
    Mutant(
        "discovla/engine/optim.py",
        "root, bias = math.sqrt(1 - beta2**step), 1 - beta1**step",
        "root, bias = math.sqrt(1 - beta1**step), 1 - beta2**step",
        "tests/engine/test_optim.py",
    ),
    # files of other programs, waits, locks
    Mutant("discovla/data/transfer.py", "    if need > free:", "    if need > 2 * free:", TRANSFER),
    Mutant(
        "discovla/data/transfer.py",
        "if should_stop is not None and should_stop():",
        "if should_stop is None:",
        TRANSFER,
    ),
    Mutant("discovla/data/transfer.py", "    if waited > limit:", "    if waited > 1e9:", TRANSFER),
    Mutant(
        "discovla/data/sandbox.py", "        _limit_stalls(self._pipe)\n", "", "tests/data/test_sandbox.py"
    ),
    Mutant(
        "discovla/lock.py",
        'return holder.get("process") == _process(int(holder["pid"]))',
        "return True",
        "tests/test_lock.py -k 'killed or given or another_machine'",
    ),
    Mutant(
        "discovla/towers/weights.py",
        "        if bad:\n            raise ValueError(",
        "        if bad > 1e9:\n            raise ValueError(",
        "tests/towers/test_foreign_weights.py",
    ),
    Mutant(
        "discovla/data/datasets/tables.py",
        "    if len(cells) != len(header):",
        "    if len(cells) < len(header):",
        "tests/data/datasets/test_foreign_tables.py tests/data/datasets/test_generic.py",
    ),
    Mutant(
        "discovla/data/datasets/generic.py",
        "if (status.st_dev, status.st_ino) in seen:",
        "if False:",
        "tests/data/datasets/test_foreign_folders.py",
    ),
    Mutant(
        "discovla/data/fingerprint.py",
        '"spans": _hash([clip.start, clip.end] for clip in clips)',
        '"spans": _hash([clip.start, clip.start] for clip in clips)',
        "tests/test_changed_data.py -k 'fingerprint or differ or part'",
    ),
    Mutant(
        "discovla/methods/base.py",
        "range(0, max(len(text), most or 1), PAIRS)",
        "range(0, max(len(text), 1), PAIRS)",
        "tests/methods/test_time.py -k read_the_logit",
    ),
)


def start(mutant: Mutant | None, tests: Sequence[str], seconds: float, folder: Path) -> int | None:
    """Run tests in a copy of the code with a fault, in a forked process; return its id.

    None if the fault is not in the code.  Libraries are imported before, which saves most of the time.

    Args:
        mutant: the fault; None for none.
    """
    folder.mkdir()
    for name in COPIED:
        source = ROOT / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, folder / name)
    if mutant is not None:
        path = folder / mutant.file
        text = path.read_text()
        if mutant.old not in text:
            return None
        path.write_text(text.replace(mutant.old, mutant.new, 1))
    child = os.fork()
    if child:
        return child
    status = 99
    try:
        os.chdir(folder)
        with (folder / "output").open("w") as output:
            for descriptor in (1, 2):
                os.dup2(output.fileno(), descriptor)
        resource.setrlimit(resource.RLIMIT_CPU, (int(seconds), int(seconds)))
        signal.alarm(int(20 * seconds))
        for name in [
            name for name in sys.modules if name.split(".")[0] in ("tests", "discovla", "benchmarks")
        ]:
            del sys.modules[name]
        sys.path[:] = [str(folder), str(folder / "kernels"), *(x for x in sys.path if str(ROOT) not in x)]
        os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:2])
        words = ["-q", "-m", "not slow", "--timeout=150", "-p", "no:cacheprovider", f"--rootdir={folder}"]
        words += [] if mutant is None else ["-x"]
        status = int(pytest.main([*words, f"--basetemp={folder}/temporary", *tests]))
    finally:
        os._exit(status)


@dataclass(frozen=True)
class Row:
    """Result of a fault: "caught", "survived" or what went wrong, and the test that failed."""

    title: str
    tests: str
    result: str
    by: str = ""


def row_of(mutant: Mutant, status: int, output: Path) -> Row:
    """Return the row of a fault from the status and the output of its tests."""
    if os.WIFSIGNALED(status):
        return Row(mutant.title, mutant.tests, f"ended by signal {os.WTERMSIG(status)}")
    code = os.WEXITSTATUS(status)
    failed = FAILED.findall(output.read_text(errors="replace"))
    result = {0: "survived", 1: "caught"}.get(code, f"pytest {code}")
    return Row(mutant.title, mutant.tests, result, failed[0] if failed else "")


def attempt(mutants: list[Mutant], options: argparse.Namespace, record: Callable[[Row], None]) -> None:
    """Try faults, `options.processes` at a time, and record the row of each as soon as it is known."""
    waiting, running = list(enumerate(mutants)), {}
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        while running or waiting:
            if waiting and time.monotonic() - started > options.total:
                waiting = []
            elif waiting and len(running) < options.processes:
                number, mutant = waiting.pop(0)
                folder = Path(temporary) / str(number)
                child = start(mutant, shlex.split(mutant.tests), options.seconds, folder)
                if child is None:
                    record(Row(mutant.title, mutant.tests, "not in the code"))
                else:
                    running[child] = mutant, folder
            elif running:
                child, status = os.wait()
                mutant, folder = running.pop(child)
                record(row_of(mutant, status, folder / "output"))
                shutil.rmtree(folder, ignore_errors=True)


def failing_without_a_fault(tests: Sequence[str], seconds: float) -> list[str]:
    """Run the tests that caught a fault in a copy without one; return those that do not pass.

    Raises:
        RuntimeError: the tests could not be run to their end.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "control"
        child = start(None, tests, seconds, folder)
        assert child is not None, "there is no fault to miss"
        _, status = os.waitpid(child, 0)
        output = (folder / "output").read_text(errors="replace")
    if os.WIFSIGNALED(status) or os.WEXITSTATUS(status) > 1:
        raise RuntimeError(f"tests without a fault: expected them to end, found status {status}:\n{output}")
    return FAILED.findall(output)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", default="", help="try faults whose title or tests have this word")
    parser.add_argument("--seconds", type=float, default=LIMIT, help="CPU time for the tests of one fault")
    parser.add_argument("--total", type=float, default=3600.0, help="start no fault after this many seconds")
    parser.add_argument("--processes", type=int, default=1, help="faults tried at a time")
    parser.add_argument("--rows", type=Path, help="JSONL file of results to go on with")
    parser.add_argument("--control", action="store_true", help="run the tests that failed without a fault")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
    for name in LIBRARIES:
        importlib.import_module(name)
    chosen = [m for m in MUTANTS if options.only in m.title or options.only in m.tests]
    rows: dict[str, Row] = {}
    if options.rows and options.rows.exists():
        rows = {row["title"]: Row(**row) for row in map(json.loads, options.rows.read_text().splitlines())}

    def record(row: Row) -> None:
        rows[row.title] = row
        print(f"{row.result:<18} {row.title}  {row.by}", flush=True)
        if options.rows:
            with options.rows.open("a") as file:
                file.write(json.dumps(asdict(row)) + "\n")

    attempt([mutant for mutant in chosen if mutant.title not in rows], options, record)
    if options.control:
        tests = sorted({row.by for row in rows.values() if row.result == "caught"})
        failing = failing_without_a_fault(tests, options.seconds * max(1, len(tests)))
        for row in [row for row in rows.values() if row.by in failing]:
            record(replace(row, result="fails without it"))
    tried = [rows[mutant.title] for mutant in MUTANTS if mutant.title in rows]
    print("\n| fault | tests | result | by |\n|---|---|---|---|")
    for row in tried:
        print(f"| `{row.title}` | `{row.tests}` | {row.result} | {row.by} |")
    caught = sum(row.result == "caught" for row in tried)
    share = 100 * caught / max(1, len(tried))
    print(f"\n{caught} of {len(tried)} caught ({share:.0f} %); the list has {len(MUTANTS)}")
    return int(not tried or caught < LEAST * len(tried))


if __name__ == "__main__":
    sys.exit(main())
