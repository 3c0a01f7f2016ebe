"""Samples that depend on more than their index and the seeded generators are refused before the first step."""

from __future__ import annotations

import dataclasses
import functools
import random
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import Subset, TensorDataset, default_collate

from instep.data import Data, as_data, repeats
from instep.data.cursor import Cursor
from instep.data.repeats import check_repeats
from instep.data.signature import signature
from instep.errors import CheckpointError, DataError
from instep.offline.cluster import Cluster
from instep.offline.simulation import simulate
from instep.randomness import seed_all
from instep.recipe import Recipe, Team
from support.harness import train_here
from support.serving import replayed

# ------------------------------------------------------------------------------------------------------------ signature


def nan(payload: int) -> float:
    value: float = struct.unpack("<d", struct.pack("<Q", 0x7FF8000000000000 | payload))[0]
    return value


@dataclasses.dataclass
class Row:
    x: Any
    name: str = "a"


class Slotted:
    __slots__ = ("x",)

    def __init__(self, x: Any):
        self.x = x


def values() -> list[Any]:
    """Each differs from all others, and is made anew at each call."""
    odd = Image.new("RGB", (3, 2))
    odd.putpixel((0, 0), (0, 0, 1))
    return [
        None, 0, 1, True, 0.0, -0.0, nan(1), nan(2), float("inf"), "", "\ud800", b"", [], (), {}, set(), [1, 2], [2, 1],
        (1, 2), [1, [2]], {"a": 1, "b": 2}, {"b": 2, "a": 1}, {1, 2}, {1, 3}, frozenset({1}), 10**30, 1j,
        torch.zeros(2), torch.zeros(2, 1), torch.zeros(2, dtype=torch.float64), torch.zeros(0), torch.tensor([0, -0.0]),
        torch.tensor([nan(1)], dtype=torch.float64), torch.tensor([nan(2)], dtype=torch.float64), torch.zeros(()),
        torch.eye(2).to_sparse(), torch.eye(2).to_sparse_csr(), torch.eye(2).to_sparse_csc(), torch.eye(2),
        torch.ones(2, dtype=torch.bfloat16), torch.ones(2, dtype=torch.complex64), torch.ones(2).requires_grad_() * 3,
        torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], layout=torch.jagged),
        pack_sequence([torch.zeros(3), torch.zeros(2)]), pack_sequence([torch.zeros(4), torch.zeros(1)]),
        np.zeros(2), np.float32(0), np.array([1, "a", None], dtype=object), np.array(["a"]), np.datetime64("2020"),
        Row(1), Row(2), Row(torch.zeros(1)), Slotted(1), Slotted(2), Image.new("RGB", (3, 2)), odd, Path("a"), int, len,
    ]  # fmt: skip


def test_signatures_are_of_what_a_value_holds_bit_by_bit() -> None:
    first, again = ([signature(value) for value in values()] for _ in range(2))
    assert first == again
    assert len(set(first)) == len(first)


def test_what_holds_itself_is_deep_or_cannot_be_pickled_has_a_signature() -> None:
    def holding() -> list[Any]:
        found: list[Any] = [1]
        found.append(found)
        return found

    assert signature(holding()) == signature(holding())
    deep = functools.reduce(lambda inner, _: [inner], range(5000), [])
    assert signature(deep) == signature(deep)
    assert signature(sys.stdout) == signature(sys.stdout)
    assert signature(i for i in range(3)) == signature(i for i in range(4))


# ---------------------------------------------------------------------------------------------------------- samples


class Points:
    """20 samples, each with what `draw` gives added."""

    def __init__(self, draw: Any = lambda: 0.0):
        self.draw = draw
        self.reads = 0

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.reads += 1
        return torch.arange(4.0) + index + self.draw(), index % 2


class Together(Points):
    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [self[index] for index in indices]


class Cached(Points):
    @functools.cache  # noqa: B019
    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return super().__getitem__(index)


class Holding(Points):
    """With a generator of its own, somewhere inside."""

    def __init__(self, generator: Any):
        super().__init__()
        self.transform = [nn.Identity(), {"by": Row(generator)}]
        self.unused = np.random.default_rng(1)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        x, y = super().__getitem__(index)
        generator = self.transform[1]["by"].x  # type: ignore[index]
        if isinstance(generator, torch.Generator):
            return x + torch.rand((), generator=generator), y
        return x + (generator.rand() if isinstance(generator, np.random.RandomState) else generator.random()), y


class Counting(Points):
    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        x, y = super().__getitem__(index)
        return x + self.reads, y


class Streaming(Points):
    def __init__(self) -> None:
        super().__init__()
        self.numbers = iter(range(10**6))

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.full((4,), next(self.numbers)), 0


class Beyond(Points):
    """Random but for the samples of the first microbatch."""

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        first = Cursor(20, 8, 4, 0).microbatch(0, 0)
        return super().__getitem__(index) if index in first else (torch.full((4,), np.random.default_rng().random()), 0)


class Broken(Points):
    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index not in Cursor(20, 8, 4, 0).microbatch(0, 0):
            raise OSError("this sample is on no disk")
        return super().__getitem__(index)


def look(data: Any) -> str:
    return check_repeats(as_data(data), Cursor(20, 8, 4, 0), 0)[1]


def seeded() -> float:
    return random.random() + float(np.random.rand()) + float(torch.rand(()))


def rotated(samples: list[Any]) -> Any:
    x, y = default_collate(samples)
    return x.roll(random.randrange(4), 1), y


@pytest.mark.parametrize(
    "data",
    [
        Points(), Points(seeded), Together(seeded), Cached(), Cached(seeded), Points(lambda: float("nan")), Broken(),
        Subset(Points(seeded), range(20)), [float("nan")] * 20, [str(i) for i in range(20)], torch.zeros(20, 2),
        TensorDataset(torch.zeros(20, 2)), Data(Points(seeded), Points(seeded), rotated),
        Data(values()[:20], collate=list), Data([Image.new("L", (2, 2), i) for i in range(20)], collate=list),
        Data([Row(i) for i in range(20)], collate=tuple),
        Data([torch.zeros(i + 1) for i in range(20)], None, functools.partial(pack_sequence, enforce_sorted=False)),
    ],
)  # fmt: skip
def test_samples_that_repeat_pass_and_leave_no_trace(data: Any) -> None:
    seed_all(7)
    expected = seeded()
    seed_all(7)
    assert look(data) == ""
    assert seeded() == expected


FIRST = Cursor(20, 8, 4, 0).indices(0)[0]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (Holding(np.random.default_rng(0)), "set Holding gives .* of its own \\('transform.1.by.x', of numpy\\)"),
        (Holding(np.random.RandomState(0)), "set Holding gives .* of its own \\('transform.1.by.x', of numpy\\)"),
        (Holding(random.Random(0)), "set Holding gives .* of its own \\('transform.1.by.x', of random\\)"),
        (Holding(torch.Generator()), "set Holding gives .* of its own \\('transform.1.by.x', of torch\\)"),
        (Subset(Holding(random.Random(0)), range(20)), "Subset gives .*\\('dataset.transform.1.by.x', of random\\)"),
        (
            Points(lambda: np.random.default_rng().random()),
            f"set Points gives another sample {FIRST} .* draws from elsewhere",
        ),
        (
            Together(lambda: np.random.default_rng().random()),
            f"set Together gives another sample {FIRST} .* from elsewhere",
        ),
        (Counting(), f"set Counting gives another sample {FIRST} .* it keeps state"),
        (Streaming(), f"set Streaming gives another sample {FIRST} .* it keeps state"),
        (Beyond(), "set Beyond gives another sample "),
        ((Points(), Counting()), "set Counting gives another sample 0 "),
        ((torch.zeros(20, 2), Counting()), "set Counting gives another sample 0 "),
    ],
)
def test_a_data_set_whose_samples_do_not_repeat_is_named(data: Any, words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        look(data)
    assert "draw from torch's, numpy's or Python's global generators" in str(caught.value)


def noisy(rng: Any, samples: list[Any]) -> Any:
    x, y = default_collate(samples)
    return x + rng.random(), y


def doubling(samples: list[Any]) -> Any:
    for x, _ in samples:
        x.mul_(2)
    return default_collate(samples)


def closed(rng: Any) -> Any:
    def collate(samples: list[Any]) -> Any:
        return noisy(rng, samples)

    return collate


@pytest.mark.parametrize(
    ("collate", "words"),
    [
        (
            functools.partial(noisy, random.Random(0)),
            "function partial gives another batch .*\\('args.0', of random\\)",
        ),
        (closed(np.random.default_rng(0)), "function closed.<locals>.collate gives another batch .*\\('rng', of numpy"),
        (
            lambda samples: (*default_collate(samples), np.random.default_rng().random()),
            "function <lambda> gives another batch .* elsewh",
        ),
    ],
)
@pytest.mark.parametrize("samples", [Points(), TensorDataset(torch.zeros(20, 4), torch.zeros(20))])
def test_a_collate_function_that_does_not_repeat_is_named(collate: Any, words: str, samples: Any) -> None:
    with pytest.raises(DataError, match=f"the collate {words}"):
        look(Data(samples, collate=collate))


def test_a_batch_changed_by_its_next_reading_is_seen_as_it_was() -> None:
    """A cached sample that the collate function changes in place."""
    with pytest.raises(DataError, match="the collate function doubling|the data set Cached"):
        look(Data(Cached(), collate=doubling))


def test_few_samples_are_read_and_fewer_where_they_are_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = Points()
    assert look(samples) == ""
    assert samples.reads == 2 * (2 + repeats.DRAWN)
    monkeypatch.setattr(repeats, "SLOW_S", 0.0)
    slow = Points()
    assert "only 2 were read twice" in look((slow, Points()))
    assert slow.reads == 2 * 2


# --------------------------------------------------------------------------------------------------------------- runs


def mse(model: nn.Module, batch: Any) -> Tensor:
    return F.mse_loss(model(batch[0]).squeeze(1), batch[1].float(), reduction="sum")


def recipe(data: Any, **changes: Any) -> Recipe:
    fields: dict[str, Any] = {
        "model": lambda: nn.Linear(4, 1), "objective": mse, "data": data, "batch": 8, "microbatches": 4, "steps": 4,
        "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=1e-3),
    }  # fmt: skip
    return Recipe(**{**fields, **changes})


@pytest.mark.processes
@pytest.mark.parametrize("team", [Team(workers=1), Team(workers=2), Team(workers=3), Team(workers=2, engine="server")])
def test_a_run_on_samples_that_do_not_repeat_is_refused_before_its_first_step(team: Team, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the data set Holding gives another sample"):
        train_here(recipe(lambda: Holding(random.Random(0))), team, tmp_path / "run")


@pytest.mark.processes
def test_a_simulation_on_samples_that_do_not_repeat_is_refused() -> None:
    given = recipe(lambda: Holding(random.Random(0)))
    with pytest.raises(DataError, match="the data set Holding gives another sample"):
        simulate(given, Cluster(workers=2), True, None, lambda event: None)
    simulate(given, Cluster(workers=2), False, None, lambda event: None)  # it looks at no sample's content


@pytest.mark.processes
def test_samples_drawn_from_seeded_generators_give_one_digest(tmp_path: Path) -> None:
    given = recipe(lambda: Data(Together(seeded), Points(seeded), rotated))
    runs = [train_here(given, Team(workers=w), tmp_path / str(w)) for w in (1, 2, 3)]
    served = train_here(given, Team(workers=2, engine="server"), tmp_path / "served")
    assert len({run.digest for run in [*runs, served]}) == 1
    longer = dataclasses.replace(given, steps=6)
    resumed = train_here(longer, Team(workers=2), tmp_path / "3", resume=True)
    assert resumed.digest == train_here(longer, Team(workers=1), tmp_path / "longer").digest


@pytest.mark.processes
def test_slow_samples_are_told_of_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeats, "SLOW_S", 0.0)
    run = train_here(recipe(Points), Team(workers=2), tmp_path / "run")
    told = [event["why"] for event in run.events if event["kind"] == "warned" and "read twice" in event["why"]]
    assert len(told) == 1
    assert "a sample of the data set Points takes" in told[0]


@pytest.mark.processes
@pytest.mark.parametrize("team", [Team(workers=1), Team(workers=2)])
def test_a_resume_of_a_run_whose_samples_do_not_repeat_says_so(
    team: Team, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a run was begun before they were looked at, or the first look has missed it."""
    given = recipe(lambda: Counting())
    monkeypatch.setattr("instep.worker.first_look.check_repeats", lambda *_: (None, ""))
    train_here(given, team, tmp_path / "run")
    monkeypatch.undo()
    with pytest.raises(
        CheckpointError, match="cannot be told from others: the data set Counting gives another sample 0"
    ):
        train_here(dataclasses.replace(given, steps=6), team, tmp_path / "run", resume=True)
    other = recipe(lambda: TensorDataset(torch.ones(20, 4), torch.ones(20)), steps=6)
    with pytest.raises(CheckpointError, match="or other content; give back those"):
        train_here(other, team, tmp_path / "run", resume=True)


class Labelled(Counting):
    digest = "the same"


@pytest.mark.processes
def test_a_replay_that_parts_from_such_a_run_names_the_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = recipe(Labelled, rule="asynchronous")
    monkeypatch.setattr("instep.worker.first_look.check_repeats", lambda *_: (None, ""))
    run = train_here(given, Team(workers=2), tmp_path / "run")
    found = replayed(given, run.path)
    assert "is another one here than in the run" in found.divergence
    assert "The data set Labelled gives another sample 0 when asked again" in found.divergence
