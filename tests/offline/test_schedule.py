"""Runs on the virtual clock: their times are those that can be worked out, and all of them come to an end."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from instep.clock.loop import Loop
from instep.clock.network import Network
from instep.clock.slow import parse_slow
from instep.clock.times import Failures, WorkerTimes
from instep.errors import RecipeError
from instep.offline.schedule import simulate
from instep.offline.simulated_run import SimulatedRun
from instep.offline.trace import EventListener
from instep.record.events import plain
from instep.rules import PRESETS, UpdateRule, parse
from instep.rules.ledger import Ledger
from instep.rules.work import Pieces

pytestmark = pytest.mark.pure

RULES = [f"{name}:8,after=3" if name == "post_local_sgd" else name for name in PRESETS]
NETWORK = Network(bandwidth_bytes_per_s=1000.0, latency_s=0.01)


def run(
    text: str, workers: int, rounds: int, times: WorkerTimes, network: Network | None = None, **more: Any
) -> SimulatedRun:
    """So many contributions of each worker, one microbatch in each of their batches."""
    rule = parse(text)
    steps = min(rounds, rule.local_after) + max(0, rounds - rule.local_after) * rule.local_steps
    return followed(rule, Pieces(rule, workers, workers, steps), times, network, **more)


def followed(
    rule: UpdateRule, pieces: Pieces, times: WorkerTimes, network: Network | None = None,
    on_event: Callable[[str, dict[str, Any]], None] | None = None, **more: Any,
) -> SimulatedRun:  # fmt: skip
    """Events are handed on as their kinds and what the tape holds of them."""
    listener = EventListener(pieces, lambda event: on_event(event.kind, plain(event)) if on_event else None)
    return simulate(rule, pieces, times, network, listener=listener if on_event else None, **more)


def same(one: SimulatedRun, other: SimulatedRun) -> bool:
    left, right = dataclasses.asdict(one), dataclasses.asdict(other)
    return all(np.array_equal(left[key], right[key]) for key in left)


@pytest.mark.parametrize("collective", [False, True])
def test_a_synchronous_round_lasts_as_long_as_its_slowest_worker(collective: bool) -> None:
    times = WorkerTimes.lognormal(1.0, 0.5, seed=2)
    draw = times.draws(4)
    drawn = np.array([[draw(worker) for worker in range(4)] for _ in range(30)])
    found = run("synchronous", 4, 30, times, collective=collective)
    assert found.wall_s == pytest.approx(drawn.max(1).sum())
    assert (found.versions, found.contributions, found.dropped, found.lead_max) == (30, 120, 0, 0)
    assert found.busy_s == pytest.approx(drawn.sum(0))
    assert found.idle_share == pytest.approx(1 - drawn.sum(0) / drawn.max(1).sum())


def test_local_steps_are_computed_one_after_the_other() -> None:
    found = run("local_sgd:5", 3, 4, WorkerTimes.constant(2.0))
    assert (found.wall_s, found.versions, found.contributions) == (4 * 5 * 2.0, 4, 12)
    rule = parse("synchronous")
    assert simulate(rule, Pieces(rule, 2, 6, 5), WorkerTimes.constant(2.0)).wall_s == 5 * 3 * 2.0


def test_asynchronous_workers_add_their_speeds() -> None:
    found = run("asynchronous", 5, 200, WorkerTimes.constant(0.1, slow=parse_slow("0:2x,1:4x")))
    speed = (1 / 2 + 1 / 4 + 3) / 0.1
    assert found.contributions / found.wall_s == pytest.approx(speed, rel=0.01)
    assert found.idle_share.max() < 0.01


def test_equal_workers_that_wait_for_nobody_are_all_versions_of_one_turn_late() -> None:
    found: list[int] = []
    schedule = run(
        "asynchronous", 6, 10, WorkerTimes.constant(1.0),
        on_event=lambda kind, fields: found.extend(fields["staleness"] if kind == "merged" else []),
    )  # fmt: skip
    assert found == [*range(6), *([5] * 54)]
    assert schedule.staleness_max == 5
    assert schedule.staleness_mean == pytest.approx(np.mean(found))
    assert schedule.wall_s == pytest.approx(10.0)


def test_backup_workers_do_not_wait_for_the_slowest() -> None:
    times = WorkerTimes.constant(1.0, slow=parse_slow("3:10x"))
    with_spare, without = run("backup_workers:1", 4, 12, times), run("synchronous", 4, 12, times)
    assert without.wall_s == 120.0
    assert with_spare.wall_s < 30.0
    assert with_spare.dropped > 0


def test_a_bounded_lead_is_reached_and_not_exceeded() -> None:
    found = run("bounded_staleness:3", 4, 40, WorkerTimes.constant(1.0, slow=parse_slow("0:8x")))
    assert found.lead_max == 3
    assert run("asynchronous", 4, 40, WorkerTimes.constant(1.0, slow=parse_slow("0:8x"))).lead_max > 3


def test_a_contribution_pulls_travels_computes_and_pushes() -> None:
    found = run("asynchronous", 1, 3, WorkerTimes.constant(1.0), NETWORK, contribution_bytes=100, weights_bytes=500)
    assert found.wall_s == pytest.approx(3 * (0.5 + 0.01 + 1.0 + 0.01 + 0.1))
    assert (found.bytes_pushed, found.bytes_pulled, found.bytes_sent) == (300, 1500, 1800)
    assert found.idle_share == pytest.approx([0.62 / 1.62])


def test_simultaneous_pulls_and_pushes_share_the_servers_link() -> None:
    found = run("synchronous", 4, 5, WorkerTimes.constant(1.0), NETWORK, contribution_bytes=100, weights_bytes=500)
    assert found.wall_s == pytest.approx(5 * (4 * 0.5 + 0.01 + 1.0 + 0.01 + 4 * 0.1))
    assert found.bytes_sent == 5 * 4 * 600


def test_collectives_take_the_place_of_the_server() -> None:
    more: dict[str, Any] = {"contribution_bytes": 100, "weights_bytes": 500}
    found = run("diloco:7", 4, 5, WorkerTimes.constant(1.0), NETWORK, collective=True, **more)
    assert found.wall_s == pytest.approx(5 * (7.0 + NETWORK.ring_all_reduce_s(4, 100)))
    assert found.bytes_sent == 5 * 2 * 3 * 100
    one, other = (run("asynchronous", 4, 5, WorkerTimes.constant(1.0), NETWORK, collective=c, **more) for c in (0, 1))
    assert same(one, other)


def test_updates_queue_at_the_server() -> None:
    found = run("asynchronous", 10, 20, WorkerTimes.constant(1.0), merge_s=0.5)
    assert found.wall_s == pytest.approx(1.0 + 200 * 0.5)
    assert found.staleness_max == 9
    assert found.idle_share.min() > 0.75
    assert run("synchronous", 10, 20, WorkerTimes.constant(1.0), merge_s=0.5).wall_s == pytest.approx(20 * 1.5)


@pytest.mark.parametrize("text", RULES)
@pytest.mark.parametrize("merge_s", [0.0, 0.3])
@pytest.mark.parametrize("network", [None, NETWORK])
def test_every_preset_comes_to_its_end_with_failures(text: str, merge_s: float, network: Any) -> None:
    rule = parse(text)
    length = 20.0 / rule.local_steps
    times = WorkerTimes.lognormal(length, length / 2, seed=1, failures=Failures(100.0, 5.0))
    events: list[tuple[str, dict[str, Any]]] = []
    more: dict[str, Any] = {"merge_s": merge_s, "contribution_bytes": 300, "weights_bytes": 500}
    found = run(text, 5, 8, times, network, on_event=lambda kind, fields: events.append((kind, fields)), **more)

    kinds = Counter(kind for kind, _ in events)
    merged = [c for kind, fields in events if kind == "merged" for c in fields["contributions"]]
    assert sorted(c["piece"] for c in merged) == list(range(5 * 8))
    assert found.failures > 0
    assert kinds["joined"] > 5
    assert kinds["pushed"] == kinds["computed"] == found.contributions == len(merged) + found.dropped
    assert kinds["dropped"] == found.dropped
    assert kinds["merged"] == found.versions
    if rule.max_lead is not None:
        assert found.lead_max <= rule.max_lead
    if rule.max_staleness is not None:
        assert found.staleness_max <= rule.max_staleness
    assert (found.busy_s <= found.present_s + 1e-9).all()
    assert found.wall_s == events[-1][1]["t_s"]
    times_s = [fields["t_s"] for _, fields in events]
    assert times_s == sorted(times_s)
    assert {fields["clock"] for _, fields in events} == {"virtual"}
    lives(events)
    assert same(found, run(text, 5, 8, times, network, on_event=lambda kind, fields: None, **more))
    assert same(found, run(text, 5, 8, times, network, **more))


@pytest.mark.parametrize("text", ["asynchronous", "softsync", "synchronous"])
@pytest.mark.parametrize("seed", range(6))
def test_workers_that_fail_at_any_moment_do_nothing_while_they_are_away(text: str, seed: int) -> None:
    times = WorkerTimes.constant(1.0, failures=Failures(4.0, 0.2), seed=seed)
    events: list[tuple[str, dict[str, Any]]] = []
    found = run(
        text, 6, 30, times, Network(bandwidth_bytes_per_s=1000.0, latency_s=0.3), merge_s=0.4, contribution_bytes=100,
        weights_bytes=100, on_event=lambda kind, fields: events.append((kind, fields)),
    )  # fmt: skip
    assert found.failures > 20
    lives(events)
    finished_s = np.zeros(6)
    for kind, fields in events:
        if kind == "computed":
            finished_s[fields["worker"]] += fields["to_s"] - fields["from_s"]
    assert (found.busy_s > finished_s - 1e-9).all()
    assert (found.busy_s < found.present_s).all()


def lives(events: list[tuple[str, dict[str, Any]]]) -> None:
    """What each worker does comes in an order that makes sense."""
    after = {
        None: {"joined"}, "joined": {"released", "left"}, "released": {"computed", "left"}, "computed": {"pushed"},
        "pushed": {"released", "left"}, "left": {"joined"},
    }  # fmt: skip
    last: dict[int, tuple[str, dict[str, Any]]] = {}
    for kind, fields in events:
        if kind in ("merged", "dropped"):
            continue
        before, known = last.get(fields["worker"], (None, {}))
        assert kind in after[before]
        if kind == "computed":
            assert (fields["piece"], fields["version"]) == (known["piece"], known["version"])
            assert known["t_s"] <= fields["from_s"] < fields["to_s"] <= fields["t_s"]
        last[fields["worker"]] = (kind, fields)


@pytest.mark.parametrize("text", RULES)
def test_looking_on_changes_nothing_and_neither_does_running_again(text: str) -> None:
    times = WorkerTimes.lognormal(1.0, 0.5, persistence=0.5, seed=9)
    first = run(text, 7, 12, times)
    assert same(first, run(text, 7, 12, times))
    assert same(first, run(text, 7, 12, times, on_event=lambda kind, fields: None))
    assert not same(first, run(text, 7, 12, dataclasses.replace(times, seed=10)))


def test_lost_work_counts_as_busy_until_the_worker_fails() -> None:
    times = WorkerTimes.constant(10.0, failures=Failures(15.0, 2.0), seed=4)
    events: list[tuple[str, dict[str, Any]]] = []
    found = run("asynchronous", 1, 20, times, on_event=lambda kind, fields: events.append((kind, fields)))
    assert found.failures == sum(kind == "left" for kind, _ in events) > 3
    assert found.busy_s == pytest.approx(found.present_s)
    assert found.wall_s == pytest.approx(found.present_s[0] + 2.0 * found.failures)


@pytest.mark.slow
def test_work_that_no_worker_can_finish_is_refused() -> None:
    times = WorkerTimes.constant(100.0, failures=Failures(0.01, 0.0))
    with pytest.raises(RecipeError, match="no worker has finished anything in 100000 failures"):
        run("asynchronous", 2, 2, times)


def test_a_rule_or_slow_workers_that_do_not_fit_the_team_are_refused() -> None:
    with pytest.raises(RecipeError, match="'9:2x' names no worker of a team of 2"):
        run("asynchronous", 2, 2, WorkerTimes.constant(1.0, slow=parse_slow("9:2x")))
    with pytest.raises(RecipeError, match="nobody would be waited for"):
        run("backup_workers:2", 2, 2, WorkerTimes.constant(1.0))


def test_weights_follow_the_items_of_pieces() -> None:
    found: list[tuple[float, ...]] = []
    rule = UpdateRule(name="half", quorum="2")
    followed(
        rule, Pieces(rule, 2, 2, 1), WorkerTimes.constant(1.0), items_of=lambda piece: 1 + 2 * piece,
        on_event=lambda kind, fields: found.append(tuple(fields["weights"])) if kind == "merged" else None,
    )  # fmt: skip
    assert found == [(0.25, 0.75)]


def test_an_update_that_waits_for_a_time_is_made_at_that_time() -> None:
    rule = UpdateRule(name="hurried", quorum="all", max_wait_s=0.5)
    made: list[float] = []
    followed(
        rule, Pieces(rule, 3, 3, 2), WorkerTimes.constant(1.0, slow=parse_slow("2:1.25x,1:4x")),
        on_event=lambda kind, fields: made.append(fields["t_s"]) if kind == "merged" else None,
    )  # fmt: skip
    assert made[0] == pytest.approx(1.5)
    assert all(b > a for a, b in itertools.pairwise(made))


def test_an_update_is_made_when_the_grace_after_its_quorum_is_over_and_the_tape_says_so() -> None:
    rule = UpdateRule(name="graced", quorum="1", max_lead=0, grace_s=0.5)
    found: list[tuple[str, float]] = []
    followed(
        rule, Pieces(rule, 3, 3, 2), WorkerTimes.constant(1.0, slow=parse_slow("1:1.4x,2:4x")),
        on_event=lambda kind, fields: found.append((kind, fields["t_s"])),
    )  # fmt: skip
    told = [(kind, t_s) for kind, t_s in found if kind in ("merged", "grace_ended")]
    assert told[:2] == [("grace_ended", pytest.approx(1.5)), ("merged", pytest.approx(1.5))]


def test_each_deadline_of_the_ledger_rings_once_or_is_taken_back_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the server is busy with; what is taken back and never comes, a loop would look for forever."""
    asked: dict[int, float] = {}
    rung: list[float] = []

    class Watched(Loop):
        def at(self, time_s: float, call: Any, argument: Any) -> int:
            token = super().at(time_s, call, argument)
            asked[token] = time_s
            return token

        def cancel(self, token: int) -> None:
            assert asked[token] >= self.now_s
            super().cancel(token)

        def run(self) -> None:
            super().run()
            assert not self._cancelled, "all that was taken back was still to come"

    def passed(ledger: Ledger, now_s: float) -> Any:
        assert now_s == ledger.deadline_s
        rung.append(now_s)
        return ledger._settle([], now_s)

    monkeypatch.setattr("instep.offline.schedule.Loop", Watched)
    monkeypatch.setattr(Ledger, "passed", passed)
    rule = UpdateRule(name="hurried", quorum="all", max_wait_s=0.5)
    made: list[float] = []
    followed(
        rule, Pieces(rule, 3, 3, 9), WorkerTimes.constant(1.0, slow=parse_slow("1:1.2x,2:1.7x")), merge_s=0.9,
        on_event=lambda kind, fields: made.append(fields["t_s"]) if kind == "merged" else None,
    )  # fmt: skip
    assert made[0] == pytest.approx(1.5 + 0.9)
    assert 1 < len(rung) == len(set(rung)) < len(made)
