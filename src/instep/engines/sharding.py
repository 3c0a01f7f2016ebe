"""Where a team in lockstep has its weights and the sum of its gradients, and which worker updates what.

Replicated: each worker has weights of its own, a copy of the sum, and makes the whole update. That is right for any
model and optimizer. Sharded: the weights and one sum are shared by the workers of a machine, and each updates the
parameters that it owns there, with only their state in its optimizer; every machine holds all. That takes less time
and memory, and gives the same bits where an update of a parameter hangs on this parameter alone and nothing else
touches the weights; `choose` decides it from what all workers know alike, and `Team.shard` may forbid it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from instep.engines.heap import give_back
from instep.engines.piecewise import PiecewiseUpdates
from instep.engines.shared_state import SharedState
from instep.engines.undo import PiecesDone, SeatLost
from instep.engines.whole_update import why_each_makes_all
from instep.ranges import owners
from instep.reduce.layout import ALIGN_BYTES, placed, placed_at
from instep.reduce.reduction import Reduction, clip
from instep.transport.distributed import DistributedGroup
from instep.transport.group import Group
from instep.transport.shared_memory import SharedMemoryGroup
from instep.worker.optimizer_state import in_order, optimizers_in
from instep.worker.parcels import packed, unpacked
from instep.worker.replica import Replica
from instep.worker.tensor_checksums import Checksums, own_checksums, together
from instep.worker.updates import clipped_step

_WARM = 2
"""Updates after which a worker holds what it goes on with, and its heap is as it stays: less is given back after one,
since what comes next then takes those pages again."""


class Placement(ABC):
    """One worker's side of it."""

    weight_bytes: int
    """Of the memory for weights that the workers of a machine share."""
    state_bytes = 0
    """Of that for the optimizers' state, most of which nobody writes, and which takes no room then."""
    room = 0
    """Bytes that an update needs in `PiecesDone`."""
    shared: bool
    """Whether they share the sum of the gradients, too."""
    gradients: list[Tensor]
    """The sum by parameter, as views; whole once all workers have put their cuts there, until the update."""
    why_whole = ""
    """A sentence on why each worker makes the whole update, where a share of it was asked for."""

    def __init__(self, replica: Replica, reduction: Reduction, worker: int):
        self._replica, self._reduction, self._worker = replica, reduction, worker
        self._settled, self._joined = 0, False
        self._aside: dict[int, tuple[Any, Any]] = {}  # state of others' parameters, until all have joined

    def attach(self, group: Group, *, succeeds: bool = False) -> None:
        """Takes the team's group into use. A gather must follow before the weights are read. succeeds: another had this
        place in it before, who has died.
        """
        self._group, self._joined = group, succeeds

    def attach_for(self, worker: int) -> None:
        """What another worker of this machine, which has died, lacked of `attach`. Raises SeatLost where it is late."""
        if self._joined:
            raise SeatLost(worker, "it joined the others")

    def all_joined(self) -> None:
        """All workers have come to the gather after `attach`, or another has in the place of one."""
        self._joined = True
        self._aside.clear()

    def take(self, whole: Tensor) -> None:
        """From now on the sum of the gradients ([layout.size], float32) lies there."""
        self._sum, self.gradients = whole, self._reduction.layout.views(whole)

    @abstractmethod
    def update(self, step: int, norm: float, touched: Sequence[bool], pieces: PiecesDone | None = None) -> float | None:
        """The worker's part of the update from version `step`; the gradient, of L2 norm `norm`, is clipped before.

        touched[i]: whether parameter i has a gradient. pieces: what tells others how far it is, if they are to know.
        Returns the learning rate, the first one, if there is any.
        """

    @abstractmethod
    def update_for(self, worker: int, step: int, norm: float, touched: Sequence[bool], pieces: PiecesDone) -> None:
        """What is lacking of the part of another worker of this machine, which has died, in the update of which
        `update` has made this one's. Raises SeatLost where that worker kept something that is lost."""

    @property
    def state_seen(self) -> bool:
        """Whether each worker of a machine sees the optimizers' state of all parameters, where others update some."""
        return False

    @abstractmethod
    def hand_on(self, to: Placement) -> None:
        """All of this machine have left the group, and another has this worker go on with `to`: has its optimizers hold
        all that is seen here, and nothing lie here that does not come to lie there."""

    @abstractmethod
    def give_back(self, worker: int) -> None:
        """A worker for which this one has made updates has a successor."""

    @abstractmethod
    def handed(self) -> dict[str, Any]:
        """What the successor of a worker of this machine needs beside what they share: the "model", as in a state_dict,
        and the "training" state."""

    def settle(self) -> None:
        """Ends an update: waits until what others did or read is done.

        Building, loading and the first updates need memory that nothing needs later (weights and state that moved into
        memory that all share, for one), and it is given back once.
        """
        self._wait()
        self._settled += 1
        if self._settled == _WARM:
            give_back()

    @abstractmethod
    def _wait(self) -> None:
        """Until all have come here."""

    @abstractmethod
    def agree(self, flag: bool) -> bool:
        """What worker 0 says, if the others must know; else the worker's own `flag`."""

    @abstractmethod
    def training_state(self, machine: Group | None = None) -> dict[str, Any] | None:
        """As that of a replica alone, at worker 0; None at the others. All must ask at the same version.

        machine: a group of this machine's workers, who ask by themselves; the first of them gets it.
        """

    @abstractmethod
    def told_by(self, worker: int) -> bytes:
        """What this worker, or one that has died, tells the first in `training_state`."""

    @abstractmethod
    def whole_state(self) -> dict[str, Any]:
        """As `training_state` of worker 0, without others: where others can stand in."""

    @abstractmethod
    def share(self, worker: int) -> list[bool]:
        """By parameter, whether this worker is to read it and its optimizer's state where one worker is enough."""

    def unwritten(self, version: int) -> Callable[[], None] | None:
        """What raises FirstWrite where others' forwards have written into the shared weights since this call.

        They go on while worker 0 saves; but not before it has all their state. None where they share no weights.
        """
        if self._worker or not self.weight_bytes:
            return None
        written = self._replica.written
        before = written.look(closely=True)
        return lambda: written.check(before, f"the step after version {version}")

    def checksums_by(self, worker: int) -> bytes:
        """What this worker, or one that has died, tells the others in `checksums`."""
        return own_checksums(self._replica, self.share(worker), worker, self._group.size)

    def checksums(self, to: int | None = 0) -> Checksums | None:
        """As those of a replica alone, at worker `to`, or at all; None at others. All must ask at the same version."""
        shares = self._group.share(self.checksums_by(self._worker), to)
        return together(shares) if shares else None


class Replicated(Placement):
    """Weights, sum and the whole update at each worker."""

    weight_bytes, shared = 0, False

    def __init__(self, replica: Replica, reduction: Reduction, worker: int, why_whole: str = ""):
        super().__init__(replica, reduction, worker)
        self.why_whole = why_whole

    def update(self, step: int, norm: float, touched: Sequence[bool], pieces: PiecesDone | None = None) -> float | None:
        return clipped_step(self._replica, step, self._sum, self.gradients, norm, touched)

    def update_for(self, worker: int, step: int, norm: float, touched: Sequence[bool], pieces: PiecesDone) -> None:
        pass  # each makes the whole

    def hand_on(self, to: Placement) -> None:
        pass

    def give_back(self, worker: int) -> None:
        pass

    def handed(self) -> dict[str, Any]:
        return {"model": self._replica.saved_state(), "training": self._replica.training_state()}

    def _wait(self) -> None:
        pass

    def agree(self, flag: bool) -> bool:
        return flag

    def training_state(self, machine: Group | None = None) -> dict[str, Any] | None:
        return None if (machine or self._group).rank else self._replica.training_state()

    def told_by(self, worker: int) -> bytes:
        return b""  # each has all

    def whole_state(self) -> dict[str, Any]:
        return self._replica.training_state()

    def share(self, worker: int) -> list[bool]:
        sizes = [parameter.numel() for parameter in self._replica.parameters]
        return [owner == worker for owner in owners(sizes, self._group.size)]


class Sharded(Placement):
    """Weights and sum in memory of the machine, a share of the update at each of its workers.

    Between the gather that commits a step and `settle` each worker writes the parameters that it owns, and may scale
    their part of the sum; nobody reads weights then. At all other times nobody writes them.
    """

    shared = True

    def __init__(self, replica: Replica, reduction: Reduction, worker: int, machine: range):
        super().__init__(replica, reduction, worker)
        whose = owners([parameter.numel() for parameter in replica.parameters], len(machine))
        self._of = {each: [machine[owner] == each for owner in whose] for each in machine}
        self._own, self._own_indices = self._of[worker], self._indices(worker)
        self._others: set[int] = set()  # for whom this worker has made updates
        self._state = SharedState(replica) if len(machine) > 1 else None
        self.state_bytes = self._state.nbytes if self._state is not None else 0
        self._leads = 0 in machine  # the other machines hold the same
        lie_here = [*replica.parameters, *replica.averages.tensors]
        self._offsets, self.weight_bytes = placed([tensor.nbytes for tensor in lie_here], ALIGN_BYTES)
        if self._state is not None and len(reduction.levels) == 1:
            shares = {each: self._indices(each) for each in machine}
            self._updates = PiecewiseUpdates(replica, self._offsets, self._state, shares)
            self.room = self._updates.room

    def attach(self, group: Group, *, succeeds: bool = False) -> None:
        super().attach(group, succeeds=succeeds)
        states, memory = [one.of_torch.state for one in self._replica.optimizer.each], group.common.numpy()
        parameters, averages = self._replica.parameters, self._replica.averages
        for parameter, offset in zip(parameters, self._offsets, strict=False):
            parameter.data = placed_at(memory, offset, parameter.detach(), copied=not succeeds)  # all write the same
        places = zip(averages.tensors, self._offsets[len(parameters) :], strict=True)
        averages.lie_in([placed_at(memory, offset, average, copied=not succeeds) for average, offset in places])
        others = [(index, p) for index, p in enumerate(parameters) if not self._own[index]]
        self._aside = {index: (state, state.pop(p)) for index, p in others for state in states if p in state}
        of_machine = group.machine if isinstance(group, DistributedGroup) else group
        if self._state is not None and isinstance(of_machine, SharedMemoryGroup):
            self._state.attach(of_machine.spare)
            if succeeds:
                self._take_over(self._worker)
            else:
                self._state.keep(self._indices(self._worker))

    def attach_for(self, worker: int) -> None:
        super().attach_for(worker)
        for index in self._aside.keys() & set(self._indices(worker)):
            state, values = self._aside[index]
            state[self._replica.parameters[index]] = values
        if self._state is not None:
            self._state.keep(self._indices(worker))
            self._state.give_back(self._indices(worker))

    def update(self, step: int, norm: float, touched: Sequence[bool], pieces: PiecesDone | None = None) -> float | None:
        if pieces is not None:
            return self._updates.make(self._worker, step, norm, touched, self.gradients, pieces)
        known = zip(self.gradients, touched, self._own, strict=True)
        gradients = [view if seen and own else None for view, seen, own in known]
        for gradient in gradients:
            if gradient is not None:
                clip(gradient, norm, self._replica.recipe.clip_norm)
        rate = self._replica.update(step, gradients)
        self._replica.averages.follow(self._own_indices)
        if self._state is not None:
            self._state.grow(self._own_indices)
        return rate

    def update_for(self, worker: int, step: int, norm: float, touched: Sequence[bool], pieces: PiecesDone) -> None:
        if pieces.begun:
            pieces.put_back()
        self._hold(worker)
        self._updates.make(worker, step, norm, touched, self.gradients, pieces)

    def _hold(self, worker: int) -> bool:
        """Has the optimizers' state of another worker here. Whether that is new."""
        new = worker not in self._others and worker != self._worker and self._state is not None
        if new:
            self._others.add(worker)
            self._take_over(worker)
        return new

    def _take_over(self, worker: int) -> None:
        assert self._state is not None, "only then can workers stand in for each other"
        if not self._state.take_over(self._indices(worker)):
            raise SeatLost(worker, "it kept state of its optimizer where others do not see it")

    @property
    def state_seen(self) -> bool:
        return self._state is not None and self._state.whole

    def hand_on(self, to: Placement) -> None:
        if not self.state_seen:
            return
        assert self._state is not None
        self._state.take_over(range(len(self._own)))
        if isinstance(to, Sharded) and to._state is not None:
            return  # which copies it into its own
        for state in [one.of_torch.state for one in self._replica.optimizer.each]:
            for parameter, values in state.items():
                state[parameter] = {name: v.clone() if isinstance(v, Tensor) else v for name, v in values.items()}
        if not to.weight_bytes:
            for parameter in self._replica.parameters:
                parameter.data = parameter.data.clone()
            self._replica.averages.lie_apart()

    def give_back(self, worker: int) -> None:
        if worker in self._others and self._state is not None:
            self._others.remove(worker)
            self._state.give_back(self._indices(worker))

    def handed(self) -> dict[str, Any]:
        module, training = self._replica.module, self._replica.training_state()
        parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
        for whole in optimizers_in(training):
            whole["state"] = {}
        training |= self._replica.averages.state(parameters=False)
        model = {name: value for name, value in module.state_dict().items() if name not in parameters}
        return {"model": model, "training": training}

    def _indices(self, worker: int) -> list[int]:
        return [index for index, own in enumerate(self._of[worker]) if own]

    def _wait(self) -> None:
        self._group.meet()

    def agree(self, flag: bool) -> bool:
        return bool(self._group.gather(torch.tensor([flag]))[0])

    def training_state(self, machine: Group | None = None) -> dict[str, Any] | None:
        replica, group = self._replica, machine or self._group
        own = self.told_by(self._worker) if group.rank and (machine is not None or self._leads) else b""
        blobs = group.share(own, to=0)
        if group.rank:
            return None
        training = replica.training_state()
        for blob in filter(None, blobs):
            for whole, state in zip(optimizers_in(training), unpacked(blob), strict=True):
                whole["state"].update(state)
        return in_order(training)

    def told_by(self, worker: int) -> bytes:
        self._hold(worker)
        own = {id(p) for p, owns in zip(self._replica.parameters, self._of[worker], strict=True) if owns}
        states = []
        for one in self._replica.optimizer.each:
            held = [id(parameter) for group in one.of_torch.param_groups for parameter in group["params"]]
            states.append({key: state for key, state in sorted(one.state()["state"].items()) if held[key] in own})
        return packed(states)

    def whole_state(self) -> dict[str, Any]:
        borrowed = [worker for worker in self._of if self._hold(worker)]
        training = in_order(self._replica.training_state())
        for worker in borrowed:
            self.give_back(worker)
        return training

    def share(self, worker: int) -> list[bool]:
        self._hold(worker)
        return [own and self._leads for own in self._of[worker]]


def choose(
    replica: Replica,
    reduction: Reduction,
    worker: int,
    machine: range,
    shard: str = "optimizer",
    why_whole: str | None = None,
) -> Placement:
    """Sharded where that gives the same bits, else replicated: what a forward writes nobody else may see.

    machine: the workers that share memory with this one. shard: as `Team.shard`. why_whole: what was found before.
    """
    several = len(machine) > 1 or len(reduction.levels) > 1  # all alike, one that is alone on its machine too
    if shard == "none" or not several:
        return Replicated(replica, reduction, worker)
    why = why_each_makes_all(replica) if why_whole is None else why_whole
    return Replicated(replica, reduction, worker, why) if why else Sharded(replica, reduction, worker, machine)
