"""What the processes of a team must have in common, and sentences on what they have not, and of the roster."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from instep.sources import first_difference
from instep.team.messages import FoundWritten, FoundWrong
from instep.team.orders import Lost, Member


@dataclass
class Digests:
    """The digests of workers' weights, by version, until all have told theirs."""

    _told: dict[int, dict[int, str]] = field(default_factory=dict)

    def compare(self, number: int, version: int, digest: str, workers: int) -> int | None:
        """Notes a worker's; the number of one that has told another of this version, None where there is none."""
        told = self._told.setdefault(version, {})
        told[number] = digest
        first = next(iter(told))
        if digest != told[first]:
            return first
        if len(told) == workers:
            del self._told[version]
        return None


def difference(
    own: Mapping[str, Any], leads: Mapping[str, Any], who: str, leader: str, names: Collection[str] | None = None
) -> str:
    """A sentence on what `who` starts from and the leader does not, of these `names` or all; "" if there is nothing.

    own, leads: the facts of both.
    """
    if file := first_difference(leads.get("sources", {}), own.get("sources", {})):
        differ = ", and read from the environment what is to differ" if file.startswith(("module ", "script ")) else ""
        return (
            f"{who} has another {file} than {leader}, and the result would be that of neither; give all hosts the "
            f"same files{differ}."
        )
    for name, value in leads.items():
        if name in own and name != "sources" and own[name] != value and (names is None or name in names):
            samples = ", and each sample on its index besides" if name == "data" else ""
            files = "; all hosts need the same files" if "sources" in leads else ""
            return (
                f"{who} starts from other {name} than {leader} ({own[name]} instead of {value}); what builds them "
                f"must depend on its arguments and the seed alone{samples}{files}."
            )
    return ""


def first_written(names: Sequence[str], where: str) -> str:
    """A sentence on parameters that forwards were found to write, of which nobody knew."""
    others = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return (
        f"a forward wrote parameter '{names[0]}'{others} for the first time in {where}; the team goes back "
        f"to its last checkpoint, each worker with a copy of its own of what is written, as if so from the start."
    )


def known_written(names: Sequence[str], where: str) -> str:
    """A sentence on parameters that were found again."""
    return (
        f"a forward wrote parameter '{names[0]}' in {where}, which was known to be written; this is a fault of Instep, "
        f"please report it."
    )


def drifted(who: str, other: str, version: int) -> str:
    """A sentence on a worker in lockstep that has other weights than another one."""
    return (
        f"{who} has other weights than {other} at version {version}, which lockstep rules out: some code depends on "
        f"more than the batch and the seed (a clock, a set's order, threads), or the machine is faulty."
    )


def refuted(found: FoundWrong) -> str:
    """A sentence on a worker that has computed a microbatch wrong, as an audit has found: why it ends."""
    return (
        f"worker {found.worker} computed microbatch {found.microbatch} of step {found.version + 1} wrong: {found.by} "
        f"both came to another result; the weights after version {found.since}, when it was last seen to be right or "
        f"began, are uncertain, and are computed again."
    )


def cause_of(found: FoundWritten | FoundWrong, members: Sequence[Member]) -> FoundWritten | Lost:
    """Why an epoch ends in which a process has found this: a worker that was wrong is lost."""
    return found if isinstance(found, FoundWritten) else Lost(members[found.worker], refuted(found))


def too_often(why: str, restarts: int) -> str:
    """What is said of the loss of a process, by the sentence `why`, where no restart is allowed any more."""
    return f"{why.rstrip('.')}; the team has started again {restarts} times, as often as team.restarts allows."


TOO_LATE = "the run has ended before it could take part."
"""Of a worker that came while the others went on."""


ELSEWHERE = "another worker has come in its place on another host."
"""Of a worker that leaves a team which has as many as before."""


def fewer(workers: int) -> str:
    """What is said of a worker that leaves a team which goes on with so many."""
    return f"the team goes on with {workers} worker{'s' if workers > 1 else ''}."


def too_large(workers: int, why: str, before: int) -> str:
    """What is said of a team that was to have so many workers and has `before` again, by the sentence `why`."""
    return f"the team cannot have {workers} workers, and goes on with {before}: {why}"


def no_stand_in(why: str) -> str:
    """What is said where nobody can do the part of a worker that died."""
    return f"{why}, so that the team goes back to its last checkpoint."
