"""What a worker gives others as bytes: tensors, and tables and lists of them."""

from __future__ import annotations

import io
from typing import Any

import torch


def packed(what: Any) -> bytes:
    """As bytes."""
    buffer = io.BytesIO()
    torch.save(what, buffer)
    return buffer.getvalue()


def unpacked(parcel: bytes) -> Any:
    """What was `packed`."""
    return torch.load(io.BytesIO(parcel), weights_only=True)
