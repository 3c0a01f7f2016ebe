"""The objective as engines watch it before each update: spikes, and what is not finite.

What is judged are the objectives of whole updates, which are the same for any team in lockstep, and on the tape under
any other rule; so every worker, and every replay, comes to the same verdict by itself.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from instep.errors import CheckpointError, NonFiniteError, ObjectiveError
from instep.record.shapes import WATCH, misfit
from instep.reduce.buffers import Buffers
from instep.watch import Watch, limit, usual
from instep.worker.milestones import Progress
from instep.worker.optimizer_state import copied
from instep.worker.replica import Replica


class Verdict(NamedTuple):
    """On one update. answer: "" where it is no spike, else what the watch answers with.

    why: a sentence to warn with, or "". bad: batches in it that are not finite or have no items. `left_out`: whether
    the update is not made because of that. overflows: 1 where it is not made since the loss scale is too large, or
    under local steps those that workers left out for that.
    """

    answer: str = ""
    why: str = ""
    bad: int = 0
    left_out: bool = False
    overflows: int = 0

    @property
    def updates(self) -> bool:
        """Whether the update is made."""
        return self.answer in ("", "warn") and not self.left_out

    def also(self, other: Verdict) -> Verdict:
        """Both, `other` on the spike."""
        why = " ".join(filter(None, [self.why, other.why]))
        return self._replace(answer=other.answer, why=why)

    def facts(self) -> dict[str, Any]:
        """What the tape says of the update, beside the rest."""
        spike = {"spike": self.answer} if self.answer else {}
        bad = {"bad_batches": self.bad} if self.bad or (self.left_out and not self.overflows) else {}
        return spike | bad | ({"overflows": self.overflows} if self.overflows else {})

    def note(self, progress: Progress) -> None:
        """Keeps count."""
        progress.skipped += self.answer not in ("", "warn")
        progress.bad_batches += self.bad
        progress.overflows += self.overflows
        if self.answer == "stop":
            progress.stopped = self.why


class Watcher:
    """Judges each update before it is made, from the objectives before it; keeps states for a rollback."""

    def __init__(self, replica: Replica, buffers: Buffers):
        self._replica, self._buffers = replica, buffers
        self._pasts: dict[str, deque[float]] = {}  # by turn, "" where none are taken
        self._kept: dict[str, Any] | None = None
        self._rollbacks = 0
        self._quiet = 0  # updates for which a spike is no news
        self._bad = 0  # batches that were left out

    @property
    def _watch(self) -> Watch:
        return self._replica.watch

    @property
    def skips(self) -> bool:
        """Whether batches that are not finite, or have no items, are left out."""
        return self._watch.bad_batch == "skip"

    def left_out(self, verdict: Verdict, whys: Sequence[ObjectiveError], *, update: bool) -> Verdict:
        """`verdict` on an update in which batches are bad for the reasons `whys`; with `update` it is left out whole.

        Raises the first of them that is not to be left out, or is one too many, before any change.
        """
        allowed = self._watch.bad_batches if self.skips else 0
        if self._bad + len(whys) > allowed and whys:
            raise _stopping(whys[max(0, allowed - self._bad)], self._bad, self._watch)
        self._bad += len(whys)
        sentences = [verdict.why] if verdict.why else []
        if whys:
            listed = "; ".join(why.message.rstrip(".") for why in whys)
            what = "the update is left" if update else "workers leave it" if len(whys) == 1 else "workers leave them"
            sentences.append(f"{listed}; {what} out, {self._bad:,} of at most {allowed:,} such batches.")
        return verdict._replace(why=" ".join(sentences), bad=len(whys), left_out=update)

    def judge(self, step: int, objective: float, turn: str = "") -> Verdict:
        """The verdict on the update of `step`, whose objective is this. A rollback is carried out.

        turn: whose it was, where objectives take turns; it is compared with those of the same turn.

        `step` is the version under a synchronous rule. The weights are those that the objective was computed from.
        """
        watch = self._watch
        if watch.spike == "ignore":
            return Verdict()
        past = self._pasts.get(turn)
        if past is None or past.maxlen != watch.window:
            past = self._pasts[turn] = deque(past or (), maxlen=watch.window)
        full = len(past) == watch.window
        spike = full and not usual(objective, past, watch.deviations)
        bound = limit(past, watch.deviations) if spike else math.inf
        past.append(objective)
        self._quiet -= 1
        if objective > bound:
            return self._answer(step, objective, bound)
        if watch.spike == "rollback" and step % watch.rollback_every == 0:
            self._keep(step)
        return Verdict()

    def _answer(self, step: int, objective: float, bound: float) -> Verdict:
        watch = self._watch
        answer, then = str(watch.spike), ""
        if answer == "warn":
            quiet, self._quiet = self._quiet > 0, watch.window
            if quiet:
                return Verdict(answer)
        elif answer == "skip":
            then = "; the update is left out"
        elif answer == "stop":
            then = "; the run ends before this update, as watch.spike says"
        elif answer == "rollback" and (self._kept is None or self._rollbacks == watch.rollbacks):
            answer, then = "stop", f"; the run ends before this update, for {self._rollbacks} rollbacks did not help"
        elif answer == "rollback" and self._kept is not None:
            then = f"; the weights go back to those of version {self._kept['version']}"
            self._rollbacks += 1
            self._replica.load(self._kept["model"], copied(self._kept["training"]))
            self._buffers.restart()
        return Verdict(
            answer,
            f"the objective is {objective:.6g} in step {step + 1}, a spike: more than {watch.deviations:g} robust "
            f"standard deviations above the median of the last {watch.window} updates, {bound:.6g}{then}.",
        )

    def _keep(self, version: int) -> None:
        replica = self._replica
        self._kept = {
            "version": version,
            "model": {name: tensor.detach().clone() for name, tensor in replica.module.state_dict().items()},
            "training": copied(replica.training_state()),
        }

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        turns = {turn: list(past) for turn, past in self._pasts.items() if turn}
        return {
            "past": list(self._pasts.get("", ())), "kept": self._kept, "rollbacks": self._rollbacks,
            "quiet": self._quiet, "bad": self._bad, **({"turns": turns} if turns else {}),
        }  # fmt: skip

    def load(self, state: Mapping[str, Any] | None) -> None:
        """Takes back what `state` gave; None starts anew. Raises CheckpointError where it is none."""
        if state is None:
            state = {"past": [], "kept": None, "rollbacks": 0, "quiet": 0}
        wrong = misfit(state, WATCH)
        if wrong is not None:
            raise CheckpointError(f"of the watch's state in the checkpoint {wrong}; use an earlier checkpoint.")
        pasts = {"": state["past"], **state.get("turns", {})}
        self._pasts = {turn: deque(past, maxlen=self._watch.window) for turn, past in pasts.items()}
        self._kept, self._rollbacks, self._quiet = state["kept"], state["rollbacks"], state["quiet"]
        self._bad = state.get("bad", 0)


def wrong_in_step(
    replica: Replica,
    step: int,
    terms: Sequence[str],
    sums: Sequence[float],
    totals: Mapping[str, int],
    norm: float,
    gradients: Iterable[tuple[str, Tensor, bool]],
) -> list[ObjectiveError]:
    """The first thing that is not finite in a whole step, or that it has no items; nothing where all is right, or the
    gradient may not be finite since the loss scale is too large.

    sums: of the microbatches, term by term. gradients: name, gradient, and whether there is one, of each parameter.
    """
    if not replica.objective.has_items(totals):
        return [replica.objective.no_items(step)]
    bad_sum = next((place for place, value in enumerate(sums) if not math.isfinite(value)), None)
    if bad_sum is not None:
        microbatch, term = divmod(bad_sum, len(terms))
        return [*replica.not_finite({terms[term]: sums[bad_sum]}, step, microbatch)]
    if math.isfinite(norm) or replica.scaler.yields():
        return []
    bad = next((name for name, view, seen in gradients if seen and not bool(torch.isfinite(view).all())), None)
    which = f"of '{bad}' is not finite" if bad else "is too large to square"
    which += replica.scaler.said()
    return [NonFiniteError(f"the gradient {which} in step {step + 1}, though every term of the objective is.")]


def _stopping(why: ObjectiveError, before: int, watch: Watch) -> ObjectiveError:
    """The error `why` with what helps, all of which a resume takes."""
    if watch.bad_batch == "skip":
        left_out = f"{before:,} such batches were left out before it, as many as watch.bad_batches allows"
        remedies = "raise that, or look at the data"
    else:
        left_out, remedies = "the weights are as they were before it", "set watch.bad_batch to 'skip'"
    if isinstance(why, NonFiniteError):
        remedies += ", lower recipe.schedule.scale, or leave samples out with skip_samples (--skip-samples)"
    return type(why)(f"{why.message.rstrip('.')}; {left_out}: {remedies}.")
