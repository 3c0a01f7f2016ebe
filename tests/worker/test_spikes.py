"""Watching the objective: verdicts are functions of the objectives alone, and hold for any team, resume and replay."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from instep.clock.times import WorkerTimes
from instep.data import Data
from instep.errors import CheckpointError, RecipeError, RecordError
from instep.objectives import objective
from instep.offline.cluster import Cluster
from instep.offline.simulation import simulate
from instep.recipe import Recipe, Team
from instep.record import best, checkpoint, tape
from instep.rules import presets
from instep.watch import Watch, limit
from instep.worker.spikes import Verdict
from support import workloads
from support.harness import Client, Outcome, saved, train_here
from support.kinds import quick
from support.regression import regression
from support.serving import at, kill, replayed

pytestmark = pytest.mark.processes

# --------------------------------------------------------------------------------------------------------- the verdict


@given(st.lists(st.floats(-1e6, 1e6), min_size=3, max_size=40), st.floats(0.1, 20))
def test_the_limit_is_the_median_and_the_scaled_median_deviation(past: list[float], deviations: float) -> None:
    values = np.array(past, dtype=np.float64)
    scale = max(1.4826 * np.median(np.abs(values - np.median(values))), 1e-3 * abs(np.median(values)))
    assert limit(past, deviations) == pytest.approx(float(np.median(values) + deviations * scale), rel=1e-12, abs=1e-9)


@given(st.lists(st.floats(1, 2), min_size=11, max_size=11), st.lists(st.floats(1e3, 1e9), min_size=5, max_size=5))
def test_spikes_among_the_past_do_not_carry_the_limit_away(good: list[float], bad: list[float]) -> None:
    assert limit([*good, *bad], 10) <= 2 + 10 * 1.4826 * 1


def test_an_objective_that_stands_still_has_no_spike_in_its_last_digit() -> None:
    assert limit([2.0] * 10, 10) == pytest.approx(2.02)


# ------------------------------------------------------------------------------------------------------- a run to watch

BAD = (40, 41)
"""Samples with targets far off. In each of 4 epochs of 12 steps one or two steps have them."""


@objective
def squares(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return (model(x)[:, 0] - y).square().sum()


class Net(nn.Module):
    """With dropout and BatchNorm: an update that is left out must leave buffers too."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.1), nn.Linear(8, 1))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out


def data(held_out: bool = True) -> Data:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(192, 4, generator=generator)
    y = x.sum(1) + 0.5 * torch.randn(192, generator=generator)
    y[list(BAD)] = 1e3
    return Data(TensorDataset(x, y), TensorDataset(x[64:128], y[64:128]) if held_out else None)


def watched(**fields: Any) -> Recipe:
    watch = Watch(**{"window": 6, "deviations": 20.0, "rollback_every": 5, **fields.pop("watch", {})})
    defaults: dict[str, Any] = {
        "model": Net, "objective": squares, "data": data, "batch": 16, "microbatches": 8, "steps": 30,
        "name": "watched",
        "optimizer": lambda p: torch.optim.Adam(p, lr=0.01),
    }  # fmt: skip
    return Recipe(watch=watch, **{**defaults, **fields})


def merges(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return tape.latest(events)


def verdicts(recipe: Recipe, objectives: list[float]) -> list[bool]:
    """By the definition, from the tape."""
    window, deviations = recipe.watch.window, recipe.watch.deviations
    found = []
    for step, value in enumerate(objectives):
        past = objectives[max(0, step - window) : step]
        middle = statistics.median(past or [0.0])
        spread = 1.4826 * statistics.median(abs(v - middle) for v in past or [0.0])
        found.append(len(past) == window and value > middle + deviations * max(spread, 1e-3 * abs(middle)))
    return found


def told(spikes: list[bool], answer: str, window: int) -> list[int]:
    """The versions of which the run warns: all, or under "warn" those with no spike in the window before."""
    return [
        step + 1
        for step, flag in enumerate(spikes)
        if flag and (answer != "warn" or not any(spikes[max(0, step - window + 1) : step]))
    ]


@pytest.mark.parametrize("answer", quick(["ignore", "warn", "skip", "rollback", "stop"], "stop"))
def test_an_answer_to_spikes_holds_for_any_team_and_on_replay(answer: str, tmp_path: Path) -> None:
    recipe = watched(watch={"spike": answer})
    runs: dict[str, Outcome] = {
        f"{engine}{w}": train_here(
            recipe, Team(workers=w, engine=engine, checkpoint_every=1, keep=0), tmp_path / f"{engine}{w}"
        )
        for engine, w in [("lockstep", 1), ("lockstep", 3), ("lockstep", 8), ("server", 2)]
    }
    first = runs["lockstep1"]
    for name, run in runs.items():
        assert run.digests == first.digests, name
        assert run.result["stopped"] == first.result["stopped"]
        assert replayed(recipe, run.path).same, name
    events = merges(first.events)
    spikes = verdicts(recipe, [event["objective"] for event in events])
    assert any(spikes), "the workload must have some"
    assert [event.get("spike") is not None for event in events] == [flag and answer != "ignore" for flag in spikes]
    warned = [event for event in first.events if event["kind"] == "warned"]
    assert [event["version"] for event in warned] == ([] if answer == "ignore" else told(spikes, answer, 6))
    left_out = [event["version"] for event in events if event.get("spike") in ("skip", "stop", "rollback")]
    assert first.result["skipped"] == len(left_out)
    moved = [version for version in left_out if first.digests[version] != first.digests[version - 1]]
    assert bool(moved) == (answer == "rollback")
    if answer == "stop":
        assert len(spikes) == len(events) < recipe.steps
        assert spikes.index(True) == len(events) - 1
        assert "spike" in first.result["stopped"]
    if answer == "rollback":
        for version in left_out:
            kept = max(s for s in range(0, version, 5) if not spikes[s])
            assert first.digests[version] == first.digests[kept]
    else:
        assert answer == "stop" or len(events) == recipe.steps


def test_ignoring_and_warning_give_the_same_weights(tmp_path: Path) -> None:
    digests = {
        train_here(watched(watch={"spike": answer}), Team(), tmp_path / answer).digest for answer in ("ignore", "warn")
    }
    assert len(digests) == 1


def stopping_at(version: int) -> Client:
    client = Client(lambda event: client.ask_to_stop() if event.get("version") == version else None)
    return client


@pytest.mark.parametrize("answer", quick(["skip", "stop", "rollback"], "rollback"))
def test_an_answer_holds_across_resumes_and_deaths(answer: str, tmp_path: Path) -> None:
    recipe = watched(watch={"spike": answer}, evaluate_every=4)
    whole = train_here(recipe, Team(checkpoint_every=7), tmp_path / "whole")
    spike = next(event["version"] for event in merges(whole.events) if event.get("spike"))
    for stop in (spike - 1, spike):
        path = tmp_path / str(stop)
        train_here(recipe, Team(workers=2), path, client=stopping_at(stop))
        killing = Client(at("merged", 3, kill(1)))
        run = train_here(recipe, Team(workers=4, checkpoint_every=2), path, resume=True, client=killing)
        assert run.digest == whole.digest
        assert run.result["versions"] == whole.result["versions"]
        assert run.result["stopped"] == whole.result["stopped"]
        assert run.result["skipped"] == whole.result["skipped"]
        assert replayed(recipe, path).same
    again = train_here(recipe, Team(workers=3, engine="server"), path, resume=True)
    assert again.digest == whole.digest, "a run that has ended stays as it is"
    assert again.result["versions"] == whole.result["versions"]


def test_rollbacks_that_do_not_help_end_the_run(tmp_path: Path) -> None:
    """From step 12 on every target is off: the scale follows, but not before the rollbacks are used up."""
    recipe = watched(watch={"spike": "rollback", "rollbacks": 1})
    run = train_here(recipe, Team(workers=2), tmp_path / "run")
    spikes = [event["spike"] for event in merges(run.events) if event.get("spike")]
    assert spikes == ["rollback", "stop"]
    assert "1 rollbacks did not help" in run.result["stopped"]
    assert run.digest == train_here(recipe, Team(workers=1, engine="server"), tmp_path / "server").digest


@pytest.mark.parametrize(
    ("rule", "answer"),
    [
        (presets.asynchronous(), "skip"),
        pytest.param(presets.asynchronous(), "stop", marks=pytest.mark.slow),
        pytest.param(presets.bounded_staleness(1), "skip", marks=pytest.mark.slow),
        (presets.diloco(2), "stop"),
        pytest.param(presets.diloco(2), "warn", marks=pytest.mark.slow),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_other_rules_are_watched_and_replayed(rule: Any, answer: str, tmp_path: Path) -> None:
    recipe = watched(rule=rule, watch={"spike": answer, "deviations": 20.0})
    run = train_here(recipe, Team(workers=2, checkpoint_every=5), tmp_path / "run")
    events = merges(run.events)
    spikes = [event for event in events if event.get("spike")]
    assert spikes
    assert {event["spike"] for event in spikes} == {answer}
    assert replayed(recipe, run.path).same
    assert bool(run.result["stopped"]) == (answer == "stop")
    assert run.result["interrupted"] is False


# ------------------------------------------------------------------------------------------------------ early stopping


class Overfits(nn.Module):
    """Many weights, few samples."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 64), nn.GELU(), nn.Linear(64, 1))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out


def noisy() -> Data:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(56, 4, generator=generator), torch.randn(56, generator=generator)
    return Data(TensorDataset(x[:24], y[:24]), TensorDataset(x[24:], y[24:]))


def overfitting(**fields: Any) -> Recipe:
    defaults: dict[str, Any] = {
        "model": Overfits, "objective": squares, "data": noisy, "batch": 8, "microbatches": 4, "steps": 120,
        "optimizer": lambda p: torch.optim.Adam(p, lr=0.01), "evaluate_every": 5, "watch": Watch(patience=3),
        "name": "overfitting",
    }  # fmt: skip
    return Recipe(**{**defaults, **fields})


@functools.cache
def ended_early() -> int:
    """The version at which the run ends, from the evaluations of a run without patience."""
    run = train_here(overfitting(watch=Watch()), Team(), Path(os.environ["INSTEP_TEST_FOLDER"]) / "long")
    least, since = float("inf"), 0
    for event in tape.latest(run.events, "evaluated"):
        since = 0 if event["objective"] < least else since + 1
        least = min(least, event["objective"])
        if since == 3:
            return int(event["version"])
    raise AssertionError("the workload must overfit")


@pytest.fixture(autouse=True, scope="module")
def _folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["INSTEP_TEST_FOLDER"] = str(tmp_path_factory.mktemp("watch"))


def test_early_stopping_ends_the_run_alike_for_any_team_and_keeps_the_best(tmp_path: Path) -> None:
    recipe = overfitting()
    teams = [Team(workers=w, keep=1, checkpoint_every=50) for w in (1, 2, 4)] + [
        Team(workers=2, engine="server", keep=1)
    ]
    runs = [train_here(recipe, team, tmp_path / str(i)) for i, team in enumerate(teams)]
    assert {run.result["versions"] for run in runs} == {ended_early()}
    assert len({run.digest for run in runs}) == 1
    for run in runs:
        assert "patience" in run.result["stopped"]
        assert run.result["interrupted"] is False
        evaluated = tape.latest(run.events, "evaluated")
        least = min(evaluated, key=lambda event: event["objective"])
        folder = run.path / "checkpoints"
        assert best.read(folder) == (least["version"], least["objective"])
        assert sorted(p.name for p in folder.glob("step-*")) == [
            f"step-{least['version']:08d}",
            f"step-{ended_early():08d}",
        ]
        assert checkpoint.load(checkpoint.path_of(folder, least["version"])).version == least["version"]
        assert replayed(recipe, run.path).same
    assert len({run.digests[best.read(run.path / "checkpoints").version] for run in runs}) == 1  # type: ignore[union-attr]


@pytest.mark.parametrize("engine", quick(["lockstep", "server"], "server"))
def test_early_stopping_holds_across_a_resume(engine: Any, tmp_path: Path) -> None:
    recipe, path = overfitting(), tmp_path / "run"
    train_here(recipe, Team(workers=2, engine=engine), path, client=stopping_at(ended_early() - 7))
    run = train_here(recipe, Team(workers=3, engine=engine), path, resume=True)
    assert run.result["versions"] == ended_early()
    assert run.digest == train_here(recipe, Team(), tmp_path / "whole").digest
    longer = dataclasses.replace(recipe, steps=200)
    assert train_here(longer, Team(), path, resume=True).digest == run.digest, "it has ended"
    assert replayed(longer, path).same


def test_without_keep_best_only_the_last_are_kept(tmp_path: Path) -> None:
    run = train_here(overfitting(), Team(keep=1, keep_best=False), tmp_path / "run")
    assert [p.name for p in (run.path / "checkpoints").iterdir()] == [f"step-{ended_early():08d}"]


def test_the_best_checkpoint_of_a_run_is_had_by_name(tmp_path: Path) -> None:
    from instep.api import Run

    recipe = overfitting()
    run = train_here(recipe, Team(), tmp_path / "run")
    finished = Run(run.path, run.result, recipe)
    version = best.read(run.path / "checkpoints").version  # type: ignore[union-attr]
    expected = saved(run, version).model_state
    for name, value in finished.model(best=True).state_dict().items():
        assert torch.equal(value, expected[name])
    assert any(not torch.equal(value, expected[name]) for name, value in finished.state_dict().items())


@pytest.mark.parametrize("engine", ["lockstep", "server"])
def test_the_best_of_each_average_is_kept_and_had_by_name(engine: Any, tmp_path: Path) -> None:
    from instep.api import Run

    recipe = regression(
        model=Zero, data=passing, ema=(0.8, 0.9), steps=24, evaluate_every=1,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.05),
    )  # fmt: skip
    run = train_here(recipe, Team(workers=2, engine=engine, keep=1), tmp_path / "run")
    evaluated, folder = tape.latest(run.events, "evaluated"), run.path / "checkpoints"
    least = {average: min(evaluated, key=lambda event: _of(event, average)) for average in ("", "0.8", "0.9")}
    found = {average: best.read(folder, average) for average in least}
    assert found == {average: (event["version"], _of(event, average)) for average, event in least.items()}
    versions = {event["version"] for event in least.values()}
    assert len(versions | {recipe.steps}) == 4, "each has its best at another time, and before the end"
    assert sorted(checkpoint.by_version(folder)) == sorted({*versions, recipe.steps})
    finished = Run(run.path, run.result, recipe)
    for decay in recipe.ema:
        own = finished.model(best=True, ema=decay).state_dict()
        for name, value in (
            saved(run, least[str(decay)]["version"]).training_state["ema"]["averages"][str(decay)].items()
        ):
            assert torch.equal(own[name], value)
    with pytest.raises(CheckpointError, match="has no best checkpoint of an average of the decay 0.5: nothing was"):
        finished.model(best=True, ema=0.5)


class Zero(nn.Linear):
    """One weight, which begins at 0."""

    def __init__(self) -> None:
        super().__init__(1, 1, bias=False)
        nn.init.zeros_(self.weight)


def passing() -> Data:
    """Trains a weight from 0 to 2, and wants it to be 1: it comes by, and averages of it after it."""
    ones = torch.ones(8, 1)
    return Data(TensorDataset(ones, 2 * ones), TensorDataset(ones, ones))


def _of(event: Any, average: str) -> float:
    """The objective of the weights or of an average of them."""
    told = event["ema"][average] if average else event
    return float(told["objective"])


def test_best_is_below_what_was_before_and_not_of_a_later_history(tmp_path: Path) -> None:
    def is_best(folder: Path, version: int, objective: float) -> bool:
        return "" in best.better(folder, version, {"objective": objective})

    assert is_best(tmp_path, 5, 2.0)
    best.mark(tmp_path, 5, 2.0)
    assert not is_best(tmp_path, 6, 2.0)
    assert not is_best(tmp_path, 6, float("nan"))
    assert not is_best(tmp_path / "new", 6, float("nan"))
    assert is_best(tmp_path, 6, 1.9)
    assert is_best(tmp_path, 4, 3.0), "the run went back to before 5"
    best.mark(tmp_path, 6, 1.0, "0.9")
    both = {"objective": 1.9, "ema": {"0.9": {"objective": 1.5}, "0.99": {"objective": 1.5}}}
    assert best.better(tmp_path, 7, both) == {"": 1.9, "0.99": 1.5}
    assert best.versions(tmp_path) == {5, 6}
    (tmp_path / best.NAME).write_text("[")
    with pytest.raises(RecordError, match=r"best\.json cannot be read as JSON .*; restore it, or take it away"):
        best.read(tmp_path)


@objective(counts=lambda batch: int((batch[1] < 100).sum()))
def near_squares(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return (model(x)[:, 0] - y)[y < 100].square().sum()


@pytest.mark.parametrize(("value", "told"), [(math.inf, "'objective' nan"), (1e3, "no term has an item")])
def test_held_out_data_without_a_finite_objective_are_no_best_and_no_progress(
    value: float, told: str, tmp_path: Path
) -> None:
    """Infinite samples of both signs, and none that count."""

    def spoilt() -> Data:
        x, y = noisy().train.tensors  # type: ignore[attr-defined]
        signs = torch.tensor([1.0, -1.0]).repeat(12)
        far = x * signs[:, None] * (value if value == math.inf else 1)
        return Data(TensorDataset(x, y), TensorDataset(far, y if value == math.inf else y + value))

    recipe, path = overfitting(data=spoilt, objective=near_squares, steps=40), tmp_path / "run"
    before = train_here(recipe, Team(workers=2), path, client=stopping_at(6)).events
    run = train_here(recipe, Team(workers=2), path, resume=True)
    assert run.result["versions"] == 15
    assert run.result["stopped"].startswith(
        "the held-out objective, nan, is no better than none that is finite, 3 eval"
    )
    assert best.read(path / "checkpoints") is None
    warned = [event["why"].partition(",")[0] for event in [*before, *run.events] if event["kind"] == "warned"]
    assert warned == [f"the objective on the held-out data is nan at version {v} ({told})" for v in (5, 10, 15)]


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"watch": {"spike": "rollback"}, "rule": "asynchronous"}, "'rollback' and the rule is 'asynchronous'"),
        ({"watch": {"spike": "skip"}, "rule": "diloco:4"}, "'skip' and the rule is 'diloco'"),
        ({"watch": {"patience": 2}}, "'recipe.evaluate_every' is 0"),
        ({"watch": {"window": 2}}, "'watch.window' is 2; it must be at least 3"),
        ({"watch": {"deviations": 0.0}}, "'watch.deviations' is 0.0"),
        ({"watch": {"patience": 0}}, "'watch.patience' is 0"),
        ({"watch": {"spike": "panic"}}, "'watch.spike' is 'panic'; it must be one of"),
    ],
)
def test_what_has_no_meaning_is_refused(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RecipeError) as caught:
        watched(**fields)
    assert sentence in str(caught.value)


@pytest.mark.parametrize("engine", ["lockstep", "server"])
def test_patience_without_contents_out_data_is_refused(engine: Any, tmp_path: Path) -> None:
    recipe = overfitting(data=lambda: data(held_out=False))
    with pytest.raises(RecipeError, match="the data have nothing held out"):
        train_here(recipe, Team(workers=2, engine=engine), tmp_path / "run")


@pytest.mark.parametrize("watch", [{"spike": "stop"}, {"spike": "rollback"}, {"patience": 1}])
def test_a_virtual_clock_refuses_what_may_end_the_run(watch: dict[str, Any]) -> None:
    recipe = watched(watch=watch, evaluate_every=5)
    cluster = Cluster(workers=2, times=WorkerTimes.constant(1.0, seed=0), merge_s=0.0)
    with pytest.raises(RecipeError, match=r"may end the run early.*watch.spike to 'warn' or 'skip'"):
        simulate(recipe, cluster, True, None, lambda event: None)


def test_a_virtual_clock_leaves_out_as_a_team_does(tmp_path: Path) -> None:
    recipe = watched(watch={"spike": "skip"})
    cluster = Cluster(workers=2, times=WorkerTimes.constant(1.0, seed=0), merge_s=0.0)
    torch.set_num_threads(1)
    found = simulate(recipe, cluster, True, None, lambda event: None)
    assert found["digest"] == train_here(recipe, Team(workers=2), tmp_path / "run").digest


def test_evaluations_are_decisive_with_patience_alone() -> None:
    base = overfitting(model="m:Model", data="m:data", objective="m:objective", optimizer="m:optimizer")
    plain = dataclasses.replace(base, watch=Watch())
    for key, value in (("evaluate_every", 6), ("evaluate_samples", 7)):
        assert dataclasses.replace(base, **{key: value}).fingerprint() != base.fingerprint()
        assert dataclasses.replace(plain, **{key: value}).fingerprint() == plain.fingerprint()


def test_what_is_not_finite_stops_the_run_whatever_the_watch_says(tmp_path: Path) -> None:
    from instep.errors import NonFiniteError

    def broken() -> Data:
        good = data()
        x, y = good.train.tensors  # type: ignore[attr-defined]
        y[40] = float("nan")
        return Data(TensorDataset(x, y))

    for engine in ("lockstep", "server"):
        with pytest.raises(
            NonFiniteError, match=r"term 'objective' of the objective is nan in (step|global batch) \d+, micro"
        ):
            train_here(
                watched(data=broken, watch={"spike": "skip"}),
                Team(workers=2, engine=engine),  # type: ignore[arg-type]
                tmp_path / engine,
            )


def test_a_verdict_without_an_answer_lets_the_update_be_made() -> None:
    assert Verdict().updates
    assert Verdict("warn", "x").updates
    assert not any(Verdict(answer, "x").updates for answer in ("skip", "stop", "rollback"))


def test_the_workloads_of_other_tests_have_no_spike(tmp_path: Path) -> None:
    """The default warns; in a run that goes well it says nothing."""
    run = train_here(workloads.gpt(steps=30), Team(workers=2), tmp_path / "run")
    assert not [event for event in run.events if event["kind"] == "warned"]
    assert json.loads((run.path / "result.json").read_text())["stopped"] is None
