"""Metrics that are no sums, computed by one process from outputs of the whole held-out set."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from instep.errors import ObjectiveError, WorkerError
from instep.monitors.progress import ProgressDisplay
from instep.objectives import bind, learn_terms, objective
from instep.objectives.gathers import check_gathers, measure
from instep.offline.cluster import Cluster
from instep.offline.simulation import simulate
from instep.recipe import Recipe, Team
from instep.record import checkpoint
from instep.transport import shared_memory
from instep.watch import Watch
from support.harness import train_here
from support.kinds import quick

pytestmark = pytest.mark.processes

HELD_OUT = 23  # no whole number of batches


def points(count: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, generator=generator)
    return TensorDataset(x, (x[:, 0] + torch.randn(count, generator=generator) > 0).long())


class InOrder:
    """The targets in the order in which they came, as one number, and how often each method was called."""

    def __init__(self) -> None:
        self.seen: list[int] = []
        self.updates = 0

    def update(self, target: Tensor) -> None:
        self.updates += 1
        self.seen += target.tolist()

    def compute(self) -> dict[str, Any]:
        return {
            "number": as_number(self.seen),
            "updates": self.updates,
            "parts": [len(self.seen), float(np.float32(0.5))],
        }


def as_number(bits: list[int]) -> int:
    return sum(bit << place for place, bit in enumerate(bits))


class Hits:
    """The share of samples on their side of 0."""

    def __init__(self) -> None:
        self.right = self.all = 0

    def update(self, preds: Tensor, target: Tensor) -> None:
        self.right += int(((preds > 0) == (target > 0)).sum())
        self.all += len(target)

    def compute(self) -> Tensor:
        return torch.tensor(self.right / self.all)


def auc(preds: Tensor, target: Tensor) -> float:
    """The share of pairs of different targets that are in their order."""
    return float((preds[target == 1][:, None] > preds[target == 0]).double().mean())


def outputs(model: nn.Module, batch: Any) -> dict[str, Tensor]:
    return {"preds": model(batch[0]).squeeze(1), "target": batch[1]}


GATHERS = {
    "hits": Hits(),
    "anew": Hits,
    "auc": auc,
    "order": InOrder(),
}


class Classes:
    """Binary cross-entropy, with what it gathers."""

    gathers: ClassVar[dict[str, Any]] = GATHERS
    outputs = staticmethod(outputs)

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        return F.binary_cross_entropy_with_logits(model(batch[0]).squeeze(1), batch[1].float(), reduction="sum")


def recipe(**changes: Any) -> Recipe:
    fields: dict[str, Any] = {
        "model": lambda: nn.Linear(4, 1), "objective": Classes,
        "data": lambda: (points(40, 0), points(HELD_OUT, 1)), "batch": 16, "microbatches": 8, "steps": 4,
        "evaluate_every": 2, "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    }  # fmt: skip
    return Recipe(**{**fields, **changes})


def gathered(events: list[dict[str, Any]]) -> list[dict[str, float]]:
    return [event["gathered"] for event in events if event["kind"] == "evaluated"]


def held_out_of(path: Path) -> tuple[Tensor, Tensor]:
    """What the run's last model says of the held-out set, and its targets."""
    model, (x, target) = nn.Linear(4, 1), points(HELD_OUT, 1).tensors
    model.load_state_dict(dict(checkpoint.load(max((path / "checkpoints").glob("step-*"))).model_state))
    return model(x).squeeze(1).detach(), target


def expected(path: Path) -> dict[str, float]:
    """By the whole held-out set at once, from the last checkpoint."""
    preds, target = held_out_of(path)
    hits = float(((preds > 0) == (target > 0)).double().mean())
    return {
        "hits": hits, "anew": hits, "auc": auc(preds, target), "order.number": float(as_number(target.tolist())),
        "order.updates": float(math.ceil(HELD_OUT / 2)), "order.parts.0": float(HELD_OUT), "order.parts.1": 0.5,
    }  # fmt: skip


@pytest.mark.parametrize("room", [shared_memory.ROOM, 1000])
def test_there_is_one_value_for_any_team_and_it_is_that_of_the_whole_set(
    room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_memory, "ROOM", room)
    teams = [Team(workers=w) for w in (1, 2, 3)] + [Team(workers=2, engine="server")]
    if room < shared_memory.ROOM:  # in many pieces
        teams = teams[:3:2]
    runs = [train_here(recipe(), team, tmp_path / str(place)) for place, team in enumerate(teams)]
    found = [gathered(run.events) for run in runs]
    assert all(each == found[0] for each in found)
    assert len(found[0]) == 2
    assert found[0][-1] == pytest.approx(expected(tmp_path / "0"), rel=1e-6)
    assert len({run.digest for run in runs}) == 1
    for run in runs:
        assert run.result["gathered"] == found[0][-1]
        assert json.loads((run.path / "result.json").read_text())["gathered"] == found[0][-1]
    if room == shared_memory.ROOM:
        virtual = simulate(recipe(), Cluster(workers=3), True, None, lambda event: None)
        assert virtual["gathered"] == found[0][-1]


def test_gathering_changes_no_bit_of_a_run_and_no_event_of_one_without(tmp_path: Path) -> None:
    plain = recipe(objective=Classes.__call__.__get__(Classes()))
    runs = [train_here(made, Team(workers=2), tmp_path / str(i)) for i, made in enumerate((recipe(), plain))]
    assert runs[0].digest == runs[1].digest
    evaluated = [[e for e in run.events if e["kind"] == "evaluated"] for run in runs]
    assert all("gathered" not in event for event in evaluated[1])
    assert [e["objective"] for e in evaluated[0]] == [e["objective"] for e in evaluated[1]]
    assert runs[1].result["gathered"] is None


@pytest.mark.parametrize("rule", ["asynchronous", "local_sgd:2"])
def test_under_any_rule_it_is_there(rule: str, tmp_path: Path) -> None:
    run = train_here(recipe(rule=rule), Team(workers=2), tmp_path / "run")
    assert gathered(run.events)[-1] == pytest.approx(expected(run.path), rel=1e-6)
    assert len(gathered(run.events)) == 2


def test_it_is_the_same_with_patience_where_all_wait_and_after_a_resume(tmp_path: Path) -> None:
    patient = recipe(watch=Watch(patience=1), steps=8)
    found = [gathered(train_here(patient, Team(workers=w), tmp_path / f"patient-{w}").events) for w in (1, 3)]
    assert found[0] == found[1]
    train_here(recipe(), Team(workers=3), tmp_path / "run")
    resumed = train_here(recipe(steps=8), Team(workers=2), tmp_path / "run", resume=True)
    assert gathered(resumed.events) == gathered(train_here(recipe(steps=8), Team(), tmp_path / "8").events)[2:]


def test_outputs_that_fail_in_one_worker_end_the_run_for_all(tmp_path: Path) -> None:
    last = points(HELD_OUT, 1).tensors[0][-1]

    def some(model: nn.Module, batch: Any) -> dict[str, Tensor]:
        if bool((batch[0][-1] == last).all()):
            raise ValueError("this sample has no outputs")
        return outputs(model, batch)

    made = objective(gathers=GATHERS, outputs=some)(lambda m, b: Classes()(m, b))
    with pytest.raises(WorkerError, match="worker 2 raised ValueError: this sample has no outputs"):
        train_here(recipe(objective=made), Team(workers=3), tmp_path / "run")


def test_the_console_names_what_was_gathered() -> None:
    progress = ProgressDisplay()
    progress.see({"kind": "run_started", "step": 0, "steps": 4, "clock": "wall"})
    progress.see({"kind": "evaluated", "t_s": 1.0, "objective": 0.5, "gathered": {"auroc": 0.363, "f1": None}})
    line = progress.line(evaluated=True)
    assert "held-out 0.5000  auroc 0.3630  f1 not finite" in line


def failing(preds: Tensor, target: Tensor) -> float:
    raise ValueError("only one class")


def late(preds: Tensor, target: Tensor) -> str:
    return "good"


def test_a_metric_that_fails_is_warned_of_and_the_run_goes_on(tmp_path: Path) -> None:
    made = objective(gathers={"bad": failing, "text": late, "auc": auc}, outputs=outputs)(lambda m, b: Classes()(m, b))
    run = train_here(recipe(objective=made), Team(workers=2), tmp_path / "run")
    told = [event["why"] for event in run.events if event["kind"] == "warned"]
    assert "the metric 'bad' could not be computed on the held-out data: ValueError: only one class" in told
    assert "the metric 'text' could not be computed on the held-out data: it gave a str; it must give a" in str(told)
    assert run.result["gathered"].keys() == {"auc"}


class Strict:
    def update(self, preds: Tensor, target: Tensor) -> None:
        raise RuntimeError("shapes")

    def compute(self) -> float:
        return 0.0


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"gathers": ["auroc"], "outputs": outputs}, "the objective's gathers are of type list"),
        ({"gathers": {"auroc": 3}, "outputs": outputs}, "the metric 'auroc' is of type int"),
        ({"gathers": {"auroc": auc}}, "has 'gathers' and no 'outputs'"),
        (
            {"gathers": {"auroc": Hits}, "outputs": lambda m, b: {"logits": m(b[0])}},
            "'auroc' needs 'preds', 'ta",
        ),
        (
            {"gathers": {"auroc": auc}, "outputs": lambda m, b: {"preds": m(b[0])}},
            "'auroc' needs 'target', and the obj",
        ),
        ({"gathers": {"auroc": auc}, "outputs": lambda m, b: m(b[0])}, "the objective's outputs are of type Tensor"),
        (
            {"gathers": {"x": Strict}, "outputs": outputs},
            "metric 'x' refused the outputs of a batch \\(RuntimeError: sha",
        ),
        ({"gathers": {"objective": auc}, "outputs": outputs}, "gathers 'objective', and has a term of that name"),
    ],
)
@pytest.mark.parametrize("engine", quick(["lockstep", "server"], "lockstep"))
def test_what_cannot_be_gathered_is_refused_before_the_first_step(
    given: dict[str, Any], words: str, engine: Any, tmp_path: Path
) -> None:
    def plain(model: nn.Module, batch: Any) -> Tensor:
        return Classes()(model, batch)

    made = plain
    for name, value in given.items():
        setattr(made, name, value)
    with pytest.raises(ObjectiveError, match=words):
        train_here(recipe(objective=made), Team(workers=2, engine=engine), tmp_path / "run")


def test_a_metric_starts_anew_in_each_evaluation_and_several_numbers_are_named() -> None:
    model, (x, target) = nn.Linear(4, 1), points(8, 2).tensors
    preds = model(x).squeeze(1).detach()
    made = objective(gathers=GATHERS, outputs=outputs)(lambda m, b: Classes()(m, b))
    assert learn_terms(bind(made), model, (x, target)).gathers == tuple(GATHERS)
    check_gathers(made, model, (x, target))
    halves = [{"preds": preds[part], "target": target[part]} for part in (slice(3), slice(3, 8))]
    assert measure(made, halves) == measure(made, halves)
    assert measure(made, halves)[0]["order.updates"] == 2
    by_class = objective(gathers={"mean": lambda preds, target: preds.mean(0)}, outputs=outputs)(lambda m, b: 0)
    values, doubts = measure(by_class, [{"preds": torch.stack([-preds, preds], 1), "target": target}])
    assert values.keys() == {"mean.0", "mean.1"}
    assert doubts == []


@pytest.mark.slow  # its import takes seconds, and makes this process so large that each fork after it is slow
def test_those_of_torchmetrics_work_as_they_are(tmp_path: Path) -> None:
    from torchmetrics import MetricCollection
    from torchmetrics.classification import BinaryAUROC, BinaryF1Score, MulticlassAccuracy

    given = {
        "auroc": BinaryAUROC(), "f1": BinaryF1Score, "both": MetricCollection([BinaryAUROC(), BinaryF1Score()]),
        "auc": auc,
    }  # fmt: skip
    made = objective(gathers=given, outputs=outputs)(lambda m, b: Classes()(m, b))
    runs = [train_here(recipe(objective=made), Team(workers=w), tmp_path / str(w)) for w in (1, 2, 3)]
    assert runs[0].result["gathered"] == runs[1].result["gathered"] == runs[2].result["gathered"]
    preds, target = held_out_of(runs[0].path)
    auroc, f1 = float(BinaryAUROC()(preds, target)), float(BinaryF1Score()(preds, target))
    assert auroc == pytest.approx(auc(preds, target))
    assert runs[0].result["gathered"] == pytest.approx(
        {"auroc": auroc, "f1": f1, "both.BinaryAUROC": auroc, "both.BinaryF1Score": f1, "auc": auroc}
    )
    accuracy = partial(MulticlassAccuracy, num_classes=2, average=None)
    by_class = objective(gathers={"accuracy": accuracy}, outputs=outputs)(lambda m, b: 0)
    values, doubts = measure(by_class, [{"preds": torch.stack([-preds, preds], 1), "target": target}])
    assert values.keys() == {"accuracy.0", "accuracy.1"}
    assert doubts == []
