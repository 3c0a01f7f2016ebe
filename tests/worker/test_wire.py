"""Narrow wires: what a message loses is added to the next one, in every engine by the same bits, over deaths, resumes
and replays.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from instep.clock.network import Network
from instep.clock.times import Failures, WorkerTimes
from instep.errors import CheckpointError, NonFiniteError
from instep.offline.cluster import Cluster
from instep.offline.simulation import simulate
from instep.recipe import Recipe
from instep.record import tape
from instep.record.folder import RunFolder
from instep.reduce.layout import Layout, Pack
from instep.reduce.narrow import decoded, encoded, narrow_bytes
from instep.rules import UpdateRule, parse
from instep.worker.wire import WayDown, WayUp
from support import workloads
from support.harness import Client, stopping_at, train_here
from support.kinds import quick
from support.regression import regression
from support.resuming import again, go_on
from support.serving import at, drive, kill, replayed, serving

pytestmark = pytest.mark.processes

WIRES = ("bfloat16", "int8", "int4")
SEEDS = st.integers(0, 1 << 30)


def sent(numbers: Tensor, wire: str) -> Tensor:
    return decoded(encoded(numbers, wire), wire, len(numbers))


class Two(nn.Module):
    """Parameters whose sizes are no multiple of anything, one of them not in the order of its indices, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.zeros(7, 11).t())
        self.second = nn.Parameter(torch.zeros(5))
        self.register_buffer("seen", torch.zeros(3))


def drawn(seed: int, rounds: int) -> list[Tensor]:
    """Values of all 82 weights of `Two`, some of them large, by round."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rounds, 82, generator=generator)
    return list(values * 10.0 ** torch.randint(-9, 3, (rounds, 82), generator=generator))


# ------------------------------------------------------------------------------------------------------- the two ends


@settings(max_examples=20)
@given(seed=SEEDS, wire=st.sampled_from(WIRES), poisoned=st.booleans())
def test_what_a_delta_loses_is_added_to_the_next_one(seed: int, wire: str, poisoned: bool) -> None:
    module = Two()
    layout = Layout.of(list(module.parameters()), 128)
    up = WayUp(parse(f"local_sgd:2,wire={wire}"), layout, torch.device("cpu"))
    lost, kept = torch.zeros(82), torch.empty(up.kept)
    for number, values in enumerate(drawn(seed, 5)):
        if poisoned and number == 2:
            values[70] = math.inf  # of the second block: the first one is sound
        flat = torch.zeros(layout.size)
        for view, part in zip(layout.views(flat), values.split([77, 5]), strict=True):
            view.copy_(part.view(view.shape))
        up.send(flat, kept)
        arrived = sent(values + lost, wire)
        lost = torch.where(arrived.isfinite(), values + lost - arrived, lost)
        found = torch.cat([view.reshape(-1) for view in layout.views(flat)])
        assert torch.equal(found.nan_to_num(7.0), arrived.nan_to_num(7.0))
        assert found.isfinite().all() == (not (poisoned and number == 2))
        assert torch.equal(kept, lost)
        assert kept.isfinite().all()


@settings(max_examples=20)
@given(seed=SEEDS, wire=st.sampled_from(WIRES), common=st.booleans())
def test_what_a_change_of_the_weights_loses_is_added_to_the_next_one(seed: int, wire: str, common: bool) -> None:
    module = Two()
    pack = Pack(module, list(module.parameters()))
    rule = parse(f"{'diloco' if common else 'async_diloco'}:2,wire={wire}")
    down = WayDown(rule, list(module.parameters()), pack)
    has = torch.zeros(82)
    for version, values in enumerate(drawn(seed, 5)):
        with torch.no_grad():
            for parameter, part in zip(module.parameters(), values.split([77, 5]), strict=True):
                parameter.copy_(part.view(parameter.shape))
            module.seen.fill_(version)
        has = has + sent(values - has, wire) if version else values
        _, size_bytes = down.give(0, version)
        assert size_bytes == (narrow_bytes(wire, 82) + 12 if version else pack.size_bytes)
        assert torch.equal(flat(pack, down.weights(0)), has)
        down.left(1)
        slot, size_bytes = down.give(1, version)
        assert size_bytes == pack.size_bytes, "who joins, in the place of another too, gets all of it"
        assert (slot == 0) == common
        assert torch.equal(flat(pack, down.weights(1)), has if common else values)


def flat(pack: Pack, weights: Tensor) -> Tensor:
    return torch.cat([view.reshape(-1) for view in pack.parameters(weights)])


@pytest.mark.parametrize("wire", WIRES)
def test_weights_that_are_not_finite_reach_the_worker_as_they_are_and_do_not_stay(wire: str) -> None:
    module = Two()
    pack = Pack(module, list(module.parameters()))
    down = WayDown(parse(f"diloco:2,wire={wire}"), list(module.parameters()), pack)
    for version, value in enumerate([1.0, math.inf, 2.0, 2.0]):
        with torch.no_grad():
            module.second[1] = value
        _, size_bytes = down.give(0, version)
        assert (size_bytes == pack.size_bytes) == (version < 3), "narrow again from finite to finite alone"
        assert pack.parameters(down.weights(0))[1].tolist()[1] == value


@pytest.mark.parametrize("name", ["version", "held", "lost"])
def test_a_checkpoint_whose_wire_is_damaged_is_refused_in_a_sentence(name: str) -> None:
    module = Two()
    rule = parse("diloco:2,wire=int8")

    def new() -> WayDown:
        return WayDown(rule, list(module.parameters()), Pack(module, list(module.parameters())))

    down = new()
    down.give(0, 0)
    state = down.state()["wire"]
    new().load(state)
    for bad in ({**state, name: [torch.zeros(3)]}, {key: value for key, value in state.items() if key != name}):
        with pytest.raises(CheckpointError, match="what the wire in int8 has lost is not in the checkpoint"):
            new().load(bad)


# ---------------------------------------------------------------------------------------------------------- all engines


def recipe(rule: str, **fields: Any) -> Recipe:
    return workloads.ALL["convnet"](rule=parse(rule), **{"steps": 6, **fields})


@pytest.mark.parametrize("wire", quick(WIRES, "int4"))
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_who_comes_first_decides_no_bit_where_all_wait(workers: int, wire: str) -> None:
    given = recipe(f"diloco:2,wire={wire}")
    assert len({drive(given, workers, seed).digest for seed in range(3)}) == 1


@pytest.mark.parametrize("rule", ["diloco:2,wire=int4", "async_diloco:2,buffer=4,wire=int8"])
def test_a_run_with_a_death_and_a_successor_is_replayed_exactly(rule: str, tmp_path: Path) -> None:
    given = recipe(rule, steps=8)
    client = Client(at("released", 2, kill(1), worker=1))
    run = train_here(given, serving(3, checkpoint_every=2), tmp_path / "run", client=client)
    found = replayed(given, run.path)
    assert found.divergence == ""
    assert found.same


@pytest.mark.parametrize("rule", ["diloco:2,wire=int4", "async_diloco:2,buffer=4,wire=bfloat16"])
def test_bytes_are_those_of_the_narrow_wire(rule: str, tmp_path: Path) -> None:
    given = recipe(rule)
    run = train_here(given, serving(2), tmp_path / "run")
    merger = drive(given, 1).replayer.merger
    size, pack = merger.replica.size, merger.pack
    pushed = [event for event in run.events if event["kind"] == "pushed"]
    pulls = sum(event["kind"] == "released" for event in run.events)
    narrow = narrow_bytes(given.rule.wire, size)
    assert {event["bytes"] for event in pushed} == {narrow}
    change = narrow + pack.beside_bytes
    assert run.result["bytes_sent"] == len(pushed) * narrow + 2 * pack.size_bytes + (pulls - 2) * change


@pytest.mark.parametrize("stop", [False, True], ids=["at a checkpoint", "in the middle"])
@pytest.mark.parametrize("wire", quick(WIRES, "int4"))
def test_a_run_that_waits_for_all_resumes_with_what_was_lost(wire: str, stop: bool, tmp_path: Path) -> None:
    given = regression(rule=parse(f"diloco:2,wire={wire}"), steps=16)
    whole = train_here(given, serving(2, checkpoint_every=2, keep=0), tmp_path / "whole")
    team = serving(2, checkpoint_every=2, keep=0)
    if stop:
        train_here(given, team, tmp_path / "run", client=stopping_at(3))
    else:
        train_here(dataclasses.replace(given, steps=8), team, tmp_path / "run")
    resumed = go_on(tmp_path / "run", given, team)
    assert resumed.digests == {version: whole.digests[version] for version in resumed.digests}
    assert resumed.digest == whole.digest
    assert again(tmp_path / "run", given).same


def test_a_run_in_which_nobody_waits_forgets_what_was_lost_when_it_is_resumed(tmp_path: Path) -> None:
    given = regression(rule=parse("async_diloco:2,buffer=4,wire=int4"), steps=16)
    train_here(dataclasses.replace(given, steps=8), serving(2), tmp_path / "run")
    go_on(tmp_path / "run", given, serving(2))
    assert again(tmp_path / "run", given).same


@pytest.mark.parametrize("wire", quick(WIRES, "int8"))
def test_a_simulation_has_the_bits_of_the_run_and_the_times_of_the_narrow_wire(wire: str, tmp_path: Path) -> None:
    given = recipe(f"diloco:2,wire={wire}")
    run = train_here(given, serving(2), tmp_path / "run")
    cluster = functools.partial(Cluster, workers=2, times=WorkerTimes.constant(0.1), merge_s=0.0)
    told = simulate(given, cluster(collective=False), True, None, lambda event: None)
    assert told["digest"] == run.digest
    assert told["bytes_sent"] == run.result["bytes_sent"]
    slow = cluster(network=Network(1000.0), collective=False)
    wires_s, computing_s = told["bytes_sent"] / 1000, given.steps * given.microbatches / 2 * 0.1
    narrow = simulate(given, slow, False, None, lambda event: None)
    assert narrow["bytes_sent"] == told["bytes_sent"]
    assert narrow["wall_s"] == pytest.approx(computing_s + wires_s), "nothing else takes time"


def test_a_simulation_with_failures_is_replayed_and_who_joins_pulls_whole_weights(tmp_path: Path) -> None:
    RunFolder.create(tmp_path / "run")
    given = recipe("async_diloco:2,buffer=4,wire=int4", steps=12)
    times = WorkerTimes.lognormal(0.1, 0.05, seed=1, failures=Failures(2.0, 0.5))
    cluster = Cluster(workers=3, times=times, merge_s=0.01, network=Network(1e6, 0.001))
    told = simulate(given, cluster, True, tmp_path / "run", lambda event: None)
    assert told["restarts"] > 0
    assert replayed(given, tmp_path / "run").same
    assert any(event["kind"] == "left" for event in tape.read(tmp_path / "run" / "tape.jsonl"))


# ------------------------------------------------------------------------------------------------ what is not finite


@pytest.mark.parametrize("wire", WIRES)
def test_a_delta_that_is_not_finite_is_told_of_as_over_float32(wire: str) -> None:
    def exploding(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=1e38)

    said = []
    for each in ("float32", wire):
        with pytest.raises(NonFiniteError) as error:
            drive(regression(rule=parse(f"local_sgd:2,wire={each}"), optimizer=exploding), 2)
        said.append(error.value.message)
    assert said[0] == said[1]


@pytest.mark.parametrize("wire", WIRES)
def test_what_is_learned_is_close_to_what_is_learned_over_float32(wire: str) -> None:
    rule = UpdateRule.from_text("diloco:2,outer_lr=0.5")
    given = regression(rule=rule, steps=200)
    plain, narrow = (
        drive(dataclasses.replace(given, rule=dataclasses.replace(rule, wire=each)), 2) for each in ("float32", wire)
    )
    for name, value in plain.state.items():
        torch.testing.assert_close(narrow.state[name], value, rtol=0.02, atol=0.01)
