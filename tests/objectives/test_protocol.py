"""The objective's protocol beyond sums and counts: weights by step, metrics, what cannot be kept or read."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from instep.components import Component
from instep.data import Data
from instep.errors import ObjectiveError
from instep.objectives import Warmup, bind, check_protocol, check_repeats, from_component, learn_terms, objective
from instep.recipe import Recipe, Team
from instep.rules import UpdateRule
from instep.worker.evaluation import Evaluation
from instep.worker.replica import Replica
from support import workloads
from support.harness import train_here

counts = {"cross_entropy": 1, "pull": 1, "correct": 1}


def classify_counts(batch: tuple[Tensor, Tensor]) -> dict[str, int]:
    labels = batch[1]
    return {"cross_entropy": len(labels), "pull": int((labels == 0).sum()), "correct": int((labels != 0).sum())}


@objective(counts=classify_counts, weights={"pull": Warmup(0.5, steps=4)}, metrics=("correct",))
def classify(model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """A metric first, to show that order decides nothing; it has a count of its own."""
    images, labels = batch
    logits = model(images)
    right = (logits.argmax(1) == labels) & (labels != 0)
    return {
        "correct": right.float().sum() + 0 * logits.sum(),  # it could have a gradient
        "cross_entropy": F.cross_entropy(logits, labels, reduction="sum"),
        "pull": logits[labels == 0].square().sum(),
    }


def recipe(**changes: Any) -> Recipe:
    return workloads.convnet(**{"objective": classify, "steps": 6, "evaluate_every": 3, **changes})


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def learnt(f: Any, batch: Any = None) -> Any:
    return learn_terms(bind(f), linear(), torch.ones(4, 3) if batch is None else batch)


def two(model: nn.Module, batch: Tensor) -> dict[str, Tensor]:
    y = model(batch)
    return {"square": y.pow(2).sum(), "absolute": y.abs().sum()}


def marked(**given: Any) -> Callable[[nn.Module, Tensor], dict[str, Tensor]]:
    return objective(**given)(lambda model, batch: two(model, batch))


# ------------------------------------------------------------------------------------------------------------ weights


def test_a_term_weighs_1_unless_its_weight_is_given() -> None:
    assert learnt(two).weights(3) == {"square": 1.0, "absolute": 1.0}
    assert learnt(marked(weights={"absolute": 0.25})).weights(3) == {"square": 1.0, "absolute": 0.25}
    assert learnt(marked(weights={"absolute": lambda step: step / 10})).weights(3)["absolute"] == 0.3


def test_a_warm_up_rises_from_0_to_its_weight_and_stays() -> None:
    assert [Warmup(0.5, steps=4)(step) for step in range(6)] == [0, 0.125, 0.25, 0.375, 0.5, 0.5]
    assert Warmup(0.5)(0) == 0.5
    with pytest.raises(ObjectiveError, match="-1 steps"):
        Warmup(1.0, -1)


def test_the_objective_is_the_weighted_sum_of_its_means() -> None:
    bound = learnt(marked(weights={"absolute": Warmup(2.0, steps=2)}))
    assert bound.whole({"square": 3.0, "absolute": 5.0}, 1) == 3.0 + 1.0 * 5.0
    assert bound.whole({"absolute": 5.0}, 9) == 10.0


@pytest.mark.parametrize("weight", [math.nan, math.inf, None, "1", True, lambda step: None])
def test_a_weight_that_is_no_number_is_refused(weight: Any) -> None:
    with pytest.raises(ObjectiveError, match=r"weight of term 'square' is .* in step 1; it must be a finite number"):
        learnt(marked(weights={"square": weight}))


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"weights": {"sqare": 2.0}}, "has weights for 'sqare' and minimises 'absolute', 'square'"),
        ({"weights": [1.0, 2.0]}, "weights are .*; give a mapping"),
        ({"weights": {"square": 1.0}, "metrics": ("square",)}, "has weights for 'square' and minimises 'absolute'"),
        ({"metrics": ("acuracy",)}, "has the metrics 'acuracy' and gave no 'acuracy': its terms are"),
        ({"metrics": ("square", "absolute")}, "has no term that is minimised"),
        ({"metrics": "square"}, "metrics are 'square'.*; give a tuple"),
    ],
)
def test_weights_and_metrics_name_terms(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ObjectiveError, match=sentence):
        learnt(marked(**given))


def test_attributes_of_a_function_with_arguments_are_found() -> None:
    f = from_component(Component(classify))
    assert bind(f).metrics == {"correct"}
    assert bind(partial(classify)).metrics == {"correct"}

    def scaled(model: nn.Module, batch: Tensor, by: float = 1.0) -> dict[str, Tensor]:
        return {name: by * value for name, value in two(model, batch).items()}

    bound = learnt(from_component(Component(objective(weights={"square": 3.0})(scaled), {"by": 2.0})))
    assert bound.weights(0)["square"] == 3.0


# ------------------------------------------------------------------------------------------------------------ metrics


def test_metrics_come_last_have_no_gradient_and_are_not_in_the_objective() -> None:
    bound = learnt(marked(metrics=("square",)))
    assert bound.terms == ("absolute", "square")
    assert bound.minimised == ("absolute",)
    sums = bound.sums(linear(), torch.ones(4, 3))
    assert sums["absolute"].requires_grad
    assert not sums["square"].requires_grad
    assert bound.whole({"square": 3.0, "absolute": 5.0}, 0) == 5.0
    detached = objective(metrics=("n",))(lambda m, b: {"loss": m(b).sum(), "n": m(b).detach().sum()})
    assert learnt(detached).terms == ("loss", "n")


def test_a_batch_with_items_of_a_metric_alone_has_nothing_to_learn_from() -> None:
    bound = learnt(marked(metrics=("square",)))
    assert bound.has_items({"absolute": 1, "square": 0})
    assert not bound.has_items({"absolute": 0, "square": 4})
    assert "step 4 has no items to learn from: the objective counts 0 for term 'absolute' over" in str(
        bound.no_items(3)
    )


def test_a_term_without_items_in_the_whole_batch_adds_nothing_whatever_its_sum_is() -> None:
    def other(model: nn.Module, batch: Any) -> dict[str, Tensor]:
        return {"loss": model(batch[0]).square().sum(), "none": model(batch[0]).sum()}

    f = objective(counts=lambda batch: {"loss": len(batch[0]), "none": 0})(other)
    replica = Replica(recipe(objective=f), "cpu")
    replica.learn_terms(0)
    batch = replica.batch(0, 0)
    model = copy.deepcopy(replica.module)
    other(model, batch)["loss"].div(9).backward()
    replica.compute(0, 0, batch, {"loss": 9, "none": 0})
    for found, wanted in zip(replica.module.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(found.grad, wanted.grad)


@pytest.mark.processes
def test_a_metric_changes_no_bit_of_the_weights(tmp_path: Path) -> None:
    def without(model: nn.Module, batch: Any) -> dict[str, Tensor]:
        return {name: value for name, value in classify(model, batch).items() if name != "correct"}

    def without_counts(batch: Any) -> dict[str, int]:
        return {name: value for name, value in classify_counts(batch).items() if name != "correct"}

    bare = objective(counts=without_counts, weights=classify.weights)(without)  # type: ignore[attr-defined]
    digests = [
        train_here(recipe(objective=f), Team(), tmp_path / str(i)).digest for i, f in enumerate((classify, bare))
    ]
    assert digests[0] == digests[1]


@pytest.mark.processes
@pytest.mark.parametrize("rule", ["synchronous", "bounded_staleness:0"])
def test_objective_and_metrics_on_the_tape_are_those_of_the_whole_batch(rule: str, tmp_path: Path) -> None:
    """Against the definition, in one process, for every step; weights by their step; evaluation as in the last step."""
    made = recipe(rule=UpdateRule.from_text(rule)) if rule != "synchronous" else recipe()
    workers = 3 if rule == "synchronous" else 1
    run = train_here(made, Team(workers=workers, checkpoint_every=1, keep=0), tmp_path / "run")
    torch.set_num_threads(1)
    replica = Replica(made, "cpu")
    replica.learn_terms(0)
    merged = [event for event in run.events if event["kind"] == "merged"]
    if rule == "synchronous":
        sums, counted = dict.fromkeys(counts, 0.0), dict.fromkeys(counts, 0)
        for microbatch in range(made.microbatches):  # the first step, whose weights are at hand
            batch = replica.batch(0, microbatch)
            for name, count in classify_counts(batch).items():
                counted[name] += count
            with torch.no_grad():
                for name, value in classify(replica.module, batch).items():
                    sums[name] += float(value)
        for name in counts:
            assert merged[0]["terms"][name] == pytest.approx(sums[name] / counted[name], rel=1e-6)
    for event in merged:
        step = event["step"] - 1
        terms = event["terms"]
        expected = terms["cross_entropy"] + min(1.0, step / 4) * 0.5 * terms.get(
            "pull", 0.0
        )  # of which a batch may have no items
        assert event["objective"] == pytest.approx(expected, rel=1e-12)
    for event in (event for event in run.events if event["kind"] == "evaluated"):
        terms = event["terms"]
        assert set(terms) == set(counts)
        assert event["objective"] == pytest.approx(terms["cross_entropy"] + 0.5 * terms["pull"], rel=1e-12)


@pytest.mark.processes
def test_metrics_are_the_same_numbers_for_any_team(tmp_path: Path) -> None:
    def told(workers: int) -> list[Any]:
        run = train_here(recipe(), Team(workers=workers), tmp_path / str(workers))
        kinds = ("merged", "evaluated")
        return [run.digest, *[(e["terms"], e["objective"]) for e in run.events if e["kind"] in kinds]]

    assert told(1) == told(3) == told(8)


def test_bits_per_byte_are_from_the_cross_entropy_alone() -> None:
    class Codec:
        bytes_per_token = 2.0

    class Stub:
        recipe = workloads.gpt()
        data = Data([1], codec=Codec())  # type: ignore[arg-type]
        objective = learnt(
            objective(metrics=("cross_entropy",))(lambda m, b: {"smooth": m(b).sum(), "cross_entropy": m(b).sum()})
        )

    found = Evaluation.of(Stub(), [[2, 2]], [[8.0, 4.0]])  # type: ignore[arg-type]
    assert found.objective == 4.0
    assert found.facts(1, Stub())["bits_per_byte"] == pytest.approx(2 / math.log(2) / 2)  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------------- state and globals


class Counting:
    """Keeps state: the term grows with every call."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, model: nn.Module, batch: Tensor) -> Tensor:
        self.calls += 1
        return self.calls * model(batch).square().sum()


SWITCH = {"flag": 1.0}


def reads_a_global(model: nn.Module, batch: Tensor) -> Tensor:
    SWITCH["flag"] *= 1.001
    return SWITCH["flag"] * model(batch).square().sum()


def reads_the_clock(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().sum() * (1000 * time.perf_counter() % 1)


@pytest.mark.parametrize("f", [Counting(), reads_a_global, reads_the_clock])
def test_what_keeps_state_or_reads_a_global_that_changes_is_refused(f: Any) -> None:
    with pytest.raises(
        ObjectiveError, match="'objective' of the objective is .* it keeps state, or reads a clock or a"
    ):
        check_protocol(bind(f), linear(), torch.ones(4, 3))


def test_random_objectives_and_models_with_state_pass() -> None:
    class Remembers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            out: Tensor = self.layer(x) * self.calls
            return out

    model = Remembers()
    check_repeats(bind(lambda m, b: (m(b) + torch.randn(4, 3)).square().sum()), model, torch.ones(4, 3))
    assert model.calls == 0


@pytest.mark.processes
def test_a_run_is_refused_before_its_first_step(tmp_path: Path) -> None:
    with pytest.raises(ObjectiveError, match="keeps state"):
        train_here(workloads.convnet(objective=CountingImages), Team(workers=2), tmp_path / "run")


class CountingImages(Counting):
    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        return super().__call__(model, batch[0])
