"""`instep.diff`: where two runs part, or a run and its recipe. No torch: who computes has it."""

from __future__ import annotations

import os
import shlex
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

from instep.apart import exported
from instep.apart.found import Again, Departed, Diffed, RunOf, Verdict
from instep.apart.levels import Field, fields_apart, listed, seen_apart
from instep.apart.sides import Away, FoundAgain, Into, Side
from instep.apart.told import Told, told
from instep.apart.words import how_apart, how_away
from instep.api import monitors_of
from instep.equivalences.found import Where
from instep.errors import RecordError, cut
from instep.monitors import Monitor
from instep.offline.past import Past
from instep.offline.stretches import Stretch
from instep.recipe import Recipe
from instep.record.computed_by import made_apart, made_otherwise, unrepeatable, untold
from instep.team.client import computed
from instep.team.signals import interrupting

Path_ = str | os.PathLike[str]

_MOST_SAVED = 1 << 30
"""Bytes of an operation's tensors that are saved in a file that nobody named."""

_MEMORY = "it takes the memory of one worker for each run, under local steps of all: try it where there is more"


@interrupting()
def diff(
    a: Path_,
    b: Path_ | None = None,
    *,
    recipes: Sequence[Recipe | None] = (None, None),
    tapes_only: bool = False,
    save: Path_ | None = None,
    monitors: Iterable[Monitor] = (),
) -> Diffed:
    """Where the runs in the folders `a` and `b` part; without `b`, where the run parts from its own recipe here.

    >>> found = instep.diff(run.path, again.path)
    >>> found.verdict, found.same
    ('the same', True)

    First by their tapes, at whose resolution they are compared (`recipe.checksum_every`); where these part, both are
    computed again from their nearest kept checkpoints before to the first update that differs, and that one operation
    by operation. `str` of the answer is a sentence, `document()` what ``instep diff --json`` prints.

    a, b: run folders, or files that `instep.apart.exported.export` has written on the machine that made the run.
    recipes: those of `a` and `b`, where the saved ones hold objects without an address. tapes_only: computes nothing.
    save: a new file for what goes into the operation at which they part, and comes out of it; by default one beside `a`
    of at most 1 GiB.
    monitors: called with ``{"kind": "told", ...}`` once the tapes are compared, ``{"kind": "computing", ...}`` with the
    updates that will be, and ``{"kind": "computed_again", "version": ...}`` after each.

    Raises RecordError where there is no run, its tape is damaged from the start or `save` exists, RecipeError where a
    recipe is needed, and InstepError as the runs would.
    """
    if save is not None and os.path.lexists(save):
        raise RecordError(
            f"{cut(save)} is there already, and nothing is written over it; name another file to save in."
        )
    watching = monitors_of(monitors)
    sides = [_Side(a, recipes[0], _read(a))]
    if b is not None:
        sides.append(_Side(b, (*recipes, None)[1], _read(b)))
    found = _from_tapes(sides)
    _tell(watching, {"kind": "told", "found": found})
    if tapes_only or not _to_compute(sides, found):
        return found
    return _computed(sides, found, _file(sides, save), watching)


def _read(path: Path_) -> Told:
    return exported.read(path) if Path(path).is_file() else told(path)


@dataclass(frozen=True)
class _Side:
    """A run to compare."""

    path: Path_
    recipe: Recipe | None
    told: Told

    def past(self) -> Past:
        return Past.of(self.path, self.recipe, f"diff({str(self.path)!r}, recipes=[recipe])")

    def unlike(self) -> str:
        """What made it and is not here, or does not repeat, as a clause."""
        return next(filter(None, (made_otherwise(each) or unrepeatable(each) for each in self.told.starts)), "")

    @property
    def untold(self) -> str:
        """What made it, where nobody knows whether it is here, as a clause."""
        return next(filter(None, map(untold, self.told.starts)), "")

    @property
    def computable(self) -> bool:
        """Whether there are gradients."""
        return bool(self.told.digests or self.told.sums) or any(any(sums) for sums in self.told.contributions.values())

    @property
    def about(self) -> RunOf:
        found = self.told
        return RunOf(found.path, found.rule, tuple(found.workers), found.last, found.ended, found.about())


def _from_tapes(sides: Sequence[_Side]) -> Diffed:
    """What the tapes show by themselves."""
    remarks = tuple(each.told.torn for each in sides if each.told.torn)
    one = sides[0].told
    if len(sides) == 1:
        return Diffed(sides[0].about, None, "undecided", remarks=remarks)
    other = sides[1].told
    fields, seen = tuple(fields_apart(one, other)), seen_apart(one, other)
    made = tuple(Field(*each) for each in made_apart(one.start, other.start))
    data = one.start["data_digest"] == other.start["data_digest"]
    verdict: Verdict = "the same" if seen.first is None else "undecided"
    if not seen.updates and not seen.digests and verdict == "the same":
        verdict, remarks = "undecided", (*remarks, "There is no update or digest yet that both tapes tell of.")
    if any(field.decides for field in fields) or not data:
        verdict = "the recipes differ"
    return Diffed(sides[0].about, sides[1].about, verdict, fields, data, made, seen, remarks=remarks)


def _to_compute(sides: Sequence[_Side], found: Diffed) -> bool:
    return (found.seen is None or found.seen.first is not None) and all(each.computable for each in sides)


def _file(sides: Sequence[_Side], given: Path_ | None) -> Into | None:
    if given is not None:
        return Into(Path(given).absolute(), None)
    if len(sides) == 1:
        return None
    one, other = (Path(each.path).absolute() for each in sides)
    names = (f"{one.name}-{other.name}{f'-{number}' if number else ''}.safetensors" for number in count())
    return Into(next(path for path in map(one.with_name, names) if not os.path.lexists(path)), _MOST_SAVED)


def _computed(sides: Sequence[_Side], found: Diffed, into: Into | None, monitors: Sequence[Monitor]) -> Diffed:
    """The second level."""
    if any(each.told.exported for each in sides):
        return _against_file(sides, found, monitors)
    unlike = [each.unlike() for each in sides]
    if len(sides) > 1 and any(unlike):
        return _elsewhere(sides, found, unlike)
    pasts = [each.past() for each in sides]
    seen = found.seen
    stop = sides[0].told.last if seen is None else seen.first
    after = (seen.alike if seen is not None else 0) or 0
    assert stop is not None
    stretches = [past.to(stop, after) for past in pasts]
    counts = [stretch.updates for stretch in stretches]
    starts = [stretch.start for stretch in stretches]
    _tell(monitors, {"kind": "computing", "updates": counts, "start": starts, "stop": stop})
    again = _again(pasts[0], _to_send(sides, pasts, stretches), after, into, monitors)
    found = replace(found, again=_done(again, starts))
    if again.unsaved:
        found = replace(found, remarks=(*found.remarks, again.unsaved))
    return _concluded(sides, found, again, starts, into, unlike[0] if len(sides) == 1 else "")


def _done(again: FoundAgain, starts: Sequence[int]) -> Again:
    updates = tuple(again.last - start for start in starts)
    return Again(updates, tuple(starts), again.compared, again.tensors, again.figures)


def _to_send(sides: Sequence[_Side], pasts: Sequence[Past], stretches: Sequence[Stretch]) -> list[Side]:
    return [
        Side(
            past.recipe, stretch, past.import_paths, each.told.sums, each.told.updates,
            {version: sums[-1] for version, sums in each.told.contributions.items() if sums[-1]},
            each.told.ranges, each.told.pushed, each.told.shared,
        )
        for each, past, stretch in zip(sides, pasts, stretches, strict=True)
    ]  # fmt: skip


def _concluded(
    sides: Sequence[_Side], found: Diffed, again: FoundAgain, starts: Sequence[int], into: Into | None, unlike: str
) -> Diffed:
    """The verdict on what computing has shown."""
    gone = again.away
    if gone is not None:
        return _departed(sides[gone.side], "AB"[gone.side], found, gone, starts[gone.side], unlike)
    if len(sides) == 1 and not (again.compared or again.figures):
        return replace(found, why="The tape tells of nothing yet that could be compared.")
    if len(sides) == 1:
        return replace(found, verdict="the same")
    if again.apart is None:
        why = "Computed again here, both come to the same, and to what their tapes tell."
        return replace(found, verdict="undecided", why=why)
    verdict: Verdict = "the recipes differ" if found.verdict == "the recipes differ" else "reproducibly different"
    place = again.place or Where(again.apart, tensor=again.names[0])
    saved = str(into.path) if into is not None and again.saved else ""
    return replace(found, verdict=verdict, place=place, why=how_apart(found, again), saved=saved)


def _departed(side: _Side, run: str, found: Diffed, gone: Away, start: int, unlike: str) -> Diffed:
    """One comes to something else than its own tape tells, here where there is what made it, but for `unlike`."""
    unlike = unlike or side.untold
    how = how_away(gone, start, unlike)
    departed = Departed(run, str(side.path), gone.version, gone.since, gone.tensors, gone.worker, how)
    return replace(found, verdict="undecided" if unlike else "not reproducible", departed=departed, why=how)


def _elsewhere(sides: Sequence[_Side], found: Diffed, unlike: Sequence[str]) -> Diffed:
    """Where one of two was made by what is not here: what computing it here would show is not what it was."""
    place = unlike.index(next(filter(None, unlike)))
    run, path = "AB"[place], sides[place].path
    why = f"Run {run} was made with {unlike[place]}, which may give other bits, so it is not computed again here."
    there, here = shlex.quote(str(path)), shlex.quote(str(sides[1 - place].path))
    seen = found.seen
    assert seen is not None
    if not any(map(made_otherwise, sides[place].told.starts)):
        return replace(found, why=why)  # nor does it repeat where it was made
    updates = f"{(seen.alike or 0) + 1}:{seen.first or 1}"
    goes_on = f"instep diff {there} --export FILE --updates {updates}, where it was made; here instep diff {here} FILE"
    return replace(found, why=why, goes_on=goes_on)


def _against_file(sides: Sequence[_Side], found: Diffed, monitors: Sequence[Monitor]) -> Diffed:
    """One side is a file of another machine: the other is computed again, and compared with what the file has."""
    there = next(place for place, each in enumerate(sides) if each.told.exported)
    own, seen = sides[1 - there], found.seen
    if len(sides) == 1 or own.told.exported or seen is None or seen.first is None:
        return replace(
            found, why="" if found.seen else "Give the folder of a run beside it, on the machine that made that."
        )
    if unlike := own.unlike():
        run = "AB"[1 - there]
        why = f"Run {run} was made with {unlike}, which may give other bits, so it is not computed again here."
        return replace(found, why=why)
    past, after = own.past(), seen.alike or 0
    stretch = past.to(seen.first, after)
    _tell(monitors, {"kind": "computing", "updates": [stretch.updates], "start": [stretch.start], "stop": seen.first})
    side = Side(past.recipe, stretch, past.import_paths, sides[there].told.sums)
    again = _again(past, [side], after, None, monitors)
    done, gone = _done(again, [stretch.start]), again.away
    if gone is None and not done.compared:
        wanted = f"{after + 1}:{seen.first or 1}"
        why = f"The file has no checksums of where the tapes part; export it with --updates {wanted}."
        return replace(found, again=done, why=why)
    if gone is None:
        return replace(found, again=done, why="Computed again here, it comes to all that the file has checksums of.")
    if gone.sentence:  # of its own tape
        away = replace(gone, since=after, tensors=(), figures=())
        return _departed(own, "AB"[1 - there], replace(found, again=done), away, stretch.start, "")
    place = Where(gone.version, tensor=gone.tensors[0] if gone.tensors else "")
    made = f" Run {'AB'[there]} was computed where it was made."
    since = f"In version {gone.version:,}"
    if gone.since < gone.version:
        since = f"Up to version {gone.since:,} all tensors are the same; then"
    why = f"{since} {listed(gone.tensors)} differ.{made}"
    verdict: Verdict = "the recipes differ" if found.verdict == "the recipes differ" else "reproducibly different"
    return replace(found, verdict=verdict, again=done, place=place, why=why)


def _again(past: Past, sides: list[Side], after: int, into: Into | None, monitors: Sequence[Monitor]) -> FoundAgain:
    """`instep.apart.again.compute_again`, in a process of its own."""
    looks = all(side.recipe.rule.synchronous and side.on_cpu for side in sides)
    with tempfile.TemporaryDirectory(prefix="instep-diff-", ignore_cleanup_errors=True) as place:
        found: FoundAgain = computed(
            "instep.apart.again:compute_again", past.recipe, (sides, after, looks, Path(place), into),
            past.import_paths, monitors, if_killed=_MEMORY,
        )  # fmt: skip
    return found


def _tell(monitors: Sequence[Monitor], event: dict[str, Any]) -> None:
    for monitor in monitors:
        monitor(event)
