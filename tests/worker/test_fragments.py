"""Streaming fragments: the definition, line by line in one process, and what every engine makes of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from instep.clock.network import Network
from instep.clock.times import Failures, WorkerTimes
from instep.errors import CheckpointError, RecipeError
from instep.offline.cluster import Cluster
from instep.offline.simulation import simulate
from instep.record import tape
from instep.record.folder import RunFolder
from instep.reduce.layout import Layout, Pack
from instep.reduce.narrow import decoded, encoded, narrow_bytes
from instep.rules import UpdateRule, parse
from instep.rules.fragments import Fragments
from instep.worker.outer_optimizer import OuterOptimizers
from instep.worker.streamed import Streamed
from instep.worker.wire import WayDown, WayUp
from support import workloads
from support.harness import Client, stopping_at, train_here
from support.regression import regression
from support.resuming import again, go_on
from support.serving import at, check_tape, drive, kill, replayed, serving
from support.streaming import check_definition, recipe

pytestmark = pytest.mark.processes

RULES = ["diloco:4,fragments=2", "diloco:3,fragments=3", "local_sgd:6,fragments=3"]


# ------------------------------------------------------------------------------------------------------ the definition


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("workers", [1, 2, 3, 4])
def test_every_engine_makes_what_the_plain_loop_makes(workers: int, rule: str) -> None:
    check_definition(rule, workers)


@settings(max_examples=60)
@given(sizes=st.lists(st.integers(1, 1000), min_size=1, max_size=12), data=st.data())
def test_fragments_are_whole_parameters_in_order_cut_where_their_bytes_are_nearest_to_equal(
    sizes: list[int], data: st.DataObject
) -> None:
    count = data.draw(st.integers(1, len(sizes)))
    found = Fragments(sizes, count).all
    assert [index for which in found for index in which] == list(range(len(sizes)))
    assert all(found)
    most = max(sum(sizes[index] for index in which) for which in found)
    if max(sizes) * count <= sum(sizes):  # none of them is larger than a fragment
        assert most <= sum(sizes) / count + max(sizes)
    assert len(Fragments([8] * (3 * count), count).all[0]) == 3, "equal ones share equally"


def test_what_is_lost_of_a_fragment_is_added_to_its_next_message_and_to_no_other() -> None:
    weights = [torch.zeros(70), torch.zeros(70)]
    layout = Layout.of(weights, 256)
    up, kept = WayUp(parse("diloco:4,fragments=2,wire=int4"), layout, torch.device("cpu")), torch.zeros(140)
    lost = [torch.zeros(70), torch.zeros(70)]
    generator = torch.Generator().manual_seed(0)
    for number in range(6):
        which, flat = number % 2, torch.zeros(layout.size)
        values = torch.randn(70, generator=generator)
        layout.views(flat)[which].copy_(values)
        up.send(flat, kept, range(which, which + 1))
        arrived = decoded(encoded(values + lost[which], "int4"), "int4", 70)
        lost[which] = values + lost[which] - arrived
        assert torch.equal(layout.views(flat)[which], arrived)
        assert not layout.views(flat)[1 - which].any()
        assert torch.equal(kept, torch.cat(lost))


def test_a_workers_weights_are_brought_on_by_the_fragment_of_the_update_alone() -> None:
    module = nn.Sequential(nn.Linear(8, 9, bias=False), nn.Linear(9, 7, bias=False))
    weights = list(module.parameters())
    pack, parts = Pack(module, weights), Fragments([each.nbytes for each in weights], 2)
    down = WayDown(parse("diloco:4,fragments=2,wire=int4"), weights, pack, parts)
    assert down.give(0, 0) == (0, pack.size_bytes)
    had = [value.detach().clone() for value in weights]
    for version in range(1, 6):
        which = (version - 1) % 2
        with torch.no_grad():
            weights[which].mul_(1.1)
        assert down.give(0, version) == (0, narrow_bytes("int4", weights[which].numel()))
        change = (weights[which].detach() - had[which]).reshape(-1)
        had[which] = had[which] + decoded(encoded(change, "int4"), "int4", len(change)).view(had[which].shape)
        assert all(torch.equal(*pair) for pair in zip(pack.parameters(down.weights(0)), had, strict=True))


def test_which_parameters_have_changed_since_a_version() -> None:
    parts = Fragments([4, 4, 4, 4], 2)
    assert parts.all == (range(2), range(2, 4))
    assert [parts.since(*versions) for versions in [(0, 0), (0, 1), (1, 2), (3, 5)]] == [
        [],
        [0, 1],
        [2, 3],
        [0, 1, 2, 3],
    ]
    assert parts.since(0, 9) == [0, 1, 2, 3]


def test_what_a_worker_has_moved_is_sent_once_also_when_it_takes_two_pieces_of_a_round() -> None:
    module = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    first, second = module.parameters()
    with torch.no_grad():
        first.fill_(3.0)  # whole numbers: nothing is rounded
        second.fill_(5.0)
    layout, pack = Layout.of([first, second], 64), Pack(module, [first, second])
    weights, row = pack.empty(), torch.zeros(layout.size)
    pack.save(weights)
    own = Streamed([first, second], layout, Fragments([16, 16], 2))
    begun, sent = first.detach().clone(), torch.zeros(2, 2)
    for _ in range(2):
        own.pull(pack, weights, 0)
        with torch.no_grad():
            first.add_(1.0)
            second.add_(1.0)
        own.send(range(1), row.zero_())
        sent += layout.views(row)[0]
        assert not layout.views(row)[1].any(), "the other fragment is not sent"
    assert torch.equal(sent, begun - first)
    moved = second.detach().clone()
    pack.parameters(weights)[0].fill_(7.0)
    own.pull(pack, weights, 1)
    assert torch.equal(first, torch.full((2, 2), 7.0)), "the update's fragment is taken"
    assert torch.equal(second, moved), "and the worker keeps its own weights of the other"
    own.send(range(1, 2), row.zero_())
    assert torch.equal(layout.views(row)[1], torch.full((2, 2), -2.0))


# ---------------------------------------------------------------------------------------------------------- all engines


def test_one_fragment_is_the_rule_without_and_two_are_another() -> None:
    assert parse("diloco:4,fragments=1") == parse("diloco:4")
    given = {
        text: recipe(text, microbatches=2) for text in ("diloco:4", "diloco:4,fragments=2", "diloco:4,fragments=4")
    }
    assert len({each.fingerprint() for each in given.values()}) == 3
    assert len({drive(each, 2).digest for each in given.values()}) == 3


@pytest.mark.parametrize("rule", ["diloco:4,fragments=2", "local_sgd:4,fragments=4,wire=int8"])
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_who_comes_first_decides_no_bit(workers: int, rule: str) -> None:
    given = workloads.ALL["convnet"](rule=parse(rule), steps=7)
    assert len({drive(given, workers, seed).digest for seed in range(3)}) == 1


@pytest.mark.parametrize("rule", ["diloco:4,fragments=2", "diloco:4,fragments=4,wire=int4"])
def test_a_run_with_a_death_and_a_successor_is_replayed_exactly(rule: str, tmp_path: Path) -> None:
    given = workloads.ALL["convnet"](rule=parse(rule), steps=8)
    run = train_here(given, serving(3), tmp_path / "run", client=Client(at("released", 2, kill(1), worker=1)))
    assert any(event["kind"] == "left" for event in run.events)
    check_tape(run.events, given)
    assert replayed(given, run.path).same


@pytest.mark.parametrize(("wire", "workers"), [("float32", 1), ("int4", 2)])
def test_a_run_resumes_in_the_middle_of_its_fragments_and_is_replayed_exactly(
    wire: str, workers: int, tmp_path: Path
) -> None:
    """With fewer workers too, who take several pieces of each round."""
    given = recipe(f"diloco:6,fragments=3,wire={wire}", microbatches=2, steps=20)
    run = train_here(given, serving(2, checkpoint_every=2, keep=0), tmp_path / "run", client=stopping_at(4))
    assert run.result["versions"] % 3, "the round of fragments is not over"
    go_on(tmp_path / "run", given, serving(workers))
    assert again(tmp_path / "run", given).same


def test_the_outer_momentum_of_every_fragment_goes_through_a_checkpoint() -> None:
    rule = parse("diloco:4,fragments=2")
    weights = [torch.ones(5), torch.ones(3)]
    layout, parts = Layout.of(weights, 64), Fragments([20, 12], 2)

    def moved(save_at: int) -> list[Tensor]:
        ours = [value.clone() for value in weights]
        outer = OuterOptimizers(rule, layout, parts)
        for number in range(5):
            if number == save_at:
                state, outer = outer.state(), OuterOptimizers(rule, layout, parts)
                outer.load(state)
            outer.of_round(number)(torch.full((layout.size,), 0.1 * number), ours)
        return ours

    assert all(torch.equal(one, other) for one, other in zip(moved(3), moved(-1), strict=True))
    with pytest.raises(CheckpointError, match="is not that of 2 fragments; use an earlier one"):
        OuterOptimizers(rule, layout, parts).load({"momentum": None, "sum": None, "updates": 0})


@pytest.mark.parametrize("rule", ["diloco:4,fragments=2", "diloco:4,fragments=4,wire=int8"])
def test_bytes_and_digest_of_a_simulation_are_those_of_the_run_and_go_by_fragment(rule: str, tmp_path: Path) -> None:
    given = recipe(rule, microbatches=2, steps=12)
    run = train_here(given, serving(2), tmp_path / "run")
    merger = drive(given, 1).replayer.merger
    numbers = [sum(merger.replica.parameters[i].numel() for i in which) for which in merger.fragments.all]
    sizes = [narrow_bytes(given.rule.wire, count) for count in numbers]
    rounds = run.result["versions"]
    expected = [sizes[number % len(sizes)] for number in range(rounds) for _ in range(2)]
    assert [event["bytes"] for event in run.events if event["kind"] == "pushed"] == expected
    pulled = 2 * (merger.pack.size_bytes + sum(sizes[number % len(sizes)] for number in range(rounds - 1)))
    assert run.result["bytes_sent"] == sum(expected) + pulled
    cluster = Cluster(workers=2, times=WorkerTimes.constant(0.1), merge_s=0.0, collective=False)
    told = simulate(given, cluster, True, None, lambda event: None)
    assert (told["digest"], told["bytes_sent"]) == (run.digest, run.result["bytes_sent"])


@pytest.mark.parametrize("collective", [False, True])
def test_on_a_slow_network_each_message_takes_as_long_as_its_fragment_is_large(collective: bool) -> None:
    given = recipe("diloco:6,fragments=3", microbatches=2, steps=12)
    network = Network(100.0)
    cluster = Cluster(2, WorkerTimes.constant(0.1), network, merge_s=0.0, collective=collective)
    told = simulate(given, cluster, False, None, lambda event: None)
    merger = drive(given, 1).replayer.merger
    sizes = [sum(merger.replica.parameters[i].nbytes for i in which) for which in merger.fragments.all] * 2
    if collective:
        messages_s = sum(network.ring_all_reduce_s(2, size) for size in sizes)
        assert told["bytes_sent"] == 2 * sum(sizes)
    else:  # both at once, whole weights first; after the last push nobody pulls
        messages_s = 2 * (merger.pack.size_bytes + sum(sizes) + sum(sizes[:-1])) / 100
        assert told["bytes_sent"] == messages_s * 100
    assert told["wall_s"] == pytest.approx(12 * 0.1 + messages_s)


@pytest.mark.parametrize("workers", [3, 5])
def test_a_simulation_with_failures_is_replayed(workers: int, tmp_path: Path) -> None:
    """With more workers than microbatches too."""
    RunFolder.create(tmp_path / "run")
    given = recipe("diloco:4,fragments=2", microbatches=3, steps=24)
    times = WorkerTimes.lognormal(0.1, 0.05, seed=1, failures=Failures(2.0, 0.5))
    cluster = Cluster(workers=workers, times=times, merge_s=0.01, network=Network(1e4, 0.001))
    told = simulate(given, cluster, True, tmp_path / "run", lambda event: None)
    assert told["restarts"] > 0
    assert replayed(given, tmp_path / "run").same
    assert any(event["kind"] == "left" for event in tape.read(tmp_path / "run" / "tape.jsonl"))


@pytest.mark.parametrize("leaving", [0.1, 0.3])
def test_workers_that_come_and_go_end_no_run(leaving: float) -> None:
    given = recipe("diloco:4,fragments=2,wire=int8", microbatches=4, steps=24)
    run = drive(given, 4, seed=3, leaving=leaving)
    assert run.ledger.finished
    assert all(bool(value.isfinite().all()) for value in run.state.values())


def test_more_fragments_than_parameters_are_refused() -> None:
    with pytest.raises(RecipeError) as error:
        drive(recipe("diloco:14,fragments=7"), 1)
    assert error.value.message == (
        "'rule.fragments' is 7 and the model has 6 trained parameters, which are never split; set it to at most that."
    )


def test_what_is_learned_is_close_to_what_is_learned_without_fragments() -> None:
    rule = UpdateRule.from_text("diloco:4,outer_lr=0.5")
    given = regression(rule=rule, steps=200)
    plain, parts = (
        drive(dataclasses.replace(given, rule=dataclasses.replace(rule, fragments=each)), 2) for each in (1, 2)
    )
    for name, value in plain.state.items():
        torch.testing.assert_close(parts.state[name], value, rtol=0.05, atol=0.03)
