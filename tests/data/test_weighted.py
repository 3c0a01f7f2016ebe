"""Draws by weight: each sample at most once an epoch, over epochs as often as its weight says, alike for any team."""

from __future__ import annotations

import hashlib
import itertools
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from instep import Team
from instep.data import Data, digest
from instep.data.mixture import Mixture, cursor_over
from instep.data.weighted import Weighted, logarithm, weighted
from instep.errors import DataError
from support.formats import SAMPLES, recipe, seen
from support.harness import train_here
from support.resuming import begin, go_on


class Numbers(torch.utils.data.Dataset[torch.Tensor]):
    """Each sample is its number."""

    def __init__(self, count: int = SAMPLES) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor(index)


@pytest.mark.pure
def test_an_epoch_draws_each_sample_at_most_once_and_never_one_without_weight() -> None:
    weights = np.arange(100) % 5
    samples = Weighted(Numbers(100), weights, 60)
    epochs = [samples.epoch(3, epoch).tolist() for epoch in range(50)]
    assert {len(set(drawn)) for drawn in epochs} == {60}
    assert all(weights[drawn].all() for drawn in epochs)
    assert len(set(map(tuple, epochs))) == 50
    assert pickle.loads(pickle.dumps(samples)).epoch(3, 7).tolist() == epochs[7]


@pytest.mark.pure
def test_every_pair_of_draws_comes_as_often_as_drawing_by_weight_without_replacement_has_it() -> None:
    weights = [1.0, 2.0, 5.0]
    samples = Weighted(Numbers(3), weights, 2)
    pairs = Counter(tuple(samples.epoch(0, epoch).tolist()) for epoch in range(4000))
    for first, second in itertools.permutations(range(3), 2):
        chance = weights[first] / 8 * weights[second] / (8 - weights[first])
        deviation = (4000 * chance * (1 - chance)) ** 0.5
        assert abs(pairs[first, second] - 4000 * chance) < 4 * deviation


@pytest.mark.pure
def test_the_draws_are_what_they_were() -> None:
    """A change here changes the digest of every run that draws by weight."""
    cursor = cursor_over(Weighted(Numbers(50), np.arange(1, 51), 20), batch=8, microbatches=2, seed=3)
    assert cursor.steps_per_epoch == 3
    assert [cursor.size(step) for step in range(4)] == [8, 8, 4, 8]
    assert cursor.indices(4) == [27, 33, 29, 36, 39, 45, 14, 41]


@pytest.mark.pure
def test_logarithms_are_what_they_were_and_close_to_those_of_numpy() -> None:
    """Any processor must give these bits."""
    numbers = np.concatenate([(np.arange(100_000) + 0.5) / 100_000, 0.5 ** np.arange(60), [0.7071, 0.70711]])
    found = logarithm(numbers)
    np.testing.assert_allclose(found, np.log(numbers), rtol=1e-15)
    assert hashlib.sha256(found.astype("<f8").tobytes()).hexdigest()[:16] == "4f2d2ca13807ae47"


@pytest.mark.pure
@pytest.mark.parametrize(
    ("weights", "draws", "options", "words"),
    [
        ([1, 2], 1, {}, r"the weights have the shape \[2\], and there are 3 samples"),
        ([1, -2, 1], 1, {}, "the weight of sample 1 is -2.0; weights are numbers from 0"),
        ([1, 2, float("nan")], 1, {}, "the weight of sample 2 is nan"),
        ([1, 0, 2], 3, {}, "an epoch is to draw 3 samples, each at most once, and 2 have a weight above 0"),
        ([1, 1, 2], 0, {}, "an epoch is to draw 0 samples"),
        ("/nowhere/a.npy", 1, {}, r"the weights cannot be read from /nowhere/a.npy \(FileNotFoundError"),
        ([1, 1, 1], 1, {"index_bytes": 47}, "holds 16 bytes a sample, 48 for 3 of them, and 'index_bytes' is 47; put"),
    ],
)
def test_bad_weights_are_said_in_one_sentence(weights: Any, draws: int, options: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        weighted(Numbers(3), weights, draws, **options)


@pytest.mark.pure
def test_the_digest_knows_weights_and_draws_and_a_mixture_refuses_what_has_weights_of_its_own(tmp_path: Path) -> None:
    np.save(tmp_path / "weights.npy", np.array([1.0, 2, 3]))
    rows = TensorDataset(torch.arange(3))
    by_file = weighted((rows, rows), str(tmp_path / "weights.npy"), 2)
    assert by_file.held_out is rows
    assert digest(Data(by_file.train)) == digest(weighted(rows, [1, 2, 3], 2))
    assert len({digest(weighted(rows, *given)) for given in (([1, 2, 3], 2), ([1, 2, 4], 2), ([1, 2, 3], 1))}) == 3
    for inner in (by_file.train, Mixture([rows], [1])):
        with pytest.raises(
            DataError, match="a mixture holds a (Weighted|Mixture), whose own weights it would not know"
        ):
            Mixture([rows, inner], [1, 1])
    with pytest.raises(DataError, match="a mixture has weights of its own"):
        cursor_over(Weighted(Mixture([rows], [1]), [1, 2, 3], 2), batch=1, microbatches=1, seed=0)


@pytest.mark.processes
def test_training_by_weight_has_one_digest_for_any_team_and_after_a_resume(tmp_path: Path) -> None:
    given = recipe(weighted(Numbers(), np.arange(SAMPLES) % 3, 30), steps=6)
    alone = train_here(given, Team(workers=1), tmp_path / "alone")
    begin(tmp_path / "stopped", given, Team(workers=3), 4)
    resumed = go_on(tmp_path / "stopped", given, Team(workers=2))
    assert alone.digest == resumed.digest
    assert seen(alone) == seen(resumed) <= {0, 1, 2}
