"""Instep trains one PyTorch model with many workers, with one result, bit for bit.

>>> import instep
>>> recipe = instep.Recipe(model=..., objective=..., data=..., optimizer=...)
>>> run = instep.train(recipe, team=instep.Team(workers=2))
>>> run.digest, run.objective, run.path
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from instep import errors, gradient_checkpointing, models, objectives, rules
    from instep.apart.diffing import diff
    from instep.api import replay, replay_under, simulate, train, verify
    from instep.components import Component
    from instep.data import Data
    from instep.equivalences.checking import check
    from instep.errors import InstepError
    from instep.loss_scale import LossScale
    from instep.monitors import Monitor
    from instep.monitors.console import Console
    from instep.monitors.tensorboard import TensorBoard
    from instep.monitors.trackers import MLflow, Trackio, WandB
    from instep.objectives import objective
    from instep.offline.cluster import Cluster
    from instep.recipe import Recipe, Team
    from instep.rules import UpdateRule
    from instep.run import Run
    from instep.schedule import Schedule
    from instep.watch import Watch

_PUBLIC = {
    "Cluster": "instep.offline.cluster",
    "Component": "instep.components",
    "Console": "instep.monitors.console",
    "Data": "instep.data",
    "InstepError": "instep.errors",
    "LossScale": "instep.loss_scale",
    "MLflow": "instep.monitors.trackers",
    "Monitor": "instep.monitors",
    "Recipe": "instep.recipe",
    "Run": "instep.run",
    "Schedule": "instep.schedule",
    "Team": "instep.recipe",
    "TensorBoard": "instep.monitors.tensorboard",
    "Trackio": "instep.monitors.trackers",
    "UpdateRule": "instep.rules",
    "WandB": "instep.monitors.trackers",
    "Watch": "instep.watch",
    "check": "instep.equivalences.checking",
    "diff": "instep.apart.diffing",
    "objective": "instep.objectives",
    "replay": "instep.api",
    "replay_under": "instep.api",
    "simulate": "instep.api",
    "train": "instep.api",
    "verify": "instep.api",
}
_MODULES = ("errors", "gradient_checkpointing", "models", "objectives", "rules")

__all__ = [
    "Cluster",
    "Component",
    "Console",
    "Data",
    "InstepError",
    "LossScale",
    "MLflow",
    "Monitor",
    "Recipe",
    "Run",
    "Schedule",
    "Team",
    "TensorBoard",
    "Trackio",
    "UpdateRule",
    "WandB",
    "Watch",
    "check",
    "diff",
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
    "verify",
]


def _tell_of_errors() -> None:
    """Has the other agents of a run learn of an exception that ends this program before it trains."""
    before = sys.excepthook

    def hook(kind: Any, error: BaseException, trace: Any) -> None:
        before(kind, error, trace)
        import_module("instep.team.telling").tell_of_what_ended(error)

    sys.excepthook = hook


_LAUNCHERS = ("TORCHELASTIC_RUN_ID", "SLURM_STEP_ID", "SLURM_STEPID")
if "INSTEP_RUN" not in os.environ and any(name in os.environ for name in _LAUNCHERS):  # and no process of Instep's own
    _tell_of_errors()


def __getattr__(name: str) -> Any:
    """Imports public names when they are first used, so that ``import instep`` costs nothing."""
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    if name in _MODULES:
        return import_module(f"instep.{name}")
    raise AttributeError(f"module 'instep' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
