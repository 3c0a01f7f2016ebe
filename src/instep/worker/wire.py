"""The two ends of a narrow wire, under rules with local steps: a worker's delta up, the weights' change down.

What a message loses its sender adds to the next one, so that nothing is lost for good. One machine has no wire: its
numbers take the same way through the same bytes, so that the bits are those of a wire.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from instep.errors import CheckpointError
from instep.reduce.layout import Layout, Pack
from instep.reduce.narrow import decoded, encoded, narrow_bytes
from instep.rules.fragments import Fragments
from instep.rules.rule import UpdateRule

if TYPE_CHECKING:
    from instep.worker.contribution import Arrived


class WayUp:
    """A worker's end. N weights are trained; `kept`: as many if what is lost is saved in checkpoints, else 0."""

    def __init__(self, rule: UpdateRule, layout: Layout, device: torch.device):
        self._wire, self._layout = rule.wire, layout
        self._sizes = [shape.numel() for shape in layout.shapes]
        self._lost = torch.zeros(sum(self._sizes), device=device)
        self.message = torch.empty(0, dtype=torch.uint8)
        """What `send` has sent last, in the wire's format."""
        self.kept = self._lost.numel() if rule.lockstep else 0

    def take(self, lost: Tensor) -> None:
        """What messages have lost before this worker came ([kept] float32)."""
        if self.kept:
            self._lost.copy_(lost)

    def send(self, delta: Tensor, kept: Tensor, which: range | None = None) -> None:
        """Makes of `delta` ([layout.size] float32) what arrives of it, and writes what is lost into `kept` ([kept]).

        which: the parameters that are sent, by index; all if None. Of what is not finite nothing is lost: it arrives
        as such, and the contribution is left out.
        """
        which = range(len(self._sizes)) if which is None else which
        start, stop = which.start, which.stop
        lost = self._lost.narrow(0, sum(self._sizes[:start]), sum(self._sizes[start:stop]))
        whole = _flat(self._layout.views(delta)[start:stop]).add_(lost)
        self.message = encoded(whole, self._wire)
        arrived = write_delta(self.message, self._wire, self._layout, delta, which)
        lost.copy_(torch.where(arrived.isfinite(), whole - arrived, lost))
        if self.kept:
            kept.copy_(self._lost)


class WayDown:
    """The server's end: the weights as each worker has them, which differ from the server's by what was lost.

    Under rules in lockstep all workers have the same; a worker that joins gets those whole, not narrow, and a
    checkpoint holds them, beside what each worker's last contribution has lost. Under other rules each worker has its
    own, and who joins gets the server's.
    """

    def __init__(self, rule: UpdateRule, parameters: Sequence[Tensor], pack: Pack, fragments: Fragments | None = None):
        self._wire, self._parameters, self._pack = rule.wire, parameters, pack
        self.common = rule.lockstep
        """Whether all workers have the same."""
        self.message: Tensor | None = None
        """What `give` has sent last, in the wire's format; None where all weights went."""
        self._size = sum(parameter.numel() for parameter in parameters)
        self._fragments = fragments or Fragments([parameter.nbytes for parameter in parameters], 1)
        self._slots: dict[int, Tensor] = {}
        self._filled: set[int] = set()  # slots whose weights workers have
        self._joined: set[int] = set()  # workers that have them
        self._version = -1  # of what all have
        self._lost: dict[int, Tensor] = {}  # by worker, with its last contribution to the present version
        self._owed: dict[int, Tensor] = {}  # of these, what workers of a run that was resumed have yet to take

    def publish_in(self, slots: Sequence[Tensor]) -> None:
        """The memory for what each worker has, [pack.size_bytes] uint8 each; it is the process's own without."""
        for slot in self._filled:
            slots[slot].copy_(self._slots[slot])
        self._slots = dict(enumerate(slots))

    def give(self, worker: int, version: int) -> tuple[int, int]:
        """Brings what the worker has up to the present weights, of `version`: its slot, and the bytes that it takes.

        A change that is not finite goes whole, so that the worker sees what the server has.
        """
        slot = self._slot(worker)
        if not self.common or version != self._version:
            weights, filled = self.weights(worker), slot in self._filled
            changed = self._fragments.since(self._version if self.common and filled else -1, version)
            self.message = self._moved(weights, changed) if filled else None
            if self.message is None:
                self._pack.save(weights, changed if filled else None)
            self._filled.add(slot)
            self._version = version
        if worker in self._joined:
            fragment = self._fragments.of_round(version - 1)
            return slot, (self if self.message is not None else self._pack).change_bytes(fragment)
        self._joined.add(worker)
        return slot, self._pack.size_bytes

    def change_bytes(self, which: range) -> int:
        """Of a message with the change of these parameters, and with all beside them, which goes as it is."""
        return vector_bytes(self._wire, self._parameters, which) + self._pack.beside_bytes

    def weights(self, worker: int) -> Tensor:
        """What the worker has ([pack.size_bytes] uint8)."""
        slot = self._slot(worker)
        if slot not in self._slots:
            self._slots[slot] = self._pack.empty()
        return self._slots[slot]

    def lost_of(self, worker: int) -> Tensor | None:
        """What a worker that joins is to take for lost, see `WayUp.take`; None where it is there, or knows it is 0."""
        if worker in self._joined or not self.common:
            return None
        return self._owed.pop(worker, torch.zeros(self._size))

    def merged(self, contributions: Sequence[Arrived]) -> None:
        """An update is made of these."""
        if self.common:
            by_arrival = sorted(contributions, key=lambda each: each.seq)
            self._lost = {each.worker: each.vectors.lost.clone() for each in by_arrival}

    def take_lost(self, worker: int, lost: Tensor) -> None:
        """What the worker's last contribution has lost, where it was not with it."""
        self._lost[worker] = lost.clone()

    def left(self, worker: int) -> None:
        """The worker is gone, with what it has lost; who takes its place has nothing."""
        self._joined.discard(worker)
        self._lost.pop(worker, None)
        self._owed.pop(worker, None)
        if not self.common:
            self._filled.discard(worker)

    def everybody_left(self) -> None:
        """The run starts again."""
        self._joined.clear()
        self._owed = dict(self._lost)
        if not self.common:
            self._filled.clear()

    def state(self) -> dict[str, Any]:
        """For a checkpoint; empty where what is lost is not saved."""
        if not self.common:
            return {}
        held = [view.clone() for view in self._pack.parameters(self._slots[0])] if 0 in self._filled else None
        return {"wire": {"version": self._version, "held": held, "lost": dict(self._lost)}}

    def load(self, state: Mapping[str, Any] | None) -> None:
        """Takes back what `state` gave as "wire"; None starts anew. Raises CheckpointError where it is none."""
        self._filled, self._version, self._lost = set(), -1, {}
        if state is not None and self.common:
            if not self._fits(state):
                raise CheckpointError(
                    f"what the wire in {self._wire} has lost is not in the checkpoint as it was written; use an "
                    f"earlier one."
                )
            self._lost = dict(state["lost"])
            if state["held"] is not None:
                for view, value in zip(self._pack.parameters(self.weights(0)), state["held"], strict=True):
                    view.copy_(value)
                self._filled, self._version = {0}, state["version"]
        self.everybody_left()

    def _fits(self, state: Any) -> bool:
        if not isinstance(state, Mapping) or type(state.get("version")) is not int or "held" not in state:
            return False
        held, lost = state["held"], state.get("lost")
        views = self._pack.parameters(self._pack.empty())
        return (
            isinstance(lost, Mapping)
            and all(type(worker) is int and _is(each, (self._size,), torch.float32) for worker, each in lost.items())
            and (held is None or (isinstance(held, list) and len(held) == len(views)))
            and all(_is(each, view.shape, view.dtype) for each, view in zip(held or (), views, strict=False))
        )

    def _slot(self, worker: int) -> int:
        return 0 if self.common else worker

    def _moved(self, weights: Tensor, which: Sequence[int]) -> Tensor | None:
        """Sends the change of these parameters from `weights` to the present ones, into `weights`; None where it is
        not finite.
        """
        views = self._pack.parameters(weights)
        had = [views[index] for index in which]
        now = [self._parameters[index].detach().cpu() for index in which]
        with torch.no_grad():
            each_way = zip(now, had, _wide(had), strict=True)
            change = _flat([new.to(dtype) - old.to(dtype) for new, old, dtype in each_way])
            if not bool(change.isfinite().all()):
                return None
            message = encoded(change, self._wire)
            apply_change(message, self._wire, self._pack, weights, which)
        self._pack.save(weights, ())  # what lies beside them goes as it is
        return message


def vector_bytes(wire: str, parameters: Sequence[Tensor], which: range) -> int:
    """Of a message with a number for each weight of the parameters `which`, by index."""
    return narrow_bytes(wire, sum(parameters[index].numel() for index in which))


def write_delta(message: Tensor, wire: str, layout: Layout, delta: Tensor, which: range) -> Tensor:
    """Writes what arrives of a `WayUp.message`, of the parameters `which`, into `delta` ([layout.size] float32), and
    returns it, flat.
    """
    sizes = [shape.numel() for shape in layout.shapes[which.start : which.stop]]
    arrived = decoded(message, wire, sum(sizes))
    for view, part in zip(layout.views(delta)[which.start : which.stop], arrived.split(sizes), strict=True):
        view.copy_(part.view(view.shape))
    return arrived


def apply_change(message: Tensor, wire: str, pack: Pack, weights: Tensor, which: Sequence[int]) -> None:
    """Brings parameters in `weights` ([pack.size_bytes] uint8), those `which`, on by what arrives of a
    `WayDown.message`.
    """
    views = pack.parameters(weights)
    had = [views[index] for index in which]
    sizes = [view.numel() for view in had]
    with torch.no_grad():
        parts = decoded(message, wire, sum(sizes)).split(sizes)
        for old, part, dtype in zip(had, parts, _wide(had), strict=True):
            old.copy_(old.to(dtype) + part.view(old.shape))


def _wide(tensors: Sequence[Tensor]) -> list[torch.dtype]:
    """In which their changes are computed."""
    return [torch.promote_types(tensor.dtype, torch.float32) for tensor in tensors]


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    """One after the other, each in the order of its indices: the order in which they go over the wire."""
    return torch.cat([tensor.detach().reshape(-1).float() for tensor in tensors])


def _is(value: Any, shape: Sequence[int], dtype: torch.dtype) -> bool:
    return isinstance(value, Tensor) and (tuple(value.shape), value.dtype) == (tuple(shape), dtype)
