"""Parts of the lines that a console shows. Pure."""

from __future__ import annotations

from collections.abc import Sequence


def versions(count: int) -> str:
    """How many versions of the weights."""
    return f"{count:,} version{'' if count == 1 else 's'}"


def bound(bound: int | None) -> str:
    """Of staleness, behind what it came to."""
    return "" if bound is None else f", bound {bound:,}"


def unreadable(text: str) -> float:
    """The share of characters that are none: bytes that are no text, and controls."""
    return sum(c == "\ufffd" or not (c.isprintable() or c in "\n\t\r") for c in text) / len(text)


def idle(shares: Sequence[float]) -> str:
    """Of a few workers each share, of many what tells who waits."""
    if len(shares) <= 8:
        return ", ".join(f"{100 * share:.0f} %" for share in shares)
    mean, least, most = sum(shares) / len(shares), min(shares), max(shares)
    return (
        f"mean {100 * mean:.0f} %, from {100 * least:.0f} % (worker {shares.index(least):,}) "
        f"to {100 * most:.0f} % (worker {shares.index(most):,})"
    )
