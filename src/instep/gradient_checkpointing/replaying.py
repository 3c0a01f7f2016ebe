"""What goes on inside a checkpointed block: its forward is watched by operation, and done again for backward.

`FirstPass` and `Repeat` are the two contexts that `torch.utils.checkpoint` asks for. They differ from those of
`torch.utils.checkpoint.create_selective_checkpoint_contexts` in four ways. They choose by an operation's number in
the block, not by its type. An operation whose output nothing needs is not done again: its output has a shape and no
memory. Random operations that are done again get the random state that they had, also where one before them was kept
(torch would give them other numbers). And values can be checked.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import SAC_IGNORED_OPS

from instep.bits import bits_of
from instep.errors import RecomputeError
from instep.gradient_checkpointing.structure import Act, BlockPlan

UNSET = frozenset({"aten.empty", "aten.empty_like", "aten.new_empty", "aten.empty_strided", "aten.new_empty_strided"})
"""Operations whose output has no value yet."""

LEAVE_OUT = "leave the block out of the plan with blocks= (in a run, train without team.memory)"

WORKSPACE = {
    "aten.mkldnn_rnn_layer": 3, "aten._cudnn_rnn": 3, "aten.miopen_rnn": 3, "aten.cudnn_batch_norm": 3,
}  # fmt: skip
"""Operations whose outputs from this one on are scratch memory for backward, in part never written."""


class Script:
    """A block's plan by operation, as the contexts read it. Shared by all passes of the block."""

    def __init__(self, plan: BlockPlan):
        operations, acts = plan.kind.operations, plan.choice.acts
        self.block = plan.name
        self.names = [operation.name for operation in operations]
        self.modules = [operation.module for operation in operations]
        self.acts = list(acts)
        self.changes = [operation.changes for operation in operations]
        self.random = [operation.random for operation in operations]
        self.generators = [operation.generator for operation in operations]
        self.views = [operation.views is not None for operation in operations]
        kept = set(plan.choice.kept)
        self.parts = [tuple(index in kept for index in operation.writes) for operation in operations]
        self.skips = Act.SKIP in self.acts or any(len(set(parts)) > 1 for parts in self.parts)
        self.draws = any(self.generators)
        self.known: list[Any] = [None] * len(operations)  # the operation itself, once its name was seen to fit

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "known": [None] * len(self.names)}  # not every operation can be pickled

    def fits(self, place: int, func: Any) -> bool:
        """Whether `func` is the operation that the plan has at `place`."""
        if place >= len(self.names):
            return False
        if self.known[place] is func:
            return True
        if str(func) == self.names[place]:
            self.known[place] = func
            return True
        return False

    def where(self, place: int) -> str:
        """The block and, where the operations are those of the plan, the part of it that calls the one at `place`."""
        module = self.modules[place] if place < len(self.modules) and self.known[place] is not None else ""
        return f"{self.block}.{module}" if module else self.block


@dataclass
class Frame:
    """One pass through a block, from its forward to its backward."""

    script: Script
    verify: bool
    verify_s: dict[str, float]
    """Seconds of comparing, by block."""
    watched: bool = False
    planned: bool = True
    """Whether the operations were those of the plan so far. If they were not, everything is done again."""
    functions: list[Any] = field(default_factory=list)
    kept: dict[int, Any] = field(default_factory=dict)
    versions: list[tuple[Tensor, int]] = field(default_factory=list)
    shapes: dict[int, Any] = field(default_factory=dict)
    states: dict[int, Tensor] = field(default_factory=dict)
    sums: dict[int, Any] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    tables: list[tuple[dict[str, Any], dict[str, Any]]] = field(default_factory=list)
    """The tables of parameters and buffers of the block's modules, each with what it held in the first pass."""

    def sum(self, func: Any, out: Any) -> Any:
        """The checksum of what an operation gave, scratch memory left out."""
        began = time.perf_counter()
        values = WORKSPACE.get(str(func.overloadpacket))
        found = checksum(out if values is None else out[:values])
        self.verify_s[self.script.block] += time.perf_counter() - began
        return found

    def whole(self) -> bool:
        """Whether everything has to be done again: nothing that was kept can stand in."""
        if not self.planned or len(self.functions) != len(self.script.names):
            return True
        # What was changed in place since it was kept is no longer what the first pass had.
        return any(tensor._version != version for tensor, version in self.versions)


class FirstPass(TorchDispatchMode):
    """The first pass: keeps what the plan says."""

    def __init__(self, frame: Frame):
        super().__init__()  # type: ignore[no-untyped-call]
        self._frame = frame
        frame.watched = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in SAC_IGNORED_OPS or is_weight_cast(func, args):
            return func(*args, **kwargs)
        frame, script = self._frame, self._frame.script
        place = len(frame.functions)
        frame.functions.append(func)
        if frame.planned and not script.fits(place, func):
            frame.planned = False
            script.known = [None] * len(script.names)
            frame.kept.clear()
            frame.versions.clear()
            frame.shapes.clear()
        act = script.acts[place] if frame.planned else Act.REPEAT
        if self._draws_again(place, func, act):
            frame.states[place] = _random_state(args, kwargs)[0]
        out = func(*args, **kwargs)
        if act is Act.KEEP:
            self._keep(place, out)
        elif act is Act.SKIP and not script.changes[place]:
            frame.shapes[place] = pytree.tree_map_only(Tensor, _shape, out)
        elif frame.verify and act is Act.REPEAT and self._has_value(place, func):
            frame.sums[place] = frame.sum(func, out)
        return out

    def _draws_again(self, place: int, func: Any, act: Act) -> bool:
        """Whether an operation may need its random state again: where all is done again, torch sets the default
        generator's once, and nobody sets that of another."""
        script = self._frame.script
        if not self._frame.planned:
            return torch.Tag.nondeterministic_seeded in func.tags
        return script.random[place] and (act is Act.REPEAT or script.generators[place])

    def _has_value(self, place: int, func: Any) -> bool:
        """Whether an output is worth checking. A view of what is kept may show a later value in the second pass; who
        makes what it views is checked."""
        view = self._frame.planned and self._frame.script.views[place]
        return not view and str(func.overloadpacket) not in UNSET

    def _keep(self, place: int, out: Any) -> None:
        frame, script = self._frame, self._frame.script
        if script.changes[place]:  # the value is that of the storage, which its maker's entry holds
            for index, (tensor, _) in enumerate(frame.versions):
                frame.versions[index] = (tensor, tensor._version)
            return
        frame.kept[place] = _needed(out, script.parts[place])
        frame.versions += [(t, t._version) for t in pytree.tree_leaves(frame.kept[place]) if isinstance(t, Tensor)]


class Repeat(TorchDispatchMode):
    """The second pass: gives back what was kept, skips what nothing needs and does the rest again."""

    def __init__(self, frame: Frame):
        super().__init__()  # type: ignore[no-untyped-call]
        self._frame = frame
        self._place = 0
        self._whole = False

    def __enter__(self) -> Any:
        self._place, self._whole = 0, self._frame.whole()
        if self._whole:
            self._frame.kept.clear()
        self._frame.versions.clear()
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> Any:
        self._frame.kept.clear()  # a second backward through the same graph does everything again
        self._frame.planned = False
        return super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in SAC_IGNORED_OPS or is_weight_cast(func, args):
            return func(*args, **kwargs)
        frame, script, place = self._frame, self._frame.script, self._place
        self._place += 1
        first: Any = frame.functions[place] if place < len(frame.functions) else None
        if func is not first:
            raise _other_operation(script, place, func, first)
        act = Act.REPEAT if self._whole else script.acts[place]
        if act is not Act.REPEAT and script.changes[place]:
            return args[0] if func._schema.returns else None
        if act is Act.KEEP:
            return pytree.tree_map_only(_Shape, _without_memory, frame.kept.pop(place))
        if act is Act.SKIP:
            return pytree.tree_map_only(_Shape, _without_memory, frame.shapes[place])
        if script.skips and not self._whole:
            _check_read(script, place, args)
        state = frame.states.get(place)
        if state is None or (self._whole and given_generator(args, kwargs) is None):
            out = func(*args, **kwargs)
        else:
            now, generator = _random_state(args, kwargs)
            generator.set_state(state)
            out = func(*args, **kwargs)
            generator.set_state(now)  # what draws next, in backward or after it, sees none of this
        expected = frame.sums.get(place)
        if expected is not None and frame.sum(func, out) != expected:
            raise RecomputeError(
                f"operation {place} of block '{script.block}', {_short(func)} in '{script.where(place)}', gave another "
                f"value in recompute than in the first pass: its forward depends on something that changed "
                f"meanwhile, such as a counter, a global or random numbers of its own; mend that, or {LEAVE_OUT}."
            )
        return out


def is_weight_cast(func: Any, args: Any) -> bool:
    """Whether this is autocast casting a weight. It does so in one pass and finds it in its cache in another, so it
    is no part of a block's operations. A frozen weight is never in that cache."""
    return func is torch.ops.aten._to_copy.default and isinstance(args[0], nn.Parameter) and args[0].requires_grad


@dataclass(frozen=True)
class _Shape:
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    conjugate: bool
    negative: bool


def _shape(tensor: Tensor) -> _Shape:
    return _Shape(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device, tensor.is_conj(), tensor.is_neg())


def _without_memory(shape: _Shape) -> Tensor:
    """A tensor of this shape and layout without memory. `_check_read` keeps everybody from reading it."""
    empty = torch.empty(0, dtype=shape.dtype, device=shape.device)
    tensor: Tensor = torch._C._dynamo.guards._reinterpret_tensor(empty, shape.size, shape.stride, 0)  # type: ignore[attr-defined]
    torch._C._set_conj(tensor, shape.conjugate)
    torch._C._set_neg(tensor, shape.negative)
    return tensor


def _check_read(script: Script, place: int, args: Any) -> None:
    """Raises where an operation would read a tensor without memory: its inputs are others than in the profile."""
    for value in args:
        if isinstance(value, (list, tuple)):
            _check_read(script, place, value)
        elif not isinstance(value, Tensor) or value.layout is not torch.strided:
            continue
        elif value.numel() and not value.untyped_storage().nbytes():
            raise RecomputeError(
                f"operation {place} of block '{script.block}', in '{script.where(place)}', reads another tensor than "
                f"when the model was profiled, though its operations are the same; profile it again, or {LEAVE_OUT}."
            )


def _needed(out: Any, parts: tuple[bool, ...]) -> Any:
    """What to keep of an operation's outputs: of those that nothing needs the shape. `parts`: which memories, of those
    that it made, in order, are needed."""
    tensors = [value for value in pytree.tree_leaves(out) if isinstance(value, Tensor)]
    if len(set(parts)) < 2 or any(value.layout is not torch.strided for value in tensors):
        return pytree.tree_map_only(Tensor, _detached, out)
    made = dict.fromkeys(s._cdata for s in (value.untyped_storage() for value in tensors) if s.nbytes())
    needed = dict(zip(made, parts, strict=False)) if len(made) == len(parts) else {}

    def part(value: Tensor) -> Any:
        return _detached(value) if needed.get(value.untyped_storage()._cdata, True) else _shape(value)

    return pytree.tree_map_only(Tensor, part, out)


def _detached(tensor: Tensor) -> Tensor:
    # Below autograd, so that the version of the tensor itself is seen: as torch's own contexts do.
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
        return tensor.detach()


def _random_state(args: Any, kwargs: Any) -> tuple[Tensor, torch.Generator]:
    """The state of the generator that an operation draws from, and that generator."""
    generator = given_generator(args, kwargs)
    if generator is None:
        leaves = pytree.arg_tree_leaves(*args, **kwargs)
        device = next((value.device for value in leaves if isinstance(value, Tensor)), None)
        device = device or torch.device(kwargs.get("device") or "cpu")
        if device.type == "cuda":
            index = torch.cuda.current_device() if device.index is None else device.index
            generator = torch.cuda.default_generators[index]
        else:
            generator = torch.default_generator
    return generator.get_state(), generator


def given_generator(args: Any, kwargs: Any) -> torch.Generator | None:
    """The generator that an operation is given to draw from."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, torch.Generator)), None)


def _other_operation(script: Script, place: int, func: Any, first: Any) -> RecomputeError:
    then = f"where the first pass had {_short(first)}" if first is not None else "which the first pass did not have"
    return RecomputeError(
        f"operation {place} of block '{script.block}', in '{script.where(place)}', is {_short(func)} in recompute, "
        f"{then}: its forward cannot be run twice alike; mend what differs between the two, such as a counter or a "
        f"cache (in transformers, use_cache=False), or {LEAVE_OUT}."
    )


def _short(func: Any) -> str:
    return str(func).removeprefix("aten.")


CHUNK = 1 << 16
"""Elements that are summed at once, so that a checksum needs little memory of its own."""


@torch.no_grad()
def checksum(values: Any) -> tuple[Any, ...]:
    """Of each tensor in `values`, in order: its shape, type, the sum of its bits as integers, and their sum weighted by
    place (both modulo 2**64). Other values stand for themselves. Exact bits count: -0.0 and 0.0 differ, and two NaNs
    of the same bits are the same."""
    return tuple(_of(value) for value in pytree.tree_leaves(values))


def _of(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    facts = (tuple(value.shape), value.dtype)
    if value.layout is not torch.strided or value.is_quantized:
        return facts
    value = value.resolve_conj().resolve_neg()
    bits = bits_of(value.contiguous()).view(-1)
    total = weighted = 0
    for start in range(0, bits.numel(), CHUNK):
        part = bits[start : start + CHUNK].to(torch.int64)  # integers: their sum has no order, on any device
        total += int(part.sum())
        places = torch.arange(start + 1, start + 1 + part.numel(), device=part.device)
        weighted += int((part * places).sum())
    return (*facts, total % 2**64, weighted % 2**64)
