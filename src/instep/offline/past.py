"""A run as its folder tells of it, to compute it again. No torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from instep.offline.stretches import Stretch, in_place, stretch_to, that_count
from instep.recipe import Recipe
from instep.record import tape
from instep.record.folder import RunFolder
from instep.record.resuming import recorded, saved


@dataclass(frozen=True)
class Past:
    """events: those of its tape that count. import_paths: where its modules were looked for."""

    folder: RunFolder
    recipe: Recipe
    import_paths: tuple[str, ...]
    events: tuple[Mapping[str, Any], ...]

    @classmethod
    def of(cls, run: str | os.PathLike[str], recipe: Recipe | None, call: str) -> Past:
        """Of the run folder `run`. recipe: needed where the saved one holds objects without an address.

        call: of `instep`, with the recipe, for who has to give it. Raises RecordError, RecipeError, CheckpointError.
        """
        folder = RunFolder.open(Path(run))
        table, _, paths = saved(folder, recipe, None, call)
        recipe = recorded(folder, recipe, table, replaying=True)
        events = that_count(in_place(tape.read(folder.tape_path)), recipe.fingerprints())
        return cls(folder, recipe, tuple(paths), tuple(e for e in events if e["kind"] not in ("computed", "evaluated")))

    def to(self, version: int, most: int | None = None) -> Stretch:
        """What must be computed to know `version`: see `stretch_to`. Raises RecordError."""
        return stretch_to(self.folder, self.events, version, most)
