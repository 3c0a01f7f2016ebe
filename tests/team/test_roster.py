"""The roster: what it promises holds in any history of a team, and each death, stop and error means what it should."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instep.errors import DataError, InstepError, WorkerError
from instep.team.messages import Digest, Ended, Failed, FoundWritten, Ready, StoppedAt
from instep.team.orders import (
    AskToStop,
    CancelRun,
    EndEpoch,
    EpochEnded,
    FailRun,
    FinishRun,
    Go,
    Join,
    Lost,
    Member,
    NoteLoss,
    Order,
    Replace,
    Resumed,
    RosterEvent,
    Said,
    Start,
    StopAsked,
    StopServer,
    Warn,
)
from instep.team.roster import Roster

pytestmark = pytest.mark.pure

NAMES = ("a", "b", "c")
FINAL = (FinishRun, FailRun, CancelRun)


class World:
    """Processes that obey a roster, and what happens to them. Every promise is looked at with every order and event.

    `stage`: of all that were ever started: building, ready, working, done; "lost" once the roster knows of it, and
    "dead" if it was ended. `said`: what a process has told the roster so far.
    """

    def __init__(self, workers: int = 2, restarts: int = 1, *, serving: bool = False, unlooked: bool = False):
        self.roster = Roster(workers, restarts, Path("run"), serving=serving)
        self.allowed, self.serving, self.unlooked = restarts, serving, unlooked
        self.stage: dict[Member, str] = {}
        self.said: list[RosterEvent] = []
        self.orders: list[Order] = []
        self.epochs: list[int] = []
        self.ending: RosterEvent | None = None  # what the roster heard when it had an epoch ended, until that is gone
        self.last: RosterEvent | None = None
        self.final: Order | None = None
        self.stopping = self.server_told = False
        self.counted = 0
        self.losses: list[Member] = []  # which must be told of
        self.obey(self.roster.begin())

    # What is ordered

    def obey(self, orders: list[Order]) -> None:
        for order in orders:
            assert self.final is None, f"{order} came after {self.final}"
            self.orders.append(order)
            self.obey_one(order)
        assert self.roster.over == (self.final is not None)
        assert self.roster.restarts == self.counted <= self.allowed, "each restart is counted once"
        if self.final is None and self.ending is None:
            active = self.roster.active
            assert set(active) <= set(self.living()), "it waits for the dead"
            assert active, "it waits for nobody"
            assert self.roster.going or any(self.stage[member] == "building" for member in active), "all wait for all"

    def obey_one(self, order: Order) -> None:
        match order:
            case Start():
                assert not self.stopping, "nothing starts after a stop"
                assert not self.living(), "the team of before is not gone"
                assert order.epoch == self.roster.epoch > max(self.epochs, default=0)
                assert {member.epoch for member in order.members} == {order.epoch}
                assert [member.number for member in order.members] == list(range(len(order.members)))
                self.counted += isinstance(self.ending, Lost)
                self.ending, self.server_told = None, False
                self.epochs.append(order.epoch)
                self.stage.update(dict.fromkeys(order.members, "building"))
                self.roster.hear(Resumed(order.epoch, (), self.unlooked and not order.looked))
            case Go(members=members):
                self.go(members)
                assert set(members) == set(self.present()), "all begin together"
            case Join(member=member):
                assert "working" in map(self.stage.get, self.present()), "there is nobody to join"
                self.go((member,))
            case Replace(member=old, successor=new):
                assert self.serving, "in lockstep nobody goes on alone"
                assert self.roster.going
                assert self.stage[old] == "lost"
                self.stage[old] = "dead"
                assert old != self.roster.leader
                if new is not None:
                    assert not self.stopping, "nothing starts after a stop"
                    assert new == Member(old.epoch, old.number, old.incarnation + 1)
                    assert new not in self.stage
                    self.stage[new] = "building"
                    self.counted += 1
            case AskToStop(epoch=epoch):
                assert epoch == self.roster.epoch
                assert self.roster.going
                assert self.orders.count(order) == 1, "asked twice"
            case StopServer(server=server):
                assert self.stage[server] == "working"
                assert not self.server_told
                self.server_told = True
            case EndEpoch(epoch=epoch):
                assert epoch == self.roster.epoch
                assert self.ending is None
                self.ending = self.last
            case NoteLoss(member=member):
                assert self.stage[member] in ("lost", "dead")
                assert [type(o) for o in self.orders if getattr(o, "member", None) == member].count(NoteLoss) == 1
            case FinishRun(leader=leader):
                assert self.stage[leader] == "done"
                self.final = order
            case FailRun() | CancelRun():
                self.final = order

    def go(self, members: tuple[Member, ...]) -> None:
        for member in members:
            assert self.stage[member] == "ready", f"{member} was let go, but is {self.stage[member]}"
            self.stage[member] = "working"

    # What happens

    def tell(self, event: RosterEvent) -> None:
        self.said.append(event)
        self.last = event
        self.obey(self.roster.hear(event))

    def says(self, member: Member, message: Any) -> None:
        self.tell(Said(member, message))

    def present(self) -> list[Member]:
        """The newest process in each place."""
        found = {member.number: member for member in sorted(self.stage) if member.epoch == self.roster.epoch}
        return list(found.values())

    def living(self, *stages: str) -> list[Member]:
        return [m for m, stage in self.stage.items() if stage in (stages or ("building", "ready", "working"))]

    def gone(self, written: tuple[str, ...] = ()) -> None:
        self.stage.update({m: "dead" for m, stage in self.stage.items() if stage != "lost"})
        self.tell(EpochEnded(self.roster.epoch, written))

    def ready(self, member: Member, **facts: Any) -> None:
        self.stage[member] = "ready"
        self.says(member, Ready(facts, {}))

    def end(self, member: Member, digest: str = "same") -> None:
        self.stage[member] = "done"
        self.says(member, Ended({"version": 7}, digest))

    def lose(self, member: Member, why: str = "it was killed.") -> None:
        self.stage[member] = "lost"
        if not self.server_told:
            self.losses.append(member)
        self.tell(Lost(member, why, "last words"))

    def raises(self, member: Member, error: InstepError | None = None) -> None:
        self.stage[member] = "done"
        self.says(member, Failed.of(error or DataError("no sample")))

    def writes(self, member: Member, names: tuple[str, ...]) -> None:
        self.stage[member] = "done"
        self.says(member, FoundWritten(names, "step 3"))

    def stop(self, *, at_once: bool = False, within: bool = False) -> None:
        self.stopping = True
        self.tell(StopAsked(at_once, within))

    def hear_old(self, event: RosterEvent) -> None:
        """Something that was said before comes again, of a process that is not waited for any more, or an epoch that is
        past: nothing changes.
        """
        member = getattr(event, "member", None)
        if member is not None and (self.ending or member not in self.roster.active):
            pass
        elif not isinstance(event, EpochEnded | Resumed) or (event.epoch == self.roster.epoch and self.final is None):
            return
        before = self.state()
        assert self.roster.hear(event) == []
        assert self.state() == before, f"{event}, which is old, has changed something"

    def state(self) -> dict[str, Any]:
        return {name: sorted(it) if isinstance(it, set) else repr(it) for name, it in vars(self.roster).items()}

    def happens(self, kind: str, pick: int) -> None:
        """One of many things, to one of those to whom it can happen; nothing where there is nobody."""
        if kind == "old":
            past = self.roster.epoch - 1
            for event in (*self.said[pick % 5 :: 5], EpochEnded(past, ("old",)), Resumed(past, ("old",), True)):
                self.hear_old(event)
            return
        if self.final is not None:
            return
        match kind, self.ending is not None:
            case "gone", True:
                self.gone(NAMES[pick % 3 : pick % 2])
            case "stop", _:
                self.stop(at_once=pick % 5 == 0, within=pick % 5 == 1)
            case _, True:
                return
        stages = {
            "build": ("building",),
            "ready": ("building",),
            "end": ("working",),
            "digest": ("working",),
            "drift": ("working",),
        }
        able = self.living(*stages.get(kind, ()))
        if self.final is not None or self.ending is not None or not able:
            return
        member = able[pick % len(able)]
        match kind:
            case "build":
                self.build()
            case "ready":
                self.ready(member, weights="alike", written=NAMES[: pick % 2])
            case "end":
                self.end(member)
            case "digest" | "drift":
                if not self.serving:
                    self.says(member, Digest(pick, "same" if kind == "digest" else f"of {member}"))
            case "lose":
                self.lose(member)
            case "raise":
                self.raises(member)
            case "write":
                self.writes(member, (NAMES[pick % 3],))

    def build(self) -> None:
        """All who are not ready are."""
        for each in self.living("building"):
            if self.final is None and self.ending is None:
                self.ready(each, weights="alike")

    def run_out(self) -> None:
        """Nothing more befalls the team: it must come to its end."""
        for _ in range(200):
            if self.final is not None:
                return
            working = self.living("working")
            if self.ending is not None:
                self.gone()
            elif self.living("building"):
                self.build()
            elif self.server_told:
                self.says(self.roster.leader, StoppedAt(5))
            else:
                self.end(self.roster.leader if self.serving else working[0])
        raise AssertionError(f"no end came: {self.orders[-10:]}")


KINDS = (
    "build", "build", "build", "ready", "end", "lose", "lose", "raise", "write", "digest", "drift", "stop", "gone",
    "gone", "old",
)  # fmt: skip
HISTORIES = st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 29)), max_size=60)
WORLDS = st.builds(World, st.integers(1, 4), st.integers(0, 3), serving=st.booleans(), unlooked=st.booleans())


def keeps_every_promise(world: World, history: list[tuple[str, int]]) -> None:
    """Every start ends, orders name only who is there, nobody waits for the dead, restarts are counted once, a stop
    starts nothing, and the old changes nothing: see `World`."""
    for kind, pick in history:
        world.happens(kind, pick)
    world.run_out()
    assert [type(order) for order in world.orders if isinstance(order, FINAL)] == [type(world.final)]
    told = [order.member for order in world.orders if isinstance(order, NoteLoss | Replace)]
    cut_short = isinstance(world.final, CancelRun) and isinstance(world.ending, Lost) and told != world.losses
    assert told == world.losses[: len(world.losses) - cut_short], "each death is told of once"
    ended = [order.epoch for order in world.orders if isinstance(order, EndEpoch)]
    assert ended + [world.roster.epoch] * (world.roster.epoch not in ended) == world.epochs, "every epoch ends once"
    for event in world.said:
        world.hear_old(event)


IN_ANY_HISTORY = given(WORLDS, HISTORIES)
test_every_promise_holds_in_any_history = settings(max_examples=250)(IN_ANY_HISTORY(keeps_every_promise))
test_every_promise_holds_in_many_histories = pytest.mark.slow(
    settings(max_examples=5000)(IN_ANY_HISTORY(keeps_every_promise))
)


def test_random_histories_come_everywhere() -> None:
    """Or the test above would test nothing."""
    seen = set()

    @settings(max_examples=500, database=None)
    @given(WORLDS, HISTORIES)
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


def working(workers: int = 2, restarts: int = 1, *, serving: bool = False) -> World:
    """A team in the midst of training; orders of before are forgotten."""
    world = World(workers, restarts, serving=serving)
    for member in world.living():
        world.ready(member, weights="alike", data="these")
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


def test_a_death_before_the_team_goes_starts_all_of_it_again_under_the_server_too() -> None:
    world = World(2, serving=True)
    world.ready(member(0))
    world.lose(member(0))
    assert world.orders[1:] == [EndEpoch(1)]


def test_a_worker_of_the_server_is_replaced_and_joins_alone() -> None:
    world = working(2, serving=True)
    world.lose(member(1), "worker 1 was killed.")
    world.ready(member(1, 1), weights="others by now")
    assert world.orders == [Replace(member(1), member(1, 1), "worker 1 was killed."), Join(member(1, 1))]
    assert world.roster.restarts == 1


def test_members_are_called_by_what_they_do() -> None:
    assert [Roster(2, 0, Path("run"), serving=True).name(n) for n in range(3)] == ["worker 0", "worker 1", "the server"]
    assert Roster(3, 0, Path("run"), serving=False).name(2) == "worker 2"


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
