"""The bounds of a team that takes as many workers as there is room for, "2..8", and the room that a machine has."""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from instep.errors import RecipeError, shown

_GROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Bounds:
    """Of the number of workers: the least and the most."""

    least: int
    most: int

    def within(self, room: int) -> int:
        """As many as there is room for, or as are in the bounds."""
        return max(self.least, min(self.most, room))


def parse_bounds(text: str, name: str, most: int) -> Bounds:
    """The bounds in a text such as "2..8". `name` says what it is, for the message; nothing is above `most`.

    Raises RecipeError.
    """
    found = re.fullmatch(r"\s*([0-9]{1,9})\s*\.\.\s*([0-9]{1,9})\s*", text)
    if found is None:
        raise RecipeError(f"{name} is {shown(text)}; write the least and the most workers, such as '2..8'.")
    bounds = Bounds(int(found[1]), int(found[2]))
    if bounds.least < 1:
        raise RecipeError(f"{name} is {shown(text)}; the least is 1, as a team has at least one worker.")
    if bounds.least > bounds.most:
        raise RecipeError(
            f"{name} is {shown(text)}, whose least is above its most; write '{bounds.most}..{bounds.least}'."
        )
    if bounds.most > most:
        raise RecipeError(f"{name} is {shown(text)}; the most must be at most {most}.")
    return bounds


def room_here(threads: int) -> int:
    """How many workers of so many threads this machine has processors for, of those that this process may use, and at
    least 1. A quota of processor time, as of a container, counts as so many whole processors.
    """
    return max(1, int(min(len(os.sched_getaffinity(0)), *_quotas())) // threads)


def _quotas() -> list[float]:
    """Processors that the control groups of this process may keep busy; the most of all for one without a limit."""
    found = [float(1 << 20)]
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, kinds, path = line.split(":", 2)
            if not kinds:
                own = _GROUPS / path.lstrip("/")
                groups = [own, *own.parents]
                found += [_quota_of(group / "cpu.max") for group in groups if group.is_relative_to(_GROUPS)]
            elif "cpu" in kinds.split(","):
                found.append(_quota_of(_GROUPS / "cpu" / path.lstrip("/"), "cpu.cfs_quota_us", "cpu.cfs_period_us"))
    return found


def _quota_of(path: Path, *files: str) -> float:
    """That of one group, whose file or files say how many microseconds it has of how many."""
    with contextlib.suppress(OSError, ValueError):
        words = " ".join((path / file).read_text() for file in files) if files else path.read_text()
        quota, period = map(int, words.split())  # "max" is no number
        if quota > 0:
            return max(1.0, quota / period)
    return float(1 << 20)
