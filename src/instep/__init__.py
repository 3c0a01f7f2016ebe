"""Instep trains one PyTorch model with many workers, with one result, bit for bit.

>>> import instep
>>> recipe = instep.Recipe(model=..., objective=..., data=..., optimizer=...)
>>> run = instep.train(recipe, team=instep.Team(workers=2))
>>> run.digest, run.objective, run.path
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from instep import errors, gradient_checkpointing, models, objectives, rules
    from instep.components import Component
    from instep.data import Data
    from instep.engines.alone import replay, replay_under, simulate
    from instep.engines.launch import Monitor, Run, train
    from instep.engines.request import Cluster
    from instep.errors import InstepError
    from instep.objectives import objective
    from instep.recipe import Recipe, Team
    from instep.record.monitors import Console
    from instep.record.tensorboard import TensorBoard
    from instep.rules import UpdateRule
    from instep.schedule import Schedule
    from instep.watch import Watch

_PUBLIC = {
    "Cluster": "instep.engines.request",
    "Component": "instep.components",
    "Console": "instep.record.monitors",
    "Data": "instep.data",
    "InstepError": "instep.errors",
    "Monitor": "instep.engines.launch",
    "Recipe": "instep.recipe",
    "Run": "instep.engines.launch",
    "Schedule": "instep.schedule",
    "Team": "instep.recipe",
    "TensorBoard": "instep.record.tensorboard",
    "UpdateRule": "instep.rules",
    "Watch": "instep.watch",
    "objective": "instep.objectives",
    "replay": "instep.engines.alone",
    "replay_under": "instep.engines.alone",
    "simulate": "instep.engines.alone",
    "train": "instep.engines.launch",
}
_MODULES = ("errors", "gradient_checkpointing", "models", "objectives", "rules")

__all__ = [
    "Cluster",
    "Component",
    "Console",
    "Data",
    "InstepError",
    "Monitor",
    "Recipe",
    "Run",
    "Schedule",
    "Team",
    "TensorBoard",
    "UpdateRule",
    "Watch",
    "errors",
    "gradient_checkpointing",
    "models",
    "objective",
    "objectives",
    "replay",
    "replay_under",
    "rules",
    "simulate",
    "train",
]


def __getattr__(name: str) -> Any:
    """Imports public names when they are first used, so that ``import instep`` costs nothing."""
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    if name in _MODULES:
        return import_module(f"instep.{name}")
    raise AttributeError(f"module 'instep' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
