"""A stop that somebody's code causes: what was trained is saved, and the run goes on from it."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import instep
from instep.clock.times import WorkerTimes
from instep.data import Data
from instep.data.cursor import Cursor
from instep.errors import (
    CheckpointError,
    DataError,
    InstepError,
    NonFiniteError,
    ObjectiveError,
    RecipeError,
    WorkerError,
)
from instep.objectives import objective
from instep.offline.cluster import Cluster
from instep.offline.simulation import simulate
from instep.recipe import Recipe, Team, parse
from instep.record import checkpoint, tape
from instep.schedule import Change
from instep.watch import Watch
from support.harness import Outcome, train_here
from support.kinds import quick
from support.reference import reference_digests
from support.serving import RULES, replayed

pytestmark = pytest.mark.processes

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
    def __init__(self, norm: bool = True, drop: float = 0.1) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)
        self.norm = nn.BatchNorm1d(8) if norm else nn.Identity()
        self.drop = nn.Dropout(drop) if drop else nn.Identity()

    def forward(self, x: Tensor, mark: Tensor) -> Tensor:
        hidden = self.norm(self.first(x))  # so that buffers have changed when it raises
        out: Tensor = self.last(self.drop(hidden))
        if not torch.compiler.is_compiling() and not torch._C._functorch.maybe_current_level():
            if (mark == 1).any():
                raise ValueError("a forward that raises")
            if (mark == 2).any():
                out = out + (self.last.weight.sum() * 0).sqrt()  # a finite value whose gradient is not
        return out


@objective(counts=lambda batch: (batch[1] != -100).sum())
def words(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    x, y, mark = batch
    return nn.functional.cross_entropy(model(x, mark), y, ignore_index=-100, reduction="sum")


@objective(counts=lambda batch: (batch[1] != -100).sum())
def lines(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """As `words`, where it can be computed for many workers at once."""
    x, y, mark = batch
    return ((model(x, mark).sum(1) - y) ** 2 * (y != -100)).sum()


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


@pytest.mark.parametrize("workers", quick([1, 2, 3], 2))
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
    events = list(tape.read(path / "tape.jsonl"))
    assert [event["version"] for event in events if event["kind"] == "checkpointed"] == [STOP]
    assert events[-1]["kind"] == "failed"
    flag.unlink()
    assert train_here(faulty, Team(workers=4 - workers), path, resume=True).digest == clean.digest


@pytest.mark.parametrize("fault", ["forward", "gradient"])
@pytest.mark.parametrize("rule", quick(RULES, "backup_workers", "diloco"))
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


@pytest.mark.usefixtures("forked_pythons")
def test_a_monitor_that_raises_ends_the_run_as_ctrl_c_does(tmp_path: Path) -> None:
    bad, good = Monitor(3), Monitor(-1)
    long = recipe(steps=5000)
    with pytest.raises(ValueError, match="no such tracker") as found:
        instep.train(long, out=tmp_path / "run", monitors=[bad, good])
    assert bad.seen == 3, "a monitor that has raised is not called again"
    (saved,) = checkpoints(tmp_path / "run")
    assert saved == good.seen >= 3, "the others see all that is trained, and it is saved"
    assert str(tmp_path / "run") in found.value.__notes__[0]


# --------------------------------------------------------------------------------------------- batches that are skipped


def skipping(fault: str, **fields: Any) -> Recipe:
    watch = Watch(bad_batch="skip", **fields.pop("watch", {}))
    return recipe(fault, Path(__file__), watch=watch, **fields)  # the flag is there


@pytest.mark.parametrize("fault", quick(["infinite", "gradient", "empty"], "gradient"))
def test_a_bad_batch_is_left_out_alike_for_any_team_and_as_the_reference_has_it(fault: str, tmp_path: Path) -> None:
    skips = skipping(fault)
    expected = reference_digests(skips)
    assert expected[STOP + 1] == expected[STOP]
    for engine, workers in [("lockstep", 1), ("lockstep", 2), ("lockstep", 3), ("server", 2)]:
        path = tmp_path / f"{engine}{workers}"
        team = Team(workers=workers, engine=engine, checkpoint_every=1, keep=0)  # type: ignore[arg-type]
        run = train_here(skips, team, path)
        assert run.digests == expected
        assert run.result["bad_batches"] == 1
        assert run.result["skipped"] == 0
        merged = tape.latest(run.events)[STOP]
        assert (merged["bad_batches"], merged["objective"], merged["lr"]) == (1, None, 0.0)
        assert sum("bad_batches" in event for event in tape.latest(run.events)) == 1
        (warned,) = (event["why"] for event in run.events if event["kind"] == "warned")
        assert FAULTS[fault][1].removeprefix("in ") in warned
        assert warned.endswith("the update is left out, 1 of at most 10 such batches.")
        assert replayed(skips, path).same


@pytest.mark.parametrize("fault", ["infinite", "gradient", "empty"])
@pytest.mark.parametrize("rule", quick([rule for rule in RULES if rule != "synchronous"], "local_sgd"))
def test_a_bad_batch_is_left_out_under_every_rule(rule: str, fault: str, tmp_path: Path) -> None:
    """Weights stay finite, the batch is counted once, and a replay agrees."""
    path = tmp_path / "run"
    run = train_here(skipping(fault, rule=RULES[rule]), Team(workers=2), path)
    assert run.result["steps"] == 8
    assert run.result["bad_batches"] == 1
    assert replayed(skipping(fault, rule=RULES[rule]), path).same
    saved, _ = checkpoint.newest_sound(path / "checkpoints")
    assert saved is not None
    assert all(bool(torch.isfinite(value).all()) for value in checkpoint.load(saved).model_state.values())


@pytest.mark.parametrize("rule", ["local_sgd", "async_diloco"])
def test_a_simulated_contribution_weighs_as_much_as_its_local_steps_that_were_made(rule: str, tmp_path: Path) -> None:
    skips = skipping("infinite", rule=RULES[rule])
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    result = simulate(skips, Cluster(workers=2), True, tmp_path / "run", lambda event: None)
    assert result["bad_batches"] == 1
    replay = replayed(skips, tmp_path / "run")
    assert (replay.divergence, replay.digest) == ("", result["digest"])


@pytest.mark.parametrize(
    "rule",
    quick(["local_sgd", "diloco", "async_diloco", "asynchronous", "backup_workers"], "diloco", "asynchronous"),
)
def test_a_batch_without_items_stops_the_run_under_every_rule(rule: str, tmp_path: Path) -> None:
    told = caught(ObjectiveError, recipe("empty", Path(__file__), rule=RULES[rule]), Team(workers=2), tmp_path / "run")
    assert f"step {STOP + 1} has no items to learn from" in told
    assert "set watch.bad_batch to 'skip'" in told


@pytest.mark.parametrize("engine", ["lockstep", "server"])
def test_one_bad_batch_too_many_stops_the_run(engine: Any, tmp_path: Path) -> None:
    path, skips = tmp_path / "run", skipping("infinite", steps=30, watch={"bad_batches": 2})
    told = caught(NonFiniteError, skips, Team(workers=2, engine=engine), path)
    third = next(step for step in range(2 * 8, 30) if BAD in Cursor(SAMPLES, 8, 4, 0).indices(step))
    assert f"in step {third + 1}, microbatch" in told
    assert "2 such batches were left out before it, as many as watch.bad_batches allows" in told
    assert f"version {third} is saved" in told
    assert f"in step {third + 1}, " in caught(NonFiniteError, skips, Team(workers=1, engine=engine), path, resume=True)


def test_a_simulation_leaves_out_the_same_batches(tmp_path: Path) -> None:
    cluster = Cluster(workers=2, times=WorkerTimes.constant(1.0, seed=0), merge_s=0.0)
    torch.set_num_threads(1)
    for fault in ("infinite", "gradient", "empty"):
        found = simulate(skipping(fault), cluster, True, None, lambda event: None)
        assert found["digest"] == train_here(skipping(fault), Team(), tmp_path / fault).digest
        assert found["bad_batches"] == 1


def test_contributions_computed_at_once_leave_out_the_same_batches() -> None:
    torch.set_num_threads(1)
    plain = functools.partial(Net, norm=False, drop=0.0)
    cluster = Cluster(workers=2, times=WorkerTimes.constant(1.0, seed=0), merge_s=0.0)
    for fault in ("infinite", "empty"):
        skips = skipping(fault, model=plain, rule="asynchronous", objective=lines)
        found = [
            simulate(skips, dataclasses.replace(cluster, batched=batched), True, None, lambda event: None)
            for batched in (False, True)
        ]
        assert [each["bad_batches"] for each in found] == [1, 1]
        assert found[1]["objective_last"] == pytest.approx(found[0]["objective_last"], rel=1e-4)


def test_what_a_run_does_by_default_with_bad_batches_changes_no_fingerprint() -> None:
    named = recipe(model="m:Model", data="m:data", objective="m:objective", optimizer="m:optimizer")
    table = named.to_table()
    del table["watch"]["bad_batch"], table["watch"]["bad_batches"]
    assert parse(table)[0].fingerprint() == named.fingerprint()
    assert dataclasses.replace(named, watch=Watch(bad_batch="skip")).fingerprint() != named.fingerprint()


# ------------------------------------------------------------------------------------- samples that the system refuses


class Flaky(Samples):
    """Refuses a sample so many times; the tries of all processes are counted in a file."""

    def __init__(self, tries: Path, refusals: int):
        super().__init__("", None)
        self.tries, self.refusals = tries, refusals

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        torch.rand(1)  # a try that failed must not change the numbers of the next
        if index == BAD:
            with self.tries.open("a") as file:
                file.write("x")
            if self.tries.stat().st_size <= self.refusals:
                raise OSError("stale file handle")
        x, y, mark = super().__getitem__(index)
        return x + 0.1 * torch.rand(4), y, mark


@pytest.mark.parametrize(("engine", "workers"), [("lockstep", 1), ("lockstep", 3), ("server", 2)])
def test_a_sample_that_the_system_refuses_is_read_again(engine: Any, workers: int, tmp_path: Path) -> None:
    team = Team(workers=workers, engine=engine)
    found = [
        train_here(recipe(data=functools.partial(Flaky, tmp_path / f"{n}", n)), team, tmp_path / f"run{n}")
        for n in (0, 2)
    ]
    assert found[0].digest == found[1].digest
    assert found[1].result["restarts"] == 0
    told = [event["why"] for event in found[1].events if event["kind"] == "warned"]
    assert told == ["samples were read again, after an error of the system: stale file handle."] * (workers == 1)


def test_a_sample_is_read_again_as_often_as_restarts_allow(tmp_path: Path) -> None:
    path, refused = tmp_path / "run", recipe(data=functools.partial(Flaky, tmp_path / "tries", 100))
    told = caught(DataError, refused, Team(workers=2, restarts=1), path)
    assert f"failed to give sample {BAD} (OSError: stale file handle)" in told
    assert "mend it, or leave the sample out with skip_samples (--skip-samples)" in told
    assert f"version {STOP} is saved" in told
    assert (tmp_path / "tries").read_text() == "xx"


def test_a_sample_that_cannot_be_read_can_be_left_out(tmp_path: Path) -> None:
    """The way out that the message names: one digest for any team, that of a recipe that says so from the start."""
    flag = tmp_path / "flag"
    flag.touch()
    plain = functools.partial(Net, norm=False)
    changed = recipe("unreadable", flag, model=plain, changes=(Change(version=STOP, skip_samples=(BAD,)),))
    digests = set()
    for workers in (1, 2, 3):
        path = tmp_path / f"{workers}"
        caught(DataError, recipe("unreadable", flag, model=plain), Team(workers=workers), path)
        digests.add(train_here(changed, Team(workers=4 - workers), path, resume=True).digest)
        assert replayed(changed, path).same
    digests.add(train_here(changed, Team(), tmp_path / "whole").digest)
    assert len(digests) == 1


class Truncated(Dataset[Any]):
    """Its third sample, which the data's fingerprint is made of too, cannot be read any more once `flag` is there."""

    def __init__(self, flag: Path):
        self.flag = flag

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        if index == 2 and self.flag.exists():
            raise ValueError("the file is truncated")
        return torch.full((4,), index / SAMPLES), torch.tensor(index % 3), torch.tensor(0)


def test_a_sample_that_the_fingerprint_of_the_data_covers_can_be_left_out(tmp_path: Path) -> None:
    flag, path = tmp_path / "flag", tmp_path / "run"
    fields: dict[str, Any] = {"model": functools.partial(Net, norm=False), "data": functools.partial(Truncated, flag)}
    train_here(recipe(**{**fields, "steps": 2}), Team(workers=2), path)
    flag.touch()
    caught(DataError, recipe(**fields), Team(), path, resume=True)
    changed = recipe(**fields, changes=(Change(version=2, skip_samples=(2,)),))
    run = train_here(dataclasses.replace(changed, steps=4), Team(workers=3), path, resume=True)
    told = [event["why"] for event in run.events if event["kind"] == "warned"]
    assert len([why for why in told if why.startswith("samples 2, which are left out, cannot be read")]) == 1
    assert train_here(changed, Team(workers=2), path, resume=True).result["steps"] == 8
    assert replayed(changed, path).same
    other = dataclasses.replace(changed, data=functools.partial(Samples, "", None))
    caught(CheckpointError, other, Team(), path, resume=True)


def test_a_batch_that_batchnorm_refuses_for_a_sample_that_is_left_out_loses_another(tmp_path: Path) -> None:
    flag, one = tmp_path / "flag", Change(version=STOP, skip_samples=(BAD,))
    flag.touch()
    caught(DataError, recipe("unreadable", flag), Team(), tmp_path / "run")
    told = caught(RecipeError, recipe("unreadable", flag, changes=(one,)), Team(), tmp_path / "run", resume=True)
    assert "leave another sample of that step out too, with skip_samples" in told
    another = next(index for index in BATCH if index != BAD)
    two = Change(version=STOP, skip_samples=(BAD, another))
    run = train_here(recipe("unreadable", flag, changes=(one, two)), Team(workers=2), tmp_path / "run", resume=True)
    assert run.result["steps"] == 8
