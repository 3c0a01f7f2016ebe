"""What torch does in a microbatch, operation by operation, and the first one at which two computations part."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from instep.reduce.checksums import checksum

_MOST = 200_000
"""Operations that are kept of a microbatch."""

_UNSET = ("empty", "new_empty", "resize_", "set_")
"""Operations whose answer holds whatever was in memory."""


@dataclass(frozen=True)
class Made:
    """One of them: its name, the module in whose forward it was, plain arguments, and checksums of tensors.

    random: whether it draws. written: by argument, whether it is written.
    """

    name: str
    module: str
    plain: str
    inputs: tuple[str, ...]
    written: tuple[bool, ...]
    outputs: tuple[str, ...]
    random: bool

    @property
    def unset(self) -> bool:
        return self.name.split(".")[1].startswith(_UNSET)


class Noted(TorchDispatchMode):
    """Notes the operations in its block, of which `found` is the list.

    keep: the place in it of one whose tensors are `kept`, as copies: "input.0" and so on, and "output.0".
    """

    def __init__(self, module: nn.Module, keep: int = -1):
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[Made] = []
        self.kept: dict[str, Tensor] = {}
        self._keep = keep
        self._names = {id(part): name or type(module).__name__ for name, part in module.named_modules()}
        self._inside: list[str] = []

    @contextmanager
    def noting(self) -> Iterator[None]:
        """In the block, operations are noted with the module that they are in."""
        handles = [
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave, always_call=True),
        ]
        try:
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, module: nn.Module, _: Any) -> None:
        outer = self._inside[-1] if self._inside else ""
        self._inside.append(self._names.get(id(module), outer))

    def _leave(self, module: nn.Module, *_: Any) -> None:
        if self._inside:
            self._inside.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if len(self.found) >= _MOST:
            return func(*args, **kwargs)
        leaves, _ = pytree.tree_flatten((args, kwargs))
        inputs = tuple(_sum(leaf) for leaf in leaves if isinstance(leaf, Tensor))
        plain = ", ".join(_plain(leaf) for leaf in leaves if not isinstance(leaf, Tensor))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        writes = _written(func, args, kwargs)
        keeps = len(self.found) == self._keep
        if keeps:
            self._copy("input", tensors)
        answer = func(*args, **kwargs)
        outputs = tuple(_sum(leaf) for leaf in pytree.tree_leaves(answer) if isinstance(leaf, Tensor))
        written = tuple(id(leaf) in writes for leaf in tensors)
        if any(written) and not outputs:
            outputs = tuple(_sum(leaf) for leaf, flag in zip(tensors, written, strict=True) if flag)
        if keeps:
            made = [leaf for leaf in pytree.tree_leaves(answer) if isinstance(leaf, Tensor)]
            self._copy("output", made or [leaf for leaf, flag in zip(tensors, written, strict=True) if flag])
        module = self._inside[-1] if self._inside else ""
        drawn = torch.Tag.nondeterministic_seeded in func.tags
        self.found.append(Made(str(func), module, plain, inputs, written, outputs, drawn))
        return answer

    def _copy(self, what: str, tensors: Sequence[Tensor]) -> None:
        plain = [tensor for tensor in tensors if tensor.layout == torch.strided]
        self.kept |= {f"{what}.{place}": tensor.detach().clone() for place, tensor in enumerate(plain)}


@dataclass(frozen=True)
class Parting:
    """Where two lists of operations part first. kind: what the one and the other have not in common there.

    place: of the operation in the lists.
    """

    operation: Made
    kind: str
    one: str = ""
    other: str = ""
    place: int = 0


def parting(one: Sequence[Made], other: Sequence[Made]) -> Parting | None:
    """The first operation that gives something else, or that only one has; None where all give the same."""
    for place, (a, b) in enumerate(zip(one, other, strict=False)):
        if a.name != b.name:
            return Parting(a, "path", a.name, b.name, place)
        if a.unset or a.outputs == b.outputs:
            continue
        if a.plain != b.plain:
            return Parting(a, "number", *first_other(a.plain, b.plain), place)
        fixed = [x != y for x, y, flag in zip(a.inputs, b.inputs, a.written, strict=False) if not flag]
        if a.random:
            return Parting(a, "draw", place=place)
        in_place = [x != y for x, y, flag in zip(a.inputs, b.inputs, a.written, strict=False) if flag]
        return Parting(a, "tensor" if any(fixed) or any(in_place) else "kernel", place=place)
    if len(one) != len(other):
        longer, place = one if len(one) > len(other) else other, min(len(one), len(other))
        return Parting(longer[place], "path", longer[place].name, "nothing", place)
    return None


def first_other(one: str, other: str) -> tuple[str, str]:
    """The first of two operations' plain arguments that differ."""
    pairs = zip(one.split(", "), other.split(", "), strict=False)
    return next(((a, b) for a, b in pairs if a != b), (one, other))


def _written(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> set[int]:
    """The ids of the tensors that the operation writes; their versions change only when it has returned to autograd."""
    found: set[int] = set()
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            found |= {id(leaf) for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)}
    return found


def _sum(tensor: Tensor) -> str:
    try:
        if tensor.dtype == torch.bool or not (tensor.is_floating_point() or tensor.is_complex()):
            tensor = tensor.long()
        with torch.no_grad():
            return f"{checksum([tensor])[0]}{tuple(tensor.shape)}"
    except Exception:  # of another layout, say: it is compared by its shape
        return f"?{tuple(tensor.shape)}"


def _plain(leaf: Any) -> str:
    return "a generator" if isinstance(leaf, torch.Generator) else repr(leaf)
