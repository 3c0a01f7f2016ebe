"""Large plain parts of what is pickled: lists, tuples, dicts and sets of texts, numbers and such containers again.

They hold no code, so that a process which must not run the user's can unpickle them, once for all that it forks.
"""

from __future__ import annotations

import pickle
from itertools import chain
from sys import getrefcount
from typing import Any

FEWEST = 1000
"""Elements of a container below which it stays in the ordinary pickle."""

CONTAINERS = frozenset({list, tuple, dict, set, frozenset})
"""Types of what can be a part."""

_ATOMS = frozenset({str, bytes, int, float, bool, type(None)})


class PlainParts:
    """The plain parts of one pickle. A container met again is the same part."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[Any, int | None]] = {}  # by address, which stays its own while it is kept here
        self._parts: list[Any] = []

    def place_of(self, value: Any) -> int | None:
        """Which part `value`, one of `CONTAINERS`, is; None if it belongs into the ordinary pickle."""
        if len(value) < FEWEST:
            return None
        if id(value) not in self._seen:
            place = None
            if _is_plain(value):
                place = len(self._parts)
                self._parts.append(value)
            self._seen[id(value)] = value, place
        return self._seen[id(value)][1]

    def dump(self, file: Any) -> None:
        """Writes the parts, if any."""
        if self._parts:
            pickle.dump(self._parts, file, protocol=5)


def load_plain(file: Any) -> list[Any]:
    """The parts that `PlainParts.dump` wrote there. Runs no code but pickle's own."""
    parts: list[Any] = _Plain(file).load()
    return parts


class _Plain(pickle.Unpickler):
    """Knows no class and no function."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"{module}.{name} is not plain")


def _is_plain(top: Any) -> bool:
    """Whether it holds only what is plain, at every depth, and no container that can change is held by others too."""
    waiting = [top]
    while waiting:
        container = waiting.pop()
        if type(container) is dict:
            items, once = list(chain(container, container.values())), _HELD_ONCE + 1
        else:
            items, once = container, _HELD_ONCE
        if _ATOMS.issuperset(map(type, items)):
            continue
        for item in items:
            kind = type(item)
            if kind in _ATOMS:
                continue
            if kind not in CONTAINERS:
                return False
            if getrefcount(item) > once and not _is_constant(item):
                return False
            waiting.append(item)
    return True


def _is_constant(item: Any) -> bool:
    """Whether it and what it holds cannot change, as far as a glance tells."""
    return type(item) is frozenset or (type(item) is tuple and _ATOMS.issuperset(map(type, item)))


def _references(items: list[Any]) -> int:
    """How many hold the first of them while it is looked at in a loop."""
    for item in items:
        return getrefcount(item)
    return 0


_HELD_ONCE = _references([[]])
