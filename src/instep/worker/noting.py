"""What one microbatch comes to, in 32 bytes: sums, item counts and the bits of every gradient, before folding."""

from __future__ import annotations

import hashlib
import struct
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from instep.recipe import Recipe
from instep.reduce.checksums import checksum
from instep.worker.gradients import Gradients
from instep.worker.replica import Replica
from instep.worker.standalone import replica_before

NBYTES = 32
"""Of what is noted."""

NOTHING = bytes(NBYTES)
"""What one without samples comes to."""


class NotedGradients:
    """In its block, notes every gradient that reaches a parameter; for one microbatch."""

    def __init__(self, parameters: Iterable[Tensor]):
        self._parameters = list(parameters)
        self._sums: list[tuple[int, str]] = []
        self.took_s = 0.0
        """Seconds of noting."""

    def __enter__(self) -> NotedGradients:
        self._handles = [
            parameter.register_hook(self._hook(index))
            for index, parameter in enumerate(self._parameters)
            if parameter.requires_grad
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, index: int) -> Callable[[Tensor], None]:
        def see(gradient: Tensor) -> None:
            began = time.monotonic()
            (found,) = checksum([gradient.to_dense() if gradient.is_sparse else gradient])
            self._sums.append((index, f"{gradient.dtype} {found}"))
            self.took_s += time.monotonic() - began

        return see

    def digest(self, sums: Mapping[str, Tensor], counts: Mapping[str, int]) -> bytes:
        """SHA-256 over all of it. Every other bit in one word of a gradient changes it, see `checksum`."""
        values = [(name, struct.pack("<d", float(value)).hex()) for name, value in sums.items()]
        return hashlib.sha256(repr((values, sorted(counts.items()), sorted(self._sums))).encode()).digest()


def state_of(replica: Replica) -> dict[str, Tensor]:
    """All parameters and buffers by name, in the CPU's memory."""
    named = [*replica.module.named_parameters(), *replica.module.named_buffers()]
    return {name: tensor.detach().cpu() for name, tensor in named}


def computed_alone(
    recipe: Recipe,
    device: str,
    state: Mapping[str, Tensor],
    place: tuple[int, int],
    totals: Mapping[str, int],
    written: Sequence[str],
    off: Sequence[int],
    scale: float,
    tell: Callable[[dict[str, Any]], None],
) -> bytes:
    """What the microbatch at `place`, (step, microbatch), comes to in a process of its own, from the weights of another
    one's `state_of`. off: see `Trainable`. scale: the loss scale.
    """
    step, microbatch = place

    def load(replica: Replica) -> None:
        named = dict([*replica.module.named_parameters(), *replica.module.named_buffers()])
        with torch.no_grad():
            for name, tensor in state.items():
                named[name].copy_(tensor)
        replica.trainable.take(off)
        replica.scaler.take(scale)

    replica = replica_before(step, recipe, device, written, load)
    gradients = Gradients(replica)
    gradients.assign_own([(microbatch, microbatch + 1)])
    return noted_alone(replica, gradients, step, microbatch, totals)


def noted_alone(replica: Replica, gradients: Gradients, step: int, microbatch: int, totals: Mapping[str, int]) -> bytes:
    """What any microbatch of `step` comes to, before the step's own are computed; see `Gradients.alone`."""
    samples = replica.batch(step, microbatch)
    if samples is None:
        return NOTHING
    counts = replica.objective.counts_at(step, samples)
    replica.trainable.begin(step)  # for hooks are on those that require a gradient
    with NotedGradients(replica.parameters) as noted:
        sums = gradients.alone(step, microbatch, samples, totals)
    return noted.digest(sums, counts)
