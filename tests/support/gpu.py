"""What tests of a GPU need: who has looked at one, or used it, has no forks that can use it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from instep.worker.trial import in_a_copy


@cache
def gpus() -> int:
    """How many there are. Looks where a driver may be at all, and there in a copy of this process."""
    if not torch.backends.cuda.is_built():
        return 0
    found: int = in_a_copy(torch.cuda.device_count)
    return found


def on_gpu(function: Callable[[], Any]) -> Any:
    """What `function`, which uses a GPU, gives in a copy of this process. What it raises is raised."""
    return in_a_copy(function)
