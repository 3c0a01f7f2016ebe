"""Watches one forward and backward from below: every operation, its time, and how long each memory lives."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, is_dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import SAC_IGNORED_OPS
from torch.utils.flop_counter import flop_registry

from instep.gradient_checkpointing.replaying import given_generator, is_weight_cast

_WHOLE = frozenset({torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64})


@dataclass
class Memory:
    """One storage that the step made. `born`, `died`: operations of the step; `block` made it, -1 outside."""

    nbytes: int
    born: int
    block: int
    died: int = -1
    packed: set[int] = field(default_factory=set)  # by the blocks in which autograd saved it; -1 outside
    gradient: bool = False
    bare: bool = False  # read past the dispatcher
    weight: Tensor | None = None  # whose cast by autocast this is
    cast_in: int = -1  # the block in which it was cast
    cached: int = -1  # the operation up to which autocast's cache keeps it, whether or not backward needs it
    saved: int = -1  # the last operation up to which autograd keeps it


@dataclass
class TracedOperation:
    """One operation. Memories by their number. `pinned`: what it makes or changes is no memory with a number, such as a
    buffer or a tensor without elements, so that it has to be done again whenever the block is."""

    name: str
    module: str
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    views: int | None
    changes: bool
    constant: bool
    pinned: bool
    random: bool
    generator: bool
    flops: int
    seconds: float


@dataclass
class Visit:
    """One pass of a block: operations `start` to `stop`; `back`: the operation before which backward reached it;
    `done`: the one with which backward left it."""

    start: int
    stop: int = -1
    back: int = -1
    done: int = -1
    inputs: frozenset[int] = frozenset()
    outputs: frozenset[int] = frozenset()
    spoils: str = ""
    """The operation that changes in place what a second pass would find changed: an input, also after the block, or
    what the block did not make and is none of its buffers."""
    early: bool = False
    """Whether a backward came before the block's end: its forward takes a gradient itself."""


@dataclass(frozen=True)
class _Cast:
    """A view of a memory that is a cast weight."""

    number: int
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class Tracer(TorchDispatchMode):
    """Notes the operations of a step and the life of the memory that they make.

    `known` is memory that is no activation: weights, buffers, the batch.
    """

    def __init__(self, known: Iterable[Tensor], device: torch.device):
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device
        self.calls: list[TracedOperation] = []
        self.memories: list[Memory] = []
        self.visits: dict[int, list[Visit]] = {}
        self.forward_ends = 0
        self.clock = 0
        self.flops = 0
        self.block, self.module = -1, ""
        self._buffers: dict[int, set[int]] = {}
        self._casts: list[weakref.ref[Any]] = []
        self._aside = False  # what it does itself is not noted
        self._known = set(map(_storage, known))
        self._number: dict[int, int] = {}
        self._watched: dict[int, weakref.ref[Any]] = {}
        self._wait: Callable[[], None] = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in SAC_IGNORED_OPS or self._aside:
            return func(*args, **kwargs)
        if is_weight_cast(func, args):
            out = func(*args, **kwargs)
            if self._of(out) is None:
                memory = self.memories[self._add(out, -1)]
                memory.weight, memory.cast_in = args[0], self.block
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
        given = self._known | set(map(_storage, inputs))
        fresh = [value for value in outputs if _storage(value) not in given]
        made = [
            self._add(value, self.block) for value in fresh
            if value.layout is torch.strided and self._of(value) is None and value.untyped_storage().nbytes()
        ]  # fmt: skip
        is_view = not fresh and not changed and bool(outputs)
        taken = sorted(number for value in outputs if (number := self._of(value)) is not None)
        counter = flop_registry.get(getattr(func, "overloadpacket", None))
        flops = int(counter(*args, **kwargs, out_val=out)) if counter else _attention_flops(func, inputs)
        self.flops += flops
        self.calls.append(
            TracedOperation(
                str(func), self.module,
                reads=() if is_view else tuple(sorted(seen)), writes=tuple(sorted({*made, *changed_numbers})),
                views=taken[0] if is_view and taken else None,
                changes=bool(changed) and not made, constant=not outputs and not changed,
                pinned=not made and not changed_numbers and bool(fresh or changed),
                random=torch.Tag.nondeterministic_seeded in func.tags,
                generator=given_generator(args, kwargs) is not None, flops=flops, seconds=seconds,
            )
        )  # fmt: skip
        if not self.forward_ends:
            self._note_spoils(str(func), changed)

    def _note_spoils(self, name: str, changed: list[Tensor]) -> None:
        for value in changed:
            number, key = self._of(value), _storage(value)
            for index, visits in self.visits.items():
                visit = visits[-1]
                inside = index == self.block and (
                    key not in self._buffers[index] if number is None else self.memories[number].born <= visit.start
                )
                if inside or number in visit.inputs:
                    visit.spoils = name

    def _of(self, value: Tensor) -> int | None:
        return self._number.get(_storage(value)) if value.layout is torch.strided else None

    def _add(self, value: Tensor, block: int) -> int:
        storage = value.untyped_storage()
        number, key = len(self.memories), storage._cdata
        # Whole numbers tell how others are cut, and functions made of several operations read them as they lie.
        counts = value.device.type == "cpu" and value.dtype in _WHOLE
        self.memories.append(Memory(storage.nbytes(), self.clock, block, bare=counts))
        self._number[key] = number

        def died(_: Any) -> None:
            self.memories[number].died = self.clock
            if self._number.get(key) == number:
                del self._number[key]
            self._watched.pop(number, None)

        self._watched[number] = weakref.ref(storage, died)
        return number

    def read(self, values: Any) -> None:
        """Tensors in `values` are read past the dispatcher."""
        for value in pytree.tree_leaves(values):
            number = self._of(value) if isinstance(value, Tensor) else None
            if number is not None:
                self.memories[number].bare = True

    # What autograd saves

    def pack(self, value: Tensor) -> tuple[Tensor | _Cast, int]:
        """Autograd saves `value`. A weight that was cast is not held, to see how long autocast holds it."""
        number = self._of(value)
        if number is not None:
            memory = self.memories[number]
            memory.packed.add(self.block)
            if memory.weight is not None:
                cast = _Cast(number, value.dtype, value.size(), value.stride(), int(value.storage_offset()))
                self._casts.append(weakref.ref(cast, partial(self._released, memory)))
                return cast, self.block
        return value.detach(), self.block  # an operation that saves its own output would hold on to itself

    def unpack(self, packed: tuple[Tensor | _Cast, int]) -> Tensor:
        """Backward reads what was saved."""
        value, block = packed
        if isinstance(value, _Cast):
            value = self._again(value)
        if block >= 0:
            visit = self.visits[block][-1]
            visit.early |= visit.stop < 0
            visit.back = self.clock if visit.back < 0 else visit.back
            visit.done = self.clock + 1
        return value

    def _released(self, memory: Memory, _: Any) -> None:
        memory.saved = self.clock

    def _again(self, cast: _Cast) -> Tensor:
        weight = self.memories[cast.number].weight
        assert weight is not None
        self._aside = True
        try:
            return weight.detach().to(cast.dtype).as_strided(cast.size, cast.stride, cast.offset)
        finally:
            self._aside = False

    def settle(self) -> None:
        """Once the step has ended: casts of weights lived as long as autocast or autograd needed them."""
        for memory in self.memories:
            if memory.weight is not None:
                memory.weight = None
                memory.cached = self.clock if memory.died < 0 else memory.died
                memory.died = max(memory.cached, memory.saved)

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
            self._buffers[index] = set(map(_storage, block.buffers()))
            handles.append(block.register_forward_pre_hook(self._enter(index), with_kwargs=True, prepend=True))
            handles.append(block.register_forward_hook(self._leave, with_kwargs=True, always_call=True))
            for part, module in block.named_modules():
                if part:
                    handles.append(module.register_forward_pre_hook(self._moves_to(part)))
                    handles.append(module.register_forward_hook(self._moves_to(part.rpartition(".")[0])))
        return handles

    def _enter(self, index: int) -> Any:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            if not torch.is_grad_enabled():
                return
            visit = Visit(self.clock, inputs=self._numbers([args, kwargs]))
            self.visits.setdefault(index, []).append(visit)
            self.block, self.module = index, ""

        return enter

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        if not torch.is_grad_enabled():
            return
        visit = self.visits[self.block][-1]
        visit.stop, visit.outputs = self.clock, self._numbers(out)
        self.block, self.module = -1, ""

    def _numbers(self, values: Any) -> frozenset[int]:
        return frozenset(number for value in tensors_in(values) if (number := self._of(value)) is not None)

    def _moves_to(self, part: str) -> Any:
        def hook(*_: Any) -> None:
            self.module = part

        return hook


_READERS = frozenset({Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.data_ptr, Tensor.__dlpack__})


class Readers(TorchFunctionMode):
    """Tells a tracer what is read past the dispatcher."""

    def __init__(self, tracer: Tracer):
        super().__init__()
        self._tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READERS:
            self._tracer.read(args)
        return func(*args, **(kwargs or {}))


def tensors_in(values: Any) -> list[Tensor]:
    """All tensors in lists, dicts, whatever else pytree knows, and dataclasses, in order."""
    tensors: list[Tensor] = []
    for leaf in pytree.tree_leaves(values):
        if isinstance(leaf, Tensor):
            tensors.append(leaf)
        elif is_dataclass(leaf) and not isinstance(leaf, type):
            tensors += tensors_in([getattr(leaf, part.name) for part in fields(leaf)])
    return tensors


def _storage(value: Tensor) -> int:
    """Says whether two tensors lie in one memory; a sparse one has a number of its own."""
    return int(value.untyped_storage()._cdata) if value.layout is torch.strided else id(value)


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
