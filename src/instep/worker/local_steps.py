"""What the local steps of one contribution come to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from instep.errors import NonFiniteError
from instep.worker.contribution import NOTHING, latest_of

if TYPE_CHECKING:
    from instep.worker.gradients import Computed


@dataclass
class LocalSteps:
    """What the local steps of one contribution came to so far, as its `Facts` will tell; moved: parameters."""

    counts: dict[str, int]
    sums: dict[str, tuple[float, ...]]
    steps: int = 0
    moved: set[int] = field(default_factory=set)
    changed: set[int] = field(default_factory=set)
    latest: tuple[int, int] = NOTHING
    ends: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    bad: list[NonFiniteError] = field(default_factory=list)
    empty: list[int] = field(default_factory=list)
    overflows: int = 0

    def add(
        self, batch: int, counts: Mapping[str, int], sums: Mapping[str, tuple[float, ...]], computed: Computed,
        changed: Iterable[int],
    ) -> None:  # fmt: skip
        """A step that was made."""
        self.steps += 1
        self.latest = max(self.latest, latest_of(batch, computed.sums))
        self.ends = computed.ends if batch == 0 else self.ends
        self.changed.update(changed)
        self.moved.update(places(computed.touched))
        for name in self.counts:
            self.counts[name] += counts[name]
            self.sums[name] += sums[name]


def places(flags: Iterable[bool]) -> tuple[int, ...]:
    """The indices of those that are true."""
    return tuple(index for index, flag in enumerate(flags) if flag)
