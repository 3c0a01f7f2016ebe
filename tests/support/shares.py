"""Which of a test's slow parameters are left out where only a share of them is run."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable


def left_out(slow: Iterable[str], one_in: int) -> set[str]:
    """All but one in `one_in`, rounded up, of the ids of each test; which ones its name decides."""
    parameters = defaultdict(list)
    for name in sorted(slow):
        parameters[name.partition("[")[0]].append(name)
    left: set[str] = set()
    for test, names in parameters.items():
        kept = -(-len(names) // one_in)
        left.update(random.Random(test).sample(names, len(names) - kept))
    return left
