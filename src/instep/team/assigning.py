"""What an agent gives to the processes of a team as it forks them, by what the team is at present. No torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from instep.record.held import Identity
from instep.team.messages import Assignment, HostNetwork, Request
from instep.team.orders import Regroup
from instep.team.regroup_messages import NextGroup
from instep.team.remembered import Remembered
from instep.team.roster import Roster


def as_it_is(run: Request, roster: Roster) -> Request:
    """The run with as many workers as the team has now: in lockstep that may have changed since its start."""
    return run if run.engine == "server" else replace(run, team=replace(run.team, workers=roster.size))


def assignment_of(
    run: Request,
    roster: Roster,
    resume_from: Path | None,
    network: HostNetwork | None,
    identity: Identity,
    run_id: str | None,
    remembered: Remembered | None,
    *,
    late: bool,
) -> Assignment:
    """For the processes of a start; late: for one that comes while others go on."""
    serving = run.engine == "server"
    return Assignment(
        recipe=run.recipe,
        team=as_it_is(run, roster).team,
        folder=run.folder,
        fingerprints=run.fingerprints or (run.fingerprint,),
        resume_from=resume_from,
        serving=serving,
        began=run.began,
        first=resume_from is None and roster.epoch == 1 and not (late and serving),
        run_id=run_id,
        identity=identity,
        network=network,
        written=tuple(sorted(roster.written)),
        remembered=None if late else remembered,
        generation=roster.generation if late and network is None else 0,
        numbers=roster.numbers if late and network is None and not serving else (),
    )


def for_successor(assignment: Assignment) -> Assignment:
    """For who comes in the place of one that was lost, while the others go on; over hosts in a later group."""
    late = assignment.network is not None and not assignment.serving
    return replace(assignment, resume_from=None, late=late, succeeds=True)


def next_group(
    group: Regroup, told: int, saved: int, memory: tuple[int, int], remembered: Remembered | None
) -> NextGroup:
    """What those in it are told of it. memory: the descriptor and the inode of what those of one host share."""
    return NextGroup(
        group.generation,
        numbers=tuple(member.number for member in group.members),
        incarnations=tuple(member.incarnation for member in group.members),
        hosts=tuple(member.host for member in group.members),
        told=told,
        saved=saved,
        memory=memory[0],
        inode=memory[1],
        fresh=group.fresh,
        remembered=remembered,
    )


def for_later(assignment: Assignment, workers: int) -> Assignment:
    """For workers that are to be in a later group, of so many."""
    return replace(assignment.of_team(workers), resume_from=None, first=False, late=True, numbers=())
