"""How the workers of a team in lockstep reach each other: through memory that they share, by gloo, or by NCCL."""

from __future__ import annotations

from dataclasses import dataclass

from instep.reduce.levels import machine_of
from instep.team.messages import HostNetwork
from instep.team.session import Session
from instep.transport.distributed import DistributedGroup, of_ranks
from instep.transport.gpus import DeviceGroup, Staged, without_rows
from instep.transport.group import Group, Sizes, Solo
from instep.transport.memory import Region
from instep.transport.shared_memory import SharedMemoryGroup, regions
from instep.transport.wire import Connect, store_at
from instep.worker.device import is_gpu


@dataclass
class _Meeting:
    """Where this process finds others, in all of its groups, those too that were never formed: a store that it serves
    is there as long as it lives. What listens for it can be used once.
    """

    connect: Connect | None = None
    serves: bool = False


class Reach:
    """One worker's side of it. before: of the group that it was in before."""

    def __init__(self, session: Session, before: Reach | None = None):
        team = session.assignment.team
        self._session, self._by_nccl = session, team.by_nccl
        self.here = machine_of(session.rank, session.machines)
        """The workers of this host, by rank."""
        self._alone = len(session.machines) == 1
        self._meeting: _Meeting = before._meeting if before is not None else _Meeting()
        self.machines = (1,) * team.workers if team.by_nccl else session.machines
        """How many workers share rows, machine by machine: those with a GPU each share none."""
        self.machine: Group | None = None
        """Of this host's workers alone, where there are others: it outlasts the loss of those. None with NCCL."""

    def memory(self, sizes: Sizes) -> dict[str, Region]:
        """What the workers of a host share, in a team of these sizes."""
        if len(self.here) == 1 or (self._by_nccl and not self._alone):
            return {}
        return regions(self._own(sizes))

    def group(self, sizes: Sizes, descriptor: int) -> Group:
        """The team's group. `descriptor`: of the host's memory."""
        session, network = self._session, self._session.assignment.network
        assert session.replica is not None, "the recipe is built"
        device, waiting = session.replica.device, session.heartbeat.waiting
        place, left = session.rank - self.here.start, session.heartbeat.left
        own = self._own(sizes), place, waiting, left
        machine = SharedMemoryGroup(descriptor, *own) if self.memory(sizes) else None
        if network is None or (self._alone and not self._by_nccl):
            host: Group = machine or Solo(sizes, device)
            self.machine = host if network is not None else None
            return Staged(host, device) if machine is not None and is_gpu(device) else host
        connect = self._store(network)
        if self._by_nccl:
            host = machine or self._by_gloo(network, connect, without_rows(sizes), None)
            name, address = f"{network.name}, GPUs", network.address
            return DeviceGroup(host, connect, name, sizes, device=device, address=address, waiting=waiting)
        host = self._by_gloo(network, connect, sizes, machine)
        return Staged(host, device) if is_gpu(device) else host

    def _by_gloo(self, network: HostNetwork, connect: Connect, sizes: Sizes, machine: Group | None) -> Group:
        machine = machine or (Solo(self._own(sizes)) if len(self.here) == 1 else None)
        self.machine = None if self._by_nccl else machine
        session, address, beat = self._session, network.address, self._session.heartbeat
        name = f"{network.name}/{beat.generation}" if beat.generation else network.name
        own = session.rank, sizes, machine
        silent_s = session.assignment.team.lease_s
        return DistributedGroup(
            connect, name, *own, address=address, waiting=beat.waiting, silent_s=silent_s, broken_off=beat.left
        )

    def _store(self, network: HostNetwork) -> Connect:
        """Where the workers find each other. The first one serves it, as long as it lives."""
        serves, meeting = self._session.rank == 0, self._meeting
        if meeting.connect is None or serves > meeting.serves:
            meeting.connect = store_at(*network.store, network.listener if serves else None)
            meeting.serves = serves
        return meeting.connect

    def _own(self, sizes: Sizes) -> Sizes:
        """Those of what this host's workers share."""
        return of_ranks(without_rows(sizes) if self._by_nccl else sizes, self.here)
