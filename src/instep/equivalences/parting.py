"""Where the traces of two teams part: the first step, tensor and operation, and the likely cause."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from instep.equivalences.found import UNKNOWN, Compared, Where
from instep.equivalences.operations import Parting, parting
from instep.equivalences.teams import UPDATE, Setup, Steps, compute
from instep.errors import cut
from instep.recipe import Recipe

ULP = torch.finfo(torch.float32).eps
"""Of a number from 1 to 2."""


@dataclass(frozen=True)
class Apart:
    """The first thing that two traces do not have in common. kind: "batch", "gradient", "optimizer state", ..."""

    kind: str
    step: int
    name: str = ""
    microbatch: int | None = None


def first_apart(one: Steps, other: Steps) -> Apart | None:
    """Where they part, step by step, of what both have."""
    if one.weights.keys() == other.weights.keys() and one.start and other.start:  # none of them goes on from another
        name = _first_name(one.start, other.start)
        if name is not None:
            return Apart("start", 0, name)
    versions = sorted({*one.weights, *one.figures} & {*other.weights, *other.figures})
    for version in versions:
        step = version - 1
        for place in sorted(key for key in one.batches.keys() & other.batches.keys() if key[0] == step):
            if one.batches[place] != other.batches[place]:
                return Apart("batch", step, microbatch=place[1])
        kinds = (("gradient", one.gradients, other.gradients), ("weights", one.weights, other.weights),
                 ("optimizer state", one.optimizer, other.optimizer))  # fmt: skip
        for kind, mine, theirs in kinds:
            if version in mine and version in theirs:
                name = _first_name(mine[version], theirs[version])
                if name is not None:
                    return Apart(kind, step, name)
        if _other_figures(one, other, version):
            return Apart("objective", step)
    return None


def _other_figures(one: Steps, other: Steps, version: int) -> bool:
    return version in one.figures and version in other.figures and one.figures[version] != other.figures[version]


def _first_name(one: Mapping[str, str], other: Mapping[str, str]) -> str | None:
    return next((name for name in {**one, **other} if one.get(name) != other.get(name)), None)


def compared(*traces: Steps, workers: tuple[int, ...], after: int = 0) -> Compared:
    """How much was compared of versions above `after`."""
    common = [version for version in traces[0].weights if all(version in each.weights for each in traces)]
    versions = [version for version in common if version > after]
    names = {
        (kind, name)
        for version in versions
        for kind in ("gradients", "weights", "optimizer")
        if all(version in getattr(each, kind) for each in traces)
        for name in getattr(traces[0], kind)[version]
    }
    return Compared(tensors=len(names), steps=len(versions), workers=workers)


def narrowed(recipe: Recipe, one: Setup, other: Setup, apart: Apart) -> tuple[Where, str]:
    """Both computed again up to where they part, to find the operation: the place, and the likely cause."""
    looked = [compute(recipe, replace(each, look=apart.step, save=None)) for each in (one, other)]
    again = first_apart(*looked)
    if again is None:
        place = Where(apart.step + 1, apart.microbatch, apart.name)
        return place, (
            "Computed a second time the two are the same: what differs is not the teams but the moment, such as a "
            "clock, a file or a kernel that does not repeat."
        )
    if again != apart and again.step != apart.step:
        return Where(again.step + 1, again.microbatch, again.name), (
            "Computed a second time they part elsewhere: the recipe does not repeat, as with a clock, a file or a "
            "kernel whose order of adding is left to threads."
        )
    return place_of(again, looked, operations=one.memory == other.memory)


def place_of(apart: Apart, looked: list[Steps], *, operations: bool) -> tuple[Where, str]:
    """The place and the cause from two traces that have looked at the step where they part."""
    one, other = looked
    hidden = _hidden(looked)
    if apart.kind == "start":
        return Where(tensor=apart.name), (
            "The model is built with other weights each time: it draws from a generator of its own, or reads a clock; "
            "draw from torch's global generator, which is seeded before it is built."
        )
    if apart.kind == "batch":
        return Where(apart.step + 1, apart.microbatch), (
            "The samples are others: the data set or its collate keeps state, or reads a clock or what changes; let a "
            f"sample depend on its index and the seeded generators alone.{hidden}"
        )
    place, found = located(apart, looked, operations=operations)
    if found is not None and apart.kind in ("gradient", "objective", "weights"):
        return place, f"{_why(found)}{hidden}"
    if apart.kind in ("optimizer state", "weights") and not _other_values(one, other, "gradient"):
        return place, (
            "The gradients are the same and the update is not: the optimizer keeps something that its state_dict does "
            "not hold, or the model writes its weights or buffers in a way that depends on who computes."
        )
    return place, f"{UNKNOWN}{hidden}"


def located(apart: Apart, looked: list[Steps], *, operations: bool) -> tuple[Where, Parting | None]:
    """The place of what is neither the start nor a batch, and the operation there, if it is found."""
    one, other = looked
    microbatch, found = _first_operation(one, other) if operations else (None, None)
    name = apart.name or next((n for n in _other_values(one, other, "gradient")), "")
    place = Where(
        step=apart.step + 1,
        microbatch=None if microbatch == UPDATE else microbatch,
        tensor=name,
        operation=found.operation.name if found else "",
        module=found.operation.module if found else "",
        ulps=_distance(one, other, apart.kind, name),
    )
    return place, found


def _first_operation(one: Steps, other: Steps) -> tuple[int | None, Parting | None]:
    for microbatch in sorted(one.operations.keys() & other.operations.keys()):
        found = parting(one.operations[microbatch], other.operations[microbatch])
        if found is not None:
            return microbatch, found
    return None, None


def _why(found: Parting) -> str:
    where = f" in '{found.operation.module}'" if found.operation.module else ""
    kinds: dict[str, Callable[[], str]] = {
        "path": lambda: (
            f"The forward goes another way{where}, {found.one} here and {found.other} there, with the same weights, "
            f"batch and seeds: it depends on something that is in none of them."
        ),
        "number": lambda: (
            f"A Python number is {cut(found.one)} in the one and {cut(found.other)} in the other{where}: it is kept "
            f"outside of tensors; put it into a buffer, or make it follow from the batch."
        ),
        "tensor": lambda: (
            f"The operation is given another tensor{where}, which no operation before has made: one that is neither "
            f"parameter nor buffer; register it as a buffer."
        ),
        "draw": lambda: (
            f"Random numbers are drawn{where} that the seeds of a microbatch do not reach: from a generator of its "
            f"own, or after draws whose number depends on who computes; draw from torch's global generator."
        ),
        "kernel": lambda: (
            f"The operation gives another result for the same inputs{where}: the kernel does not repeat, as those do "
            f"whose order of adding is left to threads."
        ),
    }
    return kinds[found.kind]()


def _hidden(looked: list[Steps]) -> str:
    """A sentence on Python state that changes while a microbatch is computed."""
    found = {place: how for trace in looked for place, how in trace.moved}
    return about_state(list(found.items()))


def about_state(found: list[tuple[str, str]]) -> str:
    """A sentence on Python state that changed, "" for none."""
    if not found:
        return ""
    place, how = found[0]
    more = f", and so do {len(found) - 1} more" if len(found) > 1 else ""
    return (
        f" '{place}' changes as a microbatch is computed ({how}){more}, and neither checkpoints nor other workers "
        f"have it."
    )


def _other_values(one: Steps, other: Steps, kind: str) -> list[str]:
    mine, theirs = one.values.get(kind, {}), other.values.get(kind, {})
    return [name for name in mine.keys() & theirs.keys() if not _same(mine[name], theirs[name])]


def _same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one, other) or bool(torch.equal(one.isnan(), other.isnan()) and one.isnan().all())


def _distance(one: Steps, other: Steps, kind: str, name: str) -> float | None:
    values: list[Any] = [
        each.values.get("gradient" if kind != "weights" else "weights", {}).get(name) for each in (one, other)
    ]
    if any(value is None for value in values) or not values[0].is_floating_point():
        return None
    return ulps(values[0], values[1])


def ulps(found: Tensor, expected: Tensor) -> float:
    """The largest distance of two tensors, in units in the last place, of float32, of the largest entry expected."""
    distance = float((found.double() - expected.double()).abs().max()) if found.numel() else 0.0
    largest = float(expected.double().abs().max()) if found.numel() else 0.0
    return distance / (ULP * largest) if largest else (0.0 if not distance else float("inf"))
