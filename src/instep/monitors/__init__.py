"""What shows a run while it trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Monitor = Callable[[dict[str, Any]], None]
"""Called with every event of the tape, in order, in the process that called `instep.train`."""
