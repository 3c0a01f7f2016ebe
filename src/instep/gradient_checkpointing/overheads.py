"""What recompute takes beside its operations, measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, noop_context_fn

from instep.gradient_checkpointing.replaying import Frame, Repeat, Script, Watch
from instep.gradient_checkpointing.structure import Act, BlockKind, BlockPlan, Choice, Operation, Overheads

_TINY = 64


def overheads_of(op_s: float, device: torch.device) -> Overheads:
    """Measured on a block of operations that cost nothing else; `op_s` is known. A GPU works on meanwhile: none."""
    if device.type != "cpu":
        return Overheads()
    kind = BlockKind((Operation("aten.neg.default"),) * _TINY, (), 0)
    script = Script(BlockPlan("", kind, Choice(0, 0, 0, 0.0, (Act.REPEAT,) * _TINY)))
    start = torch.zeros(1, requires_grad=True)

    def block(x: Tensor, operations: int = _TINY) -> Tensor:
        for _ in range(operations):
            x = -x
        return x * x

    def seconds(contexts: Callable[[], Any] | None, operations: int) -> float:
        times = []
        for _ in range(8):
            began = time.perf_counter()
            if contexts is None:
                out = block(start, operations)
            else:
                out = checkpoint(block, start, operations, use_reentrant=False, context_fn=contexts)
            torch.autograd.grad(out, start)
            times.append(time.perf_counter() - began)
        return min(times)

    def watched() -> tuple[Any, Any]:
        frame = Frame(script, False)
        return Watch(frame), Repeat(frame)

    bare, short = seconds(None, _TINY), seconds(None, 0)
    block_s = max(0.0, seconds(noop_context_fn, 0) - short)
    plain = max(0.0, seconds(noop_context_fn, _TINY) - bare - block_s)
    return Overheads(block_s, op_s, max(0.0, seconds(watched, _TINY) - bare - block_s - plain) / _TINY)
