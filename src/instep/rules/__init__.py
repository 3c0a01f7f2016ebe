"""The dial: update rules as data, their presets, and the ledger that obeys them. No torch."""

from instep.rules.presets import parse
from instep.rules.rule import PRESETS, UpdateRule

__all__ = ["PRESETS", "UpdateRule", "parse"]
