"""State that lies in Python and not in tensors that are saved: what changes while a model computes."""

from __future__ import annotations

import random
import types
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from instep.data.signature import signature

_MOST = 20_000
"""Objects that are looked at."""

_PLAIN = (int, float, complex, str, bytes, bool, type(None))
_GENERATORS = (np.random.Generator, np.random.RandomState, random.Random, torch.Generator)
_LEAVES = (Tensor, np.ndarray, np.generic, *_PLAIN, *_GENERATORS)

_SAVED = {
    nn.Module: {"_parameters", "_buffers", "training"},
    torch.optim.Optimizer: {"state", "param_groups", "defaults", "_step_count", "_opt_called"},
}
"""What checkpoints hold of such an object, or what its class keeps for itself."""

State = dict[str, tuple[str, str]]
"""By place, such as "model.block.calls": the signature of what is there, and how to show it."""


def state_of(**roots: Any) -> State:
    """What these hold, at any depth, beside parameters, buffers and the optimizer's own state."""
    known = (random._inst, np.random.mtrand._rand, torch.default_generator)
    seen = {id(each) for each in known}
    kept: list[Any] = []  # an id is good as long as its object is there
    found: State = {}
    waiting = deque(roots.items())
    while waiting and len(seen) < _MOST:
        place, value = waiting.popleft()
        if isinstance(value, _LEAVES):
            if id(value) not in seen or not isinstance(value, _GENERATORS):
                found[place] = _signature(value), _shown(value)
            continue
        if id(value) in seen:
            continue
        seen.add(id(value))
        kept.append(value)
        waiting.extend((f"{place}{name}", part) for name, part in _parts(value))
    return found


def moved(before: State, after: State) -> list[tuple[str, str]]:
    """What is there in both and is another, or is new or gone in a container: its place, and how it changed."""
    changed = []
    for place, (now, shown) in after.items():
        was = before.get(place)
        if was is None:
            changed.append((place, f"{shown}, new"))
        elif was[0] != now:
            changed.append((place, shown if was[1] == shown else f"{was[1]}, then {shown}"))
    gone = [(place, f"{shown}, then gone") for place, (_, shown) in before.items() if place not in after]
    return changed + gone


def _signature(value: Any) -> str:
    if isinstance(value, torch.Generator):
        return signature(value.get_state())
    if isinstance(value, random.Random):
        return signature(value.getstate())
    if isinstance(value, np.random.Generator):
        return signature(value.bit_generator.state)
    if isinstance(value, np.random.RandomState):
        return signature(value.get_state())
    return signature(value)


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.item():.6g}" if value.numel() == 1 and not value.is_complex() else "a tensor"
    if isinstance(value, _GENERATORS):
        return "a random generator"
    text = repr(value)
    return text if len(text) <= 40 else f"of type {type(value).__name__}"


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, (type, types.ModuleType, types.BuiltinFunctionType)):
        return
    if isinstance(value, Mapping):
        yield from ((f"[{key!r}]", part) for key, part in list(value.items()))
    elif isinstance(value, (list, tuple, set, frozenset, deque)):
        if len(value) > 1000:  # data, not state
            return
        yield ".count", len(value)
        yield from ((f"[{place}]", part) for place, part in enumerate(value))
    elif isinstance(value, types.FunctionType):
        yield from _parts_of_function(value)
    elif isinstance(value, types.MethodType):
        yield "", value.__self__
        yield "", value.__func__
    else:
        yield from _attributes(value)


def _attributes(value: Any) -> Iterator[tuple[str, Any]]:
    saved = set().union(*(names for kind, names in _SAVED.items() if isinstance(value, kind)))
    if isinstance(value, nn.Module):
        yield from ((f".{name}", part) for name, part in value._modules.items())
        saved |= {"_modules", *(name for name in vars(value) if name.endswith(("_hooks", "_hooks_with_kwargs")))}
        saved |= {
            name for name in vars(value) if name.startswith(("_forward_", "_backward_", "_state_dict_", "_load_"))
        }
    attributes = dict(getattr(value, "__dict__", {}))
    for name in getattr(type(value), "__slots__", ()):
        if isinstance(name, str) and hasattr(value, name):
            attributes[name] = getattr(value, name)
    for held in ("func", "args", "keywords"):  # of a partial
        if hasattr(value, held) and not isinstance(value, nn.Module) and type(value).__name__ == "partial":
            attributes[held] = getattr(value, held)
    yield from ((f".{name}", part) for name, part in attributes.items() if name not in saved)
    if type(value).__module__.partition(".")[0] not in ("torch", "builtins", "collections", "numpy"):
        own = type(value)
        yield from ((f".{name}", part) for name, part in vars(own).items() if _is_state(name, part))
        for method in ("forward", "__call__", "__getitem__", "step"):
            if isinstance(function := vars(own).get(method), types.FunctionType):
                yield from ((place, part) for place, part in _parts_of_function(function) if place.startswith(" "))


def _is_state(name: str, part: Any) -> bool:
    """Whether an attribute of a class may be what its objects keep."""
    return not name.startswith("__") and isinstance(part, (list, dict, set, *_LEAVES)) and not isinstance(part, str)


def _parts_of_function(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    yield from ((f".{name}", part) for name, part in vars(function).items() if name != "__wrapped__")
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=False):
        try:
            yield f" ({name})", cell.cell_contents
        except ValueError:  # not yet filled
            continue
    yield from ((f" (default {place})", part) for place, part in enumerate(function.__defaults__ or ()))
    yield from ((f" (global {name})", part) for name, part in _globals(function))


def _globals(function: types.FunctionType) -> Iterable[tuple[str, Any]]:
    """Globals of the module that the function reads and that may be state: no modules, no classes."""
    if function.__module__ and function.__module__.partition(".")[0] in ("torch", "instep", "numpy"):
        return
    for name in function.__code__.co_names:
        part = function.__globals__.get(name)
        if part is not None and isinstance(part, (list, dict, set, types.FunctionType, *_LEAVES)):
            yield name, part
