"""A campaign for `instep diff`: runs that part in a known way, single bits, and equal pairs: none missed, no alarm."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import instep
from instep.ranges import equal_ranges
from instep.recipe import Recipe, Team
from instep.worker.replica import Replica
from support import parted, workloads
from support.harness import Client, stopping_at, train_here
from support.parted import Flip, recipe, trained
from support.proved import missed, save
from support.serving import at, kill

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("forked_pythons")]

SEED = 17
TENTH = 10


@dataclass(frozen=True)
class Pair:
    """Two recipes, and the operations of which one must be named; none for other samples, which have a place alone."""

    kind: str
    number: int
    one: Callable[[], Recipe]
    other: Callable[[], Recipe]
    operations: tuple[str, ...] = ()
    place: tuple[int, int | None] = field(default=(1, 0))


def doing(name: str, how: Callable[..., Tensor], seed: int) -> Recipe:
    return recipe({name: how}, seed=seed)


def adam(eps: float) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda parameters: torch.optim.Adam(parameters, lr=0.05, eps=eps)


def of_eps() -> Iterator[Pair]:
    norm, added = ("aten.native_layer_norm.default",), ("aten.add_.Tensor", "aten.add_.Scalar", "aten.add.Tensor")
    for k in range(6):
        one, other = partial(recipe, seed=k), partial(recipe, eps=1e-5 * (1 + 4.0**-k), seed=k)
        yield Pair("eps of a norm", k, one, other, norm)
        one, other = (partial(recipe, optimizer=adam(eps), seed=k) for eps in (1e-8, 1e-8 * 10.0 ** (k + 1)))
        yield Pair("eps of the optimizer", k, one, other, added, (1, None))


KERNELS: Sequence[tuple[Callable[..., Tensor], Callable[..., Tensor]]] = (
    (F.gelu, partial(F.gelu, approximate="tanh")), (F.gelu, F.relu), (F.silu, F.gelu), (F.elu, F.relu),
    (F.softplus, F.relu), (F.elu, partial(F.elu, alpha=1.001)), (F.tanh, F.hardtanh), (F.leaky_relu, F.relu),
    (F.leaky_relu, partial(F.leaky_relu, negative_slope=0.02)), (torch.sigmoid, torch.tanh), (F.mish, F.silu),
    (F.softplus, partial(F.softplus, beta=2)),
)  # fmt: skip
NAMES = (
    "gelu", "gelu", "silu", "elu", "softplus", "elu", "tanh", "leaky_relu", "leaky_relu", "sigmoid", "mish", "softplus",
)  # fmt: skip


def of_kernels() -> Iterator[Pair]:
    for k, ((one, other), name) in enumerate(zip(KERNELS, NAMES, strict=True)):
        pair = (partial(doing, "activation", each, k) for each in (one, other))
        yield Pair("kernel", k, *pair, (f"aten.{name}.default",))


def of_samples() -> Iterator[Pair]:
    for k in range(12):

        def change(x: Tensor, y: Tensor, k: int = k) -> None:
            if k % 2:
                y[3 * k] = (y[3 * k] + 1) % parted.CLASSES
            else:
                x[3 * k, k % parted.WIDE] += 2.0**-20

        one, other = partial(recipe, seed=k), partial(recipe, data=parted.data(change), seed=k)
        yield Pair("sample", k, one, other, (), where_drawn(one(), other()))


def where_drawn(one: Recipe, other: Recipe) -> tuple[int, int]:
    """Update and microbatch that first have other samples."""
    a, b = Replica(one, "cpu"), Replica(other, "cpu")
    for step in range(one.steps):
        for microbatch in range(one.microbatches):
            samples = a.batch(step, microbatch), b.batch(step, microbatch)
            if samples[0] is not None and not all(map(torch.equal, *samples)):
                return step + 1, microbatch
    raise AssertionError("the sample is never drawn")


def of_masks() -> Iterator[Pair]:
    def filled(x: Tensor, limit: float) -> Tensor:
        return x.masked_fill(x > limit, 0.0)

    def kept(x: Tensor, limit: float) -> Tensor:
        return x * (x < limit)

    def lower(x: Tensor, diagonal: int) -> Tensor:
        return torch.tril(x, diagonal)

    for k in range(4):
        for how, name, a, b in (
            (filled, "aten.gt.Scalar", 0.5, 0.5 + 0.25 * (k + 1)),
            (kept, "aten.lt.Scalar", 0.5, 0.5 - 0.25 * (k + 1)),
            (lower, "aten.tril.default", 1, 2 + k),
        ):
            pair = (partial(doing, "mask", partial(how, **{_second(how): limit}), k) for limit in (a, b))
            yield Pair(f"mask by {name}", k, *pair, (name,))


def _second(how: Callable[..., Tensor]) -> str:
    return how.__code__.co_varnames[1]


def of_orders() -> Iterator[Pair]:
    def left(x: Tensor, k: int) -> Tensor:
        return x + ((x * 0.1 * (k + 1) + x.roll(1, -1)) + x.roll(2, -1))

    def right(x: Tensor, k: int) -> Tensor:
        return x + (x * 0.1 * (k + 1) + (x.roll(1, -1) + x.roll(2, -1)))

    def whole(x: Tensor, k: int) -> Tensor:
        return x * x.sum(-1, keepdim=True) * (k + 1)

    def halves(x: Tensor, k: int) -> Tensor:
        return x * (x[:, :5].sum(-1, keepdim=True) + x[:, 5:].sum(-1, keepdim=True)) * (k + 1)

    def before(x: Tensor, k: int) -> Tensor:
        return (x / 3.0) * (k + 1.1)

    def after(x: Tensor, k: int) -> Tensor:
        return (x * (k + 1.1)) / 3.0

    for k in range(4):
        for name, one, other, operations in (
            ("of a sum", left, right, ("aten.add.Tensor",)),
            ("of parts of a sum", whole, halves, ("aten.sum.dim_IntList", "aten.add.Tensor", "aten.slice.Tensor")),
            ("of a product", before, after, ("aten.div.Tensor", "aten.mul.Tensor")),
        ):
            pair = (partial(doing, "sum", partial(how, k=k), k) for how in (one, other))
            yield Pair(f"order {name}", k, *pair, operations)


def pairs() -> list[Pair]:
    return [*of_eps(), *of_kernels(), *of_samples(), *of_masks(), *of_orders()]


def found_of(pair: Pair, tmp_path: Path) -> dict[str, Any]:
    """Trains the two and has them compared; `held`: whether what differs is named as it must be."""
    name = f"{pair.kind}-{pair.number}".replace(" ", "-")
    one, other = pair.one(), pair.other()
    a, b = trained(one, tmp_path / name / "a", workers=1), trained(other, tmp_path / name / "b", workers=2)
    found = instep.diff(a.path, b.path, recipes=(one, other))
    place = found.place
    where = None if place is None else (place.step, place.microbatch)
    named = place is not None and (place.operation in pair.operations if pair.operations else not place.operation)
    held = found.departed is None and where == pair.place and named
    line = {"differs": pair.kind, "number": pair.number, "verdict": found.verdict, "update": where and where[0]}
    operation = "" if place is None else place.operation
    return {**line, "microbatch": where and where[1], "operation": operation, "held": held}


FLIPS = [
    Flip(tensor, (2, 3, 5, 6, 7)[number % 5], number % 4, place=number % 4, bit=12 + number % 15)
    for number, tensor in enumerate(
        ["first.weight", "first.bias", "second.weight", "second.bias", "last.weight", "last.bias", "norm.weight",
         "norm.bias"] * 2 + ["first.weight", "second.weight", "last.weight", "norm.bias"]
    )
]  # fmt: skip


def flipped(number: int, flip: Flip, tmp_path: Path) -> dict[str, Any]:
    """One bit in a worker's gradient, that the run computed again has not."""
    workers, path = 2 + number % 3, tmp_path / f"flip-{number}"
    path.mkdir()
    one = flip.recipe(path / "once", checksum_every=1, seed=number)
    found = instep.diff(trained(one, path / "a", workers=workers).path, recipes=(one, None))
    gone, whose = found.departed, worker_of(flip.microbatch, workers)
    tensors = set() if gone is None else {name.split(".exp_avg")[0] for name in gone.tensors}
    held = gone is not None and (gone.update, tensors, gone.worker) == (flip.update, {flip.tensor}, whose)
    line = {"flip": flip.tensor, "update": flip.update, "worker": whose, "workers": workers, "bit": flip.bit}
    seen = {} if gone is None else {"found": [gone.update, sorted(tensors), gone.worker]}
    return {**line, **seen, "held": held}


def worker_of(microbatch: int, workers: int) -> int:
    ranges = equal_ranges(4, workers)
    return next(worker for worker, (start, stop) in enumerate(ranges) if start <= microbatch < stop)


def alikes(seed: int, tmp_path: Path) -> Iterator[tuple[str, Recipe, Path]]:
    """Runs of one recipe that must all be the same: by other teams, restarted, resumed, on a server, recomputing."""
    one = workloads.gpt(seed=seed, checksum_every=2)

    def run(name: str, client: Client | None = None, **team: Any) -> tuple[str, Recipe, Path]:
        team = {"workers": 2, "checkpoint_every": 2, "keep": 99, **team}
        return name, one, train_here(one, Team(**team), tmp_path / f"{name}-{seed}", client=client).path

    yield run("one worker", workers=1)
    yield run("three workers", workers=3)
    yield run("a worker killed", Client(at("merged", 1, kill(1), version=3)))
    yield run("a plan of memory", memory="80%")
    yield run("on a server", engine="server")
    name, _, path = run("resumed by three", stopping_at(3))
    train_here(one, Team(workers=3), path, resume=True)
    yield name, one, path


def equal(seeds: Sequence[int], tmp_path: Path) -> Iterator[dict[str, Any]]:
    """Every run of a seed with the first of them, and this with its recipe."""
    for seed in seeds:
        runs = list(alikes(seed, tmp_path))
        _, one, first = runs[0]
        for name, _, path in runs[1:]:
            found = instep.diff(first, path, recipes=(one, one))
            seen = found.seen
            yield {
                "equal": name, "seed": seed, "verdict": found.verdict, "held": found.same and bool(seen and seen.names),
            }  # fmt: skip


@pytest.mark.slow
def test_a_tenth_of_the_differences_flips_and_equal_pairs(tmp_path: Path) -> None:
    some = pairs()[::TENTH]
    assert len({pair.kind.split(" ")[0] for pair in some}) == 5
    cases = [found_of(pair, tmp_path) for pair in some]
    cases += [flipped(number, FLIPS[number], tmp_path) for number in (3, 14)]
    cases += equal([0, 1], tmp_path)
    assert len(cases) == 6 + 2 + 10
    assert missed(cases) == []


@pytest.mark.prove
def test_all_differences_flips_and_equal_pairs(tmp_path: Path) -> None:
    began = time.monotonic()
    cases = [found_of(pair, tmp_path) for pair in pairs()]
    cases += [flipped(number, flip, tmp_path) for number, flip in enumerate(FLIPS)]
    cases += equal(range(20), tmp_path)
    assert len(cases) == 60 + 20 + 100
    save("differences", cases, seed=SEED, began=began)
    assert missed(cases) == []
