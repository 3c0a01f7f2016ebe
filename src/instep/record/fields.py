"""What the fields of events are: their types, units and meanings. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeAlias, TypeVar

from msgspec import Meta, UnsetType


def is_(meaning: str, where: str | None = None) -> Meta:
    """`where`: when a field is there that need not be."""
    return Meta(description=meaning, extra=None if where is None else {"where": where})


def where_(condition: str) -> Meta:
    return Meta(extra={"where": condition})


def has_(wanted: Any) -> Meta:
    """The type that a reader finds, where the one who writes need not know it."""
    return Meta(extra={"has": wanted})


_Given = TypeVar("_Given")
Maybe: TypeAlias = _Given | UnsetType
"""What need not be there."""
Count = Annotated[int, Meta(ge=0)]
Counted = Annotated[int, Meta(ge=1)]
"""Of what there is at least one."""
Worker = Annotated[int, Meta(ge=0, le=1 << 24), is_("the worker's number, from 0")]
Seconds = Annotated[float, Meta(extra={"unit": "seconds"})]
Bytes = Annotated[int, Meta(ge=0, extra={"unit": "bytes"})]
Figure = float | None
"""Null where it is not finite, or where there is none."""
Span = Annotated[list[Count], Meta(min_length=2, max_length=2)]
"""[start, stop]"""

Version = Annotated[Count, is_("updates that the weights have had")]
Base = Annotated[Count, is_("the version that the worker started from")]
Seq = Annotated[Count, is_("the contribution's number, in order of arrival")]
Piece = Annotated[Count, is_("the piece's number; a global batch is cut into `cut` pieces")]
Batch = Annotated[Count, is_("the piece's first global batch")]
LocalSteps = Annotated[Counted, is_("the worker's own steps, on one global batch each")]
Microbatches = Annotated[Span, is_("what it covers of a global batch")]
Items = Annotated[Count, is_("of the objective's first term")]
LossScaleUsed = Annotated[float, is_("that the gradient was computed with", where="with float16, not with local steps")]
Overflows = Annotated[
    Count, is_("updates, or local steps, left out since the loss scale was too large", where="if any")
]
Terms = Annotated[Mapping[str, Figure], is_("the mean of each term, by name; in an evaluation of each metric too")]
Checksum = Annotated[list[str], is_("8 hexadecimal digits for each tensor")]
Why = Annotated[str, is_("a sentence")]
Ema = Annotated[
    dict[str, Any],
    is_("by decay, as of the weights: `objective`, `terms`, `turns` and `bits_per_byte`", where="with `recipe.ema`"),
]
