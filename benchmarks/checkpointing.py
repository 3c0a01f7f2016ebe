"""Gradient checkpointing against rules of thumb: peak bytes and step time, one run, same model and batch.

Run as ``python benchmarks/checkpointing.py [--depth 12] [--width 256] [--compile]``. One thread, passes interleaved in
random order, medians; extra time is the median ratio to the steps with nothing recomputed just before and just after,
since the machine's speed drifts. Bytes are the peak of live activations (weights, gradients and the batch left out) and
what is held at the end of forward. Results go to benchmarks/results/memory.json.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import math
import random
import statistics
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential, create_selective_checkpoint_contexts

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # run as a file, Python would look for modules in benchmarks/ itself

from benchmarks.lockstep import machine  # noqa: E402
from instep import gradient_checkpointing as gc  # noqa: E402
from instep.gradient_checkpointing.structure import Plan  # noqa: E402
from instep.models import GPT  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "memory.json"

SAVED = [
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
]


class Bare(nn.Module):
    """A block that needs its input alone, so that blocks can stand in a `nn.Sequential`."""

    def __init__(self, block: nn.Module, turns: tuple[Tensor, Tensor]):
        super().__init__()
        self.block, self.turns = block, turns

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.block(x, self.turns)
        return out


class Model(nn.Module):
    """A GPT whose blocks run under `rule`, a function of (block number, block, x)."""

    def __init__(self, depth: int, width: int, context: int):
        super().__init__()
        from instep.models.gpt import rotary_turns

        gpt = GPT(vocabulary=256, context=context, width=width, depth=depth, heads=width // 64)
        turns = rotary_turns(context, gpt.head_size, torch.device("cpu"))
        self.embedding, self.norm, self.output = gpt.embedding, gpt.norm, gpt.output
        self.blocks = nn.ModuleList(Bare(block, turns) for block in gpt.blocks)
        self.rule: Callable[[int, nn.Module, Tensor], Tensor] | None = None
        self.segments = 0

    def forward(self, tokens: Tensor) -> Tensor:
        x: Tensor = self.embedding(tokens)
        if self.segments:
            x = checkpoint_sequential(list(self.blocks), self.segments, x, use_reentrant=False)
        else:
            for number, block in enumerate(self.blocks):
                x = self.rule(number, block, x) if self.rule else block(x)
        out: Tensor = self.output(self.norm(x))
        return out


def objective(model: Any, tokens: Tensor) -> Tensor:
    return F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten(), reduction="sum")


def every(nth: int, number: int, block: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(block, x, use_reentrant=False) if number % nth == 0 else block(x)  # type: ignore[no-any-return]


def selective(number: int, block: nn.Module, x: Tensor) -> Tensor:
    contexts = functools.partial(create_selective_checkpoint_contexts, SAVED)
    return checkpoint(block, x, use_reentrant=False, context_fn=contexts)  # type: ignore[no-any-return]


def ways(model: Model) -> dict[str, Callable[[], None]]:
    """The rules of thumb: each a function that puts it on the model."""

    def put(rule: Any = None, segments: int = 0) -> Callable[[], None]:
        def on() -> None:
            gc.remove(model)
            model.rule, model.segments = rule, segments

        return on

    return {
        "no checkpointing": put(),
        "every block": put(functools.partial(every, 1)),
        "every second block": put(functools.partial(every, 2)),
        "checkpoint_sequential": put(segments=round(math.sqrt(len(model.blocks)))),
        "matmuls and attention saved": put(selective),
    }


def step_s(model: Any, tokens: Tensor) -> float:
    began = time.perf_counter()
    torch.autograd.grad(objective(model, tokens), [p for p in model.parameters() if p.requires_grad])
    return time.perf_counter() - began


def planned(model: Model, plan: Plan) -> Callable[[], None]:
    def on() -> None:
        model.rule, model.segments = None, 0
        gc.apply(model, plan)

    return on


def measure(model: Model, tokens: Tensor, candidates: dict[str, Callable[[], None]], rounds: int) -> dict[str, Any]:
    """Peak bytes, median seconds and the extra time beside the first of each, the passes interleaved."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    ratios: dict[str, list[float]] = {name: [] for name in candidates}
    peaks: dict[str, int] = {}
    for name, on in candidates.items():
        on()
        peaks[name] = gc.measure(model, objective, tokens)[0]
        step_s(model, tokens)
    order = random.Random(0)
    bare = candidates[next(iter(candidates))]
    bare()
    before = step_s(model, tokens)
    for _ in range(rounds):
        for name in order.sample(list(candidates), len(candidates)):
            candidates[name]()
            times[name].append(step_s(model, tokens))
            bare()
            after = step_s(model, tokens)
            ratios[name].append(times[name][-1] / ((before + after) / 2))
            before = after
    gc.remove(model)
    return {
        name: {
            "peak_bytes": peaks[name],
            "step_s": statistics.median(times[name]),
            "extra_time": statistics.median(ratios[name]) - 1,
        }
        for name in candidates
    }


def held_bytes(model: nn.Module, tokens: Tensor) -> int:
    """What forward leaves for backward, weights and batch left out, where a compiler's kernels hide the rest."""
    others = {t.untyped_storage().data_ptr() for t in (tokens, *model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in others:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        objective(model, tokens)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def compiled(model: Model, tokens: Tensor, plans: dict[str, Plan], rounds: int) -> dict[str, Any]:
    """Under torch's compiler: its own planner, and Instep's plans, each on a copy of the model; steps interleaved.
    Bytes are those held at the end of forward; bits are compared with those of the model compiled as it is."""
    contenders: dict[str, tuple[float, Plan | None]] = {
        f"activation_memory_budget {budget}": (budget, None) for budget in (1.0, 0.5, 0.35, 0.2)
    } | {f"compiled {name}": (1.0, plan) for name, plan in plans.items()}
    gc.remove(model)
    model.rule, model.segments = None, 0
    steps: dict[str, Callable[[], float]] = {}
    found: dict[str, Any] = {}
    expected: Any = None
    for name, (budget, plan) in contenders.items():
        own = copy.deepcopy(model)
        if plan is not None:
            gc.apply(own, plan)
        # The compiler caches by code object and would give one contender the graph of another: each has its own.
        code = Model.forward.__code__.replace(co_name=f"forward_{len(steps)}")
        alone = types.MethodType(types.FunctionType(code, globals()), own)
        own.forward = torch.compile(alone, dynamic=False)  # type: ignore[method-assign]
        with torch._functorch.config.patch(activation_memory_budget=budget):
            held = held_bytes(own, tokens)
            gradients = torch.autograd.grad(objective(own, tokens), list(own.parameters()))
        expected = gradients if expected is None else expected
        found[name] = {"held_bytes": held, "same_bits": all(map(torch.equal, gradients, expected))}
        steps[name] = functools.partial(step_s, own, tokens)
    times: dict[str, list[float]] = {name: [] for name in steps}
    order = random.Random(0)
    for _ in range(3 * rounds):
        for name in order.sample(list(steps), len(steps)):
            times[name].append(steps[name]())
    first = next(iter(times))
    for name, row in found.items():
        row["step_s"] = statistics.median(times[name])
        row["extra_time"] = statistics.median(a / b for a, b in zip(times[name], times[first], strict=True)) - 1
        line = f"{name:<44}{row['held_bytes'] / 2**20:9.1f}{'':>10}{row['step_s'] * 1e3:6.0f} ms"
        print(f"{line}{100 * row['extra_time']:6.1f} %   {'same' if row['same_bits'] else 'other'} bits", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("depth", 12), ("width", 256), ("context", 256), ("batch", 4), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--compile", action="store_true", help="measure under torch's compiler anew too, some minutes")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Model(given.depth, given.width, given.context)
    tokens = torch.randint(0, 256, (given.batch, given.context))
    rules = ways(model)
    rules["no checkpointing"]()
    profile = gc.profile(model, objective, tokens)

    # At each rule's own peak, what Instep's plan is; and the frontier.
    peaks = {}
    for name, on in rules.items():
        on()
        peaks[name] = gc.measure(model, objective, tokens)[0]
    plans = {f"plan at {name}": gc.plan(profile, budget_bytes=peak) for name, peak in peaks.items()}
    plans |= {f"plan {100 * p.peak_bytes / profile.peak_bytes:.0f} %": p for p in gc.plans(profile, most=8)}
    candidates = {**rules, **{name: planned(model, plan) for name, plan in plans.items()}}
    found = measure(model, tokens, candidates, given.rounds)

    for name, plan in plans.items():
        found[name] |= {
            "predicted_bytes": plan.peak_bytes, "predicted_extra_time": plan.extra_time,
            "extra_flops": plan.extra_flops, "lower_bound_s": plan.lower_bound, "held_bytes": plan.held_bytes,
        }  # fmt: skip
    print(f"{'':<44}{'peak MiB':>9}{'predicted':>10}{'step':>9}{'more':>8}{'predicted':>10}{'FLOPs':>8}")
    for name, row in found.items():
        said = f"{row['predicted_bytes'] / 2**20:10.1f}" if "predicted_bytes" in row else " " * 10
        line = f"{name:<44}{row['peak_bytes'] / 2**20:9.1f}{said}{row['step_s'] * 1e3:6.0f} ms"
        line += f"{100 * row['extra_time']:6.1f} %"
        if "predicted_bytes" in row:
            line += f"{100 * row['predicted_extra_time']:8.1f} %{100 * row['extra_flops']:6.1f} %"
        print(line, flush=True)
    by_flops = at_flops(profile)
    for name, value in by_flops.items():
        print(f"{name}: {value:.4f}")
    of_100_blocks_s = planning_s()
    print(f"a plan for 100 blocks: {of_100_blocks_s:.2f} s")
    lean = gc.plans(profile, most=5, price="flops")  # the compiler fuses what costs no FLOPs into the rest
    few = {f"plan {100 * p.peak_bytes / profile.peak_bytes:.0f} %, price FLOPs": p for p in lean}
    known = json.loads(RESULTS.read_text())["compiled"] if RESULTS.exists() else {}
    by_compiler = compiled(model, tokens, few, given.rounds) if given.compile else known
    RESULTS.parent.mkdir(exist_ok=True)
    facts = {**vars(given), "machine": machine(), "found": found, "flops": by_flops, "compiled": by_compiler}
    facts["plan_of_100_blocks_s"] = of_100_blocks_s
    RESULTS.write_text(json.dumps(facts, indent=1) + "\n")


def planning_s() -> float:
    """Of a GPT with 100 blocks, from its profile to a plan at half of its memory."""
    model = Model(100, 64, 64)
    profile = gc.profile(model, objective, torch.randint(0, 256, (2, 64)))
    began = time.perf_counter()
    gc.plan(profile, budget_bytes=profile.peak_bytes // 2)
    return time.perf_counter() - began


def at_flops(profile: gc.Profile) -> dict[str, float]:
    """What FLOPs buy, of what blocks hold for backward and of the whole peak, where FLOPs are the price."""
    answers: dict[str, float] = {}
    trade = gc.plans(profile, most=10_000, price="flops")
    free = min((p for p in trade if p.flops == 0), key=lambda p: p.held_bytes)
    answers["held at 0 extra FLOPs, share"] = free.held_bytes / profile.held_bytes
    answers["peak at 0 extra FLOPs, share"] = free.peak_bytes / profile.peak_bytes
    for share in (0.5633, 0.56):
        fitting = [p for p in trade if p.held_bytes <= share * profile.held_bytes]
        answers[f"extra FLOPs at {share:.2%} held"] = min(p.extra_flops for p in fitting)
        fitting = [p for p in trade if p.peak_bytes <= share * profile.peak_bytes]
        answers[f"extra FLOPs at {share:.2%} of the peak"] = min(p.extra_flops for p in fitting)
    return answers


if __name__ == "__main__":
    main()
