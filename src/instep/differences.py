"""Recipes' tables side by side, and what is told there of an object without an address: enough to tell two apart."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import re
import types
from collections.abc import Mapping
from typing import Any

from instep.errors import shown


def differences(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Clauses on the fields of two recipes' tables that differ."""
    mine, theirs = flat(mine), flat(theirs)
    keys = sorted(mine.keys() | theirs.keys(), key=lambda key: "rule" if key == "rule.name" else key)
    return [
        f"recipe.{key} is {_shown(mine, key)} here and {_shown(theirs, key)} there"
        for key in keys
        if mine.get(key) != theirs.get(key)
    ]


def without_address(value: Any) -> str | None:
    """The first object in a recipe's table that had no address to write, as its description ``<...>``; or None."""
    if isinstance(value, Mapping):
        use = value.get("use")
        if isinstance(use, str) and use.startswith("<"):
            return use
        value = list(value.values())
    if isinstance(value, list):
        return next((found for item in value if (found := without_address(item)) is not None), None)
    return None


def without_contents(value: Any) -> Any:
    """A recipe's table without what objects hold that have no address: it is shown and compared, as far as it goes."""
    if isinstance(value, Mapping):
        nameless = str(value.get("use", "")).startswith("<")
        return {key: without_contents(item) for key, item in value.items() if not (nameless and key == "holds")}
    return [without_contents(item) for item in value] if isinstance(value, list) else value


def _shown(table: Mapping[str, Any], key: str) -> str:
    return shown(table[key]) if key in table else "not set"


def flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`table` with tables inside written as names with dots, as TOML takes ``a.b`` without quotes for a table a."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


_DEPTH, _LENGTH, _TEXT = 3, 32, 200
"""How deep, and how much of a list and of a text, is looked at."""

_LARGEST = 2**63 - 1  # that TOML holds

_CODE = (type, types.FunctionType, types.MethodType, types.BuiltinFunctionType)


def contents(value: Any) -> dict[str, Any]:
    """The plain values in `value` by name: fields of a dataclass, public attributes, arguments of a partial; of a
    module a hash of its ``repr``, which tells of layers and their settings. Nothing of functions and classes.
    """
    if isinstance(value, _CODE):
        return {}
    if callable(getattr(value, "named_parameters", None)):
        text = re.sub(r" at 0x[0-9a-f]+", "", repr(value))
        return {"repr": hashlib.sha256(text.encode(errors="replace")).hexdigest()[:16]}
    return _attributes(value, _DEPTH)


def _attributes(value: Any, depth: int) -> dict[str, Any]:
    if isinstance(value, functools.partial):
        found = {"func": value.func, "args": value.args, **value.keywords}
    elif dataclasses.is_dataclass(value):
        found = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
    else:
        found = {name: item for name, item in getattr(value, "__dict__", {}).items() if not name.startswith("_")}
    plain = {name: _plain(item, depth) for name, item in found.items()}
    return {name: item for name, item in plain.items() if item is not None}


def _plain(value: Any, depth: int) -> Any:
    """`value` as TOML can hold it; None for what is not plain."""
    if value is None:
        return "None"
    if isinstance(value, str):
        return value[:_TEXT]
    if isinstance(value, (bool, int)):
        return value if abs(value) <= _LARGEST else str(value)[:_TEXT]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, _CODE):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, (list, tuple)):
        items = [_plain(item, depth - 1) for item in value[:_LENGTH]] if depth else []
        return items if items and all(item is not None for item in items) else None
    if isinstance(value, Mapping):
        inner = {str(name): _plain(item, depth - 1) for name, item in list(value.items())[:_LENGTH]} if depth else {}
    else:
        inner = _attributes(value, depth - 1) if depth and not callable(getattr(value, "numel", None)) else {}
    return {name: item for name, item in inner.items() if item is not None} or None
