"""The first agent: forks the workers, watches them, writes the tape, and does what the roster orders.

Users know it as the supervisor of the run. It imports torch once, before it forks, so that a team starts in a moment.
It runs none of the user's code, has one thread, and ends with its client: no process of a run outlives another.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, assert_never

from msgspec import UNSET

from instep.descendants import adopting_orphans, children, orphaned
from instep.errors import InstepError, ResourceError
from instep.record import best, checkpoint
from instep.record.event_kinds import ResizedEvent
from instep.record.events import FailedEvent, LeftEvent, MergedByServerEvent, MergedEvent
from instep.record.files import write_atomically
from instep.record.folder import RunFolder
from instep.record.tape import Tape
from instep.team import messages, orders
from instep.team.answers import Answers, why_not
from instep.team.assigning import as_it_is, assignment_of, for_later, for_successor
from instep.team.channel import Channel
from instep.team.crew import LocalCrew
from instep.team.crews import Crew, Heard
from instep.team.hosts import Hosts
from instep.team.hosts_there import hosts_of, most_in_step
from instep.team.journal import ClientGone, Journal
from instep.team.network import network_of
from instep.team.orders import Member
from instep.team.outcome import cause_of, check_steps, end_of, result_of, saved_amid, start_of
from instep.team.parted import Parted
from instep.team.regroup_messages import PeersLost, Regrouped
from instep.team.remembered import KeptCopies
from instep.team.roster import Roster
from instep.team.signals import Interrupted, Requests
from instep.team.taking_up import TakingUp
from instep.team.waiting import ready_of

PATIENCE_S = 1.0
"""Seconds to wait for the lock of the run folder: the workers of a run that was killed hold it a moment longer."""

LOOK_S = 0.2
"""Seconds between two looks at the workers."""


class Agent:
    """One run, over all starts of its team."""

    def __init__(self, run: messages.Request, client: Channel, requests: Requests | None = None):
        self._run, self._client, self._requests = run, client, requests or Requests()
        self._folder, self._parent, self._looked = RunFolder(run.folder), os.getppid(), 0.0
        self._hosts: Hosts | None = None  # where there are other agents
        self._taking_up: TakingUp | None = None
        self._parted, self._listening = Parted(), contextlib.ExitStack()  # to who looks for others in this epoch
        serving, team = run.engine == "server", run.team
        self.roster = Roster(hosts_of(run), team.restarts, run.folder, serving=serving)
        others, name = children(), self.roster.name  # not this run's: none, unless a program supervises by itself
        self._local = LocalCrew(
            team, others, self._unused, serving=serving, name=name, folder=self._folder, began=lambda: run.began,
            most=most_in_step(run), copies=lambda: self._copies.of_one(run),
        )  # fmt: skip
        self._network: messages.HostNetwork | None = None  # of this epoch
        self._facts: Mapping[str, Any] = {}  # what the team of this epoch starts from
        self._ended: dict[int, messages.Ended] = {}
        self._resume_from: Path | None = None
        self._found: list[str] = []  # parameters that processes told of at their end
        self._result: dict[str, Any] | None = None

    def supervise(self) -> dict[str, Any]:
        """Trains to the end, with restarts. Returns the result. Raises InstepError, Interrupted or ClientGone."""
        run = self._run
        with (
            adopting_orphans(),
            self._folder.locked(PATIENCE_S) as self._held,
            Tape(self._folder.tape_path, append=True) as tape,
            KeptCopies() as self._copies,
        ):
            self._journal = Journal(self._folder, tape, self._client, run.began)
            answers = self._answers = Answers(
                lambda: time.monotonic() - run.began, lambda: self._crews, lambda: self.roster.restarts,
                self._journal.tell, self._resize, serving=run.engine == "server",
            )  # fmt: skip
            self._journal.note = answers.note
            try:
                self._journal.read(audits=bool(run.team.audit))
                self._about = self._folder.about()
                best.versions(self._folder.checkpoints)  # a damaged one is told of now, not in the midst of training
                self._resume_from = self._journal.newest_checkpoint(resumed=self._run.resumed)
                check_steps(self._run, self._resume_from)
                with answers.listening(self._held.descriptor):
                    return self._train() if self._run.place is None else self._train_with_others()
            except InstepError as error:
                why = cause_of(error, self._held)
                self._journal.record(FailedEvent(why=why.message))
                raise why from error.__cause__

    def _train_with_others(self) -> dict[str, Any]:
        """As `_train`; all other agents are told how it ended."""
        kept = self._taking_up = TakingUp(self._run, self._folder, self._journal, self._run_id, self._resume_from)
        own = self._journal.record, self._local.carried
        with Hosts(self._run, self._folder, self._run_id, kept, *own) as self._hosts:
            self._journal.wire_bytes = self._hosts.wire_bytes
            result = self._train()
            self._hosts.tell(messages.Finished(result))
            return result

    @property
    def met(self) -> bool:
        """Whether other agents have been let in, who are told of errors."""
        return self._hosts is not None

    def _train(self) -> dict[str, Any]:
        try:
            for order in self.roster.begin():
                self._obey(order)
            while self._result is None:
                self._listen()
            return self._result
        except ClientGone:
            if self._hosts is not None and orphaned(self._parent):  # the run may be taken up again
                self._hosts.let_go()
            raise
        finally:
            self._end()

    def _listen(self) -> None:
        """Waits until something happens, or it is time to look at the workers."""
        hosts, crews, answers = self._hosts, self._crews, self._answers
        sources: list[Any] = [self._client, *(source for crew in crews for source in crew.sources())]
        sources += [*answers.sources(), *(hosts.sources() if hosts is not None else ())]
        ready = ready_of(sources, [*answers.senders(), *(hosts.senders() if hosts is not None else ())], LOOK_S)
        if self._client in ready:
            self._hear_client()
        answers.hear(ready)
        if self._requests.end or self._requests.at_once:
            self._hear(orders.StopAsked(at_once=self._requests.at_once))
        for crew in crews:
            for heard in crew.hear(ready):
                self._hear_member(crew, heard)
                if self._result is not None:
                    return
        if hosts is not None:
            for event in hosts.hear(ready, begun=self.roster.epoch > 0):
                self._hear(event)
            if line := hosts.awaiting(self.roster.hosts.awaited):
                self._journal.say(line)
            if hosts.long_awaited:
                self._hear(orders.LongAwaited())
        if time.monotonic() - self._looked >= LOOK_S:
            self._look()

    def _hear_client(self) -> None:
        try:
            message: messages.ClientToSupervisor = self._client.recv()
        except (EOFError, ConnectionResetError):
            raise ClientGone from None
        assert isinstance(message, messages.StopRun), f"during a run a client asks for its end alone, not {message}"
        self._hear(orders.StopAsked())

    def _hear_member(self, crew: Crew, heard: Heard | orders.RosterEvent) -> None:
        """What a process has sent, or what has happened to it."""
        if not isinstance(heard, Heard):
            return self._hear(heard)
        match heard.message:
            case messages.Events(events):
                self._journal.pass_on(events)
                if self.roster.unproved and any(isinstance(e, MergedEvent | MergedByServerEvent) for e in events):
                    self.roster.proved()
                if self._hosts is not None and any(saved_amid(event, self._run) for event in events):
                    self._hear(orders.Saved(heard.member.epoch))
                return
            case messages.Sync():
                self._journal.sync()
                return crew.send(heard.member, messages.Synced())
            case messages.Ready(facts) if heard.member == self.roster.leader:
                self._facts = facts
            case messages.Ended():
                self._ended[heard.member.number] = heard.message
                self._parted.saves = self._parted.saves and heard.member != self.roster.leader
            case messages.FoundWrong():
                found = self._journal.refuted(heard.message, heard.member.epoch)
                return self._hear(orders.Said(heard.member, found))
            case Regrouped():
                self._copies.begun(len(self.roster.numbers))
            case messages.EndedFor(worker, ended):
                self._ended[worker] = ended
            case PeersLost():
                return self._parted.note(heard.member, heard.message)
            case messages.KeepingState():
                return self._parted.keeps(heard.member)
            case messages.StateKept():
                return  # which only an agent that follows asks for
        self._hear(orders.Said(heard.member, heard.message))

    def _look(self) -> None:
        """What no message tells."""
        self._looked = time.monotonic()
        self._held.check()
        if os.getppid() != self._parent:  # whoever it was that held the client's end of the pipe open
            raise ClientGone
        lost: orders.RosterEvent | None
        if self._hosts is not None and (lost := self._parted.look(self.roster, self._hosts)) is not None:
            self._hear(lost)
        for crew in self._crews:
            if (lost := crew.look()) is not None and self._result is None:
                self._hear(lost)
        self._answers.look()

    @property
    def _crews(self) -> list[Crew]:
        """Those of all hosts that are there, this one first."""
        return [self._local, *(self._hosts.crews if self._hosts is not None else ())]

    def _crew_of(self, member: Member) -> list[Crew]:
        """That of the member's host; none where that is lost."""
        if member.host == 0:
            return [self._local]
        crews = self._hosts.crews if self._hosts is not None else []
        return [crew for crew in crews if crew.hello.host == member.host and crew.lost is None]

    def _unused(self) -> list[Any]:
        """What is open here that no worker needs."""
        return [self._client, *self._answers.opened, *(self._hosts.opened if self._hosts is not None else ())]

    def _hear(self, event: orders.RosterEvent) -> None:
        """Tells the roster, and does what it orders."""
        waiting = deque([event])
        if self._local.stop_wanted():
            waiting.appendleft(orders.StopAsked(within=True))
        while waiting:
            for order in self.roster.hear(waiting.popleft()):
                try:
                    waiting.extend(self._obey(order))
                except ResourceError as error:
                    if self.roster.over:
                        raise
                    waiting.append(orders.CannotStart(error))

    def _resize(self, workers: int, by: str) -> tuple[int, str]:
        """Has the team go on with so many workers, as somebody asks. How many it was to have, and why not, if so."""
        run, before = self._run, self.roster.hosts.wanted
        why = why_not(run.rule, run.recipe_table["microbatches"], run.team, workers)
        why = "the run is about to end, as it was asked to." if self._local.stop_wanted() else why
        if not why and workers != before:
            self._journal.record(ResizedEvent(workers=workers, before=before, by_whom=by))
        if not why and (workers != before or self.roster.hosts.waiting):
            self._hear(orders.Resize(workers))
        elif not why:
            self.roster.hosts.fix(workers)  # it may have followed what is there
        return before, why

    def _obey(self, order: orders.Order) -> list[orders.RosterEvent]:
        """Does it. Returns what the roster is to know of it. Raises the run's error, or Interrupted."""
        match order:
            case orders.Start():
                self._start(order)
            case orders.Go():
                self._go(order)
            case orders.Join(member):
                for crew in self._crew_of(member):
                    crew.join(member)
            case orders.Replace():
                self._replace(order)
            case orders.HandOver(member, state):
                self._local.send(member, messages.SeatHanded(state))
            case orders.DropSuccessor(member):
                self._found += self._journal.pass_on_the_rest(self._local.take_out(member))
            case orders.Regroup():
                self._parted.clear(order.generation, at_once=order.at_once)
                for crew in self._crews:
                    crew.regroup(order, self._journal.merged, self._journal.saved)
            case orders.StartMore(members):
                self._start_more(members)
            case orders.AskToStop():
                self._local.ask_to_stop()
            case orders.AskToPause():
                self._local.ask_to_pause()
            case orders.StopServer(server):
                self._local.send(server, messages.StopRun())
            case orders.EndEpoch(epoch):
                self._end()
                return [orders.EpochEnded(epoch, tuple(self._found))]
            case orders.NoteResize(workers, before, by):
                self._journal.record(ResizedEvent(workers=workers, before=before, by_whom=by))
            case orders.NoteLoss(member, why):
                self._journal.record(LeftEvent(worker=member.number, why=why))
            case orders.Warn(why):
                self._journal.warn(why)
            case orders.FinishRun(leader):
                self._result = self._finish(leader)
            case orders.FailRun(error):
                raise error
            case orders.CancelRun():
                self._journal.tell_what_is_lost()
                raise Interrupted
            case _:
                assert_never(order)
        return []

    def _start(self, order: orders.Start) -> None:
        if order.looked:
            self._journal.remove_unlooked()
        if order.epoch > 1:
            self._resume_from = self._journal.newest_checkpoint(resumed=self._run.resumed)
        elif self._taking_up is not None:
            self._resume_from = self._taking_up.end() or self._resume_from
        self._held.check()
        meta = checkpoint.read_manifest(self._resume_from).meta if self._resume_from is not None else {}
        unlooked = self._copies.begin(self._run, order, self._resume_from) or bool(meta.get("unlooked"))
        self.roster.hear(orders.Resumed(order.epoch, tuple(meta.get("written", ())), unlooked))
        count = len(order.members) - (self._run.engine == "server")
        self._run = replace(self._run, team=replace(self._run.team, workers=count))
        self._answers.begin(count)
        self._ended.clear()
        self._parted.clear()
        self._looked = time.monotonic()
        workers, hosts, run = order.members[: self._run.team.workers], self._hosts, self._run
        address, key = (hosts.address, hosts.server_key) if hosts is not None else ("127.0.0.1", b"")
        network = network_of(workers, address, key, needed=run.team.by_nccl and run.engine == "lockstep")
        self._network = self._listening.enter_context(network)
        for crew in self._crews:
            crew.start(order.members, self._assignment())

    def _start_more(self, members: Sequence[Member]) -> None:
        """Starts workers beside those that go on."""
        assignment = self._assignment(late=True)
        for crew in self._crew_of(members[0]):
            if assignment.serving:
                crew.start(members, assignment)
                crew.prepare(self._facts)
            else:
                crew.add(members, for_later(assignment, self.roster.hosts.wanted))

    def _assignment(self, *, late: bool = False) -> messages.Assignment:
        own = self._resume_from, self._network, self._held.identity, self._run_id, self._copies.now
        return assignment_of(self._run, self.roster, *own, late=late)

    @property
    def _run_id(self) -> str | None:
        return self._about.id if self._about is not None else None

    def _go(self, order: orders.Go) -> None:
        """All workers have built the recipe, which is the run's from here on: gives them memory, lets them start."""
        for crew in self._crews:
            crew.prepare(self._facts)
        if not (again := self._journal.started):  # a recipe that is refused leaves no trace
            write_atomically(self._folder.recipe_path, self._run.recipe_file.encode())
        resumed = self._journal.begun or again
        hosts = self._hosts.described(order.members[: self._run.team.workers]) if self._hosts is not None else None
        self._journal.record(start_of(self._run, self._run_id, self._facts, resumed=resumed, hosts=hosts))
        at_first = () if again else (*self._run.notices, *self._run.rule.warnings())
        for why in (*at_first, *(self._hosts.alike.warnings() if self._hosts is not None else ())):
            self._journal.warn(why)
        self._copies.begun(len(order.members))
        for crew in self._crews:
            crew.go()

    def _replace(self, order: orders.Replace) -> None:
        for crew in self._crew_of(order.member):
            self._found += self._journal.pass_on_the_rest(crew.take_out(order.member))
        self._journal.retold.expected |= self._run.engine == "lockstep"
        self._local.hold(order.holders, self._journal.merged)
        if self._run.engine == "server":
            self._local.send(self.roster.leader, messages.Left(order.member.number, order.why))
        elif not order.told:
            self._journal.record(LeftEvent(worker=order.member.number, why=order.why, resized=order.resized or UNSET))
        if (new := order.successor) is not None:
            own = self._assignment(late=(going := self.roster.going))
            for crew in self._crew_of(new):
                crew.succeed(new, for_successor(own) if going else own)

    def _end(self) -> None:
        """Ends what lives of the team, and reads the last words."""
        self._listening.close()
        for crew in self._crews:
            crew.end()
        for crew in self._crews:
            self._found += self._journal.pass_on_the_rest(told.message for told in crew.last_words())

    def _finish(self, leader: Member) -> dict[str, Any]:
        """Lets the workers leave, and writes the result."""
        for crew in self._crews:
            crew.leave()
        costs = [each.costs for _, each in sorted(self._ended.items()) if each.costs]
        counts = self.roster.restarts, self.roster.stood_in, self._journal.wire_bytes(), self._journal.wrong
        self._journal.note_past(self._ended[leader.number].left.get("audit"), self._run.team.workers)
        result = result_of(as_it_is(self._run, self.roster), self._facts, self._ended[leader.number], costs, *counts)
        self._held.check()
        self._folder.write_result(result)
        self._journal.record(end_of(result))
        return result
