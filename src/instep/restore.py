"""Contexts that look without leaving a trace: what they change is put back when they end."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

RandomState = tuple[Any, Any, Any]
"""Of Python's, numpy's and torch's generators, the last one on the CPU alone, as an array."""


def random_state() -> RandomState:
    """The present one."""
    return random.getstate(), np.random.get_state(), torch.get_rng_state().numpy()


def take_random_state(state: RandomState) -> None:
    """Has the generators go on from there."""
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(torch.from_numpy(np.array(state[2])))


@contextmanager
def kept_random_state() -> Iterator[None]:
    """Puts back the state of Python's, numpy's and torch's generators, all devices in use."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def older_kept() -> Iterator[None]:
    """Python's search for garbage in cycles leaves out what exists already: with torch loaded, it is most of the time.

    What is made meanwhile is searched as ever.
    """
    if gc.get_freeze_count():  # somebody's own doing, and not ours to undo
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def kept_module_state(model: nn.Module, *, training: bool | None = None) -> Iterator[None]:
    """Puts back every submodule's train mode, by name, every buffer, such as BatchNorm's, and whether a parameter
    requires a gradient. The values of parameters are not covered.

    `training` sets the mode of all submodules meanwhile; None leaves it. The flag is set as such, past any `train`
    that a module overrides: an override may do more than can be undone.
    """
    modules = [(module, module.training) for module in model.modules()]
    modes = {name: module.training for name, module in model.named_modules(remove_duplicate=False)}
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module, _ in modules
        for name, buffer in module.named_buffers(recurse=False)
    ]
    try:
        if training is not None:
            for module, _ in modules:
                module.training = training
        yield
    finally:
        for module, mode in modules:
            module.training = mode
        for name, module in model.named_modules(remove_duplicate=False):  # one that was put in another's place, too
            module.training = modes.get(name, module.training)
        for parameter, flag in flags:
            if parameter.requires_grad != flag:
                parameter.requires_grad_(flag)
        with torch.no_grad():
            for module, name, buffer, value in buffers:
                # Nobody can write to an expanded one.
                module._buffers[name] = buffer if is_expanded(buffer) else buffer.copy_(value)


def is_expanded(tensor: Tensor) -> bool:
    """Whether several elements lie in one place, as after `expand`."""
    return any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
