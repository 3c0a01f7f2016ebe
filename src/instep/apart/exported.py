"""A run computed again on the machine that made it, as a file: what another machine needs to find where it parts."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from instep.apart.sides import FoundAgain, Side
from instep.apart.told import FIGURES, Told, told
from instep.api import monitors_of
from instep.errors import RecordError, cut
from instep.monitors import Monitor
from instep.offline.past import Past
from instep.recipe import Recipe
from instep.record.computed_by import libraries, made_otherwise, processor
from instep.record.files import json_text, write_atomically
from instep.record.shapes import ANY_TABLE, COUNT, TEXT, All, Each, Shape, Table, misfit
from instep.team.client import computed
from instep.team.signals import interrupting

_KIND, _SCHEMA = "a run for instep diff", 1

_START: dict[str, Shape] = {
    "recipe": ANY_TABLE, "team": ANY_TABLE, "libraries": All(TEXT), "processor": TEXT, "version": COUNT, "cut": COUNT,
    **dict.fromkeys(("engine", "fingerprint", "data_digest"), TEXT),
}  # fmt: skip
_TOLD = Table(
    {
        "path": TEXT, "ended": TEXT, "torn": TEXT, "last": COUNT, "sums": All(All(TEXT)), "digests": All(TEXT),
        "starts": Each(Table(_START, needed=tuple(set(_START) - {"processor"}))), "workers": ANY_TABLE,
        "updates": All(Table(needed=tuple(FIGURES))), "contributions": All(Each(Each(TEXT))),
    },
    needed=("path", "starts", "last"),
)  # fmt: skip
"""What is read of such a file, as `Told` has it."""


@interrupting()
def export(
    run: str | os.PathLike[str],
    file: str | os.PathLike[str],
    updates: tuple[int, int] | None = None,
    *,
    recipe: Recipe | None = None,
    monitors: Iterable[Monitor] = (),
) -> int:
    """Writes into `file` what the run's tape tells, and checksums of all tensors after each of these updates.

    updates: the first and the last, by default all. Returns how many were computed. Raises RecordError where the run
    has no such updates, was made otherwise than with what is here, or comes to something else than its tape tells.
    """
    watching = monitors_of(monitors)
    found = told(run)
    unlike = next(filter(None, map(made_otherwise, found.starts)), "")
    if unlike:
        raise RecordError(
            f"{cut(run)} was made with {unlike}, so what is computed here would not be what it was; export it where it "
            f"was made."
        )
    first, last = updates or (1, found.last)
    past = Past.of(run, recipe, f"diff({str(run)!r}, recipes=[recipe])")
    stretch = past.to(last, first - 1)
    for monitor in watching:
        monitor({"kind": "computing", "updates": [stretch.updates], "start": [stretch.start], "stop": last})
    side = Side(past.recipe, stretch, past.import_paths, found.sums, found.updates)
    with tempfile.TemporaryDirectory(prefix="instep-diff-", ignore_cleanup_errors=True) as place:
        again: FoundAgain = computed(
            "instep.apart.again:compute_again", past.recipe, ([side], first - 1, False, Path(place), None),
            past.import_paths, watching, if_killed="it takes the memory of one worker: try it where there is more",
        )  # fmt: skip
    if again.away is not None:
        raise RecordError(
            f"{cut(run)} departs from its own recipe at update {again.away.version:,}, so it is not exported; see "
            f"instep diff {cut(run)}."
        )
    found.sums |= again.sums[0]
    document = {
        "kind": _KIND, "schema": _SCHEMA, "told": asdict(found),
        "libraries": libraries(), "processor": processor(),
    }  # fmt: skip
    write_atomically(Path(file), json_text(document).encode() + b"\n")
    return stretch.updates


def read(file: str | os.PathLike[str]) -> Told:
    """What such a file tells. Raises RecordError for one that is none."""
    try:
        document = json.loads(Path(file).read_bytes())
        if document["kind"] != _KIND or document["schema"] != _SCHEMA:
            raise KeyError
        if misfit(document["told"], _TOLD) is not None or not document["told"]["starts"]:
            raise ValueError
        return _told(document["told"])
    except OSError as error:
        raise RecordError(f"{cut(file)} cannot be read: {error.strerror}; check the path.") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise RecordError(
            f"{cut(file)} is neither the folder of a run nor a file that instep diff RUN --export FILE has written; "
            f"give one of these."
        ) from None


def _told(table: Mapping[str, Any]) -> Told:
    """JSON has texts for numbers that are keys, and lists for tuples."""
    fields = dict(table)
    for name in ("updates", "sums", "digests", "arrivals", "contributions", "ranges", "pushed", "workers"):
        fields[name] = {int(key): value for key, value in fields[name].items()}
    fields["arrivals"] = {version: [tuple(each) for each in found] for version, found in fields["arrivals"].items()}
    return Told(**fields | {"exported": True})
