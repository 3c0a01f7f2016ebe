"""The device that a worker computes on: made ready, filled with batches, and with the recipe's precision."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from instep.errors import ResourceError, cut
from instep.restore import is_expanded


def device_of(device: str, place: int, workers: int, gpus: int, visible: str | None = None) -> str:
    """The device of the worker at `place`, from 0, of its host's `workers`, where torch finds so many GPUs.

    device: as `Team.device`. visible: what CUDA_VISIBLE_DEVICES says, if it is set. Raises ResourceError.
    """
    kind, _, number = device.partition(":")
    if kind == "cpu":
        return device
    seen = "" if visible is None else f" (CUDA_VISIBLE_DEVICES is '{visible}')"
    if not gpus:
        raise ResourceError(f"team.device is '{device}', and torch finds no GPU here{seen}; set team.device to 'cpu'.")
    found = f"torch finds {gpus} GPU{'s' if gpus > 1 else ''} here{seen}"
    if number and int(number) >= gpus:
        raise ResourceError(f"team.device is '{device}', and {found}, counted from 0; set team.device to 'cuda:0'.")
    if not number and workers > gpus:
        raise ResourceError(
            f"team.device is 'cuda', a GPU for each worker, and {found} for {workers} workers; set team.workers to "
            f"{gpus} for this host, or team.device to 'cuda:0', which they then share."
        )
    return device if number else f"cuda:{place}"


def own_device(device: str, place: int, workers: int) -> str:
    """The same, with the GPUs that are here, and made this process's own."""
    found = device_of(device, place, workers, torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES"))
    torch.cuda.set_device(found)  # what is made on "cuda" lies there
    return found


def check_nccl(needed: bool, workers: int) -> None:
    """Raises ResourceError where workers with a GPU each could not reach each other."""
    if needed and not torch.distributed.is_nccl_available():
        raise ResourceError(
            f"team.device is 'cuda', and {workers} workers with a GPU each reach each other by NCCL, which this torch "
            f"was built without; install one that has it, or set team.device to 'cuda:0', which goes without."
        )


def prepare_device(device: str, threads: int, *, deterministic: bool = True) -> torch.device:
    """The device, with its threads set and, if asked for, its kernels made deterministic. Raises ResourceError."""
    torch.set_num_threads(threads)
    if device == "cpu" and threads == 1:
        return torch.device("cpu")
    if device != "cpu" and not torch.cuda.is_available():
        device_of(device, 0, 1, 0)  # which says so
    if device != "cpu":  # else torch refuses matrix products where deterministic kernels are asked for
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)  # several threads on a CPU would add some in order of arrival
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # it hides no error here and costs a write
    torch.backends.cudnn.benchmark = False  # which would pick kernels by their time, and so other orders of adding
    return torch.device(device)


def not_deterministic(error: BaseException, name: str, where: str) -> str:
    """The sentence on an operation without a deterministic kernel, if that is what `name` has raised; "" else."""
    operation, found, _ = str(error).partition(" does not have a deterministic implementation")
    if not found or not isinstance(error, RuntimeError):
        return ""
    return (
        f"{name} came to {cut(operation)}{where}, which has no kernel that adds in the same order each time; take "
        f"another operation, or set team.deterministic to false and do without the promise of the same bits."
    )


def is_gpu(device: torch.device) -> bool:
    """Whether what lies there is copied to be seen by other workers."""
    return device.type != "cpu"


def peak_bytes(device: torch.device) -> tuple[int, int] | None:
    """The most bytes that tensors have taken on a GPU, and that torch has taken for them; None on a CPU."""
    if device.type != "cuda":
        return None
    return torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)


def to_device(batch: Any, device: torch.device) -> Any:
    """`batch` with its tensors on the device."""
    if device.type == "cpu":
        return batch
    # A packed sequence moves as a whole: its batch_sizes stay on the CPU.
    leaves, structure = pytree.tree_flatten(batch, is_leaf=lambda part: isinstance(part, PackedSequence))
    movable: Any = (Tensor, PackedSequence)  # torch's types for the latter's `to` lack devices
    if device.type == "cuda":
        leaves = [_pinned(leaf) if isinstance(leaf, movable) else leaf for leaf in leaves]
    moved = [leaf.to(device, non_blocking=True) if isinstance(leaf, movable) else leaf for leaf in leaves]
    return pytree.tree_unflatten(moved, structure)


def _pinned(leaf: Any) -> Any:
    """The same in pages that stay where they are: from these alone a GPU copies by itself, while others compute. Torch
    keeps the pages until it has, and then for the next ones.
    """
    if isinstance(leaf, Tensor):
        plain = type(leaf) is Tensor and leaf.layout is torch.strided and leaf.is_cpu and not leaf.requires_grad
        if not plain or not leaf.numel() or is_expanded(leaf):  # torch would write to it once for each element
            return leaf
    return leaf.pin_memory()


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """The precision that a recipe asks for."""
    narrow = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(precision)
    return nullcontext() if narrow is None else torch.autocast(device.type, dtype=narrow)
