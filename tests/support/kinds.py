"""Which parameters of a test are quick."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def quick(values: Iterable[Any], *chosen: Any) -> list[Any]:
    """Parameters of a test: the chosen ones of `values`, and the others as slow ones."""
    every = list(values)
    assert all(each in every for each in chosen), f"{chosen} are not all among {every}"
    return [each if each in chosen else pytest.param(each, marks=pytest.mark.slow) for each in every]
