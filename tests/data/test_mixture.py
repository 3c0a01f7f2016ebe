"""Mixtures of data sets: each by its weight, and each of its samples once in each of its own epochs."""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, TensorDataset

import instep.data as data_module
from instep import Recipe, Team
from instep.components import Component
from instep.data import Data, digest, mixture
from instep.data.mixture import Mixture, cursor_over
from instep.data.order import BLOCK, take
from instep.errors import DataError
from instep.randomness import key
from instep.worker import sample_reader
from support.harness import train_here


class Numbers(Dataset[Tensor]):
    """`count` samples of 8 numbers, each its own place above `first`."""

    def __init__(self, count: int, first: int = 0) -> None:
        self.count, self.first = count, first

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        if not 0 <= index < self.count:
            raise IndexError(index)
        return torch.full((8,), float(self.first + index))


def cursor_of(lengths: list[int], weights: list[float], batch: int = 4, seed: int = 0) -> Any:
    mixed = Mixture([Numbers(count) for count in lengths], weights)
    return cursor_over(mixed, batch=batch, microbatches=1, seed=seed)


@st.composite
def mixtures(draw: Any) -> Any:
    lengths = draw(st.lists(st.integers(1, 6000), min_size=1, max_size=4))
    weights = draw(st.lists(st.integers(1, 50), min_size=len(lengths), max_size=len(lengths)))
    return lengths, weights, draw(st.integers(0, 2**40))


@pytest.mark.pure
@settings(max_examples=25)
@given(mixtures(), st.integers(1, 4))
def test_each_data_set_has_its_share_and_each_of_its_samples_once_in_each_of_its_own_epochs(
    given_mixture: Any, blocks: int
) -> None:
    lengths, weights, seed = given_mixture
    cursor = cursor_of(lengths, weights, batch=1, seed=seed)
    cursor = dataclasses.replace(cursor, samples=max(BLOCK, sum(lengths)), batch=BLOCK)
    drawn = torch.cat([cursor.microbatch_tensor(step, 0) for step in range(blocks)])
    start = 0
    for place, (length, weight) in enumerate(zip(lengths, weights, strict=True)):
        own = (drawn[(drawn >= start) & (drawn < start + length)] - start).tolist()
        assert abs(len(own) - Fraction(weight, sum(weights)) * len(drawn)) < 1
        for epoch in range(-(-len(own) // length)):
            part = own[epoch * length : (epoch + 1) * length]
            whole = take("keyed", length, key(seed, "mixture", place), epoch, range(length)).tolist()
            assert part == whole[: len(part)]
        start += length


@pytest.mark.pure
def test_the_data_sets_are_mixed_within_few_draws() -> None:
    cursor = cursor_of([4000, 4000], [3, 1], batch=400)
    for step in range(20):
        first = sum(index < 4000 for index in cursor.indices(step))
        assert 240 < first < 360  # 300 in the mean; six standard deviations are 52


@pytest.mark.pure
def test_steps_go_on_over_the_length_of_the_mixture_and_are_whole() -> None:
    cursor = cursor_of([5, 8], [1, 1], batch=4)
    assert [cursor.size(step) for step in range(50)] == [4] * 50
    assert [cursor.epoch(step) for step in range(7)] == [0, 0, 0, 1, 1, 1, 2]
    straight = [index for step in range(50) for index in cursor.indices(step)]
    other = dataclasses.replace(cursor, batch=8)
    assert [index for step in range(25) for index in other.indices(step)] == straight
    skipping = dataclasses.replace(cursor, skipped=frozenset({straight[0]}))
    assert [index for step in range(50) for index in skipping.indices(step)] == [
        index for index in straight if index != straight[0]
    ]


@pytest.mark.pure
def test_the_schedule_is_what_it_was() -> None:
    """A change here changes the digest of every run on a mixture."""
    assert cursor_of([50, 50], [2, 1], batch=12, seed=3).indices(100) == [37, 6, 8, 27, 28, 55, 68, 70, 66, 39, 46, 29]


@pytest.mark.pure
def test_samples_are_those_of_the_data_sets_however_they_are_asked_for() -> None:
    sets = [Numbers(3), Numbers(4, 100), Numbers(1, 200)]
    mixed, plain = Mixture(sets, [1, 1, 1]), ConcatDataset(sets)
    assert len(mixed) == len(plain) == 8
    for index in range(8):
        assert torch.equal(mixed[index], plain[index])
    wanted = [7, 0, 3, 3, 2, 6]
    assert all(map(torch.equal, mixed.__getitems__(wanted), [plain[index] for index in wanted]))
    for index in (-1, 8):
        with pytest.raises(IndexError, match="0 to 7"):
            mixed[index]


@pytest.mark.pure
def test_a_sample_that_the_system_refuses_once_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = [OSError("stale file handle")]

    class Refused(Numbers):
        def __getitem__(self, index: int) -> Tensor:
            if refused:
                raise refused.pop()
            return super().__getitem__(index)

    monkeypatch.setattr(sample_reader, "RETRY_S", 0.0)
    reader = sample_reader.SampleReader(None, retries=1)
    assert torch.equal(reader.read(Mixture([Refused(3)], [1]), [2], 0), Numbers(3)[2][None])
    assert "stale file handle" in reader.doubts()[0]


@pytest.mark.pure
def test_the_digest_covers_each_data_set_and_its_weight() -> None:
    def known(*sets: Any, first: float = 1) -> str:
        return digest(Data(Mixture(sets, [first, *[1] * (len(sets) - 1)])))

    texts = [Numbers(30), Numbers(40, 100)]
    assert known(*texts) == known(Numbers(30), Numbers(40, 100))
    assert len({known(*texts), known(*texts[::-1]), known(Numbers(30), Numbers(40, 101)), known(*texts, texts[0])}) == 4
    assert known(*texts, first=2) != known(*texts)


@pytest.mark.pure
@pytest.mark.parametrize(
    ("sets", "weights", "words"),
    [
        ([], [], "a mixture of 0 data sets has 0 weights"),
        ([Numbers(3)], [1, 2], "a mixture of 1 data sets has 2 weights"),
        ([Numbers(3), Numbers(3)], [1, 0], "a weight of a mixture is 0; it must be a number above 0"),
        ([Numbers(3), Numbers(3)], [1, float("nan")], "is nan; it must be a number above 0"),
        ([Numbers(3), Numbers(3)], [1, "2"], "is '2'; it must be a number above 0"),
        ([Numbers(3), Numbers(3)], [1, 1e-5], "is 1e-05, less than 1 in 4,096 of all"),
        ([Numbers(3), Numbers(0)], [1, 1], "is empty"),
        ([Numbers(3), 7], [1, 1], "of type int"),
        ({"a": Numbers(3)}, {"b": 1}, "the sets of a mixture are a, and its weights b; name both alike"),
        ({"a": Numbers(3)}, [1], "the sets of a mixture are a, and its weights a list; name both alike"),
        ([Data(Numbers(3), collate=len), Numbers(3)], [1, 1], "collated in several ways"),
    ],
)  # fmt: skip
def test_what_is_no_mixture_is_refused(sets: Any, weights: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        mixture.mixture(sets, weights)


@pytest.mark.pure
def test_a_mixture_of_a_recipe_file_has_what_its_sets_hold_out() -> None:
    texts = {"use": "instep.data.text:text_files", "args": {"pattern": __file__, "context": 8}}
    names = {"use": "instep.data.text:text_files", "args": {"pattern": mixture.__file__, "context": 8}}
    args = {"sets": {"texts": texts, "names": names}, "weights": {"names": 0.3, "texts": 0.7}}
    made = data_module.from_component(Component("instep.data.mixture:mixture", args))
    assert isinstance(made.train, Mixture)
    assert made.train.weights == (7, 3)
    assert isinstance(made.held_out, Mixture)
    assert len(made.held_out) == sum(map(len, made.held_out.sets)) > 0
    assert made.codec is not None


def squares(model: torch.nn.Module, batch: Any) -> Tensor:
    return (model(batch[0]) - batch[1]).square().sum()


def mixed_points() -> Data:
    generator = torch.Generator().manual_seed(0)
    sets = [TensorDataset(torch.randn(count, 3, generator=generator), torch.ones(count, 1)) for count in (30, 7)]
    return mixture.mixture(sets, [0.5, 0.5])


@pytest.mark.processes
def test_training_on_a_mixture_has_one_digest_for_any_number_of_workers_and_after_a_resume(tmp_path: Path) -> None:
    recipe = Recipe(
        model=lambda: torch.nn.Linear(3, 1), objective=squares, data=mixed_points, batch=8, microbatches=4, steps=12
    )
    alone = train_here(recipe, Team(), tmp_path / "1")
    assert train_here(recipe, Team(workers=3), tmp_path / "3").digest == alone.digest
    half = dataclasses.replace(recipe, steps=5)
    train_here(half, Team(workers=2), tmp_path / "half")
    assert train_here(recipe, Team(workers=1), tmp_path / "half", resume=True).digest == alone.digest
