"""What goes between a server and its workers: over lines, with tensors in memory that they share, or to other hosts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from instep.worker.contribution import Vectors
from instep.worker.gradients import Contributor
from instep.worker.updates import Merger

if TYPE_CHECKING:
    from instep.team.channel import Channel
    from instep.team.messages import ServerToWorker, WorkerToServer


class ToServer(Protocol):
    """A worker's end. vectors: where its contribution is to lie when `send` tells of it."""

    vectors: Vectors

    def weights(self, slot: int) -> Tensor:
        """Those that an order names ([Pack.size_bytes] uint8), until the next one comes."""

    def send(self, message: WorkerToServer) -> None:
        """Sends it, with the contribution that it tells of."""

    def receive(self) -> ServerToWorker:
        """Waits for the next message."""


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


FarServerOf = Callable[[Contributor], ToServer]
"""Makes the end of a worker whose server is on another host."""

FarWorkersOf = Callable[[Merger, Sequence[Vectors], Sequence[Tensor]], ToFarWorkers]
"""Makes a server's end to workers of other hosts, of all workers' vectors and all slots of weights."""


class Lines:
    """A server's end to all its workers: near ones, each on a channel, and after them in number those elsewhere."""

    def __init__(self, near: Sequence[Channel], far: ToFarWorkers | None):
        self._near, self._far = near, far

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
        if worker >= len(self._near) and self._far is not None:
            self._far.left(worker)
