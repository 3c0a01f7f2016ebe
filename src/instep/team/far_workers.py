"""A server's end of its conversations with workers of other hosts; a thread of its process moves the bytes.

A conversation is with one process. Who comes in its place has another one, and what is still on its way of the old one
is for nobody: so nothing is merged twice, whatever becomes of links and hosts.
"""

from __future__ import annotations

import dataclasses
import functools
import socket
import threading
import time
from collections.abc import Collection, Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from instep.errors import NonFiniteError, described
from instep.reduce.layout import Layout, Pack
from instep.team.host_weights import HostPlaces, shared_by_hosts
from instep.team.letters import (
    Begin,
    Bell,
    Contributed,
    FromWorker,
    Inbox,
    LetterPart,
    Order,
    Outbox,
    Shape,
    Standing,
    TellLost,
    ToldLost,
    WeightsAgain,
    fitting,
)
from instep.team.link import AgentLink, Listener
from instep.team.messages import (
    Assignment,
    Compute,
    Hello,
    HostNetwork,
    NoMore,
    Pushed,
    ServerToWorker,
    WorkerToServer,
)
from instep.team.waiting import ready_of
from instep.team.wire_messages import WireError
from instep.worker.contribution import Facts, Vectors
from instep.worker.updates import Merger
from instep.worker.wire import vector_bytes, write_delta

LOOK_S = 1.0
"""Seconds between two looks at who has come without saying who it is."""

STANDING_S = 5.0
"""Seconds that a new connection has to say whose it is."""

PARTS = 16
"""Parts of letters that one link gets before the others have their turn."""


class FarWorkers:
    """Those workers of a server that are on other hosts. vectors, slots: of all workers, as in `server_memory`."""

    def __init__(self, network: HostNetwork, merger: Merger, vectors: Sequence[Vectors], slots: Sequence[Tensor]):
        assert network.listener is not None, "the server has one"
        self._vectors, self._slots, self._way_down = vectors, slots, merger.way_down
        self._pack: Pack = merger.pack
        self._layout: Layout = merger.layout
        self._fragments, self._parameters = merger.fragments, merger.replica.parameters
        self._wire = merger.rule.wire if merger.rule.narrow else ""
        self._narrow: dict[int, Tensor] = {}  # what has come of a delta, by worker
        self._narrow_bytes = vector_bytes(merger.rule.wire, self._parameters, range(len(self._parameters)))
        self._has: dict[int, int] = {}  # the version that a worker has
        self._sends: dict[int, range] = {}  # the fragment of which it sends a contribution, by worker
        self._told: dict[int, int] = {}  # of which contribution it has told what was lost
        self._slot_of: dict[int, int] = {}  # from which slot it computes now
        self._places: dict[int, HostPlaces] = {}  # of its host, where the workers of one share weights
        if shared_by_hosts(merger.rule):
            for host, count in enumerate(network.workers[1:], 1):
                first, places = sum(network.workers[:host]), HostPlaces(count)
                self._places.update(dict.fromkeys(range(first, first + count), places))
        workers = range(network.workers[0], sum(network.workers))
        listener = Listener(socket.socket(fileno=network.listener), network.key, union=FromWorker)
        self._conversations = _Conversations(listener, workers, self._place)

    def fileno(self) -> int:
        """A descriptor that is ready to read once somebody has sent something."""
        return self._conversations.came.fileno()

    def receive(self) -> list[tuple[int, WorkerToServer]]:
        """What has come, of which worker. Raises what the thread has raised."""
        found = [(worker, self._message(worker, message)) for worker, message in self._conversations.receive()]
        for worker, message in found:
            if isinstance(message, Pushed):
                self._slot_of.pop(worker, None)
        return found

    def send(self, worker: int, message: ServerToWorker) -> None:
        """Sends it, with the weights that it needs; nothing where another process has the worker's place."""
        if isinstance(message, NoMore):
            self._conversations.send_all(message)
            return
        weights, tensors = self._weights_for(worker, message)
        place = fill = 0
        if worker in self._places and weights == "whole":
            beside = self._beside(worker, message.version)
            place, fill = self._places[worker].give(worker, beside)
            weights, tensors = (weights, tensors) if beside is None else ("beside", [])
        lost = self._vectors[worker].lost
        with_lost = worker not in self._has and lost.numel() > 0
        if with_lost:
            tensors.append(lost.numpy().copy())
        self._has[worker], self._slot_of[worker] = message.version, message.slot
        self._sends[worker] = self._fragments.of_round(message.version)
        where = weights, place, fill
        of = message.incarnation, message.piece, message.off, message.version, message.scale
        order = Order(*of, *where, with_lost)
        self._conversations.send(worker, message.incarnation, order, tensors)

    def _beside(self, worker: int, version: int) -> int | None:
        """Another worker of its host that has this version, or will."""
        places = self._places[worker]
        others = (other for other, has in self._has.items() if has == version and self._places.get(other) is places)
        return next(others, None)

    def _weights_for(self, worker: int, message: Compute) -> tuple[str, list[NDArray[Any]]]:
        """What a worker takes to have the weights of its slot."""
        slot, way_down = self._slots[message.slot], self._way_down
        if self._has.get(worker) == message.version and (way_down is None or way_down.common):
            return "same", []
        had, parts, beside = self._has.get(worker), len(self._fragments.all), self._pack.beside(slot).numpy()
        if had is None or (parts > 1 and had != message.version - 1):
            return "whole", [slot.numpy()]
        if way_down is not None and way_down.message is not None:
            return "narrow", [way_down.message.numpy(), beside]
        if parts == 1:
            return "whole", [slot.numpy()]
        return "part", [self._pack.part(slot, self._fragments.of_round(message.version - 1)).numpy(), beside]

    def ask_lost(self, worker: int, version: int) -> None:
        """Asks for what the wire had lost with the contribution from weights of this version."""
        self._told.pop(worker, None)
        self._conversations.send(worker, None, TellLost(version), [])

    def told_lost(self, worker: int, version: int) -> bool:
        """Whether it has come, and lies where the worker's contributions do."""
        for message in self._conversations.told(worker):
            self._told[worker] = message.version
        return self._told.get(worker) == version

    def left(self, worker: int) -> None:
        """The worker's process is gone: nothing of it counts any more."""
        self._has.pop(worker, None)
        self._slot_of.pop(worker, None)
        self._conversations.left(worker)
        if worker in self._places:
            place, fill, waiting = self._places[worker].left(worker)
            for other in waiting:
                if (slot := self._slot_of.get(other)) is not None:
                    self._conversations.send(other, None, WeightsAgain(place, fill), [self._slots[slot].numpy()])

    def _place(self, worker: int, message: Any, shapes: Sequence[Shape]) -> list[Any]:
        """Where the tensors of what a worker sends are to lie."""
        if isinstance(message, Hello):
            return fitting(shapes, [])
        vectors = self._vectors[worker]
        if isinstance(message, ToldLost):
            return fitting(shapes, [vectors.lost.numpy()])
        fragment = self._sends.get(worker)
        if (
            fragment is None
            or not isinstance(message, Contributed)
            or not 0 < len(message.nodes) <= len(vectors.gradient)
        ):
            raise WireError(f"worker {worker} has sent what no worker sends")
        rows = slice(len(message.nodes))
        gradient = vectors.gradient[rows, self._layout.part(fragment)[0]]
        if self._wire:
            # The same memory after a break, when the letter goes on in the middle.
            whole = self._narrow.setdefault(worker, torch.empty(self._narrow_bytes, dtype=torch.uint8))
            gradient = whole[: vector_bytes(self._wire, self._parameters, fragment)]
        parts = (gradient, vectors.buffers[rows], vectors.integers, vectors.written)
        return fitting(shapes, [part.numpy() for part in parts])

    def _message(self, worker: int, message: Hello | Contributed) -> WorkerToServer:
        if isinstance(message, Hello):
            return message
        fragment, row = self._sends[worker], self._vectors[worker].gradient[0]
        if len(self._fragments.all) > 1:  # of those that came before nothing is left
            place, _ = self._layout.part(fragment)
            row[: place.start].zero_()
            row[place.stop :].zero_()
        if self._wire:
            write_delta(self._narrow[worker], self._wire, self._layout, row, fragment)
        told = {each.name: getattr(message, each.name) for each in dataclasses.fields(Facts)}
        facts = Facts(**{**told, "bad": tuple(NonFiniteError(why) for why in message.bad)})
        verified = dict(message.verified)
        return Pushed(message.incarnation, facts, message.from_s, message.to_s, verified, message.ahead)


class _Conversation:
    """With one process, over all its connections."""

    def __init__(self, worker: int, incarnation: int, inbox: Inbox):
        self.worker, self.incarnation, self.inbox, self.outbox = worker, incarnation, inbox, Outbox()
        self.link: AgentLink | None = None


class _Conversations:
    """All of them, by worker. What the process's other threads call is short."""

    def __init__(self, listener: Listener, workers: Collection[int], place: Any):
        self._listener, self._workers, self._place = listener, workers, place
        self.came, self._bell = Bell(), Bell()
        self._lock = threading.Lock()
        self._of: dict[int, _Conversation] = {}
        self._least = dict.fromkeys(workers, 0)  # the incarnation that may come next
        self._unknown: dict[AgentLink, float] = {}  # connections that have not said whose they are, and until when
        self._over: list[AgentLink] = []  # to be closed
        self._letters: list[tuple[int, Any]] = []  # that have come, not yet received
        self._error: BaseException | None = None
        self._no_more: Any = None  # what whoever comes now is sent
        self._busy = False
        self._thread = threading.Thread(target=self._run, name="letters", daemon=True)
        self._thread.start()

    # For the others

    def receive(self) -> list[tuple[int, Any]]:
        """The letters that have come whole. Raises what the thread has raised."""
        with self._lock:
            self.came.silence()
            if self._error is not None:
                raise self._error
            found = [(worker, each) for worker, each in self._letters if not isinstance(each, ToldLost)]
            self._letters = [(worker, each) for worker, each in self._letters if isinstance(each, ToldLost)]
            return found

    def told(self, worker: int) -> list[ToldLost]:
        """What a worker has told beside its contributions, since it was asked for last."""
        with self._lock:
            found = [each for number, each in self._letters if number == worker and isinstance(each, ToldLost)]
            self._letters = [(n, each) for n, each in self._letters if n != worker or not isinstance(each, ToldLost)]
            return found

    def send(self, worker: int, incarnation: int | None, message: Any, tensors: Sequence[NDArray[Any]]) -> None:
        """A letter to this process, by default the present one; nothing where it is another one's place."""
        with self._lock:
            one = self._of.get(worker)
            if one is not None and incarnation in (None, one.incarnation):
                one.outbox.put(message, tensors)
        self._bell.ring()

    def send_all(self, message: Any) -> None:
        """The last letter, to all, those too who come late."""
        with self._lock:
            if self._no_more is None:
                self._no_more = message
                for one in self._of.values():
                    one.outbox.put(message)
        self._bell.ring()

    def left(self, worker: int) -> None:
        """The process is gone."""
        with self._lock:
            self._least[worker] += 1
            if (one := self._of.get(worker)) is not None and one.incarnation < self._least[worker]:
                self._drop(one)
                del self._of[worker]
                self._letters = [(number, each) for number, each in self._letters if number != worker]
        self._bell.ring()

    # The thread's

    def _run(self) -> None:
        try:
            while True:
                self._look()
        except BaseException as error:
            with self._lock:
                self._error = error
            self.came.ring()

    def _look(self) -> None:
        with self._lock:
            links = [one.link for one in self._of.values() if one.link is not None]
            for link in self._over:
                link.close()
            self._over.clear()
        everybody = [*self._unknown, *links]
        senders = [link for link in everybody if link.wants_write]
        sources = [self._bell, *self._listener.sources(), *everybody]
        ready = ready_of(sources, senders, 0.0 if self._busy else LOOK_S)
        self._bell.silence()
        now = time.monotonic()
        for link in self._listener.accept():
            self._unknown[link] = now + STANDING_S
        with self._lock:
            for link, until in list(self._unknown.items()):
                self._hear_unknown(link, late=now >= until)
            for one in self._of.values():
                if one.link in ready:
                    self._read(one)
            more = [self._pump(one) for one in self._of.values()]
            self._busy = any(more)

    def _hear_unknown(self, link: AgentLink, *, late: bool) -> None:
        try:
            found = next(iter(link.receive()), None)
            if found is None and not late:
                return
            if not isinstance(found, Standing) or found.worker not in self._workers:
                raise WireError("it has not said which worker it is")
            if found.incarnation < self._least[found.worker]:
                raise WireError(f"worker {found.worker} was replaced")
            self._let_in(link, found)
        except (EOFError, OSError) as error:
            link.close()
            print(f"a connection came to nothing: {described(error)}", flush=True)
        del self._unknown[link]

    def _let_in(self, link: AgentLink, theirs: Standing) -> None:
        worker, one = theirs.worker, self._of.get(theirs.worker)
        if one is None or one.incarnation < theirs.incarnation:
            if one is not None:
                self._drop(one)
            inbox = Inbox(lambda message, shapes: self._place(worker, message, shapes))
            one = self._of[worker] = _Conversation(worker, theirs.incarnation, inbox)
            if self._no_more is not None:
                one.outbox.put(self._no_more)
        elif one.incarnation > theirs.incarnation:
            raise WireError(f"worker {worker} was replaced")
        self._drop(one)
        one.outbox.go_on(theirs.whole, theirs.offset)
        one.link = link
        link.send(Standing(worker, one.incarnation, one.inbox.whole, one.inbox.offset))

    def _read(self, one: _Conversation) -> None:
        assert one.link is not None
        try:
            for message in one.link.receive():
                if not isinstance(message, Begin | LetterPart):
                    raise WireError("it has said twice which worker it is")
                if isinstance(message, Begin):
                    one.outbox.heard(message.got)
                if (letter := one.inbox.take(message)) is not None:
                    self._letters.append((one.worker, letter))
                    self.came.ring()
        except (EOFError, OSError) as error:
            print(f"the connection of worker {one.worker} has ended: {described(error)}", flush=True)
            self._drop(one)

    def _pump(self, one: _Conversation) -> bool:
        """Sends what the link takes; whether it may take more at once."""
        try:
            for _ in range(PARTS):
                if one.link is None or one.link.wants_write:
                    return False
                if (message := one.outbox.next(one.inbox.whole)) is None:
                    return False
                one.link.send(message)
        except OSError:
            self._drop(one)
            return False
        return True

    def _drop(self, one: _Conversation) -> None:
        """Its connection has ended; another may come."""
        if one.link is not None:
            self._over.append(one.link)
            one.link = None


def far_workers_of(assignment: Assignment) -> Any:
    """What makes the server's end to workers of other hosts; None without such."""
    return functools.partial(FarWorkers, assignment.network) if assignment.network is not None else None
