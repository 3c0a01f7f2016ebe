"""Checkpoints that are thinned: the last three stay and, for each power of two back, one that was there."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from hypothesis import given
from hypothesis import strategies as st

from instep.record import best, checkpoint
from instep.record.thinning import superfluous


def saved_one_after_the_other(versions: Iterable[int]) -> Iterable[tuple[list[int], list[int]]]:
    """After each save, what was ever saved and what is kept."""
    ever, kept = list[int](), list[int]()
    for version in versions:
        ever.append(version)
        kept.append(version)
        for gone in superfluous(kept, "thinned"):
            kept.remove(gone)
        yield ever, kept


def that_far_back(versions: list[int], last: int, power: int) -> list[int]:
    return [version for version in versions if power <= last - version < 2 * power]


@given(gaps=st.lists(st.one_of(st.integers(1, 3), st.integers(1, 300)), min_size=1, max_size=60))
def test_after_any_saves_the_last_three_and_one_or_two_for_each_power_of_two_back_are_kept(gaps: list[int]) -> None:
    versions = [sum(gaps[: count + 1]) for count in range(len(gaps))]
    for ever, kept in saved_one_after_the_other(versions):
        last = ever[-1]
        assert kept[-3:] == ever[-3:]
        for power in (1 << bit for bit in range((last - ever[0]).bit_length())):
            there = that_far_back(kept, last, power)
            assert bool(there) == bool(that_far_back(ever, last, power)), f"{power} back of {last}"
            assert len(set(there) - set(kept[-3:])) <= 2


def test_of_a_thousand_saves_twelve_are_kept() -> None:
    *_, (_, kept) = saved_one_after_the_other(range(1, 1001))
    assert kept == [1, 513, 769, 897, 961, 977, 989, 993, 997, 998, 999, 1000]


def test_saving_thins_and_leaves_the_best_and_what_is_newer(tmp_path: Path) -> None:
    def save(version: int) -> None:
        state = {"w": torch.full((3,), float(version))}
        checkpoint.save(
            tmp_path, version=version, model_state=state, training_state={}, meta={}, fingerprint="f", keep="thinned"
        )

    save(100)  # of a history that is taken back
    save(2)
    best.mark(tmp_path, 2, 0.5)
    for version in range(1, 21):
        save(version)
    *_, (_, kept) = saved_one_after_the_other(range(1, 21))
    expected = sorted({*kept, 2, 100})
    assert 2 not in kept
    assert [path.name for path in checkpoint.all_in(tmp_path)] == [f"step-{version:08d}" for version in expected]
