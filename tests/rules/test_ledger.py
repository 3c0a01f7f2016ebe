"""The ledger: what it promises holds under every rule, in any order of events, with workers that come and go."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from instep.rules import PRESETS, UpdateRule, parse
from instep.rules.ledger import Action, Drop, Finish, Ledger, Merge, Release
from instep.rules.ledger_state import ledger_of, ledger_state
from instep.rules.work import Pieces
from support.kinds import quick
from support.ledgers import ANY_RULE, EVENTS, KINDS, Event, Observed, custom_rules, list_pieces, presets, started

pytestmark = pytest.mark.pure

WORKERS, MICROBATCHES, STEPS = st.integers(1, 6), st.integers(1, 8), st.integers(1, 12)


def lived(rule: UpdateRule, workers: int, microbatches: int, steps: int, events: list[Event]) -> Observed:
    """A run to which all this happens, until its end. The observer checks every promise after every event."""
    run = started(rule, workers, microbatches, steps)
    for event in events:
        run.happens(event)
    run.run_out()
    return run


def keeps_every_promise(rule: UpdateRule, workers: int, microbatches: int, steps: int, events: list[Event]) -> None:
    """Lead, staleness, weights, quorum, no deadlock, nobody idle for nothing: see `Observed`."""
    run = lived(rule, workers, microbatches, steps, events)
    assert sorted(run.merged) == list(range(run.total)), "each piece once"
    seen = [c.seq for merge in run.merges for c in merge.contributions] + [d.contribution.seq for d in run.drops]
    assert sorted(seen) == list(range(len(seen))), "each contribution once: merged or dropped"
    assert not run.waiting
    assert run.ledger.merged_microbatches == microbatches * steps
    assert [type(action) for actions in run.history for action in actions].count(Finish) == 1
    staleness = [old for merge in run.merges for old in merge.staleness]
    assert max([run.ledger.delays.longest, *staleness]) == max(run.delayed)


IN_ANY_ORDER = given(ANY_RULE, WORKERS, MICROBATCHES, STEPS, EVENTS)
test_every_promise_holds_in_any_order_of_events = settings(max_examples=100)(IN_ANY_ORDER(keeps_every_promise))
test_every_promise_holds_in_many_orders = pytest.mark.slow(
    settings(max_examples=2000)(IN_ANY_ORDER(keeps_every_promise))
)


DROPPING = custom_rules().filter(lambda rule: rule.order == "arrival" and rule.max_staleness is not None)
PUSHING = EVENTS.map(lambda events: [event for event in events if event[0] != "recover"])


@settings(max_examples=100)
@given(DROPPING | presets(["backup_workers"]), st.integers(2, 6), MICROBATCHES, STEPS, PUSHING)
def test_no_piece_is_dropped_twice_while_its_worker_lives(
    rule: UpdateRule, workers: int, microbatches: int, steps: int, events: list[Event]
) -> None:
    """However slow it is: the second time, updates wait for it. That they do not wait for ever, the observer sees."""
    run = lived(rule, workers, microbatches, steps, events)
    dropped = [drop.contribution.piece for drop in run.drops]
    assert len(dropped) == len(set(dropped))


def test_random_histories_hold_updates_that_wait_for_a_late_piece_and_workers_that_leave_with_one() -> None:
    """Or the test above would test nothing."""
    seen = set()

    @settings(max_examples=120, database=None, derandomize=True)
    @given(DROPPING, st.integers(2, 6), PUSHING)
    def look(rule: UpdateRule, workers: int, events: list[Event]) -> None:
        run = started(rule, workers, workers, 12)
        for event in events:
            holds, drops = run.holds(), len(run.drops)
            run.happens(event)
            seen.update({event[0]} if holds else set(), {"held"} if run.held else set())
            seen.update({"drop while held"} if holds and len(run.drops) > drops else set())

    look()
    assert seen >= {"push", "join", "leave", "wait", "round trip", "held", "drop while held"}


@pytest.mark.parametrize("name", PRESETS)
@settings(max_examples=15)
@given(st.data())
def test_every_preset_is_driven_so_at_its_default_arguments(name: str, data: st.DataObject) -> None:
    lived(PRESETS[name](), *(data.draw(each) for each in (WORKERS, MICROBATCHES, STEPS, EVENTS)))


@settings(max_examples=80)
@given(ANY_RULE, WORKERS, MICROBATCHES, STEPS, EVENTS, st.integers(0, 60))
def test_a_ledger_made_from_state_does_what_the_first_would_have_done(
    rule: UpdateRule, workers: int, microbatches: int, steps: int, events: list[Event], moment: int
) -> None:
    run = started(rule, workers, microbatches, steps)
    for event in events[:moment]:
        run.happens(event)
    run.round_trip()
    for event in [event for event in events[moment:] if event[0] != "round trip"]:
        run.happens(event)
    run.run_out()
    assert run.twin is not None
    assert run.twin.finished


@example(parse("diloco:6,fragments=3"), 3, 7, 11)
@given(ANY_RULE, WORKERS, MICROBATCHES, STEPS)
def test_pieces_hold_every_microbatch_of_every_batch_once(
    rule: UpdateRule, workers: int, microbatches: int, steps: int
) -> None:
    pieces = Pieces(rule, workers, microbatches, steps)
    expected = list_pieces(rule, workers, microbatches, steps)
    assert pieces.count == len(expected)
    held = []
    for number, (batches, ranges) in enumerate(expected):
        work = pieces.work(number)
        assert work.piece == number
        assert list(range(work.batch, work.batch + work.local_steps)) == batches
        assert list(range(work.start, work.stop)) == ranges
        assert work.microbatches == pieces.microbatches_of(number) == len(batches) * len(ranges) > 0
        held += list(itertools.product(batches, ranges))
    assert sorted(held) == list(itertools.product(range(steps), range(microbatches)))
    sizes = {work.stop - work.start for work in map(pieces.work, range(pieces.count))}
    assert max(sizes) - min(sizes) <= 1
    rounds = [pieces.round_of(number) for number in range(pieces.count)]
    assert [rounds.count(number) for number in range(rounds[-1] + 1)] == [
        pieces.size_of(number) for number in range(rounds[-1] + 1)
    ]
    if pieces.whole_rounds:
        assert [rounds.count(number) for number in set(rounds)] == [workers] * pieces.groups


LOCKSTEP = ["synchronous", "local_sgd", "post_local_sgd", "diloco"]


@given(presets().filter(lambda rule: rule.lockstep), st.integers(1, 6), st.integers(0, 4), STEPS, EVENTS)
def test_lockstep_merges_whole_rounds_in_the_order_of_pieces(
    rule: UpdateRule, workers: int, more: int, steps: int, events: list[Event]
) -> None:
    """Whoever computes what, whoever comes and goes: so the weights cannot depend on it."""
    run = lived(rule, workers, workers + more, steps, events)
    rounds = [list(range(first, first + workers)) for first in range(0, run.total, workers)]
    assert [[c.piece for c in merge.contributions] for merge in run.merges] == rounds
    assert run.version == len(rounds) == run.pieces.groups
    assert {old for merge in run.merges for old in merge.staleness} == {0}
    for merge, number in zip(run.merges, range(len(rounds)), strict=True):
        batches = {run.pieces.work(c.piece).batch for c in merge.contributions}
        assert batches == {run.pieces.batches_of(number)[0]}
    if rule.gradients:
        assert {weight for merge in run.merges for weight in merge.weights} == {1.0}


def test_the_lockstep_presets_are_those() -> None:
    assert [name for name, preset in PRESETS.items() if preset().lockstep] == LOCKSTEP


@given(WORKERS, MICROBATCHES, STEPS, EVENTS)
def test_bounded_staleness_of_0_is_synchronous(
    workers: int, microbatches: int, steps: int, events: list[Event]
) -> None:
    team = (workers, microbatches, steps, events)
    assert lived(PRESETS["bounded_staleness"](0), *team).history == lived(PRESETS["synchronous"](), *team).history


def test_random_histories_hold_every_kind_of_event() -> None:
    """An event that never fits would test nothing."""
    changed = set()

    @settings(max_examples=60, database=None)
    @given(EVENTS)
    def look(events: list[Event]) -> None:
        run = started(PRESETS["asynchronous"](), 3, 4, 12)
        for event in events:
            before = (len(run.history), run.twin)
            run.happens(event)
            changed.update({event[0]} if before != (len(run.history), run.twin) else set())

    look()
    assert changed == set(KINDS)


# ---------------------------------------------------------------------------------------------------- rules, by example


def spoken(actions: list[Action]) -> list[str]:
    """Actions in short: ``2>5@1`` releases worker 2 for piece 5 at version 1, ``v1(0,1)`` merges those of 0 and 1."""
    words = []
    for action in actions:
        match action:
            case Release(worker, piece, version):
                words.append(f"{worker}>{piece}@{version}")
            case Merge(version, contributions, _, _):
                words.append(f"v{version}({','.join(str(c.worker) for c in contributions)})")
            case Drop(contribution, _):
                words.append(f"drop {contribution.worker}")
            case Finish(version):
                words.append(f"end v{version}")
    return words


def team(rule: UpdateRule, workers: int, microbatches: int = 8, steps: int = 12) -> Ledger:
    ledger = Ledger(rule, Pieces(rule, workers, microbatches, steps))
    for worker in range(workers):
        ledger.joined(worker)
    return ledger


def pushes(ledger: Ledger, *workers: int) -> list[list[str]]:
    return [spoken(ledger.pushed(worker, 1)) for worker in workers]


def test_asynchronous_one_worker_is_never_stale() -> None:
    """It starts again from weights that hold its own last contribution."""
    ledger = Ledger(PRESETS["asynchronous"](), Pieces(PRESETS["asynchronous"](), 1, 4, 3))
    assert spoken(ledger.joined(0)) == ["0>0@0"]
    assert pushes(ledger, 0, 0, 0) == [["v1(0)", "0>1@1"], ["v2(0)", "0>2@2"], ["v3(0)", "end v3"]]


def test_one_worker_alone_is_its_own_slowest() -> None:
    """The bound on its lead does not stop it, however long it runs."""
    ledger = team(PRESETS["bounded_staleness"](1), 1)
    for _ in range(12):
        assert ledger.lead_of(0) == 0
        ledger.pushed(0, 1)
    assert ledger.finished


def test_asynchronous_staleness_counts_the_updates_of_others() -> None:
    ledger = team(PRESETS["asynchronous"](), 3)
    pushes(ledger, 0, 1, 0)
    (merge, *_) = ledger.pushed(2, 1)
    assert isinstance(merge, Merge)
    assert merge.staleness == (3,)


def test_bounded_staleness_holds_the_fast_one_until_the_slow_one_pushes() -> None:
    ledger = team(PRESETS["bounded_staleness"](1), 2)
    assert pushes(ledger, 0, 0) == [["v1(0)", "0>2@1"], ["v2(0)"]]
    assert ledger.lead_of(0) == 2, "it waits"
    assert pushes(ledger, 1) == [["v3(1)", "1>3@3", "0>4@3"]]
    assert ledger.lead_of(0) == 1


def test_a_leave_frees_those_whom_the_slow_one_held_back() -> None:
    ledger = team(PRESETS["bounded_staleness"](1), 2)
    pushes(ledger, 0, 0)
    assert spoken(ledger.left(1)) == ["0>1@2"], "with the piece that was given back"


def test_backup_workers_go_on_without_the_slowest_whose_work_is_done_again() -> None:
    ledger = team(PRESETS["backup_workers"](1), 3)
    assert pushes(ledger, 0, 1) == [[], ["v1(0,1)", "0>3@1", "1>4@1"]]
    (drop, release) = ledger.pushed(2, 1)
    assert isinstance(drop, Drop)
    assert drop.why == "its staleness, 1, is above max_staleness, 0"
    assert spoken([release]) == ["2>5@1"], "another worker does again what this one was late with"
    assert pushes(ledger, 2, 0) == [[], ["v2(2,0)", "2>6@2", "0>2@2"]]


def test_backup_workers_wait_for_a_piece_that_was_dropped_once() -> None:
    """However slow it is: else it would be merged in the last update of the epoch."""
    ledger = team(PRESETS["backup_workers"](1), 3)
    assert pushes(ledger, 0, 1, 2) == [[], ["v1(0,1)", "0>3@1", "1>4@1"], ["drop 2", "2>5@1"]]
    assert pushes(ledger, 0, 1) == [[], ["v2(0,1)", "0>2@2", "1>6@2"]], "another worker has it"
    assert pushes(ledger, 2, 1, 2) == [["drop 2", "2>7@2"], [], []], "the update waits for piece 2"
    assert pushes(ledger, 0) == [["v3(1,2,0)", "0>5@3", "1>8@3", "2>9@3"]]
    assert ledger.delays.longest == 2


def test_a_slow_worker_is_waited_for_no_more_than_before_for_others_do_what_it_was_late_with() -> None:
    ledger = team(PRESETS["backup_workers"](1), 3)
    for round_ in range(4):
        assert pushes(ledger, 0, 1)[1][0] == f"v{round_ + 1}(0,1)", "no update waits"
        assert pushes(ledger, 2)[0][0] == "drop 2"
    assert ledger.delays.longest == 2


def test_a_late_piece_goes_to_the_worker_that_was_late_where_no_other_work_is_left() -> None:
    ledger = team(PRESETS["backup_workers"](1), 3, steps=1)
    assert pushes(ledger, 0, 1) == [[], ["v1(0,1)"]]
    assert spoken(ledger.left(0)) == spoken(ledger.left(1)) == []
    assert pushes(ledger, 2) == [["drop 2", "2>2@1"]]
    assert pushes(ledger, 2) == [["v2(2)", "end v2"]]


def test_no_worker_starts_from_a_version_that_would_make_a_late_piece_too_old() -> None:
    ledger = team(UpdateRule(quorum="1", max_staleness=1), 3)
    assert pushes(ledger, 0, 0, 2, 0)[-2:] == [["drop 2", "2>5@2"], ["v3(0)", "0>2@3"]]
    assert pushes(ledger, 2, 2) == [["v4(2)", "2>6@4"], []], "4 is one more than piece 2 started from, and 5 too many"
    assert spoken(ledger.joined(3)) == ["3>7@4"], "who has sent nothing may start from it"
    assert pushes(ledger, 3) == [[]]
    assert pushes(ledger, 0) == [["v5(2,3,0)", "0>8@5", "2>9@5", "3>10@5"]]


def test_a_late_piece_whose_worker_leaves_is_waited_for_again_at_the_next_one() -> None:
    ledger = team(PRESETS["backup_workers"](1), 3)
    pushes(ledger, 0, 1, 2, 0, 1)
    assert pushes(ledger, 2, 1) == [["drop 2", "2>7@2"], []]
    assert spoken(ledger.left(0)) == ["v3(1)", "1>2@3"]
    assert pushes(ledger, 2) == [["drop 2", "2>8@3"]]
    assert pushes(ledger, 2) == [[]], "a quorum of one, and piece 2 is waited for"
    assert pushes(ledger, 1) == [["v4(2,1)", "1>5@4", "2>9@4"]]
    assert ledger.delays.longest == 3


def test_a_state_of_before_late_pieces_were_waited_for_still_loads() -> None:
    ledger = team(PRESETS["backup_workers"](1), 3)
    pushes(ledger, 0, 1, 2)
    state = {key: value for key, value in ledger_state(ledger).items() if key not in ("held", "first", "late")}
    again = ledger_of(ledger.rule, ledger.pieces, state)
    assert pushes(again, 0, 1) == [[], ["v2(0,1)", "0>2@2", "1>6@2"]]
    assert pushes(again, 1, 2, 2) == [[], ["drop 2", "2>7@2"], ["v3(1,2)", "1>5@3", "2>8@3"]], (
        "nobody knows that piece 2 was dropped before"
    )


def test_softsync_merges_by_splits_and_damps_what_is_stale() -> None:
    ledger = team(PRESETS["softsync"](2), 4)
    assert pushes(ledger, 0, 1, 0)[1] == ["v1(0,1)", "1>5@1"]
    actions = ledger.pushed(3, 3)
    assert isinstance(actions[0], Merge)
    assert actions[0].staleness == (1, 1), "both started before the first update"
    assert actions[0].weights == (0.125, 0.375)


def test_contributions_without_items_share_alike() -> None:
    ledger = team(UpdateRule(quorum="2"), 2)
    ledger.pushed(0, 0)
    (merge, *_) = ledger.pushed(1, 0)
    assert isinstance(merge, Merge)
    assert merge.weights == (0.5, 0.5)


def test_an_order_by_round_works_ahead_and_merges_in_turn() -> None:
    ledger = team(UpdateRule(quorum="all", order="round", max_lead=1), 2)
    assert pushes(ledger, 0, 0) == [["0>2@0"], ["0>3@0"]]
    assert pushes(ledger, 0) == [[]], "round 2 is too far ahead"
    assert ledger.lead_of(1) == 0
    assert pushes(ledger, 1) == [["v1(0,1)", "v2(0,0)", "0>4@2", "1>5@2"]]


def test_synchronous_gives_out_a_round_in_the_order_of_workers_whoever_was_first() -> None:
    """So that a run in lockstep repeats itself, as far as its team does."""
    ledger = team(PRESETS["synchronous"](), 3)
    assert pushes(ledger, 2, 0, 1) == [[], [], ["v1(0,1,2)", "0>3@1", "1>4@1", "2>5@1"]]


def test_an_order_by_round_begins_nothing_that_would_be_too_old() -> None:
    rule = UpdateRule(quorum="all", order="round", max_staleness=1)
    ledger = team(rule, 2)
    assert pushes(ledger, 0, 0, 0) == [["0>2@0"], ["0>3@0"], []]
    assert team(dataclasses.replace(rule, max_staleness=None), 2).pushed(0, 1)


def test_a_run_ends_in_the_middle_of_a_round_with_what_there_is() -> None:
    ledger = team(UpdateRule(quorum="3"), 3, steps=1)
    assert spoken(ledger.left(2)) == []
    assert pushes(ledger, 0, 0, 1) == [["0>2@0"], ["v1(0,0)"], ["v2(1)", "end v2"]]


def test_work_that_was_given_back_goes_out_first() -> None:
    ledger = team(PRESETS["asynchronous"](), 3)
    ledger.left(1)
    assert pushes(ledger, 0, 0) == [["v1(0)", "0>1@1"], ["v2(0)", "0>3@2"]]


def test_who_comes_late_counts_as_the_slowest_and_holds_back_from_there() -> None:
    ledger = team(PRESETS["bounded_staleness"](1), 1)
    pushes(ledger, 0, 0, 0)
    ledger.joined(1)
    assert [ledger.lead_of(worker) for worker in (0, 1)] == [0, 0]
    assert pushes(ledger, 0, 0)[-1] == ["v5(0)"], "it is 2 ahead now"


def test_a_restart_of_everything_gives_out_again_what_was_not_merged() -> None:
    ledger = team(PRESETS["synchronous"](), 3)
    pushes(ledger, 0, 2)
    drops = ledger.recover()
    assert spoken(drops) == ["drop 0", "drop 2"]
    assert all(isinstance(drop, Drop) and "before the run ended" in drop.why for drop in drops)
    assert ledger.active == []
    assert [spoken(ledger.joined(worker)) for worker in range(3)] == [["0>0@0"], ["1>1@0"], ["2>2@0"]]


# ---------------------------------------------------------------------------------------------------------- time passes


def waiting(**fields: Any) -> UpdateRule:
    return UpdateRule(**{"quorum": "all", "max_wait_s": 2.0} | fields)


def test_an_update_is_made_when_the_first_contribution_has_waited_enough() -> None:
    ledger = team(waiting(), 4)
    assert ledger.deadline_s is None
    ledger.pushed(0, 1, now_s=10.0)
    ledger.pushed(2, 1, now_s=11.5)
    assert ledger.deadline_s == 12.0, "it counts from the first"
    assert ledger.passed(11.9) == []
    assert spoken(ledger.passed(12.0)) == ["v1(0,2)"]
    assert ledger.deadline_s is None
    assert ledger.passed(99.0) == [], "nothing waits"


def test_a_quorum_in_time_needs_no_deadline_and_the_next_wait_begins_anew() -> None:
    ledger = team(waiting(), 2)
    ledger.pushed(0, 1, now_s=1.0)
    assert spoken(ledger.pushed(1, 1, now_s=2.9))[0] == "v1(0,1)"
    assert ledger.deadline_s is None
    ledger.pushed(1, 1, now_s=5.0)
    assert ledger.deadline_s == 7.0


def test_any_event_after_the_deadline_makes_the_update() -> None:
    for event in ("pushed", "joined", "left"):
        ledger = team(waiting(), 3)
        ledger.pushed(0, 1, now_s=1.0)
        actions = {
            "pushed": lambda ledger=ledger: ledger.pushed(1, 1, now_s=3.0),
            "joined": lambda ledger=ledger: ledger.joined(7, now_s=3.0),
            "left": lambda ledger=ledger: ledger.left(1, now_s=3.0),
        }[event]()
        assert spoken(actions)[0] == ("v1(0,1)" if event == "pushed" else "v1(0)")


def test_a_deadline_is_part_of_the_state_and_ends_with_a_restart() -> None:
    ledger = team(waiting(), 2)
    ledger.pushed(0, 1, now_s=4.0)
    again = ledger_of(ledger.rule, ledger.pieces, ledger_state(ledger))
    assert again.deadline_s == ledger.deadline_s == 6.0
    ledger.recover()
    assert ledger.deadline_s is None


def test_what_is_dropped_does_not_start_the_wait() -> None:
    ledger = team(waiting(quorum="2", max_staleness=0), 3)
    ledger.pushed(0, 1, now_s=1.0)
    ledger.pushed(1, 1, now_s=1.0)
    assert spoken(ledger.pushed(2, 1, now_s=2.0))[0] == "drop 2"
    assert ledger.deadline_s is None


def test_where_all_are_too_old_at_once_they_go_on_from_where_the_slowest_was() -> None:
    ledger = team(waiting(max_staleness=0), 2)
    ledger.pushed(1, 1, now_s=0.0)
    assert spoken(ledger.passed(2.0)) == ["v1(1)"]
    assert pushes(ledger, 0, 1) == [["drop 0", "0>3@1"], ["drop 1", "1>0@1"]]
    assert [ledger.lead_of(worker) for worker in (0, 1)] == [0, 1]


def test_a_wait_that_is_over_makes_no_update_that_a_late_piece_is_waited_for_in() -> None:
    ledger = team(waiting(max_lead=0, max_staleness=0), 3)
    ledger.pushed(0, 1, now_s=0.0)
    assert spoken(ledger.passed(2.0)) == ["v1(0)", "0>3@1"]
    assert spoken(ledger.pushed(1, 1, now_s=2.0)) == ["drop 1", "1>4@1"]
    assert spoken(ledger.pushed(2, 1, now_s=2.0)) == ["drop 2", "2>1@1"]
    ledger.pushed(0, 1, now_s=3.0)
    assert ledger.deadline_s is None, "or the engine would ask again and again"
    assert ledger.passed(9.0) == []
    assert spoken(ledger.pushed(2, 1, now_s=9.0))[0] == "v2(0,2)"


def graced(**fields: Any) -> UpdateRule:
    return UpdateRule(**{"quorum": "2", "max_lead": 0, "grace_s": 1.0} | fields)


def test_an_update_waits_for_more_than_its_quorum_until_the_grace_is_over() -> None:
    ledger = team(graced(), 4)
    assert ledger.pushed(0, 1, now_s=9.0) == []
    assert ledger.deadline_s is None, "there is no quorum"
    assert ledger.pushed(1, 1, now_s=10.0) == []
    assert ledger.pushed(3, 1, now_s=10.5) == []
    assert ledger.deadline_s == 11.0, "it counts from the quorum"
    assert (ledger.graced(10.9), ledger.graced(11.0)) == (0, 3)
    assert ledger.passed(10.9) == []
    assert spoken(ledger.passed(11.0))[0] == "v1(0,1,3)"
    assert ledger.deadline_s is None
    assert ledger.graced(99.0) == 0


def test_once_all_have_sent_something_nobody_is_waited_for() -> None:
    ledger = team(graced(), 3)
    ledger.pushed(0, 1, now_s=1.0)
    ledger.pushed(1, 1, now_s=1.0)
    assert spoken(ledger.pushed(2, 1, now_s=1.5))[0] == "v1(0,1,2)"
    ledger = team(graced(), 3)
    ledger.pushed(0, 1, now_s=1.0)
    ledger.pushed(1, 1, now_s=1.0)
    assert spoken(ledger.left(2, now_s=1.5))[0] == "v1(0,1)", "nor the one that has left"


def test_a_grace_ends_with_the_longest_wait_and_goes_through_a_checkpoint() -> None:
    ledger = team(graced(max_wait_s=1.5), 4)
    ledger.pushed(0, 1, now_s=1.0)
    ledger.pushed(1, 1, now_s=2.0)
    again = ledger_of(ledger.rule, ledger.pieces, ledger_state(ledger))
    assert again.deadline_s == ledger.deadline_s == 2.5
    assert spoken(ledger.passed(2.5))[0] == "v1(0,1)"
    ledger = team(graced(), 4)
    ledger.pushed(0, 1, now_s=1.0)
    ledger.pushed(1, 1, now_s=2.0)
    again = ledger_of(ledger.rule, ledger.pieces, ledger_state(ledger))
    assert again.deadline_s == ledger.deadline_s == 3.0
    ledger.recover()
    assert ledger.deadline_s is None
    assert "quorum_since_s" not in ledger_state(team(waiting(), 2)), "other runs' checkpoints stay as they are"


def test_without_max_wait_s_time_changes_nothing() -> None:
    ledger = team(waiting(max_wait_s=None), 2)
    ledger.pushed(0, 1, now_s=1.0)
    assert ledger.deadline_s is None
    assert ledger.passed(1e9) == []


# ----------------------------------------------------------------------------------------------------------------- size


@pytest.mark.parametrize("name", quick(PRESETS, "synchronous", "asynchronous", "async_diloco"))
def test_time_grows_with_contributions_not_with_workers_times_contributions(name: str) -> None:
    """Counted in calls and lines of the ledger's code, not in seconds: 8 times the workers, 8 times the work."""
    costs = [lines_run(PRESETS[name](), workers) / workers for workers in (25, 200)]
    assert costs[1] < 1.3 * costs[0]


def lines_run(rule: UpdateRule, workers: int) -> int:
    """Steps of the interpreter in the ledger while all workers push 6 contributions in turn."""
    pieces = Pieces(rule, workers, workers, 6 * rule.local_steps)
    ledger, count = Ledger(rule, pieces), 0

    def trace(frame: Any, event: str, argument: Any) -> Any:
        nonlocal count
        if "instep/rules" not in frame.f_code.co_filename:
            return None
        count += 1
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        actions = [action for worker in range(workers) for action in ledger.joined(worker)]
        for action in actions:  # it grows
            if isinstance(action, Release):
                actions += ledger.pushed(action.worker, 1)
    finally:
        sys.settrace(before)
    assert ledger.finished
    return count
