"""Agent 0's side of a run's other agents: lets them in, compares what they are to agree on, knows who is awaited."""

from __future__ import annotations

import contextlib
import os
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from typing import Any

from msgspec import UNSET, UnsetType

from instep.descendants import orphaned
from instep.errors import InstepError, ResourceError, WorkerError
from instep.record.events import Event
from instep.record.folder import RunFolder
from instep.record.team import BytesOfHost, HostInTeam
from instep.team import meeting
from instep.team.agents_by_host import AgentsByHost
from instep.team.alike import Alike
from instep.team.carried import Carried
from instep.team.farewell import say_farewell
from instep.team.hello import hello_of
from instep.team.journal import ClientGone
from instep.team.letters import key_of_server
from instep.team.link import AgentLink, Listener
from instep.team.meeting import SAY_S
from instep.team.messages import Cancelled, Failed, Finished, Request, StopRun
from instep.team.orders import HostCame, Member, RosterEvent, StopAsked
from instep.team.place import Place
from instep.team.remote import RemoteCrew, Silence
from instep.team.returns import Returns
from instep.team.signals import Interrupted
from instep.team.taking_up import TakingUp
from instep.team.wire_messages import (
    AskRun,
    Beat,
    HelloAgain,
    HelloAgent,
    NotComing,
    RunGiven,
    Welcome,
    WelcomeAgain,
)
from instep.transport.meter import METER

HELLO_S = 5.0
"""Seconds that an agent has to say who it is, once it has shown that it knows the secret."""

GATHER_S = 10.0
"""Seconds after which a team whose size follows what is there starts without who has not come, if there are enough."""

ASIDE_LEASES = 6
"""Times `team.lease_s` that a host is left out which another one does not reach."""


class Hosts:
    """Those of one run. Raises ResourceError where the address cannot be had.

    taking_up: what they have kept of it. note: is told what is for the tape. own_bytes: tells what this host has sent
    to others and received from them.
    """

    def __init__(
        self,
        run: Request,
        folder: RunFolder,
        run_id: str | None,
        taking_up: TakingUp,
        note: Callable[[Event], None],
        own_bytes: Callable[[], tuple[int, int]] = METER.look,
    ):
        assert run.place is not None, "there are several agents"
        self._run, self._folder, self._run_id, self._own_bytes = run, folder, run_id, own_bytes
        self._taking_up = taking_up
        self._place: Place = run.place
        secret = meeting.draw_secret(self._place, os.environ)
        self.server_key = key_of_server(secret)
        """By which a server and workers elsewhere know each other."""
        self.address = meeting.own_address(self._place, run.team.interface)
        try:
            self._listener = Listener((self.address, self._place.port), secret)
        except OSError as error:
            raise ResourceError(
                f"agent 0 cannot listen at {self.address}, port {self._place.port}: {error.strerror}; another program "
                f"may use it: end that, or name another port by INSTEP_PORT."
            ) from error
        self._listener.knows = self._is_agents
        meeting.publish(self._place, self._listener.address, secret)
        self._own = hello_of(run, self.address)
        self.crews: list[RemoteCrew] = []
        """Of the hosts that are there."""
        self._standby: dict[int, tuple[AgentLink, HelloAgent]] = {}  # agents without workers, by number
        self._unknown: dict[AgentLink, Silence] = {}  # that have not said who they are
        self._session: dict[int, str] = {}  # the present one of each agent
        self._replaced: set[str] = set()
        self._told_of: dict[int, HelloAgent] = {}  # of each host that the roster knows to be there
        self.alike = Alike(self._own, mixed_processors=run.team.mixed_processors)
        """What the others must have in common with agent 0."""
        self._returns = Returns(note, run.team.give_up_s)
        self._agents = AgentsByHost(self._place)
        self._carried = Carried(self._place.hosts)
        self._aside: dict[int, float] = {}  # hosts that take no part, and until when
        self._not_coming: list[str] = []  # of agents that could not come back, what is still to be said
        self._parent = os.getppid()
        self._began = self._said = time.monotonic()

    def __enter__(self) -> Hosts:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """All other agents are told of what has ended the run."""
        where = f"as agent 0 says on host 0 ({self._own.name})"
        if isinstance(error, InstepError):
            self.tell(Failed(type(error).__name__, f"the run failed, {where}."))
        elif isinstance(error, Interrupted):
            self.tell(Cancelled())
        elif isinstance(error, ClientGone) and not orphaned(self._parent):  # else the run may be taken up again
            self.tell(Failed("WorkerError", f"the run was ended at once, {where}."))
        for each in self.opened:
            each.close()
        meeting.withdraw(self._place)

    def let_go(self) -> None:
        """Agent 0 ends without a word: the others are to take it for lost, and their workers keep what they hold."""
        for crew in self.crews:
            crew.set_aside("agent 0 ends.")

    def _clock(self) -> float:
        return time.monotonic() - self._run.began

    def described(self, members: Collection[Member]) -> list[HostInTeam]:
        """What the tape tells of the hosts that these members are on."""
        known = {0: (self._own, 0.0)} | {c.hello.host: (c.hello, c.clock_error_s) for c in self.crews}
        counts = Counter(member.host for member in members)
        return [
            {
                "host": host, "name": hello.name, "workers": counts[host], "clock_error_s": round(error_s, 6),
                "hardware": hello.hardware.table(),
            }
            for host, (hello, error_s) in sorted(known.items())
        ]  # fmt: skip

    def wire_bytes(self) -> list[BytesOfHost] | UnsetType:
        """What each host has sent to and received from others, as far as is known."""
        return self._carried.by_host(self._own_bytes()) if METER.counts else UNSET

    @property
    def opened(self) -> list[Any]:
        """All that is open here for them."""
        return [self._listener, *self._unknown, *self._standing_by, *(crew.link for crew in self.crews)]

    @property
    def _standing_by(self) -> list[AgentLink]:
        return [link for link, _ in self._standby.values()]

    def sources(self) -> list[Any]:
        """What to wait for; those of the crews come beside."""
        return [*self._listener.sources(), *self._unknown, *self._standing_by]

    def senders(self) -> list[Any]:
        """What has something to send."""
        links = [*self._unknown, *self._standing_by, *(crew.link for crew in self.crews if crew.lost is None)]
        return [link for link in links if link.wants_write]

    def hear(self, ready: Collection[Any], *, begun: bool) -> Iterator[RosterEvent]:
        """Lets in who comes. Raises the run's error where one differs who must not, before the run has `begun`."""
        link: AgentLink
        for link in self._listener.accept():
            self._unknown[link] = Silence()
        for link, silence in list(self._unknown.items()):
            yield from self._hear_unknown(link, silence, begun)
        for agent, (link, hello) in list(self._standby.items()):
            if link in ready:
                try:
                    for message in link.receive():
                        if isinstance(message, StopRun):
                            yield StopAsked()
                        elif isinstance(message, Beat):
                            self._carried.told(hello.host, hello.session, message)
                            link.send(Beat(message.seq, message.sent_s, self._clock()))
                except (EOFError, OSError):
                    self._standby.pop(agent)[0].close()
        self._leave_out_who_is_lost()
        if self._taking_up.ended():
            for host in range(self._place.hosts):
                yield from self._complete(host)
        for host in [host for host, until in self._aside.items() if time.monotonic() >= until]:
            del self._aside[host]
            yield from self._complete(host)
        yield from self._returns.look(self.crews)
        yield from self._returns.given_up()

    def _hear_unknown(self, link: AgentLink, silence: Silence, begun: bool) -> Iterator[RosterEvent]:
        hello: Any = None
        try:
            messages = link.receive()
            if not messages and silence.look() < HELLO_S:
                return
            hello = next(iter(messages), None)
            if isinstance(hello, AskRun):
                link.send(RunGiven(self._run.recipe_file, self._run.import_paths))
                return  # it is sent as the link takes it, and the other end closes it
        except (EOFError, OSError):
            pass
        if isinstance(hello, HelloAgain):
            del self._unknown[link]
            yield from self._go_on(link, hello)
            return
        if isinstance(hello, NotComing):
            self._hear_not_coming(hello, begun)
        if not isinstance(hello, HelloAgent):
            del self._unknown[link]
            link.close()
            return
        refused = self._refused(hello)
        if refused is None and (different := self.alike.different(hello)) is not None:
            if not begun:
                self._session[hello.agent] = hello.session
                raise different  # the agent that differs hears of the run's end as the others do
            refused = different
        del self._unknown[link]
        if refused is not None:
            with contextlib.suppress(OSError):
                link.send(Failed.of(refused))
                link.flush()
            link.close()
            return
        yield from self._let_in(link, hello)

    def _hear_not_coming(self, word: NotComing, begun: bool) -> None:
        """Raises the error of an agent that failed before it came, unless the run has begun without it."""
        if not self._agents.can_be(word.agent, word.host):
            return
        who = f"host {word.host} ({word.name}), agent {word.agent}"
        if begun:
            self._not_coming.append(f"{who}, has failed before it could come back: {word.sentence}")
            return
        self._session.setdefault(word.agent, "")  # nobody need wait for it at the end
        raise type(Failed(word.kind, "").error())(f"{who}: {word.sentence}", detail=word.detail)

    def _let_in(self, link: AgentLink, hello: HelloAgent) -> Iterator[RosterEvent]:
        before = self._session.get(hello.agent)
        if before is not None and before != hello.session:
            self._replaced.add(before)
        self._session[hello.agent] = hello.session
        link.keep()
        link.send(Welcome(self._run_id, self._clock(), self._own.name))
        if hello.local:
            if (old := self._standby.pop(hello.agent, None)) is not None:
                old[0].close()
            self._standby[hello.agent] = link, hello
        else:
            for crew in [each for each in self.crews if each.hello.agent == hello.agent]:
                crew.link.close()
                self.crews.remove(crew)
            self._returns.forget(hello.agent)
            self.crews.append(self._crew(link, hello))
            self._taking_up.offer(self.crews[-1])
        yield from self._complete(hello.host)

    def _leave_out_who_is_lost(self) -> None:
        for crew in [crew for crew in self.crews if crew.lost is not None and crew.told_of_loss]:
            self.crews.remove(crew)
            if crew.lost is not None and crew.lost.may_return:
                self._told_of.pop(crew.hello.host, None)
                self._returns.leave(crew)

    def _go_on(self, link: AgentLink, again: HelloAgain) -> Iterator[RosterEvent]:
        """An agent that was cut off is back. It hears of it, if it is not known any more."""
        self._leave_out_who_is_lost()
        crew = next((each for each in self.crews if each.hello.agent == again.agent and each.lost is None), None)
        standby = self._standby.get(again.agent, (None,))[0]
        known = self._session.get(again.agent) == again.session
        lost = self._returns.come(again) if known and crew is None else None
        before = next((each.link for each in (crew, lost) if each is not None), standby)
        try:
            if before is None or not known:
                link.send(WelcomeAgain(0, known=False))
                link.flush()
                link.close()
                return
            if lost is None and not before.can_go_on(again.came):  # it was long on its way, and another was faster
                link.close()
                return
            link.send(WelcomeAgain(before.came))
            if crew is not None:
                crew.go_on(link, again.came, again.away_s)
            elif lost is not None:
                lost.return_(link, again)
                self.crews.append(lost)
                yield from self._complete(lost.hello.host)
            else:
                before.go_on(link, again.came)
        except OSError:
            link.close()

    def _crew(self, link: AgentLink, hello: HelloAgent) -> RemoteCrew:
        lease_s, given = self._run.team.lease_s, self._taking_up.hear
        return RemoteCrew(link, hello, self._folder, self._clock, lease_s, self._carried, given)

    def _complete(self, host: int) -> Iterator[RosterEvent]:
        """Tells that a host is there, if all its agents are and it may take part."""
        hellos = [crew.hello for crew in self.crews if crew.hello.host == host and crew.lost is None]
        hello = next(iter(hellos), self._own if host == 0 else None)
        if hello is None or self._missing(host) or host in self._aside or self._told_of.get(host) is hello:
            return  # one of its agents without workers may come and go
        if self._taking_up.busy:
            return  # told of once what it has kept is here
        self._told_of[host] = hello
        back = [crew for crew in self.crews if crew.hello is hello and crew.members_back]
        members = tuple(member for crew in back for member in crew.members_back)
        yield HostCame(host, hello.name, hello.here, hello.room, members)
        for crew in back:
            crew.end_who_is_back()

    def at(self, address: str) -> int | None:
        """The host that has this address, as far as is known."""
        if address == self.address:
            return 0
        return next((crew.hello.host for crew in self.crews if crew.hello.address == address), None)

    def _is_agents(self, address: str) -> bool:
        """Whether another agent was there when it was heard of last."""
        there = [*(crew.hello for crew in self.crews), *(hello for _, hello in self._standby.values())]
        return any(hello.address == address for hello in (*there, *self._returns.hellos))

    def silent(self, host: int | None) -> bool:
        """Whether a sign of life of its agent is overdue."""
        return any(crew.silent for crew in self.crews if crew.hello.host == host)

    def set_aside(self, one: int, host: int, *, why: str) -> None:
        """Has `host`, which the other one does not reach, take no part for a while."""
        aside_s = ASIDE_LEASES * self._run.team.lease_s
        names = {crew.hello.host: crew.name for crew in self.crews}
        self._aside[host] = time.monotonic() + aside_s
        self._told_of.pop(host, None)
        for crew in self.crews:
            if crew.hello.host == host:
                crew.set_aside(
                    f"{names.get(one)} and {names[host]} do not reach each other, though both reach agent 0 ({why}); "
                    f"{names[host]} is left out for {aside_s:g} s."
                )

    def _refused(self, hello: HelloAgent) -> InstepError | None:
        """Why it is none of this run's agents, if so."""
        if not self._agents.learn(hello):
            return WorkerError(f"agent {hello.agent} of host {hello.host} is none of this run's; end it.")
        if hello.session in self._replaced:
            return WorkerError(f"agent {hello.agent} was started again while this one was away; it ends.")
        return None

    def _missing(self, host: int) -> list[int]:
        """The agents of a host, agent 0 aside, that are not there."""
        here = {0, *self._standby, *(crew.hello.agent for crew in self.crews if crew.lost is None)}
        return [agent for agent in self._agents.of(host) or () if agent not in here]

    @property
    def long_awaited(self) -> bool:
        """Whether some are, who have had time to come."""
        return time.monotonic() - self._began >= GATHER_S

    def awaiting(self, hosts: Collection[int]) -> str:
        """A line on who of these `hosts` is awaited, every `SAY_S`, or cannot come; "" else. WorkerError in the end."""
        if self._not_coming:
            return self._not_coming.pop(0)
        now, limit = time.monotonic(), self._run.team.join_timeout_s
        if not hosts or self._taking_up.busy:
            self._began = self._said = now
            return ""
        missing = [f"{agent} (host {host})" for host in sorted(hosts) for agent in self._missing(host)]
        unknown = [str(host) for host in sorted(hosts) if self._agents.of(host) is None]
        awaited = [(f"agent{'s' * (len(missing) > 1)} ", missing), (f"host{'s' * (len(unknown) > 1)} ", unknown)]
        who = " and ".join(what + ", ".join(each) for what, each in awaited if each) or "hosts that are left out"
        if now - self._began >= limit:
            raise WorkerError(
                f"no word came within {limit:g} s from {who}; look there for an error and whether {self.address} can "
                f"be reached, start the run again, or raise team.join_timeout_s."
            )
        if now - self._said < SAY_S:
            return ""
        self._said = now
        refused = f"; {self._listener.refused} strangers were turned away" if self._listener.refused else ""
        return f"agent 0, at {self.address}, has waited {now - self._began:.0f} s for {who}{refused}."

    def tell(self, message: Finished | Failed | Cancelled) -> None:
        """Tells all that the run has ended, those too who come only now, and waits a while for them to end."""
        crews = {crew.link: crew for crew in self.crews if crew.sources()}
        awaited = set(range(1, self._place.agents)) - set(self._session)
        awaited |= {hello.agent for hello in self._returns.hellos}
        say_farewell(message, self._listener, crews, [*self._standing_by, *self._unknown], awaited)
