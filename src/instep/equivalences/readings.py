"""What one fork alone does for a check: takes the recipe, reads its data, saves and loads its optimizer, simulates,
replays."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from instep.data.repeats import what_does_not_repeat
from instep.data.signature import signature
from instep.equivalences.forks import Body, Say
from instep.equivalences.teams import Steps
from instep.equivalences.whole_batch import team_gradient
from instep.errors import CheckpointError
from instep.offline.cluster import Cluster
from instep.offline.simulation import simulate
from instep.offline.tape_replay import replay
from instep.recipe import Recipe
from instep.record import checkpoint, tape
from instep.record.folder import RunFolder
from instep.record.result import Replayed
from instep.reduce.reduction import norm_of
from instep.worker.first_look import look_at_data, look_at_objective
from instep.worker.gradients import Gradients
from instep.worker.optimizer_state import copied, difference, tensors_in
from instep.worker.replica import Replica
from instep.worker.trial import try_checkpoint, try_optimizer
from instep.worker.updates import clipped_step

STEPS = 3
"""Whose samples are read."""


@dataclass(frozen=True)
class Taken:
    """What was built and tried. modules: that were imported for it."""

    tensors: int
    samples: int
    note: str
    modules: list[str]


class Acceptance(Body):
    """Builds the recipe and tries what a run tries before its first step. Raises InstepError."""

    def __init__(self, recipe: Recipe):
        self._recipe = recipe

    def run(self, rank: int, ask: Say) -> Taken:
        before = set(sys.modules)
        doubts: list[str] = []
        replica = self.replica = Replica(self._recipe, "cpu")
        doubt = try_optimizer(lambda: replica)
        doubts += [doubt] if doubt else []
        first = look_at_data(replica, doubts.append)
        probe = replica.learn_terms(0, first)
        look_at_objective(replica, probe)
        doubt = try_checkpoint(replica, replica.saved_state(), replica.training_state())
        doubts += [doubt] if doubt else []
        doubts += replica.doubts()
        tensors = len(replica.module.state_dict())
        return Taken(tensors, len(replica.data.train), " ".join(doubts), sorted(set(sys.modules) - before))


def load_before_forks(modules: Sequence[str]) -> None:
    """Imports what a fork did, so that the next ones need not: of installed packages alone, not of the user's code."""
    for name in modules:
        with suppress(Exception):
            root = find_spec(name.partition(".")[0])
            if root is not None and "site-packages" in str(root.origin or list(root.submodule_search_locations or ())):
                import_module(name)


@dataclass(frozen=True)
class Read:
    """Signatures by (step, microbatch), and a sentence on what does not repeat, or ""."""

    batches: dict[tuple[int, int], str]
    samples: int
    cause: str


class Reading(Body):
    """Reads the microbatches of the first steps, each with its own seed, from the first or from the last."""

    def __init__(self, recipe: Recipe, *, backwards: bool):
        self._recipe, self._backwards = recipe, backwards

    def run(self, rank: int, ask: Say) -> Read:
        replica = self.replica = Replica(self._recipe, "cpu")
        places = [(step, microbatch) for step in range(STEPS) for microbatch in range(self._recipe.microbatches)]
        found = {}
        for step, microbatch in reversed(places) if self._backwards else places:
            found[step, microbatch] = signature(replica.batch(step, microbatch))
        samples = sum(replica.cursor.size(step) for step in range(STEPS))
        return Read(found, samples, what_does_not_repeat(replica.data))


class RoundTrip(Body):
    """Saves an optimizer after real steps, loads it into another that is built again, and has both go on.

    Gives how many tensors were compared, and over how many steps. Raises CheckpointError.
    """

    made, more = 2, 2

    def __init__(self, recipe: Recipe):
        self._recipe = recipe

    def run(self, rank: int, ask: Say) -> tuple[int, int]:
        replica = self.replica = Replica(self._recipe, "cpu")
        replica.learn_terms(0)
        gradients = Gradients(replica)
        for step in range(self.made):
            self._step(step, gradients, [replica])
        saved = checkpoint.repacked(copied(replica.training_state()))
        weights = {name: value.clone() for name, value in replica.saved_state().items()}
        again = replica.again(torch.device("cpu"))
        again.load(weights, saved)
        tensors = 0
        for step in range(self.made, self.made + self.more):
            self._step(step, gradients, [replica, again])
            one, other = (
                {"weights": dict(each.module.state_dict()), **each.training_state()} for each in (replica, again)
            )
            where = difference(one, other)
            if where is not None:
                raise CheckpointError(
                    f"the optimizer {replica.optimizer.kind}, saved after {self.made} steps and loaded, comes to "
                    f"another '{where}' in step {step + 1} from the same gradients: it keeps what its steps change "
                    f"outside of its state_dict, or takes something else back in load_state_dict."
                )
            tensors = sum(1 for _ in tensors_in(one))
        return tensors, self.more

    def _step(self, step: int, gradients: Gradients, which: Sequence[Replica]) -> None:
        """One update of each of them, from the first one's gradient."""
        first = which[0]
        microbatches = range(first.recipe.microbatches)
        batches = {m: batch for m in microbatches if (batch := first.batch(step, m)) is not None}
        total, touched = team_gradient(first, gradients, step, batches)
        norm = norm_of(total, gradients.layout)
        for each in which:
            own = total.clone()
            clipped_step(each, step, own, gradients.layout.views(own), norm, touched)


class Simulation(Body):
    """A run on a virtual clock, with real gradients: gives its tape."""

    def __init__(self, recipe: Recipe, cluster: Cluster, folder: Path):
        self._recipe, self._cluster, self._folder = recipe, cluster, folder

    def run(self, rank: int, ask: Say) -> list[dict[str, Any]]:
        simulate(self._recipe, self._cluster, True, self._folder, lambda event: None)
        return [dict(event) for event in tape.read(RunFolder(self._folder).tape_path)]


class Replay(Body):
    """Computes a run again from its tape."""

    def __init__(self, recipe: Recipe, events: Sequence[dict[str, Any]]):
        self._recipe, self._events = recipe, events

    def run(self, rank: int, ask: Say) -> Replayed:
        return replay(self._recipe, [e for e in self._events if e["kind"] not in ("computed", "evaluated")])


def trace_of(events: Sequence[dict[str, Any]]) -> Steps:
    """What a tape tells of its updates."""
    trace = Steps()
    for event in events:
        if event["kind"] == "checksummed":
            trace.weights[event["version"]] = dict(event["weights"])
            trace.optimizer[event["version"]] = dict(event["optimizer"])
    return trace
