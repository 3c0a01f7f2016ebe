"""What is said where a worker has computed a microbatch wrong, as an audit has found. No torch."""

from __future__ import annotations

from instep.team.messages import FoundWrong


def refuted(found: FoundWrong) -> str:
    """The sentence on it, which is why the worker ends."""
    return (
        f"worker {found.worker} computed microbatch {found.microbatch} of step {found.version + 1} wrong: {found.by} "
        f"both came to another result; the weights after version {found.since}, when it was last seen to be right or "
        f"began, are uncertain, and are computed again."
    )
