"""What a server shares with its workers: the versions of the weights, and each worker's contribution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from instep.reduce.layout import Pack
from instep.rules.fragments import Fragments
from instep.rules.ledger import Ledger
from instep.transport.memory import Region, attach
from instep.worker.contribution import Vectors
from instep.worker.contributor import Contributor
from instep.worker.wire import WayDown


def server_regions(contributor: Contributor, workers: int) -> dict[str, Region]:
    """The sizes of what so many workers share with their server."""
    # Each worker computes from one version at most; one more is the newest.
    weights = Region((workers + 1, contributor.pack.size_bytes), "uint8")
    return {"weights": weights, **contributor.regions(workers)}


def server_memory(descriptor: int, memory: Mapping[str, Region]) -> tuple[list[Tensor], list[Vectors]]:
    """The versions of the weights, and each worker's vectors."""
    arrays = {name: torch.from_numpy(array) for name, array in attach(descriptor, memory).items()}
    parts = ("gradient", "buffers", "integers", "written", "lost")
    rows = zip(*(arrays[name] for name in parts), strict=True)
    return list(arrays["weights"]), [Vectors(*row) for row in rows]


class PublishedWeights:
    """Weights in `slots` ([pack.size_bytes] uint8 each), one for each version that a worker may compute from, and the
    newest. Where they go over a narrow wire, `way_down` lays them there, as each worker has them.
    """

    def __init__(
        self,
        slots: Sequence[Tensor],
        pack: Pack,
        ledger: Ledger,
        fragments: Fragments,
        way_down: WayDown | None = None,
    ):
        self._weights, self._pack, self._ledger, self._way_down = slots, pack, ledger, way_down
        self._fragments = fragments
        self._joined: set[int] = set()  # workers that have weights
        if way_down is not None:
            way_down.publish_in(slots)
        self._slots: dict[int, int] = {}  # where each version that is computed from lies
        self._bases: dict[int, Tensor] = {}  # older versions, which contributions that wait are compensated from

    def give(self, worker: int, version: int) -> tuple[int, int]:
        """Where the present weights, which are of `version`, lie for a worker to read, and the bytes that it pulls."""
        if self._way_down is not None:
            return self._way_down.give(worker, version)
        slot = self._slot_of(version)
        if worker in self._joined:
            return slot, self._pack.change_bytes(self._fragments.of_round(version - 1))
        self._joined.add(worker)
        return slot, self._pack.size_bytes

    def left(self, worker: int) -> None:
        """The worker is gone; who takes its place has nothing."""
        self._joined.discard(worker)
        if self._way_down is not None:
            self._way_down.left(worker)

    def _slot_of(self, version: int) -> int:
        if version not in self._slots:
            in_hand = (self._ledger.in_hand(worker) for worker in self._ledger.active)
            used = {base for piece, base in in_hand if piece >= 0}
            self._keep_bases(used)
            self._slots = {v: slot for v, slot in self._slots.items() if v in used}
            free = next(s for s in range(len(self._weights)) if s not in self._slots.values())
            self._pack.save(self._weights[free])
            self._slots[version] = free
        return self._slots[version]

    def base(self, version: int) -> Tensor:
        """The weights of an older version, from which a contribution that is merged was computed."""
        return self._bases[version] if version in self._bases else self._weights[self._slots[version]]

    def _keep_bases(self, used: set[int]) -> None:
        """Copies the versions that only contributions that wait still need, if merging does: their slots are wanted."""
        if not self._ledger.rule.compensation:
            return
        waiting = self._ledger.bases
        self._bases = {version: base for version, base in self._bases.items() if version in waiting}
        for version in self._slots.keys() & (waiting - used):
            self._bases[version] = self._weights[self._slots[version]].clone()
