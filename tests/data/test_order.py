"""Properties of the order in which an epoch's samples come."""

import hashlib
import itertools
import math
import tracemalloc
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from instep.data import order
from instep.data.cursor import Cursor
from instep.data.order import BLOCK, Groups, take

pytestmark = pytest.mark.pure

MASK = (1 << 64) - 1


def plain(samples, seed, epoch, place):
    """The keyed order, a place at a time, with Python's integers: slow and obvious."""

    def round_key(number, half):
        text = f"{seed}/{epoch}/order/{number}/{half}".encode()
        return int.from_bytes(hashlib.sha256(text).digest()[:8], "little") >> 1

    def mixed(number):
        number = (number ^ number >> 30) * 0xBF58476D1CE4E5B9 & MASK
        number = (number ^ number >> 27) * 0x94D049BB133111EB & MASK
        return number ^ number >> 31

    bits = max(2, (samples - 1).bit_length())
    narrow, wide = bits // 2, bits - bits // 2
    while True:
        low, high = place % 2**narrow, place >> narrow
        for number in range(8):
            low ^= mixed(high + round_key(number, "low") & MASK) % 2**narrow
            high ^= mixed(low + round_key(number, "high") & MASK) % 2**wide
        place = high << narrow | low
        if place < samples:
            return place


@given(st.integers(1, 3 * BLOCK), st.integers(0, 2**40), st.integers(0, 3), st.sampled_from(["keyed", "permutation"]))
def test_the_places_of_an_epoch_have_each_sample_once(samples, seed, epoch, kind):
    assert sorted(take(kind, samples, seed, epoch, range(samples)).tolist()) == list(range(samples))


@given(st.integers(1, 2**45), st.integers(0, 2**40), st.integers(0, 3), st.data())
def test_the_keyed_order_is_the_slow_obvious_one_at_any_size_and_place(samples, seed, epoch, data):
    start = data.draw(st.integers(0, samples))
    places = range(start, min(samples, start + 20))
    found = take("keyed", samples, seed, epoch, places)
    assert found.tolist() == [plain(samples, seed, epoch, place) for place in places]
    assert found.dtype == torch.int64


@given(st.data())
def test_a_span_over_blocks_is_what_its_places_are_alone(data):
    samples = 3 * BLOCK + data.draw(st.integers(0, 5))
    start = data.draw(st.integers(BLOCK - 3, 2 * BLOCK + 3))
    places = range(start, data.draw(st.integers(start, samples)))
    whole = take("keyed", samples, 7, 1, range(samples))
    assert take("keyed", samples, 7, 1, places).tolist() == whole[start : places.stop].tolist()


def test_the_keyed_order_is_what_it_was():
    """A change here changes the digest of every run."""
    assert take("keyed", 10, 7, 3, range(10)).tolist() == [0, 5, 1, 8, 9, 4, 6, 7, 2, 3]
    assert Cursor(10**9, 4, 2, 0).indices(5 * 10**8) == [975156403, 225072730, 797450137, 692801121]


def test_every_order_of_a_few_samples_comes_about_as_often():
    seeds, orders = 6000, list(itertools.permutations(range(5)))
    counts = Counter(tuple(take("keyed", 5, seed, 0, range(5)).tolist()) for seed in range(seeds))
    expected = seeds / len(orders)
    chi_square = sum((counts[each] - expected) ** 2 / expected for each in orders)
    free = len(orders) - 1
    assert abs(chi_square - free) < 5 * math.sqrt(2 * free)


def test_a_start_of_an_epoch_of_a_thousand_million_samples_takes_no_memory_by_sample():
    order._block.cache_clear()
    tracemalloc.start()
    cursor = Cursor(samples=10**9, batch=64, microbatches=16, seed=0)
    indices = cursor.indices(3 * cursor.steps_per_epoch)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(set(indices)) == 64
    assert max(indices) > 10**8
    assert peak < 10 << 20


# --- groups ---------------------------------------------------------------------------------------------------------

SIZES = st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(any)


@given(SIZES, st.integers(1, 4), st.integers(0, 2**40), st.integers(0, 3), st.data())
def test_an_epoch_goes_through_groups_at_random_and_mixes_so_many_at_a_time(sizes, together, seed, epoch, data):
    groups, samples = Groups(np.array(sizes), together), sum(sizes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order, "BLOCK", data.draw(st.integers(1, 50)))
        order._block_of_groups.cache_clear()
        whole = take("keyed", samples, seed, epoch, range(samples), groups).tolist()
        start = data.draw(st.integers(0, samples))
        part = range(start, data.draw(st.integers(start, samples)))
        assert take("keyed", samples, seed, epoch, part, groups).tolist() == whole[part.start : part.stop]
        order._block_of_groups.cache_clear()
    assert sorted(whole) == list(range(samples))
    group_of = np.repeat(np.arange(len(sizes)), sizes)[whole].tolist()
    while group_of:
        mixed = list(dict.fromkeys(group_of))[:together]
        here = sum(sizes[group] for group in mixed)
        assert set(group_of[:here]) == set(mixed)
        group_of = group_of[here:]


def test_groups_and_what_is_in_them_come_in_another_order_each_epoch():
    groups = Groups(np.full(50, 40), 2)
    epochs = [take("keyed", 2000, 0, epoch, range(2000), groups) for epoch in range(3)]
    firsts = {tuple((each // 40).unique_consecutive()[:1].tolist()) for each in epochs}
    assert len(firsts) > 1
    inside = [each[:80].sort().indices.tolist() for each in epochs]
    assert inside[0] != inside[1]
    together = (epochs[0][:80] // 40).tolist()
    assert 20 < sum(one != other for one, other in itertools.pairwise(together)) < 60


def test_the_order_by_groups_is_what_it_was():
    """A change here changes the digest of every run on Parquet files."""
    assert take("keyed", 20, 3, 1, range(12), Groups(np.array([5, 9, 6]), 2)).tolist() == [
        11, 12, 5, 0, 9, 1, 4, 7, 2, 6, 10, 13,
    ]  # fmt: skip
