"""The second level: the runs computed again side by side, to the first update that differs, and into it."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from instep.apart.alignment import PartingPlace, first_place
from instep.apart.levels import differing
from instep.apart.sides import Away, Figures, FoundAgain, How, Into, Side
from instep.apart.told import FIGURES
from instep.apart.whose import with_worker
from instep.components import importable
from instep.equivalences.forks import Body, Say, in_copies
from instep.equivalences.found import Where
from instep.equivalences.parting import first_apart, located, ulps
from instep.equivalences.teams import UPDATE, Setup, Steps, compute
from instep.errors import RecordError
from instep.offline.again import played
from instep.offline.tape_replay import Playback
from instep.recipe import Recipe
from instep.record import checkpoint
from instep.record.files import disk_error, synced_file
from instep.record.weights import write_weights
from instep.worker.optimizer_state import copied
from instep.worker.tensor_checksums import checksums_of

if TYPE_CHECKING:
    from torch import Tensor

    from instep.team.child import Tell


@dataclass(frozen=True)
class _At:
    """A side at a version: checksums by tensor, the names of those that updates change, figures of the last update."""

    version: int
    sums: Mapping[str, str]
    names: Sequence[str]
    figures: Figures | None
    divergence: str
    worker: int | None


def compute_again(
    recipe: Recipe, sides: Sequence[Side], after: int, looks: bool, folder: Path, into: Into | None, tell: Tell
) -> FoundAgain:
    """Computes the sides again, compared from version `after` on, until they part or one parts from its tape.

    looks: whether the first update that differs is then looked at, operation by operation. folder: for scratch. into:
    the file for what goes into and comes out of that operation. Raises InstepError as the runs would.
    """
    found = FoundAgain(sums=[{} for _ in sides])
    known = [after] * len(sides)

    def answer(asked: list[_At]) -> bool:
        version = asked[0].version
        found.last = version
        _count(found, sides, asked)
        tell({"kind": "computed_again", "version": version})
        for place, at in enumerate(asked):
            found.sums[place][version] = dict(at.sums)
            gone = _away(sides[place], place, at, known)
            found.away = found.away or gone
        if len(asked) > 1 and (names := differing(asked[0].sums, asked[1].sums)):
            found.apart, found.names = version, tuple(names)
        return found.apart is not None or found.away is not None

    ends = in_copies([_Again(side, after, folder / str(place)) for place, side in enumerate(sides)], answer)
    for place, sentence in enumerate(ends):
        if sentence and found.apart is None and found.away is None:  # a digest, which is told after all else
            found.away = Away(place, found.last, known[place], (), (), sentence=sentence)
    if found.away is not None and looks:
        side = sides[found.away.side]
        before = checkpoint.all_in(folder / str(found.away.side))
        found.away = with_worker(side, found.away, before[-1]) if before else found.away
    if looks and len(sides) > 1 and found.away is None and found.apart:
        _look(sides, found, folder, into)
    return found


def _count(found: FoundAgain, sides: Sequence[Side], asked: Sequence[_At]) -> None:
    """What of a version is compared: with one another, or of one side with what is told."""
    version, told = asked[0].version, sides[0].sums.get(asked[0].version) or sides[0].merged.get(asked[0].version)
    names = len(asked[0].sums) if len(sides) > 1 else len(told or ())
    found.compared += bool(names)
    found.tensors = max(found.tensors, names)
    pairs = zip(sides, asked, strict=True)
    found.figures += any(at.figures is not None and version in side.updates for side, at in pairs)


def _away(side: Side, place: int, at: _At, known: list[int]) -> Away | None:
    """Where a side is something else than its tape tells; `known` is, by side, up to where it is not."""
    told, others = side.sums.get(at.version), list[str]()
    if told is None and at.version in side.merged:
        told = dict(zip(at.names, side.merged[at.version], strict=False))
    if at.figures is not None and at.version in side.updates:
        figures = side.updates[at.version]
        others = [shown for name, shown in FIGURES.items() if figures[name] != at.figures[name]]
    own = at.sums if told is None or at.version in side.sums else {name: at.sums.get(name, "") for name in told}
    tensors = differing(told, own) if told is not None else []
    if tensors or others or at.divergence:
        gone = tuple(tensors), tuple(others)
        return Away(place, at.version, known[place], *gone, worker=at.worker, sentence=at.divergence)
    if told is not None:
        known[place] = at.version
    return None


class _Enough(Exception):
    """The sides have parted."""


class _Again(Body):
    """Computes one side, and asks after each version whether to go on; what was before it is saved where they part."""

    def __init__(self, side: Side, after: int, folder: Path):
        self._side, self._after, self._folder = side, after, folder
        self._before: tuple[int, dict[str, Any], dict[str, Any]] | None = None

    def run(self, rank: int, ask: Say) -> str:
        def see(playback: Playback, version: int) -> None:
            self.replica = playback.replica
            if version < self._after:
                return
            sums = checksums_of(playback.replica)
            own = {**sums["weights"], **sums["optimizer"]}
            names = list(playback.names)
            if ask(_At(version, own, names, _figures(playback), playback.divergence, playback.worker)):
                raise _Enough
            state = {name: tensor.clone() for name, tensor in playback.replica.saved_state().items()}
            self._before = version, state, copied(playback.training_state())

        with importable(self._side.import_paths):
            try:
                return played(self._side.recipe, self._side.stretch, see).divergence
            except _Enough:
                self._save()
        return ""

    def _save(self) -> None:
        if self._before is None:
            return
        version, state, training = self._before
        checkpoint.save(
            self._folder, version=version, model_state=state, training_state=training, keep=0,
            meta={"progress": {"version": version, "steps": version}}, fingerprint=self._side.recipe.fingerprint(),
        )  # fmt: skip


def _figures(playback: Playback) -> Figures | None:
    """Of the update that was made last, as a tape would tell them."""
    if playback.update is None:
        return None
    facts = playback.update.facts()
    return {name: _plain(facts[name]) for name in FIGURES}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _look(sides: Sequence[Side], found: FoundAgain, folder: Path, into: Into | None) -> None:
    """Finds the operation of the update at which they part, each computed from its weights before it."""
    assert found.apart is not None
    saved = [checkpoint.all_in(folder / str(place)) for place in range(len(sides))]
    if not all(saved):
        return  # the first weights are others
    setups = [Setup(steps=found.apart, look=found.apart - 1, update=True, resume=paths[-1]) for paths in saved]
    looked = [_steps(side, setup, found.apart) for side, setup in zip(sides, setups, strict=True)]
    apart = first_apart(*looked)
    if apart is None:
        return
    found.kind = apart.kind
    if apart.kind in ("start", "batch"):
        found.place = Where(found.apart, apart.microbatch, apart.name)
        return
    where, _ = located(apart, looked, operations=False)
    place = first_place(looked[0].operations, looked[1].operations)
    found.place = where
    if place is None:
        return
    update = place.microbatch == UPDATE
    found.place = replace(
        where, microbatch=None if update else place.microbatch,
        operation=place.operation.name, module=place.operation.module,
    )  # fmt: skip
    found.how = How(place.kind, place.one, place.other, update=update)
    if into is not None:
        _keep(sides, setups, found, place, into)


def _keep(sides: Sequence[Side], setups: Sequence[Setup], found: FoundAgain, place: PartingPlace, into: Into) -> None:
    """Saves what goes into the operation and comes out of it, and measures how far the results are apart."""
    assert found.apart is not None
    assert found.place is not None
    kept = []
    for side, setup, at in zip(sides, setups, (place.a, place.b), strict=True):
        keep = None if at is None else (place.microbatch, at)
        kept.append(_steps(side, replace(setup, keep=keep), found.apart).kept if keep else {})
    if any(kept):
        found.place = replace(found.place, ulps=_distance(kept, found.place.ulps))
        found.unsaved = _unsaved(kept, into)
        found.saved = not found.unsaved


def _steps(side: Side, setup: Setup, version: int) -> Steps:
    with importable(side.import_paths):
        return compute(side.recipe_at(version), setup)


def _distance(kept: Sequence[Mapping[str, Tensor]], otherwise: float | None) -> float | None:
    """How far the results are from one another, in ulps; `otherwise` where they cannot be compared."""
    one, other = (each.get("output.0") for each in kept)
    if one is None or other is None or one.shape != other.shape or not one.is_floating_point():
        return otherwise
    return ulps(one, other)


def _unsaved(kept: Sequence[Mapping[str, Tensor]], into: Into) -> str:
    """Writes them; why they are not written, as a sentence, "" where they are."""
    size = sum(tensor.nbytes for each in kept for tensor in each.values())
    if into.most is not None and size > into.most:
        return (
            f"The tensors of that operation have {size:,} bytes, and unless a file is named for them (--save FILE) at "
            f"most {into.most:,} are saved."
        )
    try:
        _write(kept, into.path)
    except RecordError as error:  # of a type that no such file holds
        return error.message
    except OSError as error:
        return disk_error(f"the tensors of that operation cannot be saved in {into.path}", error).message
    return ""


def _write(kept: Sequence[Mapping[str, Tensor]], into: Path) -> None:
    """All tensors of the operation, those of the first side under "a." and those of the second under "b."."""
    sides = zip("ab", kept, strict=True)
    aside = into.with_name(f".{into.name}.new")
    try:
        with synced_file(aside) as file:
            write_weights(file, {f"{side}.{name}": tensor for side, each in sides for name, tensor in each.items()})
        os.replace(aside, into)
    finally:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
