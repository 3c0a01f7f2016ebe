"""Which checkpoints are kept: the last few, or ever fewer the further back they lie."""

from __future__ import annotations

from collections.abc import Sequence

LAST = 3
"""So many are kept whole where older ones are thinned."""


def superfluous(versions: Sequence[int], keep: int | str) -> list[int]:
    """Those of the `versions` of all checkpoints, rising, the last just saved, that need not be kept.

    keep: `Team.keep`, not 0.

    Thinned, the last three stay and, for each power of two, of the checkpoints that were ever saved at least so many
    versions before the last one and less than twice as many, at least one. Between two that stay lies another only
    where it is needed for that now or later, so that at most two stay for each power.
    """
    if isinstance(keep, int):
        return list(versions[:-keep])
    kept, now, gone = list(versions), versions[-1], []
    place = 1  # the first and the last three are not between others
    while place < len(kept) - LAST:
        before, after = kept[place - 1], kept[place + 1]
        # Whatever the last version n will be: from n - 2 p to n - p there is this one and neither of those around it
        # only where p is above the distance of the one after it, and below what lies between the two.
        if after - before <= _power_above(now - after):
            gone.append(kept.pop(place))
        else:
            place += 1
    return gone


def _power_above(distance: int) -> int:
    """The smallest power of two above it."""
    return 1 << distance.bit_length()
