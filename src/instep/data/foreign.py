"""Data sets of other libraries: what to do with those that have no samples by index, and what is easily missed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_WAYS = {
    "datasets": "load it without streaming, or give its files, such as Parquet to 'instep.data.parquet:parquet'",
    "webdataset": "give its tar files to 'instep.data.tars:tars'",
    "grain": "give the MapDataset that it was made of",
}
"""By library, for what is an iterable of it."""


def way(value: Any) -> str:
    """What to give in place of an iterable, or of anything else that is no data set, for a sentence."""
    found = next((_WAYS[name] for name in map(_library, type(value).__mro__) if name in _WAYS), "")
    if found or not hasattr(value, "__iter__") or isinstance(value, (str, bytes)):
        return found or "give a map-style data set, with __len__ and __getitem__"
    return (
        "give a map-style data set, with __len__ and __getitem__: write what it yields once into a file that is read "
        "by index, such as JSON lines for 'instep.data.lines:jsonl', or Parquet or tars (docs/data.md)"
    )


def _library(kind: type) -> str:
    return kind.__module__.partition(".")[0]


def doubt(samples: Any, collate: Callable[..., Any] | None) -> str:
    """A sentence on a data set of Hugging Face whose lists torch's default collate would turn on their side, or ""."""
    if collate is not None or _library(type(samples)) != "datasets":
        return ""
    formatted = getattr(samples, "format", None) or {}
    features = getattr(samples, "features", None) or {}
    lists = [name for name, feature in features.items() if type(feature).__name__ in ("List", "LargeList", "Sequence")]
    if formatted.get("type") is not None or not lists:
        return ""
    return (
        f"the column {lists[0]!r} of the data set holds lists, of which torch's default collate makes as many tensors "
        f"as a list is long, over the batch; give the data set .with_format('torch'), or recipe.data a 'collate', "
        f"unless that is meant."
    )
