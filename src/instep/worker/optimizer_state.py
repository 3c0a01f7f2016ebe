"""What an optimizer keeps, of any layout: nested mappings, lists and tuples, with tensors and other values in them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from instep.bits import same_bits
from instep.record import checkpoint
from instep.reduce.checksums import checksum


def tensors_in(state: Any, where: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor at any depth, with its place, such as "state.0.momentum"."""
    if isinstance(state, Tensor):
        yield where, state
    for key, value in _items(state):
        yield from tensors_in(value, _place(where, key))


def is_plain(tensor: Tensor) -> bool:
    """Whether it has a storage to look at: a dense tensor of torch's own class, which a subclass need not be."""
    return type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided


def put_back(saved: Any, loaded: Any) -> Any:
    """Gives what an optimizer loaded the types that were saved: torch casts tensors to the types of the parameters, and
    takes apart all that can be iterated over, text too. `loaded`: the optimizer's `state_dict` after it loaded `saved`.

    Works in place where it can; returns `loaded`, or what is to stand in its place.
    """
    if isinstance(saved, Tensor) and isinstance(loaded, Tensor):
        if saved.dtype != loaded.dtype and is_plain(saved) and is_plain(loaded):
            loaded.data = saved.detach().to(loaded.device, copy=True)
        return loaded
    if isinstance(saved, Mapping) and isinstance(loaded, dict):
        _put_back_items(saved, loaded, [key for key in loaded if key in saved])
        return loaded
    if isinstance(saved, list) and isinstance(loaded, list):
        _put_back_items(saved, loaded, range(min(len(saved), len(loaded))))
        return loaded
    if isinstance(saved, tuple) and isinstance(loaded, tuple) and len(saved) == len(loaded):
        items = [put_back(*pair) for pair in zip(saved, loaded, strict=True)]
        if all(item is before for item, before in zip(items, loaded, strict=True)):
            return loaded
        return type(loaded)._make(items) if hasattr(loaded, "_make") else type(loaded)(items)
    if _holds_others(saved) and _holds_others(loaded):
        return loaded
    return saved if type(saved) is not type(loaded) or isinstance(saved, str) else loaded


def _put_back_items(saved: Any, loaded: Any, keys: Iterable[Any]) -> None:
    for key in keys:
        item = put_back(saved[key], loaded[key])
        if item is not loaded[key]:
            loaded[key] = item


def difference(one: Any, other: Any, where: str = "") -> str | None:
    """The first place at which the two are not the same, bit for bit, or None. Classes of containers do not count."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return None if _same(one, other) else where
    if _holds_others(one) and _holds_others(other):
        if isinstance(one, Mapping) != isinstance(other, Mapping):
            return where
        mine, theirs = dict(_items(one)), dict(_items(other))
        for key in [*mine, *theirs]:
            if key not in mine or key not in theirs:
                return _place(where, key)
        places = (difference(value, theirs[key], _place(where, key)) for key, value in mine.items())
        return next((place for place in places if place is not None), None)
    if type(one) is not type(other):
        return where
    return None if one is other or one == other or (one != one and other != other) else where  # noqa: PLR0124  # NaN


def copied(state: Mapping[str, Any]) -> dict[str, Any]:
    """A copy in memory of its own; what cannot be copied, as tensors of some classes, goes through a file's bytes."""
    try:
        return copy.deepcopy(dict(state))
    except (NotImplementedError, RuntimeError, TypeError):
        return checkpoint.repacked(state)


def on_cpu(state: Any) -> Any:
    """The same with its tensors in the CPU's memory, whatever holds them; those that are there are no copies."""
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().cpu(), state)


def bytes_in(state: Any) -> int:
    """The bytes of all tensors in it."""
    return sum(tensor.numel() * tensor.element_size() for _, tensor in tensors_in(state))


def _holds_others(value: Any) -> bool:
    return isinstance(value, Mapping | list | tuple)


def _items(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        yield from value.items()
    elif isinstance(value, Sequence) and _holds_others(value):
        yield from enumerate(value)


def _place(where: str, key: Any) -> str:
    return f"{where}.{key}" if where else str(key)


def _same(one: Tensor, other: Tensor) -> bool:
    if (type(one), one.dtype, one.shape, one.layout) != (type(other), other.dtype, other.shape, other.layout):
        return False
    if is_plain(one) and is_plain(other):
        return same_bits(_raw(one), _raw(other))
    names = [each.__tensor_flatten__() if hasattr(each, "__tensor_flatten__") else None for each in (one, other)]
    if names[0] is None or names[1] is None:
        return bool(torch.equal(one, other))
    return difference(names[0], names[1]) is None and all(
        _same(getattr(one, name), getattr(other, name)) for name in names[0][0]
    )


def _raw(tensor: Tensor) -> Tensor:
    return tensor.detach().resolve_neg().cpu()


def unsaved_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Its attributes that are numbers or tensors, and not in its state_dict, unless it has one of its own."""
    if type(optimizer).state_dict is not torch.optim.Optimizer.state_dict:
        return {}
    attributes = vars(optimizer)
    tensors = {n: v for n, v in attributes.items() if isinstance(v, Tensor) and is_plain(v) and not v.is_complex()}
    numbers = {name: value for name, value in attributes.items() if type(value) in (int, float)}
    return {**numbers, **dict(zip(tensors, checksum(tensors.values()), strict=True))}


def optimizers_in(training: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The states of the optimizers in a training state."""
    optimizer = training["optimizer"]
    return list(optimizer.get("several", [optimizer]))


def in_order(training: dict[str, Any]) -> dict[str, Any]:
    """The training state, in which the optimizers' states are by rising index of their parameters."""
    for whole in optimizers_in(training):
        whole["state"] = dict(sorted(whole["state"].items()))
    return training
