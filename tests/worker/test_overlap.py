"""Overlap, where workers go on while their contribution travels: the definition, line by line, and all engines."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from instep.clock.network import Network
from instep.clock.times import Failures, WorkerTimes
from instep.errors import RecipeError
from instep.offline.cluster import Cluster
from instep.offline.simulation import simulate
from instep.recipe import Recipe
from instep.record import tape
from instep.record.folder import RunFolder
from instep.reduce.buffers import Buffers
from instep.reduce.layout import Layout, Pack
from instep.rules import parse
from instep.rules.fragments import Fragments
from instep.rules.work import Pieces
from instep.worker.ahead import Begun
from instep.worker.local_steps import LocalSteps
from instep.worker.streamed import Streamed
from instep.worker.trainable import Trainable
from support import workloads
from support.harness import Client, stopping_at, train_here
from support.regression import regression
from support.resuming import again, go_on
from support.serving import at, check_tape, drive, kill, replayed, serving
from support.streaming import check_definition, recipe

pytestmark = pytest.mark.processes

# ------------------------------------------------------------------------------------------------------ the definition


RULES = [
    "diloco:4,fragments=2,overlap=1", "diloco:4,fragments=2,overlap=2,mix=0.0", "diloco:6,overlap=5,mix=0.0",
    "local_sgd:6,fragments=3,overlap=1,mix=0.25", "diloco:5,overlap=5",
]  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("workers", [1, 2, 3, 4])
def test_every_engine_makes_what_the_plain_loop_makes(workers: int, rule: str) -> None:
    check_definition(rule, workers)


def test_a_worker_keeps_the_part_of_its_own_value_that_the_rule_says_and_sends_the_rest_as_moved() -> None:
    weight = nn.Parameter(torch.full((2, 2), 3.0))  # numbers that nothing rounds
    module = nn.ParameterList([weight])
    layout, pack = Layout.of([weight], 64), Pack(module, [weight])
    weights, row = pack.empty(), torch.zeros(layout.size)
    pack.save(weights)
    own = Streamed([weight], layout, Fragments([16], 1), mix=0.25)
    own.pull(pack, weights, 0)
    with torch.no_grad():
        weight.fill_(4.0)
    pack.parameters(weights)[0].fill_(8.0)
    own.pull(pack, weights, 1)
    assert torch.equal(weight, torch.full((2, 2), 0.25 * 4 + 0.75 * 8))
    own.send(range(1), row)
    assert torch.equal(layout.views(row)[0], torch.full((2, 2), 8.0 - 7.0)), "against the update's"


def test_what_steps_change_in_buffers_before_an_update_comes_is_not_lost_with_it() -> None:
    module = nn.Module()
    for name in ("mean", "last", "counts", "most"):
        module.register_buffer(name, torch.full((2,), 100.0))
    buffers = Buffers(module, {"last": "last", "counts": "sum:0.5", "most": "max"})
    before, after = [torch.full((2,), 8.0)] * 4, [torch.full((2,), 6.0)] * 4
    buffers.carry_over(range(4), before, after, steps=2)
    assert [float(buffer[0]) for buffer in module.buffers()] == [6.0, 6.0, 6.0 + 0.25 * (100 - 8), 100.0]
    assert [float(start[0]) for start in buffers.start] == [6.0, 6.0, 29.0, 100.0]


def test_a_parameter_that_is_frozen_before_an_update_comes_stays_so() -> None:
    module = nn.ParameterList([nn.Parameter(torch.zeros(1)) for _ in range(4)])
    trainable = Trainable(module, [name for name, _ in module.named_parameters()], list(module))
    trainable.take({0, 1})  # as the update says: 0 ceased with the contribution before, 1 with somebody else's
    work = Pieces(parse("diloco:4,overlap=1"), 1, 1, 4).work(0)
    begun = Begun(work, LocalSteps({}, {}), [], [], frozenset({0, 3}), frozenset({0, 2}))
    begun.carry_over(Buffers(nn.Module()), trainable)
    assert trainable.off == {0, 1, 2}


def test_a_forward_that_writes_parameters_is_refused() -> None:
    given = recipe("diloco:4,overlap=1", model=Writing, steps=4, microbatches=1)
    with pytest.raises(RecipeError) as error:
        drive(given, 1)
    assert "'rule.overlap' is 1 and a forward writes parameter 'scale'" in str(error.value)


class Writing(nn.Module):
    """Its forward writes a parameter that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.scale = nn.Linear(3, 1), nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.scale.mul_(1.5)
        return self.linear(x)  # type: ignore[no-any-return]


# ---------------------------------------------------------------------------------------------------------- all engines


@pytest.mark.parametrize(
    ("rule", "workers"),
    [
        ("diloco:4,fragments=2,overlap=1", 2),
        ("diloco:4,fragments=2,overlap=1", 5),
        ("local_sgd:4,overlap=3,wire=int8", 3),
    ],
)
def test_who_comes_first_decides_no_bit(rule: str, workers: int) -> None:
    """With buffers, and with more workers than microbatches too."""
    given = workloads.ALL["convnet"](rule=parse(rule), steps=7)
    assert len({drive(given, workers, seed).digest for seed in range(2)}) == 1


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_a_real_team_makes_these_bits_however_slow_who_is_and_tells_when_it_went_ahead(
    workers: int, tmp_path: Path
) -> None:
    given = recipe("diloco:6,fragments=3,overlap=1,wire=int4", microbatches=3)
    run = train_here(given, serving(workers, slow="0:3x" if workers > 1 else ""), tmp_path / "run")
    assert run.digest == drive(given, workers).digest
    check_tape(run.events, given)
    assert replayed(given, run.path).same
    computed = [event for event in run.events if event["kind"] == "computed"]
    assert [event["batch"] for event in computed if "ahead" not in event] == [0] * workers, "all but the first"
    ended_s = dict.fromkeys(range(workers), 0.0)
    for event in computed:
        began_s, went_s = event.get("ahead", (ended_s[event["worker"]],) * 2)
        assert ended_s[event["worker"]] <= began_s <= went_s <= event["from_s"] <= event["to_s"]
        ended_s[event["worker"]] = event["to_s"]
    assert (run.result["staleness_max"], run.result["lead_max"]) == (0, 0)


@pytest.mark.parametrize("rule", ["diloco:4,fragments=2,overlap=2", "diloco:4,overlap=2,wire=int4"])
def test_a_run_with_a_death_and_a_successor_is_replayed_exactly(rule: str, tmp_path: Path) -> None:
    given = workloads.ALL["convnet"](rule=parse(rule), steps=12)
    run = train_here(given, serving(3), tmp_path / "run", client=Client(at("released", 2, kill(1), worker=1)))
    assert any(event["kind"] == "left" for event in run.events)
    check_tape(run.events, given)
    assert replayed(given, run.path).same


@pytest.mark.parametrize("workers", [1, 2])
def test_a_run_resumes_and_is_replayed_exactly(workers: int, tmp_path: Path) -> None:
    """With fewer workers too, who take several pieces of each round."""
    given = recipe("diloco:6,fragments=3,overlap=1", microbatches=2, steps=20)
    run = train_here(given, serving(2, checkpoint_every=2, keep=0), tmp_path / "run", client=stopping_at(4))
    assert run.result["versions"] % 3, "the round of fragments is not over"
    go_on(tmp_path / "run", given, serving(workers))
    assert again(tmp_path / "run", given).same


@pytest.mark.parametrize("leaving", [0.1, 0.3])
def test_workers_that_come_and_go_end_no_run(leaving: float) -> None:
    given = recipe("diloco:4,fragments=2,overlap=1,wire=int8", microbatches=3, steps=24)
    run = drive(given, 4, seed=3, leaving=leaving)
    assert run.ledger.finished
    assert all(bool(value.isfinite().all()) for value in run.state.values())


def test_what_is_learned_is_close_to_what_is_learned_without() -> None:
    texts = "diloco:4,fragments=2,outer_lr=0.5", "diloco:4,fragments=2,outer_lr=0.5,overlap=1"
    plain, overlapped = (drive(regression(rule=parse(text), steps=200), 2) for text in texts)
    for name, value in plain.state.items():
        torch.testing.assert_close(overlapped.state[name], value, rtol=0.05, atol=0.03)


# -------------------------------------------------------------------------------------------------------- virtual clock


@pytest.mark.parametrize("overlap", [0, 1, 2])
@pytest.mark.parametrize("bandwidth", [300.0, 2000.0])
def test_a_message_on_a_slow_network_takes_only_the_time_that_the_overlapping_steps_leave(
    overlap: int, bandwidth: float
) -> None:
    given = recipe(f"diloco:6,fragments=3,overlap={overlap}", microbatches=2, steps=12)
    network = Network(bandwidth)
    cluster = Cluster(2, WorkerTimes.constant(0.1), network, merge_s=0.0, collective=True)
    told = simulate(given, cluster, False, None, lambda event: None)
    parameters, fragments = given_parameters(given)
    sizes = [sum(parameters[i].nbytes for i in which) for which in fragments] * 2
    *messages_s, last_s = [network.ring_all_reduce_s(2, size) for size in sizes]
    waits_s = sum(max(0.0, message_s - 0.1 * overlap) for message_s in messages_s)
    assert told["wall_s"] == pytest.approx(12 * 0.1 + waits_s + last_s)
    assert told["idle_share"] == pytest.approx([1 - 1.2 / told["wall_s"]] * 2, abs=1e-4)
    assert told["bytes_sent"] == 2 * sum(sizes), "no byte more than without"


def given_parameters(given: Recipe) -> tuple[list[Tensor], tuple[range, ...]]:
    merger = drive(given, 1).replayer.merger
    return list(merger.replica.parameters), merger.fragments.all


def test_a_simulation_has_the_digest_of_the_run_and_the_bytes_of_one_without_overlap() -> None:
    cluster = Cluster(2, WorkerTimes.lognormal(0.1, 0.05, seed=2), Network(1e4, 0.001), merge_s=0.01, collective=False)
    texts = "diloco:4,fragments=2,overlap=1", "diloco:4,fragments=2"
    given = [recipe(text, microbatches=2) for text in texts]
    told, without = (simulate(each, cluster, True, None, lambda event: None) for each in given)
    assert told["digest"] == drive(given[0], 2).digest
    assert told["bytes_sent"] == without["bytes_sent"]
    assert told["wall_s"] < without["wall_s"]


@pytest.mark.parametrize("workers", [3, 5])
def test_a_simulation_with_failures_is_replayed_and_tells_the_same_in_columns(workers: int, tmp_path: Path) -> None:
    """With more workers than microbatches too."""
    given = recipe("diloco:4,fragments=2,overlap=1", microbatches=3, steps=24)
    times = WorkerTimes.lognormal(0.1, 0.05, seed=1, failures=Failures(2.0, 0.5))
    cluster = Cluster(workers=workers, times=times, merge_s=0.01, network=Network(1e4, 0.001))
    computed = []
    for gradients in (True, False):
        path = tmp_path / str(gradients)
        RunFolder.create(path)
        told = simulate(given, cluster, gradients, path, lambda event: None)
        assert told["restarts"] > 0
        assert all(0 <= share < 1 for share in told["idle_share"])
        computed.append([event for event in tape.read(path / "tape.jsonl") if event["kind"] == "computed"])
    assert replayed(given, tmp_path / "True").same
    assert computed[0] == computed[1]
    assert {"ahead" in event for event in computed[0]} == {True, False}
