"""How a model is cut into fragments, and which of them each update is of."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

from instep.errors import RecipeError


class Fragments:
    """A model's parameters, of `sizes_bytes`, cut into `count` ranges of neighbours in the module's order.

    Border i lies where the bytes before it are nearest to i / count of all of them, the earlier one of two, and so that
    each fragment has a parameter. Round r, from 0, is about fragment r modulo count; update r + 1 is made of it.

    Raises RecipeError where there are fewer parameters.
    """

    def __init__(self, sizes_bytes: Sequence[int], count: int):
        if count > len(sizes_bytes):
            raise RecipeError(
                f"'rule.fragments' is {count} and the model has {len(sizes_bytes)} trained "
                f"{'parameter' if len(sizes_bytes) == 1 else 'parameters'}, which are never split; set it to at most "
                f"that."
            )
        before = [0, *accumulate(sizes_bytes)]
        borders = [0]
        for number in range(1, count):
            may_be = range(borders[-1] + 1, len(sizes_bytes) - (count - number) + 1)
            borders.append(min(may_be, key=lambda place: abs(before[place] * count - number * before[-1])))
        self.all = tuple(range(*pair) for pair in pairwise([*borders, len(sizes_bytes)]))
        """The indices of each one's parameters."""

    def of_round(self, number: int) -> range:
        """What the contributions of a round are of."""
        return self.all[number % len(self.all)]

    def since(self, had: int, version: int) -> list[int]:
        """The parameters that the updates after version `had`, up to `version`, have changed."""
        first = max(had, version - len(self.all))
        return sorted(index for number in range(first, version) for index in self.of_round(number))
