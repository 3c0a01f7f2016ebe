"""What help says of the commands, and how it looks: flags left, what they do right, and no word broken."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterable
from typing import Any

ABOUT = "Trains one PyTorch model with many workers in step: the same result, bit for bit, for any number of them."

COMMANDS = {
    "train": "Train a recipe, or go on with a run.",
    "replay": "Compute a run again from its recipe and tape.",
    "verify": "Compute a part of a run again, as a sample, and compare.",
    "simulate": "Run a recipe on a virtual cluster.",
    "memory": "Show what recomputing activations saves in memory and costs in time.",
    "check": "Prove or refute, on a recipe, what Instep promises of any.",
    "diff": "Find where two runs part, or a run and its recipe.",
    "compare": "Train a recipe under several update rules, and show what each gains and costs.",
    "plan": "Find the update rule and the workers for a cluster.",
    "report": "Make a page of one run, or of several side by side.",
    "team": "Show who trains in a run, what each does, and who waits for whom.",
    "recipes": "List the built-in recipes.",
    "digest": "Print the digest of a run or checkpoint.",
    "export": "Write a run for other tools (perfetto, csv, parquet), or its model (hf).",
    "sample": "Have a run's model go on with a text.",
    "tokenize": "Make texts token files, with where each document ends.",
    "tape": "Print what happened in a run, one JSON object a line.",
}

LEFT = 20
"""Columns that a flag takes before what it does; a longer one has a line of its own."""

WIDEST = 100
"""Columns that are used at most: longer lines are hard to read."""


def columns() -> int:
    """The columns of the terminal, or of 80 where there is none, as far as they are used."""
    return min(WIDEST, shutil.get_terminal_size().columns)


def wrapped(text: str, indent: str = "", first: str | None = None) -> str:
    """`text` in lines that fit, broken at spaces alone. `first`: what the first line begins with, by default `indent`.

    Empty lines between paragraphs stay.
    """
    lines = []
    for number, paragraph in enumerate(text.split("\n\n")):
        start = indent if first is None or number else first
        lines += [""] if number else []
        lines += textwrap.wrap(
            " ".join(paragraph.split()), max(40, columns()), initial_indent=start, subsequent_indent=indent,
            break_long_words=False, break_on_hyphens=False,
        ) or [start.rstrip()]  # fmt: skip
    return "\n".join(lines)


def table(rows: Iterable[tuple[str, str]], left: int, indent: str = "  ") -> str:
    """Labels in `left` columns, and a text beside each."""
    lines = []
    for label, text in rows:
        if len(label) > left:
            lines += [f"{indent}{label}", wrapped(text, f"{indent}{'':{left}}  ")]
        else:
            lines.append(wrapped(text, f"{indent}{'':{left}}  ", f"{indent}{label:<{left}}  "))
    return "\n".join(lines)


class Formatter:
    """What cyclopts calls to show a command's help."""

    def __call__(self, console: Any, options: Any, panel: Any) -> None:
        """One panel: arguments, or flags."""
        rows = []
        for entry in panel.entries:
            end = [f"[default: {entry.default}]"] if entry.default not in (None, "", '""', "None") else []
            end += ["[required]"] if entry.required else []
            labels = ", ".join(entry.display_labels_with_metavar)
            rows.append((labels, " ".join([*_plain(entry.description).split(), *end])))
        if rows:
            print(f"{panel.title}:\n{table(rows, LEFT)}\n")

    def render_usage(self, console: Any, options: Any, usage: Any) -> None:
        """The first line."""
        print(f"Usage: {_plain(usage).removeprefix('Usage: ')}\n")

    def render_description(self, console: Any, options: Any, description: Any) -> None:
        """What the command does."""
        print(f"{wrapped(_plain(description))}\n")


def _plain(text: Any) -> str:
    """The text of what cyclopts has made of a docstring."""
    import io

    from rich.console import Console

    if text is None or isinstance(text, str):
        return text or ""
    file = io.StringIO()
    Console(file=file, width=10_000, no_color=True, highlight=False, markup=False, emoji=False).print(text)
    return file.getvalue().strip()
