"""Recipes' tables side by side: what differs, and what of an object without an address can be compared at all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from instep.errors import shown


def differences(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Clauses on the fields of two recipes' tables that differ."""
    mine, theirs = _flat(mine), _flat(theirs)
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


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
