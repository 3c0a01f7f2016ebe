"""``instep verify``: its flags, and what it shows."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cyclopts import App

from instep.budget import parse_share
from instep.cli.flags import Settings, refuse, whole_number
from instep.cli.helping import COMMANDS
from instep.errors import InstepError
from instep.record.files import json_text
from instep.record.receipt import Verified

_HELP = """\
Draws parts of the run between kept checkpoints, computes them again from the checkpoint before, here and by one \
process, and compares all that the tape and the checkpoints tell: digests, checksums of each tensor, objectives. Exit \
status 1 where something is wrong, 3 where nothing can be compared here, as on another kind of processor."""


def declare(app: App, settings: Settings) -> None:
    """Adds the command to `app`."""

    @app.command(help=f"{COMMANDS['verify']}\n\n{_HELP}")
    def verify(run: Path, /, *, sample: str = "1%", seed: str | None = None, json: bool = False) -> None:
        """Verify.

        Parameters
        ----------
        run
            A run folder.
        sample
            The share of its steps to compute again: 1%, or 100% for all.
        seed
            Of the draw; by default another one each time, which is printed.
        json
            Prints one JSON document at the end.
        """
        refuse(settings)
        share = parse_share(sample, "--sample")
        verify_run(run, share, None if seed is None else whole_number(seed, "--seed"), json)


def verify_run(run: Path, share: float, seed: int | None, as_json: bool) -> None:
    """Verifies it and prints the receipt. Raises InstepError where something is wrong."""
    from instep.api import verify

    found = verify(run, sample=share, seed=seed, monitors=[_show])
    print(json_text(found.document()) if as_json else found)
    sys.stdout.flush()
    if found.verdict == "wrong":
        raise InstepError(_wrong(run, found))


def _show(event: Mapping[str, Any]) -> None:
    verdict = "wrong" if event["why"] else "the same"
    print(f"versions {event['start']:,} to {event['stop']:,}: {verdict}", file=sys.stderr, flush=True)


def _wrong(run: Path, found: Verified) -> str:
    if not found.wrong:
        return f"the run {run} is not what its recipe gives: {found.problems[0]}"
    first, others = found.wrong[0], len(found.wrong) - 1
    more = f" {others} more of the spans {'are' if others > 1 else 'is'} wrong too." if others else ""
    return (
        f"the run {run} is not what its recipe gives, between version {first.start:,} and version {first.stop:,}: "
        f"{first.why}{more}"
    )
