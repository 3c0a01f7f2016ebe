"""Tables (nested dicts, as TOML gives them) to frozen dataclasses and back, strictly: no key is ignored."""

from __future__ import annotations

import dataclasses
import datetime
import difflib
import math
import os
import types
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from instep.by_pattern import ByPattern
from instep.components import Component
from instep.differences import contents
from instep.errors import ComponentError, RecipeError, cut, shown
from instep.turns import Turns

T = TypeVar("T")

_BEYOND = 1 << 64
"""No whole number of a recipe or team is as large: neither files nor arrays would hold it."""


def from_table(cls: type[T], table: Mapping[str, Any], where: str) -> T:
    """Builds the dataclass `cls` from `table`. `where` prefixes the keys in messages.

    Raises RecipeError for an unknown key (with a suggestion), a missing one, or a value of the wrong type.
    """
    if not isinstance(table, Mapping):
        raise RecipeError(f"'{where}' is {shown(table)}; it must be a table.")
    hints = get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in table:
        if key not in fields:
            raise RecipeError(f"unknown key '{where}.{cut(key)}'{suggest(key, fields)}")
    missing = [
        name
        for name, field in fields.items()
        if name not in table and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise RecipeError(f"'{where}.{missing[0]}' is missing; it has no default.")
    return cls(**{key: _coerced(fields[key], hints[key], value, f"{where}.{key}") for key, value in table.items()})


def to_table(value: Any) -> dict[str, Any]:
    """The dataclass `value` as a nested dict that TOML can hold: None is left out, components become {use, args}."""
    table: dict[str, Any] = {}
    for field in dataclasses.fields(value):
        item = getattr(value, field.name)
        if isinstance(item, Component):
            table[field.name] = _component_table(item)
        elif isinstance(item, ByPattern):
            table[field.name] = [
                {"parameters": _patterns_table(patterns), **_component_table(component)}
                for patterns, component in item.parts
            ]
        elif isinstance(item, Turns):
            table[field.name] = [
                {
                    "name": turn.name, "parameters": _patterns_table(turn.patterns),
                    **({"steps": turn.steps} if turn.steps > 1 else {}), **_component_table(turn.objective),
                }
                for turn in item.parts
            ]  # fmt: skip
        elif dataclasses.is_dataclass(item):
            table[field.name] = to_table(item)
        elif isinstance(item, Mapping):
            table[field.name] = dict(item)
        elif isinstance(item, tuple):
            if item:
                table[field.name] = [to_table(each) if dataclasses.is_dataclass(each) else each for each in item]
        elif item is not None:
            table[field.name] = item
    return table


def added(before: Any, **options: Any) -> Any:
    """A field of a dataclass, as `dataclasses.field`, that tables saved before it was added lack.

    before: what it is for those, as a table holds it; None leaves it out.
    """
    return dataclasses.field(metadata={**options.pop("metadata", {}), "before": before}, **options)


def as_saved(cls: type, table: Mapping[str, Any]) -> dict[str, Any]:
    """`table`, saved by any version, with the fields that it lacks since they were added later."""
    known = dict(table)
    for name, field, inner in _fields(cls):
        if inner is not None and isinstance(table.get(name), list):
            known[name] = [as_saved(inner, each) if isinstance(each, Mapping) else each for each in table[name]]
        elif inner is not None and (name in table or (field.default is not None and field.default != ())):
            if isinstance(table.get(name, {}), Mapping) and (deeper := as_saved(inner, table.get(name, {}))):
                known[name] = deeper
        elif name not in table and field.metadata.get("before") is not None:
            known[name] = field.metadata["before"]
    return known


def as_before(cls: type, table: Mapping[str, Any]) -> dict[str, Any]:
    """`table` without added fields that have the value that those of before stand for: what is equal stays equal."""
    known = dict(table)
    for name, field, inner in _fields(cls):
        if name not in table:
            continue
        if inner is not None and isinstance(table[name], Mapping):
            known[name] = as_before(inner, table[name])
        elif inner is not None and isinstance(table[name], list):
            known[name] = [as_before(inner, each) if isinstance(each, Mapping) else each for each in table[name]]
        elif "before" in field.metadata and table[name] == field.metadata["before"]:
            del known[name]
    return known


def _fields(cls: type) -> list[tuple[str, dataclasses.Field[Any], Any]]:
    """Name, field and, where it is a table of its own or a list of such, its dataclass."""
    hints = get_type_hints(cls)
    return [
        (field.name, field, next(filter(dataclasses.is_dataclass, (hint, *get_args(hint))), None))
        for field, hint in ((field, hints[field.name]) for field in dataclasses.fields(cls))
    ]


def _patterns_table(patterns: tuple[str, ...]) -> str | list[str]:
    return patterns[0] if len(patterns) == 1 else list(patterns)


def _component_table(component: Component) -> dict[str, Any]:
    table: dict[str, Any] = {"use": component.describe()}
    if component.args:
        table["args"] = _plain(component.args)
    if component.address is None and (holds := contents(component.use)):
        table["holds"] = holds
    return table


def _plain(value: Any) -> Any:
    """An argument as TOML can hold it. Two arguments that differ stay different, wherever they have an address."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (datetime.date, datetime.time)):
        raise ComponentError(f"the argument {shown(value)} is of a type that a tape cannot hold; write it as text.")
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if getattr(value, "shape", None) == () and hasattr(value, "item"):  # a scalar of numpy or torch
        return _plain(value.item())
    if value is None:  # TOML has no null, and leaving it out would ask for the callable's own default
        return {"use": "builtins:None"}
    return _component_table(value if isinstance(value, Component) else Component(value))


def coerce(hint: Any, value: Any, where: str, *, python: bool = False) -> Any:
    """`value` as the type `hint`; an int is taken for a float, nothing else is converted. Raises RecipeError.

    `python`: the value comes from a program, so that the message speaks of its types and not of a file's.
    """
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in get_args(hint):
            return None
        plain, *words = (option for option in get_args(hint) if option is not type(None))
        if words and isinstance(value, str):  # or one of a few words
            known = [word for option in words for word in get_args(option)]
            if value in known:
                return value
            listed = ", ".join(map(repr, known))
            raise RecipeError(f"'{where}' is {shown(value)}; it must be {_type_name(plain, python)}, or {listed}.")
        return coerce(plain, value, where, python=python)
    if origin is Literal:
        options = get_args(hint)
        if value not in options:
            listed = ", ".join(map(repr, options))
            raise RecipeError(f"'{where}' is {shown(value)}; it must be one of {listed}.")
        return value
    if hint in (Component, ByPattern, Turns):
        return hint.of(value)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise RecipeError(f"'{where}' is {shown(value)}; it must be a list.")
        return tuple(coerce(get_args(hint)[0], item, where) for item in value)
    if origin is Mapping:
        if not isinstance(value, Mapping):
            raise RecipeError(f"'{where}' is {shown(value)}; it must be a {'dict' if python else 'table'}.")
        return dict(value)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if isinstance(value, hint):
            return value
        if isinstance(value, str) and hasattr(hint, "from_text"):
            return hint.from_text(value)
        if not isinstance(value, Mapping):
            also = " or its text" if hasattr(hint, "from_text") else ""
            wanted = f"give an instep.{hint.__name__}{also}" if python else "it must be a table"
            raise RecipeError(f"'{where}' is {shown(value)}; {wanted}.")
        return from_table(hint, value, where)
    if hint is float and type(value) is int:
        if abs(value) >= _BEYOND:
            raise RecipeError(f"'{where}' is a number of {_digits(value)} digits; write a large number as 1e30.")
        return float(value)
    if type(value) is int and hint is int and abs(value) >= _BEYOND:
        raise RecipeError(f"'{where}' is a number of {_digits(value)} digits; a whole number here has at most 64 bits.")
    if type(value) is not hint:
        raise RecipeError(
            f"'{where}' is {shown(value)}, of type {type(value).__name__}; it must be {_type_name(hint, python)}."
        )
    return value


def _coerced(field: dataclasses.Field[Any], hint: Any, value: Any, where: str, *, python: bool = False) -> Any:
    """As `coerce`; a field of text with "also" in its metadata takes a value of that type too, as it is written."""
    return str(value) if type(value) is field.metadata.get("also") else coerce(hint, value, where, python=python)


def check_types(value: Any, where: str) -> None:
    """Checks every field of the dataclass `value`, and takes plain values for components. For `__post_init__`."""
    hints = get_type_hints(type(value))
    for field in dataclasses.fields(value):
        item = getattr(value, field.name)
        object.__setattr__(
            value, field.name, _coerced(field, hints[field.name], item, f"{where}.{field.name}", python=True)
        )


def suggest(key: str, known: Iterable[str], what: str = "known keys are") -> str:
    """The end of a sentence about an unknown key: the nearest known one, or all of them, after `what`."""
    known = list(known)
    begun = [each for each in known if len(key) > 2 and each.startswith(key.lower())]
    close = begun or difflib.get_close_matches(key, known, 1)
    return f"; did you mean {shown(close[0])}?" if close else f"; {what} {', '.join(known) or '(none)'}."


def _digits(value: int) -> int:
    """About how many digits it has; Python refuses to write very many down."""
    return int(value.bit_length() * math.log10(2)) + 1


def _type_name(hint: Any, python: bool) -> str:
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    if python:
        names |= {str: "a str", bool: "True or False"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def at_most(where: str, value: float, most: float) -> None:
    """Raises RecipeError for a value of the field `where` that is above `most`."""
    if value > most:
        raise RecipeError(f"'{where}' is {value}; it must be at most {most}.")


def at_least(where: str, value: float, least: float) -> None:
    """Raises RecipeError for a value of the field `where` that is not at least `least`."""
    if not value >= least:
        raise RecipeError(f"'{where}' is {value}; it must be at least {least}.")
