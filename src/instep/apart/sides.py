"""What computing two runs again needs and comes to. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from instep.equivalences.found import Where
from instep.offline.stretches import Stretch
from instep.recipe import Recipe

Figures = dict[str, Any]
"""What a tape tells of an update and depends on no clock, see `instep.apart.told.FIGURES`."""


@dataclass(frozen=True)
class Side:
    """A run to compute again. sums, updates, ranges, pushed: what its tape tells, to be compared, see `Told`; merged:
    checksums of the parameters after an update by a server. shared: whether each worker updates a share of them.
    """

    recipe: Recipe
    stretch: Stretch
    import_paths: tuple[str, ...]
    sums: Mapping[int, Mapping[str, str]] = field(default_factory=dict)
    updates: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    merged: Mapping[int, Sequence[str]] = field(default_factory=dict)
    ranges: Mapping[int, Mapping[int, tuple[int, int]]] = field(default_factory=dict)
    pushed: Mapping[int, Mapping[int, Sequence[str]]] = field(default_factory=dict)
    shared: bool = False

    @property
    def on_cpu(self) -> bool:
        """Whether no part of it was computed on a GPU."""
        starts = (event for event in self.stretch.events if event["kind"] == "run_started")
        return all(start["team"].get("device", "cpu") == "cpu" for start in starts)

    def start_of(self, version: int) -> Mapping[str, Any]:
        """The start of the session that made this version."""
        starts = [event for event in self.stretch.events if event["kind"] == "run_started"]
        return next((each for each in reversed(starts) if each["version"] < version), starts[0])

    def recipe_at(self, version: int) -> Recipe:
        """Its recipe as the session had it that made this version, with checksums of each."""
        start = self.start_of(version)
        known = self.recipe.known(self.recipe.fingerprints().index(start["fingerprint"]))
        return replace(
            known, steps=start["steps"], checksum_every=1, evaluate_every=0, artifacts=None, artifacts_every=0
        )


@dataclass(frozen=True)
class Into:
    """The file for what goes into the operation at which two sides part. most: bytes, None for any number."""

    path: Path
    most: int | None


@dataclass(frozen=True)
class Away:
    """One side comes to something else than its tape tells: at this version, in these tensors, or figures.

    worker: whose contribution is another, or else whose share of the update. owner: whether it is the latter. sentence:
    of the playback, "" where it saw nothing.
    """

    side: int
    version: int
    since: int
    tensors: tuple[str, ...]
    figures: tuple[str, ...]
    worker: int | None = None
    owner: bool = False
    sentence: str = ""


@dataclass(frozen=True)
class How:
    """How an operation parts from the other run's. kind: as `instep.equivalences.operations.parting` says; one, other:
    what they have not in common; update: whether it is in the optimizer's step.
    """

    kind: str
    one: str = ""
    other: str = ""
    update: bool = False


@dataclass
class FoundAgain:
    """What computing came to. last: the version up to which both were computed. compared: versions whose tensors were,
    with so many at most; figures: updates whose figures were, with the tape. apart: where the sides part, and in which
    tensors; away: where one parts from its own tape. unsaved: why there is no file, a sentence. sums: by
    side and version.
    """

    last: int = 0
    compared: int = 0
    tensors: int = 0
    figures: int = 0
    apart: int | None = None
    names: tuple[str, ...] = ()
    away: Away | None = None
    place: Where | None = None
    how: How | None = None
    kind: str = ""
    saved: bool = False
    unsaved: str = ""
    sums: list[dict[int, dict[str, str]]] = field(default_factory=list)
