"""``instep diff``: its flags, and what it shows."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cyclopts import App

from instep.apart.found import Diffed, RunOf
from instep.apart.levels import Field, listed
from instep.cli.flags import Settings, UsageError, check_new_file, refuse, whole_number
from instep.cli.helping import COMMANDS, wrapped
from instep.errors import InstepError, cut, shown
from instep.monitors.terminal import MovingLine
from instep.record.files import json_text

_HELP = """\
First from their tapes, at once; then both are computed again from the nearest kept checkpoints before to the first \
update that differs, whose first operation that gives something else is named, in ulps. Of one run, where it parts \
from what its recipe comes to here. Exit status 1 where anything differs."""


def declare(app: App, settings: Settings) -> None:
    """Adds the command to `app`."""

    @app.command(help=f"{COMMANDS['diff']}\n\n{_HELP}")
    def diff(
        a: Path,
        b: Path | None = None,
        /,
        *,
        tapes: bool = False,
        save: Path | None = None,
        export: Path | None = None,
        updates: str = "",
        json: bool = False,
    ) -> None:
        """Diff.

        Parameters
        ----------
        a
            A run folder, or a file from --export.
        b
            Another; by default the run is compared with its own recipe, computed again here.
        tapes
            Compares the tapes, and computes nothing.
        save
            A new file for both inputs of the operation at which they part; by default one of at most 1 GiB beside the
            first run.
        export
            Compares nothing: writes what run A comes to here into this file, for a comparison on another machine, where
            it would come to something else.
        updates
            Those whose tensors are exported: 51:100. By default all.
        json
            Prints one JSON document at the end.
        """
        refuse(settings)
        if save is not None:
            check_new_file(save, "--save")
        if export is not None:
            check_new_file(export, "--export")
            export_run(a, b, export, updates)
            return
        if updates:
            raise UsageError("--updates goes with --export.")
        if tapes and b is None:
            raise UsageError("--tapes compares two runs; one alone is compared with what it comes to, computed again.")
        show_diff(a, b, tapes, save, json)


def export_run(run: Path, other: Path | None, file: Path, updates: str) -> None:
    """Writes the file for a comparison elsewhere. Raises InstepError."""
    from instep.apart.exported import export

    if other is not None:
        raise UsageError("--export takes one run: the other is compared with the file where it was made.")
    span = None
    if updates:
        first, _, last = updates.partition(":")
        span = whole_number(first, "--updates"), whole_number(last or first, "--updates")
        if span[0] > span[1]:
            raise UsageError(f"--updates is {shown(updates)}; it must be FIRST:LAST, from 1, such as 51:100.")
    with _Progress(sys.stderr) as progress:
        count = export(run, file, span, monitors=[progress])
    print(f"{file}: {count:,} update{'' if count == 1 else 's'} computed")


def show_diff(a: Path, b: Path | None, tapes: bool, save: Path | None, as_json: bool) -> None:
    """Compares and shows what was found. Raises InstepError where anything differs."""
    from instep.apart.diffing import diff

    with _Progress(sys.stderr if as_json else sys.stdout) as progress:
        found = diff(a, b, tapes_only=tapes, save=save, monitors=[progress])
    if as_json:
        print(json_text(found.document()))
    else:
        print()
        print(wrapped(found.sentence))
        for remark in found.remarks:
            print(wrapped(remark))
        if found.goes_on:
            print(wrapped(f"To go on: {found.goes_on}"))
    sys.stdout.flush()
    if not found.same:
        seen, one = found.seen, found.b is None
        if found.verdict == "undecided" and (seen is None or seen.first is None):
            raise _Differs(f"whether the {'run differs' if one else 'runs differ'} is not decided; see above.")
        raise _Differs(f"{'the run differs' if one else 'the runs differ'}; see above.")


class _Differs(InstepError):
    """Something differs, as was shown."""


class _Progress(MovingLine):
    """Shows what the tapes say as soon as it is known, how much will be computed, and on a terminal how far that is."""

    def __init__(self, out: Any) -> None:
        super().__init__()
        self._out, self._stop = out, 0

    def __call__(self, event: Mapping[str, Any]) -> None:
        match event["kind"]:
            case "told":
                print(lines(event["found"]), file=self._out, flush=True)
            case "computing":
                self._stop = event["stop"]
                print(f"\n{wrapped(_to_compute(event['updates'], event['start']))}", file=self._out, flush=True)
            case "computed_again":
                self.show(f"version {event['version']:,} of {self._stop:,}")


def _to_compute(updates: Sequence[int], start: Sequence[int]) -> str:
    parts = [
        f"{count:,} update{'' if count == 1 else 's'} of {name} (from version {first:,})"
        for name, count, first in zip("AB", updates, start, strict=False)
    ]
    if len(parts) == 1:
        parts = [parts[0].replace(" of A", "")]
    return f"To be computed again: {' and '.join(parts)}."


def lines(found: Diffed) -> str:
    """What the tapes show, a line each."""
    rows = [_row("A", _run(found.a))]
    if found.b is None or found.seen is None:
        return "\n".join(rows)
    rows += [_row("B", _run(found.b)), ""]
    rows += [_row("recipe", text) for text in _fields("recipe.", found.fields)] or [_row("recipe", "the same fields")]
    rows.append(_row("data", "the same digest" if found.data else "other training data"))
    made = [_row("made with", text) for text in _fields("", found.made)]
    rows += made or [_row("made with", "the same, as far as both tell")]
    seen = found.seen
    if seen.sums:
        versions = f"{seen.names:,}, in {len(seen.sums):,} version{'' if len(seen.sums) == 1 else 's'}"
        versions += f" ({_some(seen.sums)})"
        state = f"; in {seen.first:,} differs {listed(seen.tensors)}" if seen.tensors else ""
        rows.append(_row("tensors", f"{versions}{state or ': the same'}"))
    else:
        rows.append(_row("tensors", "no version yet of which both tapes have checksums"))
    what = f"; the last of these has another {', '.join(seen.what)}" if seen.what else ""
    rows.append(_row("updates", f"{seen.updates:,}{what or ': the same'}"))
    if seen.digests:
        rows.append(_row("digests", f"{seen.digests:,}{': the same' if 'digest' not in seen.what else ''}"))
    return "\n".join(rows)


def _run(run: RunOf) -> str:
    return f"{cut(run.path)}: {run.about}"


def _fields(before: str, fields: Sequence[Field]) -> list[str]:
    texts = []
    for field in fields:
        a, b = ("not set" if value is None else shown(value) for value in (field.a, field.b))
        texts.append(f"{before}{field.name}: {a} in A, {b} in B{'' if field.decides else ' (decides nothing)'}")
    return texts


def _some(versions: Sequence[int]) -> str:
    several = [f"{version:,}" for version in versions]
    return ", ".join(several if len(several) < 5 else [*several[:2], "...", several[-1]])


def _row(label: str, text: str) -> str:
    return wrapped(text, " " * 11, f"{label:<11}") if text else ""
