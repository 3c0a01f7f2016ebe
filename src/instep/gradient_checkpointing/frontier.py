"""The choices worth having for one kind of block: bytes held against extra work.

An operation that is not kept is done again if backward, or an operation that is done again, needs what it makes; then
what it reads is needed too. Storages that one operation writes stand or fall together: a *group*. Given which
groups are kept, the rest follows (`choice_of`). Which are worth keeping is found exactly: every subset where they
are few, else by dynamic programming over the groups from the last to the first, where a state is what is needed of
those to come and only choices are carried on that no other beats in both bytes and work.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

from instep.gradient_checkpointing.structure import Act, BlockKind, Choice, Overheads

EXACT = 10
"""Up to so many groups every subset is tried."""

MOST = 96
"""How many unbeaten choices a state of the dynamic programme carries on; beyond, they are thinned out by bytes."""

_NONE = Overheads()

T = TypeVar("T")

Price = tuple[float, float]
"""What a second and what a FLOP cost."""


@dataclass(frozen=True)
class StorageGroup:
    """Storages that are written together. `reads`: storages of others. `keepable`: their last values can stand in."""

    storages: tuple[int, ...]
    operations: tuple[int, ...]
    reads: tuple[int, ...]
    flops: int
    seconds: float
    keepable: bool


class Graph:
    """The groups of a kind of block, in the order in which they come about."""

    def __init__(self, kind: BlockKind):
        self.kind = kind
        self.groups = _groups(kind)
        self.group_of = {storage: place for place, c in enumerate(self.groups) for storage in c.storages}
        packed = {index for index, storage in enumerate(kind.storages) if storage.packed or storage.bare}
        pinned = {index for operation in kind.operations if operation.pinned for index in operation.reads}
        self.roots = frozenset(packed | pinned)
        """Storages that are needed whatever is kept."""

    @cached_property
    def relevant(self) -> tuple[int, ...]:
        """Clusters that may be needed and that can be kept."""
        needed, todo = set[int](), list(self.roots)
        while todo:
            storage = todo.pop()
            if storage not in needed:
                needed.add(storage)
                todo += self.groups[self.group_of[storage]].reads
        places = {self.group_of[storage] for storage in needed}
        return tuple(place for place in sorted(places) if self.groups[place].keepable)

    def settle(self, kept: Iterable[int]) -> tuple[set[int], set[int]]:
        """Given the kept groups: the storages that are needed, and the groups that are done again."""
        needed, again, chosen = set(self.roots), set[int](), set(kept)
        for place in range(len(self.groups) - 1, -1, -1):
            group = self.groups[place]
            if place not in chosen and not needed.isdisjoint(group.storages):
                again.add(place)
                needed.update(group.reads)
        return needed, again

    def held(self, storages: Iterable[int]) -> int:
        """Bytes that keeping costs: none for what leaves the block and is there anyway."""
        stored = self.kind.storages
        return sum(stored[index].nbytes for index in storages if not stored[index].escapes)


def choice_of(graph: Graph, kept: Iterable[int], overheads: Overheads = _NONE) -> Choice:
    """The choice that keeps these groups, so far as anything needs them."""
    kind, chosen = graph.kind, set(kept)
    needed, again = graph.settle(chosen)
    stays = {s for place in chosen for s in graph.groups[place].storages if s in needed}
    acts = _acts(graph, stays, again)
    substantial = [bool(op.writes) or op.constant for op in kind.operations]
    selective = any(act is not Act.REPEAT for act, counts in zip(acts, substantial, strict=True) if counts)
    if not selective:
        acts = (Act.REPEAT,) * len(acts)
    repeated = [op for op, act in zip(kind.operations, acts, strict=True) if act is Act.REPEAT]
    packed = [i for i, op in enumerate(kind.operations) if any(kind.storages[s].packed for s in op.writes)]
    last = max(packed, default=-1) + 1  # the number of operations up to the last that backward reads something of
    if not selective:  # torch stops where backward has all that it reads
        repeated = list(kind.operations[:last])
    around = overheads.block_s + overheads.op_s * last
    if selective:
        around += overheads.watched_op_s * len(kind.operations)
    return Choice(
        held_bytes=graph.held(stays) + kind.extra_bytes + kind.buffer_bytes,
        recompute_bytes=_recompute_peak(kind, acts, stays, last) + kind.extra_bytes + 2 * kind.buffer_bytes,
        flops=sum(op.flops for op in repeated),
        seconds=sum(op.seconds for op in repeated) + around,
        acts=acts,
        kept=tuple(sorted(stays)),
    )


def nothing(kind: BlockKind) -> Choice:
    """The choice not to checkpoint."""
    return Choice(kind.held_bytes, kind.held_bytes, 0, 0.0)


def frontier(kind: BlockKind, price: Price, overheads: Overheads = _NONE) -> list[Choice]:
    """The choices that no other beats in bytes held, bytes while recomputing and price together; cheapest first."""
    graph = Graph(kind)
    choices = [choice_of(graph, kept, overheads) for kept in (*_worth_keeping(graph, price), ())]
    return unbeaten([nothing(kind), *choices], price)


def priced(choice: Choice, price: Price) -> float:
    """What a choice costs."""
    return price[0] * choice.seconds + price[1] * choice.flops


def unbeaten(choices: Sequence[Choice], price: Price) -> list[Choice]:
    """Those that no other is at least as good as in all three respects; cheapest first."""
    order = sorted(choices, key=lambda c: (priced(c, price), c.held_bytes, c.recompute_bytes, c.kept))
    found: list[Choice] = []
    for choice in order:
        if not any(f.held_bytes <= choice.held_bytes and f.recompute_bytes <= choice.recompute_bytes for f in found):
            found.append(choice)
    return found


def _worth_keeping(graph: Graph, price: Price) -> list[tuple[int, ...]]:
    places = graph.relevant
    if len(places) <= EXACT:
        return [kept for n in range(len(places) + 1) for kept in itertools.combinations(places, n)]
    return _by_states(graph, price)


def _by_states(graph: Graph, price: Price) -> list[tuple[int, ...]]:
    """The dynamic programme. A state is a bit mask of storages that are needed of the groups to come."""
    groups, stored = graph.groups, graph.kind.storages
    states: dict[int, list[tuple[int, float, int]]] = {_mask(graph.roots): [(0, 0.0, 0)]}
    for place in range(len(groups) - 1, -1, -1):
        group = groups[place]
        makes, reads = _mask(group.storages), _mask(group.reads)
        cost = price[0] * group.seconds + price[1] * group.flops
        by_state: dict[int, list[tuple[int, float, int]]] = {}
        for needed, points in states.items():
            wanted = needed & makes
            if not wanted:
                by_state.setdefault(needed, []).extend(points)
                continue
            again = [(held, work + cost, kept) for held, work, kept in points]
            by_state.setdefault((needed | reads) & ~makes, []).extend(again)
            if group.keepable:
                nbytes = sum(stored[s].nbytes for s in group.storages if wanted >> s & 1 and not stored[s].escapes)
                stays = [(held + nbytes, work, kept | 1 << place) for held, work, kept in points]
                by_state.setdefault(needed & ~makes, []).extend(stays)
        states = {state: _unbeaten(points) for state, points in by_state.items()}
    kept = {kept for points in states.values() for _, _, kept in points}
    return [tuple(place for place in range(len(groups)) if mask >> place & 1) for mask in sorted(kept)]


def _unbeaten(points: list[tuple[int, float, int]]) -> list[tuple[int, float, int]]:
    """The points that no other beats, at most `MOST` of them, the first and last always."""
    best: list[tuple[int, float, int]] = []
    for point in sorted(points):
        if not best or point[1] < best[-1][1]:
            best.append(point)
    return thinned(best, MOST)


def thinned(items: list[T], most: int) -> list[T]:
    """At most so many of the items, evenly spread, the first and last always."""
    return items if len(items) <= most else [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def _mask(bits: Iterable[int]) -> int:
    return sum(1 << bit for bit in bits)


def _groups(kind: BlockKind) -> list[StorageGroup]:
    """In an order in which each reads only earlier ones; what cannot be ordered so is one group."""
    parent = list(range(len(kind.storages)))

    def find(index: int) -> int:
        while parent[index] != index:
            index = parent[index]
        return index

    last = {index: place for place, op in enumerate(kind.operations) for index in op.writes}
    for place, operation in enumerate(kind.operations):
        # Where a value is read and then changed in place, the last value cannot stand in for the reader's.
        changed = [index for index in operation.reads if last[index] > place]
        for other in (*operation.writes, *changed) if operation.writes else ():
            parent[find(other)] = find(operation.writes[0])
    while True:
        members: dict[int, list[int]] = {}
        for index in range(len(kind.storages)):
            members.setdefault(find(index), []).append(index)
        found = [_group_of(kind, tuple(storages)) for storages in members.values()]
        found.sort(key=lambda group: (group.operations[-1], group.storages))
        place_of = {storage: place for place, group in enumerate(found) for storage in group.storages}
        wrong = [(c.storages[0], s) for place, c in enumerate(found) for s in c.reads if place_of[s] >= place]
        if not wrong:
            return found
        for one, other in wrong:
            parent[find(other)] = find(one)


def _group_of(kind: BlockKind, storages: tuple[int, ...]) -> StorageGroup:
    own = set(storages)
    writers = tuple(i for i, op in enumerate(kind.operations) if not own.isdisjoint(op.writes))
    reads = {index for i in writers for index in kind.operations[i].reads} - own
    pinned = any(op.pinned and not own.isdisjoint(op.reads) for op in kind.operations[writers[0] : writers[-1]])
    mixed = any(kind.operations[i].changes and kind.storages[s].born == i for s in storages for i in writers)
    bare = len(writers) > 1 and any(kind.storages[s].bare for s in storages)  # it may be an earlier value that is read
    return StorageGroup(
        storages, writers, tuple(sorted(reads)),
        flops=sum(kind.operations[i].flops for i in writers),
        seconds=sum(kind.operations[i].seconds for i in writers),
        keepable=not (pinned or mixed or bare),
    )  # fmt: skip


def _acts(graph: Graph, stays: set[int], again: set[int]) -> tuple[Act, ...]:
    """By operation. Views of what is there are made again; of what is not, skipped."""
    alive = stays | {s for place in again for s in graph.groups[place].storages}
    acts = []
    for operation in graph.kind.operations:
        if operation.constant:
            act = Act.KEEP
        elif operation.pinned:
            act = Act.REPEAT
        elif operation.views is not None:
            act = Act.REPEAT if operation.views in alive else Act.SKIP
        elif not operation.writes or graph.group_of[operation.writes[0]] in again:
            act = Act.REPEAT  # without writes, it is a view of an input
        else:
            act = Act.KEEP if not stays.isdisjoint(operation.writes) else Act.SKIP
        acts.append(act)
    return tuple(acts)


def _recompute_peak(kind: BlockKind, acts: tuple[Act, ...], stays: set[int], last: int) -> int:
    """The most bytes of the block's own that are alive while it is recomputed."""
    stored = kind.storages
    live = peak = sum(stored[s].nbytes for s in stays if not stored[s].escapes)
    dying: dict[int, int] = {}
    for place, (operation, act) in enumerate(zip(kind.operations, acts, strict=True)):
        for index in operation.writes:
            storage = stored[index]
            if storage.born != place:
                continue
            if act is Act.REPEAT and place < max(last, 1):
                live += storage.nbytes
                if not storage.packed:
                    dying[storage.dies] = dying.get(storage.dies, 0) + storage.nbytes
            elif index in stays and not storage.packed and not storage.escapes:
                dying[storage.dies] = dying.get(storage.dies, 0) + storage.nbytes
        peak = max(peak, live)
        live -= dying.pop(place, 0)
    return peak
