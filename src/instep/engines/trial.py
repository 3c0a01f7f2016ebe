"""What is tried once, while a run is young: whether its checkpoints can be loaded."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from instep.engines.aside import CopyLost, in_a_copy
from instep.engines.replica import Replica
from instep.engines.state import bytes_in, difference
from instep.errors import CheckpointError
from instep.record import checkpoint
from instep.restore import kept_random_state

MOST_BYTES = 2 * 10**9
"""Of the state, beside the model's, up to which a checkpoint is tried."""


def try_checkpoint(
    replica: Replica, model_state: Mapping[str, Tensor], training_state: Mapping[str, Any]
) -> str | None:
    """Saves the state of a run, builds all again, loads it, and compares bit by bit; aside, so that no trace is left.

    Returns a sentence to warn with where it could not be tried. Raises CheckpointError where what came back is not what
    was saved, and RecordError where it cannot be saved.
    """
    size = bytes_in(training_state)
    if size > MOST_BYTES:
        return (
            f"whether a checkpoint can be loaded was not tried: the optimizer's state takes {size / 1e9:.1f} GB, and "
            f"up to {MOST_BYTES / 1e9:.0f} GB it is tried."
        )
    replica.doing = "trying whether its checkpoint can be loaded"
    there_and_back = partial(_there_and_back, replica, model_state, training_state)
    if replica.device.type != "cpu":  # a GPU is not for a copy of this process
        with kept_random_state():
            there_and_back()
        return None
    try:
        in_a_copy(there_and_back)
    except CopyLost as lost:
        return f"whether a checkpoint can be loaded could not be tried: {lost.why}; the run goes on all the same."
    return None


def _there_and_back(replica: Replica, model_state: Mapping[str, Tensor], training_state: Mapping[str, Any]) -> None:
    saved = checkpoint.repacked({"model": dict(model_state), **training_state})
    again = replica.again("cpu")
    again.load(saved["model"], saved)
    found = {"model": again.module.state_dict(), **again.training_state()}
    expected = {"model": dict(model_state), **training_state}
    for part, value in found.items():
        where = difference(_on_cpu(expected[part]), _on_cpu(value))
        if where is not None:
            what = f"the optimizer {replica.optimizer.kind}" if part == "optimizer" else "the model"
            raise CheckpointError(
                f"a checkpoint of this run could not be resumed: {what} that is built again, and loads what was saved, "
                f"has another '{where}'; keep all that a step changes in tensors and numbers that the state_dict holds "
                f"and load_state_dict takes."
            )


def _on_cpu(state: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().cpu(), state)
