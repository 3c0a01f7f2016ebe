"""The dial: update rules as data, their presets, and the ledger that obeys them. No torch."""

from instep.rules.presets import PRESETS, parse
from instep.rules.rule import UpdateRule

__all__ = ["PRESETS", "UpdateRule", "parse"]
