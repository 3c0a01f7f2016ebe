"""`instep.check`: every equivalence of a recipe, tried in processes of their own. No torch."""

from __future__ import annotations

import os
import resource
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from instep.api import folders_of, monitors_of
from instep.equivalences.claims import CLAIMS, REFUSED
from instep.equivalences.found import Checked, Equivalence
from instep.equivalences.real import NAME, with_processes
from instep.errors import RecipeError, shown
from instep.monitors import Monitor
from instep.recipe import Recipe
from instep.tables import suggest
from instep.team.client import computed
from instep.team.signals import interrupting


@interrupting()
def check(
    recipe: Recipe,
    *,
    only: Sequence[str] = (),
    monitors: Iterable[Monitor] = (),
    import_paths: Sequence[str | os.PathLike[str]] = (),
) -> Checked:
    """Tries on `recipe` what Instep promises of any: each equivalence is proved, refuted, or not run for a reason.

    >>> found = instep.check(recipe, only=["data", "full batch"])
    >>> found.proved, found["full batch"].verdict
    (True, 'proved')

    A few steps each, from the recipe's own first weights. What is refuted has the first step, tensor and operation, as
    far as they are found, and the likely cause in a sentence; what Instep refuses is refuted with that sentence. `str`
    of the answer is a table, `document()` what ``instep check --json`` prints.

    only: names of equivalences, see docs/check.md; () for all. "recipe" always comes first.
    monitors: called with ``{"kind": "checking", "name": ...}`` before each, with ``"checked"`` and the verdict after.
    import_paths: as for `instep.train`. Raises RecipeError for a name that there is not, and KeyboardInterrupt.
    """
    if not isinstance(recipe, Recipe):
        raise RecipeError(f"'recipe' is {shown(recipe)}; it must be an instep.Recipe.")
    wanted = names_of(only)
    watching, paths = monitors_of(monitors), folders_of(import_paths)
    began, used = time.monotonic(), _cpu_s()
    in_forks = [name for name in wanted if name != NAME]
    with tempfile.TemporaryDirectory(prefix="instep-check-", ignore_cleanup_errors=True) as place:
        found: list[Equivalence]
        found, libraries = computed(
            "instep.equivalences.proving:prove", recipe, (in_forks, Path(place)), paths, watching,
            if_killed="a check takes the memory of four workers: try it where there is more",
        )  # fmt: skip
        if NAME in wanted:
            found.append(_real(recipe, paths, found[0], watching, Path(place)))
    took_s, cpu_s = time.monotonic() - began, _cpu_s() - used
    return Checked(recipe.name, recipe.fingerprint(), tuple(found), took_s, cpu_s, libraries)


def names_of(only: Sequence[str]) -> list[str]:
    """The equivalences of these names, in their order; all for (). Raises RecipeError."""
    if isinstance(only, str):
        only = [only]
    for name in only:
        if name not in CLAIMS:
            raise RecipeError(f"there is no equivalence {shown(name)}{suggest(str(name), CLAIMS, 'there are')}")
    return [name for name in CLAIMS if not only or name in only]


def _real(
    recipe: Recipe, paths: Sequence[str], first: Equivalence, monitors: Sequence[Monitor], folder: Path
) -> Equivalence:
    began = time.monotonic()
    _tell(monitors, {"kind": "checking", "name": NAME, "claim": CLAIMS[NAME]})
    if first.verdict == "refuted":
        found = Equivalence(NAME, CLAIMS[NAME], "not run", why=f"{REFUSED}: see '{first.name}'.")
    else:
        found = with_processes(recipe, folder / NAME, paths)
    _tell(monitors, {"kind": "checked", "name": NAME, "verdict": found.verdict})
    return replace(found, took_s=round(time.monotonic() - began, 3))


def _tell(monitors: Sequence[Monitor], event: dict[str, Any]) -> None:
    for monitor in monitors:
        monitor(event)


def _cpu_s() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)
