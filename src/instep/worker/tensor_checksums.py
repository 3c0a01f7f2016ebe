"""Checksums by tensor of all that the next update depends on, so that the tape tells where two runs part."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypedDict

import torch
from msgspec import json
from torch import Tensor

from instep.ranges import owners
from instep.record.events import ChecksummedEvent
from instep.reduce.checksums import checksum
from instep.worker.milestones import Progress
from instep.worker.optimizer_state import is_plain, tensors_in
from instep.worker.replica import Replica

Named = tuple[int, str, Tensor]
"""A tensor's place in the order of all, its name, and itself."""


class Checksums(TypedDict):
    """By name: those of weights, which are parameters and buffers, and of what the optimizer keeps, and averages."""

    weights: Mapping[str, str]
    optimizer: Mapping[str, str]


def checksum_when_due(
    replica: Replica,
    progress: Progress,
    emit: Callable[[ChecksummedEvent], None],
    take: Callable[[], Checksums | None] | None = None,
) -> None:
    """Has the tape tell the checksums of this version, under a synchronous rule every so many updates.

    take: gives them, or None where another process does, which emits them. Their seconds count as those of steps.
    """
    recipe = replica.recipe
    if not recipe.rule.synchronous or progress.version % recipe.checksum_every:
        return
    replica.doing = f"taking checksums of version {progress.version}"
    began = time.monotonic()
    found = checksums_of(replica) if take is None else take()
    took_s = time.monotonic() - began
    progress.train_s += took_s
    progress.checksum_s += took_s
    if found is not None:
        emit(ChecksummedEvent(version=progress.version, **found, took_s=round(took_s, 6)))


def checksums_of(replica: Replica) -> Checksums:
    """All of a replica that has all."""
    return together([own_checksums(replica, [True] * len(replica.parameters))])


def own_checksums(replica: Replica, own: Sequence[bool], worker: int = 0, workers: int = 1) -> bytes:
    """Those of one worker's share, for `together`: of its own parameters, and a part of what is not trained."""
    trained = dict(zip(map(id, replica.parameters), own, strict=True))
    named = [*replica.module.named_parameters(), *replica.module.named_buffers()]
    others = [tensor for _, tensor in named if id(tensor) not in trained]
    whose = owners([tensor.numel() for tensor in others], workers)
    trained |= {id(tensor): owner == worker for tensor, owner in zip(others, whose, strict=True)}
    weights = ((place, name, tensor) for place, (name, tensor) in enumerate(named) if trained[id(tensor)])
    leads = worker == 0
    kept = itertools.chain(_kept(replica, own, leads=leads), _averaged(replica, own, leads=leads))
    return json.encode([_summed(weights), _summed(kept)])


def together(shares: Iterable[bytes]) -> Checksums:
    """What all shares come to, in the model's order."""
    parts = zip(*(json.decode(share, type=tuple[_Summed, _Summed]) for share in shares), strict=True)
    ordered = [sorted(itertools.chain(*part), key=lambda each: each[0]) for part in parts]
    weights, optimizer = ({name: found for _, name, found in each} for each in ordered)
    return {"weights": weights, "optimizer": optimizer}


_Summed = list[tuple[int, str, str]]


def _summed(tensors: Iterable[Named]) -> _Summed:
    plain = [part for place, name, tensor in tensors for part in _plain(place, name, tensor)]
    sums = checksum(tensor for *_, tensor in plain)
    return [(place, name, found) for (place, name, _), found in zip(plain, sums, strict=True)]


def _kept(replica: Replica, own: Sequence[bool], *, leads: bool) -> Iterator[Named]:
    """What the optimizers keep of own parameters, as they are named, and where this worker leads what is of none."""
    places = {id(parameter): place for place, parameter in enumerate(replica.parameters)}
    for number, one in enumerate(replica.optimizer.each):
        held = [places[id(parameter)] for group in one.of_torch.param_groups for parameter in group["params"]]
        for where, tensor in tensors_in(one.state()):
            top, _, rest = where.partition(".")
            key, _, inner = rest.partition(".")
            place = held[int(key)] if top == "state" and key.isdecimal() and int(key) < len(held) else None
            if place is None and leads:
                yield len(places), f"{number}.{where}", tensor
            elif place is not None and own[place]:
                yield place, f"{replica.names[place]}.{inner}".rstrip("."), tensor


def _averaged(replica: Replica, own: Sequence[bool], *, leads: bool) -> Iterator[Named]:
    """The averages of the weights (`Recipe.ema`), of own parameters, and of buffers where this worker leads."""
    for decay, name, index, average in replica.averages.named():
        if leads if index is None else own[index]:
            yield len(own) if index is None else index, f"{name}.ema.{decay}", average


def _plain(place: int, name: str, tensor: Tensor) -> Iterator[Named]:
    """The tensor, or those that it is made of. None of one that is not dense."""
    simple = type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__  # a subclass in name alone
    if is_plain(tensor) or (simple and tensor.layout == torch.strided):
        yield place, name, tensor.as_subclass(Tensor)
    elif hasattr(tensor, "__tensor_flatten__"):
        for inner in tensor.__tensor_flatten__()[0]:
            yield from _plain(place, f"{name}.{inner}", getattr(tensor, inner))
