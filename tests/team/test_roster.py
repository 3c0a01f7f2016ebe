"""The roster: what it promises holds in any history of a team, and each death, stop and error means what it should."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from instep.bounds import Bounds
from instep.errors import DataError, InstepError, ResourceError, WorkerError
from instep.ranges import share_out
from instep.team.agreement import refuted
from instep.team.hosts_there import HostsThere
from instep.team.messages import Digest, Ended, FoundWrong, HandedOver, StoppedAt
from instep.team.orders import (
    AskToPause,
    AskToStop,
    CancelRun,
    CannotStart,
    DropSuccessor,
    EndEpoch,
    FailRun,
    FinishRun,
    Go,
    HandOver,
    HostCame,
    Join,
    Lost,
    Member,
    NoteLoss,
    NoteResize,
    Order,
    Regroup,
    Replace,
    Resumed,
    Start,
    StartMore,
    StopServer,
    Warn,
)
from instep.team.roster import Roster
from support.world import FINAL, World

pytestmark = pytest.mark.pure


KINDS = (
    "build", "build", "build", "ready", "end", "lose", "lose", "raise", "write", "digest", "drift", "stop", "gone",
    "gone", "old", "come", "come", "part", "back", "cut", "return", "give up", "save", "resize", "hand", "cannot",
    "late", "prove", "room",
)  # fmt: skip
HISTORIES = st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 29)), max_size=60)
AGENTS = st.sampled_from([(1,), (1,), (1, 1), (2, 1), (1, 1, 1)])
WORLDS = st.builds(
    World, st.integers(1, 4), st.integers(0, 3), serving=st.booleans(), unlooked=st.booleans(), agents=AGENTS,
    patient=st.booleans(),
)  # fmt: skip
FOLLOWING = st.builds(
    World, st.integers(1, 4), st.integers(0, 1), serving=st.booleans(), agents=AGENTS,
    bounds=st.builds(lambda least, more: Bounds(least, least + more), st.integers(1, 4), st.integers(0, 4)),
)  # fmt: skip
REGROUPING = st.builds(
    World, st.integers(2, 4), st.integers(1, 4), agents=st.sampled_from([(1, 1), (1, 1, 1), (2, 1)]),
    patient=st.booleans(), regroups=st.just(True), begun=st.just(True),
)  # fmt: skip
STANDING_IN = st.builds(World, st.integers(2, 4), st.integers(1, 3), stands_in=st.just(True), begun=st.just(True))


def keeps_every_promise(world: World, history: list[tuple[str, int]]) -> None:
    """Every start ends, orders name only who is there, nobody waits for the dead, restarts are counted once, a stop
    starts nothing, and the old changes nothing: see `World`."""
    for kind, pick in history:
        world.happens(kind, pick)
    world.run_out()
    assert [type(order) for order in world.orders if isinstance(order, FINAL)] == [type(world.final)]
    told = [
        order.member
        for order in world.orders
        if isinstance(order, NoteLoss | Replace) and not getattr(order, "told", False)
    ]
    ending = isinstance(world.ending, Lost | HostCame)  # for a loss, or for a host that came anew
    cut_short = isinstance(world.final, CancelRun) and ending and told != world.losses
    assert told == world.losses[: len(world.losses) - cut_short], "each death is told of once"
    ended = [order.epoch for order in world.orders if isinstance(order, EndEpoch)]
    assert ended + [world.roster.epoch] * (world.roster.epoch not in (0, *ended)) == world.epochs, (
        "every epoch ends once"
    )
    for event in world.said:
        world.hear_old(event)


IN_ANY_HISTORY = given(WORLDS | FOLLOWING | STANDING_IN | REGROUPING, HISTORIES)
test_every_promise_holds_in_any_history = settings(max_examples=250)(IN_ANY_HISTORY(keeps_every_promise))
test_every_promise_holds_in_many_histories = pytest.mark.slow(
    settings(max_examples=5000)(IN_ANY_HISTORY(keeps_every_promise))
)


def test_random_histories_come_everywhere() -> None:
    """Or the test above would test nothing."""
    seen = set()

    @settings(max_examples=1200, database=None)
    @given(WORLDS, HISTORIES)
    @example(World(3, stands_in=True, begun=True), [("lose", 0), ("end", 2)])  # few histories come so far
    @example(World(3, stands_in=True, begun=True), [("lose", 0), ("build", 0), ("hand", 0)])
    @example(World(3, agents=(1, 1), regroups=True, begun=True), [("come", 1), ("build", 0), ("lose", 0)])
    @example(World(restarts=2, begun=True), [(kind, 0) for kind in ("lose", "gone", "build", "lose", "gone")])
    @example(World(serving=True, agents=(1, 1)), [("come", 1), ("build", 0), ("part", 1), ("come", 1)])  # seldom
    @example(World(serving=True, begun=True), [("raise", 0)])
    @example(World(begun=True), [("write", 0), ("gone", 1), ("build", 0), ("stop", 2)])
    @example(World(begun=True), [("stop", 0)])
    @example(World(agents=(1, 1), bounds=Bounds(1, 4)), [("late", 0), ("build", 0), ("come", 1)])
    def look(world: World, history: list[tuple[str, int]]) -> None:
        for kind, pick in history:
            world.happens(kind, pick)
        world.run_out()
        seen.update(type(order) for order in world.orders)
        seen.update({"third start"} if len(world.epochs) > 2 else set())
        seen.update({"stop before the end"} if world.stopping and isinstance(world.final, FinishRun) else set())
        seen.update({"too often"} if isinstance(world.final, FailRun) and "times" in str(world.final.error) else set())

    look()
    words = {"third start", "stop before the end", "too often"}
    assert seen == {*Order.__args__, *words}


# ---------------------------------------------------------------------------------------- what each event means alone


def working(workers: int = 2, restarts: int = 1, *, serving: bool = False, stands_in: bool = False) -> World:
    """A team in the midst of training; orders of before are forgotten."""
    world = World(workers, restarts, serving=serving, stands_in=stands_in)
    for member in world.living():
        world.ready(member, **world.facts, data="these")
    assert world.orders[-1] == Go(1, tuple(world.present()))
    world.orders.clear()
    return world


def member(number: int, incarnation: int = 0, epoch: int = 1) -> Member:
    return Member(epoch, number, incarnation)


def error_of(world: World) -> InstepError:
    assert isinstance(world.final, FailRun)
    return world.final.error


def test_nobody_begins_before_all_are_ready() -> None:
    world = World(3)
    world.ready(member(2))
    world.ready(member(0))
    assert [type(order) for order in world.orders] == [Start]
    world.ready(member(1))
    assert world.orders[-1] == Go(1, (member(0), member(1), member(2)))


def test_a_death_in_lockstep_starts_the_whole_team_again() -> None:
    world = working(3, restarts=1)
    world.lose(member(1), "worker 1 was killed.")
    assert world.orders == [EndEpoch(1)]
    world.gone()
    assert world.orders[1:] == [
        NoteLoss(member(1), "worker 1 was killed."),
        Start(2, (member(0, epoch=2), member(1, epoch=2), member(2, epoch=2))),
    ]


def test_a_worker_in_lockstep_that_is_lost_is_stood_in_for_until_its_successor_has_its_place() -> None:
    world = working(3, restarts=2, stands_in=True)
    world.lose(member(0), "worker 0 was killed.")
    assert world.orders == [Replace(member(0), member(0, 1), "worker 0 was killed.", {member(0, 1): member(1)})]
    assert world.roster.stood_in == world.roster.restarts == 1
    world.ready(member(0, 1), data="these")
    assert world.orders[-1] == Join(member(0, 1))
    world.says(member(1), HandedOver(0, 0, b"for one of before"))
    assert world.orders[-1] == Join(member(0, 1))
    world.hands_over(member(0, 1))
    assert world.orders[-1] == HandOver(member(0, 1), b"")
    world.lose(member(1), "worker 1 was killed.")
    assert world.orders[-1] == Replace(member(1), member(1, 1), "worker 1 was killed.", {member(1, 1): member(0, 1)})


def test_a_successor_that_raises_before_it_has_its_place_is_lost_as_one_that_dies() -> None:
    """The others train on: what it met with as it was built need not be theirs."""
    world = working(3, restarts=2, stands_in=True)
    world.lose(member(1), "worker 1 was killed.")
    world.raises(member(1, 1), DataError("cannot read points.bin."))
    assert world.orders[-1] == Replace(member(1, 1), member(1, 2), "cannot read points.bin.", {member(1, 2): member(0)})
    assert world.final is None
    world.raises(member(1, 2), DataError("cannot read points.bin."))
    assert isinstance(world.final, FailRun), "each of them counts"


def test_who_stands_in_and_dies_leaves_all_its_places_to_the_others_evenly() -> None:
    world = working(4, restarts=3, stands_in=True)
    world.lose(member(3))
    world.lose(member(2))
    world.lose(member(0))
    assert isinstance(replaced := world.orders[-1], Replace)
    assert replaced.holders == {member(number, 1): member(1) for number in (0, 3)}
    world.lose(member(3, 1), "its successor was killed.")
    assert isinstance(world.final, FailRun), "each of them counts"


def test_the_last_of_a_team_has_nobody_to_stand_in_for_it_and_who_cannot_stand_in_ends_the_epoch_uncounted() -> None:
    world = working(2, restarts=2, stands_in=True)
    world.lose(member(1), "worker 1 was killed.")
    world.cannot(member(1, 1))
    assert [type(order) for order in world.orders] == [Replace, Warn, EndEpoch]
    world.gone()
    assert isinstance(world.orders[-1], Start)
    assert world.roster.restarts == 1
    for each in world.living():
        world.ready(each, **world.facts)
    world.lose(member(0, epoch=2), "worker 0 was killed.")
    world.lose(member(1, epoch=2), "worker 1 was killed too.")
    assert world.orders[-1] == EndEpoch(2)
    world.gone()
    assert "worker 1 was killed too" in str(error_of(world)), "the third loss"


def test_a_host_that_comes_back_takes_part_once_a_checkpoint_is_saved_and_no_restart_is_counted() -> None:
    world = World(3, restarts=1, agents=(1, 1))
    world.comes(1)
    world.build()
    world.loses(1)
    world.gone()
    assert [member.host for member in world.present()] == [0, 0, 0]
    world.saves()  # while it is built
    world.build()
    world.saves()
    assert isinstance(world.orders[-1], Go), "nobody has come"
    world.comes(1)
    assert isinstance(world.orders[-1], Go), "the others go on meanwhile"
    world.saves()
    world.gone()
    assert [member.host for member in world.present()] == [0, 1, 1]
    assert world.roster.restarts == 1
    world.run_out()


def test_a_host_for_which_there_is_no_worker_is_not_taken_in() -> None:
    world = World(1, agents=(1, 1))
    world.comes(1)
    world.build()
    world.saves()
    assert isinstance(world.orders[-1], Go)


def test_a_death_before_the_team_goes_starts_all_of_it_again_under_the_server_too() -> None:
    world = World(2, serving=True)
    world.ready(member(0))
    world.lose(member(0))
    assert world.orders[1:] == [EndEpoch(1)]


def test_who_has_ended_has_ended_for_those_whose_places_it_holds_and_their_successors_are_taken_out() -> None:
    world = working(3, restarts=2, stands_in=True)
    world.lose(member(0))
    (successor,) = world.holders
    world.end(member(1))
    assert world.orders[-1] == DropSuccessor(successor)
    world.end(member(2))
    assert world.orders[-1] == FinishRun(successor)


def test_after_a_stop_others_hold_the_places_of_the_dead_to_the_end_and_nothing_is_counted() -> None:
    world = working(3, restarts=0, stands_in=True)
    world.stop()
    world.lose(member(0))
    (replaced,) = world.orders[1:]
    assert isinstance(replaced, Replace)
    assert (replaced.successor, list(replaced.holders.values())) == (None, [member(1)])
    world.lose(member(1))
    world.end(member(2))
    assert world.orders[-1] == FinishRun(world.roster.leader)
    assert (world.roster.restarts, world.roster.stood_in) == (0, 0)


def test_who_dies_when_its_holder_has_done_all_sends_the_team_back_once() -> None:
    world = working(2, restarts=2, stands_in=True)
    world.lose(member(1))
    world.end(member(0), leaves=True)
    assert isinstance(world.orders[-1], EndEpoch)
    world.gone()
    assert [type(order) for order in world.orders[1:]] == [EndEpoch, Start], "it was told of and counted"
    assert world.roster.restarts == 1


@pytest.mark.parametrize("stands_in", [False, True])
def test_a_worker_that_an_audit_has_found_to_be_wrong_is_lost_by_the_word_of_any_of_them(stands_in: bool) -> None:
    """And nobody stands in for it: what it has had a part in is uncertain."""
    world = working(3, stands_in=stands_in)
    found = FoundWrong(1, version=7, microbatch=2, since=6, back=5, by="worker 0 and worker 2")
    world.says(member(2), found)
    world.says(member(0), found)
    world.gone()
    assert world.orders[:2] == [EndEpoch(1), NoteLoss(member(1), refuted(found))]
    assert refuted(found).startswith(
        "worker 1 computed microbatch 2 of step 8 wrong: worker 0 and worker 2 both came to"
    )
    assert world.roster.restarts == 1


def test_a_worker_of_the_server_is_replaced_and_joins_alone() -> None:
    world = working(2, serving=True)
    world.lose(member(1), "worker 1 was killed.")
    world.ready(member(1, 1), weights="others by now")
    assert world.orders == [Replace(member(1), member(1, 1), "worker 1 was killed."), Join(member(1, 1))]
    assert world.roster.restarts == 1


def test_members_are_called_by_what_they_do() -> None:
    served = Roster(HostsThere(2), 0, Path("run"), serving=True)
    assert [served.name(n) for n in range(3)] == ["worker 0", "worker 1", "the server"]
    assert Roster(HostsThere(3), 0, Path("run"), serving=False).name(2) == "worker 2"


def test_a_lost_host_leaves_its_workers_to_the_others_or_is_waited_for() -> None:
    for patient in (False, True):
        world = World(3, agents=(1, 1), patient=patient)
        assert world.roster.hosts.awaited == [1]
        world.comes(1)
        assert [each.host for each in world.present()] == [0, 1, 1]
        world.build()
        world.loses(1)
        world.gone()
        assert [each.host for each in world.living()] == ([] if patient else [0, 0, 0])
        world.comes(1)
        assert [each.host for each in world.living()] == ([0, 1, 1] if patient else [0, 0, 0])
        assert NoteLoss(Member(1, 1, host=1), "host 1 (b) is lost.") in world.orders
        assert world.roster.restarts == 1


def test_under_a_server_the_others_go_on_without_a_host_that_is_lost_and_its_workers_join_when_it_comes_back() -> None:
    world = World(3, serving=True, agents=(1, 1), patient=True)
    world.comes(1)
    world.build()
    assert [each.host for each in world.present()] == [0, 1, 1, 0]
    world.orders.clear()
    world.loses(1)
    why = "host 1 (b) is lost."
    lost, anew = ([Member(1, number, incarnation, 1) for number in (1, 2)] for incarnation in (0, 1))
    assert world.orders == [Replace(each, None, why) for each in lost]
    assert world.roster.restarts == 1
    world.comes(1)
    assert world.orders[2:] == [StartMore(tuple(anew))]
    world.ready(anew[1], data="these")
    assert world.orders[3:] == [Join(anew[1])]


def test_who_joins_with_other_data_has_the_server_stop() -> None:
    world = working(2, serving=True)
    world.lose(member(1), "worker 1 was killed.")
    world.ready(member(1, 1), data="others")
    assert isinstance(world.orders[-1], StopServer)
    world.says(member(2), StoppedAt(5))
    assert "worker 1 starts from other data than the server" in error_of(world).message


def test_an_agent_that_comes_anew_has_no_workers() -> None:
    world = World(2, agents=(1, 1))
    world.comes(1)
    world.build()
    world.comes(1)
    world.gone()
    assert [each.host for each in world.present()] == [0, 1]
    assert world.roster.restarts == 1


def test_workers_are_shared_out_by_the_agents_that_hosts_tell_of_as_they_come() -> None:
    roster = Roster(HostsThere(6, (2, 0, 0)), 0, Path("run"), serving=False)
    assert roster.begin() == []
    for host, agents in ((2, 3), (0, 2), (1, 1)):
        orders = roster.hear(HostCame(host, "n", agents))
    (start,) = orders
    assert isinstance(start, Start)
    assert [member.host for member in start.members] == [0, 0, 1, 2, 2, 2]


def test_workers_are_shared_out_by_agents_and_the_rest_stands_by() -> None:
    assert share_out(5, [1, 1]) == [2, 3]
    assert share_out(2, [1, 1, 1]) == [1, 1, 0]
    assert share_out(8, [2, 0, 1]) == [5, 0, 3]
    assert share_out(1, [2]) == [1]


def test_members_of_other_hosts_are_called_by_them_too() -> None:
    world = World(2, agents=(1, 1))
    world.comes(1)
    assert [world.roster.name(number) for number in (0, 1)] == ["worker 0", "worker 1 on host 1 (b)"]


def test_the_death_of_the_server_starts_all_again() -> None:
    world = working(2, serving=True)
    world.lose(member(2))
    world.gone()
    assert [type(order) for order in world.orders] == [EndEpoch, NoteLoss, Start]


@pytest.mark.parametrize("serving", [False, True])
def test_restarts_are_counted_and_then_it_ends(serving: bool) -> None:
    world = working(2, restarts=2, serving=serving)
    for _ in range(3):
        world.build()
        world.lose(world.present()[1], "worker 1 (pid 7) was killed by SIGKILL.")
        if world.ending:
            world.gone()
    error = error_of(world)
    assert type(error) is WorkerError
    assert error.message == (
        "worker 1 (pid 7) was killed by SIGKILL; the team has started again 2 times, as often as team.restarts allows."
    )
    assert error.detail == "last words"
    assert world.roster.restarts == 2
    assert isinstance(world.orders[-2], NoteLoss), "the tape tells of the last one too"


def test_deaths_of_workers_and_of_the_server_count_alike() -> None:
    world = working(2, restarts=2, serving=True)
    world.lose(member(0))
    world.lose(member(2))
    world.gone()
    assert world.roster.restarts == 2
    world.lose(member(1, epoch=2))
    world.gone()
    assert isinstance(world.final, FailRun)


def test_one_death_that_is_noticed_twice_is_one() -> None:
    world = working(2, restarts=1, serving=True)
    world.lose(member(1), "it died.")
    world.tell(Lost(member(1), "it does not answer."))
    assert world.roster.restarts == 1
    assert len(world.orders) == 1


def test_a_host_that_comes_anew_while_the_team_of_a_lost_server_ends_starts_nothing_there_until_all_start() -> None:
    world = World(2, serving=True, agents=(1, 1))
    world.comes(1)
    world.build()
    world.lose(member(2))
    world.comes(1)
    assert world.orders[-1] == EndEpoch(1)
    world.gone()
    assert isinstance(world.orders[-1], Start)


def test_a_first_write_goes_back_without_being_counted() -> None:
    world = working(2, restarts=0)
    world.writes(member(1), ("b",))
    world.gone(("a",))
    warned, start = world.orders[1:]
    assert isinstance(warned, Warn)
    assert warned.why.startswith("a forward wrote parameter 'a' and 1 more for the first time in step 3; the team goes")
    assert start == Start(2, (member(0, epoch=2), member(1, epoch=2)), looked=True)
    assert world.roster.written == {"a", "b"}
    assert world.roster.restarts == 0


def test_a_write_that_was_known_ends_the_run() -> None:
    """Or it would begin again for ever."""
    world = working()
    world.roster.written.add("a")
    world.writes(member(0), ("a",))
    world.gone()
    assert "which was known to be written; this is a fault of Instep" in error_of(world).message


@pytest.mark.parametrize(("unlooked", "known"), [(True, ()), (True, ("a",)), (False, ())])
def test_what_is_first_written_after_a_stop_sends_the_team_back(unlooked: bool, known: tuple[str, ...]) -> None:
    world = World(1, unlooked=unlooked)
    world.roster.hear(Resumed(1, known, unlooked))
    world.ready(member(0), written=["a"])
    assert world.orders[-1] == (EndEpoch(1) if unlooked and not known else Go(1, (member(0),)))
    assert isinstance(world.orders[-1], Go) or world.roster.written == set(), "it is known when the team is gone"


@pytest.mark.parametrize(("name", "more"), [("weights", ""), ("data", ", and each sample on its index besides")])
def test_who_starts_from_something_else_is_named(name: str, more: str) -> None:
    world = World(3)
    alike = {"weights": 1, "data": 1}
    world.ready(member(0), **alike)
    world.ready(member(1), **{**alike, name: 2})
    world.ready(member(2), **alike, of_its_own=3)
    assert error_of(world).message == (
        f"worker 1 starts from other {name} than worker 0 (2 instead of 1); what builds them must depend on its "
        f"arguments and the seed alone{more}."
    )


def test_who_has_other_source_files_is_named_before_what_they_make_different() -> None:
    world = World(2)
    world.ready(member(0), data=1, sources={"module a": "1", "module b": "1", "module c": "1"})
    world.ready(member(1), data=2, sources={"module a": "1", "module c": "2", "module d": "1"})
    assert error_of(world).message == (
        "worker 1 has another module c than worker 0, and the result would be that of neither; give all hosts the same "
        "files, and read from the environment what is to differ."
    )


def test_who_drifts_apart_is_named() -> None:
    world = working(3)
    for number in (0, 1, 2):
        world.says(member(number), Digest(4, "same"))
    for number in (2, 1):
        world.says(member(number), Digest(5, f"of {number}"))
    assert "worker 1 has other weights than worker 2 at version 5, which lockstep" in error_of(world).message


def test_the_final_weights_must_be_alike_too() -> None:
    world = working(2)
    world.end(member(1), "other")
    assert world.final is None
    world.end(member(0))
    assert "worker 1 has other weights than worker 0 at version 7, which lockstep" in error_of(world).message


def test_a_run_in_lockstep_has_ended_with_its_last_worker() -> None:
    world = working(2)
    world.end(member(1))
    world.lose(member(1))
    assert world.orders == []
    world.end(member(0))
    assert world.orders == [FinishRun(member(0))]


def test_a_run_under_the_server_has_ended_with_the_server() -> None:
    world = working(2, serving=True)
    world.end(member(2))
    assert world.orders == [FinishRun(member(2))]


def test_an_error_in_lockstep_ends_the_run() -> None:
    world = working(2)
    world.raises(member(1), DataError("no sample"))
    assert error_of(world).message == "no sample"
    assert not isinstance(world.orders[0], NoteLoss)


@pytest.mark.parametrize("then", ["saved", "lost", "raised"])
def test_an_error_of_a_worker_is_told_once_the_server_has_saved_whatever_else_befalls(then: str) -> None:
    world = working(3, restarts=0, serving=True)
    world.raises(member(1), DataError("no sample.", detail="a traceback"))
    world.lose(member(0))
    world.raises(member(2), DataError("another"))
    assert world.orders == [StopServer(member(3), 1)]
    if then == "saved":
        world.says(member(3), StoppedAt(1200))
    elif then == "lost":
        world.lose(member(3))
    else:
        world.raises(member(3), DataError("the server's own"))
    error = error_of(world)
    saved = "no sample; version 1,200 is saved: run can be resumed from it."
    assert (type(error), error.message, error.detail) == (
        DataError, saved if then == "saved" else "no sample.", "a traceback",
    )  # fmt: skip


def test_a_new_start_knows_nothing_of_an_error_of_before() -> None:
    world = working(2, serving=True)
    world.raises(member(1))
    world.writes(member(2), ("a",))
    world.gone()
    world.build()
    world.lose(member(0, epoch=2))
    assert isinstance(world.orders[-1], Replace)


def test_weights_are_compared_within_an_epoch_alone() -> None:
    world = working(2)
    world.says(member(1), Digest(4, "of a faulty machine"))
    world.lose(member(0))
    world.gone()
    world.build()
    for number in (0, 1):
        world.says(member(number, epoch=2), Digest(4, "same"))
    assert world.final is None


def test_an_error_while_the_team_is_built_is_told_at_once() -> None:
    world = World(2, serving=True)
    world.raises(member(1))
    assert isinstance(world.final, FailRun)


def test_a_stop_before_the_team_goes_ends_the_run_at_once() -> None:
    world = World(2)
    world.ready(member(0))
    world.stop()
    assert world.orders[1:] == [CancelRun()]


def test_a_stop_is_asked_for_once_and_the_run_ends_with_its_result() -> None:
    world = working(2)
    world.stop()
    world.stop()
    assert world.orders == [AskToStop(1)]
    world.run_out()
    assert isinstance(world.final, FinishRun)


@pytest.mark.parametrize("serving", [False, True])
def test_another_number_of_workers_has_the_team_save_and_start_anew_which_is_no_restart(serving: bool) -> None:
    world = working(2, serving=serving)
    world.resize(3)
    world.resize(4)
    assert world.orders == [AskToPause(1)]
    for one in world.living():
        world.end(one)
    assert world.orders[1:] == [EndEpoch(1)]
    world.gone()
    assert [len(order.members) for order in world.orders if isinstance(order, Start)] == [4 + serving]
    assert (world.roster.restarts, world.roster.leader.number) == (0, 4 * serving)
    world.run_out()
    assert isinstance(world.final, FinishRun)


def test_another_number_of_workers_before_the_team_goes_starts_so_many_at_once() -> None:
    world = World(2)
    world.resize(3)
    assert world.orders[1:] == [EndEpoch(1)]
    world.gone()
    assert len(world.living()) == 3


def test_a_run_that_ends_before_its_team_is_changed_has_ended() -> None:
    world = working(2)
    for one in world.living():
        world.stage[one] = "done"
        world.says(one, Ended({"version": 7}, "same"))
        if world.final is None:
            world.resize(3)
    assert isinstance(world.final, FinishRun)


def test_a_stop_goes_before_another_number_of_workers() -> None:
    world = working(2)
    world.resize(3)
    world.stop()
    assert world.orders == [AskToPause(1), AskToStop(1)]
    world.run_out()
    assert isinstance(world.final, FinishRun)


def test_a_death_while_a_team_is_to_change_is_a_restart_with_the_new_number() -> None:
    world = working(2)
    world.resize(3)
    world.lose(member(1))
    world.gone()
    assert (world.roster.restarts, len(world.living())) == (1, 3)


def test_a_stop_that_one_of_its_own_asked_for_is_known_to_the_team() -> None:
    """Its processor time is used up, say."""
    world = World(2)
    world.stop(within=True)
    assert [type(order) for order in world.orders] == [Start]
    world.build()
    world.stop()
    assert [type(order) for order in world.orders[1:]] == [Go]


@pytest.mark.parametrize("serving", [False, True])
def test_a_second_stop_does_not_wait(serving: bool) -> None:
    world = working(2, serving=serving)
    world.stop()
    world.stop(at_once=True)
    assert world.orders[1:] == [CancelRun()]


@pytest.mark.parametrize("within", [False, True])
def test_a_death_while_a_stop_is_awaited_starts_nothing_anew(within: bool) -> None:
    world = working(2)
    world.stop(within=within)
    world.lose(member(1), "it died.")
    world.gone()
    assert world.orders[-3:] == [EndEpoch(1), NoteLoss(member(1), "it died."), CancelRun()]
    assert world.roster.restarts == 0


@pytest.mark.parametrize("saved", [False, True])
def test_a_stopping_team_that_loses_another_host_ends_with_its_leader(saved: bool) -> None:
    world = World(3, restarts=0, agents=(1, 1))
    world.comes(1)
    world.build()
    world.orders.clear()
    world.stop()
    leader, *others = world.present()
    if saved:
        world.end(leader)
    world.loses(1)
    lost = [Replace(each, None, "host 1 (b) is lost.") for each in others]
    assert world.orders == [AskToStop(1), *lost, *([FinishRun(leader)] if saved else [])]
    assert world.roster.bereft != saved
    world.run_out()
    assert world.final == FinishRun(leader)


def test_who_is_lost_after_the_leader_of_a_stopping_team_has_ended_is_done_without() -> None:
    world = working(3, restarts=0)
    world.stop()
    world.end(member(0))
    world.lose(member(2), "it died.")
    world.end(member(1))
    assert world.orders[1:] == [Replace(member(2), None, "it died."), FinishRun(member(0))]


def test_a_stopping_team_that_loses_its_leader_ends_at_once() -> None:
    world = World(2, agents=(1, 1))
    world.comes(1)
    world.build()
    world.stop()
    world.lose(world.present()[0], "it died.")
    world.gone()
    assert isinstance(world.final, CancelRun)


def test_a_stop_while_all_wait_for_a_successor_on_the_first_host_comes_once_it_is_there() -> None:
    world = World(2, restarts=1, agents=(1, 1), regroups=True)
    world.comes(1)
    world.build()
    lost, other = world.present()
    world.lose(lost, "it died.")
    world.stop()
    (successor,) = world.living("building")
    world.ready(successor, **world.facts)
    assert world.group is not None
    assert world.group.members == (successor, other)
    world.run_out()
    assert isinstance(world.final, FinishRun)


def test_a_successor_that_is_lost_while_a_stopping_team_ends_is_taken_out_once() -> None:
    world = World(3, restarts=1, agents=(1, 1), regroups=True)
    world.comes(1)
    world.build()
    first, second, lost = world.present()
    world.lose(lost, "it died.")
    world.stop()
    (successor,) = world.living("building")
    world.end(first)
    world.lose(successor)
    world.end(second)
    assert isinstance(world.final, FinishRun)
    assert [order.member for order in world.orders if isinstance(order, Replace)] == [lost, successor]


def test_who_is_ready_when_one_of_its_team_has_ended_is_in_no_group() -> None:
    world = World(3, restarts=1, agents=(1, 1), regroups=True)
    world.comes(1)
    world.build()
    first, second, lost = world.present()
    world.lose(lost, "it died.")
    group = world.group
    world.end(second)
    world.build()
    assert world.group is group
    world.end(first)
    assert isinstance(world.final, FinishRun)


def test_a_stop_while_the_team_of_before_is_ended_starts_nothing_anew() -> None:
    world = working(2)
    world.writes(member(1), ("a",))
    world.stop()
    world.gone()
    assert world.orders == [EndEpoch(1), CancelRun()]


def test_a_worker_of_the_server_that_dies_while_a_stop_is_awaited_has_no_successor() -> None:
    world = working(2, restarts=0, serving=True)
    world.stop()
    world.lose(member(0), "it died.")
    assert world.orders[1:] == [Replace(member(0), None, "it died.")]
    world.run_out()
    assert isinstance(world.final, FinishRun)


# ----------------------------------------------------------------------- a number of workers that follows what is there


def following(least: int, most: int, hosts: int = 2, *, serving: bool = False) -> World:
    """A team in the midst of training, on host 0 with room for 2; host 1 has room for 1 and host 2 for 2."""
    world = World(agents=(1,) * hosts, restarts=0, bounds=Bounds(least, most), serving=serving)
    world.waits_long()
    world.build()
    assert len(world.present()) == 2 + serving
    world.orders.clear()
    return world


def numbers_on_hosts(world: World) -> list[int]:
    return [each.host for each in world.present()]


def test_a_host_that_comes_is_taken_in_after_the_present_step_and_one_that_goes_is_no_restart() -> None:
    world = following(1, 8)
    world.comes(1)
    assert world.orders == [NoteResize(3, 2, "host 1 (b), which has come"), AskToPause(1)]
    for each in world.present():
        world.end(each)
    world.gone()
    assert numbers_on_hosts(world) == [0, 0, 1]
    world.build()
    world.loses(1)
    world.gone()
    assert numbers_on_hosts(world) == [0, 0]
    assert NoteResize(2, 3, "hosts that have come or gone") in world.orders
    assert world.roster.restarts == 0


def test_no_more_workers_start_than_the_most_and_hosts_have_nearly_equal_parts() -> None:
    world = following(1, 3, hosts=3)
    for host in (1, 2):
        world.comes(host)
        for each in world.present():
            world.end(each)
        world.gone()
        world.build()
    assert numbers_on_hosts(world) == [0, 1, 2]
    assert world.roster.hosts.wanted == 3


@pytest.mark.parametrize("serving", [False, True])
def test_a_team_that_is_too_small_waits_for_hosts_and_goes_on_with_who_comes(serving: bool) -> None:
    world = World(agents=(1, 1, 1), restarts=0, bounds=Bounds(3, 8), serving=serving)
    world.waits_long()
    assert world.roster.hosts.awaited == [1, 2], "any of whom makes room enough"
    world.comes(2)
    world.build()
    assert numbers_on_hosts(world)[: 4 + serving] == [0, 0, 2, 2] + [0] * serving
    world.loses(2)
    world.gone()
    assert world.roster.hosts.awaited == [1, 2]
    world.comes(1)
    assert len(world.present()) == 3 + serving
    assert world.roster.restarts == 0


def test_bounds_that_all_hosts_together_cannot_keep_are_one_sentence() -> None:
    world = World(agents=(1, 1), restarts=0, bounds=Bounds(4, 8))
    world.comes(1)
    assert str(error_of(world)) == (
        "'team.bounds' asks for at least 4 workers, and all 2 hosts together have room for 3; lower the least, give a "
        "number of workers, or take more hosts."
    )


def test_a_number_that_somebody_asks_for_ends_the_following() -> None:
    world = following(1, 8)
    world.resize(1)
    for each in world.present():
        world.end(each)
    world.gone()
    world.build()
    world.comes(1)
    assert AskToPause(2) not in world.orders
    assert not [order for order in world.orders if isinstance(order, NoteResize)]


# ------------------------------------------------------------------------------------ a team that has grown beyond room


def grown(*, serving: bool = False) -> World:
    """A team of 2 that has trained, and has started anew with 4."""
    world = working(2, restarts=0, serving=serving)
    world.does_a_step()
    world.resize(4)
    if serving:
        world.end(world.roster.leader)
    else:
        for each in world.present():
            world.end(each)
    world.gone()
    assert len(world.present()) == 4 + serving
    world.orders.clear()
    return world


WAYS = ["lost", "lost later", "raised", "no room"]


@pytest.mark.parametrize("serving", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_a_team_that_cannot_grow_goes_on_as_it_was(way: str, serving: bool) -> None:
    world = grown(serving=serving)
    if way == "lost later":
        world.build()
        world.orders.clear()
    if way.startswith("lost"):
        world.lose(member(3, epoch=2), "it was killed.")
    elif way == "raised":
        world.raises(member(3, epoch=2), WorkerError("it was killed."))
    else:
        world.tell(CannotStart(ResourceError("it was killed.")))
    world.gone()
    warned, noted, ended, start = world.orders
    assert warned == Warn("the team cannot have 4 workers, and goes on with 2: it was killed.")
    assert (noted, ended) == (NoteResize(2, 4, "it was killed."), EndEpoch(2))
    assert isinstance(start, Start)
    assert len(start.members) == 2 + serving
    assert world.roster.restarts == 0, "which nobody counts"
    world.build()
    world.lose(member(0, epoch=3))
    assert not [order for order in world.orders[5:] if isinstance(order, NoteResize)], "it was as large before"


def test_a_team_that_has_done_a_step_with_more_is_not_taken_back() -> None:
    world = grown()
    world.build()
    world.does_a_step()
    world.orders.clear()
    world.lose(member(3, epoch=2))
    assert world.orders == [EndEpoch(2)]


def test_what_cannot_start_at_first_ends_the_run() -> None:
    world = World(2)
    world.tell(CannotStart(ResourceError("there is no memory.")))
    assert str(error_of(world)) == "there is no memory."


def cut_off() -> tuple[World, Member, Member]:
    """A team of two hosts with a worker each, the second of which is cut off for longer than it may; both workers."""
    world = World(2, restarts=1, agents=(1, 1), regroups=True)
    world.comes(1)
    world.build()
    one, other = world.present()
    world.orders.clear()
    world.loses(1, may_return=True)
    left = Replace(other, None, "host 1 (b) is lost.")
    assert world.orders == [left, Regroup(1, 1, (one,), at_once=True)], "nobody comes in its place"
    assert world.roster.restarts == 0
    world.orders.clear()
    return world, one, other


def test_who_was_cut_off_takes_part_again_after_the_present_step() -> None:
    world, one, other = cut_off()
    world.returns(1)
    assert world.orders == [Regroup(1, 2, (one, other), at_once=False)]
    assert world.roster.restarts == 0
    world.orders.clear()
    world.saves()
    assert world.orders == [], "there is no newcomer for whom the team would start anew"
    world.is_given_up(1)
    assert world.orders == [], "it is there"


@pytest.mark.parametrize("anew", [False, True])
def test_who_was_cut_off_and_does_not_come_back_has_a_successor_elsewhere_and_counts(anew: bool) -> None:
    world, _, other = cut_off()
    if anew:
        world.comes(1)
    else:
        world.is_given_up(1)
    (order,) = world.orders
    assert isinstance(order, Replace)
    assert (order.member, order.told) == (other, True)
    assert order.successor == Member(1, 1, 1, host=0)
    assert world.roster.restarts == 1


def test_a_run_ends_without_who_is_cut_off() -> None:
    world, one, _ = cut_off()
    world.end(one)
    assert world.final == FinishRun(one)
    assert [order.told for order in world.orders if isinstance(order, Replace)] == [True], "the tape has it already"


def test_a_host_that_is_back_in_time_has_all_in_another_group_at_once_but_not_where_the_run_ends() -> None:
    world = World(2, agents=(1, 1), regroups=True)
    world.is_back(1)
    world.comes(1)
    world.build()
    world.orders.clear()
    world.is_back(1)
    assert world.orders == [Regroup(1, 1, tuple(world.present()), at_once=True)]
    world.orders.clear()
    world.stop()
    world.orders.clear()
    world.is_back(1)
    assert world.orders == []


def test_a_host_without_workers_that_is_back_stands_for_others_that_are_back_with_it() -> None:
    world = World(2, agents=(1, 1, 1), regroups=True)
    world.comes(1)
    world.comes(2)
    world.build()
    assert {member.host for member in world.present()} == {0, 1}
    world.orders.clear()
    world.is_back(2)
    assert world.orders == [Regroup(1, 1, tuple(world.present()), at_once=True)]
