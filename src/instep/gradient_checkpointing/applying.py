"""Puts a plan on a model: the planned blocks run under `torch.utils.checkpoint`, and can be taken off again."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from instep.errors import CheckpointingError
from instep.gradient_checkpointing.replaying import FirstPass, Frame, Repeat, Script
from instep.gradient_checkpointing.structure import Act, BlockPlan, Plan


class Applied:
    """A plan on a model.

    verify: whether values are compared, or the name of the one block whose values are. It may be set at any time, and
        takes effect from the next forward on.
    verify_s: by block that computes anything again, the seconds that comparing its values has taken so far.
    """

    def __init__(self, model: nn.Module, plan: Plan, verify: bool | str):
        self.model, self.plan, self.verify = model, plan, verify
        self.verify_s: dict[str, float] = {block.name: 0.0 for block in plan.blocks if block.choice.acts}
        modules = dict(model.named_modules())
        self._blocks = [
            (modules[block.name], _Block(modules[block.name], block, self))
            for block in plan.blocks
            if block.choice.acts
        ]

    def put_on(self) -> None:
        """Puts the plan on the model again, in place of any other."""
        remove(self.model)
        for module, block in self._blocks:
            module.forward = block

    def remove(self) -> None:
        """Takes the plan off the model, which then runs as it was written."""
        remove(self.model)


def apply(model: nn.Module, plan: Plan, *, verify: bool | str = False) -> Applied:
    """Puts `plan` on `model`, in place of any plan before; the model runs as always, with less memory.

    >>> applied = instep.gradient_checkpointing.apply(model, plan, verify=True)
    >>> model(inputs).sum().backward()
    >>> applied.remove()

    verify: every value that is computed again is compared with the first pass, bit by bit through a checksum, and the
    first operation that differs is named by a RecomputeError. It about doubles a step, and needs 2 MiB of its own. The
    name of a block has that one alone compared.
    Raises CheckpointingError where the plan is of another model. Weights, buffers and names stay as they are.
    """
    modules = dict(model.named_modules())
    for block in plan.blocks:
        if block.name not in modules:
            raise CheckpointingError(
                f"the plan is of another model: it has a block '{block.name}' and this one has none; profile this one."
            )
    remove(model)
    applied = Applied(model, plan, verify)
    applied.put_on()
    return applied


def remove(model: nn.Module) -> None:
    """Takes a plan off; a model without one is left as it is."""
    for module in model.modules():
        block = module.__dict__.get("forward")
        if isinstance(block, _Block):
            del module.__dict__["forward"]
            if block.before is not None:
                module.__dict__["forward"] = block.before


class _Block:
    """A block's forward under the plan."""

    def __init__(self, module: nn.Module, plan: BlockPlan, applied: Applied):
        self.before: Callable[..., Any] | None = module.__dict__.get("forward")
        self._module, self._applied = module, applied
        self._script = Script(plan)
        self._compiled = functools.partial(_compiled_contexts, _kept(plan))
        self._selective, self._buffers = plan.choice.selective, plan.kind.buffers

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward = self.before or type(self._module).forward.__get__(self._module)
        if not torch.is_grad_enabled():  # no backward will come, so nothing is kept
            return forward(*args, **kwargs)
        if torch.compiler.is_compiling():
            return checkpoint(forward, *args, use_reentrant=False, context_fn=self._compiled, **kwargs)
        verify, name = self._applied.verify, self._script.block
        frame = Frame(self._script, verify in (True, name), self._applied.verify_s)
        frame.buffers = _copies({name: self._module.get_buffer(name) for name in self._buffers})
        frame.tables = _tables(self._module)
        watch = self._selective or frame.verify or self._script.draws

        def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
            return FirstPass(frame) if watch else nullcontext(), _Second(self._module, frame)

        # kwargs stay apart from checkpoint's own, such as `debug`
        named = functools.partial(forward, **kwargs)
        return checkpoint(named, *args, use_reentrant=False, early_stop=True, context_fn=contexts)


def _compiled_contexts(kept: frozenset[tuple[str, int]]) -> tuple[Any, Any]:
    """Torch's own contexts, which its compiler traces: it then keeps in its graph what the plan keeps."""
    came: Counter[str] = Counter()

    def policy(context: Any, func: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        name = _functional(str(func))
        came[name] += 1
        return CheckpointPolicy.MUST_SAVE if (name, came[name]) in kept else CheckpointPolicy.PREFER_RECOMPUTE

    contexts: tuple[Any, Any] = create_selective_checkpoint_contexts(policy)
    return contexts


def _kept(plan: BlockPlan) -> frozenset[tuple[str, int]]:
    """The operations whose results a compiled block keeps, each by its name and how many of that name came before.

    Not by their place as in eager mode: the compiler sees views taken apart, copies put in, nothing changed in place.
    What leaves the block is among them: left to itself, the compiler may rather make a product again than keep a sum.
    """
    kind, came = plan.kind, Counter[str]()
    last = {index: place for place, operation in enumerate(kind.operations) for index in operation.writes}
    leaving = {last[index] for index, storage in enumerate(kind.storages) if storage.escapes and index in last}
    kept = set()
    for place, (operation, act) in enumerate(zip(kind.operations, plan.choice.acts, strict=True)):
        name = _functional(operation.name)
        came[name] += 1
        if act is Act.KEEP or place in leaving:
            kept.add((name, came[name]))
    return frozenset(kept)


def _functional(name: str) -> str:
    """The operation that changes nothing in place: aten.relu.default of aten.relu_.default."""
    return name.replace("_.", ".") if not name.partition(".")[2].startswith("__") else name


class _Second:
    """The second pass. It leaves no trace on the block's modules: what it sets on them is taken back afterwards, and it
    works on buffers of its own, with the values that they had before the first pass. Its parameters are those of the
    first pass, which `torch.func.functional_call` has taken off again by then."""

    def __init__(self, module: nn.Module, frame: Frame):
        self._module, self._frame = module, frame
        self._repeat: Repeat | None = None
        self._before: list[tuple[dict[str, Any], dict[str, Any]]] = []

    def __enter__(self) -> None:
        self._before = [(module.__dict__, dict(module.__dict__)) for module in self._module.modules()]
        for table, first in self._frame.tables:
            if any(table.get(name) is not tensor for name, tensor in first.items()):
                self._before.append((table, dict(table)))
                table.update(first)
        for name, copy in _copies(self._frame.buffers).items():
            owner = self._module.get_submodule(name.rpartition(".")[0])
            buffers = owner.__dict__["_buffers"]
            self._before.append((buffers, dict(buffers)))
            buffers[name.rpartition(".")[2]] = copy
        if self._frame.watched:
            self._repeat = Repeat(self._frame)
            self._repeat.__enter__()

    def __exit__(self, *error: Any) -> None:
        if self._repeat is not None:
            self._repeat.__exit__(*error)
        for now, before in reversed(self._before):
            for key in now.keys() - before.keys():
                del now[key]
            for key, value in before.items():
                if key not in now or now[key] is not value:
                    now[key] = value
        self._before.clear()


def _tables(block: nn.Module) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The tables of parameters and buffers of a block's modules, each with what it holds now."""
    tables = [table for module in block.modules() for table in (module._parameters, module._buffers)]
    return [(table, dict(table)) for table in tables if table]


def _copies(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies; what is one tensor under two names stays one."""
    copies = {id(tensor): tensor.detach().clone() for tensor in tensors.values()}
    return {name: copies[id(tensor)] for name, tensor in tensors.items()}


def planned(model: nn.Module) -> bool:
    """Whether a plan is on the model."""
    return any(isinstance(module.__dict__.get("forward"), _Block) for module in model.modules())
