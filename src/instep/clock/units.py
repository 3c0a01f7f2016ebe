"""Times and rates as people write them."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np

from instep.errors import RecipeError, shown

_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_DURATION = re.compile(rf"\s*({_NUMBER})\s*([a-zµμ]*)\s*")
_RATE = re.compile(rf"\s*({_NUMBER})\s*([kKMGT]?i?)(b|bit|B)(?:/s|ps)\s*")

_SECONDS = {
    "ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0,
}  # fmt: skip
_POWERS: dict[str, int] = {"": 0, "k": 1, "K": 1, "M": 2, "G": 3, "T": 4}


def number(value: Any) -> float:
    """`value` as a float: infinite where it is too large for one, and not a number where it is no number at all."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def duration_s(text: str, name: str) -> float:
    """Seconds in a text such as "20us", "1ms", "0.5s", "10min" or "0". `name` says what it is, for the message.

    Raises RecipeError.
    """
    match = _DURATION.fullmatch(text)
    seconds = math.nan
    if match and (match[2] in _SECONDS or (not match[2] and float(match[1]) == 0)):
        seconds = float(match[1]) * _SECONDS.get(match[2], 1.0)
    if not 0 <= seconds < math.inf:
        raise RecipeError(
            f"{name} is {shown(text)}; write a time from 0 with its unit (ns, us, ms, s, min, h, d): '1ms'."
        )
    return seconds


def rate_bytes_per_s(text: str, name: str) -> float:
    """Bytes per second in a text such as "1Gb/s" (bits), "100MB/s" (bytes) or "1GiB/s". `name` is for the message.

    k, M, G and T are powers of 1000, Ki to Ti of 1024; a small b is a bit, a large one a byte. Raises RecipeError.
    """
    match = _RATE.fullmatch(text)
    if not match or match[2] == "i":
        raise RecipeError(f"{name} is {shown(text)}; write it in bits, as '1Gb/s', or in bytes, as '100MB/s'.")
    number, prefix, unit = match.groups()
    factor = float((1024 if prefix.endswith("i") else 1000) ** _POWERS[prefix.rstrip("i")])
    return float(number) * factor / (1 if unit == "B" else 8)
