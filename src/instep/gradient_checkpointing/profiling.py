"""Profiles one microbatch: what backward keeps, what it costs to make again, and when memory is alive."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from instep.bits import same_bits
from instep.errors import CheckpointingError
from instep.gradient_checkpointing.applying import planned
from instep.gradient_checkpointing.blocks import find_blocks, named_blocks
from instep.gradient_checkpointing.overheads import overheads_of
from instep.gradient_checkpointing.replaying import LEAVE_OUT
from instep.gradient_checkpointing.structure import BlockKind, Moment, Operation, Profile, Storage
from instep.gradient_checkpointing.tracing import Memory, Readers, Tracer, Visit, tensors_in
from instep.restore import kept_module_state, kept_random_state

Objective = Callable[[Any, Any], Tensor | Mapping[str, Tensor]]

PASSES = 3
"""Traced passes, and timed ones; medians count, so that operations and the step are measured alike."""


def profile(model: nn.Module, objective: Objective, batch: Any, *, blocks: Sequence[str] | None = None) -> Profile:
    """What a forward and backward of `objective(model, batch)` keep and cost, with nothing recomputed.

    objective: a function of (model, batch) to a scalar tensor, or to a mapping of names to such, which are added up.
    blocks: names of modules that may be recomputed; by default the repeated blocks, see `blocks.find_blocks`.

    >>> model = torch.nn.Sequential(*(torch.nn.Sequential(torch.nn.Linear(9, 9), torch.nn.GELU()) for _ in range(4)))
    >>> inputs = torch.ones(5, 9)
    >>> profile = instep.gradient_checkpointing.profile(model, lambda model, batch: model(batch).sum(), inputs)
    >>> profile.names
    ('0', '1', '2', '3')

    It computes some passes; weights, buffers, gradients and random state are left as they were. Raises
    CheckpointingError where there are no blocks, or one cannot be run twice.
    """
    names = find_blocks(model) if blocks is None else named_blocks(model, blocks)
    if planned(model):
        raise CheckpointingError(
            "the model has a plan on it already, and a profile is of the model without; remove it."
        )
    names = _used_once(model, objective, batch, names)
    traces = [_trace(model, objective, batch, names) for _ in range(PASSES)]
    buffers = _changed_buffers(model, objective, batch, names)
    seconds = statistics.median(_timed(model, objective, batch) for _ in range(PASSES))
    return _profile(traces, names, buffers, seconds)


def measure(model: nn.Module, objective: Objective, batch: Any) -> tuple[int, float]:
    """The peak of activation bytes in a step of the model as it is, with or without a plan, and the step's seconds.

    Bytes are those of live storages, as the profile counts them: weights, their gradients, buffers and the batch are
    left out.
    """
    tracer = _trace(model, objective, batch, [])
    seconds = min(_timed(model, objective, batch) for _ in range(2))  # what else runs on the machine only adds
    live = _alive(tracer, range(len(tracer.memories)))
    return max(live, default=0), seconds


def _used_once(model: nn.Module, objective: Objective, batch: Any, names: list[str]) -> list[str]:
    calls = dict.fromkeys(names, 0)

    def count(name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: Any) -> None:
            calls[name] += torch.is_grad_enabled()  # else it keeps nothing, and no plan is asked

        return note

    handles = [model.get_submodule(name).register_forward_pre_hook(count(name)) for name in names]
    try:
        with _untouched(model):
            _total(objective(model, batch))
    finally:
        for handle in handles:
            handle.remove()
    once = [name for name, number in calls.items() if number == 1]
    if not once:
        name, number = next(iter(calls.items()))
        raise CheckpointingError(
            f"block '{name}' runs {number} times in a forward, and a plan is for blocks that run once; train it "
            f"without a memory budget (--memory, team.memory) or, in Python, name others, as in "
            f"instep.gradient_checkpointing.profile(..., blocks=['encoder', 'head'])."
        )
    return once


def _trace(model: nn.Module, objective: Objective, batch: Any, names: list[str]) -> Tracer:
    known = [*model.parameters(), *model.buffers(), *tensors_in(batch)]
    tracer = Tracer(known, _device(model))
    handles = tracer.watch(model, names)
    hooks = torch.autograd.graph.saved_tensors_hooks(tracer.pack, tracer.unpack)
    try:
        with _untouched(model), tracer:
            with hooks if names else nullcontext(), Readers(tracer):
                loss = _total(objective(model, batch))
            tracer.forward_ends = tracer.clock
            found = _gradients(model, loss)
            tracer.gradients(found)
            del found, loss
        tracer.settle()
    finally:
        for handle in handles:
            handle.remove()
    for index, visits in tracer.visits.items():
        if visits[-1].spoils:
            raise CheckpointingError(
                f"{visits[-1].spoils} changes in place an input of block '{names[index]}', or a tensor that is none of "
                f"its buffers, so its forward cannot be run twice; let it work on a copy, make the tensor a buffer of "
                f"the block, or {LEAVE_OUT}."
            )
        if visits[-1].early:
            raise CheckpointingError(
                f"block '{names[index]}' takes a gradient in its own forward, which so needs what is to be made again "
                f"before the block has ended; {LEAVE_OUT}."
            )
    return tracer


def _timed(model: nn.Module, objective: Objective, batch: Any) -> float:
    on_gpu = _device(model).type == "cuda"
    with _untouched(model):
        if on_gpu:
            torch.cuda.synchronize()
        began = time.perf_counter()
        _gradients(model, _total(objective(model, batch)))
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - began


def _device(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def _gradients(model: nn.Module, loss: Tensor) -> tuple[Tensor | None, ...]:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters or not loss.requires_grad:
        raise CheckpointingError(
            "the objective depends on no weight that requires a gradient, so there is no backward to plan for; let "
            "some weight require one, and detach nothing on the way to the objective."
        )
    return torch.autograd.grad(loss, parameters, allow_unused=True)


def _total(sums: Any) -> Tensor:
    parts = list(sums.values()) if isinstance(sums, Mapping) else [sums]
    if not parts or not all(isinstance(part, Tensor) and part.dim() == 0 for part in parts):
        raise CheckpointingError(
            "the objective gave no scalar tensor; it must give one, or a mapping of names to such, from (model, batch)."
        )
    return torch.stack([part.float() for part in parts]).sum() if len(parts) > 1 else parts[0]


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    parts = [value for module in model.modules() for value in vars(module).values()]
    generators = [(part, part.get_state()) for part in parts if isinstance(part, torch.Generator)]
    try:
        with kept_random_state(), kept_module_state(model), torch.enable_grad():
            yield
    finally:
        for generator, state in generators:
            generator.set_state(state)


def _changed_buffers(model: nn.Module, objective: Objective, batch: Any, names: list[str]) -> list[dict[str, int]]:
    """Of each block, the buffers that a forward changes, and their bytes."""
    with _untouched(model):  # with gradients, for an objective may take some itself
        before = {name: dict(_copies(model.get_submodule(name))) for name in names}
        objective(model, batch)
        return [
            {
                key: value.nbytes
                for key, value in _copies(model.get_submodule(name))
                if key not in before[name] or not same_bits(value, before[name][key])
            }
            for name in names
        ]


def _copies(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, buffer in module.named_buffers(remove_duplicate=False):
        yield name, buffer.detach().clone()


# From traces to the profile


def _profile(traces: list[Tracer], names: list[str], buffers: list[dict[str, int]], seconds: float) -> Profile:
    tracer = traces[-1]
    visits = [tracer.visits[index][-1] for index in range(len(names))]
    if any([c.name for c in t.calls] != [c.name for c in tracer.calls] for t in traces):
        raise CheckpointingError(
            "two forwards of the model on the same batch and random state are different operations, so no block can "
            "be planned; look for a counter or a cache in it (in transformers, use_cache=False)."
        )
    device = tracer.device
    took = [statistics.median(t.calls[place].seconds for t in traces) for place in range(len(tracer.calls))]
    own = [_own(tracer, index, visit) for index, visit in enumerate(visits)]
    extra = _extra(tracer, visits)
    casts = [_casts(tracer, index, visit) for index, visit in enumerate(visits)]
    kinds: dict[BlockKind, list[int]] = {}
    built = []
    for index, visit in enumerate(visits):
        kind = _kind(tracer, visit, own[index], took, extra[index], buffers[index])
        kind = replace(kind, cast_bytes=sum(memory.nbytes for memory in casts[index]))
        built.append(kind)
        kinds.setdefault(_signature(kind), []).append(index)
    order = list(kinds)
    return Profile(
        kinds=tuple(_averaged([built[index] for index in kinds[key]]) for key in order),
        names=tuple(names),
        kind_of=tuple(order.index(_signature(kind)) for kind in built),
        moments=_moments(tracer, visits, own, casts),
        flops=tracer.flops,
        seconds=seconds,
        peak_bytes=max(_alive(tracer, range(len(tracer.memories))), default=0),
        overheads=overheads_of(device),
    )


def _own(tracer: Tracer, index: int, visit: Visit) -> list[int]:
    """The memories that the block made."""
    return [
        number for number, memory in enumerate(tracer.memories)
        if memory.block == index and visit.start < memory.born <= visit.stop
    ]  # fmt: skip


def _escapes(tracer: Tracer, number: int, visit: Visit) -> bool:
    """Whether the memory leaves the block: as an output, for others' backward, or kept by whoever else refers to it."""
    memory = tracer.memories[number]
    if number in visit.outputs or memory.packed - {memory.block}:
        return True
    return not memory.packed and _died(tracer, memory) > visit.stop


def _holds(tracer: Tracer, own: list[int], visit: Visit) -> list[int]:
    """Of a block's memories, those that only backward's needs keep alive after it."""
    return [
        number for number in own
        if _died(tracer, tracer.memories[number]) > visit.stop and not _escapes(tracer, number, visit)
    ]  # fmt: skip


def _casts(tracer: Tracer, index: int, visit: Visit) -> list[Memory]:
    """The weights that autocast has cast for the block's backward alone, and that its cache lets go of before."""
    return [
        memory for memory in tracer.memories
        if memory.cast_in == index and visit.start <= memory.born <= visit.stop and memory.packed == {index}
        and visit.stop < _died(tracer, memory) and memory.cached < visit.back
    ]  # fmt: skip


def _died(tracer: Tracer, memory: Memory) -> int:
    """The last operation while which the memory was alive."""
    if memory.gradient:
        return memory.born
    return tracer.clock if memory.died < 0 else memory.died


def _extra(tracer: Tracer, visits: list[Visit]) -> list[int]:
    """By block, bytes of inputs that only a checkpointed block holds on to."""
    counted: set[int] = set()
    found = []
    for visit in visits:
        new = {n for n in visit.inputs if _died(tracer, tracer.memories[n]) < tracer.forward_ends} - counted
        counted |= new
        found.append(sum(tracer.memories[number].nbytes for number in new))
    return found


def _kind(
    tracer: Tracer, visit: Visit, own: list[int], took: list[float], extra: int, buffers: dict[str, int]
) -> BlockKind:
    place_of = {number: place for place, number in enumerate(own)}
    length = visit.stop - visit.start

    def local(numbers: Sequence[int]) -> tuple[int, ...]:
        return tuple(place_of[number] for number in numbers if number in place_of)

    operations = []
    for place in range(visit.start, visit.stop):
        call = tracer.calls[place]
        writes = local(call.writes)
        operations.append(
            Operation(
                call.name, call.module, call.flops, took[place],
                reads=local(call.reads) if writes or call.pinned else (), writes=writes,
                views=place_of.get(call.views) if call.views is not None else None,
                changes=call.changes, random=call.random, constant=call.constant,
                pinned=call.pinned, generator=call.generator,
            )
        )  # fmt: skip
    storages = []
    for number in own:
        memory = tracer.memories[number]
        died = _died(tracer, memory)
        packed, escapes = memory.block in memory.packed, _escapes(tracer, number, visit)
        dies = length if died > visit.stop else died - visit.start - 1
        if packed and not escapes:
            dies = _last_use(tracer, visit, number)
        storages.append(Storage(memory.nbytes, memory.born - visit.start - 1, dies, packed, escapes, memory.bare))
    held = sum(tracer.memories[number].nbytes for number in _holds(tracer, own, visit))
    return BlockKind(tuple(operations), tuple(storages), held, extra, tuple(buffers), sum(buffers.values()))


def _last_use(tracer: Tracer, visit: Visit, number: int) -> int:
    """When backward is not asked, a memory lives as long as somebody uses it in the block."""
    uses = [
        place for place in range(visit.start, visit.stop)
        if number in tracer.calls[place].reads or number in tracer.calls[place].writes
    ]  # fmt: skip
    return max(uses) - visit.start


def _signature(kind: BlockKind) -> BlockKind:
    """The kind without times: identical blocks have the same."""
    return replace(kind, operations=tuple(replace(operation, seconds=0.0) for operation in kind.operations))


def _averaged(kinds: list[BlockKind]) -> BlockKind:
    """One kind for identical blocks, each operation with the median of its times."""
    operations = tuple(
        replace(same[0], seconds=statistics.median(operation.seconds for operation in same))
        for same in zip(*(kind.operations for kind in kinds), strict=True)
    )
    return replace(kinds[0], operations=operations)


def _alive(tracer: Tracer, numbers: Sequence[int] | range) -> list[int]:
    """Bytes alive while each operation ran, [clock + 1]; of these memories."""
    change = [0] * (tracer.clock + 2)
    for number in numbers:
        memory = tracer.memories[number]
        change[memory.born] += memory.nbytes
        change[_died(tracer, memory) + 1] -= memory.nbytes
    live, found = 0, []
    for place in range(tracer.clock + 1):
        live += change[place]
        found.append(live)
    return found


def _moments(
    tracer: Tracer, visits: list[Visit], own: list[list[int]], casts: list[list[Memory]]
) -> tuple[Moment, ...]:
    """The step cut where a block ends its forward, and where its backward begins and ends."""
    end = tracer.clock
    held = [_holds(tracer, numbers, visit) for numbers, visit in zip(own, visits, strict=True)]
    base = _alive(tracer, range(len(tracer.memories)))
    bounds: list[tuple[int, int, int]] = []
    for index, visit in enumerate(visits):
        back = visit.back if visit.back >= 0 else end
        bounds += [(visit.stop, 0, index), (back, 2, index), (min(max(visit.done, back), end), 3, index)]
        if casts[index]:
            bounds.append((max(visit.stop, *(memory.cached for memory in casts[index])), 1, index))
        for memory in [*(tracer.memories[number] for number in held[index]), *casts[index]]:
            for place in range(visit.stop + 1, min(_died(tracer, memory), back) + 1):
                base[place] -= memory.nbytes
    moments: list[Moment] = []
    now, inside = 0, -1
    for place, kind, index in sorted(bounds):
        if place > now:
            moments.append(Moment("run", max(base[now + 1 : place + 1]), inside))
            now = place
        if kind == 0:
            moments.append(Moment("hold", block=index))
        elif kind == 1:
            moments.append(Moment("clear", block=index))
        elif kind == 3:
            inside = -1 if inside == index else inside
        else:
            inside = index
            gone = sum(
                m.nbytes for m in tracer.memories if not m.gradient and m.born <= place and m.died == place
            )  # died between the two operations
            moments.append(Moment("recompute", base[place] - gone, index))
    if now < end:
        moments.append(Moment("run", max(base[now + 1 :])))
    return tuple(moments)
