"""A worker that is alone and dies has a successor that goes on from memory, a few steps back, with the same bits."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from instep.errors import ResourceError
from instep.memory_file import memory_file
from instep.recipe import Recipe, Team
from instep.record import checkpoint
from instep.team import remembered
from instep.team.remembered import Remembered, Remembering
from support import workloads
from support.harness import Client, Outcome, train_here
from support.schedule_free import ScheduleFree
from support.serving import replayed

pytestmark = pytest.mark.processes

STEPS = 12


def killing(at: Mapping[int, int]) -> Client:
    """A client that kills the worker where it hears of version `at[n]`, in the n-th life of the worker."""
    pids: list[int] = []

    def see(event: dict[str, Any]) -> None:
        if event["kind"] == "joined":
            pids.append(event["pid"])
        if event["kind"] == "merged" and event["version"] == at.get(len(pids) - 1):
            os.kill(pids[-1], signal.SIGKILL)

    return Client(see)


def told(outcome: Outcome, kind: str, name: str = "version") -> list[Any]:
    return [event.get(name) for event in outcome.events if event["kind"] == kind]


def gpt(**changes: Any) -> Recipe:
    return workloads.gpt(**{"steps": STEPS, "evaluate_every": 0, **changes})


@pytest.fixture
def no_checkpoint_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> Any:
        raise AssertionError(f"{path} was loaded")

    monkeypatch.setattr(checkpoint, "load", refuse)


RECIPES: dict[str, Callable[[], Recipe]] = {
    "gpt": gpt,
    "buffers, channels_last and a parameter without a gradient": lambda: workloads.convnet(steps=STEPS),
    "weights that are averaged": lambda: gpt(optimizer=ScheduleFree),
}


@pytest.mark.usefixtures("no_checkpoint_is_loaded")
@pytest.mark.parametrize("name", RECIPES)
def test_a_worker_that_is_alone_goes_on_from_memory_and_does_at_most_so_many_steps_again(
    name: str, tmp_path: Path
) -> None:
    recipe = RECIPES[name]()
    lives = {0: 2, 1: 8, 2: 8, 3: 11}  # before the first copy; twice in a row; once more
    team = Team(workers=1, remember=3, restarts=4)
    outcome = train_here(recipe, team, tmp_path / "it", client=killing(lives))
    assert outcome.digest == train_here(recipe, Team(workers=1), tmp_path / "alone").digest
    assert told(outcome, "run_started") == [0, 0, 6, 6, 9]
    assert told(outcome, "run_started", "remembered") == [None, None, True, True, True]
    done = [*range(1, 3), *range(1, 9), 7, 8, *range(7, 12), *range(10, STEPS + 1)]
    assert told(outcome, "merged") == done
    assert outcome.result["restarts"] == 4


def dying_in_copy(number: int, folder: Path) -> Callable[[Any, int, Any], None]:
    """`Remembering._put`, in which the worker dies once its copy of this number, counted from 1, is begun."""
    put, died = Remembering._put, folder / "died"

    def dying(self: Remembering, file: int, tensors: Any) -> None:
        if self._mark + 1 == number and not died.exists():
            died.touch()
            os.pwrite(file, b"\xff" * (os.fstat(file).st_size - 64), 64)  # as it would be by half
            os.kill(os.getpid(), signal.SIGKILL)
        put(self, file, tensors)

    return dying


@pytest.mark.usefixtures("no_checkpoint_is_loaded")
def test_a_worker_that_dies_while_it_copies_its_state_goes_on_from_the_copy_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Remembering, "_put", dying_in_copy(3, tmp_path))
    outcome = train_here(gpt(), Team(workers=1, remember=3), tmp_path / "it")
    assert outcome.digest == train_here(gpt(), Team(workers=1), tmp_path / "alone").digest
    assert told(outcome, "run_started") == [0, 6]
    assert told(outcome, "merged") == [*range(1, 10), *range(7, STEPS + 1)]


@pytest.mark.usefixtures("no_checkpoint_is_loaded")
def test_a_run_goes_back_behind_no_checkpoint_and_its_tape_is_replayed_as_one_of_checkpoints(tmp_path: Path) -> None:
    recipe, team = gpt(evaluate_every=4), Team(workers=1, remember=5, checkpoint_every=4)
    outcome = train_here(recipe, team, tmp_path / "it", client=killing({0: 7, 1: 11}))
    alone = train_here(recipe, Team(workers=1, checkpoint_every=4), tmp_path / "alone")
    assert outcome.digest == alone.digest
    assert outcome.digests == alone.digests
    assert told(outcome, "run_started") == [0, 4, 8]
    assert told(outcome, "evaluated") == told(alone, "evaluated")
    assert replayed(recipe, outcome.path).same


def test_with_nothing_remembered_it_goes_back_to_its_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left(descriptor: int, regions: Any) -> None:
        raise ResourceError("there is no memory left.")

    team = Team(workers=1, remember=0, checkpoint_every=5)
    outcome = train_here(gpt(), team, tmp_path / "off", client=killing({0: 9}))
    assert told(outcome, "run_started") == [0, 5]
    assert told(outcome, "run_started", "remembered") == [None, None]
    monkeypatch.setattr(remembered, "reserve", none_left)
    team = Team(workers=1, remember=2, checkpoint_every=5)
    refused = train_here(gpt(), team, tmp_path / "refused", client=killing({0: 9}))
    assert told(refused, "run_started") == [0, 5]
    assert refused.digest == outcome.digest
    (why, again) = told(refused, "warned", "why")
    assert why == again
    assert why.startswith("nothing is remembered from here on (team.remember), for memory for a copy of its state, ")


KINDS = {
    "as it is": lambda: torch.randn(5, 3),
    "transposed": lambda: torch.randn(5, 3).t(),
    "a part": lambda: torch.randn(9, 3)[2:6],
    "every second": lambda: torch.randn(8)[::2],
    "of half precision": lambda: torch.randn(7).bfloat16(),
    "complex and conjugated": lambda: torch.randn(4, dtype=torch.complex64).conj(),
    "imaginary parts": lambda: torch.randn(4, dtype=torch.complex64).conj().imag,
    "a number": lambda: torch.tensor(3),
    "empty": lambda: torch.empty(0, 4),
    "weights": lambda: nn.Parameter(torch.randn(2, 2)),
}


def test_copies_of_tensors_of_all_kinds_are_theirs_and_take_no_room_in_the_worker() -> None:
    state, files = {kind: make() for kind, make in KINDS.items()}, (memory_file(), memory_file())
    remembering = Remembering(Remembered(files), 1)
    for version in (1, 2, 3):
        assert remembering.copy(version, state, {"of": version}, more=version) == ""
    found = remembering.recall()
    for kind, value in state.items():
        same = found.model_state[kind]
        assert (same.dtype, same.shape) == (value.dtype, value.shape), kind
        assert torch.equal(same, value), kind
    assert (found.version, found.training_state) == (3, {"of": 3})
    nodes = {str(os.fstat(file).st_ino) for file in files}
    del found
    mapped = [line.split()[4] for line in Path("/proc/self/maps").read_text().splitlines()]
    assert not nodes.intersection(mapped)
    for file in files:
        os.close(file)
