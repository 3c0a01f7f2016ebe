"""What trackers plot of an event: numbers by name, the same names in each of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any


def scalars(event: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a `merged`, an `evaluated` or a `sampled` event by name; of other kinds none."""
    kinds = {"merged": _merged, "evaluated": _evaluated, "sampled": _sampled}
    found = kinds[event["kind"]](event) if event["kind"] in kinds else ()
    return {name: value for name, value in found if value is not None and math.isfinite(value)}


def _merged(event: Mapping[str, Any]) -> Iterator[tuple[str, float | None]]:
    yield f"objective/train{_of(event.get('turn'))}", event["objective"]
    terms = event.get("terms", {})
    if len(terms) > 1:
        for name, value in terms.items():
            yield f"terms/{name}", value
    yield "optimizer/learning_rate", event.get("lr")
    yield "optimizer/gradient_norm", event.get("grad_norm")
    yield "optimizer/loss_scale", event.get("loss_scale")
    staleness = event.get("staleness") or [0]
    if any(staleness):
        yield "rule/staleness", max(staleness)


def _of(turn: str | None) -> str:
    return f"/{turn}" if turn else ""


def _evaluated(event: Mapping[str, Any]) -> Iterator[tuple[str, float | None]]:
    yield "objective/held_out", event["objective"]
    for turn, value in (event.get("turns") or {}).items():
        yield f"objective/held_out{_of(turn)}", value
    if event.get("bits_per_byte") is not None:
        yield "objective/bits_per_byte", event["bits_per_byte"]
    for name, value in (event.get("gathered") or {}).items():
        yield f"held_out/{name}", value
    for decay, told in (event.get("ema") or {}).items():
        yield f"objective/held_out_ema_{decay}", told.get("objective")


def _sampled(event: Mapping[str, Any]) -> Iterator[tuple[str, float | None]]:
    for name, value in event["figures"].items():
        if isinstance(value, int | float):
            yield f"artifacts/{name}", value
