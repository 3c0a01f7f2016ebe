"""The equivalence of real processes: a team loses a worker, goes on, is ended and resumed, and is computed again. No
torch."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from instep.api import replay, train
from instep.equivalences.claims import CLAIMS, short
from instep.equivalences.found import Compared, Equivalence
from instep.errors import InstepError, ResourceError
from instep.recipe import Recipe, Team

LONG = 1_000_000
"""Steps at least: the run is ended long before, and must not be over before a worker is lost, however slow we are."""

MORE = 2
"""Updates after the loss, and after the resume."""

NAME = "processes"


class _Enough(Exception):
    """The run has done what it is to do."""


class _Loses:
    """A monitor that kills a worker after the first update, and ends the run `MORE` updates after it was replaced."""

    def __init__(self, worker: int):
        self._worker, self._pids, self._left = worker, dict[int, int](), MORE
        self.killed = self.lost = self._back = False

    def __call__(self, event: Mapping[str, Any]) -> None:
        kind = event["kind"]
        if kind == "joined":
            self._pids[event["worker"]] = event["pid"]
            self._back = self.lost
        elif kind == "left":
            self.lost = self.killed
        elif kind == "merged" and not self.killed:
            self.killed = True
            with suppress(ProcessLookupError):
                os.kill(self._pids[self._worker], signal.SIGKILL)
        elif kind == "merged" and self._back:
            self._left -= 1
            if not self._left:
                raise _Enough


class _Ends:
    """A monitor that ends the run after `MORE` updates."""

    def __init__(self) -> None:
        self._left = MORE

    def __call__(self, event: Mapping[str, Any]) -> None:
        self._left -= event["kind"] == "merged"
        if not self._left:
            raise _Enough


def with_processes(recipe: Recipe, folder: Path, import_paths: Sequence[str | os.PathLike[str]] = ()) -> Equivalence:
    """Proves or refutes it; `folder` becomes the run's. Raises KeyboardInterrupt."""
    try:
        return _attempted(recipe, import_paths, folder)
    except ResourceError as error:
        return Equivalence(NAME, CLAIMS[NAME], "not run", why=error.message)
    except InstepError as error:
        return Equivalence(NAME, CLAIMS[NAME], "refuted", why=error.message)


def _attempted(recipe: Recipe, import_paths: Sequence[str | os.PathLike[str]], path: Path) -> Equivalence:
    long = short(recipe, max(recipe.steps, LONG))
    several = min(2, recipe.microbatches)
    team = Team(workers=several, launcher="local", checkpoint_every=1, keep=2, keep_best=False)
    loses = _Loses(several - 1)
    with suppress(_Enough):
        train(long, team=team, out=path, monitors=[loses], import_paths=import_paths)
    if not loses.lost:
        why = f"the run was over before a worker was lost, after {long.steps} steps; give recipe.steps more."
        return Equivalence(NAME, CLAIMS[NAME], "not run", why=why)
    with suppress(_Enough):
        alone = replace(team, workers=1)
        train(long, team=alone, resume=path, monitors=[_Ends()], import_paths=import_paths)
    replayed = replay(path, long)
    updates = replayed.proof.updates
    tensors = replayed.proof.checksums // max(1, updates)
    seen = Compared(tensors=tensors, steps=replayed.versions, workers=tuple(sorted({several, 1}, reverse=True)))
    if replayed.same:
        return Equivalence(NAME, CLAIMS[NAME], "proved", seen, note=f"one worker killed, one resume: {replayed.proof}.")
    why = replayed.divergence or "the last weights are others than those of the run."
    return Equivalence(
        NAME, CLAIMS[NAME], "refuted", seen,
        f"Computed again by one worker the run comes to something else: {why.rstrip('.')}.",
    )  # fmt: skip
