"""Who updates which weights, for tests: the choice between sharded and replicated ones, and the states that follow."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from instep.engines.sharding import Replicated, Sharded, choose
from instep.reduce.reduction import Reduction
from instep.worker.replica import Replica

CHOOSE = "instep.engines.lockstep.choose"


def replicated(
    replica: Replica, reduction: Reduction, worker: int, machine: range, shard: str, why: str | None = None
) -> Replicated:
    """As `choose`, without the choice."""
    return Replicated(replica, reduction, worker)


def sharded(
    replica: Replica, reduction: Reduction, worker: int, machine: range, shard: str, why: str | None = None
) -> Sharded:
    """As `choose`, where it must come to this."""
    chosen = choose(replica, reduction, worker, machine)
    assert isinstance(chosen, Sharded)
    return chosen


def assert_same(one: Any, other: Any) -> None:
    """Equal in structure, types, strides and bits."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert_same(value, other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    elif isinstance(one, Tensor):
        assert (one.dtype, one.stride()) == (other.dtype, other.stride())
        assert torch.equal(one, other)
    else:
        assert one == other
