"""Why each worker of a team in lockstep makes the whole update, where a share of it would give other bits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn, optim
from torch.optim import optimizer as torch_optimizer

from instep.reduce.layout import is_dense
from instep.worker.optimizer import BY_PARAMETER
from instep.worker.replica import Replica


def why_each_makes_all(replica: Replica) -> str:
    """Why each worker must make the whole update, the same at all; "" where a share of it gives the same bits."""
    if replica.device.type != "cpu":
        why = "on a GPU each has all weights"
    elif replica.written.trains:
        why = "forwards write parameters that are trained"
    # A rollback reads all weights, and puts them back, before the update.
    elif any(watch.spike == "rollback" for watch in replica.recipe.watches):
        why = "a rollback takes back all weights at once"
    elif other := next((one.kind for one in replica.optimizer.each if not _updates_by_parameter(one.of_torch)), ""):
        why = f"what {other} does to a parameter may depend on more than this parameter"
    elif not _can_move(replica.parameters):
        why = "something else than the model sees the memory of its parameters, or they are no plain ones"
    else:
        return ""
    return f"team.shard is 'optimizer', and each worker makes the whole update all the same, for {why}."


def _updates_by_parameter(optimizer: optim.Optimizer) -> bool:
    # Fused SGD asks of all parameters together whether this is the first step of their momentum.
    hooks = [value for name, value in vars(optimizer).items() if name.endswith("_hooks")]
    hooks += [torch_optimizer._global_optimizer_pre_hooks, torch_optimizer._global_optimizer_post_hooks]
    return (
        type(optimizer) in BY_PARAMETER
        and not (type(optimizer) is optim.SGD and any(group["fused"] for group in optimizer.param_groups))
        and not any(hooks)
        and "step" not in vars(optimizer)  # where a scheduler of torch counts steps, say
    )


def _can_move(parameters: Sequence[nn.Parameter]) -> bool:
    """Whether the parameters can get other memory, with the same strides, and nothing else sees their present one."""
    alone = _uses(nn.Parameter(torch.zeros(1)))
    return all(
        type(p) is nn.Parameter and p.layout == torch.strided and is_dense(p) and _uses(p) == alone for p in parameters
    )


def _uses(tensor: Tensor) -> int:
    """How many tensors, and Python's view of it, hold the tensor's memory."""
    return int(torch._C._storage_Use_Count(tensor.untyped_storage()._cdata))
