"""What the tables in a run's files must look like. One checker for all of them: valid JSON is not yet what was written.

A shape is data, made of the classes here. What a table has beyond its shape is passed over, for later versions may have
written it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

LARGEST = 1 << 63
"""No whole number in a file is as large."""


@dataclass(frozen=True)
class Is:
    """A value that `fits`; `what` it must be, for a message."""

    what: str
    fits: Callable[[Any], bool]


@dataclass(frozen=True)
class Maybe:
    """Null, or what `shape` says."""

    shape: Shape


@dataclass(frozen=True)
class Each:
    """A list whose every item is as `shape` says."""

    shape: Shape


@dataclass(frozen=True)
class All:
    """A table whose every value is as `shape` says, whatever its keys."""

    shape: Shape


@dataclass(frozen=True)
class Table:
    """A table. Of `fields` it has those that are `needed`; the others, where they are there, fit all the same."""

    fields: Mapping[str, Shape] = field(default_factory=dict)
    needed: tuple[str, ...] = ()


Shape = Is | Maybe | Each | All | Table


def whole(least: int = 0, most: int = LARGEST) -> Is:
    """A whole number from `least` to `most`."""
    what = f"a whole number from {least}" + (f" to {most}" if most != LARGEST else "")
    return Is(what, lambda value: type(value) is int and least <= value <= most)


def one_of(*values: str) -> Is:
    """One of these texts."""
    return Is(f"one of {', '.join(map(repr, values))}", lambda value: isinstance(value, str) and value in values)


COUNT = whole()
TEXT = Is("text", lambda value: isinstance(value, str))
FLAG = Is("true or false", lambda value: isinstance(value, bool))
NUMBER = Is(
    "a finite number",
    lambda value: (type(value) is float and math.isfinite(value)) or (type(value) is int and abs(value) < LARGEST),
)
FIGURE = Maybe(NUMBER)
"""A number that was written as null where it was not finite."""
ANY_TABLE = Table()
SPAN = Is(
    "[start, stop]",
    lambda value: isinstance(value, list) and len(value) == 2 and all(map(COUNT.fits, value)) and value[0] <= value[1],
)


COUNTS = Is(
    "a table of whole numbers by whole numbers",
    lambda value: isinstance(value, dict) and all(map(COUNT.fits, [*value, *value.values()])),
)


def misfit(value: Any, shape: Shape) -> str | None:
    """What of `value` is not of this shape, as a clause for a message; None where all is."""
    return None if fits(value, shape) else _misfit(value, shape)


def fits(value: Any, shape: Shape) -> bool:
    """Whether all of `value` is of this shape, without a word on where it is not: of a tape each event is asked."""
    match shape:
        case Is():
            return shape.fits(value)
        case Maybe():
            return value is None or fits(value, shape.shape)
        case Each(inner):
            if not isinstance(value, list):
                return False
            return all(map(inner.fits, value)) if isinstance(inner, Is) else all(fits(item, inner) for item in value)
        case All(inner):
            return isinstance(value, dict) and all(fits(item, inner) for item in value.values())
    if not isinstance(value, dict) or not all(key in value for key in shape.needed):
        return False
    fields = shape.fields
    return all(fits(item, fields[key]) for key, item in value.items() if key in fields)


def _misfit(value: Any, shape: Shape, where: str = "") -> str | None:
    match shape:
        case Is():
            return None if shape.fits(value) else f"{_at(where)} is {_shown(value)}, and it must be {shape.what}"
        case Maybe():
            return None if value is None else _misfit(value, shape.shape, where)
        case Each():
            if not isinstance(value, list):
                return f"{_at(where)} is {_shown(value)}, and it must be a list"
            found = (_misfit(item, shape.shape, f"{where}[{place}]") for place, item in enumerate(value))
            return next(filter(None, found), None)
    if not isinstance(value, dict):
        return f"{_at(where)} is {_shown(value)}, and it must be a table"
    if isinstance(shape, All):
        found = (_misfit(item, shape.shape, f"{where}.{key}") for key, item in value.items())
        return next(filter(None, found), None)
    lacking = next((key for key in shape.needed if key not in value), None)
    if lacking is not None:
        return f"{_at(where)} lacks '{lacking}'"
    found = (_misfit(value[key], inner, f"{where}.{key}") for key, inner in shape.fields.items() if key in value)
    return next(filter(None, found), None)


def _at(where: str) -> str:
    return f"'{where.lstrip('.')}'" if where else "it"


def _shown(value: Any) -> str:
    if type(value) is int and abs(value) >= LARGEST:
        return "a number beyond 64 bits"
    if isinstance(value, float) and not math.isfinite(value):
        return f"{value}"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


WORKER = whole(0, 1 << 24)

PROGRESS = Table(
    {
        "version": COUNT, "steps": COUNT, "items": COUNT, "train_s": NUMBER, "objective_first": FIGURE,
        "objective_last": FIGURE, "held_out": Table({"version": COUNT, "objective": FIGURE, "bits_per_byte": FIGURE}),
        "best": Table({"version": COUNT, "objective": FIGURE}), "evaluations_since": COUNT, "skipped": COUNT,
        "stopped": TEXT, "bad_batches": COUNT, "overflows": COUNT, "checksum_s": NUMBER, "unevaluated": FLAG,
    },
    needed=("steps",),
)  # fmt: skip

DATA = Table({"digest": TEXT, "samples": COUNT}, needed=("digest", "samples"))

LEDGER = Table(
    {
        **dict.fromkeys(("version", "round", "merged_pieces", "merged_microbatches", "next_piece", "seq"), COUNT),
        "returned": Each(COUNT), "pending": Each(Each(NUMBER)), "waiting_since_s": FIGURE, "order": Each(WORKER),
        "workers": Each(Table({"number": WORKER, "rounds": COUNT, "base": COUNT, "doomed": FLAG}, ("number",))),
    },
    needed=(
        "version", "round", "merged_pieces", "merged_microbatches", "next_piece", "seq", "returned", "pending",
        "waiting_since_s", "order", "workers",
    ),
)  # fmt: skip

_FILE = Table({"bytes": COUNT, "sha256": TEXT}, needed=("bytes", "sha256"))

MANIFEST = Table(
    {
        "version": COUNT, "digest": TEXT, "fingerprint": TEXT, "files": All(_FILE),
        "meta": Table(
            {
                "progress": PROGRESS, "data": DATA, "run": TEXT, "ledger": LEDGER, "cut": whole(1, 1 << 24),
                "steps": whole(1), "unlooked": FLAG,
            }
        ),
    },
    needed=("format", "version", "digest", "fingerprint", "meta", "files"),
)  # fmt: skip

BEST = Table({"version": COUNT, "objective": NUMBER}, needed=("version", "objective"))

_KEPT = ("version", "model", "training")

WATCH = Table(
    {
        "past": Each(NUMBER), "rollbacks": COUNT, "quiet": NUMBER, "bad": COUNT, "turns": All(Each(NUMBER)),
        "kept": Maybe(Table({"version": COUNT, "model": ANY_TABLE, "training": ANY_TABLE}, _KEPT)),
    },
    needed=("past", "kept", "rollbacks", "quiet"),
)  # fmt: skip

SCALER = Table({"scale": NUMBER, "good": COUNT}, needed=("scale", "good"))

RESULT = Table({"versions": COUNT, "steps": COUNT, "digest": Maybe(TEXT)})

ABOUT = Table(
    {"kind": one_of("training", "simulation"), "import_paths": Each(TEXT), "id": TEXT, "launch": TEXT},
    needed=("kind", "import_paths", "id"),
)
