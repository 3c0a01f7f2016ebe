"""What becomes of a model's buffers at the end of a step: `Recipe.buffers`, from name patterns to modes.

Every microbatch of a step starts from the same buffers, and each may leave other ones. A mode says which value the
next step starts from:

mean: the mean of what the microbatches left, as is right for running statistics of a normalisation layer.
max: the largest value that any of them left, element by element.
last: what the last microbatch left.
frozen: the value of before: what microbatches leave is forgotten.
sum, sum:D: D times the value of before, and to it what each microbatch added: the sum of (left - D * before). D is 1
    for plain counters, or the decay of exponential sums, from 0 to 1, such as 0.99.

Microbatches without samples take no part. A pattern is one of `fnmatch`, for whole names of buffers, such as
``codebook.*``; the first that matches a buffer decides. Without one, floating buffers take the mean and all others the
maximum.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from instep.errors import RecipeError, shown
from instep.tables import suggest

KINDS = ("mean", "max", "last", "frozen", "sum")


@dataclass(frozen=True)
class Mode:
    """What one buffer takes. kind: one of `KINDS`. decay: D, of "sum"."""

    kind: str
    decay: float = 1.0

    def __str__(self) -> str:
        return f"sum:{self.decay!r}" if self.kind == "sum" and self.decay != 1 else self.kind


def parse(patterns: Mapping[str, Any]) -> dict[str, Mode]:
    """The mode of each pattern, in their order. Raises RecipeError for what is no mode."""
    return {pattern: _mode(pattern, text) for pattern, text in patterns.items()}


def _mode(pattern: str, text: Any) -> Mode:
    kind, colon, decay = text.partition(":") if isinstance(text, str) else ("", "", "")
    if kind == "sum" and colon:
        try:
            factor = float(decay)
        except ValueError:
            factor = -1.0
        if 0 <= factor <= 1:
            return Mode(kind, factor)
        raise RecipeError(
            f"'recipe.buffers' has {shown(text)} for {shown(pattern)}; the factor on the value of before is a number "
            f"from 0 to 1, as in 'sum:0.99'."
        )
    if kind in KINDS and not colon:
        return Mode(kind)
    near = difflib.get_close_matches(kind, KINDS, 1)
    hint = f"did you mean {shown(near[0])}?" if near else "modes are 'mean', 'max', 'last', 'frozen' and 'sum:0.99'."
    raise RecipeError(f"'recipe.buffers' has {shown(text)} for {shown(pattern)}, which is no mode; {hint}")


def modes_of(
    patterns: Mapping[str, str], names: Sequence[str], discrete: Mapping[str, str] = MappingProxyType({})
) -> list[Mode | None]:
    """The mode that `patterns` give to each of `names`; None where none does.

    discrete: what those hold that hold no floating numbers: "whole numbers", or else "truth values".

    Raises RecipeError for a pattern that matches no name, and for a mode that such a buffer cannot take.
    """
    modes = parse(patterns)
    for pattern in modes:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            hint = suggest(pattern, names, "its buffers are") if names else "; it has none."
            raise RecipeError(
                f"'recipe.buffers' has {shown(pattern)}, and no buffer of the model has such a name{hint}"
            )
    found: list[Mode | None] = []
    for name in names:
        first = next((pattern for pattern in modes if fnmatch.fnmatchcase(name, pattern)), "")
        mode = modes.get(first)
        if mode is not None and name in discrete and not _takes(discrete[name], mode):
            raise RecipeError(
                f"'recipe.buffers' has '{mode}' for {shown(first)}, which buffer '{name}' cannot take, for it holds "
                f"{discrete[name]}; put one for '{name}' before it, such as 'max' or 'last'."
            )
        found.append(mode)
    return found


def _takes(held: str, mode: Mode) -> bool:
    if mode.kind == "sum":
        return held == "whole numbers" and mode.decay in (0, 1)
    return mode.kind != "mean"
