"""Where the operations of two runs part whose code is not the same: what one does beside may change nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

from instep.equivalences.operations import Made, first_other, parting

_MOST = 4000
"""Operations after the first that differ, that are aligned."""


@dataclass(frozen=True)
class PartingPlace:
    """Where they part. microbatch: whose lists; a, b: places in them, None where that one has none; kind, one, other:
    as `instep.equivalences.operations.parting` says.
    """

    microbatch: int
    a: int | None
    b: int | None
    operation: Made
    kind: str
    one: str = ""
    other: str = ""


def first_place(one: Mapping[int, Sequence[Made]], other: Mapping[int, Sequence[Made]]) -> PartingPlace | None:
    """The first operation that gives something else, of the first microbatch that has one."""
    for microbatch in sorted(one.keys() & other.keys()):
        found = parting(one[microbatch], other[microbatch])
        if found is None:
            continue
        if found.kind != "path":
            return PartingPlace(
                microbatch, found.place, found.place, found.operation, found.kind, found.one, found.other
            )  # fmt: skip
        place = _aligned(microbatch, one[microbatch], other[microbatch])
        if place is not None:
            return place
    return None


def _aligned(microbatch: int, one: Sequence[Made], other: Sequence[Made]) -> PartingPlace | None:
    """The first operation that both do and that gives something else, or what it is given from operations that one does
    and the other does not; None where all that both do gives the same.
    """
    first = 0
    while (
        first < min(len(one), len(other)) and one[first].name == other[first].name and _alike(one, other, first, first)
    ):
        first += 1
    names = [[made.name for made in each[first : first + _MOST]] for each in (one, other)]
    blocks = SequenceMatcher(a=names[0], b=names[1], autojunk=False).get_matching_blocks()
    pairs = {first + b.a + k: first + b.b + k for b in blocks for k in range(b.size)}
    both = set(pairs.values())
    for a, b in pairs.items():
        if _alike(one, other, a, b):
            continue
        if one[a].inputs == other[b].inputs:
            kind = "number" if one[a].plain != other[b].plain else "draw" if one[a].random else "kernel"
            texts = first_other(one[a].plain, other[b].plain) if kind == "number" else ("", "")
            return PartingPlace(microbatch, a, b, one[a], kind, *texts)
        for mine, theirs in zip(one[a].inputs, other[b].inputs, strict=False):
            if mine == theirs:
                continue
            here, there = _maker(one, a, mine), _maker(other, b, theirs)
            alone = [
                each[at]
                for each, at, known in ((one, here, pairs.keys()), (other, there, both))
                if at is not None and at not in known
            ]  # what only one of them does
            if alone:
                shown = [each[at].name if at is not None else "none" for each, at in ((one, here), (other, there))]
                return PartingPlace(microbatch, here, there, alone[0], "path", *shown)
        return PartingPlace(microbatch, a, b, one[a], "tensor")
    return None


def _alike(one: Sequence[Made], other: Sequence[Made], a: int, b: int) -> bool:
    return one[a].unset or one[a].outputs == other[b].outputs


def _maker(made: Sequence[Made], before: int, tensor: str) -> int | None:
    """The place of the last operation before that has made the tensor."""
    return next((place for place in range(before - 1, -1, -1) if tensor in made[place].outputs), None)
