"""Gradient checkpointing by byte budget: what backward keeps and what it computes again, operation by operation.

>>> profile = instep.gradient_checkpointing.profile(model, objective, batch)
>>> plan = instep.gradient_checkpointing.plan(profile, budget_bytes=512 * 2**20)
>>> applied = instep.gradient_checkpointing.apply(model, plan, verify=True)
>>> applied.remove()

It needs nothing else of Instep: the model then trains in anybody's loop, with the same gradients, bit for bit.
Planning imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from instep.gradient_checkpointing.applying import Applied, apply, remove
    from instep.gradient_checkpointing.planning import least_bytes, plan, plans
    from instep.gradient_checkpointing.profiling import measure, profile
    from instep.gradient_checkpointing.structure import Plan, Profile

_PUBLIC = {
    "Applied": "applying",
    "Plan": "structure",
    "Profile": "structure",
    "apply": "applying",
    "least_bytes": "planning",
    "measure": "profiling",
    "plan": "planning",
    "plans": "planning",
    "profile": "profiling",
    "remove": "applying",
}

__all__ = ["Applied", "Plan", "Profile", "apply", "least_bytes", "measure", "plan", "plans", "profile", "remove"]


def __getattr__(name: str) -> Any:
    """Imports public names when they are first used."""
    if name in _PUBLIC:
        return getattr(import_module(f"instep.gradient_checkpointing.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module 'instep.gradient_checkpointing' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
