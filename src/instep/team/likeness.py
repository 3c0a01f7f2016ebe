"""Whether a run was made by what is here: other libraries and processors give other bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from instep.team.outcome import libraries
from instep.team.processor import processor

_OF_BITS = ("torch", "numpy", "instep")


def made_otherwise(started: Mapping[str, Any]) -> str:
    """A clause on what made the session that this ``run_started`` begins and is not here; "" where all is the same."""
    there, here = started["libraries"], libraries()
    parts = [
        f"{name} {there[name]} (here {here[name]})" for name in _OF_BITS if there.get(name, here[name]) != here[name]
    ]
    own = started.get("processor", "")
    if own and own != processor():
        parts.append(f"a processor {own} (here {processor()})")
    return " and ".join(parts)
