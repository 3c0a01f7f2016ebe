"""What the client asks of the supervisor. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from instep.recipe import Team


@dataclass(frozen=True)
class Request:
    """One run. `recipe` is pickled, so that only workers run the user's code; `recipe_table` and
    `recipe_file`, the file to save, are for the record.

    `began`, in seconds on the machine's monotonic clock, is the zero of the tape's times.
    """

    recipe: bytes
    recipe_table: Mapping[str, Any]
    recipe_file: str
    fingerprint: str
    team: Team
    folder: Path
    resumed: bool
    import_paths: tuple[str, ...]
    began: float
