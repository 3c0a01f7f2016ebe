"""Rows of tokens that hold several documents: what a data set makes, an objective reads and a model is told."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class PackedTokens(NamedTuple):
    """Rows of documents, or of pieces of them, one after the other; each tensor is [B, T], or [T] of one row.

    Fields
    ------
    inputs: tokens, int64; -100 for the padding at the end of a row.
    targets: the token that follows each input in its own document, int64; -100 at padding.
    documents: which document of its row an input is of, 1, 2, ..., int64; 0 at padding.
    positions: how many inputs of its document's piece come before it, int64; 0 at padding.
    """

    inputs: Tensor
    targets: Tensor
    documents: Tensor
    positions: Tensor
