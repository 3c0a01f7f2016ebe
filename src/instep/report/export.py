"""A run for other tools: a trace of what each worker did, which Perfetto and chrome://tracing open, and tables of its
updates, CSV or Parquet.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from instep.errors import ResourceError
from instep.record import tape
from instep.record.files import write_atomically
from instep.record.folder import RunFolder
from instep.report.history import History, Strip
from instep.report.reading import events_of, no_event_yet, read

FORMATS = {"perfetto": ".json", "csv": ".csv", "parquet": ".parquet"}
"""What a run is written as, and how the file's name ends."""

FIRST_COLUMNS = (
    "version", "step", "t_s", "items", "objective", "held_out", "lr", "grad_norm", "train_s", "contributions",
    "staleness_mean", "staleness_max",
)  # fmt: skip
"""Of the table of updates; terms follow, as ``terms.NAME`` and ``held_out_terms.NAME``, what was gathered, averages."""


def export(run: Path, form: str, path: Path) -> None:
    """Writes the run in the folder `run` into the file `path`, which is replaced; `form` is one of `FORMATS`.

    Raises RecordError where there is no run, or nothing on its tape yet, and ResourceError where a package is missing
    or the disk refuses.
    """
    folder = RunFolder.open(run)
    if next(iter(events_of(folder)), None) is None:
        raise no_event_yet(folder)
    if form == "perfetto":
        content = "".join(_trace(read(run, strips=None))).encode()
    elif form == "csv":
        content = _csv(updates(run)).encode()
    else:
        content = _parquet(updates(run))
    try:
        write_atomically(path, content)
    except OSError as error:
        raise ResourceError(f"{path} cannot be written: {error.strerror}; choose another with --out.") from error


def updates(run: Path) -> list[dict[str, Any]]:
    """A row for each update that counts, after restarts, by rising version; a value that there is not is None.

    t_s, train_s: seconds of its session, and in steps so far. items: of that update alone. held_out: of an evaluation
    of that version. The weights that a run starts from have no row.
    """
    merged: list[Mapping[str, Any]] = []
    held_out: dict[int, Mapping[str, Any]] = {}
    for event in tape.read(RunFolder.open(run).tape_path):
        if event["kind"] in ("run_started", "merged"):
            merged.append({key: event[key] for key in _KEPT if key in event})
            if event["kind"] == "run_started":
                held_out = {version: told for version, told in held_out.items() if version <= event["version"]}
        elif event["kind"] == "evaluated":
            held_out[event["version"]] = event
    rows = [_row(event, held_out.get(event["version"], {})) for event in tape.latest(merged)]
    names = dict.fromkeys(name for row in rows for name in row)
    return [{name: row.get(name) for name in names} for row in rows]


_KEPT = (
    "kind", "t_s", "version", "step", "items", "objective", "lr", "grad_norm", "train_s", "terms", "staleness",
    "contributions", "turn",
)  # fmt: skip


def _row(event: Mapping[str, Any], evaluated: Mapping[str, Any]) -> dict[str, Any]:
    staleness = event["staleness"]
    items = event.get("items")
    found = {
        **{name: event.get(name) for name in FIRST_COLUMNS},
        "items": sum(each.get("items", 0) for each in event["contributions"]) if items is None else items,
        "held_out": evaluated.get("objective"), "contributions": len(event["contributions"]),
        "staleness_mean": sum(staleness) / len(staleness) if staleness else None,
        "staleness_max": max(staleness, default=None), **({"turn": event["turn"]} if "turn" in event else {}),
    }  # fmt: skip
    for prefix, table in (
        ("terms", event.get("terms")), ("held_out_terms", evaluated.get("terms")),
        ("gathered", evaluated.get("gathered")),
        ("held_out_ema", {decay: told.get("objective") for decay, told in (evaluated.get("ema") or {}).items()}),
    ):  # fmt: skip
        found |= {f"{prefix}.{name}": value for name, value in (table or {}).items()}
    return found


def _csv(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0] if rows else FIRST_COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _parquet(rows: list[dict[str, Any]]) -> bytes:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ResourceError(
            "Parquet is written by pyarrow, which is in the parquet extra: pip install 'instep[parquet]'."
        ) from None
    whole = {"version", "step", "items", "contributions", "staleness_max"}
    names = list(rows[0]) if rows else list(FIRST_COLUMNS)
    types = dict.fromkeys(whole, pyarrow.int64()) | {"turn": pyarrow.string()}
    kinds = [(name, types.get(name, pyarrow.float64())) for name in names]
    columns = {name: [row[name] for row in rows] for name in names}
    table = pyarrow.table(columns, schema=pyarrow.schema(kinds))
    out = io.BytesIO()
    parquet.write_table(table, out)
    return out.getvalue()


def _trace(run: History) -> Iterator[str]:
    """The trace event format of Chrome: JSON, times in microseconds."""
    yield '{"displayTimeUnit":"ms","traceEvents":[\n'
    yield ",\n".join(json.dumps(event, separators=(",", ":"), allow_nan=False) for event in _trace_events(run))
    yield "\n]}\n"


def _trace_events(run: History) -> Iterator[dict[str, Any]]:
    title = f"{run.name}, {run.rule}" + (" (virtual clock)" if run.virtual else "")
    yield {"ph": "M", "name": "process_name", "pid": 1, "args": {"name": title}}
    for worker, strip in run.strips.items():
        thread = {"pid": 1, "tid": worker + 1}
        yield {"ph": "M", "name": "thread_name", **thread, "args": {"name": f"worker {worker}"}}
        yield {"ph": "M", "name": "thread_sort_index", **thread, "args": {"sort_index": worker}}
        for name, begin, end, version in sorted(_slices(strip), key=lambda each: (each[1], each[2])):
            version_args = {} if version is None else {"args": {"version": version}}
            yield {"ph": "X", "name": name, **thread, "ts": _us(begin), "dur": _us(end) - _us(begin), **version_args}
        for at, what in strip.events:
            yield {"ph": "i", "s": "t", "name": what, **thread, "ts": _us(at)}
    curve = run.curve
    for place in range(len(curve)):
        at, objective = _us(curve.seconds[place]), curve.objective[place]
        if math.isfinite(objective):
            args = {curve.turn[place] or "training": objective}
            yield {"ph": "C", "name": "objective", "pid": 1, "ts": at, "args": args}
        yield {"ph": "C", "name": "version", "pid": 1, "ts": at, "args": {"version": curve.version[place]}}
    for point in run.held_out:
        values = {"held out": point.objective}
        yield {"ph": "C", "name": "held-out objective", "pid": 1, "ts": _us(point.seconds), "args": values}


def _slices(strip: Strip) -> Iterator[tuple[str, float, float, int | None]]:
    """What a worker did, cut so that no two overlap: (name, begin, end, version)."""
    busy: list[tuple[float, float, str, int]] = []
    for name, spans, versions in (
        ("computing", strip.computing, strip.computing_version),
        ("communicating", strip.communicating, strip.communicating_version),
        ("evaluating", strip.evaluating, strip.evaluating_version),
    ):
        busy += [(begin, end, name, version) for (begin, end), version in zip(_pairs(spans), versions, strict=True)]
    busy.sort()
    last = -math.inf
    cuts: list[tuple[float, float]] = []
    for begin, end, name, version in busy:
        begin = max(begin, last)  # noqa: PLW2901  # a neighbour's, by another clock
        if end > begin:
            yield name, begin, end, version
            cuts.append((begin, end))
            last = end
    for since, until in _pairs(strip.there):
        inside = [(max(begin, since), min(end, until)) for begin, end in cuts if end > since and begin < until]
        for (_, begin), (end, _) in pairwise([(since, since), *inside, (until, until)]):
            if end > begin:
                yield "waiting", begin, end, None


def _pairs(spans: Iterable[float]) -> Iterator[tuple[float, float]]:
    numbers = iter(spans)
    return zip(numbers, numbers, strict=True)


def _us(seconds: float) -> int:
    return round(1e6 * seconds)
