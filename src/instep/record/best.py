"""Which checkpoint has the best held-out objective: `best.json` beside the checkpoints names it, and it is kept.

So is the best of each average of the weights (`Recipe.ema`), which `best-ema-0.999.json` names, by decay.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from instep.errors import RecordError
from instep.record.files import json_text, write_atomically
from instep.record.shapes import BEST, misfit

NAME = "best.json"

_REMEDY = "restore it, or take it away: then the next evaluation is taken for the best"


class Best(NamedTuple):
    """A version and its objective on held-out data."""

    version: int
    objective: float


def read(folder: Path, average: str = "") -> Best | None:
    """The best checkpoint in `folder`, by the weights or by an `average` of them, which its decay names; None where
    none is known. Raises RecordError where the file is damaged.
    """
    return _read(folder / _name(average))


def versions(folder: Path) -> set[int]:
    """Those of the best checkpoints, by the weights and by averages. Raises RecordError where a file is damaged."""
    found = map(_read, sorted(folder.glob("best*.json")))
    return {each.version for each in found if each is not None}


def _name(average: str) -> str:
    return f"best-ema-{average}.json" if average else NAME


def _read(path: Path) -> Best | None:
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


def better(folder: Path, version: int, evaluated: Mapping[str, Any]) -> dict[str, float]:
    """Of what was `evaluated` at `version`, as its event tells it: the objectives of the weights, as "", and of their
    averages, by decay, that are below those of the best so far. One that is not finite never is.

    What is known of a later version is of a history that was taken back, and does not count.
    """
    averages = {average: told["objective"] for average, told in evaluated.get("ema", {}).items()}
    found = {}
    for average, objective in {"": evaluated["objective"], **averages}.items():
        known = read(folder, average)
        below = known is None or known.version >= version or objective < known.objective
        if math.isfinite(objective) and below:
            found[average] = objective
    return found


def mark(folder: Path, version: int, objective: float, average: str = "") -> None:
    """Notes that the checkpoint of `version`, which is there, is the best. Raises ResourceError."""
    text = json_text({"version": version, "objective": objective})
    write_atomically(folder / _name(average), text.encode() + b"\n")
