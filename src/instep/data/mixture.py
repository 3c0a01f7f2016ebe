"""Mixtures of data sets by weight. A schedule draws the data set of each sample, and inside each its own epochs run on.

Like the order of one data set, the schedule is a function of (seed, place), computed where it is asked for.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from instep.data import Collate, Data, MapStyle, as_data, fingerprint, makes_data
from instep.data.cursor import Cursor, fetch
from instep.data.order import BLOCK, KEPT, Groups, OrderKind, keys, over_blocks, permuted, take
from instep.data.weighted import Weighted, WeightedCursor
from instep.errors import DataError
from instep.randomness import key


class Mixture(Dataset[Any]):
    """Several map-style data sets, one after the other by index; training draws from each by its weight.

    weights: of each, above 0. Their shares count, and the least may be 1 in 4,096. Of the first 4,096 draws, or any
    multiple of them, each data set has its share, within one draw, and each of its samples comes once in each of its
    own epochs. An epoch of the mixture is as many draws as it has samples, so some come in it several times, and others
    not.

    Raises DataError for no data sets, other weights than data sets, and weights that are not above 0 or too small.
    """

    def __init__(self, sets: Sequence[MapStyle], weights: Sequence[float]) -> None:
        if not sets or len(sets) != len(weights):
            raise DataError(
                f"a mixture of {len(sets)} data sets has {len(weights)} weights; give at least one data set, and a "
                f"weight for each."
            )
        for samples in sets:
            Data(samples)
            if isinstance(samples, (Mixture, Weighted)):
                raise DataError(
                    f"a mixture holds a {type(samples).__name__}, whose own weights it would not know; give the data "
                    f"sets in that, with weights that say it all."
                )
        self.sets, self.weights = list(sets), _whole(weights)
        self._ends = list(itertools.accumulate(map(len, sets)))

    @property
    def lengths(self) -> tuple[int, ...]:
        """Samples of each data set."""
        return tuple(map(len, self.sets))

    @cached_property
    def digest(self) -> str:
        """SHA-256, in hexadecimal, of the lengths, weights and digests of the data sets, or of their fingerprints."""
        each = zip(self.lengths, self.weights, map(fingerprint, self.sets), strict=True)
        return hashlib.sha256(
            "\n".join(f"{length} {weight} {known}" for length, weight, known in each).encode()
        ).hexdigest()

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Any:
        place, index = self._located(index)
        return self.sets[place][index]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """Several samples, of each data set by one call where it takes several."""
        located = [self._located(index) for index in indices]
        found: dict[tuple[int, int], Any] = {}
        for place, samples in enumerate(self.sets):
            wanted = list(dict.fromkeys(index for other, index in located if other == place))
            if wanted:
                found |= zip(((place, index) for index in wanted), fetch(samples, wanted), strict=True)
        return [found[each] for each in located]

    def _located(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} is not from 0 to {len(self) - 1}")
        place = bisect.bisect_right(self._ends, index)
        return place, index - (self._ends[place - 1] if place else 0)


def mixture(sets: Mapping[str, Any] | Sequence[Any], weights: Mapping[str, float] | Sequence[float]) -> Data:
    """Data that train on a `Mixture`. What the sets hold out is evaluated on, one after the other.

    sets: data sets, pairs (training, held out), `Data`, or what gives such, in a list or by name; `weights` alike.
    Raises DataError as `Mixture`, and for sets that are collated in several ways.
    """
    if isinstance(sets, Mapping) or isinstance(weights, Mapping):
        if not isinstance(sets, Mapping) or not isinstance(weights, Mapping) or sets.keys() != weights.keys():
            raise DataError(
                f"the sets of a mixture are {_named(sets)}, and its weights {_named(weights)}; name both alike."
            )
        sets, weights = list(sets.values()), [weights[name] for name in sets]
    parts = [as_data(each() if makes_data(each) else each) for each in sets]
    mixed = Mixture([part.train for part in parts], weights)
    collate: Collate | None = parts[0].collate
    if any(part.collate != collate for part in parts):
        raise DataError(
            "the data sets of a mixture are collated in several ways; give all the same 'collate', or none."
        )
    held_out = [part.held_out for part in parts if part.held_out is not None]
    evaluated = Mixture(held_out, [1] * len(held_out)) if held_out else None
    return Data(mixed, evaluated, collate, parts[0].codec)


def _named(given: Any) -> str:
    return ", ".join(given) if isinstance(given, Mapping) else "a list"


def _whole(weights: Sequence[float]) -> tuple[int, ...]:
    """As whole numbers, in the same proportions."""
    for weight in weights:
        if not (isinstance(weight, (int, float)) and math.isfinite(weight) and weight > 0):
            raise DataError(
                f"a weight of a mixture is {weight!r}; it must be a number above 0, or the set be left out."
            )
    exact = [Fraction(str(weight)) for weight in weights]
    scale = math.lcm(*(each.denominator for each in exact))
    whole = [int(each * scale) for each in exact]
    if min(whole) * BLOCK < sum(whole):
        least = weights[whole.index(min(whole))]
        raise DataError(
            f"a weight of a mixture is {least!r}, less than 1 in {BLOCK:,} of all, {sum(weights):g}; leave that data "
            f"set out, or give it more."
        )
    return tuple(whole)


@dataclass(frozen=True)
class MixedCursor(Cursor):
    """A cursor whose steps draw from several data sets, of these `lengths` and `groups_of`, by `weights`. All batches
    are whole.
    """

    lengths: tuple[int, ...] = ()
    weights: tuple[int, ...] = ()
    groups_of: tuple[Groups | None, ...] = ()

    @cached_property
    def steps_per_epoch(self) -> int:
        """Steps that draw at most as many samples as there are."""
        return self.samples // self.batch

    def _span(self, step: int) -> range:
        return range(step * self.batch, (step + 1) * self.batch)

    def _take(self, step: int, span: range) -> Tensor:
        sets = tuple(zip(self.lengths, self.groups_of, strict=True))
        return over_blocks(span, lambda block: _block(sets, self.weights, self.seed, self.order, block))


@lru_cache(maxsize=KEPT)
def _block(
    of_sets: tuple[tuple[int, Groups | None], ...], weights: tuple[int, ...], seed: int, order: OrderKind, block: int
) -> Tensor:
    """Which samples are drawn in a block of places ([BLOCK], int64)."""
    begun, ended = (_drawn(weights, each * BLOCK) for each in (block, block + 1))
    counts = [after - before for before, after in zip(begun, ended, strict=True)]
    sets = np.repeat(np.arange(len(of_sets)), counts)[permuted(np.arange(BLOCK), BLOCK, keys(seed, block, "mixture"))]
    found = np.empty(BLOCK, dtype=np.int64)
    offset = 0
    for place, ((length, groups), before, after) in enumerate(zip(of_sets, begun, ended, strict=True)):
        drawn = _epochs(length, groups, key(seed, "mixture", place), order, range(before, after))
        found[sets == place] = offset + drawn.numpy()
        offset += length
    return torch.from_numpy(found)


def _drawn(weights: tuple[int, ...], places: int) -> list[int]:
    """How many of so many first places each data set has. They add up; each has its share, within one."""
    edges = [edge * places // sum(weights) for edge in itertools.accumulate(weights, initial=0)]
    return [after - before for before, after in itertools.pairwise(edges)]


def _epochs(length: int, groups: Groups | None, seed: int, order: OrderKind, draws: range) -> Tensor:
    """The samples of a data set at these draws from it, counted over its epochs."""
    parts = [torch.empty(0, dtype=torch.int64)]
    for epoch in range(draws.start // length, -(-draws.stop // length)):
        start, stop = max(draws.start, epoch * length), min(draws.stop, (epoch + 1) * length)
        parts.append(take(order, length, seed, epoch, range(start - epoch * length, stop - epoch * length), groups))
    return torch.cat(parts)


def cursor_over(samples: MapStyle, **fields: Any) -> Cursor:
    """The cursor over a data set, with the fields of `Cursor` but `samples`."""
    if isinstance(samples, Weighted):
        if isinstance(samples.samples, Mixture):
            raise DataError("a mixture has weights of its own; draw by weight, or mix, but not one within the other.")
        return WeightedCursor(samples=samples.draws, weighted=samples, **fields)
    if isinstance(samples, Mixture):
        groups = tuple(map(_groups_of, samples.sets))
        return MixedCursor(
            samples=len(samples), lengths=samples.lengths, weights=samples.weights, groups_of=groups, **fields
        )
    return Cursor(samples=len(samples), groups=_groups_of(samples), **fields)


def _groups_of(samples: MapStyle) -> Groups | None:
    groups = getattr(samples, "groups", None)
    return groups if isinstance(groups, Groups) else None
