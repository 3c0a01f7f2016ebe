"""Metrics that are no sums, such as AUROC: computed by one process from outputs of the whole held-out set.

An objective that has ``gathers``, names of metrics with what computes each, has ``outputs(model, batch)`` too: a
mapping from names to tensors. One process gets those of all held-out batches, in the order of the samples, and calls
each metric with them, so there is one value, for any team.
"""

from __future__ import annotations

import copy
import functools
import inspect
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from instep.errors import ObjectiveError, shown
from instep.objectives.protocol import attribute

Outputs = Mapping[str, Tensor]


def gathers_of(objective: Any) -> dict[str, Any]:
    """The metrics of `objective` by name, none for most. Raises ObjectiveError where they are not as they should be."""
    given = attribute(objective, "gathers") or {}
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
        raise ObjectiveError(
            f"the objective's gathers are of type {type(given).__name__}; give a mapping from names to metrics, which "
            f"are objects with 'update' and 'compute', or functions of the outputs."
        )
    for name, metric in given.items():
        if not (_accumulates(metric) or callable(metric)):
            raise ObjectiveError(
                f"the metric {shown(name)} is of type {type(metric).__name__}; give an object with 'update' and "
                f"'compute', what makes one, or a function of the outputs."
            )
    if given and not callable(attribute(objective, "outputs")):
        raise ObjectiveError(
            "the objective has 'gathers' and no 'outputs'; give it outputs(model, batch), a mapping from the names "
            "that its metrics take to tensors, such as {'preds': ..., 'target': ...}."
        )
    return dict(given)


def outputs_of(objective: Any, model: nn.Module, batch: Any) -> dict[str, Tensor]:
    """What its metrics need of one held-out batch, on the CPU. Raises ObjectiveError."""
    answer = attribute(objective, "outputs")(model, batch)
    if not isinstance(answer, Mapping) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in answer.items()
    ):
        raise ObjectiveError(
            f"the objective's outputs are of type {type(answer).__name__}; give a mapping from names to tensors, such "
            f"as {{'preds': ..., 'target': ...}}."
        )
    return {name: value.detach().cpu() for name, value in answer.items()}


def check_gathers(objective: Any, model: nn.Module, batch: Any) -> None:
    """Raises ObjectiveError where a metric does not take the outputs of `batch`."""
    outputs = outputs_of(objective, model, batch)
    for name, metric in gathers_of(objective).items():
        made = _made(metric)
        target = made.update if _accumulates(made) else made
        arguments = _arguments(name, target, outputs)
        if _accumulates(made):
            try:
                target(**arguments)
            except Exception as error:
                raise ObjectiveError(
                    f"the metric {shown(name)} refused the outputs of a batch ({type(error).__name__}: {error}); look "
                    f"at their shapes and types."
                ) from error


def measure(objective: Any, batches: Sequence[Outputs]) -> tuple[dict[str, float], list[str]]:
    """The metrics over all `batches`, which are in the order of the samples, and a sentence on each that failed.

    A metric with 'update' gets one batch after the other; a function the whole, put together along dimension 0. Each
    gets by keyword those outputs that it takes by name. One of several numbers gives "name.key" or "name.place".
    """
    values: dict[str, float] = {}
    doubts: list[str] = []
    for name, metric in gathers_of(objective).items():
        try:
            with torch.no_grad():
                values |= _flat(name, _value(name, metric, batches))
        except Exception as error:  # it only shows something: the run goes on
            reason = str(error) if isinstance(error, ObjectiveError) else f"{type(error).__name__}: {error}"
            doubts.append(f"the metric {shown(name)} could not be computed on the held-out data: {reason}")
    return values, doubts


def _value(name: str, metric: Any, batches: Sequence[Outputs]) -> Any:
    made = _made(metric)
    if not _accumulates(made):
        whole = {key: torch.cat([outputs[key] for outputs in batches]) for key in batches[0]}
        return made(**_arguments(name, made, whole))
    for outputs in batches:
        made.update(**_arguments(name, made.update, outputs))
    return made.compute()


def _made(metric: Any) -> Any:
    """A metric that has seen nothing yet."""
    makes = metric.func if isinstance(metric, functools.partial) else metric
    if inspect.isclass(makes):
        return metric()
    return copy.deepcopy(metric) if _accumulates(metric) else metric


def _accumulates(metric: Any) -> bool:
    methods = (getattr(metric, "update", None), getattr(metric, "compute", None))
    return not inspect.isclass(metric) and all(map(callable, methods))


def _arguments(name: str, target: Callable[..., Any], outputs: Outputs) -> Outputs:
    """Those of `outputs` that `target` takes by name. Raises ObjectiveError where it needs others."""
    try:
        parameters = inspect.signature(target).parameters
    except (TypeError, ValueError):  # some C callables have none
        return outputs
    kinds = [parameter.kind for parameter in parameters.values()]
    if inspect.Parameter.VAR_KEYWORD in kinds:
        return outputs
    needed = {
        key
        for key, parameter in parameters.items()
        if parameter.default is inspect.Parameter.empty and parameter.kind is not inspect.Parameter.VAR_POSITIONAL
    }
    absent = sorted(needed - outputs.keys())
    if absent:
        raise ObjectiveError(
            f"the metric {shown(name)} needs {', '.join(map(repr, absent))}, and the objective's outputs are "
            f"{', '.join(map(repr, outputs))}; name the outputs as the metric does."
        )
    return {key: value for key, value in outputs.items() if key in parameters}


def _flat(name: str, value: Any) -> dict[str, float]:
    if hasattr(value, "tolist"):  # of torch or numpy
        value = value.tolist()
    if isinstance(value, numbers.Real):
        return {name: float(value)}
    if isinstance(value, Mapping):
        parts = value.items()
    elif isinstance(value, (list, tuple)):
        parts = enumerate(value)  # type: ignore[assignment]
    else:
        raise ObjectiveError(f"it gave a {type(value).__name__}; it must give a number, or several.")
    found: dict[str, float] = {}
    for key, part in parts:
        found |= _flat(f"{name}.{key}", part)
    return found
