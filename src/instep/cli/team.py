"""``instep team``: its flags, and what it shows."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from cyclopts import App

from instep.cli.flags import Settings, UsageError, refuse, whole_number
from instep.cli.helping import COMMANDS
from instep.errors import RecordError, WorkerError, clean, shown
from instep.monitors.progress import clock, duration, rate
from instep.monitors.terminal import is_live
from instep.recipe import MOST_WORKERS
from instep.record.files import json_text
from instep.team.asking import resized, stacks_of, standing_of

LOOK_S = 0.5
"""Seconds between two looks of a terminal."""

SILENT_S = 60.0
"""Seconds without an answer that a terminal waits for the next one."""

LEFT = 5
"""Of those who have left, how many are shown, the last ones."""

_STATES = {
    "starting": "starting",
    "training": "training",
    "ended": "ended",
    "interrupted": "interrupted",
    "failed": "failed",
    "killed": "ended in the middle, killed or cut off",
    "nothing": "has trained nothing: it starts just now, or was ended before",
}

_HELP = """\
On a terminal it is shown anew twice a second, until the run ends; elsewhere once. Only the owner of a run that goes \
on may ask it, on the machine that has its folder."""


def declare(app: App, settings: Settings) -> None:
    """Adds the command to `app`."""

    @app.command(help=f"{COMMANDS['team']}\n\n{_HELP}")
    def team(
        run: Path,
        /,
        *,
        workers: str | None = None,
        stacks: bool = False,
        worker: str | None = None,
        json: bool = False,
    ) -> None:
        """Team.

        Parameters
        ----------
        run
            The folder of a run.
        workers
            Lets the run go on with so many: after the present step it is saved, and the team starts anew. The result
            is the same.
        stacks
            Once, with the Python stacks of the workers that are stuck: of those that are stopped, or at one thing for
            more than a second. By py-spy where it is there, else the worker shows it itself, in about a millisecond.
        worker
            With --stacks, the stack of this worker.
        json
            Prints one JSON document.
        """
        refuse(settings)
        if worker is not None and not stacks:
            raise UsageError("--worker says whose stack is shown; it goes with --stacks.")
        if workers is not None:
            if stacks or json:
                raise UsageError("--workers changes the team, and shows nothing; give it alone.")
            if ".." in workers:
                raise UsageError(
                    f"--workers is {shown(workers)}; a run that goes on is given a number, and bounds when it starts "
                    f"or is resumed (instep train)."
                )
            print(_text([_resized(run, whole_number(workers, "--workers"))]))
        elif stacks:
            found = stacks_of(run, None if worker is None else whole_number(worker, "--worker"))
            print(json_text(found) if json else _text([*lines(found), *stack_lines(found)]))
        elif json:
            print(json_text(standing_of(run)))
        elif is_live(sys.stdout):
            _watch(run)
        else:
            print(_text(lines(standing_of(run))))


def _resized(run: Path, workers: int) -> str:
    """Has the run go on with so many workers, and says so. Raises UsageError where it cannot."""
    if not 1 <= workers <= MOST_WORKERS:
        raise UsageError(f"--workers is {workers}; a team has from 1 to {MOST_WORKERS}. Ctrl-C ends a run, saved.")
    try:
        answer = resized(run, workers)
    except RecordError as error:
        raise UsageError(error.message) from None
    if answer["before"] == workers:
        return f"{run} has {workers} workers already."
    return f"{run} goes on with {workers} workers instead of {answer['before']} after the present step."


def _watch(run: Path) -> None:
    """Shows it again and again, until the run has ended."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console(highlight=False, markup=False, emoji=False)
    found, heard_s = standing_of(run), time.monotonic()
    with Live(console=console, auto_refresh=False, transient=True) as live:
        while found["state"] in ("starting", "training"):
            shown = list(lines(found))[: max(1, console.height - 1)]
            live.update(Text(_text(shown), no_wrap=True, overflow="crop"), refresh=True)
            time.sleep(LOOK_S)
            try:
                found, heard_s = standing_of(run), time.monotonic()
            except WorkerError:  # who ends, or starts the team anew, answers nobody
                if time.monotonic() - heard_s > SILENT_S:
                    raise
    print(_text(lines(found)))


def _text(shown: Iterable[str]) -> str:
    """These lines, without what a terminal would obey: others have written some of it."""
    return clean("\n".join(shown), keep="\n")


def lines(found: Mapping[str, Any]) -> Iterator[str]:
    """What is shown of the document. The first line of a run that does not go on says how it has ended."""
    steps = f"step {found['step']:,}" + (f" of {found['steps']:,}" if found["steps"] else "")
    restarts = found["restarts"] or 0
    more = f", {restarts} restart{'' if restarts == 1 else 's'}" if restarts else ""
    version = f"version {found['version']:,}, {clock(found['t_s'])}"
    yield f"{found['run']}: {_STATES[found['state']]}, {steps}, {version}{more}"
    if found.get("why"):
        yield found["why"]
    members = found["members"]
    hosts = {each["host"]: each["host_name"] for each in members if each["host"]}
    if members:
        yield "  ".join(
            (f"{'worker':<6}", *(["host"] if hosts else []), f"{'pid':>7}", f"{'there':>7}", "samples/s", "now")
        )
    for each in members:
        who = "server" if each["worker"] is None else str(each["worker"])
        host = [f"{each['host']:>4}"] if hosts else []
        speed = rate(each["samples_per_s"]) if each["samples_per_s"] else ""
        yield "  ".join(
            (f"{who:<6}", *host, f"{each['pid']:>7}", f"{clock(each['for_s']):>7}", f"{speed:>9}", now(each))
        )
    yield from _loaders(found.get("loaders", ()), hosts=bool(hosts))
    for host, name in sorted(hosts.items()):
        yield f"host {host} is {name or 'not known yet'}"
    for each in found["left"][-LEFT:]:
        yield f"left at {clock(each['t_s'])}: {each['why']}"


def _loaders(loaders: Iterable[Mapping[str, Any]], *, hosts: bool) -> Iterator[str]:
    """A line for each loader, if there are some."""
    head = "  ".join(
        (f"{'loader':<6}", *(["host"] if hosts else []), f"{'pid':>7}", f"{'read':>7}", f"{'ahead':>9}", "now")
    )
    for place, each in enumerate(loaders):
        if not place:
            yield head
        host = [f"{each['host']:>4}"] if hosts else []
        doing = "stopped (SIGSTOP or a debugger)" if each["stopped"] else each["doing"] or "waits until more is wanted"
        died = f"; {each['died']} died before" if each["died"] else ""
        counts = f"{each['read']:>7,}", f"{each['ahead']:>9,}"
        yield "  ".join((f"{each['loader']:<6}", *host, f"{each['pid']:>7}", *counts, f"{doing}{died}"))


def stack_lines(found: Mapping[str, Any]) -> Iterator[str]:
    """The stacks that were asked for, and why one is not there."""
    wanted = [each for each in found["members"] if each["stack_wanted"]]
    if found["members"] and not wanted:
        yield "no worker is stuck; --worker N shows the stack of any."
    for each in wanted:
        yield ""
        if each["stack"]:
            yield f"{each['name']}, by {each['stack_by']}:"
            yield each["stack"].rstrip()
        elif each["stopped"]:
            yield f"{each['name']} is stopped (SIGSTOP or a debugger), and shows its stack once it goes on."
        else:
            yield f"{each['name']} has shown no stack: it starts or ends, or the kernel holds it (a disk, a driver)."


def now(member: Mapping[str, Any]) -> str:
    """What a member does, and since when."""
    if member["stopped"]:
        return "stopped (SIGSTOP or a debugger)"
    if member["waits_for"]:
        waits = member["waits_for"]
        others = f" and {len(waits) - 1} more" if len(waits) > 1 else ""
        seconds = member["waits_for_s"]
        return f"waits for {waits[0]}{others}" + (f", for {_seconds(seconds)}" if seconds is not None else "")
    if member["doing"] == "done":
        return "done"
    return f"{member['doing'] or 'starting'}, for {_seconds(member['doing_for_s'])}"


def _seconds(seconds: float) -> str:
    return duration(seconds) if seconds < 10 else f"{seconds:.0f} s" if seconds < 60 else clock(seconds)
