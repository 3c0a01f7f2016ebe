"""What goes between a server and its workers: over lines, with tensors in memory that they share, or to other hosts."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from instep.errors import WorkerError
from instep.rules.ledger import Contribution
from instep.worker.contribution import Vectors
from instep.worker.contributor import Contributor
from instep.worker.updates import Merger

if TYPE_CHECKING:
    from instep.team.channel import Channel
    from instep.team.messages import ServerToWorker, WorkerToServer


ANSWER_S = 60.0
"""Seconds that a worker elsewhere has to tell what a checkpoint is to hold of it."""


class ToServer(Protocol):
    """A worker's end. vectors: where its contribution is to lie when `send` tells of it."""

    vectors: Vectors

    def weights(self, slot: int) -> Tensor:
        """Those that an order names ([Pack.size_bytes] uint8), until the next one comes."""

    def send(self, message: WorkerToServer) -> None:
        """Sends it, with the contribution that it tells of."""

    def receive(self) -> ServerToWorker:
        """Waits for the next message."""

    def leave(self) -> None:
        """The process ends in the middle."""


class NearServer:
    """One that is on this host."""

    def __init__(self, line: Channel, weights: Sequence[Tensor], vectors: Vectors):
        self._line, self._weights, self.vectors = line, weights, vectors

    def weights(self, slot: int) -> Tensor:
        return self._weights[slot]

    def send(self, message: WorkerToServer) -> None:
        self._line.send(message)

    def receive(self) -> ServerToWorker:
        message: ServerToWorker = self._line.recv()
        return message

    def leave(self) -> None:
        pass


class ToFarWorkers(Protocol):
    """A server's end to workers of other hosts, whose numbers are the last."""

    def fileno(self) -> int:
        """A descriptor that is ready to read once there is something to `receive`."""

    def receive(self) -> Sequence[tuple[int, WorkerToServer]]:
        """What has come, and from which worker; a contribution lies where it belongs by then."""

    def send(self, worker: int, message: ServerToWorker) -> None:
        """Sends it, with the weights that it tells of."""

    def left(self, worker: int) -> None:
        """The worker's process is gone."""

    def ask_lost(self, worker: int, version: int) -> None:
        """Asks for what a narrow wire had lost with the contribution from weights of this version."""

    def told_lost(self, worker: int, version: int) -> bool:
        """Whether it has come, and lies in the worker's vectors."""


FarServerOf = Callable[[Contributor], ToServer]
"""Makes the end of a worker whose server is on another host."""

FarWorkersOf = Callable[[Merger, Sequence[Vectors], Sequence[Tensor]], ToFarWorkers]
"""Makes a server's end to workers of other hosts, of all workers' vectors and all slots of weights."""


class Lines:
    """A server's end to all its workers: near ones, each on a channel, and after them in number those elsewhere."""

    def __init__(self, near: Sequence[Channel], far: ToFarWorkers | None):
        self._near, self._far = near, far
        self._losing: dict[int, int] = {}  # who elsewhere has what its wire lost last, and the version it is of

    @property
    def sources(self) -> list[Any]:
        """What to wait for."""
        return [*self._near, *([self._far] if self._far is not None else [])]

    def hear(self, ready: Collection[Any]) -> Iterator[tuple[int, WorkerToServer]]:
        """What is heard of those of the `sources` that are ready."""
        for worker, line in enumerate(self._near):
            if line in ready:
                yield worker, line.recv()
        if self._far is not None and self._far in ready:
            yield from self._far.receive()

    def send(self, worker: int, message: ServerToWorker) -> None:
        """Sends a worker a message."""
        if worker < len(self._near):
            self._near[worker].send(message)
        elif self._far is not None:
            self._far.send(worker, message)

    def left(self, worker: int) -> None:
        """The worker's process is gone."""
        self._losing.pop(worker, None)
        if worker >= len(self._near) and self._far is not None:
            self._far.left(worker)

    def merged(self, contributions: Sequence[Contribution]) -> None:
        """An update was made of these."""
        self._losing = {each.worker: each.base for each in contributions if each.worker >= len(self._near)}

    def fetch_lost(self, pause: Callable[[], None]) -> Iterator[int]:
        """Has workers elsewhere tell what their wire had lost with what was merged last. Gives each that has, once it
        lies in its vectors. pause: waits a moment, and hears who has left. Raises WorkerError where no answer comes.
        """
        if self._far is None:
            return
        for worker, version in self._losing.items():
            if not self._far.told_lost(worker, version):
                self._far.ask_lost(worker, version)
        until = time.monotonic() + ANSWER_S
        while self._losing:
            for worker, version in list(self._losing.items()):
                if self._far.told_lost(worker, version):
                    del self._losing[worker]
                    yield worker
            if time.monotonic() >= until:
                raise WorkerError(
                    f"worker {min(self._losing)} has not told within {ANSWER_S:g} s what its wire has lost."
                )
            pause()
