"""A worker's end of its conversation with a server on another host; a thread of its process moves the bytes."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import queue
import threading
import time
from collections.abc import Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from instep.reduce.narrow import narrow_bytes
from instep.team.host_weights import SharedWeights, shared_by_hosts
from instep.team.letters import (
    Begin,
    Bell,
    Contributed,
    Inbox,
    LetterPart,
    Order,
    Outbox,
    Shape,
    Standing,
    TellLost,
    ToldLost,
    ToWorker,
    WeightsAgain,
    fitting,
)
from instep.team.link import AgentLink, connect
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
from instep.worker.contribution import Facts
from instep.worker.contributor import Contributor
from instep.worker.wire import apply_change, vector_bytes

TRY_S = 5.0
"""Seconds of a try to reach the server, and to hear from it."""

PAUSE_S = 0.2
"""Seconds between two tries."""

LOOK_S = 1.0

BESIDE_S = 0.001
"""Seconds between two looks at whether weights have come to another worker of the host."""

LEAVE_S = 5.0
"""Seconds that a process which ends in the middle takes to tell what the server may ask for."""


class FarServer:
    """What a worker has of it, see `instep.engines.lines.ToServer`. Connections may break: it makes others, and goes on
    trying until its own agent ends the process. descriptor: of memory that the host's workers share, so many as `here`.
    """

    def __init__(
        self,
        network: HostNetwork,
        worker: int,
        incarnation: int,
        descriptor: int,
        here: int,
        contributor: Contributor,
    ):
        self._network, self._worker, self._incarnation = network, worker, incarnation
        self._contributor = contributor
        self.vectors = contributor.empty()
        self._pack = contributor.pack
        rule = contributor.rule
        self._shared = SharedWeights(descriptor, here, self._pack.size_bytes) if shared_by_hosts(rule) else None
        self._weights = self._shared.rows[0] if self._shared is not None else self._pack.empty()
        self._awaited: tuple[int, int] | None = None  # place and fill of weights that come to another worker
        self._again: Tensor | None = None  # where they come, should that one be gone
        self._beside = torch.empty_like(self._pack.beside(self._weights))
        self._wire = rule.wire
        self._change = torch.empty(narrow_bytes(rule.wire, contributor.replica.size), dtype=torch.uint8)
        self._round = 0  # of the order that came last
        self._lost: dict[int, NDArray[Any]] = {}  # by the wire, with contributions from these versions, the last two
        self._inbox, self._outbox = Inbox(self._place), Outbox()
        self._came: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._link: AgentLink | None = None
        self._lock, self._bell = threading.Lock(), Bell()
        threading.Thread(target=self._run, name="letters", daemon=True).start()

    def weights(self, slot: int) -> Tensor:
        """Those of the order that came last ([pack.size_bytes] uint8)."""
        return self._weights

    def send(self, message: WorkerToServer) -> None:
        """Sends it: it goes while the next one is waited for."""
        if isinstance(message, Hello):
            self._put(message, [])
            return
        facts, vectors = message.facts, self.vectors
        rows, way_up = slice(len(facts.nodes)), self._contributor.way_up
        place, _ = self._contributor.layout.part(self._contributor.fragments.of_round(self._round))
        gradient = vectors.gradient[rows, place] if way_up is None else way_up.message
        parts = (gradient, vectors.buffers[rows], vectors.integers, vectors.written)
        if vectors.lost.numel():
            before = {version: lost for version, lost in self._lost.items() if version == max(self._lost)}
            self._lost = {**before, self._round: vectors.lost.numpy().copy()}
        self._put(_result(message), [part.cpu().numpy() for part in parts])

    def _put(self, message: Any, tensors: Sequence[NDArray[Any]]) -> None:
        with self._lock:
            self._outbox.put(message, tensors)
        self._bell.ring()

    def receive(self) -> ServerToWorker:
        """Waits for the next message. Raises what the thread has raised."""
        message = self._next()
        if isinstance(message, Order) and self._shared is not None and message.weights in ("whole", "beside"):
            while not self._shared.has(message.place, message.fill):
                with contextlib.suppress(queue.Empty):  # whoever waits has not answered: only the end may come
                    return self._message(self._next(BESIDE_S))
            with self._lock:  # nothing more is put there
                self._awaited = None
            self._weights = self._shared.rows[message.place]
        return self._message(message)

    def _next(self, within_s: float | None = None) -> Order | NoMore:
        """The next letter. Raises what the thread has raised, and queue.Empty where none comes in time."""
        message: Order | NoMore | BaseException = self._came.get(timeout=within_s)
        if isinstance(message, BaseException):
            raise message
        return message

    def leave(self) -> None:
        """The process ends in the middle: what the server may still ask it for goes first."""
        if self._lost:
            self._put(ToldLost(max(self._lost)), [self._lost[max(self._lost)]])
            until = time.monotonic() + LEAVE_S
            while time.monotonic() < until and not self._gone():
                time.sleep(0.01)

    def _gone(self) -> bool:
        with self._lock:
            return self._link is not None and self._outbox.sent and not self._link.wants_write

    # The thread's

    def _run(self) -> None:
        try:
            while True:
                try:
                    self._move()
                except (EOFError, OSError):
                    if self._link is not None:
                        self._link.close()
                        self._link = None
                    time.sleep(PAUSE_S)
        except BaseException as error:
            self._came.put(error)

    def _move(self) -> None:
        """Sends and receives what can be. Raises OSError or EOFError where the connection breaks."""
        link = self._link or self._connected()
        with self._lock:
            self._link = link
            while not link.wants_write and (message := self._outbox.next(self._inbox.whole)) is not None:
                link.send(message)
        within_s = 0.0 if link.holds else LOOK_S
        ready = ready_of([self._bell, link], [link] if link.wants_write else [], within_s)
        self._bell.silence()
        for message in link.receive() if link in ready or link.holds else ():
            if not isinstance(message, Begin | LetterPart):
                raise WireError("the server has said twice how it stands")
            with self._lock:
                if isinstance(message, Begin):
                    self._outbox.heard(message.got)
                letter = self._inbox.take(message)
                if isinstance(letter, TellLost):
                    self._outbox.put(ToldLost(letter.version), [self._lost[letter.version]])
                elif isinstance(letter, WeightsAgain):
                    self._put_again(letter)
                elif letter is not None:
                    self._note_weights(letter)
                    self._came.put(letter)

    def _note_weights(self, letter: Any) -> None:
        """What the host's workers are to know of weights that have come, or come to another one."""
        if self._shared is not None and isinstance(letter, Order):
            where = letter.place, letter.fill
            if letter.weights == "whole":
                self._shared.filled(*where)
            elif letter.weights == "beside":
                self._awaited = where

    def _put_again(self, letter: WeightsAgain) -> None:
        """Puts what has come to where it is awaited, unless another one has by now."""
        came, self._again = self._again, None
        shared, where = self._shared, (letter.place, letter.fill)
        if shared is not None and came is not None and self._awaited == where and not shared.has(*where):
            shared.rows[letter.place].copy_(came)
            shared.filled(*where)

    def _connected(self) -> AgentLink:
        link = connect(self._network.store, self._network.key, TRY_S, ToWorker)
        try:
            own = Standing(self._worker, self._incarnation, self._inbox.whole, self._inbox.offset)
            theirs = link.ask(own, TRY_S)
            if not isinstance(theirs, Standing):
                raise WireError("the server has not said how it stands")
            self._outbox.go_on(theirs.whole, theirs.offset)
            return link
        except BaseException:
            link.close()
            raise

    def _place(self, message: Any, shapes: Sequence[Shape]) -> list[Any]:
        """Where the tensors of what the server sends are to lie."""
        if isinstance(message, NoMore | TellLost):
            return fitting(shapes, [])
        if isinstance(message, WeightsAgain):
            self._again = self._pack.empty() if self._again is None else self._again
            return fitting(shapes, [self._again.numpy()])
        if not isinstance(message, Order):
            raise WireError("the server has sent what no server sends")
        whole = self._weights
        if self._shared is not None and message.weights == "whole":
            if message.place >= len(self._shared.rows):
                raise WireError(f"weights came for place {message.place}, where no worker reads")
            whole = self._shared.rows[message.place]
        changed = self._contributor.fragments.of_round(message.version - 1)
        size_bytes = vector_bytes(self._wire, self._contributor.replica.parameters, changed)
        parts = {
            "whole": [whole], "narrow": [self._change[:size_bytes], self._beside], "same": [], "beside": [],
            "part": [self._pack.part(self._weights, changed), self._pack.beside(self._weights)],
        }.get(message.weights)  # fmt: skip
        if parts is None:
            raise WireError(f"weights came as {message.weights!r}")
        return fitting(shapes, [part.numpy() for part in [*parts, *([self.vectors.lost] if message.lost else [])]])

    def _message(self, message: Order | NoMore) -> ServerToWorker:
        if isinstance(message, NoMore):
            return message
        if message.weights == "narrow":
            changed = self._contributor.fragments.of_round(message.version - 1)
            size_bytes = vector_bytes(self._wire, self._contributor.replica.parameters, changed)
            apply_change(self._change[:size_bytes], self._wire, self._pack, self._weights, changed)
            self._pack.beside(self._weights).copy_(self._beside)
        self._round = message.version
        return Compute(message.incarnation, message.piece, 0, message.off, message.version, message.scale)


def _result(message: Pushed) -> Contributed:
    told: dict[str, Any] = {each.name: getattr(message.facts, each.name) for each in dataclasses.fields(Facts)}
    told["bad"] = tuple(why.message for why in message.facts.bad)
    return Contributed(message.incarnation, message.from_s, message.to_s, message.verified, message.ahead, **told)


def far_server_of(assignment: Assignment, number: int, descriptor: int) -> Any:
    """What makes a worker's end to a server on another host; None without such."""
    if assignment.lines:
        return None
    assert assignment.network is not None, "the server is on another host"
    of_host = assignment.incarnation, descriptor, assignment.place[1]
    return functools.partial(FarServer, assignment.network, number, *of_host)
