"""Several components, each for what has some names: a recipe's optimizers, each for a part of the parameters."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from instep.components import Component
from instep.errors import ComponentError, InstepError, shown


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
            parts = ((patterns_of(key, "an optimizer"), Component.of(item)) for key, item in value.items())
            return cls(tuple(parts)).checked()
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
            check_known(patterns, known, f"'parameters' of the optimizer {component.describe()}")
        groups: list[list[str]] = [[] for _ in self.parts]
        for name in names:
            matching = (place for place, (patterns, _) in enumerate(self.parts) if matches(name, patterns))
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
    own = [name for name in frozen if matches(name, patterns)]
    if own and not any(matches(name, patterns) for name in names):
        told += f"all that these match, '{own[0]}' among them, are frozen; "
        return f"{told}leave its table out, or train one of them."
    return f"{told}the first pattern that matches a name has it; the names are such as '{names[0]}'."


def check_known(
    patterns: Iterable[str], names: Sequence[str], whose: str, error: type[InstepError] = ComponentError
) -> None:
    """Raises `error` for a pattern that matches none of `names`, those of parameters. whose: what has it, as told."""
    for pattern in patterns:
        if not any(matches(name, [pattern]) for name in names):
            raise error(
                f"{whose} has {shown(pattern)}, and no parameter of the model has such a name; {_near(pattern, names)}"
            )


def _near(pattern: str, names: Sequence[str]) -> str:
    """The end of a sentence on a pattern without a name: the nearest name, or what names there are."""
    ends = {part: name for name in reversed(names) for part in (*name.split("."), name)}
    near = difflib.get_close_matches(pattern.strip("*."), ends, 1)
    return f"did you mean that of {shown(ends[near[0]])}?" if near else f"names are such as {shown(names[0])}."


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether one of the patterns is for the name."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _part(item: Any) -> tuple[tuple[str, ...], Component]:
    if not isinstance(item, Mapping) or "parameters" not in item:
        raise ComponentError(
            f"{shown(item)} has no key 'parameters', which each of several optimizers has; write "
            f'{{parameters = "pattern of names", use = "package.module:name"}}.'
        )
    rest = {key: value for key, value in item.items() if key != "parameters"}
    return patterns_of(item["parameters"], "an optimizer"), Component.of(rest)


def patterns_of(value: Any, whose: str) -> tuple[str, ...]:
    """The 'parameters' in a table, one pattern or several. Raises ComponentError; whose: what the table is of."""
    patterns = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list | tuple) else ()
    if not patterns or not all(isinstance(pattern, str) for pattern in patterns):
        raise ComponentError(
            f"'parameters' of {whose} is {shown(value)}; it must be a pattern of names, or a list of them."
        )
    return patterns
