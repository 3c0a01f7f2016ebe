"""Rules as text, as on the command line: ``diloco:20,outer_lr=0.5``."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, get_args, get_type_hints

from instep.errors import RecipeError, shown
from instep.tables import suggest

Rule = TypeVar("Rule")

_SHORT = {
    "bsp": "synchronous", "ssp": "bounded_staleness", "asp": "asynchronous", "hogwild": "asynchronous",
    "downpour": "asynchronous", "stale": "bounded_staleness", "dc_asgd": "delay_compensated", "localsgd": "local_sgd",
    "fedavg": "local_sgd",
}  # fmt: skip
"""What the field calls some of them, to guess what was meant."""


def read_rule(text: str, rule: type[Rule], presets: Mapping[str, Callable[..., Rule]]) -> Rule:
    """The rule written as ``NAME[:VALUE][,field=value ...]``; NAME is one of `presets`.

    VALUE is the preset's first argument; each field is an argument of the preset or else a field of `rule`.
    ``none`` stands for no bound. Raises RecipeError.
    """
    head, *rest = (part.strip() for part in text.split(","))
    name, colon, value = (word.strip() for word in head.partition(":"))
    if name not in presets:
        meant = _SHORT.get(name.lower().replace("-", "_"), name)
        raise RecipeError(f"{shown(name)} is no update rule{suggest(meant, presets, 'the rules are')}")
    preset = presets[name]
    arguments = inspect.signature(preset).parameters
    given: dict[str, Any] = {}
    if colon:
        if not arguments:
            raise RecipeError(f"rule '{name}' takes no value, and {shown(text)} gives it {shown(value)}.")
        first = next(iter(arguments))
        given[first] = _value(f"{name}:{first}", value, get_type_hints(preset)[first])
    fields = get_type_hints(rule)
    changes: dict[str, Any] = {}
    for part in rest:
        key, equals, value = (word.strip() for word in part.partition("="))
        if not equals:
            raise RecipeError(f"{shown(part)} in the rule {shown(text)} is no 'field=value'.")
        if key in given or key in changes:
            raise RecipeError(f"'{key}' is given twice in the rule {shown(text)}.")
        if key in arguments:
            given[key] = _value(f"{name},{key}", value, get_type_hints(preset)[key])
        elif key in fields:
            changes[key] = _value(f"{name},{key}", value, fields[key])
        else:
            raise RecipeError(
                f"rule '{name}' has no field {shown(key)}{suggest(key, [*arguments, *fields], 'its fields are')}"
            )
    return dataclasses.replace(preset(**given), **changes)  # type: ignore[type-var]


def _value(where: str, text: str, hint: Any) -> Any:
    """`text` as a number or None where `hint` takes one; as it is elsewhere."""
    kinds = get_args(hint) or (hint,)
    if text.lower() == "none" and type(None) in kinds:
        return None
    number = float if float in kinds else int if int in kinds else None
    if number is None:
        return text
    try:
        return number(text)
    except ValueError:
        what = "a number" if number is float else "a whole number"
        bound = ", or none" if type(None) in kinds else ""
        raise RecipeError(f"'{where}' is {shown(text)}; it must be {what}{bound}.") from None
