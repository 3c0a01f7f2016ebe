"""What the page draws, as plain tables: curves, workers' time, staleness, memory. Columns of numbers go as typed arrays
in base64, which plotly reads.
"""

from __future__ import annotations

import base64
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from instep.report.comparison import WINDOWS, Comparison, RuleRuns
from instep.report.history import History, Point, Strip, windows

_FEW, _CELLS, _CELLS_OF_MANY = 4, 480, 300
"""So many runs are drawn in the finer cells; more of them in coarser ones, so that the page stays small."""

_MOST_BARS = 60
"""Of a histogram; of more values several share a bar."""

_MOST_EVENTS = 200
"""Joins and losses that are marked."""

STATES = ("computing", "communicating", "evaluating", "waiting")


def data(found: Comparison) -> dict[str, Any]:
    """All that the page draws, as JSON holds it."""
    cells = _CELLS if len(found.runs) <= _FEW else _CELLS_OF_MANY
    return {
        "labels": [group.label for group in found.groups],
        "target": found.target,
        "what": found.what,
        "curves": [
            curve for place, group in enumerate(found.groups) for run in group.runs for curve in _curves(place, run)
        ],
        "strips": [_strips(group.runs[0], cells) for group in found.groups],
        "longest_s": max(group.runs[0].seconds for group in found.groups),
        "staleness": [_staleness(group) for group in found.groups],
        "memory": [
            _memory(place, run) for place, group in enumerate(found.groups) for run in group.runs if run.planned
        ],
    }


def _typed(values: ArrayLike, kind: str) -> dict[str, Any]:
    numbers = np.ascontiguousarray(values, dtype=np.dtype(kind).newbyteorder("<"))
    typed = {"dtype": kind, "bdata": base64.b64encode(numbers.tobytes()).decode()}
    return {**typed, "shape": ", ".join(map(str, numbers.shape))} if numbers.ndim > 1 else typed


def _curves(place: int, run: History) -> Iterator[dict[str, Any]]:
    """One, or that of each objective where they take turns."""
    turns = [turn for turn in dict.fromkeys(run.curve.turn) if turn]
    for turn in turns or [""]:
        yield {
            "group": place,
            "seed": run.recipe.get("seed"),
            "turn": turn,
            "training": _points(windows(run.curve, WINDOWS, turn or None)),
            "held_out": _points(run.held_out_by_turn.get(turn, run.held_out)),
        }


def _points(points: Sequence[Point]) -> dict[str, Any] | None:
    if not points:
        return None
    columns = ("items", "seconds", "bytes", "objective", "version")
    return {name: _typed([getattr(point, name) for point in points], "f8") for name in columns}


def _strips(run: History, cells: int) -> dict[str, Any]:
    """One worker's time a row, in cells of equal length. A state has the version at work in the cells that are mostly
    its own, and nothing in the others.
    """
    edges = np.linspace(0.0, max(run.seconds, 1e-9), cells + 1)
    rows = [_cells(strip, edges) for strip in run.strips.values()]
    states = np.array([state for state, _ in rows]).reshape(len(rows), cells)
    versions = np.array([version for _, version in rows], dtype="f4").reshape(len(rows), cells)
    events = [(row, at, what) for row, strip in enumerate(run.strips.values()) for at, what in strip.events]
    return {
        "workers": [str(worker) for worker in run.strips],
        "of": run.workers,
        "cell_s": float(edges[1]),
        "states": [_typed(np.where(states == state, versions, np.nan), "f4") for state in range(len(STATES))],
        "events": events[:_MOST_EVENTS],
    }


def _cells(strip: Strip, edges: NDArray[np.float64]) -> tuple[NDArray[np.int8], NDArray[np.float64]]:
    """By cell: the place in `STATES` of what the worker mostly did, -1 where it was not there; and the version."""
    cell_s = edges[1]
    present = _covered(strip.there, edges)
    busy = [_covered(spans, edges) for spans in (strip.computing, strip.communicating, strip.evaluating)]
    waiting = np.maximum(present - sum(busy), 0)
    state = np.argmax([*busy, waiting], axis=0).astype(np.int8)
    state[np.maximum(present, busy[0]) < cell_s / 2] = -1
    version = _latest(strip.computing, strip.computing_version, edges)
    evaluated = _latest(strip.evaluating, strip.evaluating_version, edges)
    return state, np.where(state == STATES.index("evaluating"), evaluated, version)


def _latest(spans: array[float], versions: array[int], edges: NDArray[np.float64]) -> NDArray[np.float64]:
    """By cell: the version of the last of `spans` that begins before its end, or of the first; 0 without any."""
    if not versions:
        return np.zeros(len(edges) - 1)
    begins = np.frombuffer(spans)[::2]
    order = np.argsort(begins, kind="stable")
    at = np.searchsorted(begins[order], edges[1:], side="left") - 1
    return np.frombuffer(versions, dtype=np.int64)[order][np.clip(at, 0, None)].astype(np.float64)


def _covered(spans: array[float], edges: NDArray[np.float64]) -> NDArray[np.float64]:
    """Seconds of each cell that are in one of `spans`, from, to, from, to, ..., which do not overlap."""
    if not spans:
        return np.zeros(len(edges) - 1)
    begins, ends = np.frombuffer(spans)[::2], np.frombuffer(spans)[1::2]
    order = np.argsort(begins, kind="stable")
    begins, ends = begins[order], np.maximum(ends, begins)[order]
    before = np.concatenate([[0.0], np.cumsum(ends - begins)])  # covered until each begin
    place = np.searchsorted(begins, edges, side="right")
    last = np.clip(place - 1, 0, None)
    inside = np.where(place > 0, np.clip(edges, begins[last], ends[last]) - begins[last], 0.0)
    return np.diff(before[last] + inside)


def _staleness(group: RuleRuns) -> dict[str, Any]:
    """Shares of the merged contributions by staleness, over all runs of a rule; its bound, and where that is from."""
    counts = sum((run.staleness for run in group.runs), start=Counter[int]())
    total = sum(counts.values())
    width = max(counts, default=0) // _MOST_BARS + 1
    shares = [0.0] * (max(counts, default=0) // width + 1)
    for staleness, count in counts.items():
        shares[staleness // width] += count / total
    bound, why = _bound(group.runs[0])
    return {"width": width, "shares": shares, "bound": bound, "why": why}


def _bound(run: History) -> tuple[int | None, str]:
    """Versions that a merged contribution may be behind. With a lead s and updates of one contribution, each other
    worker sends at most its rounds from s before to s after that of the worker, 2 s + 1, while that computes.
    """
    rule = run.made_rule
    if rule is None:
        return None, ""
    if rule.max_staleness is not None:
        return rule.max_staleness, f"the rule's max_staleness is {rule.max_staleness}"
    if rule.max_lead is not None and run.workers > 1 and not run.restarts:
        bound = (run.workers - 1) * (2 * rule.max_lead + 1)
        return bound, f"at most {bound} follow from a lead of {rule.max_lead} with {run.workers} workers"
    return None, "no bound"


def _memory(place: int, run: History) -> dict[str, Any]:
    planned = run.planned
    assert planned is not None
    names = ("budget_bytes", "nothing_recomputed_bytes", "predicted_bytes", "measured_bytes", "extra_time")
    return {"group": place, **{name: planned[name] for name in names}}
