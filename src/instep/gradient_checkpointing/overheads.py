"""What recompute takes beside its operations, measured."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, noop_context_fn

from instep.gradient_checkpointing.replaying import FirstPass, Frame, Repeat, Script
from instep.gradient_checkpointing.structure import Act, BlockKind, BlockPlan, Choice, Operation, Overheads

WIDTH, PARTS, TIMES = 8, 6, 15


class _Names(TorchDispatchMode):
    """Notes the operations."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def overheads_of(device: torch.device) -> Overheads:
    """Measured on a tiny block of a transformer's operations. A GPU works on meanwhile: none."""
    if device.type != "cpu":
        return Overheads()
    start = torch.zeros(1, 2, WIDTH, requires_grad=True)
    weight, bias = torch.zeros(WIDTH, WIDTH, requires_grad=True), torch.zeros(WIDTH, requires_grad=True)

    def block(x: Tensor, parts: int = PARTS) -> Tensor:
        for _ in range(parts):
            x = x + 2 * F.gelu(F.linear(F.layer_norm(x, (WIDTH,)), weight, bias))
        return x * x

    with _Names() as names:
        block(start)
    number = len(names.found)
    acts = tuple(Act.KEEP if "addmm" in name else Act.REPEAT for name in names.found)
    kind = BlockKind(tuple(map(Operation, names.found)), (), 0)
    script = Script(BlockPlan("", kind, Choice(0, 0, 0, 0.0, acts)))

    def watched() -> tuple[Any, Any]:
        frame = Frame(script, False, {})
        return FirstPass(frame), Repeat(frame)

    def step(contexts: Callable[[], Any] | None, parts: int = PARTS) -> None:
        if contexts is None:
            out = block(start, parts)
        else:
            out = checkpoint(block, start, parts, use_reentrant=False, context_fn=contexts)
        torch.autograd.grad(out.sum(), start)

    def forward() -> None:
        with torch.no_grad():
            block(start)

    ways: dict[str, Callable[[], None]] = {
        "alone": lambda: step(None), "short": lambda: step(None, 0), "short again": lambda: step(noop_context_fn, 0),
        "again": lambda: step(noop_context_fn), "watched": lambda: step(watched), "forward": forward,
    }  # fmt: skip
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(TIMES):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            times[name].append(time.perf_counter() - began)
    took = {name: statistics.median(found) for name, found in times.items()}
    block_s = max(0.0, took["short again"] - took["short"])
    again = max(0.0, took["again"] - took["alone"] - block_s)
    watch = max(0.0, took["watched"] - took["alone"] - block_s - again)
    return Overheads(block_s, max(0.0, again - took["forward"]) / number, watch / number)
