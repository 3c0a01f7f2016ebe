"""The device that a worker computes on: made ready, filled with batches, and with the recipe's precision."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from instep.errors import ResourceError


def prepare_device(device: str, threads: int) -> torch.device:
    """The device, with its threads set and its kernels made deterministic. Raises ResourceError."""
    torch.set_num_threads(threads)
    if device == "cpu" and threads == 1:
        return torch.device("cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ResourceError("team.device is 'cuda', and torch finds no GPU here; set team.device to 'cpu'.")
    torch.use_deterministic_algorithms(True)  # several threads on a CPU would add some sums in order of arrival
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # it hides no error here and costs a write
    torch.backends.cudnn.benchmark = False  # which would pick kernels by their time, and so other orders of adding
    return torch.device(device)


def to_device(batch: Any, device: torch.device) -> Any:
    """`batch` with its tensors on the device."""
    if device.type == "cpu":
        return batch
    # A packed sequence moves as a whole: its batch_sizes stay on the CPU.
    leaves, structure = pytree.tree_flatten(batch, is_leaf=lambda part: isinstance(part, PackedSequence))
    movable: Any = (Tensor, PackedSequence)  # torch's types for the latter's `to` lack devices
    moved = [leaf.to(device, non_blocking=True) if isinstance(leaf, movable) else leaf for leaf in leaves]
    return pytree.tree_unflatten(moved, structure)


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """The precision that a recipe asks for."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bfloat16" else nullcontext()
