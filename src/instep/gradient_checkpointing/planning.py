"""From a profile and a budget to a plan: what each block keeps. Pure and deterministic, without torch.

Candidates are found without looking at the budget; a plan is the cheapest of them that fits. So a larger budget
never costs more. Few combinations are all tried, which makes the plan exact. Where they are many, candidates are
those on the way from nothing recomputed to everything, a step at a time: always the step of a block to another of its
choices that frees the most bytes for its price, as in a knapsack; beside each, those with the last block at a choice
between; and mixtures, found block after block.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import itemgetter
from typing import Any, Literal

from instep.budget import as_size
from instep.errors import CheckpointingError, shown
from instep.gradient_checkpointing.frontier import Graph, Price, frontier, priced, thinned
from instep.gradient_checkpointing.structure import BlockPlan, Choice, Plan, Profile

EXHAUSTIVE = 4096
"""Up to so many combinations all are tried."""

STATES = 4096
"""Of mixtures, about so many are looked at for all blocks together."""

POINTS = 24
"""Of each kind of block, about so many choices are combined."""


@dataclass(frozen=True)
class _Candidate:
    cost: float
    peak_bytes: int
    choices: tuple[int, ...]  # by block, the index in its kind's frontier


def plan(profile: Profile, *, budget_bytes: int, price: Literal["seconds", "flops"] = "seconds") -> Plan:
    """What to keep so that activations never take more than `budget_bytes`, at the least extra work.

    >>> plan = instep.gradient_checkpointing.plan(profile, budget_bytes=profile.peak_bytes * 3 // 4)
    >>> plan.peak_bytes <= profile.peak_bytes * 3 // 4
    True

    `price` is what is least: predicted seconds, or FLOPs, where bytes decide among equals: right under `torch.compile`,
    which fuses what costs no FLOPs into other kernels, so that it costs next to nothing. Raises CheckpointingError
    where `budget_bytes` is no number above 0, or where no plan meets it, and names the least that one can.
    """
    if isinstance(budget_bytes, bool) or not isinstance(budget_bytes, int) or budget_bytes <= 0:
        raise CheckpointingError(
            f"the budget is {shown(budget_bytes)} bytes; it must be a whole number of bytes above 0, such as 512 * "
            "2**20."
        )
    if price not in ("seconds", "flops"):
        raise CheckpointingError(f"the price is {shown(price)}; it is 'seconds' or 'flops'.")
    candidates = _candidates(profile, price)
    fitting = [candidate for candidate in candidates if candidate.peak_bytes <= budget_bytes]
    if not fitting:
        least = min(candidate.peak_bytes for candidate in candidates)
        share = math.ceil(100 * least / max(1, profile.peak_bytes))
        raise CheckpointingError(
            f"no plan fits into {as_size(budget_bytes)}: the least that one needs is {as_size(least)}, {share} % "
            f"of the {as_size(profile.peak_bytes)} with nothing recomputed; give it that, or take smaller microbatches."
        )
    best = min(fitting, key=lambda c: (c.cost, c.peak_bytes, c.choices))
    return _plan(profile, best, budget_bytes, price)


def plans(profile: Profile, *, most: int = 20, price: Literal["seconds", "flops"] = "seconds") -> list[Plan]:
    """The trade: plans that no other beats in both peak and cost, the largest and cheapest first; of very many, `most`
    that lie about evenly in bytes, the two ends among them."""
    best = _unbeaten(_candidates(profile, price))
    if len(best) > most:
        top, bottom = best[0].peak_bytes, best[-1].peak_bytes
        wanted = [top - (top - bottom) * i / (most - 1) for i in range(most)]
        distances = [[abs(candidate.peak_bytes - nbytes) for candidate in best] for nbytes in wanted]
        best = [best[i] for i in sorted({each.index(min(each)) for each in distances})]
    return [_plan(profile, c, c.peak_bytes, price) for c in best]


def least_bytes(profile: Profile) -> int:
    """The smallest budget that a plan meets."""
    return min(candidate.peak_bytes for candidate in _candidates(profile, "seconds"))


def peak_bytes(profile: Profile, choices: Sequence[Choice]) -> int:
    """The peak of a step, [blocks] choices."""
    held = peak = 0
    for moment in profile.moments:
        block, now = moment.block, moment.base_bytes
        if block >= 0:
            choice, kind = choices[block], profile.kinds[profile.kind_of[block]]
            if moment.kind == "hold":
                held += choice.held_bytes + kind.cast_bytes
            elif moment.kind == "clear":
                held -= kind.cast_bytes if choice.acts else 0
            elif moment.kind == "recompute":
                held -= choice.held_bytes + (0 if choice.acts else kind.cast_bytes)
                now += choice.recompute_bytes + kind.cast_bytes
            elif choice.acts:
                now += kind.extra_bytes
        peak = max(peak, held + now)
    return peak


def lower_bound(profile: Profile, budget_bytes: int, price: Literal["seconds", "flops"] = "seconds") -> float:
    """What any plan within the budget costs at least: every tensor that backward reads and that is not held at the
    end of forward is made once more, at the cost of its own operation: a fractional knapsack over bytes."""
    room = float(budget_bytes - _base_at_the_top(profile))
    items: list[tuple[int, float]] = []
    for kind in map(profile.kinds.__getitem__, profile.kind_of):
        for group in _graph(kind).groups:
            nbytes = sum(
                kind.storages[s].nbytes for s in group.storages
                if kind.storages[s].packed and not kind.storages[s].escapes
            )  # fmt: skip
            if nbytes:
                items.append((nbytes, group.seconds if price == "seconds" else float(group.flops)))
    short = sum(nbytes for nbytes, _ in items) - room
    bound = 0.0
    for nbytes, cost in sorted(items, key=lambda item: (item[1] / item[0], item)):
        if short <= 0:
            break
        bound += cost * min(1.0, short / nbytes)
        short -= nbytes
    return bound


def _base_at_the_top(profile: Profile) -> int:
    """The most that is alive, beside what blocks hold, while all blocks hold."""
    held, most = 0, 0
    for moment in profile.moments:
        if moment.kind == "run" and held == len(profile.names):
            most = max(most, moment.base_bytes)
        held += {"hold": 1, "recompute": -1}.get(moment.kind, 0)
    return most


_graph = lru_cache(maxsize=64)(Graph)

_PRICES: dict[str, Price] = {"seconds": (1.0, 0.0), "flops": (0.0, 1.0)}
"""What a second and a FLOP cost."""


@lru_cache(maxsize=8)
def _candidates(profile: Profile, price: Literal["seconds", "flops"]) -> tuple[_Candidate, ...]:
    search = _Search(profile, _fronts(profile, price), _PRICES[price])
    return tuple(search.candidate(choices) for choices in dict.fromkeys(search.ways()))


@lru_cache(maxsize=8)
def _fronts(profile: Profile, price: Literal["seconds", "flops"]) -> tuple[tuple[Choice, ...], ...]:
    """By kind, the choices to combine."""
    weights = _PRICES[price]
    fronts = [frontier(kind, weights, profile.overheads) for kind in profile.kinds]
    if _combinations(profile, fronts) > EXHAUSTIVE:
        fronts = [_fewer(front, weights) for front in fronts]
    return tuple(map(tuple, fronts))


def _combinations(profile: Profile, fronts: Sequence[Sequence[Choice]]) -> int:
    return math.prod(len(fronts[kind]) for kind in profile.kind_of)


def _unbeaten(candidates: Sequence[_Candidate]) -> list[_Candidate]:
    found: list[_Candidate] = []
    for candidate in sorted(candidates, key=lambda c: (c.cost, c.peak_bytes, c.choices)):
        if not found or candidate.peak_bytes < found[-1].peak_bytes:
            found.append(candidate)
    return found


def _fewer(front: list[Choice], weights: Price) -> list[Choice]:
    """The lower convex hull of a frontier, and some of what lies between."""
    hull = {id(choice) for choice in _hull(front, weights)}
    others = [choice for choice in front if id(choice) not in hull]
    room = max(0, POINTS - len(hull))
    if len(others) > room:
        others = [others[round(i * (len(others) - 1) / max(1, room - 1))] for i in range(room)]
    chosen = hull | {id(choice) for choice in others}
    return [choice for choice in front if id(choice) in chosen]


def _hull(front: Sequence[Choice], weights: Price) -> list[Choice]:
    """The choices that are best for some price of a byte held, the cheapest first."""
    best: list[Choice] = []
    for choice in front:  # cheapest first
        if not best or choice.held_bytes < best[-1].held_bytes:
            best.append(choice)
    hull: list[Choice] = []
    for choice in best:
        while len(hull) > 1 and _slope(hull[-2], hull[-1], weights) >= _slope(hull[-1], choice, weights):
            hull.pop()
        hull.append(choice)
    return hull


def _slope(here: Choice, there: Choice, weights: Price) -> float:
    """What a byte less costs on the way."""
    return (priced(there, weights) - priced(here, weights)) / max(1, here.held_bytes - there.held_bytes)


class _Search:
    """The combinations of choices that are looked at, each a tuple of places in the frontiers, by block."""

    def __init__(self, profile: Profile, fronts: Sequence[Sequence[Choice]], weights: Price):
        self.profile, self.fronts, self.weights = profile, fronts, weights
        self.costs = [[priced(choice, weights) for choice in front] for front in fronts]

    def candidate(self, choices: tuple[int, ...]) -> _Candidate:
        chosen = [self.fronts[kind][place] for kind, place in zip(self.profile.kind_of, choices, strict=True)]
        costs = [self.costs[kind][place] for kind, place in zip(self.profile.kind_of, choices, strict=True)]
        return _Candidate(math.fsum(costs), peak_bytes(self.profile, chosen), choices)

    def ways(self) -> Iterator[tuple[int, ...]]:
        """All combinations where they are few, else those on the way down, and mixtures."""
        if _combinations(self.profile, self.fronts) <= EXHAUSTIVE:
            return self.all()
        return itertools.chain(self.steps(), self.mixtures())

    def all(self) -> Iterator[tuple[int, ...]]:
        def extended(head: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
            if len(head) == len(self.profile.kind_of):
                yield head
                return
            for place in range(len(self.fronts[self.profile.kind_of[len(head)]])):
                yield from extended((*head, place))

        return extended(())

    def steps(self) -> Iterator[tuple[int, ...]]:
        """The way down the hulls of all blocks, in order of what a freed byte costs; then from the blocks' cheapest
        choices, all blocks alike."""
        kind_of = self.profile.kind_of
        moves: list[tuple[float, int, int, int]] = []
        starts: list[int] = []
        for kind, front in enumerate(self.fronts):
            hull = [front.index(choice) for choice in _hull(front, self.weights)]
            starts.append(hull[0])
            for step, (here, there) in enumerate(itertools.pairwise(hull)):
                price = _slope(front[here], front[there], self.weights)
                moves += [(price, step, block, there) for block, k in enumerate(kind_of) if k == kind]
        now = [starts[kind] for kind in kind_of]
        yield tuple(now)
        for _, _, block, there in sorted(moves):
            front, here = self.fronts[kind_of[block]], now[block]
            for place in range(min(here, there) + 1, max(here, there)):
                if front[place].held_bytes < front[here].held_bytes:
                    yield (*now[:block], place, *now[block + 1 :])
            now[block] = there
            yield tuple(now)
        # Where recomputing one block is the peak, a choice with a smaller one may serve.
        lean = [min(range(len(front)), key=lambda i: (front[i].recompute_bytes, i)) for front in self.fronts]
        yield tuple(lean[kind] for kind in kind_of)
        last = len(kind_of) - 1
        for place in range(len(self.fronts[kind_of[last]])):
            yield (*now[:last], place)

    def mixtures(self) -> Iterator[tuple[int, ...]]:
        """Block after block, the combinations so far that no other beats in bytes held, cost and peak alike (Nemhauser
        and Ullmann, 1969, on the knapsack), thinned out where they are very many. Exact for a chain of few blocks."""
        most = max(16, STATES // len(self.profile.kind_of))
        states: list[_State] = [(0, 0.0, 0, ())]
        for block, bases in self._bases().items():
            kind = self.profile.kind_of[block]
            extra = self.profile.kinds[kind].extra_bytes
            choices = []
            for place, choice in enumerate(self.fronts[kind]):
                own = (choice.held_bytes, choice.recompute_bytes, extra if choice.acts else 0)
                choices.append((place, choice.held_bytes, max(map(sum, zip(own, bases, strict=True)))))
            found = [
                (held + more, cost + self.costs[kind][place], max(peak, held + top), (block, place, way))
                for held, cost, peak, way in states
                for place, more, top in choices
            ]
            states = thinned(_best(found), most)
        for *_, way in states:
            places, here = [0] * len(self.profile.kind_of), way
            while here:
                places[here[0]], here = here[1], here[2]
            yield tuple(places)

    def _bases(self) -> dict[int, list[int]]:
        """By block, in the order in which they hold: the most that is alive beside what it and those before it hold
        while it is the last that holds, when its recompute begins, and in its backward."""
        last: list[int] = []
        bases: dict[int, list[int]] = {}
        for moment in self.profile.moments:
            if moment.kind == "hold":
                last.append(moment.block)
                bases[moment.block] = [0, 0, 0]
            elif moment.kind == "recompute":
                last.remove(moment.block)
                bases[moment.block][1] = moment.base_bytes
            elif moment.kind == "run":
                if moment.block >= 0:
                    bases[moment.block][2] = max(bases[moment.block][2], moment.base_bytes)
                if last:
                    bases[last[-1]][0] = max(bases[last[-1]][0], moment.base_bytes)
        return bases


_State = tuple[int, float, int, Any]
"""Of the blocks so far: bytes held, cost, peak; and the way: (block, place, the way before)."""


def _best(states: list[_State]) -> list[_State]:
    """Those that no other beats in all three, by rising bytes held."""
    kept: list[_State] = []
    costs: list[float] = []  # a staircase of those kept: costs rise and peaks fall
    peaks: list[int] = []
    for state in sorted(states, key=itemgetter(0, 1, 2)):
        _, cost, peak, _ = state
        place = bisect.bisect_right(costs, cost)
        if place and peaks[place - 1] <= peak:
            continue
        end = place
        while end < len(peaks) and peaks[end] >= peak:
            end += 1
        costs[place:end], peaks[place:end] = [cost], [peak]
        kept.append(state)
    return kept


def _plan(profile: Profile, candidate: _Candidate, budget_bytes: int, price: Literal["seconds", "flops"]) -> Plan:
    fronts = _fronts(profile, price)
    chosen = [fronts[kind][place] for kind, place in zip(profile.kind_of, candidate.choices, strict=True)]
    return Plan(
        blocks=tuple(
            BlockPlan(name, profile.kinds[kind], choice)
            for name, kind, choice in zip(profile.names, profile.kind_of, chosen, strict=True)
        ),
        budget_bytes=budget_bytes,
        peak_bytes=candidate.peak_bytes,
        held_bytes=sum(choice.held_bytes for choice in chosen),
        flops=sum(choice.flops for choice in chosen),
        seconds=math.fsum(choice.seconds for choice in chosen),
        step_flops=profile.flops,
        step_seconds=profile.seconds,
        nothing_bytes=profile.peak_bytes,
        price=price,
        lower_bound=lower_bound(profile, budget_bytes, price),
    )
