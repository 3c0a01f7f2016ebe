"""A comparison as one JSON document. docs/report.md has its schema; fields are added, never renamed."""

from __future__ import annotations

from typing import Any

from instep.report.comparison import Comparison, Range, RuleRuns, differences, doubts, facts, verdict
from instep.report.history import History

SCHEMA = 1


def document(found: Comparison) -> dict[str, Any]:
    """What the page says, as plain values."""
    runs = found.runs
    return {
        "schema": SCHEMA,
        "facts": facts(found),
        "verdict": verdict(found),
        "doubts": doubts(found),
        "target": None
        if found.target is None
        else {"objective": found.target, "of": found.what, "chosen": found.chosen},
        "final_of": found.final_what,
        "rules": [_rule(group) for group in found.groups],
        "differences": [
            {"field": name, "values": dict(zip((str(run.path) for run in runs), values, strict=True))}
            for name, values in differences(runs)
        ],
    }


def _rule(group: RuleRuns) -> dict[str, Any]:
    return {
        "label": group.label,
        "rule": group.runs[0].rule,
        "seeds": [run.recipe.get("seed") for run in group.runs],
        "reached": group.reached,
        "time_to_target_s": _range(group.to_target("seconds")),
        "bytes_to_target": _range(group.to_target("bytes")),
        "items_to_target": _range(group.to_target("items")),
        "final": _range(group.final),
        "idle_share": _range(group.idle),
        "seconds": _range(Range.of([run.seconds for run in group.runs])),
        "updates": group.updates,
        "peak_bytes": group.peak_bytes,
        "runs": [_run(run) for run in group.runs],
    }


def _range(found: Range | None) -> dict[str, float] | None:
    return None if found is None else vars(found)


def _run(run: History) -> dict[str, Any]:
    return {
        "path": str(run.path),
        "id": run.start.get("run"),
        "recipe": run.name,
        "seed": run.recipe.get("seed"),
        "workers": run.workers,
        "clock": run.start["clock"],
        "hardware": run.hardware or None,
        "state": run.state,
        "digest": (run.result or {}).get("digest"),
        "updates": run.updates,
        "items": run.curve.items[-1] if len(run.curve) else 0,
        "seconds": run.seconds,
        "bytes": run.bytes,
        "idle_share": run.idle_share,
        "staleness": {str(versions): count for versions, count in sorted(run.staleness.items())},
        "dropped": run.dropped,
        "sessions": run.sessions,
        "restarts": run.restarts,
        "held_out": [vars(point) for point in run.held_out],
        "shown": [{**vars(each), "files": list(each.files), "figures": dict(each.figures)} for each in run.shown],
        "problems": run.problems,
    }
