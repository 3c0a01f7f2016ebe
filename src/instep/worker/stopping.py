"""How a run stops where somebody's code has raised: the others are told, and weights that are sound are saved."""

from __future__ import annotations

from pathlib import Path


def with_saved(sentence: str, version: int, folder: Path) -> str:
    """`sentence`, on why a run stops, with what is saved of it: the weights of `version`; nothing at 0."""
    if not version:
        return sentence
    return f"{sentence.rstrip('.')}; version {version:,} is saved: {folder} can be resumed from it."
