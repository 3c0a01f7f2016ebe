"""What the contributions of an update wrote into parameters, where they may have started from older weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from instep.bits import bits_of
from instep.reduce.written import WrittenElements, WrittenParameters


class Writes:
    """The server's side: what contributions wrote, from weights of several versions, brought into the present ones.

    Of a contribution from the present version the new values are taken. Of an older one, the difference (new - old) is
    added to each element that it changed, but for those that others' forwards have changed since its version: weights
    scaled down by two workers who had read them too large would be scaled down twice. So between a contribution's
    version and its update each element is written once, as in a step in lockstep.
    """

    def __init__(self, written: WrittenParameters):
        self._written = written
        self._updates = 0
        self._when: dict[str, Tensor] = {}  # after which update each element was last written, int32; 0 never
        self._noted: dict[str, Tensor] = {}  # the elements that the update in the making writes

    def values(self, rows: Sequence[Tensor], staleness: Sequence[int], step: int) -> dict[str, Tensor]:
        """What an update of contributions is to find in the parameters that they wrote, by name.

        Raises RecipeError where those from the present version disagree on an element.
        """
        known = self._written
        fresh = known.merged([row for row, old in zip(rows, staleness, strict=True) if not old], step)
        values = known.after(fresh)
        self._noted = {name: change.mask.clone() for name, change in fresh.items()}
        if known.names:
            for old, row in sorted(zip(staleness, rows, strict=True), key=lambda each: each[0]):
                for name, change in known.read(row, step).items() if old else ():
                    mask = change.mask & ~self._noted.get(name, torch.zeros_like(change.mask))
                    if name in self._when:
                        mask &= self._when[name] <= self._updates - old
                    values[name] = _moved(values.get(name, known.value(name)), mask, change)
                    self._noted[name] = self._noted.get(name, mask) | mask
        return values

    def means(self, rows: Sequence[Tensor], weights: Sequence[float], step: int) -> dict[str, Tensor]:
        """The same for frozen parameters under local steps: the differences are averaged as all deltas are.

        Raises RecipeError where contributions disagree on an element that is no floating-point number.
        """
        known = self._written
        if not known.names:
            return {}
        whole = [name for name in known.names if not known.value(name).is_floating_point()]
        values = known.after(known.merged(rows, step, whole))
        totals: dict[str, Tensor] = {}
        for row, weight in zip(rows, weights, strict=True):
            for name, change in known.read(row, step).items():
                if name not in whole:
                    moved = torch.sub(*_values(change, known.value(name).dtype))
                    totals[name] = totals.get(name, torch.zeros_like(moved)).add_(moved, alpha=weight)
        for name, total in totals.items():
            values[name] = (known.value(name) + total).to(known.value(name).dtype)
        return values

    def made(self, *, taken: bool) -> None:
        """The update is made; `taken`: with the values that were given last."""
        self._updates += 1
        for name, mask in self._noted.items() if taken else ():
            when = self._when.setdefault(name, torch.zeros(mask.shape, dtype=torch.int32, device=mask.device))
            when.masked_fill_(mask, self._updates)
        self._noted = {}


def _moved(value: Tensor, mask: Tensor, change: WrittenElements) -> Tensor:
    """`value`, which is of a later version, moved by `change` where `mask` is true."""
    made = WrittenElements(mask & (bits_of(value) == change.old), change.new, change.old).applied_to(value)
    new, old = _values(change, value.dtype)
    return torch.where(mask & (bits_of(value) != change.old), (value + (new - old)).to(value.dtype), made)


def _values(change: WrittenElements, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """New and old values of a parameter of type `dtype`; floating ones in float32 at least."""
    wide = torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else dtype
    return change.new.view(dtype).to(wide), change.old.view(dtype).to(wide)
