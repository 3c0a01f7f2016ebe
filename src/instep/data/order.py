"""In which order the samples of an epoch come: a function of (seed, epoch, place), computed where it is asked for."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from instep.randomness import key

OrderKind = Literal["keyed", "permutation"]

Keys = tuple[tuple[np.uint64, np.uint64], ...]

BLOCK = 4096
"""Places of an epoch whose samples are computed together."""

KEPT = 64
"""Blocks that are kept, of 32 KiB each."""

_ROUNDS = 8
"""With fewer, some orders of 5 samples come more often than others."""


class Groups:
    """Samples that are had together, such as those of a row group, one group after the other.

    In the order "keyed" an epoch goes through the groups in an order at random, and through the samples of `together`
    of them in one. sizes: of each group ([groups]). It holds 16 bytes a group, and 16 for each of two epochs.
    """

    def __init__(self, sizes: NDArray[np.int64], together: int) -> None:
        self.sizes, self.together = sizes[sizes > 0], together
        self.starts = np.cumsum(self.sizes) - self.sizes


def take(kind: OrderKind, samples: int, seed: int, epoch: int, places: range, groups: Groups | None = None) -> Tensor:
    """Indices of the samples at these `places` of an epoch ([places], int64); of all places, each of 0 to `samples` - 1
    once.

    "permutation" holds the epoch, 8 bytes a sample, drawn by `torch.randperm`; "keyed" computes each place, and holds
    some blocks.
    """
    if kind == "permutation":
        return _permutation(samples, seed, epoch)[places.start : places.stop]
    if groups is not None:
        return over_blocks(places, lambda block: _block_of_groups(groups, samples, seed, epoch, block))
    return over_blocks(places, lambda block: _block(samples, seed, epoch, block))


def over_blocks(places: range, block_of: Callable[[int], Tensor]) -> Tensor:
    """What is at these `places` ([places], int64), of blocks that have what is at `BLOCK` of them each."""
    if not places:
        return torch.empty(0, dtype=torch.int64)
    first, last = places.start // BLOCK, (places.stop - 1) // BLOCK
    blocks = [block_of(block) for block in range(first, last + 1)]
    whole = blocks[0] if len(blocks) == 1 else torch.cat(blocks)
    return whole[places.start - first * BLOCK : places.stop - first * BLOCK]


@lru_cache(maxsize=1)  # of the current epoch
def _permutation(samples: int, seed: int, epoch: int) -> Tensor:
    generator = torch.Generator().manual_seed(key(seed, epoch, "order"))
    return torch.randperm(samples, generator=generator)


@lru_cache(maxsize=KEPT)  # of a step, and of the next one, which is loaded ahead; in a simulation of all workers' steps
def _block(samples: int, seed: int, epoch: int, block: int) -> Tensor:
    places = np.arange(block * BLOCK, min((block + 1) * BLOCK, samples))
    return torch.from_numpy(permuted(places, samples, keys(seed, epoch, "order")))


@lru_cache(maxsize=KEPT)
def _block_of_groups(groups: Groups, samples: int, seed: int, epoch: int, block: int) -> Tensor:
    order, ends = _order_of_groups(groups, seed, epoch)
    edges = ends[groups.together - 1 :: groups.together]  # where the samples that are mixed end
    place, stop = block * BLOCK, min((block + 1) * BLOCK, samples)
    parts = []
    while place < stop:
        mixed = int(np.searchsorted(edges, place, side="right"))
        begun, ended = (int(edges[each]) if 0 <= each < len(edges) else samples for each in (mixed - 1, mixed))
        begun = begun if mixed else 0
        upto = min(stop, ended)
        mixing = keys(key(seed, epoch, "groups"), mixed, "in groups")
        parts.append(begun + permuted(np.arange(place - begun, upto - begun), ended - begun, mixing))
        place = upto
    places = np.concatenate(parts)
    within = np.searchsorted(ends, places, side="right")
    group = order[within]
    return torch.from_numpy(groups.starts[group] + places - (ends[within] - groups.sizes[group]))


@lru_cache(maxsize=2)  # of this epoch, and of the next one, which is loaded ahead
def _order_of_groups(groups: Groups, seed: int, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which groups come one after the other in an epoch, and where each of them ends."""
    count = len(groups.sizes)
    order = permuted(np.arange(count), count, keys(seed, epoch, "groups"))
    return order, np.cumsum(groups.sizes[order])


def hashed(numbers: NDArray[np.int64], key: np.uint64) -> NDArray[np.uint64]:
    """64 bits for each number, which depend on it and the key alone; those that SplitMix64 gives."""
    return _mixed(numbers.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + key)


@lru_cache(maxsize=8)
def keys(seed: int, number: int, what: str) -> Keys:
    """For `permuted`: one permutation for each seed and number of `what`."""
    return tuple(
        (np.uint64(key(seed, number, what, each, "low")), np.uint64(key(seed, number, what, each, "high")))
        for each in range(_ROUNDS)
    )


def permuted(places: NDArray[np.int64], samples: int, keys: Keys) -> NDArray[np.int64]:
    """A permutation of 0 to `samples` - 1, at these places.

    A Feistel network permutes the numbers of so many bits, and what falls outside goes through it again until it is
    inside (cycle walking; Black and Rogaway, "Ciphers with arbitrary finite domains", 2002). Its halves differ by a bit
    where the bits are odd, so that at most every second number is outside. The round function is SplitMix64's (Steele,
    Lea and Flood, 2014).
    """
    bits = max(2, (samples - 1).bit_length())
    shift = np.uint64(bits // 2)
    low_mask, high_mask = np.uint64((1 << bits // 2) - 1), np.uint64((1 << bits - bits // 2) - 1)
    found, outside = places.astype(np.uint64), np.arange(len(places))
    while len(outside):
        low, high = found[outside] & low_mask, found[outside] >> shift
        for low_key, high_key in keys:
            low ^= _mixed(high + low_key) & low_mask
            high ^= _mixed(low + high_key) & high_mask
        found[outside] = high << shift | low
        outside = outside[found[outside] >= samples]
    return found.astype(np.int64)


def _mixed(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    numbers = (numbers ^ numbers >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ numbers >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return numbers ^ numbers >> np.uint64(31)
