"""What the client asks of the processes that it starts. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from instep.recipe import Team
from instep.rules import UpdateRule
from instep.team.pickling import Pickled


@dataclass(frozen=True)
class Request:
    """One run. `recipe` is pickled, into memory that all workers map, so that only they run the user's code;
    `recipe_table` and `recipe_file`, the file to save, are for the record.

    `fingerprints` are those with none of the recipe's changes, with the first, and so on. `notices` are sentences to
    warn with at the start.

    `began`, in seconds on the machine's monotonic clock, is the zero of the tape's times.
    """

    recipe: Pickled
    recipe_table: Mapping[str, Any]
    recipe_file: str
    fingerprint: str
    team: Team
    rule: UpdateRule
    engine: str
    folder: Path
    resumed: bool
    import_paths: tuple[str, ...]
    began: float
    fingerprints: tuple[str, ...] = ()
    notices: tuple[str, ...] = ()
