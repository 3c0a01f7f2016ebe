"""Which checkpoint has the best held-out objective: `best.json` beside the checkpoints names it, and it is kept."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import NamedTuple

from instep.errors import RecordError
from instep.record.files import json_text, write_atomically
from instep.record.shapes import BEST, misfit

NAME = "best.json"

_REMEDY = "restore it, or take it away: then the next evaluation is taken for the best"


class Best(NamedTuple):
    """A version and its objective on held-out data."""

    version: int
    objective: float


def read(folder: Path) -> Best | None:
    """The best checkpoint in `folder`, or None where none is known. Raises RecordError where the file is damaged."""
    path = folder / NAME
    try:
        table = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise RecordError(f"{path} cannot be read as JSON ({error}); {_REMEDY}.") from None
    wrong = misfit(table, BEST)
    if wrong is not None:
        raise RecordError(f"{path} is not as it was written: {wrong}; {_REMEDY}.")
    return Best(table["version"], float(table["objective"]))


def is_best(folder: Path, version: int, objective: float) -> bool:
    """Whether `objective` at `version` is below that of the best so far. One that is not finite never is.

    What is known of a later version is of a history that was taken back, and does not count.
    """
    known = read(folder)
    return math.isfinite(objective) and (known is None or known.version >= version or objective < known.objective)


def mark(folder: Path, version: int, objective: float) -> None:
    """Notes that the checkpoint of `version`, which is there, is the best. Raises ResourceError."""
    write_atomically(folder / NAME, json_text({"version": version, "objective": objective}).encode() + b"\n")
