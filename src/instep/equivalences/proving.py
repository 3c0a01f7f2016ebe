"""The equivalences that need no real team, each proved or refuted in turn, by forks of a process of its own.

Every one is about the recipe as it stands, but for its length, and without what only looks: evaluations, samples,
artifacts and the watch.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from instep.clock.slow import parse_slow
from instep.clock.times import WorkerTimes
from instep.equivalences import readings
from instep.equivalences.claims import BUDGETS, CLAIMS, REFUSED, SAVED, STEPS, short
from instep.equivalences.forks import alone
from instep.equivalences.found import Compared, Equivalence, Verdict, Where
from instep.equivalences.parting import Apart, compared, first_apart, narrowed
from instep.equivalences.teams import Setup, Steps, compute
from instep.equivalences.whole_batch import Whole, WholeBatch
from instep.errors import (
    CheckpointingError,
    InstepError,
    RecipeError,
    RecomputeError,
    ResourceError,
)
from instep.offline.cluster import Cluster
from instep.recipe import Recipe
from instep.record import checkpoint
from instep.record.computed_by import libraries
from instep.rules.presets import asynchronous, bounded_staleness, local_sgd, text_of
from instep.turns import Turns

if TYPE_CHECKING:
    from instep.team.child import Tell


Proved = tuple[list[Equivalence], dict[str, str]]
"""The equivalences, and the versions of the libraries."""


def prove(recipe: Recipe, wanted: Sequence[str], folder: Path, tell: Tell = lambda event: None) -> Proved:
    """Those of the equivalences that are `wanted`; `folder` is for what lies on the disk meanwhile.

    `tell` gets an event before each and after it.
    """
    proofs = _Proofs(recipe, folder)
    found: list[Equivalence] = []
    for name, run in proofs.all.items():
        if name not in wanted and name != "recipe":
            continue
        tell({"kind": "checking", "name": name, "claim": CLAIMS[name]})
        began = time.monotonic()
        if found and found[0].verdict == "refuted":
            each = Equivalence(name, CLAIMS[name], "not run", why=f"{REFUSED}: see '{found[0].name}'.")
        else:
            each = _attempted(name, run)
        each = replace(each, took_s=round(time.monotonic() - began, 3))
        found.append(each)
        tell({"kind": "checked", "name": name, "verdict": each.verdict})
    return found, libraries()


def _attempted(name: str, run: Callable[[], Equivalence]) -> Equivalence:
    """The proof; what Instep refuses with a sentence refutes it with that sentence."""
    try:
        return run()
    except ResourceError as error:
        return Equivalence(name, CLAIMS[name], "not run", why=error.message)
    except InstepError as error:
        return Equivalence(name, CLAIMS[name], "refuted", why=error.message)


@dataclass
class _Proofs:
    recipe: Recipe
    folder: Path
    base: Steps | None = field(default=None)

    def __post_init__(self) -> None:
        self.short = short(self.recipe)
        self.team = min(3, self.recipe.microbatches)

    @property
    def all(self) -> dict[str, Callable[[], Equivalence]]:
        return {
            "recipe": self.accepted, "data": self.data, "workers": self.workers, "full batch": self.full_batch,
            "optimizer": self.optimizer, "resume": self.resume, "memory": self.memory,
            "staleness 0": self.staleness_0, "replay": self.replay,
        }  # fmt: skip

    def accepted(self) -> Equivalence:
        built = alone(readings.Acceptance(self.short))
        readings.load_before_forks(built.modules)
        return _proved("recipe", Compared(tensors=built.tensors, samples=built.samples), note=built.note)

    def data(self) -> Equivalence:
        one, other = (alone(readings.Reading(self.short, backwards=flag)) for flag in (False, True))
        seen = Compared(samples=one.samples, steps=readings.STEPS)
        apart = sorted(place for place in one.batches if one.batches[place] != other.batches[place])
        if not apart:
            return _proved("data", seen)
        (step, microbatch), more = apart[0], f"; {len(apart)} of {len(one.batches)} microbatches differ"
        why = (
            other.cause
            or one.cause
            or (
                "The data set or its collate keeps state, depends on what was read before, or reads a clock; let a "
                "sample depend on its index and the seeded generators alone."
            )
        )
        where = Where(step + 1, microbatch)
        return Equivalence("data", CLAIMS["data"], "refuted", seen, f"{why.rstrip('.')}{more}.", where)

    def workers(self) -> Equivalence:
        recipe = self.short
        if recipe.microbatches == 1:
            return _not_run("workers", "a batch of one microbatch has one worker; set recipe.microbatches higher.")
        sizes = sorted({1, 2, self.team, *([recipe.microbatches] if recipe.microbatches <= 4 else [])})
        traces = {size: self._trace(Setup(workers=size)) for size in sizes}
        seen = compared(*traces.values(), workers=tuple(sizes))
        for size, trace in list(traces.items())[1:]:
            apart = first_apart(traces[1], trace)
            if apart is not None:
                found = self._refuted("workers", seen, Setup(), Setup(workers=size), apart)
                return replace(found, note=f"1 worker and {size} part.")
        return _proved("workers", seen)

    def full_batch(self) -> Equivalence:
        found: list[Whole] = alone(WholeBatch(self.short))
        run = [each for each in found if not each.skipped]
        if not run:
            return _not_run("full batch", found[0].skipped)
        seen = Compared(tensors=len(run[0].off), steps=len(run), samples=sum(each.samples for each in run))
        worst = max(run, key=lambda each: each.worst[1] / each.let_pass)
        name, off = worst.worst
        where = "float64" if worst.exact else "its own precision"
        note = f"at most {off:,.3g} ulp off a plain backward in {where}; {worst.let_pass:,.0f} are let pass."
        if worst.right:
            return _proved("full batch", seen, note=note)
        place = Where(worst.step + 1, None, name, module=worst.module, ulps=off)
        return Equivalence("full batch", CLAIMS["full batch"], "refuted", seen, worst.cause, place, note)

    def optimizer(self) -> Equivalence:
        tensors, steps = alone(readings.RoundTrip(self.short))
        return _proved("optimizer", Compared(tensors=tensors, steps=steps, workers=(1,)))

    def resume(self) -> Equivalence:
        size = min(2, self.recipe.microbatches)
        saved = self.folder / "resume"
        saved.mkdir(exist_ok=True)
        compute(self.short, Setup(workers=1, steps=SAVED, save=saved))
        path = checkpoint.path_of(saved, SAVED)
        setup = Setup(workers=size, resume=path)
        base, resumed = self._trace(Setup()), compute(self.short, setup)
        seen = compared(base, resumed, workers=(1, size), after=SAVED)
        apart = first_apart(base, resumed)
        if apart is not None:
            return self._refuted("resume", seen, Setup(), setup, apart)
        return _proved("resume", seen)

    def memory(self) -> Equivalence:
        why = ""
        for budget in BUDGETS:
            try:
                trace = compute(self.short, Setup(memory=budget))
            except RecomputeError:
                raise
            except CheckpointingError as error:
                why = why if "no plan fits" in error.message and why else error.message
                if "no plan fits" not in error.message:
                    break
                continue
            base = self._trace(Setup())
            seen = compared(base, trace, workers=(1,))
            apart = first_apart(base, trace)
            if apart is not None:
                return self._refuted("memory", seen, Setup(), Setup(memory=budget), apart)
            return _proved("memory", seen, note=f"within {budget} of the activations' bytes: {trace.plan}.")
        return _not_run("memory", why)

    def staleness_0(self) -> Equivalence:
        size = self.team
        rule = bounded_staleness(0)
        events = self._simulated(replace(self.short, rule=rule), size)
        trace, base = readings.trace_of(events), self._trace(Setup())
        seen = compared(base, trace, workers=(size,))
        apart = first_apart(base, trace)
        if apart is None:
            return _proved("staleness 0", seen)
        place = Where(apart.step + 1, apart.microbatch, apart.name)
        why = _in_common(self._trace(Setup(look=apart.step)))
        return Equivalence("staleness 0", CLAIMS["staleness 0"], "refuted", seen, why, place)

    def replay(self) -> Equivalence:
        own, order = self.recipe.rule, self.recipe.objective
        free = local_sgd(order.cycle) if isinstance(order, Turns) else asynchronous()  # which would mix turns
        recipe = replace(self.short, rule=free if own.synchronous else own)
        if not recipe.rule.gradients:
            recipe = replace(recipe, steps=max(STEPS, 2 * min(recipe.rule.local_steps, STEPS)))
        size = max(2, self.team)
        try:
            recipe.rule.check_workers(size)
        except RecipeError as error:
            return _not_run("replay", error.message)
        try:
            events = self._simulated(recipe, size)
        except InstepError as error:
            if "whole global batch" in error.message:
                return _not_run("replay", error.message)
            raise
        replayed = alone(readings.Replay(recipe, events))
        tensors = len(next((e["checksum"] for e in events if e["kind"] == "merged"), []))
        seen = Compared(tensors=tensors, steps=replayed.proof.updates, workers=(size,))
        if replayed.same:
            return _proved("replay", seen, note=f"{replayed.proof} under {text_of(recipe.rule)}.")
        why = replayed.divergence or "the last weights are others."
        cause = _in_common(self._trace(Setup(look=0)))
        return Equivalence(
            "replay", CLAIMS["replay"], "refuted", seen, f"{why[0].upper()}{why[1:].rstrip('.')}. {cause}"
        )

    def _simulated(self, recipe: Recipe, workers: int) -> list[dict[str, Any]]:
        """The tape of a run on a virtual clock, with one slow worker, so that contributions come out of turn."""
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        times = WorkerTimes.lognormal(1.0, 0.3, slow=parse_slow(f"{workers - 1}:2.5x"), seed=recipe.seed)
        cluster = Cluster(workers=workers, times=times, merge_s=0.01, collective=False)
        events: list[dict[str, Any]] = alone(readings.Simulation(recipe, cluster, folder))
        return events

    def _trace(self, setup: Setup) -> Steps:
        if setup != Setup():
            return compute(self.short, setup)
        if self.base is None:
            self.base = compute(self.short, setup)
        return self.base

    def _refuted(self, name: str, seen: Compared, one: Setup, other: Setup, apart: Apart) -> Equivalence:
        place, why = narrowed(self.short, one, other, apart)
        return Equivalence(name, CLAIMS[name], "refuted", seen, why, place)


def _in_common(trace: Steps) -> str:
    from instep.equivalences.found import UNKNOWN
    from instep.equivalences.parting import about_state

    return about_state(trace.moved).strip() or UNKNOWN


def _proved(name: str, seen: Compared, note: str = "") -> Equivalence:
    return _of(name, "proved", seen, note)


def _of(name: str, verdict: Verdict, seen: Compared, note: str) -> Equivalence:
    return Equivalence(name, CLAIMS[name], verdict, seen, note=note)


def _not_run(name: str, why: str) -> Equivalence:
    return Equivalence(name, CLAIMS[name], "not run", why=why)
