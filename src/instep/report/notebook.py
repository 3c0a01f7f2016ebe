"""A run as a notebook shows it: a table of what it came to and, where matplotlib is there, its curve."""

from __future__ import annotations

import html
import io
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

_STYLE = "text-align:left;padding:1px 1em 1px 0;font-variant-numeric:tabular-nums"
_MOST = 500
"""Points of a curve that are drawn; of more, every so many-th and the last."""


def shown_run(result: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], place: str) -> str:
    """HTML of a run: `result` as in result.json, `rows` of its updates, `place`: where it lies."""
    first, last = result["objective_first"], result["objective_last"]
    told = {
        "recipe": f"{result['recipe']}, {result['rule']}, {result['workers']} worker{'s' * (result['workers'] != 1)}",
        "steps": f"{result['steps']:,}" + (", interrupted" if result["interrupted"] else ""),
        "objective": "" if first is None or last is None else f"{first:.4f} → {last:.4f}",
        "held out": "" if result["held_out"] is None else f"{result['held_out']:.4f}",
        "time": f"{result['wall_s']:,.1f} s",
        "digest": result["digest"],
        "run folder": place,
    }
    cells = "".join(
        f'<tr><th style="{_STYLE}">{name}</th><td style="{_STYLE}">{html.escape(str(value))}</td></tr>'
        for name, value in told.items()
        if value
    )
    return f"<div><table>{cells}</table>{_curve(rows)}</div>"


def _curve(rows: Sequence[Mapping[str, Any]]) -> str:
    """As SVG; nothing without matplotlib or without a curve."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return ""
    train: dict[str, list[tuple[Any, Any]]] = {}
    for row in rows:
        if row["objective"] is not None:
            train.setdefault(row.get("turn") or "training batches", []).append((row["version"], row["objective"]))
    held_out = [(row["version"], row["held_out"]) for row in rows if row["held_out"] is not None]
    if all(len(points) < 2 for points in train.values()):
        return ""
    figure = Figure(figsize=(6, 2.6), layout="constrained")
    axes = figure.add_subplot()
    grey = "#808080"  # is read on light and on dark
    for (label, points), style in zip(train.items(), itertools.cycle(("-", "--", ":", "-.")), strict=False):
        stride = max(1, len(points) // _MOST)
        drawn = [*points[:-1:stride], points[-1]]
        axes.plot(*zip(*drawn, strict=True), color="#4c8dd6", linewidth=1, linestyle=style, label=label)
    if held_out:
        axes.plot(*zip(*held_out, strict=True), color="#e08a3c", marker="o", markersize=3, label="held out")
    axes.set_xlabel("version", color=grey)
    axes.set_ylabel("objective", color=grey)
    axes.tick_params(colors=grey)
    for edge, spine in axes.spines.items():
        spine.set_visible(edge in ("left", "bottom"))
        spine.set_color(grey)
    axes.set_facecolor("none")
    axes.legend(frameon=False, labelcolor=grey)
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    return out.getvalue().partition("<svg")[2].join(("<svg", ""))
