"""``instep plan``: its flags, and what it shows."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from cyclopts import App

from instep.budget import parse_share
from instep.cli.cluster import refuse_team
from instep.cli.flags import Settings, UsageError, import_paths, parsed, with_short
from instep.cli.helping import COMMANDS, wrapped
from instep.errors import RecipeError, cut, shown
from instep.monitors.progress import duration, nbytes, number
from instep.monitors.terminal import MovingLine
from instep.record.files import json_text
from instep.rules.rule import UpdateRule
from instep.team.signals import interrupting

if TYPE_CHECKING:
    from instep.planning.found import By, Planned, Way

_HELP = """\
Which update rule, how many workers and how often a checkpoint, for a cluster that a file describes. Timing without \
gradients first, then real gradients on the virtual clock: all ways a little, the better half on, up to a budget of \
work. What the budget cannot decide is told as undecided. Fields of the recipe are set as for train."""

_STATES = ("reached", "open", "beaten", "behind", "slower", "never", "refused")
"""In the order of their lines."""


def declare(app: App, settings: Settings) -> None:
    """Adds the command to `app`."""

    @app.command(help=f"{COMMANDS['plan']}\n\n{_HELP}")
    def plan(
        recipe: str,
        /,
        *,
        cluster: Path,
        target: str,
        by: str = "time",
        rules: str = "",
        workers: str = "",
        seeds: str = "",
        steps: str | None = None,
        budget: str = "25%",
        json: bool = False,
    ) -> None:
        """Plan.

        Parameters
        ----------
        recipe
            A built-in name or a TOML file.
        cluster
            A TOML file that describes the cluster, see docs/plan.md: workers, microbatch, speeds, failures, bandwidth.
        target
            The held-out objective to reach, such as 1.6.
        by
            time or bytes: what is to be least until then.
        rules
            Those to choose from: synchronous,diloco:20,outer_lr=0.5. By default a dozen, with local steps by the length
            of the recipe.
        workers
            Numbers of workers to choose from, the fastest of the cluster: 4,8. By default all, all but slow ones, half.
        seeds
            0,1,2: the first decides who is computed on, the others tell how far chance goes. By default the recipe's
            own and the two after it.
        steps
            Global batches.
        budget
            Of the work of trying all ways to their ends: 25%.
        json
            Prints one JSON document at the end.
        """
        from instep.cli.report import number_of

        if by not in ("time", "bytes"):
            raise UsageError(f"--by is {shown(by)}; it must be time or bytes.")
        settled = with_short(settings, (("steps", "recipe.steps", steps),))
        _plan(recipe, settled, cluster, number_of(target), cast("By", by), rules, workers, seeds, budget, json)


def _plan(
    given: str, settings: Settings, cluster: Path, target: float, by: By, rules: str, workers: str, seeds: str,
    budget: str, as_json: bool,
) -> None:  # fmt: skip
    from instep.cli.compare import seeds_of
    from instep.planning.described import read
    from instep.planning.planning import plan

    refuse_team(settings, "the cluster's file describes the workers: leave it out")
    if any(name.startswith("recipe.rule") for name, _ in settings):
        raise UsageError("the rule is what a plan chooses; give --rules.")
    recipe, _ = parsed(given, settings)
    described = read(cluster)
    try:
        share = parse_share(budget, "--budget")
        chosen = _rules(rules) if rules else []
    except RecipeError as error:
        raise UsageError(error.message) from None
    with interrupting(), _Progress() as progress:
        found = plan(
            recipe, described, target=target, by=by, rules=chosen, workers=_counts(workers, described.workers),
            seeds=seeds_of(seeds, recipe.seed) if seeds else (), budget=share,
            given=[given, *(f"--{name}={text}" for name, text in settings)], monitors=[progress],
            import_paths=import_paths(given),
        )  # fmt: skip
    if as_json:
        print(json_text(found.document()))
    else:
        show(found)
    sys.stdout.flush()


def _rules(text: str) -> list[UpdateRule]:
    from instep.cli.compare import entries_of

    entries = entries_of(text)
    for name, _ in (pair for entry in entries for pair in entry.team):
        raise UsageError(f"--rules sets {cut(name)}, a field of a real team; the cluster's file describes the workers.")
    return [entry.rule for entry in entries]


def _counts(text: str, most: int) -> list[int]:
    parts = [part.strip() for part in text.split(",")] if text else []
    if not all(part.isdecimal() and 1 <= int(part) <= most for part in parts) or len(set(parts)) < len(parts):
        raise UsageError(f"--workers is {shown(text)}; give different whole numbers from 1 to the cluster's {most}.")
    return [int(part) for part in parts]


class _Progress(MovingLine):
    """Shows on stderr what is being computed."""

    def __call__(self, event: Mapping[str, Any]) -> None:
        if event["kind"] == "planning":
            self.show(event["what"])


def show(found: Planned) -> None:
    """The ways, the Pareto front, the verdict and the command."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False)
    table = Table(box=None, pad_edge=False)
    for head in ("rule", "W", "", "to target", "bytes", "objective", "steps"):
        table.add_column(head, no_wrap=head != "rule", justify="left" if head in ("rule", "") else "right")
    for way in filter(_told, _in_order(found)):
        table.add_row(*_row(way, found))
    console.print(table)
    console.print()
    for label, text in _said(found):
        console.print(wrapped(text, "  ", f"{label}: "), soft_wrap=True)
    if found.command:
        console.print(f"Run: {found.command}", soft_wrap=True)


def _said(found: Planned) -> list[tuple[str, str]]:
    work = found.work
    share = f"{100 * work.made / work.all:.3g} %" if work.all else "none"
    said = [
        (
            "Work", f"{work.made:,} global batches with gradients, {share} of the {work.all:,} of trying all, after "
            f"{work.timed} simulations without; {duration(work.cpu_s)} of the processor.",
        ),
    ]  # fmt: skip
    said += [(way.label, way.why) for way in found.ways if way.why]
    slower: dict[int, list[str]] = {}
    for way in found.ways:
        if not _told(way):
            slower.setdefault(way.workers, []).append(way.rule)
    if slower:
        listed = "; ".join(f"W = {workers}: {', '.join(rules)}" for workers, rules in sorted(slower.items()))
        said.append(("Slower by timing alone", f"{listed}."))
    if found.pareto:
        labels = "; ".join(way.label for way in found.pareto)
        said.append(("Pareto", f"of those that reached it, no other beats in time, bytes and objective: {labels}."))
    if found.checkpoints is not None:
        said.append(("Checkpoints", found.checkpoints.why))
    said.append(("Verdict", found.verdict))
    return said


def _told(way: Way) -> bool:
    """Whether it has a line of its own."""
    return way.state != "slower" or bool(way.reached)


def _in_order(found: Planned) -> list[Way]:
    """By what they cost until the target, then by their state."""

    def key(way: Way) -> tuple[bool, float, int, float]:
        cost = way.cost(found.by)
        return cost is None, cost.mean if cost else 0.0, _STATES.index(way.state), way.seconds_all or 0.0

    return sorted(found.ways, key=key)


def _row(way: Way, found: Planned) -> list[str]:
    from instep.report.comparison import figure

    seconds, sent, objective = (way.over_seeds(what) for what in ("seconds", "bytes", "objective"))
    said = "pick" if way is found.pick else "undecided" if way in found.undecided else way.state
    return [
        way.rule, str(way.workers), said, "" if seconds is None else figure(seconds, duration),
        "" if sent is None else nbytes(round(sent.mean)),
        number(objective.mean) if objective else (f"({number(way.lowest)})" if way.lowest is not None else ""),
        str(way.computed),
    ]  # fmt: skip
