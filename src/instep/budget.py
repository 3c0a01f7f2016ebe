"""A budget of memory as people write it, "512MiB", "2 GB", "40%", and a share of anything, "1%"."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from instep.errors import RecipeError, shown

_SIZE = re.compile(r"\s*(\d+\.?\d*|\.\d+)\s*([kKMGT]?i?B|%)\s*")
_MOST_BYTES = 1 << 60

_POWERS = {"": 0, "k": 1, "K": 1, "M": 2, "G": 3, "T": 4}


@dataclass(frozen=True)
class Budget:
    """Bytes, or a share of what a step takes with nothing recomputed: one of the two is None."""

    nbytes: int | None = None
    share: float | None = None

    def of(self, whole_bytes: int) -> int:
        """The budget in bytes where the whole is `whole_bytes`."""
        if self.nbytes is not None:
            return self.nbytes
        assert self.share is not None
        return max(1, int(self.share * whole_bytes))


def parse_budget(text: str, name: str) -> Budget:
    """The budget in a text such as "512MiB" (powers of 1024), "2GB" (powers of 1000) or "40%". `name` says what it is,
    for the message. Raises RecipeError for a wrong unit, 0, or a share above 100 %."""
    match = _SIZE.fullmatch(text)
    if not match or match[2] == "iB":
        raise RecipeError(
            f"{name} is {shown(text)}; write bytes with their unit, such as '512MiB' or '2GB', or a share of what a "
            f"step takes with nothing recomputed, such as '70%'."
        )
    number, unit = float(match[1]), match[2]
    if unit == "%":
        if not 0 < number <= 100:
            raise RecipeError(f"{name} is {shown(text)}; a share is above 0 % and at most 100 %.")
        return Budget(share=number / 100)
    size = number * (1024 if "i" in unit else 1000) ** _POWERS[unit.removesuffix("B").removesuffix("i")]
    if size > _MOST_BYTES:
        raise RecipeError(f"{name} is {shown(text)}, more than any machine has; leave it out to recompute nothing.")
    nbytes = int(size)
    if nbytes < 1:
        raise RecipeError(
            f"{name} is {shown(text)}; it must be above 0: activations take some memory whatever is recomputed."
        )
    return Budget(nbytes=nbytes)


def parse_share(text: str, name: str) -> float:
    """The share in a text such as "1%" or "0.01", above 0 and at most 1. Raises RecipeError."""
    number = text.strip().removesuffix("%")
    try:
        share = float(number) / (100 if text.strip().endswith("%") else 1)
    except ValueError:
        share = math.nan
    if not 0 < share <= 1:
        raise RecipeError(f"{name} is {shown(text)}; write a share above 0 % and at most 100 %, such as '1%'.")
    return share


def as_size(nbytes: float) -> str:
    """Bytes for people, in MiB, or in KiB below one; rounded up, so that the same as a budget is enough."""
    unit, size = ("MiB", 2**20) if nbytes > 2**20 - 100 else ("KiB", 2**10)
    return f"{math.ceil(nbytes / size * 10) / 10:.1f} {unit}"
