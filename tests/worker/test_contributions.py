"""What workers and server compute under every rule, in one process and without a clock."""

from __future__ import annotations

import copy
import dataclasses
import gc
import itertools
import tracemalloc
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from instep.errors import NonFiniteError, ObjectiveError
from instep.recipe import Recipe, Schedule
from instep.reduce.checksums import checksum
from instep.rules import UpdateRule, parse
from instep.rules import presets as p
from instep.rules.ledger import Merge
from instep.rules.work import Pieces
from instep.worker.contribution import Arrived, Facts
from instep.worker.contributor import Contributor
from instep.worker.replica import Replica
from instep.worker.updates import Merger
from support import workloads
from support.reference import reference_digests
from support.regression import numbers, squares
from support.serving import RULES, Driven, close, drive

SEEDS = st.integers(0, 1 << 30)


def sgd(lr: float = 0.1) -> Any:
    return lambda parameters: torch.optim.SGD(parameters, lr=lr)


def plain(**changes: Any) -> Recipe:
    """A small net without anything random, plain SGD, ragged batches."""
    fields: dict[str, Any] = {
        "model": lambda: nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)),
        "objective": squares,
        "data": partial(numbers, 37),
        "optimizer": sgd(),
        "batch": 16,
        "microbatches": 8,
        "steps": 4,
    }
    return Recipe(**{**fields, **changes})


# --------------------------------------------------------------------------------------------------- lockstep's bits


@pytest.fixture(scope="module")
def expected() -> dict[str, str]:
    torch.set_num_threads(1)
    return {name: reference_digests(make())[make().steps] for name, make in workloads.ALL.items()}


@pytest.mark.parametrize("name", workloads.ALL)
@settings(max_examples=3)
@given(seed=SEEDS, workers=st.sampled_from([1, 2, 3, 4, 8]), leaving=st.sampled_from([0.0, 0.2]))
def test_a_synchronous_rule_gives_the_bits_of_lockstep_in_any_order_of_arrival(
    name: str, seed: int, workers: int, leaving: float, expected: dict[str, str]
) -> None:
    rule = p.bounded_staleness(0) if seed % 2 else p.synchronous()
    assert drive(workloads.ALL[name](rule=rule), workers, seed, leaving=leaving).digest == expected[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", workloads.ALL)
@pytest.mark.parametrize("workers", [1, 2, 3, 4, 5, 6, 7, 8])
@settings(max_examples=10)
@given(seed=SEEDS, leaving=st.sampled_from([0.0, 0.2]))
def test_a_synchronous_rule_gives_the_bits_of_lockstep_for_any_number_of_workers(
    name: str, workers: int, seed: int, leaving: float, expected: dict[str, str]
) -> None:
    assert drive(workloads.ALL[name](), workers, seed, leaving=leaving).digest == expected[name]


@pytest.mark.parametrize("name", ["local_sgd", "post_local_sgd", "diloco"])
def test_a_rule_in_lockstep_with_local_steps_does_not_depend_on_arrival(name: str) -> None:
    recipe = workloads.gpt(rule=RULES[name], steps=5)
    assert len({drive(recipe, 3, seed).digest for seed in range(2)}) == 1


def test_an_asynchronous_rule_depends_on_arrival() -> None:
    recipe = workloads.gpt(rule=p.asynchronous(), steps=3)
    assert len({drive(recipe, 3, seed).digest for seed in range(3)}) == 3


# ------------------------------------------------------------------------------------------------ the update's weights

CUSTOM = [
    UpdateRule(quorum="1"),
    UpdateRule(quorum="2"),
    UpdateRule(quorum="all"),
    UpdateRule(quorum="2", weight="staleness"),
    UpdateRule(quorum="3", compensation=0.5),
    UpdateRule(quorum="2", compensation=0.5, weight="staleness"),
    UpdateRule(quorum="all", order="round", max_lead=2),
    UpdateRule(quorum="all", order="round", compensation=0.3),
    UpdateRule(quorum="1", max_staleness=1),
    p.softsync(2),
    p.delay_compensated(2.0),
    p.backup_workers(1),
    p.synchronous(),
]


@pytest.mark.parametrize("rule", CUSTOM, ids=lambda rule: f"{rule.name}-{CUSTOM.index(rule)}")
@settings(max_examples=2)
@given(seed=SEEDS)
def test_every_update_is_the_weighted_mean_of_its_gradients_in_float64(rule: UpdateRule, seed: int) -> None:
    """Each from the weights that it started from, with its share of the items, damped and compensated as the rule
    says; against gradients of the whole contribution at once, in float64.
    """
    recipe = plain(rule=rule, optimizer=sgd(0.05))
    data = Replica(recipe, "cpu")
    history: list[list[Tensor]] = []

    def weights(run: Driven) -> list[Tensor]:
        return [each.detach().double().clone() for each in run.replayer.merger.replica.parameters]

    def gradient(run: Driven, piece: int, at: list[Tensor]) -> tuple[list[Tensor], int]:
        work = run.replayer.pieces.work(piece)
        batches = [data.batch(work.batch, m) for m in range(work.start, work.stop)]
        x, y = (torch.cat([batch[i] for batch in batches if batch is not None]).double() for i in (0, 1))
        module = copy.deepcopy(data.module).double()
        for parameter, value in zip(module.parameters(), at, strict=True):
            parameter.data = value.clone()
        return list(torch.autograd.grad((module(x) - y).square().mean(), list(module.parameters()))), len(x)

    def before(run: Driven, action: Merge) -> None:
        assert action.version == len(history) + 1
        history.append(weights(run))

    def after(run: Driven, action: Merge) -> None:
        now = history[-1]
        moves = [torch.zeros_like(each) for each in now]
        filled = [c for c in action.contributions if c.items]
        items = sum(c.items for c in filled)
        for contribution in filled:
            base = history[contribution.base]
            found, count = gradient(run, contribution.piece, base)
            assert count == contribution.items
            share = count / items
            if rule.weight == "staleness":
                share /= 1 + (action.version - 1 - contribution.base)
            for move, g, w, b in zip(moves, found, now, base, strict=True):
                move.add_(share * (g + rule.compensation * g * g * (w - b)))
        for value, w, move in zip(weights(run), now, moves, strict=True):
            torch.testing.assert_close(value, w - 0.05 * move, rtol=1e-5, atol=1e-6)

    run = drive(recipe, 4, seed, before=before, after=after)
    assert len(run.merges) == len(history) > 0


def test_the_test_above_meets_stale_and_uneven_contributions() -> None:
    run = drive(plain(rule=p.softsync(2)), 4, seed=1)
    assert max(old for merge in run.merges for old in merge.staleness) > 0
    assert len({c.items for merge in run.merges for c in merge.contributions}) > 1
    assert any(len(set(merge.weights)) > 1 for merge in run.merges)


@settings(max_examples=3)
@given(seed=SEEDS)
def test_delay_compensation_without_staleness_is_plain_sgd(seed: int) -> None:
    """One worker is never late: the same bits, whatever lambda is."""
    digests = {drive(plain(rule=rule), 1, seed).digest for rule in (p.asynchronous(), p.delay_compensated(7.0))}
    assert len(digests) == 1
    others = {drive(plain(rule=rule), 3, seed).digest for rule in (p.asynchronous(), p.delay_compensated(7.0))}
    assert len(others) == 2, "several are, and then it differs"


def test_gradients_are_clipped_after_they_are_merged() -> None:
    recipe = plain(rule=UpdateRule(quorum="2"), clip_norm=1e-3, optimizer=sgd(1.0))
    starts: list[list[Tensor]] = []

    def before(run: Driven, action: Merge) -> None:
        starts.append([each.detach().clone() for each in run.replayer.merger.replica.parameters])

    def after(run: Driven, action: Merge) -> None:
        pairs = zip(run.replayer.merger.replica.parameters, starts[-1], strict=True)
        moved = torch.cat([(now.detach() - then).flatten() for now, then in pairs]).norm()
        assert float(moved) == pytest.approx(1e-3, rel=1e-2)

    run = drive(recipe, 3, before=before, after=after)
    assert all(update.norm > 1e-3 for update in run.updates if update.items)


def test_the_learning_rate_follows_items_and_not_versions() -> None:
    """Each of four workers makes a quarter of a batch, so four updates have the rate of one step."""
    recipe = plain(rule=p.asynchronous(), schedule=Schedule(kind="cosine", warmup_steps=2), steps=4, microbatches=4)
    rates = [update.rate for update in drive(recipe, 4).updates]
    expected = [0.1 * recipe.schedule.factor(step, 4) for step in range(4) for _ in range(4)]
    assert rates == pytest.approx(expected)


def test_buffers_are_the_mean_over_the_microbatches_of_an_update() -> None:
    """BatchNorm's, under an asynchronous rule, from the buffers that the contributions started from."""
    recipe = workloads.convnet(rule=UpdateRule(quorum="2"), steps=3)
    data = Replica(recipe, "cpu")
    data.learn_terms(0)
    history: list[dict[str, Tensor]] = []

    def before(run: Driven, action: Merge) -> None:
        history.append({name: value.clone() for name, value in run.state.items()})

    def after(run: Driven, action: Merge) -> None:
        left: list[dict[str, Tensor]] = []
        for contribution in action.contributions:
            work = run.replayer.pieces.work(contribution.piece)
            for m in range(work.start, work.stop):
                batch = data.batch(work.batch, m)
                if batch is not None:
                    data.module.load_state_dict(history[contribution.base])
                    data.objective.sums(data.module, batch)
                    left.append({name: buffer.clone() for name, buffer in data.module.named_buffers()})
        for name in ("norm.running_mean", "norm.running_var", "norm2.running_mean", "norm2.running_var"):
            mean = torch.stack([each[name] for each in left]).double().mean(0)
            torch.testing.assert_close(run.state[name].double(), mean, rtol=1e-5, atol=1e-6)
        for name in ("norm.num_batches_tracked", "norm2.num_batches_tracked"):
            assert int(run.state[name]) == max(int(each[name]) for each in left)

    assert len(drive(recipe, 3, seed=2, before=before, after=after).merges) == len(history)


def test_an_update_without_items_changes_nothing_and_is_no_objective() -> None:
    """At a ragged end some pieces hold no sample."""
    recipe = plain(rule=p.asynchronous(), steps=3)  # the third batch has 5 samples for 8 workers
    states: list[dict[str, Tensor]] = []

    def before(run: Driven, action: Merge) -> None:
        states.append({name: value.clone() for name, value in run.state.items()})

    def after(run: Driven, action: Merge) -> None:
        if not run.ledger.finished and not action.contributions[0].items:
            assert all(torch.equal(value, states[-1][name]) for name, value in run.state.items())

    run = drive(recipe, 8, before=before, after=after)
    empty = [update for update in run.updates if not update.items]
    assert empty
    assert all(update.terms == {} for update in empty)
    assert all(update.objective is None and update.facts()["objective"] is None for update in empty)
    assert all(isinstance(update.objective, float) for update in run.updates if update.items)
    assert sum(update.items for update in run.updates) == 37


def test_a_synchronous_step_without_items_is_refused_as_in_lockstep() -> None:
    def objective(model: nn.Module, batch: Any) -> Tensor:
        return squares(model, batch)

    objective.counts = lambda batch: 0  # type: ignore[attr-defined]
    with pytest.raises(ObjectiveError, match="step 1 has no items to learn from"):
        drive(plain(objective=objective), 2)


@pytest.mark.parametrize("text", ["asynchronous", "backup_workers:2", "softsync:2", "async_diloco:2,buffer=4"])
@pytest.mark.parametrize("workers", [3, 20])
def test_a_whole_batch_without_items_is_refused_under_rules_that_do_not_wait_for_it_too(
    text: str, workers: int
) -> None:
    """A metric with items is nothing to learn from."""

    def objective(model: nn.Module, batch: Any) -> dict[str, Tensor]:
        return {"squares": squares(model, batch), "seen": torch.tensor(1.0)}

    objective.counts = lambda batch: {"squares": 0, "seen": 1}  # type: ignore[attr-defined]
    objective.metrics = ["seen"]  # type: ignore[attr-defined]
    with pytest.raises(
        ObjectiveError, match=r"step \d+ has no items to learn from: the objective counts 0 for term 'sq"
    ):
        drive(plain(objective=objective, rule=parse(text)), workers)


# ------------------------------------------------------------------------------------------------------- local steps


@pytest.mark.parametrize("workers", [2, 3])
def test_one_local_step_of_plain_sgd_is_synchronous_sgd(workers: int) -> None:
    """Uneven items too: the mean of the deltas is weighted by items."""
    recipe = workloads.gpt(optimizer=sgd(0.3), clip_norm=None, steps=3)
    local = drive(dataclasses.replace(recipe, rule=p.local_sgd(1)), workers)
    together = drive(recipe, workers)
    close(local.state, together.state, rtol=1e-4, atol=1e-6)
    assert len(local.merges) == recipe.steps
    start = Replica(recipe, "cpu").module.state_dict()
    with pytest.raises(AssertionError):
        close(start, together.state, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("name", workloads.ALL)
@pytest.mark.parametrize(
    "rule",
    [dataclasses.replace(p.diloco(2), outer="sgd", outer_lr=1.0, outer_momentum=0.0), p.local_sgd(1)],
    ids=["diloco", "local_sgd"],
)
def test_one_worker_with_an_outer_rate_of_1_is_the_plain_run(name: str, rule: UpdateRule) -> None:
    """The worker's optimizer keeps its state, and the schedule goes on, over all groups of local steps."""
    recipe = workloads.ALL[name](steps=5)
    close(drive(workloads.ALL[name](rule=rule, steps=5), 1).state, drive(recipe, 1).state, rtol=1e-4, atol=1e-5)


def test_until_local_after_every_step_is_merged() -> None:
    recipe = plain(rule=p.post_local_sgd(3, after=2), steps=9)
    batches = [[c.piece for c in merge.contributions] for merge in drive(recipe, 2).merges]
    assert batches == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]], "of 1, 1, 3, 3 and 1 batches"
    close(
        drive(plain(rule=p.post_local_sgd(3, after=5)), 2).state,
        drive(plain(rule=p.local_sgd(1)), 2).state,
        rtol=0,
        atol=0,
    )


def test_a_worker_that_joins_starts_with_a_new_optimizer() -> None:
    recipe = workloads.gpt(rule=p.local_sgd(2), steps=4)
    pieces = Pieces(recipe.rule, 1, recipe.microbatches, recipe.steps)

    def contributor() -> Contributor:
        made = Contributor(Replica(recipe, "cpu"), pieces)
        made.prepare(0)
        return made

    def sent(by: Contributor, piece: int, saved: Tensor) -> list[str]:
        vectors = by.empty()
        by.compute(pieces.work(piece), saved, vectors)
        return checksum(vectors.gradient)

    torch.set_num_threads(1)
    old, new = contributor(), contributor()
    saved = old.pack.empty()
    old.pack.save(saved)
    first = sent(old, 0, saved)
    assert first == sent(new, 0, saved)
    assert sent(old, 1, saved) == sent(new, 1, saved)
    assert sent(old, 1, saved) != sent(contributor(), 1, saved), "AdamW's moments are the worker's own"


@pytest.mark.parametrize("rule", [p.asynchronous(), p.synchronous()], ids=lambda rule: rule.name)
def test_a_worker_keeps_nothing_of_what_it_has_contributed(rule: UpdateRule) -> None:
    recipe = plain(rule=rule, steps=2_000)
    pieces = Pieces(recipe.rule, 2, recipe.microbatches, recipe.steps)
    contributor = Contributor(Replica(recipe, "cpu"), pieces, checkpoint_every=10)
    contributor.prepare(0)
    saved, vectors = contributor.pack.empty(), contributor.empty()
    contributor.pack.save(saved)

    def contribute(start: int, stop: int) -> int:
        for piece in range(start, stop):
            contributor.enter(piece)
            contributor.compute(pieces.work(piece), saved, vectors)
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        held = [contribute(max(0, stop - 60), stop) for stop in (20, 80, 140, 200)]
    finally:
        tracemalloc.stop()
    grown = min(after - before for before, after in itertools.pairwise(held))  # what is kept is so each time
    assert grown < 60 * 250, "bytes a contribution: the counts of one were a thousand"


# ------------------------------------------------------------------------------------------ what is not a number


@pytest.mark.parametrize("rule", [p.asynchronous(), p.local_sgd(2)], ids=lambda rule: rule.name)
def test_a_term_that_is_not_finite_is_named(rule: UpdateRule) -> None:
    def bad(model: nn.Module, batch: Any) -> Tensor:
        some = bool((batch[0] == numbers(37)[9][0]).all(1).any())
        return squares(model, batch) * (float("inf") if some else 1.0)

    with pytest.raises(NonFiniteError, match=r"term 'objective' of the objective is inf in step \d, microbatch \d"):
        drive(plain(objective=bad, rule=rule), 3)


@pytest.mark.parametrize(
    ("rule", "sentence"),
    [
        (p.asynchronous(), r"the contribution of worker \d is not finite in step 1 .* weights are as they were"),
        (p.local_sgd(2), r"the gradient is not finite in local step 1 of 2, on global batch 1"),
    ],
    ids=["gradient", "delta"],
)
def test_a_gradient_that_is_not_finite_changes_nothing(rule: UpdateRule, sentence: str) -> None:
    def root(model: nn.Module, batch: Any) -> Tensor:
        return (model(batch[0]) * 0).sqrt().sum() + squares(model, batch)

    with pytest.raises(NonFiniteError, match=sentence) as caught:
        drive(plain(objective=root, rule=rule), 2)
    assert "\n" not in caught.value.message


def test_an_update_that_fails_leaves_the_weights_and_the_momentum() -> None:
    recipe = plain(rule=p.diloco(2))
    pieces = Pieces(recipe.rule, 1, 8, 5)
    merger = Merger(Replica(recipe, "cpu"), pieces)
    contributor = Contributor(Replica(recipe, "cpu"), pieces)
    contributor.prepare(0)
    merger.replica.objective = contributor.replica.objective
    before = {name: value.clone() for name, value in merger.replica.module.state_dict().items()}
    vectors = contributor.empty()
    vectors.gradient.fill_(float("nan"))
    facts = Facts(((0, 1),), {"objective": 3}, {"objective": (1.0,)}, 1, (0,), ())
    with pytest.raises(NonFiniteError):
        merger.merge([Arrived(0, pieces.work(0), facts, vectors, 1.0, 0)])
    assert all(torch.equal(value, before[name]) for name, value in merger.replica.module.state_dict().items())
    assert merger.training_state()["outer"] == {"momentum": None, "sum": None, "updates": 0}


class Constants(nn.Module):
    """BatchNorm, whose buffers training changes, beside buffers that it does not."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.BatchNorm1d(3), nn.Linear(3, 1)
        self.register_buffer("third", torch.full((2,), 1 / 3, dtype=torch.float64))
        self.register_buffer("tenth", torch.full((), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x)) * self.tenth + self.third[0].float()


@pytest.mark.parametrize("text", ["local_sgd:2", "async_diloco:2,buffer=4", "asynchronous", "synchronous"])
def test_buffers_that_training_does_not_change_keep_every_bit(text: str) -> None:
    data = TensorDataset(*(column.repeat(2, 1)[:64] for column in numbers(37).tensors))  # 2 in each microbatch
    run = drive(plain(model=Constants, data=lambda: data, rule=parse(text)), 3, seed=1)
    start = Constants().state_dict()
    assert torch.equal(run.state["third"], start["third"])
    assert torch.equal(run.state["tenth"], start["tenth"])
    assert not torch.equal(run.state["norm.running_mean"], start["norm.running_mean"])
    assert int(run.state["norm.num_batches_tracked"]) > 0
