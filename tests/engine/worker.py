"""One rank of a training run, started by the tests: `worker.py JOBS.json RESULTS.json`.

Jobs run one after the other in one process group. Rank 0 writes one result for each job.
"""

import gc
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from discovla.batch import Batch, Losses
from discovla.engine.config import EngineConfig
from discovla.engine.deepspeed import load_deepspeed
from discovla.engine.distributed import (
    World,
    add_over_ranks,
    all_reduce_sum,
    gather,
    gather_objects,
    join_world,
    largest_over_ranks,
    leave_world,
    scale_gradient,
    start_gather,
)
from discovla.engine.optim import OptimConfig, make_optimizer, set_learning_rate, start_state
from discovla.engine.strategies import make_strategy
from discovla.engine.strategy import StepPlan, cast_frozen
from discovla.methods.discovla import DiscoVLA, DiscoVLAConfig
from discovla.ops.column_shard import ColumnShard
from discovla.ops.info_nce import contrastive_loss
from discovla.testing import noise_batch, tiny_architecture
from discovla.towers.weights import initialise
from discovla.train_step import TrainStep

BATCH = 8


class Pairs(nn.Module):
    """A frozen layer, two trained encoders, a trained scale and a layer that no loss reaches."""

    def __init__(self, world: World, job: dict) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.world = world
        self.dtype = torch.bfloat16 if job.get("bf16") or job.get("bf16_parameters") else torch.float32
        self.reaches_unused = bool(job.get("lopsided")) and world.first
        self.frozen = nn.Linear(3, 5).requires_grad_(False)
        self.text, self.video = nn.Linear(5, 7), nn.Linear(5, 7)
        self.unused = nn.Linear(3, 3)
        self.log_scale = nn.Parameter(torch.tensor(1.3))

    def forward(self, batch: Batch) -> Losses:
        return self.contrast(batch.frames)

    def contrast(self, batch: Tensor) -> Losses:
        """Return both directions' cross-entropy over all ranks' pairs: 3 numbers of text, 3 of video."""
        if self.reaches_unused:
            batch = batch + self.unused(batch[:, :3]).repeat(1, 2)
        t, v = (
            self.encode(layer, x) for layer, x in zip((self.text, self.video), batch.chunk(2, 1), strict=True)
        )
        t, v = (F.normalize(x, dim=1) for x in (t, v))
        first, columns = self.world.rank * len(v), None
        if self.world.size > 1:
            t = start_gather(t, self.world)()
            columns = ColumnShard(
                first_text=first, all_reduce=add_over_ranks, all_reduce_max=largest_over_ranks
            )
        logits = self.log_scale.exp() * t @ v.T
        total = contrastive_loss(logits, columns)
        target = first + torch.arange(len(v))
        columns_loss = F.cross_entropy(logits.T.detach(), target, reduction="sum")
        columns_loss = all_reduce_sum(columns_loss, self.world) / len(t)
        terms = {"t2v": 2 * total.detach() - columns_loss, "v2t": columns_loss}
        return Losses(total=scale_gradient(total, self.world.size), terms=terms)

    def encode(self, layer: nn.Linear, x: Tensor) -> Tensor:
        """Compute in self.dtype, independent of the weights' dtype."""
        for linear in (self.frozen, layer):
            x = F.linear(x.to(self.dtype), linear.weight.to(self.dtype), linear.bias.to(self.dtype)).tanh()
        return x.float()


def train(world: World, job: dict) -> dict:
    """Take steps `first` to `last`; load and save states if the job names files."""
    module = Pairs(world, job)
    if job.get("bf16"):
        cast_frozen(module, torch.bfloat16)
    engine = _engine(job)
    optim = OptimConfig(clip_grad_norm=job.get("clip", 0.05), name=job.get("optim", "adamw_released"))
    strategy = make_strategy(module, StepPlan(engine=engine, optim=optim, world=world, batch_size=BATCH))
    if "load" in job:
        state = load_file(job["load"])
        strategy.load_trained_state(_part(state, "trained/"))
        strategy.load_optimizer_state(_part(state, "optimizer/"))
    losses, terms, norms = [], [], []
    for step in range(job.get("first", 0), job.get("last", 6)):
        if step == job.get("save_at"):
            save(world, strategy, job["save"])
        generator = torch.Generator().manual_seed(step)
        batch = torch.randn(BATCH, 6, generator=generator).chunk(world.size)[world.rank]
        result = strategy(_batch(batch))
        try:
            strategy.backward(result.total)
        except RuntimeError as error:
            return {"message": str(error)}
        norms.append(strategy.step(0.01 * (step + 1)).item())
        losses.append(all_reduce_sum(result.total, world).item() / world.size)
        terms.append({name: value.item() for name, value in result.terms.items()})
    if job.get("final"):
        save(world, strategy, job["final"])
    with strategy.gathered() as full:
        evaluated = full.encode(full.text, torch.ones(1, 3)).sum().item()
    dtypes = sorted({f"{p.requires_grad} {p.dtype}" for p in module.parameters()})
    return {"losses": losses, "terms": terms, "norms": norms, "evaluated": evaluated, "dtypes": dtypes}


def write_by_tensors(world: World, job: dict) -> dict:
    """Take steps tensor by tensor and save the state in the layout of every checkpoint since commit 9aa5cf2:
    parameters and moments by name, and the number of steps as int64. Goes on to the end."""
    module = Pairs(world, job)
    optimizer = make_optimizer(module, OptimConfig())
    params = {name: p for name, p in module.named_parameters() if p.requires_grad}
    start_state(optimizer, params.values())
    losses = []
    for step in range(6):
        if step == job["save_at"]:
            state = {f"trained/{name}": p.detach().clone() for name, p in params.items()}
            for name, p in params.items():
                for key in ("exp_avg", "exp_avg_sq"):
                    state[f"optimizer/{key}/{name}"] = optimizer.state[p][key].clone()
            state["optimizer/step"] = torch.tensor(step, dtype=torch.int64)
            save_file(state, job["save"])
        total = module(_batch(torch.randn(BATCH, 6, generator=torch.Generator().manual_seed(step)))).total
        total.backward()
        for p in params.values():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        grads = [p.grad for p in params.values()]
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(grad) for grad in grads]))
        for grad in grads:
            grad.mul_((0.05 / (norm + 1e-6)).clamp(max=1.0))
        set_learning_rate(optimizer, 0.01 * (step + 1))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total.item())
    return {"losses": losses}


def _engine(job: dict) -> EngineConfig:
    short = job.get("bf16_parameters", False)
    return EngineConfig(
        strategy=job.get("strategy", "deepspeed"),
        zero_stage=job.get("stage", 0),
        precision="bf16" if short or job.get("bf16") else "fp32",
        bf16_parameters=short,
        grad_cache_chunks=job.get("grad_cache_chunks", 1),
        offload=job.get("offload", "none"),
        offload_parameters=job.get("offload_parameters", False),
    )


def save(world: World, strategy, path: str) -> None:
    state = {f"trained/{k}": v for k, v in strategy.trained_state().items()}
    state |= {f"optimizer/{k}": v for k, v in strategy.optimizer_state().items()}
    if world.first:
        save_file(state, path)


def _batch(numbers: Tensor) -> Batch:
    """Wrap numbers in a Batch."""
    ids, true = torch.ones(len(numbers), 1, dtype=torch.int64), torch.ones(len(numbers), 1, dtype=torch.bool)
    return Batch(
        text_ids=ids, text_mask=true, frames=numbers, frame_mask=true, video_index=ids[:, 0], valid=true[:, 0]
    )


def _part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): x for name, x in state.items() if name.startswith(prefix)}


def overflow(world: World, job: dict) -> dict:
    """Take a step, one with a non-finite gradient and two more; return the norms and whether the second
    changed anything: the states are those of a run without it."""
    plan = StepPlan(engine=_engine(job), optim=OptimConfig(), world=world, batch_size=BATCH)
    rows = [torch.full((BATCH // world.size, 6), 0.1 * k).sin() for k in range(4)]
    rows[1] = torch.full_like(rows[1], float("nan"))
    states, norms = [], []
    for steps in ((0, 1, 2, 3), (0, 2, 3)):
        strategy = make_strategy(Pairs(world, job), plan)
        for step in steps:
            strategy.backward(strategy(_batch(rows[step])).total)
            norms.append(strategy.step(0.1).item())
        states.append({**strategy.trained_state(), **strategy.optimizer_state()})
    same = all(torch.equal(states[0][name], states[1][name]) for name in states[1])
    return {"norms": [repr(norm) for norm in norms], "same": same}


def reductions(world: World, job: dict) -> dict:
    """Take a step; return how often DeepSpeed reduced gradients, the all-reduces of flat gradients, and
    whether DeepSpeed times the step, for which it would wait for the GPU."""
    plan = StepPlan(engine=_engine(job), optim=OptimConfig(), world=world, batch_size=BATCH)
    strategy = make_strategy(Pairs(world, job), plan)
    counts, flat, all_reduce = {"reductions": 0, "all_reduces": 0}, strategy.flat.grad, dist.all_reduce

    def counted_reduction(*_: object, **__: object) -> None:
        counts["reductions"] += 1

    def counted_all_reduce(x: Tensor, *args: object, **options: object) -> object:
        counts["all_reduces"] += x is flat
        return all_reduce(x, *args, **options)

    strategy.engine.buffered_allreduce_fallback = counted_reduction
    dist.all_reduce = counted_all_reduce
    try:
        strategy.take(_batch(torch.ones(BATCH // world.size, 6)), 0.1)
    finally:
        dist.all_reduce = all_reduce
    return {**counts, "timed": strategy.engine.tput_timer.config.enabled}


def gather_values(world: World, job: dict) -> dict:
    """Return the results of the collectives, equal on every rank."""
    rank = torch.tensor([world.rank])
    result = {
        "ints": gather(rank, world).tolist(),
        "bools": gather(rank == 0, world).tolist(),
        "objects": gather_objects({"rank": world.rank}, world),
        "sum": all_reduce_sum(rank + 1, world).tolist(),
        "strided": gather(torch.arange(4.0).view(2, 2).T + world.rank, world).tolist(),
    }
    everyone = gather_objects(result, world)
    assert all(one == result for one in everyone)
    return result


def gather_gradient(world: World, job: dict) -> dict:
    """Return the loss of all pairs and the averaged gradient of a linear encoder."""
    torch.manual_seed(0)
    weight = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    x = torch.randn(BATCH, 4, dtype=torch.float64).chunk(world.size)[world.rank]
    own = F.normalize(x @ weight.T, dim=1)
    wait = start_gather(own, world)
    own = own * 2  # between start and wait
    part = (wait() @ own.T).exp().sum()
    loss = (part if world.size == 1 else add_over_ranks(part)[0]).log()
    scale_gradient(loss, world.size).backward()
    assert weight.grad is not None
    return {
        "loss": loss.item(),
        "gradient": (all_reduce_sum(weight.grad, world) / world.size).flatten().tolist(),
    }


def grad_cache(world: World, job: dict) -> dict:
    """Return losses, norms and states of four steps of a tiny DiscoVLA, encoded whole and in chunks."""
    results = []
    optim = OptimConfig(clip_grad_norm=0.5, name="adamw")
    for chunks in (1, 3):
        engine = _engine({**job, "grad_cache_chunks": chunks})
        torch.manual_seed(0)
        method = DiscoVLA(tiny_architecture(), DiscoVLAConfig(fused_vision_blocks=1, fused_text_blocks=1))
        initialise(method, tiny_architecture(), seed=0)
        method.freeze()
        plan = StepPlan(engine=engine, optim=optim, world=world, batch_size=BATCH)
        strategy = make_strategy(TrainStep(method, world, "exact", chunks), plan)
        losses, norms = [], []
        for step in range(4):
            batch = replace(noise_batch(tiny_architecture(), size=BATCH, seed=step), valid=None)
            rows = BATCH // world.size
            losses.append(strategy(batch[world.rank * rows : (world.rank + 1) * rows]).total)
            strategy.backward(losses[-1])
            norms.append(strategy.step(1e-3).item())
        state = {name: x.flatten().tolist() for name, x in strategy.trained_state().items()}
        results.append({"losses": [x.item() for x in losses], "norms": norms, "state": state})
    return {"whole": results[0], "chunked": results[1]}


def held(world: World, job: dict) -> dict:
    """Return the bytes of the tensors a strategy holds: after a step, and the peak in backward."""
    load_deepspeed(world)
    gc.collect()
    gc.freeze()  # leaves out tensors that exist already
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(300, 300, bias=False).requires_grad_(False), *_trained_layers())
    plan = StepPlan(engine=_engine(job), optim=OptimConfig(), world=world, batch_size=world.size)
    strategy = make_strategy(_Mean(module), plan)
    most = [0]

    def look(_: Tensor) -> None:
        most[0] = max(most[0], _held())

    for param in strategy.trained.values():
        param.register_post_accumulate_grad_hook(look)
    for _ in range(2):
        loss = strategy(_batch(torch.ones(1, 300))).total
        strategy.backward(loss)
        del loss
        strategy.step(0.1)
    gc.collect()
    return {"after": _held(), "most": most[0]}


class _Mean(nn.Module):
    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, batch: Batch) -> Losses:
        return Losses(total=self.layers(batch.frames).square().mean(), terms={})


def _trained_layers() -> list[nn.Module]:
    return [nn.Linear(300, 300, bias=False) for _ in range(8)]


def _held() -> int:
    """Return the bytes of the storages of all tensors and gradients that Python tracks."""
    storages = {}
    for item in gc.get_objects():
        if issubclass(type(item), Tensor):
            for x in (item, item.grad if item.is_leaf else None):
                if x is not None and not x.is_meta:
                    storages[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
    return sum(storages.values())


CASES = {
    "reductions": reductions,
    "write_by_tensors": write_by_tensors,
    "held": held,
    "grad_cache": grad_cache,
    "train": train,
    "overflow": overflow,
    "gather_values": gather_values,
    "gather_gradient": gather_gradient,
}


def main() -> None:
    jobs, results = (Path(word) for word in sys.argv[-2:])  # after the deepspeed launcher's --local_rank
    torch.set_num_threads(1)
    world = join_world("cpu")
    answers = [CASES[job.get("case", "train")](world, job) for job in json.loads(jobs.read_text())]
    if world.first:
        results.write_text(json.dumps(answers))
    leave_world()


if __name__ == "__main__":
    main()
