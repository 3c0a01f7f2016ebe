"""What a comparison of two runs comes to: plain data, which a program, lines and a document of JSON are made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from instep.apart.levels import Field, Seen, listed
from instep.equivalences.found import Where

SCHEMA = 1
"""The version of the document."""

Verdict = Literal["the same", "the recipes differ", "reproducibly different", "not reproducible", "undecided"]


@dataclass(frozen=True)
class RunOf:
    """A side. workers: of its teams. ended: "ended", "interrupted", "failed" or "not ended"."""

    path: str
    rule: str
    workers: tuple[int, ...]
    versions: int
    ended: str
    about: str


@dataclass(frozen=True)
class Again:
    """What was computed again: `updates` of each run, each from its version of `start`.

    compared: versions whose tensors were compared, with so many different ones each. figures: updates whose figures
    were, with those that the tape tells.
    """

    updates: tuple[int, ...]
    start: tuple[int, ...]
    compared: int
    tensors: int
    figures: int = 0


@dataclass(frozen=True)
class Departed:
    """A run that comes to something else than its own tape tells.

    run: "A" or "B". update: the first that is another; since: the last version that is known to be the recipe's own.
    tensors: that differ after it. worker: whose fault it is; None where that cannot be told. how: a sentence.
    """

    run: str
    path: str
    update: int
    since: int
    tensors: tuple[str, ...]
    worker: int | None
    how: str


@dataclass(frozen=True)
class Diffed:
    """What `instep.diff` gives.

    fields: of the recipes, that differ; data: whether it is the same, None where that is not told; made: libraries and
    processors that differ. seen: what the tapes show. place: where they part, as far as it was found; why: how they
    part there, in a sentence. saved: the file with both inputs of that operation, "" for none. remarks: sentences on
    what could not be done. goes_on: a command that finishes the search.
    """

    a: RunOf
    b: RunOf | None
    verdict: Verdict
    fields: tuple[Field, ...] = ()
    data: bool | None = None
    made: tuple[Field, ...] = ()
    seen: Seen | None = None
    again: Again | None = None
    place: Where | None = None
    why: str = ""
    departed: Departed | None = None
    saved: str = ""
    remarks: tuple[str, ...] = ()
    goes_on: str = ""

    @property
    def same(self) -> bool:
        """Whether nothing differs, of all that was compared."""
        return self.verdict == "the same"

    def __str__(self) -> str:
        return self.sentence

    @property
    def sentence(self) -> str:
        """The verdict, in a sentence or two."""
        return str(_SENTENCES[self.verdict](self))

    def document(self) -> dict[str, Any]:
        """What ``--json`` prints, see docs/diff.md."""
        return {
            "schema": SCHEMA, "verdict": self.verdict, "sentence": self.sentence, "a": asdict(self.a),
            "b": None if self.b is None else asdict(self.b), "fields": [asdict(each) for each in self.fields],
            "data_same": self.data, "made": [asdict(each) for each in self.made],
            "tapes": None if self.seen is None else asdict(self.seen),
            "again": None if self.again is None else asdict(self.again),
            "place": None if self.place is None else asdict(self.place), "why": self.why,
            "departed": None if self.departed is None else asdict(self.departed), "saved": self.saved,
            "remarks": list(self.remarks), "goes_on": self.goes_on,
        }  # fmt: skip


def _same(found: Diffed) -> str:
    whose = "The runs are the same" if found.b is not None else "The run is what its recipe comes to here"
    if found.b is not None and found.a.versions != found.b.versions:
        whose += f" up to version {min(found.a.versions, found.b.versions):,}, the last that both have"
    return f"{whose}: {counted(found)}."


def counted(found: Diffed) -> str:
    """How much was compared."""
    parts = []
    if found.again is not None:
        if found.again.compared:
            parts.append(f"{_count(found.again.tensors, 'tensor')} in {_count(found.again.compared, 'version')}")
        if found.again.figures:
            parts.append(_count(found.again.figures, "update"))
    elif found.seen is not None:
        if found.seen.sums:
            parts.append(f"{_count(found.seen.names, 'tensor')} in {_count(len(found.seen.sums), 'version')}")
        parts.append(_count(found.seen.updates, "update"))
        if found.seen.digests:
            parts.append(_count(found.seen.digests, "digest"))
    return f"{', '.join(parts)} compared"


def _where(found: Diffed) -> str:
    if found.place is not None and str(found.place):
        return f"they part in {str(found.place).replace('step', 'update', 1)}"
    seen = found.seen
    if seen is None:
        return "nothing was computed again"
    if seen.first is None:
        return "no update of the runs is seen to differ"
    what = [listed(seen.tensors)] if seen.tensors else []
    what += [f"the {what}" for what in seen.what]
    since = f"; all that was compared up to version {seen.alike:,} is the same" if seen.alike is not None else ""
    return f"the tapes part in update {seen.first:,}, in {', '.join(what)}{since}"


def _recipes(found: Diffed) -> str:
    decisive = [field for field in found.fields if field.decides] or list(found.fields)
    names = ", ".join(f"recipe.{field.name}" for field in decisive[:3])
    if not decisive and found.data is False:
        names = "the data"
    more = f" and {len(decisive) - 3} more" if len(decisive) > 3 else ""
    return f"The recipes differ, in {names}{more}; {_where(found)}.{_more(found)}"


def _different(found: Diffed) -> str:
    return f"Reproducibly different: {_where(found)}.{_more(found)}"


def _more(found: Diffed) -> str:
    saved = f" Both inputs of that operation are in {found.saved}." if found.saved else ""
    return f"{f' {found.why}' if found.why else ''}{saved}"


def _departed(found: Diffed) -> str:
    gone = found.departed
    assert gone is not None
    whose = f"run {gone.run} ({gone.path})" if found.b is not None else f"the run {gone.path}"
    at = f"update {gone.update:,}"
    if gone.since < gone.update - 1:
        at = f"an update from {gone.since + 1:,} to {gone.update:,}"
    tensors = f", tensor {listed(gone.tensors)}" if gone.tensors else ""
    worker = f", worker {gone.worker}" if gone.worker is not None else ""
    return f"Not reproducible: {whose} departs from its own recipe at {at}{tensors}{worker}. {gone.how}"


def _undecided(found: Diffed) -> str:
    if found.departed is not None:
        whose = f"run {found.departed.run}, " if found.b is not None else ""
        return f"Undecided: {whose}{found.why[0].lower()}{found.why[1:]}"
    return f"Undecided: {_where(found)}.{_more(found)}"


_SENTENCES: Mapping[str, Any] = {
    "the same": _same, "the recipes differ": _recipes, "reproducibly different": _different,
    "not reproducible": _departed, "undecided": _undecided,
}  # fmt: skip


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
