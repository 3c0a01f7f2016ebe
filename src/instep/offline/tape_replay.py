"""A tape played back: `instep replay`, in a process of its own that computes as the run's workers did."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from instep.data.repeats import what_does_not_repeat
from instep.errors import RecordError
from instep.offline.replayer import Replayer
from instep.offline.stretches import ToldEvent, in_place, not_refuted, that_count
from instep.recipe import Recipe
from instep.record.digest import digest_of_state
from instep.record.result import Proof, Replayed, digests_of_averages
from instep.record.tape import take_back
from instep.reduce.written import FirstWrite
from instep.worker.averages import digests_of
from instep.worker.optimizer_state import copied
from instep.worker.tensor_checksums import checksums_of
from instep.worker.updates import Update

if TYPE_CHECKING:
    from instep.record.checkpoint import Loaded
    from instep.team.child import Tell
    from instep.worker.replica import Replica

KEPT = 4
"""Checkpoints whose state is kept, for a run that was resumed from one: it keeps 3 itself by default."""


def replay(recipe: Recipe, events: Iterable[Mapping[str, Any]], tell: Tell = lambda event: None) -> Replayed:
    """Computes a run again from its recipe and its tape. `tell` gets the events that a person may want to see.

    Raises RecordError where the tape is of another recipe or lacks what it needs, and InstepError as the run would.
    """
    with known_writes():
        return _replay(recipe, events, tell)


@contextmanager
def known_writes() -> Iterator[None]:
    """In the block, a forward that writes what the tape does not know of raises RecordError."""
    try:
        yield
    except FirstWrite as found:
        raise RecordError(
            f"the run cannot be replayed: here a forward wrote parameter '{found.names[0]}' in {found.where}, and the "
            f"tape does not know of it; the model depends on more than the batch, the seed and its own state, or an "
            f"older version of Instep, which let such writes pass, made the run."
        ) from None


def _replay(recipe: Recipe, events: Iterable[Mapping[str, Any]], tell: Tell) -> Replayed:
    playback: Playback | None = None
    for event in map(ToldEvent, not_refuted(that_count(in_place(events), recipe.fingerprints()))):
        if event["kind"] == "run_started":
            if playback is None:
                playback = Playback(recipe, event)
            playback.start(event)
        elif playback is not None:
            playback.take(event)
            if event["kind"] in ("merged", "run_ended"):
                tell(dict(event))
    if playback is None:
        raise RecordError("the tape holds no start of a run; there is nothing to replay.")
    return playback.result()


_FIGURES = {"objective": "objective", "items": "count of items", "lr": "learning rate", "loss_scale": "loss scale"}
"""What the tape says of every update and a replay compares, with its name for messages."""


class Playback:
    """A replay between the first event and the last.

    begin: the checkpoint that the first start goes on from, if it is not the run's own; observe: called after each
    update, with its version.
    """

    def __init__(
        self,
        recipe: Recipe,
        started: Mapping[str, Any],
        begin: Loaded | None = None,
        observe: Callable[[int], None] = lambda version: None,
    ):
        self._recipe, self._observe = recipe, observe
        self._engine: tuple[Any, ...] = ()
        self._replayer = self._fresh(started)
        self._kept: dict[int, dict[str, Any]] = {}
        self._version = 0
        if begin is None:
            self._keep(0)
        else:
            self._version = -1  # of neither
            self._kept[begin.version] = self._state_of(begin)
        self._clear()

    def _clear(self) -> None:
        self._ended: Mapping[str, Any] = {}  # what the tape tells of the end
        self._divergence = ""
        self.update: Update | None = None
        """The last one that was made."""
        self.worker: int | None = None
        """Whose contribution is the first thing that differs, if one is."""
        self._told: dict[int, Mapping[str, Any]] = {}  # in lockstep: updates by version, until they are computed
        self._updates = self._contributions = self._checkpoints = self._checksums = 0
        self._alike = 0  # the last version whose tensors were all compared and the same

    def begin_again(self, started: Mapping[str, Any], begin: Loaded | None) -> None:
        """Compares anew from a checkpoint on, or the run's beginning, where the first start was, in this session."""
        self._clear()
        self._kept = {0: self._kept[0]} if begin is None else {0: self._kept[0], begin.version: self._state_of(begin)}
        self._version = -1  # of neither
        self.start({**started, "version": max(self._kept)})

    def start(self, event: Mapping[str, Any]) -> None:
        """The run starts, or starts again from a checkpoint: later updates than that never were."""
        version = event["version"]
        take_back(self._kept, version)
        take_back(self._told, version)
        self._alike = min(version, self._alike)
        if version not in self._kept:
            self._make_up_for(version)
        if self._engine != _engine_of(event):
            if self._engine[:-1] == _engine_of(event)[:-1]:
                self._divergence = ""  # it went back since a first write made of what it computed something else
            self._replayer = self._fresh(event)
            self._version = -1
        self._restore(version)
        self._ended = {}
        if "digest" in event:  # earlier versions did not say
            self._expect(event["digest"], f"the start at version {version}")

    @property
    def _serving(self) -> bool:
        return bool(self._engine[0] != "lockstep")

    @property
    def replica(self) -> Replica:
        """With the present weights and optimizer."""
        return self._replayer.merger.replica

    @property
    def version(self) -> int:
        """That of the present weights."""
        return self._version

    @property
    def names(self) -> list[str]:
        """Of the parameters that updates change."""
        return self._replayer.merger.names

    @property
    def divergence(self) -> str:
        """A sentence on the first place where it and the tape differ, or ""."""
        return self._divergence

    def explained(self) -> str:
        """The divergence, and whether the samples repeat."""
        changing = what_does_not_repeat(self.replica.data) if self._divergence else ""
        return f"{self._divergence} {changing[0].upper()}{changing[1:]}" if changing else self._divergence

    @property
    def proof(self) -> Proof:
        """What was compared."""
        return Proof(self._checkpoints, self._updates, self._contributions, self._checksums)

    def training_state(self) -> dict[str, Any]:
        """What a checkpoint of the present version would hold beside the weights."""
        return self._replayer.merger.training_state()

    def _state_of(self, begin: Loaded) -> dict[str, Any]:
        """To go on from. Merged were in lockstep, and where no server's ledger is in it, all microbatches of a step."""
        steps = begin.meta.get("progress", {}).get("steps", begin.version)
        merged = begin.meta.get("ledger", {}).get("merged_microbatches", steps * self._recipe.microbatches)
        return {"model": begin.model_state, "training": begin.training_state, "microbatches": int(merged)}

    def take(self, event: ToldEvent) -> None:
        """One event. Raises RecordError where it refers to what is unknown."""
        kind = event["kind"]
        if kind == "checkpointed":
            self.reach(event["version"])
            self._expect(event["digest"], f"the checkpoint of version {event['version']}")
            self._checkpoints += 1
            self._keep(event["version"])
        elif kind == "checksummed":
            self.reach(event["version"])
            self._must_be(self._version, event, event["version"])
            self._compare_tensors(event)
        elif kind == "run_ended":
            self.reach(event["version"])
            self._must_be(self._version, event, event["version"])
            self._ended = {"digest": event["digest"], "result": event.get("result", {})}
        elif not self._serving:
            if kind == "merged":  # in lockstep the recipe alone decides; what is told is compared
                self._told[event["version"]] = {name: event.get(name) for name in _FIGURES}
        elif kind == "left":
            self._replayer.left(event["worker"])
        elif kind == "released":
            self._must_be(self._version, event, event["version"])
            self._check_piece(event, event["piece"])
            self._replayer.released(event["worker"], event["piece"], event["version"])
        elif kind == "pushed":
            if self._engine[0] == "virtual" and "checksum" not in event:
                raise RecordError(
                    "the tape is of a simulation without gradients, so there is nothing to compute again; simulate "
                    "without --no-gradients, or replay it under a --rule, which takes its times alone."
                )
            if event["worker"] not in self._replayer.computing:
                raise event.refers_to(event["worker"])
            self._check_piece(event, event["piece"])
            given = self._replayer.given(event["worker"])
            self._replayer.pushed(event["seq"], event["worker"])
            self._compare_given(event, given)
            self._compare_pushed(event, self._replayer.checksum(event["seq"]))
        elif kind == "dropped" and event["seq"] in self._replayer.waiting:
            self._replayer.dropped(event["seq"])
        elif kind == "merged":
            self._merge(event)

    def _merge(self, event: ToldEvent) -> None:
        """An update by a server."""
        self._must_be(self._version, event, event["version"] - 1)
        contributions, weights, staleness = event["contributions"], event["weights"], event["staleness"]
        seqs = {each.get("seq") for each in contributions}
        if not len(seqs) == len(contributions) == len(weights) == len(staleness) > 0:
            raise RecordError(
                f"the tape cannot be replayed: update {event['version']} has {len(contributions)} contributions, "
                f"{len(weights)} weights and {len(staleness)} numbers of staleness; the tape was changed."
            )
        for unknown in seqs - self._replayer.waiting.keys():
            raise event.refers_to(unknown)
        arrived = [self._replayer.pushed_as(each["seq"]) for each in contributions]
        parts = zip(contributions, weights, staleness, strict=True)
        update = self._replayer.merged(event["version"], {c["seq"]: (weight, old) for c, weight, old in parts})
        self._version = event["version"]
        self._compare_merged(event)
        self._compare_ledger(event, arrived)
        self._compare_figures(event["version"], event, update)
        self.update = update
        self._observe(self._version)

    def result(self) -> Replayed:
        """What it came to."""
        (digest, averages), recorded = digests_of(self.replica), self._ended.get("digest")
        if recorded is not None and recorded != digest and not self._divergence:
            self._divergence = f"version {self._version}, the last, has other weights here than in the run."
        told = digests_of_averages(self._ended.get("result", {}))
        if recorded is not None and averages != told and not self._divergence:
            self._divergence = f"version {self._version}, the last, has other averages of weights here than in the run."
        if self._divergence and recorded == digest:
            self._divergence = f"{self._divergence.rstrip('.')}; the last weights are those of the run."
        return Replayed(digest, recorded, self._version, self.explained(), self.proof)

    def _must_be(self, version: int, event: Mapping[str, Any], expected: int) -> None:
        if version != expected:
            raise RecordError(
                f"the tape cannot be replayed: its event {event['kind']!r} at {event['t_s']} s goes on from version "
                f"{expected}, and the updates before it end at {version}; a part of the tape is missing."
            )

    def _make_up_for(self, version: int) -> None:
        """The run was killed between a checkpoint and the event that tells of it."""
        if self._serving:
            if version != self._version:
                raise RecordError(
                    f"the run was resumed at version {version}, of which the tape has no checkpoint; the tape is not "
                    f"whole."
                )
        else:
            if not 0 <= self._version <= version:
                self._restore(max(kept for kept in self._kept if kept <= version))
            self.reach(version)
        self._keep(version)

    def reach(self, version: int) -> None:
        """In lockstep, computes the steps up to `version` as one worker."""
        for step in range(self._version, self._version if self._serving else version):
            self.update = update = self._replayer.alone(step)
            self._version, told = step + 1, self._told.pop(step + 1, None)
            if told is not None:
                self._compare_figures(step + 1, told, update)
            self._observe(step + 1)

    def _check_piece(self, event: ToldEvent, piece: int) -> None:
        if piece >= self._replayer.pieces.count:
            raise event.refers_to(f"piece {piece} of {self._replayer.pieces.count}")

    def _compare_given(self, event: Mapping[str, Any], given: tuple[int, int]) -> None:
        found = {**dict(zip(("piece", "version"), given, strict=True)), "items": self._replayer.waiting[event["seq"]]}
        for name, value in found.items():
            self._compare(f"the contribution {event['seq']} of worker {event['worker']}", name, event[name], value)

    def _compare_ledger(self, event: Mapping[str, Any], arrived: list[dict[str, int]]) -> None:
        """What the tape says of an update's contributions, and of how old they were."""
        what = f"version {event['version']}"
        for place, (told, found) in enumerate(zip(event["contributions"], arrived, strict=True)):
            staleness = event["version"] - 1 - found["version"]
            self._compare(what, f"staleness of contribution {told['seq']}", event["staleness"][place], staleness)
            for name in ("worker", "piece", "version"):
                self._compare(what, f"{name} of contribution {told['seq']}", told.get(name, found[name]), found[name])
        rule, pieces = self._replayer.recipe.rule, self._replayer.pieces
        if not pieces.in_tree_order:  # where it is, the tree adds all alike
            items = [each["items"] for each in arrived]
            for place, weight in enumerate(rule.weights(items, event["staleness"])):
                self._compare(what, "a weight", event["weights"][place], weight)

    def _compare_figures(self, version: int, told: Mapping[str, Any], update: Update) -> None:
        found = update.facts()
        for name, shown in _FIGURES.items():
            self._compare(f"version {version}", shown, told.get(name), found.get(name))
        self._updates += 1

    def _compare(self, what: str, name: str, told: Any, found: Any) -> None:
        """Notes the first value on the tape that is not the replay's. Nulls were numbers that are not finite."""
        same = told == found
        if isinstance(found, float):
            finite = math.isfinite(found) and told is not None
            same = math.isclose(told, found, rel_tol=1e-9, abs_tol=1e-12) if finite else told is None
        if not same and not self._divergence:
            self._divergence = f"{what}: its {name} is {told!r} on the tape and {found!r} here."

    def _compare_pushed(self, event: Mapping[str, Any], found: list[str]) -> None:
        self._contributions += 1
        if found != event["checksum"] and not self._divergence:
            self.worker = event["worker"]
            self._divergence = (
                f"the contribution {event['seq']} of worker {event['worker']}, from version {event['version']} on "
                f"piece {event['piece']}, is another one here than in the run; its weights were the same."
            )

    def _compare_merged(self, event: Mapping[str, Any]) -> None:
        merger = self._replayer.merger
        found = merger.checksum()
        if found == event["checksum"] or self._divergence:
            return
        names = [n for n, a, b in zip(merger.names, found, event["checksum"], strict=False) if a != b] or ["?"]
        workers = sorted({each["worker"] for each in event["contributions"]})
        self._divergence = (
            f"version {event['version']}, an update from {'worker' if len(workers) == 1 else 'workers'} "
            f"{', '.join(map(str, workers))}, {_differs_in(names)}; the contributions were the same."
        )

    def _compare_tensors(self, event: Mapping[str, Any]) -> None:
        """Every tensor that the tape tells the checksum of."""
        found, names = checksums_of(self._replayer.merger.replica), list[str]()
        for own, told in (found["weights"], event["weights"]), (found["optimizer"], event["optimizer"]):
            names += [name for name in {**own, **told} if own.get(name) != told.get(name)]
            self._checksums += len(told)
        if names and not self._divergence:
            since = f"; all were the same in version {self._alike}" if self._alike else ""
            self._divergence = f"version {event['version']} {_differs_in(names)}{since}."
        elif not names:
            self._alike = event["version"]

    def _expect(self, digest: str, what: str) -> None:
        if not self._divergence and digest_of_state(self._replayer.merger.replica.saved_state()) != digest:
            self._divergence = f"{what} has other weights here than in the run."

    def _fresh(self, started: Mapping[str, Any]) -> Replayer:
        device = str(started["team"].get("device", "cpu")).partition(":")[0]
        self._engine = _engine_of(started)
        cut = started["cut"] if self._serving else 1
        changes = self._recipe.fingerprints().index(started["fingerprint"])  # what was not known then did not hold
        recipe = dataclasses.replace(self._recipe.known(changes), steps=started["steps"])  # its schedule follows them
        batched, written = started.get("batched", False), started.get("written", ())
        home = "cpu" if self._serving else device  # a server's updates are made there
        return Replayer(recipe, cut, device, batched=batched, written=written, merged_on=home)

    def _keep(self, version: int) -> None:
        merger = self._replayer.merger
        state = {name: tensor.clone() for name, tensor in self._replayer.merger.replica.saved_state().items()}
        training = copied(merger.training_state())
        self._kept[version] = {"model": state, "training": training, "microbatches": merger.microbatches}
        for old in sorted(self._kept)[1:-KEPT]:
            del self._kept[old]

    def _restore(self, version: int) -> None:
        kept, merger = self._kept[version], self._replayer.merger
        if version != self._version or version == 0:
            merger.load(kept["model"], copied(kept["training"]))
            merger.microbatches = kept["microbatches"]
        merger.version = self._version = version
        self._replayer.everybody_left()


def _differs_in(names: Sequence[str]) -> str:
    others = f" and {len(names) - 1} other tensor{'s' if len(names) > 2 else ''}" if len(names) > 1 else ""
    return f"differs in '{names[0]}'{others}"


def _engine_of(started: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a start of the run was computed by: another one cuts the run, or its learning rate, in another way, or knows
    of other parameters that forwards write."""
    written = tuple(started.get("written", ()))
    return started["engine"], started["cut"], started["steps"], started["fingerprint"], written
