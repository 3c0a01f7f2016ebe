"""What errors and warnings look like."""

from __future__ import annotations


def one_sentence(message: str) -> bool:
    return "\n" not in message and message.endswith((".", "?")) and len(message) < 600
