"""Watches one forward and backward from below: every operation, its time, and how long each memory lives."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import SAC_IGNORED_OPS
from torch.utils.flop_counter import flop_registry

from instep.gradient_checkpointing.replaying import is_weight_cast


@dataclass
class Memory:
    """One storage that the step made. `born`, `died`: operations of the step; `block` made it, -1 outside."""

    nbytes: int
    born: int
    block: int
    died: int = -1
    packed: set[int] = field(default_factory=set)  # by the blocks in which autograd saved it; -1 outside
    gradient: bool = False


@dataclass
class Call:
    """One operation. Memories by their number; `inputs` are those made outside the block, or before."""

    name: str
    module: str
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    views: int | None
    changes: bool
    constant: bool
    changed_outside: bool
    random: bool
    flops: int
    seconds: float


@dataclass
class Visit:
    """One pass of a block: operations `start` to `stop`; `back`: the operation before which backward reached it."""

    start: int
    stop: int = -1
    back: int = -1
    inputs: frozenset[int] = frozenset()
    outputs: frozenset[int] = frozenset()
    changes_input: str = ""


class Tracer(TorchDispatchMode):
    """Notes the operations of a step and the life of the memory that they make.

    `known` is memory that is no activation: weights, buffers, the batch.
    """

    def __init__(self, known: Iterable[Tensor], device: torch.device):
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device
        self.calls: list[Call] = []
        self.memories: list[Memory] = []
        self.visits: dict[int, list[Visit]] = {}
        self.forward_ends = 0
        self.clock = 0
        self.flops = 0
        self.block, self.module = -1, ""
        self._known = {tensor.untyped_storage()._cdata for tensor in known if tensor.layout is torch.strided}
        self._number: dict[int, int] = {}
        self._watched: dict[int, weakref.ref[Any]] = {}
        self._wait: Callable[[], None] = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in SAC_IGNORED_OPS:
            return func(*args, **kwargs)
        if is_weight_cast(func, args):
            out = func(*args, **kwargs)
            if self._of(out) is None:
                self._add(out, -1)
            return out
        inputs = [value for value in pytree.arg_tree_leaves(*args, **kwargs) if isinstance(value, Tensor)]
        seen = {number for value in inputs if (number := self._of(value)) is not None}
        self.clock += 1
        self._wait()
        began = time.perf_counter()
        out = func(*args, **kwargs)
        self._wait()
        seconds = time.perf_counter() - began
        self._note(func, args, kwargs, inputs, seen, out, seconds)
        return out

    def _note(
        self, func: Any, args: Any, kwargs: Any, inputs: list[Tensor], seen: set[int], out: Any, seconds: float
    ) -> None:
        outputs = [value for value in pytree.tree_leaves(out) if isinstance(value, Tensor)]
        changed = _changed(func, args, kwargs)
        changed_numbers = {number for value in changed if (number := self._of(value)) is not None}
        made = []
        for value in outputs:
            number = self._of(value)
            if number is None and not self._is_known(value) and value.untyped_storage().nbytes():
                made.append(self._add(value, self.block))
        taken = {self._of(value) for value in outputs} - set(made) - changed_numbers - {None}
        is_view = not made and not changed and bool(outputs)
        counter = flop_registry.get(getattr(func, "overloadpacket", None))
        flops = int(counter(*args, **kwargs, out_val=out)) if counter else _attention_flops(func, inputs)
        self.flops += flops
        self.calls.append(
            Call(
                str(func), self.module,
                reads=() if is_view else tuple(sorted(seen)), writes=tuple(sorted({*made, *changed_numbers})),
                views=next(iter(sorted(n for n in taken if n is not None)), None) if is_view else None,
                changes=bool(changed) and not made, constant=not outputs,
                changed_outside=len(changed_numbers) < len({v.untyped_storage()._cdata for v in changed}),
                random=torch.Tag.nondeterministic_seeded in func.tags, flops=flops, seconds=seconds,
            )
        )  # fmt: skip
        if self.block >= 0 and changed_numbers & self.visits[self.block][-1].inputs:
            self.visits[self.block][-1].changes_input = str(func)

    def _is_known(self, value: Tensor) -> bool:
        return value.layout is not torch.strided or value.untyped_storage()._cdata in self._known

    def _of(self, value: Tensor) -> int | None:
        return self._number.get(value.untyped_storage()._cdata) if value.layout is torch.strided else None

    def _add(self, value: Tensor, block: int) -> int:
        storage = value.untyped_storage()
        number, key = len(self.memories), storage._cdata
        self.memories.append(Memory(storage.nbytes(), self.clock, block))
        self._number[key] = number

        def died(_: Any) -> None:
            self.memories[number].died = self.clock
            if self._number.get(key) == number:
                del self._number[key]
            self._watched.pop(number, None)

        self._watched[number] = weakref.ref(storage, died)
        return number

    # What autograd saves

    def pack(self, value: Tensor) -> tuple[Tensor, int]:
        """Autograd saves `value`."""
        number = self._of(value)
        if number is not None:
            self.memories[number].packed.add(self.block)
        return value, self.block

    def unpack(self, packed: tuple[Tensor, int]) -> Tensor:
        """Backward reads what was saved."""
        value, block = packed
        if block >= 0 and self.visits[block][-1].back < 0:
            self.visits[block][-1].back = self.clock
        return value

    def gradients(self, found: Iterable[Tensor | None]) -> None:
        """Weights' gradients: whoever trains takes them away as soon as they are made."""
        for value in found:
            number = None if value is None else self._of(value)
            if number is not None:
                self.memories[number].gradient = True

    # Blocks and their parts

    def watch(self, model: nn.Module, names: list[str]) -> list[Any]:
        """Hooks that tell in which block an operation is. Returns their handles."""
        handles: list[Any] = []
        for index, name in enumerate(names):
            block = model.get_submodule(name)
            handles.append(block.register_forward_pre_hook(self._enter(index), with_kwargs=True, prepend=True))
            handles.append(block.register_forward_hook(self._leave, with_kwargs=True, always_call=True))
            for part, module in block.named_modules():
                if part:
                    handles.append(module.register_forward_pre_hook(self._into(part)))
                    handles.append(module.register_forward_hook(self._out_of(part)))
        return handles

    def _enter(self, index: int) -> Any:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            inputs = (self._of(v) for v in pytree.arg_tree_leaves(*args, **kwargs) if isinstance(v, Tensor))
            visit = Visit(self.clock, inputs=frozenset(number for number in inputs if number is not None))
            self.visits.setdefault(index, []).append(visit)
            self.block, self.module = index, ""

        return enter

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        visit = self.visits[self.block][-1]
        outputs = (self._of(value) for value in pytree.tree_leaves(out) if isinstance(value, Tensor))
        visit.stop, visit.outputs = self.clock, frozenset(number for number in outputs if number is not None)
        self.block, self.module = -1, ""

    def _into(self, part: str) -> Any:
        def into(module: nn.Module, args: Any) -> None:
            self.module = part

        return into

    def _out_of(self, part: str) -> Any:
        def out_of(module: nn.Module, args: Any, out: Any) -> None:
            self.module = part.rpartition(".")[0]

        return out_of


def _changed(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The tensors that an operation changes in place."""
    schema = func._schema
    if not schema.is_mutable:
        return []
    found: list[Tensor] = []
    for place, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            found += [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
    return found


def _attention_flops(func: Any, inputs: list[Tensor]) -> int:
    """FLOPs of attention on a CPU, which torch's own table lacks: two products forward, five backward."""
    name = str(func)
    if not name.startswith("aten._scaled_dot_product_flash_attention_for_cpu"):
        return 0
    backward = "backward" in name
    q, k = inputs[1:3] if backward else inputs[:2]
    once = 2 * q.shape[0] * q.shape[1] * q.shape[2] * q.shape[3] * k.shape[2]
    return (5 if backward else 2) * once
