"""``instep check``: its flags, and what it shows."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from cyclopts import App

from instep.cli.cluster import refuse_team
from instep.cli.flags import Settings, UsageError, import_paths, parsed
from instep.cli.helping import COMMANDS, wrapped
from instep.equivalences.found import Checked, Equivalence
from instep.errors import InstepError, RecipeError
from instep.monitors.terminal import MovingLine
from instep.record.files import json_text

_HELP = """\
A few steps each: any number of workers, the whole batch in one process, saved and resumed, recomputed, replayed, a \
worker killed. What fails is narrowed to the first step, tensor and operation, with the likely cause. Fields of the \
recipe are set as for train. Exit status 1 where something is refuted."""


def declare(app: App, settings: Settings) -> None:
    """Adds the command to `app`."""

    @app.command(help=f"{COMMANDS['check']}\n\n{_HELP}")
    def check(recipe: str, /, *, only: str = "", json: bool = False) -> None:
        """Check.

        Parameters
        ----------
        recipe
            A built-in name or a TOML file.
        only
            Some of the equivalences: workers,resume. By default all.
        json
            Prints one JSON document at the end.
        """
        check_recipe(recipe, settings, only, json)


def check_recipe(given: str, settings: Settings, only: str, as_json: bool) -> None:
    """Checks it and shows what was found. Raises InstepError where something is refuted."""
    from instep.equivalences.checking import check, names_of

    refuse_team(settings, "a check picks its teams itself: leave it out")
    recipe, _ = parsed(given, settings)
    names = [name.strip() for name in only.split(",")] if only else []
    try:
        names = names_of(names)
    except RecipeError as error:
        raise UsageError(f"--only: {error.message}") from None
    with _Progress(len(names) + ("recipe" not in names)) as progress:
        found = check(recipe, only=names, monitors=[progress], import_paths=import_paths(given))
    if as_json:
        print(json_text(found.document()))
    else:
        show(found)
    sys.stdout.flush()
    if found.refuted:
        broken = ", ".join(each.name for each in found.refuted)
        raise InstepError(f"of recipe {recipe.name} is refuted: {broken}; see above.")


class _Progress(MovingLine):
    """Shows on stderr what is being checked: a line that moves on a terminal, lines elsewhere."""

    def __init__(self, total: int) -> None:
        super().__init__()
        self._total, self._done = total, 0

    def __call__(self, event: Mapping[str, Any]) -> None:
        if event["kind"] == "checking":
            text = f"checking {self._done + 1} of {self._total}: {event['claim']}"
            self.show(text)
            if not self.moves:
                print(text, file=sys.stderr, flush=True)
        elif event["kind"] == "checked":
            self._done += 1


def show(found: Checked) -> None:
    """The table, what is to be said of each that is not proved, and the verdict."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False)
    table = Table(box=None, pad_edge=False)
    for head in ("equivalence", "verdict", "compared"):
        table.add_column(head, no_wrap=head != "compared")
    table.add_column("seconds", justify="right", no_wrap=True)
    for each in found:
        table.add_row(each.name, each.verdict, str(each.compared), f"{each.took_s:.1f}")
    console.print(table)
    for each in found:
        if text := _more(each):
            console.print()
            console.print(wrapped(text, "  ", f"{each.name}: "), soft_wrap=True)
    console.print()
    took = f"{found.took_s:.0f} s, {found.cpu_s:.0f} s of the processor"
    console.print(f"{found.verdict} {took}.", soft_wrap=True)


def _more(each: Equivalence) -> str:
    place = f" ({each.place})" if each.place is not None and str(each.place) else ""
    parts = {"proved": each.note, "not run": f"not run, for {each.why}"}
    return parts.get(each.verdict, f"{each.claim}: refuted{place}. {each.why} {each.note}".rstrip())
