"""The processes of ``benchmarks/gpu.py``: ``python -m benchmarks.on_gpu TASK``, the fields of `Task` as JSON.

What a task comes to is its last line of output, as JSON. The module itself imports no torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import instep
from benchmarks.gate import Gate
from instep.objectives import Sums
from instep.objectives.language import NextToken

if TYPE_CHECKING:
    from torch import Tensor, nn

KINDS = ["Instep", "bare loop", "bare loop, deterministic", "DDP"]
"""The contenders."""

ROWS = 512
"""Samples of the data, random tokens."""


@dataclass(frozen=True)
class Size:
    """Arguments of the GPT, and `samples` a step."""

    vocabulary: int
    context: int
    width: int
    depth: int
    heads: int
    samples: int

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.samples * self.context

    @property
    def model(self) -> dict[str, Any]:
        """Arguments of the GPT."""
        return {name: getattr(self, name) for name in ("vocabulary", "context", "width", "depth", "heads")}


@dataclass(frozen=True)
class Task:
    """What one process does, in a folder of its own. `gate`: the socket of a contender's gate."""

    kind: str
    device: Literal["cpu", "cuda"]
    folder: str
    size: Size
    steps: int = 6
    gate: str = ""
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    compiles: bool = True


def tokens(vocabulary: int, context: int) -> Any:
    """[ROWS, context + 1] random tokens, as a data set of whole rows."""
    import torch
    from torch.utils.data import TensorDataset

    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randint(vocabulary, (ROWS, context + 1), generator=generator))


class GatedNextToken:
    """Next-token prediction on rows of `tokens`, with a gate before each forward that trains."""

    def __init__(self, gate: str = ""):
        self._objective, self._gate, self._forwards = NextToken(), Gate(gate) if gate else None, -1

    def counts(self, batch: Any) -> int:
        """As next-token prediction."""
        return self._objective.counts(batch[0])

    def __call__(self, model: nn.Module, batch: Any) -> Sums:
        import torch

        if torch.is_grad_enabled() and self._gate is not None:
            if self._forwards >= 0:  # the first is the engine's look at the objective
                tick(self._gate)
            self._forwards += 1
        return self._objective(model, batch[0])


def tick(gate: Gate) -> None:
    """The gate, once the device has done what it was given."""
    import torch

    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    gate.tick()


def recipe_of(task: Task, *, batch: int, microbatches: int = 1, dropout: float = 0.0, steps: int = 0) -> instep.Recipe:
    """What Instep trains."""
    size = task.size
    return instep.Recipe(
        model={"use": "instep.models:GPT", "args": {**size.model, "dropout": dropout}},
        objective={"use": "benchmarks.on_gpu:GatedNextToken", "args": {"gate": task.gate}},
        data={"use": "benchmarks.on_gpu:tokens", "args": {"vocabulary": size.vocabulary, "context": size.context}},
        optimizer={"use": "torch.optim:AdamW", "args": {"lr": 3e-4, "fused": True}},
        batch=batch,
        microbatches=microbatches,
        steps=steps or task.steps,
        seed=0,
        precision=task.precision,
        compile=task.compiles,
    )


def by_instep(task: Task) -> dict[str, Any]:
    """`instep.train`, one worker."""
    team = instep.Team(device=task.device, checkpoint_every=1_000_000)
    run = instep.train(recipe_of(task, batch=task.size.samples), team=team, out=Path(task.folder, "run"))
    return {"digest": run.digest}


def by_torch(task: Task) -> dict[str, Any]:
    """A bare loop, or DDP at world size 1."""
    import torch
    import torch.nn.functional as F
    from torch.nn.parallel import DistributedDataParallel

    from instep.models import GPT

    torch.use_deterministic_algorithms("deterministic" in task.kind)
    if "deterministic" in task.kind:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        if task.compiles:
            torch._inductor.config.deterministic = True
    torch.set_float32_matmul_precision("highest")
    torch.manual_seed(0)
    if task.device == "cpu":
        torch.set_num_threads(1)
    module: Any = GPT(**task.size.model).to(task.device)
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-4, fused=True)
    if task.kind == "DDP":
        backend = "nccl" if task.device == "cuda" else "gloo"
        store = f"file://{task.folder}/store"
        torch.distributed.init_process_group(backend, init_method=store, rank=0, world_size=1)
        module = DistributedDataParallel(module, gradient_as_bucket_view=True)
    if task.compiles:
        module = torch.compile(module)
    gate, batches = Gate(task.gate), _batches(task)
    for _ in range(task.steps):
        tick(gate)
        rows = next(batches).to(task.device, non_blocking=True)
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(task.device, torch.bfloat16):
            logits = module(rows[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        optimizer.step()
    if task.kind == "DDP":
        torch.distributed.destroy_process_group()
    return {"objective": loss.item()}


def _batches(task: Task) -> Iterator[Tensor]:
    from torch.utils.data import DataLoader

    rows = tokens(task.size.vocabulary, task.size.context)
    while True:
        for (batch,) in DataLoader(rows, task.size.samples, shuffle=True, pin_memory=task.device == "cuda"):
            yield batch


def small(task: Task) -> instep.Recipe:
    """What is trained for its digest."""
    size = Size(vocabulary=256, context=64, width=64, depth=2, heads=4, samples=8)
    return recipe_of(replace(task, size=size), batch=8, microbatches=4, dropout=0.1)


def workers(task: Task) -> dict[str, Any]:
    """The digests of one worker, and of two that share the device."""
    device = "cuda:0" if task.device == "cuda" else "cpu"
    recipe, found = small(task), {}
    for count in (1, 2):
        team = instep.Team(workers=count, device=device, checkpoint_every=1_000_000)
        found[str(count)] = instep.train(recipe, team=team, out=Path(task.folder, f"run-{count}")).digest
    return found


def digests(task: Task) -> dict[str, Any]:
    """Of three runs, and of one that goes on from its middle."""
    recipe = small(task)
    team = instep.Team(device=task.device, checkpoint_every=1, keep=0)
    runs = [instep.train(recipe, team=team, out=Path(task.folder, f"run-{number}")) for number in range(3)]
    last = runs[-1].path
    for version in range(recipe.steps // 2 + 1, recipe.steps + 1):
        shutil.rmtree(last / "checkpoints" / f"step-{version:08d}")
    resumed = instep.train(recipe, team=team, resume=last)
    return {**{f"run {number}": run.digest for number, run in enumerate(runs)}, "resumed": resumed.digest}


def memory(task: Task) -> dict[str, Any]:
    """The plan for 60 % of what the activations take, predicted and measured; `train` measures where it is to fit."""
    team = instep.Team(device=task.device, memory="60%", checkpoint_every=1_000_000)
    seen: list[dict[str, Any]] = []
    recipe = recipe_of(task, batch=task.size.samples, steps=2)
    instep.train(recipe, team=team, out=Path(task.folder, "run"), monitors=[seen.append])
    planned = next(event for event in seen if event["kind"] == "planned")
    found = {name: value for name, value in planned.items() if name.endswith(("bytes", "time", "flops"))}
    counted = [event for event in seen if event["kind"] == "gpu_memory"]
    return {**found, **{name: event[name] for event in counted for name in ("peak_bytes", "reserved_bytes")}}


def machine(task: Task) -> dict[str, Any]:
    """What it is measured on."""
    import numpy
    import torch

    found: dict[str, Any] = {"torch": str(torch.__version__), "numpy": numpy.__version__, "instep": instep.__version__}
    if task.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {"gpu": properties.name, "memory_gib": round(properties.total_memory / 2**30, 1)}
        found |= {"cuda": torch.version.cuda, "nccl": list(torch.cuda.nccl.version())}
    return found


def main(given: str) -> None:
    """Does the task, and prints what it comes to."""
    table = json.loads(given)
    task = Task(**{**table, "size": Size(**table["size"])})
    own = {"Instep": by_instep, "digests": digests, "workers": workers, "memory": memory, "machine": machine}
    with contextlib.redirect_stdout(sys.stderr), tempfile.TemporaryDirectory() as spare:
        task = task if task.folder else replace(task, folder=spare)
        found = own.get(task.kind, by_torch)(task)
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
