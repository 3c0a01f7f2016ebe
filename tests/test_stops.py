"""A stop that somebody's code causes: what was trained is saved, and the run goes on from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import instep
from harness import Outcome, train_here
from instep.data import Data
from instep.data.cursor import Cursor
from instep.errors import DataError, InstepError, NonFiniteError, ObjectiveError, WorkerError
from instep.objectives import objective
from instep.recipe import Recipe, Team
from instep.record import checkpoint, tape
from serving import RULES, replayed

SAMPLES, STOP = 64, 5
BAD = Cursor(samples=SAMPLES, batch=8, microbatches=4, seed=0).microbatch(STOP, 1)[0]
"""A sample that is first used in step `STOP`."""
BATCH = Cursor(samples=SAMPLES, batch=8, microbatches=4, seed=0).indices(STOP)
"""The samples of that step."""


class Samples(Dataset[Any]):
    """Rows and targets; what is wrong with one of them, or with all of a step, is mended once `flag` is gone."""

    digest = "the same, mended or not"

    def __init__(self, fault: str, flag: Path | None):
        generator = torch.Generator().manual_seed(0)
        self.x, self.y = torch.randn(SAMPLES, 4, generator=generator), torch.randint(0, 3, (SAMPLES,))
        self.y = torch.arange(SAMPLES) % 3
        self.fault, self.flag = fault, flag

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        x, y, mark = self.x[index], self.y[index], torch.tensor(0)
        if self.flag is not None and self.flag.exists():
            if self.fault == "unreadable" and index == BAD:
                raise ValueError("the file is truncated")
            if self.fault == "infinite" and index == BAD:
                x = x * float("inf")
            if self.fault == "gradient" and index == BAD:
                mark = torch.tensor(2)
            if self.fault == "empty" and index in BATCH:
                y = torch.tensor(-100)
            if self.fault == "forward" and index == BAD:
                mark = torch.tensor(1)
        return x, y, mark


class Net(nn.Module):
    def __init__(self, norm: bool = True) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)
        self.norm = nn.BatchNorm1d(8) if norm else nn.Identity()
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor, mark: Tensor) -> Tensor:
        hidden = self.norm(self.first(x))  # so that buffers have changed when it raises
        if (mark == 1).any():
            raise ValueError("a forward that raises")
        out: Tensor = self.last(self.drop(hidden))
        if (mark == 2).any():
            out = out + (self.last.weight.sum() * 0).sqrt()  # a finite value whose gradient is not
        return out


@objective(counts=lambda batch: (batch[1] != -100).sum())
def words(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    x, y, mark = batch
    return nn.functional.cross_entropy(model(x, mark), y, ignore_index=-100, reduction="sum")


def recipe(fault: str = "", flag: Path | None = None, **fields: Any) -> Recipe:
    defaults: dict[str, Any] = {
        "model": Net, "objective": words, "data": lambda: Samples(fault, flag), "batch": 8, "microbatches": 4,
        "steps": 8, "optimizer": lambda p: torch.optim.AdamW(p, lr=0.01), "name": "stops",
    }  # fmt: skip
    return Recipe(**{**defaults, **fields})


FAULTS: dict[str, tuple[type[InstepError], str]] = {
    "unreadable": (DataError, f"failed to give sample {BAD}"),
    "infinite": (NonFiniteError, f"in step {STOP + 1}, microbatch 1"),
    "gradient": (NonFiniteError, f"in step {STOP + 1}"),
    "empty": (ObjectiveError, f"step {STOP + 1} has no items"),
    "forward": (
        WorkerError,
        f"a forward that raises while computing step {STOP + 1}, microbatch 1 (samples {BAD} and ",
    ),
}


def caught(error: type[BaseException], *arguments: Any, **options: Any) -> str:
    with pytest.raises(error) as found:
        train_here(*arguments, **options)
    return str(found.value)


def checkpoints(path: Path) -> list[int]:
    return sorted(int(each.name.removeprefix("step-")) for each in (path / "checkpoints").glob("step-*"))


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return train_here(recipe(), Team(checkpoint_every=1, keep=0), tmp_path_factory.mktemp("clean") / "run")


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_stop_saves_the_step_before_it_in_lockstep(fault: str, workers: int, tmp_path: Path, clean: Outcome) -> None:
    path, flag = tmp_path / "run", tmp_path / "flag"
    flag.touch()
    faulty, (error, sentence) = recipe(fault, flag), FAULTS[fault]
    told = caught(error, faulty, Team(workers=workers), path)
    assert sentence in told
    assert f"; version {STOP} is saved: {path} can be resumed from it." in told
    saved, _ = checkpoint.newest_sound(path / "checkpoints")
    assert saved is not None
    assert checkpoint.read_manifest(saved).digest == clean.digests[STOP]
    last = list(tape.read(path / "tape.jsonl"))[-2:]
    assert [event["kind"] for event in last] == ["checkpointed", "failed"]
    flag.unlink()
    assert train_here(faulty, Team(workers=4 - workers), path, resume=True).digest == clean.digest


@pytest.mark.parametrize("fault", ["forward", "gradient"])
@pytest.mark.parametrize("rule", RULES)
def test_a_stop_saves_the_last_update_under_every_rule(rule: str, fault: str, tmp_path: Path) -> None:
    """The worker's code raises, or the server refuses an update; what was saved goes on, and replays."""
    path, flag = tmp_path / "run", tmp_path / "flag"
    flag.touch()
    faulty = recipe(fault, flag, rule=RULES[rule], steps=8)
    error = WorkerError if fault == "forward" else NonFiniteError
    told = caught(error, faulty, Team(workers=2, engine="server"), path)
    made = [event["version"] for event in tape.latest(tape.read(path / "tape.jsonl"))]
    assert f"; version {made[-1]} is saved: {path}" in told
    assert checkpoints(path) == [made[-1]]
    flag.unlink()
    resumed = train_here(faulty, Team(workers=2, engine="server"), path, resume=True)
    assert resumed.result["steps"] == 8
    covered: dict[tuple[int, int], int] = {}  # every microbatch of every batch once
    pushed: dict[int, dict[str, Any]] = {}
    events = list(tape.read(path / "tape.jsonl"))
    counted = {(event["version"], c["seq"]) for event in tape.latest(events) for c in event["contributions"]}
    for event in events:
        if event["kind"] == "pushed":
            pushed[event["seq"]] = event
        elif event["kind"] == "merged":
            for each in event["contributions"]:
                if (event["version"], each["seq"]) in counted:
                    of = pushed[each["seq"]]
                    for batch in range(of["batch"], of["batch"] + of["local_steps"]):
                        for microbatch in range(*of["microbatches"]):
                            covered[batch, microbatch] = covered.get((batch, microbatch), 0) + 1
    assert covered == {(batch, microbatch): 1 for batch in range(8) for microbatch in range(4)}
    again = replayed(faulty, path)
    assert again.digest == again.recorded
    if fault == "forward":  # else the tape has a contribution of the data as they were
        assert again.same


@pytest.mark.parametrize(("engine", "workers"), [("lockstep", 1), ("lockstep", 3), ("server", 2)])
def test_an_evaluation_that_raises_is_made_up_for(engine: Any, workers: int, tmp_path: Path) -> None:
    """Held-out data that cannot be read: the version is saved, and evaluated when the run goes on."""

    def both(flag: Path | None) -> Recipe:
        held_out = Samples("unreadable", flag)
        return recipe(data=lambda: Data(Samples("", None), held_out), evaluate_every=3, evaluate_samples=None)

    path, flag = tmp_path / "run", tmp_path / "flag"
    flag.touch()
    told = caught(DataError, both(flag), Team(workers=workers, engine=engine), path)
    assert f"failed to give sample {BAD}" in told
    assert f"; version 3 is saved: {path}" in told
    flag.unlink()
    resumed = train_here(both(flag), Team(workers=workers, engine=engine), path, resume=True)
    whole = train_here(both(None), Team(workers=workers, engine=engine), tmp_path / "whole")
    told_of = [
        [
            (event["version"], event["objective"])
            for event in tape.read(each / "tape.jsonl")
            if event["kind"] == "evaluated"
        ]
        for each in (path, tmp_path / "whole")
    ]
    assert told_of[0] == told_of[1]
    assert resumed.digest == whole.digest
    best = [(each / "checkpoints/best.json").read_text() for each in (path, tmp_path / "whole")]
    assert best[0] == best[1]


class Broken(torch.optim.AdamW):
    """Raises in the middle of an update, with some weights changed."""

    calls = 0

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        self.calls += 1
        if self.calls == 9:  # more than are tried before the run
            raise ValueError("half an update")


@pytest.mark.parametrize(("engine", "workers"), [("lockstep", 1), ("lockstep", 2), ("server", 2)])
def test_a_half_made_update_is_never_saved(engine: Any, workers: int, tmp_path: Path) -> None:
    path = tmp_path / "run"
    broken = recipe(optimizer=lambda p: Broken(p, lr=0.01), steps=12)
    told = caught(WorkerError, broken, Team(workers=workers, engine=engine, checkpoint_every=2), path)
    assert "half an update while updating the weights in step 9" in told
    assert f"; version 8 is saved: {path}" in told
    assert max(checkpoints(path)) == 8


def test_nothing_is_saved_where_nothing_was_trained(tmp_path: Path) -> None:
    class Never(Net):
        def forward(self, x: Tensor, mark: Tensor) -> Tensor:
            if self.training and torch.is_grad_enabled() and x.requires_grad is False and self.calls:
                raise ValueError("never")
            self.calls = True
            return super().forward(x, mark)

        calls = False

    told = caught(WorkerError, recipe(model=Never), Team(workers=2), tmp_path / "run")
    assert "is saved" not in told
    assert checkpoints(tmp_path / "run") == []


class Monitor:
    """Raises once, at a version."""

    def __init__(self, version: int):
        self.version, self.seen = version, 0

    def __call__(self, event: dict[str, Any]) -> None:
        if event["kind"] == "merged":
            self.seen = event["version"]
            if self.seen == self.version:
                raise ValueError("no such tracker")


def test_a_monitor_that_raises_ends_the_run_as_ctrl_c_does(tmp_path: Path) -> None:
    bad, good = Monitor(3), Monitor(-1)
    long = recipe(steps=5000)
    with pytest.raises(ValueError, match="no such tracker") as found:
        instep.train(long, out=tmp_path / "run", monitors=[bad, good])
    assert bad.seen == 3, "a monitor that has raised is not called again"
    (saved,) = checkpoints(tmp_path / "run")
    assert saved == good.seen >= 3, "the others see all that is trained, and it is saved"
    assert str(tmp_path / "run") in found.value.__notes__[0]
