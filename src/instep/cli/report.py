"""What ``instep report`` does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from instep.cli.flags import UsageError, check_new_file
from instep.ema import name_of
from instep.errors import shown
from instep.record.files import json_text
from instep.report.comparison import Comparison, compare, doubts, facts, verdict
from instep.report.reading import read_all
from instep.tables import suggest


def report(runs: Sequence[Path], out: Path, target: str | None, as_json: bool) -> None:
    """Shows the verdict and its table, and writes the page; with `as_json` prints one document instead."""
    if not runs:
        raise UsageError("report takes the folders of runs: instep report runs/A runs/B.")
    wanted = None if target is None else number_of(target)
    if not as_json:
        check_out(out)
    tell(compare(read_all(runs), wanted), out, as_json)


def tell(found: Comparison, out: Path, as_json: bool) -> None:
    """Writes the page `out` and shows the table; with `as_json` prints one document instead."""
    if as_json:
        from instep.report.document import document

        print(json_text(document(found)))
        return
    from instep.report import page

    page.write(found, out)
    show(found)
    print(f"\nThe page is {out}.")


def show(found: Comparison) -> None:
    """How long the runs were, the table of rules, who wins, and what to know before believing it."""
    from rich.console import Console
    from rich.table import Table

    from instep.report.page import columns, rows

    console = Console(highlight=False, markup=False)
    console.print(facts(found))
    console.print()
    heads = {key: head for key, head in columns(found).items() if key not in ("total", "sent", "peak")}
    if len(heads) < 3:
        heads = columns(found)
    table = Table(box=None, pad_edge=False)
    table.add_column("rule", no_wrap=True)
    for head in heads.values():
        table.add_column(head, justify="right")
    for row in rows(found):
        table.add_row(row["label"], *(row[key] for key in heads))
    console.print(table)
    console.print()
    for sentence in (verdict(found), *doubts(found)):
        console.print(sentence)


def export_run(run: Path, form: str, out: Path | None, ema: str | None = None) -> None:
    """Writes the run for another tool, by default beside its folder."""
    from instep.report.export import FORMATS, export

    if form == "hf":
        export_model(run, out, None if ema is None else number_of(ema, "--ema", "a decay such as 0.999"))
        return
    if form not in FORMATS:
        raise UsageError(f"--to is {shown(form)}{suggest(form, [*FORMATS, 'hf'], 'a run is exported to')}")
    if ema is not None:
        raise UsageError(f"--ema goes with --to hf: what is written for {shown(form)} holds no weights.")
    name = f"{run.absolute().name}{FORMATS[form]}"
    path = run.with_name(name) if out is None else out
    check_file(path, name)
    export(run, form, path)
    print(path)


def export_model(run: Path, out: Path | None, ema: float | None = None) -> None:
    """Writes what the run has trained for transformers, by default into a folder beside its own, ``NAME-hf`` or, of an
    average, ``NAME-hf-ema-0.999``.
    """
    of = "" if ema is None else f"-ema-{name_of(ema)}"
    folder = run.with_name(f"{run.absolute().name}-hf{of}") if out is None else out
    check_new_file(folder, "--out")
    from instep.pretrained.saving import export_hf

    export_hf(run, folder, ema)
    print(folder)


def number_of(text: str, flag: str = "--target", such: str = "an objective such as 1.6") -> float:
    """The number that `flag` gives. Raises UsageError."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UsageError(f"{flag} is {shown(text)}; it must be a number, {such}.")
    return value


def check_out(out: Path) -> None:
    """Raises UsageError where no page can be written: not after the work."""
    from instep.report.page import check_extra

    check_extra()
    check_file(out)


def check_file(out: Path, name: str = "report.html") -> None:
    """Raises UsageError where no file can be written; `name`: one that would do."""
    check_new_file(out, "--out")
    if out.is_dir():
        raise UsageError(f"--out {shown(str(out))} is a folder; name a file in it, such as {out / name}.")
