"""Cutting a count into contiguous ranges, as equal as may be: one formula for microbatches, blocks and batches."""

from __future__ import annotations

from itertools import pairwise


def equal_ranges(count: int, parts: int) -> list[tuple[int, int]]:
    """[0, count) as `parts` neighbours (start, stop), whose sizes differ by at most one."""
    return list(pairwise(part * count // parts for part in range(parts + 1)))
