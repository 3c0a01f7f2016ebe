"""Which parts of a model are its repeated blocks."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from instep.errors import CheckpointingError, shown

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def find_blocks(model: nn.Module) -> list[str]:
    """The names of the outermost modules that have a sibling of the same class and parts of their own.

    Containers such as `nn.Sequential` are looked into first, and are blocks themselves where nothing in them is.
    Raises CheckpointingError where there are none.
    """
    names = _below(model, "")
    if not names:
        raise CheckpointingError(
            f"the model {type(model).__name__} has no repeated block: no two of its parts are of one class and have "
            f"parts of their own; train it without a memory budget (--memory, team.memory) or, in Python, name what "
            f"may be recomputed, as in instep.gradient_checkpointing.profile(..., blocks=['encoder', 'head'])."
        )
    return names


def named_blocks(model: nn.Module, names: Sequence[str]) -> list[str]:
    """`names`, checked. Raises CheckpointingError for a name that is none, or a block in a block."""
    modules = dict(model.named_modules())
    for name in names:
        if name not in modules or not name:
            raise CheckpointingError(
                f"the model has no part {shown(name)} that could be a block; take names from model.named_modules()."
            )
        outer = next((other for other in names if name != other and name.startswith(f"{other}.")), None)
        if outer is not None:
            raise CheckpointingError(f"block {shown(name)} lies inside block {shown(outer)}; name one of the two.")
    if not names:
        raise CheckpointingError("blocks= names no block; name some, or leave it out to have them found.")
    return list(dict.fromkeys(names))


def _below(module: nn.Module, prefix: str) -> list[str]:
    groups: dict[type, list[str]] = {}
    found: list[str] = []
    children = {name: child for name, child in module.named_children() if next(child.children(), None) is not None}
    for name, child in children.items():
        if not isinstance(child, _CONTAINERS):
            groups.setdefault(type(child), []).append(name)
    repeated = {name for names in groups.values() if len(names) > 1 for name in names}
    for name, child in children.items():
        found += [f"{prefix}{name}"] if name in repeated else _below(child, f"{prefix}{name}.")
    if not found:
        rows = [name for name, child in children.items() if isinstance(child, nn.Sequential)]
        found = [f"{prefix}{name}" for name in rows] if len(rows) > 1 else []
    return found
