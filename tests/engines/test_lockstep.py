"""The lockstep engine over every group: one digest, whatever moves the bytes, and one training state."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from instep.engines import division, lockstep, total
from instep.engines.division import Division
from instep.engines.lockstep import Lockstep
from instep.engines.total import Total
from instep.engines.trial import Trial
from instep.models import GPT
from instep.recipe import Recipe, Schedule
from instep.record.digest import digest_of_state
from instep.record.events import ChecksummedEvent, Event
from instep.reduce.layout import BLOCK
from instep.transport.group import Group, PeerRaised, Sizes, Solo
from instep.worker.milestones import Progress
from instep.worker.replica import Replica
from support import workloads
from support.groups import Kind, Ranks
from support.moving import AtRandom
from support.reference import reference_digests
from support.sharding import assert_same

pytestmark = pytest.mark.processes

OPTIMIZERS: list[dict[str, Any]] = [
    {"parameters": ["*norm*", "*.bias", "embedding*"], "use": "torch.optim:AdamW", "args": {"lr": 0.003}},
    {"parameters": "*", "use": "torch.optim:Muon", "args": {"lr": 0.01}},
]


class Normed(GPT):
    """A GPT with dropout, whose logits go through BatchNorm."""

    def __init__(self) -> None:
        super().__init__(vocabulary=32, context=12, width=16, depth=2, heads=2, dropout=0.2, tied=True)
        self.batch_norm = nn.BatchNorm1d(32)

    def forward(self, tokens: Tensor) -> Tensor:
        logits = super().forward(tokens)
        some = torch.cat([logits.flatten(0, 1), logits.new_zeros(1, 32)])  # one row alone has no variance
        normed: Tensor = self.batch_norm(some)
        return normed[:-1].view_as(logits)


def recipe(**changes: Any) -> Recipe:
    """Ragged batches, clipping, AdamW and Muon, a schedule."""
    fields = {"model": Normed, "optimizer": OPTIMIZERS, "schedule": Schedule(kind="cosine", warmup_steps=2)}
    return workloads.gpt(**{**fields, "steps": 5, "evaluate_every": 2, "checksum_every": 2, **changes})


class Quiet:
    """A heartbeat that nobody looks at."""

    def advance(self) -> None:
        pass

    def waiting(self, flag: bool) -> None:
        pass

    def stop_wanted(self) -> bool:
        return False

    def regroup_wanted(self) -> bool:
        return False

    def fewer_wanted(self) -> bool:
        return False

    def save_wanted(self) -> bool:
        return False


def engine_of(
    recipe: Recipe,
    rank: int,
    machines: tuple[int, ...],
    emit: Callable[[Event], None] = lambda event: None,
    shard: str = "optimizer",
) -> Lockstep:
    replica = Replica(recipe, "cpu")
    engine = Lockstep(replica, rank, machines, Quiet(), emit, time.monotonic, shard=shard, balance="auto")
    engine.prepare(0)
    return engine


def trained(
    recipe: Recipe, make: Callable[[Sizes], Group], rank: int, machines: tuple[int, ...], shard: str = "optimizer"
) -> Any:
    """The digest, held-out objectives and checksums, the training state where this is rank 0, and how many parameters
    this rank takes the checksums of.
    """
    torch.set_num_threads(1)
    events = list[Event]()
    engine = engine_of(recipe, rank, machines, events.append, shard)
    group = make(engine.sizes())
    engine.join(group)
    found = list[Any]()

    def after_step(progress: Progress, last: bool, timed: bool) -> None:
        if progress.version % 2 == 0 and (evaluation := engine.between.evaluate(progress.version)) is not None:
            found.append(evaluation.objective)

    engine.run(Progress(), after_step, recipe.steps)
    training = engine.placement.training_state()
    engine.agree()
    digest = digest_of_state(engine.replica.saved_state())
    group.close()
    saved = io.BytesIO()
    torch.save(training, saved)
    found += [(e.version, e.weights, e.optimizer) for e in events if isinstance(e, ChecksummedEvent)]
    kind = type(engine.placement).__name__
    return digest, found, saved.getvalue() if rank == 0 else kind, sum(engine.placement.share(rank))


def of_team(recipe: Recipe, kind: Kind, shard: str = "optimizer") -> list[Any]:
    sizes = engine_sizes(recipe, kind, shard)
    return Ranks(kind, sizes, lambda make, rank: trained(recipe, make, rank, kind.machines, shard)).answers(120)


def engine_sizes(recipe: Recipe, kind: Kind, shard: str = "optimizer") -> Sizes:
    """Of a machine with most workers, who alone share memory."""
    torch.set_num_threads(1)
    largest = kind.machines.index(max(kind.machines))
    return engine_of(recipe, sum(kind.machines[:largest]), kind.machines, shard=shard).sizes()


def check(recipe: Recipe, kinds: list[Kind], placed: str = "", shard: str = "optimizer") -> str:
    """Every rank of every team has the digest, objective, checksums and training state of a process alone."""
    digest, told, saved, parameters = trained(recipe, Solo, 0, (1,))
    assert isinstance(told[-1], tuple), "checksums are the last"
    for kind in kinds:
        first, *others = of_team(recipe, kind, shard)
        assert first[:2] == (digest, told), kind
        assert sum(each[3] for each in (first, *others)) == parameters, "each takes its part of the checksums"
        assert_same(*(torch.load(io.BytesIO(each), weights_only=True) for each in (first[2], saved)))
        assert {each[0] for each in others} == {digest}, kind
        assert not placed or {each[2] for each in others} == {placed}
    return str(digest)


def test_one_digest_alone_in_memory_and_by_gloo() -> None:
    kinds = [Kind("2 in memory", (2,)), Kind("2 by gloo", (1, 1), True), Kind("3 by gloo", (1, 1, 1), True)]
    made = recipe()
    assert check(made, kinds) == reference_digests(made)[made.steps]


@pytest.mark.slow
def test_one_digest_for_5_processes_and_machines_of_several_workers() -> None:
    """Weights are shared in each machine that has several."""
    several = [Kind("5 by gloo", (1,) * 5, True), Kind("5 in memory", (5,))]
    machines = [Kind("2 + 2", (2, 2), True), Kind("3 + 2", (3, 2), True), Kind("2 + 1", (2, 1), True)]
    check(recipe(), several + machines)


def test_machines_whose_workers_share_weights_have_the_digest_of_private_ones() -> None:
    check(recipe(steps=3), [Kind("2 + 2", (2, 2), True)], "Sharded")
    check(recipe(steps=3, optimizer=own_adamw), [Kind("2 + 2", (2, 2), True)], "Replicated")
    check(recipe(steps=3), [Kind("2 + 2", (2, 2), True)], "Replicated", shard="none")


PIECES = [(1,), (2, 1), (1, 2, 2, 1), (1,) * 9]


@pytest.mark.parametrize(
    "pieces", [PIECES[2], *(pytest.param(each, marks=pytest.mark.slow) for each in PIECES)], ids=str
)
def test_any_cutting_into_pieces_gives_the_same_bytes(
    pieces: tuple[int, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of machines with one worker and with several, ranges that are no whole subtrees among them; the second step is
    one whose gradients travel early.
    """
    monkeypatch.setitem(BLOCK, "cpu", 64)  # so that a small model has many
    monkeypatch.setattr(total, "PIECES", pieces)
    made, begun = recipe(steps=3, batch=30, microbatches=6), tmp_path / "begun"
    exchanged = Total.reached

    def reached(self: Total, done: int) -> None:
        if 0 < done < len(pieces):
            begun.touch()
        exchanged(self, done)

    monkeypatch.setattr(Total, "reached", reached)
    digest = trained(made, Solo, 0, (1,))[0]
    for kind in (Kind("2 by gloo", (1, 1), True), Kind("2 + 1", (2, 1), True)):
        assert {each[0] for each in of_team(made, kind)} == {digest}, kind
    assert begun.exists() == (len(pieces) > 1), "some have begun to travel in backward"


class Wishes(Trial):
    """Of these steps, whatever they take."""

    def __init__(self, *early: bool):
        super().__init__()
        self._wishes = iter(early)

    def next(self) -> bool:
        return next(self._wishes)


@pytest.mark.parametrize("early", [(False,) * 4, (True,) * 4, (True, False, True, True)], ids=str)
def test_gradients_that_travel_early_or_late_as_worker_0_says_have_the_same_bytes(
    early: tuple[bool, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Other workers would rather have it the other way."""
    monkeypatch.setitem(BLOCK, "cpu", 64)
    made, join, begin = recipe(steps=4, batch=30, microbatches=6), Lockstep.join, Total.begin

    def joined(self: Lockstep, group: Group) -> None:
        join(self, group)
        self._trial = Wishes(*(wish == (self.worker == 0) for wish in early))

    def begun(self: Total, *, early: bool) -> None:
        with Path(tmp_path, str(self._worker)).open("a") as file:
            file.write("early " if early else "late ")
        begin(self, early=early)

    digest = trained(made, Solo, 0, (1,))[0]
    monkeypatch.setattr(Lockstep, "join", joined)
    monkeypatch.setattr(Total, "begin", begun)
    for kind in (Kind("2 by gloo", (1, 1), True), Kind("2 + 1", (2, 1), True)):
        assert {each[0] for each in of_team(made, kind)} == {digest}, kind
        told = {file.read_text() for file in tmp_path.iterdir()}
        assert told == {"late " + "".join("early " if each else "late " for each in early[:3])}
        for file in tmp_path.iterdir():
            file.unlink()


@pytest.mark.parametrize(
    "machines", [(2, 1), *(pytest.param(each, marks=pytest.mark.slow) for each in ((2, 2), (1, 3), (5,)))], ids=str
)
def test_ranges_that_move_within_machines_give_the_same_digest(
    machines: tuple[int, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With gradients that travel late and early, in pieces, and with shared or private weights."""
    begin, moves = Division.begin, tmp_path / "moves"

    def begin_and_note(self: Division) -> bool:
        moved = begin(self)
        with moves.open("a") as file:
            file.write("moved\n" * moved)
        return moved

    monkeypatch.setattr(Division, "begin", begin_and_note)
    monkeypatch.setattr(division, "Balance", AtRandom)
    monkeypatch.setitem(BLOCK, "cpu", 64)
    kind = Kind("+".join(map(str, machines)), machines, gloo=len(machines) > 1)
    made = recipe(steps=7, batch=36, microbatches=12, evaluate_every=3)
    check(made, [kind], "Sharded")
    check(made, [kind], "Replicated", shard="none")
    assert len(moves.read_text().split()) == 2 * sum(machines) * (made.steps - 2)


class AllToTheFirst:
    """In place of `instep.engines.balance.Balance`: the first worker gets all, where there is memory for it."""

    def __init__(self, counts: Sequence[int], fits: Callable[[Sequence[int]], bool]):
        self.seconds = [1.0] * len(counts)
        self._counts = [sum(counts), *[0] * (len(counts) - 1)]
        assert fits(self._counts), "the whole tree is one node"

    def decide(self, seconds: Sequence[float]) -> list[int]:
        return self._counts


def test_ranges_that_move_where_the_system_bounds_memory_give_the_same_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is none for more nodes then, and what a worker tells of more microbatches takes more room all the same."""
    monkeypatch.setattr(lockstep, "limited", lambda: True)
    monkeypatch.setattr(division, "Balance", AllToTheFirst)
    check(workloads.gpt(steps=4, batch=32, microbatches=16, checksum_every=2), [Kind("2 in memory", (2,))], "Sharded")


class OwnAdamW(torch.optim.AdamW):
    """It might do anything, so weights are not shared."""


def own_adamw(parameters: Any) -> OwnAdamW:
    return OwnAdamW(parameters, lr=0.003)


@pytest.mark.parametrize("kind", [Kind("3 in memory", (3,)), Kind("3 by gloo", (1, 1, 1), True)], ids=lambda k: k.name)
def test_where_one_raises_all_stop_and_the_weights_are_saved(kind: Kind) -> None:
    made = recipe()

    def body(make: Callable[[Sizes], Group], rank: int) -> Any:
        engine = engine_of(made, rank, kind.machines)
        engine.join(make(engine.sizes()))
        progress, saved = Progress(), []

        def after_step(progress: Progress, last: bool, timed: bool) -> None:
            if progress.version == 3 and rank == 1:
                raise ValueError("of the user's")

        with pytest.raises(ValueError if rank == 1 else PeerRaised):
            engine.run(progress, after_step, made.steps)
        version = engine.stop(progress.version, saved.append, saved=0, needed=True, written=False)
        return version, progress.version, len(saved), digest_of_state(engine.replica.saved_state())

    found = Ranks(kind, engine_sizes(made, kind), body).answers()
    expected = reference_digests(made)[3]
    assert found == [(3, 3, rank == 0, expected) for rank in range(3)]
