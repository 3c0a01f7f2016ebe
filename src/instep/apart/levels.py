"""The first level: where two tapes part, at their own resolution. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from instep.apart.told import FIGURES, Told
from instep.differences import flat
from instep.recipe import result_part


@dataclass(frozen=True)
class Field:
    """One that differs, with its value in each run; None where it is not set. decides: the result, as recipes go."""

    name: str
    a: Any
    b: Any
    decides: bool = True


@dataclass(frozen=True)
class Seen:
    """What two tapes have in common, and where they part.

    alike: the last version up to which all that both tell is the same, with checksums or a digest; None where not even
    the first weights are known to be. first: the first version of which anything differs; None where nothing does.
    what: what differs there, and tensors: those whose checksums do. sums, updates, digests: how many versions, updates
    and digests were compared, up to there; names: different tensors.
    """

    alike: int | None
    first: int | None
    what: tuple[str, ...]
    tensors: tuple[str, ...]
    sums: tuple[int, ...]
    updates: int
    digests: int
    names: int


def fields_apart(a: Told, b: Told) -> list[Field]:
    """The recipes' fields that differ, those that decide the result first."""
    tables = [each.recipe for each in (a, b)]
    decisive = [set(flat(result_part(table))) for table in tables]
    one, other = (flat(table) for table in tables)
    found = []
    for name in {**one, **other}:
        if one.get(name) != other.get(name):
            decides = any(name in each for each in decisive) or (name == "steps" and any(map(_follows_steps, tables)))
            found.append(Field(name, one.get(name), other.get(name), decides))
    return sorted(found, key=lambda field: not field.decides)


def _follows_steps(table: Mapping[str, Any]) -> bool:
    return bool(table.get("schedule", {}).get("kind", "constant") != "constant")


def seen_apart(a: Told, b: Told) -> Seen:
    """Where they part, version by version, of what both tell."""
    alike: int | None = None
    updates = digests = 0
    sums: list[int] = []
    names: set[str] = set()
    decides = a.arrival_decides or b.arrival_decides
    for version in range(min(a.last, b.last) + 1):
        what, tensors = list[str](), list[str]()
        if version in a.updates and version in b.updates:
            updates += 1
            what += [shown for name, shown in FIGURES.items() if a.updates[version][name] != b.updates[version][name]]
        if version in a.arrivals and version in b.arrivals and not decides:
            parted = a.contributions[version][-1] != b.contributions[version][-1]
            what += ["checksum of the weights"] if parted else []
        elif version in a.arrivals and version in b.arrivals:
            what += ["order of arrival"] if a.arrivals[version] != b.arrivals[version] else []
            if not what and a.contributions[version] != b.contributions[version]:
                what.append("contributions")
        if version in a.sums and version in b.sums:
            sums.append(version)
            names |= a.sums[version].keys() | b.sums[version].keys()
            tensors = differing(a.sums[version], b.sums[version])
        both = version in a.digests and version in b.digests
        digests += both
        if both and a.digests[version] != b.digests[version]:
            what.append("digest")
        if what or tensors:
            return Seen(alike, version, tuple(what), tuple(tensors), tuple(sums), updates, digests, len(names))
        if both or (sums and sums[-1] == version):
            alike = version
    return Seen(alike, None, (), (), tuple(sums), updates, digests, len(names))


def differing(one: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    """The tensors whose checksums differ, in the model's order."""
    return [name for name in {**one, **other} if one.get(name) != other.get(name)]


def listed(names: Sequence[str]) -> str:
    """The first of them, and how many more there are."""
    more = f" and {len(names) - 1:,} more tensor{'s' if len(names) > 2 else ''}" if len(names) > 1 else ""
    return f"'{names[0]}'{more}"
