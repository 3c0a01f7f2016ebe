"""The page: one HTML file that needs nothing else, neither network nor a server."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

from instep.errors import ResourceError
from instep.monitors.progress import duration, nbytes
from instep.record.files import write_atomically
from instep.report import figures
from instep.report.comparison import Comparison, RuleRuns, differences, doubts, facts, figure, verdict
from instep.report.history import History
from instep.report.samples import samples


def check_extra() -> None:
    """Raises ResourceError where what the page is made with is not there."""
    try:
        import jinja2  # noqa: F401
        import plotly  # noqa: F401
    except ImportError:
        raise ResourceError(
            "the page is drawn by plotly, which is in the report extra: pip install 'instep[report]'; --json needs "
            "nothing more."
        ) from None


def write(found: Comparison, path: Path) -> None:
    """Writes the page into `path`, which is replaced. Raises ResourceError."""
    check_extra()
    text = html(found)
    try:
        write_atomically(path, text.encode())
    except OSError as error:
        raise ResourceError(
            f"the page {path} cannot be written: {error.strerror}; choose another with --out."
        ) from error


def html(found: Comparison) -> str:
    """The page as text."""
    import jinja2
    from plotly.offline import get_plotlyjs

    files = resources.files("instep.report")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((files / "page.html").read_text("utf-8"))
    plotly = get_plotlyjs()
    assert "</script" not in plotly, "it would end where it stands in the page"
    drawn = json.dumps(figures.data(found), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    runs = found.runs
    return template.render(
        rules=len({group.runs[0].rule for group in found.groups}),
        title=" and ".join(dict.fromkeys(run.name for run in runs)),
        facts=facts(found), verdict=verdict(found), doubts=doubts(found), target=_target(found),
        columns=columns(found), rows=rows(found), strips=[_caption(group) for group in found.groups],
        stale=any(any(run.staleness) for run in runs),
        memory=any(run.planned for run in runs), curves=found.target is not None,
        samples=samples(found), differences=differences(runs), runs=[_run(run) for run in runs],
        style=(files / "page.css").read_text("utf-8"), script=(files / "page.js").read_text("utf-8"), plotly=plotly,
        data=drawn,
    )  # fmt: skip


def _target(found: Comparison) -> str:
    if "seconds" not in columns(found):
        return ""
    if found.chosen:
        return f"Target: a {found.what} of {found.target:.6g}, as asked for."
    return (
        f"Target: a {found.what} of {found.target:.6g}, the highest that a rule ended with, of those within "
        f"10 % of the best; --target sets another."
    )


def columns(found: Comparison) -> dict[str, str]:
    """The table's columns, those that say something here: a key of `rows`, and its head."""
    timed = found.target is not None and (len(found.groups) > 1 or found.chosen)
    heads = {
        "seconds": "time to target" if timed else "", "bytes": "bytes to target" if timed else "",
        "final": f"final {found.final_what}" if found.target is not None else "", "total": "time in all",
        "sent": "bytes in all", "updates": "updates", "idle": "idle",
        "peak": "peak of activations" if any(run.planned for run in found.runs) else "",
    }  # fmt: skip
    return {key: head for key, head in heads.items() if head}


def rows(found: Comparison) -> list[dict[str, Any]]:
    """The table: a rule a row, texts; `best` names the columns in which it is the best of several."""
    groups = found.groups
    values = [
        {
            "seconds": _mean(group, "seconds"), "bytes": _mean(group, "bytes"),
            "final": group.final.mean if group.final else None, "idle": group.idle.mean if group.idle else None,
        }
        for group in groups
    ]  # fmt: skip
    best = {
        name: min((value for row in values if (value := row[name]) is not None), default=None)
        for name in ("seconds", "bytes", "final", "idle")
    }
    made = []
    for group, row in zip(groups, values, strict=True):
        idle, peak = row["idle"], group.peak_bytes
        cells = {
            "seconds": _reached(group, duration, "seconds"), "bytes": _reached(group, _size, "bytes"),
            "final": figure(group.final), "updates": f"{group.updates:,}",
            "total": duration(statistics.fmean(run.seconds for run in group.runs)),
            "sent": _size(statistics.fmean(run.bytes for run in group.runs)),
            "idle": "none" if idle is None else f"{100 * idle:.0f} %", "peak": nbytes(peak) if peak else "no plan",
        }  # fmt: skip
        winners = [name for name, value in row.items() if len(groups) > 1 and value is not None and value == best[name]]
        made.append({"label": group.label, "best": winners, **cells})
    return made


def _size(count: float) -> str:
    return nbytes(round(count))


def _mean(group: RuleRuns, what: str) -> float | None:
    found = group.to_target(what)
    return found.mean if found else None


def _reached(group: RuleRuns, text: Callable[[float], str], what: str) -> str:
    found = group.to_target(what)
    if found is None:
        return "never" if not group.reached else f"{group.reached} of {len(group.runs)} did"
    return figure(found, text)


def _caption(group: RuleRuns) -> dict[str, Any]:
    run = group.runs[0]
    shown = f"{len(run.strips)} of {run.workers:,} workers" if run.workers > len(run.strips) else ""
    seed = f"seed {run.recipe.get('seed')}" if len(group.runs) > 1 else ""
    return {"label": group.label, "rows": len(run.strips), "note": ", ".join(filter(None, [seed, shown]))}


def _run(run: History) -> dict[str, Any]:
    versions = ", ".join(f"{name} {version}" for name, version in run.start["libraries"].items())
    return {
        "path": str(run.path), "name": run.path.name or str(run.path), "rule": run.rule,
        "seed": run.recipe.get("seed"), "workers": run.workers, "device": run.start["team"].get("device", ""),
        "clock": "virtual" if run.virtual else "wall", "hosts": ", ".join(run.hosts) or "none",
        "hardware": run.hardware, "versions": versions,
        "state": run.state, "digest": (run.result or {}).get("digest") or "none", "problems": run.problems,
    }  # fmt: skip
