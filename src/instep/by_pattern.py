"""Several components, each for what has some names: a recipe's optimizers, each for a part of the parameters."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from instep.components import Component
from instep.errors import ComponentError, shown


@dataclass(frozen=True)
class ByPattern:
    """Components with the patterns of names that each is for, in order: the first that matches a name has it.

    A pattern is one of `fnmatch`, for whole names, such as ``"blocks.*.weight"``, where ``*`` stands for dots too.
    """

    parts: tuple[tuple[tuple[str, ...], Component], ...]

    @classmethod
    def of(cls, value: Any) -> ByPattern | Component:
        """`value` as a component, or as several.

        Several are a list of tables ``{parameters = "...", use = ..., args = ...}``, whose `parameters` are a pattern
        or a list of them, or a mapping of patterns to components. Raises ComponentError.
        """
        if isinstance(value, ByPattern):
            return value
        if type(value) in (list, tuple):
            return cls(tuple(_part(item) for item in value)).checked()
        if type(value) is dict and value and not value.keys() & {"use", "args"}:
            return cls(tuple((_patterns(key), Component.of(item)) for key, item in value.items())).checked()
        return Component.of(value)

    def checked(self) -> ByPattern:
        """Itself. Raises ComponentError where it is empty."""
        if not self.parts:
            raise ComponentError("'optimizer' is an empty list; give one optimizer, or several by patterns of names.")
        return self

    def describe(self) -> str:
        """The components' descriptions."""
        return " and ".join(component.describe() for _, component in self.parts)

    def split(self, names: Sequence[str], frozen: Sequence[str] = ()) -> list[list[str]]:
        """The names of each part, in their order. `frozen` are others, which no part is to have.

        Raises ComponentError for a name that nothing matches, for a pattern that matches none, of the frozen ones
        neither, and for a part that is left without any. A pattern whose names earlier parts have is passed over.
        """
        known = [*names, *frozen]
        for patterns, component in self.parts:
            for pattern in patterns:
                if not any(_matches(name, [pattern]) for name in known):
                    raise ComponentError(
                        f"'parameters' of the optimizer {component.describe()} has {shown(pattern)}, and no parameter "
                        f"of the model has such a name; {near_name(pattern, known)}"
                    )
        groups: list[list[str]] = [[] for _ in self.parts]
        for name in names:
            matching = (place for place, (patterns, _) in enumerate(self.parts) if _matches(name, patterns))
            place = next(matching, None)
            if place is None:
                raise ComponentError(
                    f"parameter '{name}' matches no pattern of 'optimizer'; add a last table for the others, with "
                    f'parameters = "*", or freeze it (recipe.freeze).'
                )
            groups[place].append(name)
        for names_of_part, (patterns, component) in zip(groups, self.parts, strict=True):
            if not names_of_part:
                raise ComponentError(_left_without(component, patterns, names, frozen))
        return groups


def _left_without(component: Component, patterns: Sequence[str], names: Sequence[str], frozen: Sequence[str]) -> str:
    """A sentence on a part without a name."""
    told = f"no parameter is left for the optimizer {component.describe()}, whose 'parameters' are "
    told += f"{', '.join(map(repr, patterns))}: "
    own = [name for name in frozen if _matches(name, patterns)]
    if own and not any(_matches(name, patterns) for name in names):
        told += f"all that these match, '{own[0]}' among them, are frozen; "
        return f"{told}leave its table out, or train one of them."
    return f"{told}the first pattern that matches a name has it; the names are such as '{names[0]}'."


def near_name(pattern: str, names: Sequence[str]) -> str:
    """The end of a sentence on a pattern without a name: the nearest name, or what names there are."""
    ends = {part: name for name in reversed(names) for part in (*name.split("."), name)}
    near = difflib.get_close_matches(pattern.strip("*."), ends, 1)
    return f"did you mean that of {shown(ends[near[0]])}?" if near else f"names are such as {shown(names[0])}."


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _part(item: Any) -> tuple[tuple[str, ...], Component]:
    if not isinstance(item, Mapping) or "parameters" not in item:
        raise ComponentError(
            f"{shown(item)} has no key 'parameters', which each of several optimizers has; write "
            f'{{parameters = "pattern of names", use = "package.module:name"}}.'
        )
    rest = {key: value for key, value in item.items() if key != "parameters"}
    return _patterns(item["parameters"]), Component.of(rest)


def _patterns(value: Any) -> tuple[str, ...]:
    patterns = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list | tuple) else ()
    if not patterns or not all(isinstance(pattern, str) for pattern in patterns):
        raise ComponentError(
            f"'parameters' of an optimizer is {shown(value)}; it must be a pattern of names, or a list of them."
        )
    return patterns
