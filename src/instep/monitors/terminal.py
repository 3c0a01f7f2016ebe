"""Terminals that can show a line anew in its place, and such a line."""

from __future__ import annotations

import os
import sys
from typing import Self, TextIO


def is_live(file: TextIO) -> bool:
    """Whether it is such a terminal."""
    return file.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")


class MovingLine:
    """A line on stderr that says how far something is; nothing of it is left at the end of the block.

    moves: whether stderr is such a terminal; else nothing is shown.
    """

    def __init__(self) -> None:
        self.moves = is_live(sys.stderr)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.show("")

    def show(self, text: str) -> None:
        """Shows `text` in place of what was there."""
        if self.moves:
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
