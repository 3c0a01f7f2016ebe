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
    """From the first operation that both do and that gives something else back to those whose answer the other has
    nowhere, though it has all that goes into them. None where all that both do gives the same.
    """
    first = 0
    while (
        first < min(len(one), len(other)) and one[first].name == other[first].name and _alike(one, other, first, first)
    ):
        first += 1
    names = [[made.name for made in each[first : first + _MOST]] for each in (one, other)]
    blocks = SequenceMatcher(a=names[0], b=names[1], autojunk=False).get_matching_blocks()
    pairs = [(first + block.a + k, first + block.b + k) for block in blocks for k in range(block.size)]
    parted = next(((a, b) for a, b in pairs if not _alike(one, other, a, b)), None)
    if parted is None:
        return None
    here, there = _root(one, parted[0], _tensors(other)), _root(other, parted[1], _tensors(one))
    mine, theirs = one[here], other[there]
    found = mine if here != parted[0] or there == parted[1] else theirs
    if mine.name != theirs.name:
        return PartingPlace(microbatch, here, there, found, "path", mine.name, theirs.name)
    if mine.inputs == theirs.inputs:
        kind = "number" if mine.plain != theirs.plain else "draw" if mine.random else "kernel"
        texts = first_other(mine.plain, theirs.plain) if kind == "number" else ("", "")
        return PartingPlace(microbatch, here, there, found, kind, *texts)
    return PartingPlace(
        microbatch, here, there, found, "order" if _tensors(other).issuperset(mine.inputs) else "tensor"
    )


def _tensors(made: Sequence[Made]) -> set[str]:
    return {tensor for each in made for tensor in (*each.inputs, *each.outputs)}


def _root(made: Sequence[Made], at: int, known: set[str]) -> int:
    """The place of the operation that has made what the one at `at` is given and the other list does not know."""
    while True:
        makers = [_maker(made, at, tensor) for tensor in made[at].inputs if tensor not in known]
        found = next((place for place in makers if place is not None), None)
        if found is None:
            return at
        at = found


def _alike(one: Sequence[Made], other: Sequence[Made], a: int, b: int) -> bool:
    return one[a].unset or one[a].outputs == other[b].outputs


def _maker(made: Sequence[Made], before: int, tensor: str) -> int | None:
    """The place of the last operation before that has made the tensor, and not only handed it on."""
    places = range(before - 1, -1, -1)
    return next((at for at in places if tensor in made[at].outputs and tensor not in made[at].inputs), None)
