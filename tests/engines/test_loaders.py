"""Loaders: processes that read samples ahead of the workers. They decide no bit."""

from __future__ import annotations

import contextlib
import errno
import functools
import multiprocessing
import os
import random
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from instep import Data, Recipe, Team
from instep.data.cursor import Cursor
from instep.descendants import Stopped, children
from instep.engines import division
from instep.engines.seat import Seat
from instep.errors import DataError, InstepError
from instep.objectives import objective
from instep.schedule import Change
from instep.team import loaders
from instep.team.asking import resized, standing_of
from instep.transport import units
from instep.transport.units import Unit
from instep.worker import loaded
from support import workloads
from support.agents import train_on
from support.deaths import before
from support.deaths import run as run_with_deaths
from support.harness import Client, told, train_here
from support.kinds import quick
from support.moving import AtRandom
from support.patience import LONG_S
from support.processes import wait_until
from support.threads import meanwhile

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
            file.write(f"{os.getpid()} {index} {int(in_loader())}\n")
        noise = torch.rand(6) * random.random() + float(np.random.rand())
        x = self.weights * index / SAMPLES + noise
        return {"x": x, "y": x[:1] * 2, "name": f"sample {index}"} | (self.act(index) or {})


def recipe(data: Dataset[dict[str, Any]], **fields: Any) -> Recipe:
    given: dict[str, Any] = {
        "batch": BATCH,
        "microbatches": 8,
        "steps": STEPS,
        "order": "permutation",
        "objective": loss,
    } | fields
    return Recipe(
        model=lambda: nn.Linear(6, 1), data=data,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.01), **given,
    )  # fmt: skip


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    noise = torch.rand(())  # a forward draws, too
    wrong: Tensor = model(batch["x"] + noise) - batch["y"]
    return (wrong**2).sum()


def read_by(path: Path, *, loaders: bool) -> dict[int, list[int]]:
    """The indices that each loader, or each other process, has read."""
    found: dict[int, list[int]] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        pid, index, by_loader = map(int, line.split())
        if by_loader == loaders:
            found.setdefault(pid, []).append(index)
    return found


def in_loader() -> bool:
    return multiprocessing.current_process().name.startswith("loader")


def read_ahead(path: Path) -> list[int]:
    """What loaders have read."""
    return sorted(index for indices in read_by(path, loaders=True).values() for index in indices)


@functools.cache
def plain(steps: int = STEPS) -> str:
    """The digest of one worker without loaders: one run for all tests."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        return train_here(recipe(Drawn(path / "read"), steps=steps), Team(), path / "plain").digest


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_any_number_of_loaders_gives_one_digest_and_they_read_all_that_is_trained_on(
    workers: int, tmp_path: Path
) -> None:
    wanted = plain()
    for count in (1, 4) if workers == 1 else (1,):
        path = tmp_path / f"read-{count}"
        run = train_here(recipe(Drawn(path)), Team(workers=workers, loaders=count), tmp_path / f"{count}")
        assert run.digest == wanted
        assert not told(run, "warned")
        assert read_ahead(path) == sorted(2 * list(range(SAMPLES))), "two epochs, each sample once"
        assert len(read_by(path, loaders=True)) <= workers * count
        assert not set(read_by(path, loaders=True)) & {event["pid"] for event in told(run, "joined")}


def test_ragged_batches_and_samples_left_out_are_loaded_as_they_are_read(tmp_path: Path) -> None:
    one = workloads.gpt(changes=(Change(version=4, skip_samples=tuple(range(20, 30))),))
    runs = [train_here(one, Team(workers=2, loaders=n), tmp_path / str(n)) for n in (0, 2)]
    assert len({run.digest for run in runs}) == 1
    assert not [event for event in told(runs[1], "warned") if "load" in event["why"]]


@pytest.mark.usefixtures("agents_meet_here")
@pytest.mark.parametrize("rule", quick(["synchronous", "diloco:2"], "synchronous"))
def test_each_host_has_loaders_of_its_own(rule: str, tmp_path: Path) -> None:
    path = tmp_path / "read"
    one = recipe(Drawn(path), rule=rule)
    run, _ = train_on((1, 1), one, Team(workers=3, loaders=1), tmp_path / "run")
    assert run.digest == train_here(one, Team(workers=3), tmp_path / "plain").digest
    assert len(read_by(path, loaders=True)) >= 2, "one at least on each of two hosts"
    assert len(read_ahead(path)) >= 2 * SAMPLES
    if rule == "synchronous":
        assert read_ahead(path) == sorted(2 * list(range(SAMPLES)))


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
    assert run.digest == plain()
    assert run.result["restarts"] == 0
    assert not told(run, "left")
    assert len(read_by(path, loaders=True)) > 2, "two that died, and who read on"


def test_a_sample_that_ends_each_loader_is_named(tmp_path: Path) -> None:
    bad = late()[5]

    def act(index: int) -> None:
        if index == bad and in_loader():
            os.kill(os.getpid(), signal.SIGKILL)

    said = rf"sample {bad} ended each of the 3 loaders that read it, the last one killed by SIGKILL.*--skip-samples"
    with pytest.raises(DataError, match=said):
        train_here(recipe(Drawn(tmp_path / "read", act)), Team(workers=2, loaders=1), tmp_path / "run")


def test_who_asks_is_told_what_each_loader_does_and_which_have_died(tmp_path: Path) -> None:
    path, goes_on, samples = tmp_path / "run", tmp_path / "go on", late()
    asked: list[dict[str, Any]] = []

    def act(index: int) -> None:
        killing_once(tmp_path, index, samples[3])
        if index == samples[20] and in_loader():
            wait_until(goes_on.exists, 120, "an answer")

    def ask() -> None:
        wait_until(tells, 120, "a loader that reads, and one that died")

    def tells() -> bool:
        with contextlib.suppress(InstepError):  # it is not there yet
            asked[:] = standing_of(path).get("loaders", [])
        return any(each["doing"] for each in asked) and any(each["died"] for each in asked)

    team = Team(workers=1, loaders=2)
    with meanwhile(ask, goes_on.touch):
        run = train_here(recipe(Drawn(tmp_path / "read", act)), team, path)
    assert run.digest == plain()
    assert [each["loader"] for each in asked] == [0, 1]
    assert [each["name"] for each in asked] == ["loader 0", "loader 1"]
    assert sum(each["died"] for each in asked) == 1
    assert all(re.fullmatch(r"reading step \d+, microbatch \d|", each["doing"]) for each in asked)
    assert {each["pid"] for each in asked} & set(read_by(tmp_path / "read", loaders=True))
    assert sum(each["read"] for each in asked) >= sum(each["ahead"] for each in asked) > 0
    assert all((each["ahead_bytes"] > 0) == (each["ahead"] > 0) for each in asked)
    assert standing_of(path)["loaders"] == []


def test_what_a_sample_raises_is_told_as_without_loaders(tmp_path: Path) -> None:
    bad, said = late()[20], []

    def act(index: int) -> None:
        if index == bad:
            raise ValueError(f"{index} is damaged")

    for count in (0, 1):
        with pytest.raises(DataError, match=f"sample {bad} .*is damaged") as caught:
            train_here(recipe(Drawn(tmp_path / "read", act)), Team(loaders=count), tmp_path / f"{count}")
        said.append(caught.value.message.replace(str(tmp_path / f"{count}"), ""))
    assert said[0] == said[1]


def test_what_cannot_be_sent_is_read_by_the_worker_and_warned_of(tmp_path: Path) -> None:
    def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
        return {name: torch.stack([each[name] for each in samples]) for name in "xy"} | {"same": lambda: samples}

    data = Data(train=Drawn(tmp_path / "read"), collate=collate)
    run = train_here(recipe(data), Team(loaders=2), tmp_path / "run")  # type: ignore[arg-type]
    assert run.digest == plain()
    assert "workers read some samples themselves" in "".join(event["why"] for event in told(run, "warned"))


def test_a_batch_that_holds_an_empty_array_comes_from_loaders(tmp_path: Path) -> None:
    def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
        return {name: torch.stack([each[name] for each in samples]) for name in "xy"} | {"spans": np.empty((0, 2))}

    data = Data(train=Drawn(path := tmp_path / "read"), collate=collate)
    run = train_here(recipe(data), Team(loaders=1), tmp_path / "run")  # type: ignore[arg-type]
    assert run.digest == plain()
    assert not told(run, "warned")
    assert read_ahead(path) == sorted(2 * list(range(SAMPLES)))


def test_loaders_that_read_something_else_than_workers_are_not_used(tmp_path: Path) -> None:
    act = lambda index: {"x": torch.ones(6)} if in_loader() else {}  # noqa: E731
    run = train_here(recipe(Drawn(tmp_path / "read", act)), Team(workers=2, loaders=1), tmp_path / "run")
    assert run.digest == plain()
    assert "what a loader reads is not what a worker reads" in told(run, "warned")[0]["why"]


def test_with_memory_for_nothing_ahead_what_is_waited_for_is_read(tmp_path: Path) -> None:
    team = Team(workers=2, loaders=1, loader_bytes=0)
    run = train_here(recipe(Drawn(tmp_path / "read")), team, tmp_path / "run")
    assert run.digest == plain()
    assert read_ahead(tmp_path / "read") == sorted(2 * list(range(SAMPLES)))


def test_a_worker_that_dies_and_ranges_that_move_lose_nothing_that_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(division, "Balance", AtRandom)
    path = tmp_path / "read"
    run = run_with_deaths(recipe(Drawn(path)), 2, tmp_path / "team", before(Seat, "compute", 1), loaders=1)
    assert run.result["stood_in"] == 1
    assert run.digest == plain()
    assert read_ahead(path) == sorted(2 * list(range(SAMPLES)))
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
    assert run.digest == plain()


@pytest.mark.parametrize("rule", quick(["diloco:2", "local_sgd:3", "asynchronous"], "diloco:2"))
def test_workers_with_a_server_take_their_pieces_from_loaders(rule: str, tmp_path: Path) -> None:
    digests, path = set(), tmp_path / "read"
    for count in (0, 2):
        path.unlink(missing_ok=True)
        team = Team(workers=2, loaders=count)
        run = train_here(recipe(Drawn(path), rule=rule), team, tmp_path / f"{count}")
        digests.add(run.digest)
    assert len(digests) == 1 or rule == "asynchronous"
    assert len(read_ahead(path)) >= 2 * SAMPLES, "each sample in each of two epochs"


def test_nothing_is_left_of_loaders_nor_of_what_they_start(tmp_path: Path) -> None:
    started = tmp_path / "started"

    def act(index: int) -> None:
        with started.open("a") as file:
            file.write(f"{subprocess.Popen(['sleep', '600'], start_new_session=True).pid}\n")

    others = children()
    train_here(recipe(Drawn(tmp_path / "read", act), steps=1), Team(loaders=2), tmp_path / "run")
    assert children() == others
    assert not [pid for pid in started.read_text().split() if Path(f"/proc/{pid}").exists()]


def test_what_counting_draws_follows_what_reading_drew(tmp_path: Path) -> None:
    """The generators go on where the sample has left them, though another process has read it."""

    def counts(batch: dict[str, Tensor]) -> int:
        return int(torch.randint(1, 9, ())) + random.randrange(9) + int(np.random.randint(9))

    counting = objective(counts=counts)(lambda model, batch: loss(model, batch))  # `loss` itself is other tests' too
    digests = set()
    for count in (0, 1):
        one = recipe(Drawn(tmp_path / "read"), objective=counting)
        digests.add(train_here(one, Team(workers=2, loaders=count), tmp_path / f"{count}").digest)
    assert len(digests) == 1


def test_a_loader_that_is_stopped_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, bad = tmp_path / "read", late()[5]

    def act(index: int) -> None:
        if index == bad and in_loader():
            try:
                (tmp_path / "stopped").touch(exist_ok=False)
            except FileExistsError:
                return
            os.kill(os.getpid(), signal.SIGSTOP)

    monkeypatch.setattr(loaders, "Stopped", lambda pid, timeout_s: Stopped(pid, 0.5))
    run = train_here(recipe(Drawn(path, act)), Team(loaders=1), tmp_path / "run")
    assert run.digest == plain()
    assert run.result["restarts"] == 0
    assert len(read_by(path, loaders=True)) == 2


def test_a_loader_that_hangs_is_replaced_before_who_waits_for_it_counts_as_stuck(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, bad = tmp_path / "read", late()[5]

    def act(index: int) -> None:
        if index == bad and in_loader():
            try:
                (tmp_path / "hangs").touch(exist_ok=False)
            except FileExistsError:
                return
            time.sleep(LONG_S)

    monkeypatch.setattr(loaders, "HANGS", 1 / Team().stall_timeout_s)
    run = train_here(recipe(Drawn(path, act)), Team(loaders=1), tmp_path / "run")
    assert run.digest == plain()
    assert run.result["restarts"] == 0
    assert len(read_by(path, loaders=True)) == 2


@pytest.mark.parametrize(("before", "wanted"), [(1, 3), pytest.param(3, 1, marks=pytest.mark.slow)])
def test_who_comes_while_a_run_goes_on_has_loaders_as_the_others_have(before: int, wanted: int, tmp_path: Path) -> None:
    path, readers, steps, client = tmp_path / "run", tmp_path / "read", 100, Client()
    changed = tmp_path / "changed"

    def act(index: int) -> None:
        if not changed.exists():
            time.sleep(0.01)

    def change() -> None:
        wait_until(lambda: bool(told(client, "merged")), LONG_S, "a step")
        resized(path, wanted)
        wait_until(lambda: bool(told(client, "regrouped")), LONG_S, "another number")

    with meanwhile(change, changed.touch):
        run = train_here(recipe(Drawn(readers, act), steps=steps), Team(workers=before, loaders=1), path, client=client)
    assert run.digest == plain(steps)
    assert not told(run, "warned")
    assert [len(group["workers"]) for group in told(run, "regrouped")] == [wanted]
    assert len(read_by(readers, loaders=True)) == max(before, wanted)
    own, (first, *others) = read_by(readers, loaders=False), [event["pid"] for event in told(run, "joined")]
    most = len(own[first]) + BATCH  # what tells data apart, and what is compared
    assert all(len(own[pid]) <= most for pid in others)
    last = {line.split()[0] for line in readers.read_text().splitlines()[-SAMPLES:] if line.endswith(" 1")}
    assert len(last) <= wanted


def test_loaders_that_die_as_they_begin_leave_reading_to_the_worker(tmp_path: Path) -> None:
    def build() -> Drawn:
        if in_loader():
            os._exit(3)
        return Drawn(tmp_path / "read")

    run = train_here(recipe(build), Team(loaders=2), tmp_path / "run")  # type: ignore[arg-type]
    assert run.digest == plain()
    assert "loaders came to nothing" in "".join(event["why"] for event in told(run, "warned"))


def test_where_the_system_does_not_let_workers_have_what_loaders_read_they_read_it_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(unit: Unit) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(loaded, "_opened", refused)
    run = train_here(recipe(Drawn(tmp_path / "read")), Team(workers=2, loaders=1), tmp_path / "run")
    assert run.digest == plain()
    assert "cannot be had from them (Permission denied)" in told(run, "warned")[0]["why"]


def test_rows_of_tensors_are_left_where_they_are_and_that_is_said(tmp_path: Path) -> None:
    rows = TensorDataset(torch.randn(SAMPLES, 6), torch.randn(SAMPLES, 1))

    def distance(model: nn.Module, batch: list[Tensor]) -> Tensor:
        return (model(batch[0]) - batch[1]).square().sum()

    run = train_here(recipe(rows, objective=distance), Team(loaders=2), tmp_path / "run")  # type: ignore[arg-type]
    assert "team.loaders has nothing to do" in told(run, "warned")[0]["why"]


def test_no_loader_outlives_its_supervisor(tmp_path: Path) -> None:
    path = tmp_path / "read"
    one = recipe(Drawn(path), steps=10**6)
    supervisor = multiprocessing.get_context("fork").Process(
        target=train_here, args=(one, Team(workers=2, loaders=2), tmp_path / "run")
    )
    supervisor.start()
    wait_until(lambda: len(read_by(path, loaders=True)) == 4, 120, "four loaders")
    supervisor.kill()
    supervisor.join()
    left = {*read_by(path, loaders=True), *read_by(path, loaders=False)}
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in left), 120, f"the end of {left}")


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 3])
def test_loaders_that_are_killed_at_random_change_nothing(
    workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(units, "MOST_TRIES", 100)  # or a loaded machine may have three die of one microbatch
    monkeypatch.setattr(loaders, "MOST_DEATHS", 100)
    chance, left, path = random.Random(workers), [12], tmp_path / "read"

    def kill(event: dict[str, Any]) -> None:
        pids = sorted(children() & set(read_by(path, loaders=True)))
        if event["kind"] in ("merged", "joined", "computed") and left[0] and pids and chance.random() < 0.5:
            left[0] -= 1
            os.kill(chance.choice(pids), signal.SIGKILL)

    client = Client(kill)
    one = recipe(Drawn(path), steps=30)
    run = train_here(one, Team(workers=workers, loaders=2), tmp_path / "run", client=client)
    assert not left[0]
    assert run.result["restarts"] == 0
    assert run.digest == plain(30)
