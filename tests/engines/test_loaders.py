"""Loaders: processes that read samples ahead of the workers. They decide no bit."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from instep import Recipe, Team
from instep.data.cursor import Cursor
from instep.engines import division
from instep.engines.seat import Seat
from instep.errors import DataError
from support.deaths import before
from support.deaths import run as run_with_deaths
from support.harness import Client, Outcome, told, train_here
from support.kinds import quick
from support.moving import AtRandom

pytestmark = pytest.mark.processes

STEPS = 6
SAMPLES = 48
BATCH = 16


class Drawn(Dataset[dict[str, Any]]):
    """Samples that are drawn anew each time, by all three generators. Who reads one says so in a file, and does what is
    given, if anything.
    """

    def __init__(self, readers: Path, act: Callable[[int], Any] = lambda index: None):
        self.readers, self.act = readers, act
        self.weights = torch.randn(6, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> dict[str, Any]:
        with self.readers.open("a") as file:
            file.write(f"{os.getpid()} {index}\n")
        noise = torch.rand(6) * random.random() + float(np.random.rand())
        x = self.weights * index / SAMPLES + noise
        return {"x": x, "y": x[:1] * 2, "name": f"sample {index}"} | (self.act(index) or {})


def recipe(data: Dataset[dict[str, Any]], **fields: Any) -> Recipe:
    given: dict[str, Any] = {"batch": BATCH, "microbatches": 8, "steps": STEPS, "order": "permutation"} | fields
    return Recipe(
        model=lambda: nn.Linear(6, 1), objective=loss, data=data,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.01), **given,
    )  # fmt: skip


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    noise = torch.rand(())  # a forward draws, too
    wrong: Tensor = model(batch["x"] + noise) - batch["y"]
    return (wrong**2).sum()


def read_by(path: Path) -> dict[int, list[int]]:
    """The indices that each process has read."""
    found: dict[int, list[int]] = {}
    for line in path.read_text().splitlines():
        pid, index = map(int, line.split())
        found.setdefault(pid, []).append(index)
    return found


def in_loader() -> bool:
    return multiprocessing.current_process().name.startswith("loader")


def workers_of(run: Outcome | Client) -> set[int]:
    return {event["pid"] for event in told(run, "joined")}


def read_ahead(path: Path, workers: set[int]) -> list[int]:
    """What others than these workers have read."""
    return sorted(index for pid, indices in read_by(path).items() if pid not in workers for index in indices)


def plain(tmp_path: Path, **fields: Any) -> Outcome:
    return train_here(recipe(Drawn(tmp_path / "plain-read"), **fields), Team(), tmp_path / "plain")


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_any_number_of_loaders_gives_one_digest_and_they_read_all_that_is_trained_on(
    workers: int, tmp_path: Path
) -> None:
    wanted = plain(tmp_path).digest
    for loaders in (1, 4) if workers == 1 else (1,):
        path = tmp_path / f"read-{loaders}"
        run = train_here(recipe(Drawn(path)), Team(workers=workers, loaders=loaders), tmp_path / f"{loaders}")
        assert run.digest == wanted
        assert not told(run, "warned")
        assert read_ahead(path, workers_of(run)) == sorted(2 * list(range(SAMPLES))), "two epochs, each sample once"
        assert len(read_by(path)) <= workers + workers * loaders


def killing_once(folder: Path, index: int, *which: int) -> None:
    """Kills the process that reads one of these, the first time."""
    if index in which:
        try:
            (folder / f"killed-{index}").touch(exist_ok=False)
        except FileExistsError:
            return
        os.kill(os.getpid(), signal.SIGKILL)


def late(steps: int = STEPS) -> list[int]:
    """Samples in the order in which they are trained on, without those of the first microbatch and those that tell data
    from others, all of which workers read.
    """
    cursor = Cursor(SAMPLES, BATCH, 8, seed=0, order="permutation")
    order = [index for step in range(steps) for index in cursor.indices(step)]
    return [index for index in order[2:] if 8 <= index < SAMPLES - 8]


def test_loaders_that_die_are_replaced_and_what_they_read_is_read_again(tmp_path: Path) -> None:
    path, samples = tmp_path / "read", late()
    data = Drawn(path, lambda index: killing_once(tmp_path, index, samples[3], samples[12]))
    run = train_here(recipe(data), Team(workers=2, loaders=1), tmp_path / "run")
    assert run.digest == plain(tmp_path).digest
    assert run.result["restarts"] == 0
    assert not told(run, "left")
    assert len(set(read_by(path)) - workers_of(run)) == 4, "two loaders, and one each that took their places"


def test_a_sample_that_ends_each_loader_is_named(tmp_path: Path) -> None:
    bad = late()[5]

    def act(index: int) -> None:
        if index == bad and in_loader():
            os.kill(os.getpid(), signal.SIGKILL)

    said = rf"sample {bad} ended each of the 3 loaders that read it, the last one killed by SIGKILL.*--skip-samples"
    with pytest.raises(DataError, match=said):
        train_here(recipe(Drawn(tmp_path / "read", act)), Team(workers=2, loaders=1), tmp_path / "run")


def test_what_a_sample_raises_is_told_as_without_loaders(tmp_path: Path) -> None:
    bad, said = late()[20], []

    def act(index: int) -> None:
        if index == bad:
            raise ValueError(f"{index} is damaged")

    for loaders in (0, 1):
        with pytest.raises(DataError, match=f"sample {bad} .*is damaged") as caught:
            train_here(recipe(Drawn(tmp_path / "read", act)), Team(loaders=loaders), tmp_path / f"{loaders}")
        said.append(caught.value.message.replace(str(tmp_path / f"{loaders}"), ""))
    assert said[0] == said[1]


def test_what_cannot_be_sent_is_read_by_the_worker_and_warned_of(tmp_path: Path) -> None:
    def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
        return {name: torch.stack([each[name] for each in samples]) for name in "xy"} | {"same": lambda: samples}

    from instep import Data

    data = Data(train=Drawn(tmp_path / "read"), collate=collate)
    run = train_here(recipe(data), Team(loaders=2), tmp_path / "run")  # type: ignore[arg-type]
    assert run.digest == plain(tmp_path).digest
    assert "workers read some samples themselves" in "".join(event["why"] for event in told(run, "warned"))


def test_loaders_that_read_something_else_than_workers_are_not_used(tmp_path: Path) -> None:
    act = lambda index: {"x": torch.ones(6)} if in_loader() else {}  # noqa: E731
    run = train_here(recipe(Drawn(tmp_path / "read", act)), Team(loaders=1), tmp_path / "run")
    assert run.digest == plain(tmp_path).digest
    assert "what a loader reads is not what a worker reads" in told(run, "warned")[0]["why"]


def test_with_memory_for_nothing_ahead_what_is_waited_for_is_read(tmp_path: Path) -> None:
    team = Team(workers=2, loaders=1, loader_bytes=0)
    run = train_here(recipe(Drawn(tmp_path / "read")), team, tmp_path / "run")
    assert run.digest == plain(tmp_path).digest
    assert read_ahead(tmp_path / "read", workers_of(run)) == sorted(2 * list(range(SAMPLES)))


def test_a_worker_that_dies_and_ranges_that_move_lose_nothing_that_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(division, "Balance", AtRandom)
    path = tmp_path / "read"
    run = run_with_deaths(recipe(Drawn(path)), 2, tmp_path / "team", before(Seat, "compute", 1), loaders=1)
    assert run.result["stood_in"] == 1
    assert run.digest == plain(tmp_path).digest
    assert read_ahead(path, workers_of(run)) == sorted(2 * list(range(SAMPLES)))
    assert run.result["moves"]


def test_a_run_is_resumed_with_another_number(tmp_path: Path) -> None:
    def see(event: dict[str, Any]) -> None:
        if (event["kind"], event.get("version")) == ("merged", 2):
            client.ask_to_stop()

    client: Client = Client(see)
    one = recipe(Drawn(tmp_path / "read"))
    train_here(one, Team(workers=2, loaders=2), tmp_path / "run", client=client)
    run = train_here(one, Team(workers=3, loaders=1), tmp_path / "run", resume=True)
    assert run.result["steps"] == STEPS
    assert run.digest == plain(tmp_path).digest


@pytest.mark.parametrize("rule", quick(["diloco:2", "local_sgd:3", "asynchronous"], "diloco:2"))
def test_workers_with_a_server_take_their_pieces_from_loaders(rule: str, tmp_path: Path) -> None:
    digests, path = set(), tmp_path / "read"
    for loaders in (0, 2):
        path.unlink(missing_ok=True)
        team = Team(workers=2, loaders=loaders)
        run = train_here(recipe(Drawn(path), rule=rule), team, tmp_path / f"{loaders}")
        digests.add(run.digest)
    assert len(digests) == 1 or rule == "asynchronous"
    pids = {pid for pid, indices in read_by(path).items() if pid in workers_of(run)}
    ahead = read_ahead(path, pids)
    assert len(ahead) >= 2 * SAMPLES, "each sample in each of two epochs"


def test_nothing_is_left_of_loaders_nor_of_what_they_start(tmp_path: Path) -> None:
    from instep.descendants import children

    started = tmp_path / "started"

    def act(index: int) -> None:
        import subprocess

        with started.open("a") as file:
            file.write(f"{subprocess.Popen(['sleep', '600'], start_new_session=True).pid}\n")

    before = children()
    train_here(recipe(Drawn(tmp_path / "read", act), steps=1), Team(loaders=2), tmp_path / "run")
    assert children() == before
    assert not [pid for pid in started.read_text().split() if Path(f"/proc/{pid}").exists()]
