"""The recipe's optimizer as a run uses it: built, given its rates, stepped, saved and loaded.

Nothing is assumed about what it keeps: its state is what its own `state_dict` gives and `load_state_dict` takes.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn, optim
from torch.optim import optimizer as torch_optimizer
from torch.utils import _pytree as pytree

from instep.by_pattern import ByPattern
from instep.components import Component
from instep.errors import CheckpointError, ComponentError, RecipeError, cut, described, shown, told
from instep.recipe import Recipe
from instep.schedule import Schedule
from instep.worker.fused_adam import step_by_kernel
from instep.worker.optimizer_state import is_plain, put_back, tensors_in, unsaved_state

BY_PARAMETER = (
    optim.SGD, optim.Adam, optim.AdamW, optim.RMSprop, optim.Adagrad, optim.Adadelta, optim.Adamax, optim.NAdam,
    optim.RAdam, optim.Rprop, optim.ASGD, optim.Muon,
)  # fmt: skip
"""Optimizers in which no parameter's update depends on other parameters, nor on random numbers. Not Adafactor: the
first parameter's type decides what it adds to all. A subclass may do anything, so it does not count."""


Groups = Sequence[Sequence[list[nn.Parameter]]]
"""Parameters by optimizer and group of it."""


class Some(NamedTuple):
    """Some of the parameters, and the same by optimizer and group of it."""

    parameters: Sequence[nn.Parameter]
    groups: Groups


def optimizer_of(
    recipe: Recipe, names: Sequence[str], parameters: Sequence[nn.Parameter], others: Sequence[str] = ()
) -> Optimizer | Several:
    """The recipe's optimizer, or optimizers, of `parameters`, which `names` names in the same order; not of `others`.

    Raises ComponentError where one cannot be built, is none or is one of other parameters, or where patterns leave a
    parameter or an optimizer out, and RecipeError where the recipe's schedule has no learning rate to change.
    """
    if isinstance(recipe.optimizer, ByPattern):
        named, where = dict(zip(names, parameters, strict=True)), "recipe.optimizer"
        parts = enumerate(zip(recipe.optimizer.parts, recipe.optimizer.split(names, others), strict=True))
        each = [Optimizer(c, recipe, own, [named[n] for n in own], f"{where}[{at}]") for at, ((_, c), own) in parts]
        return Several(each)
    return Optimizer(recipe.optimizer, recipe, names, parameters)


class Optimizer:
    """One of torch's that `component` builds. `where` is its place in the recipe, for messages."""

    def __init__(
        self,
        component: Component,
        recipe: Recipe,
        names: Sequence[str],
        parameters: Sequence[nn.Parameter],
        where: str = "recipe.optimizer",
    ):
        self.of_torch = _built(component, names, parameters, where)
        self._names, self._parameters = names, parameters
        self._check_parameters()
        self._rates = [self._rate_of(group) for group in self.of_torch.param_groups]
        self.check_schedule(recipe.schedule)
        self.averages = all(callable(getattr(self.of_torch, name, None)) for name in ("train", "eval"))
        """Whether it trains other weights than are to be evaluated and saved, as schedule-free ones do."""
        self._alone = not recipe.rule.gradients  # each worker has its own, which nobody sees
        self.train()
        self._unsaved = unsaved_state(self.of_torch)
        self._looked_for_kept_gradients = False
        self._by_torch = type(self.of_torch) in BY_PARAMETER and all(type(p) is nn.Parameter for p in parameters)

    @property
    def kind(self) -> str:
        """Its class's name."""
        return type(self.of_torch).__name__

    @property
    def may_draw(self) -> bool:
        """Whether a step may draw random numbers, for more runs in it than what torch itself has written."""
        one = self.of_torch
        return (
            not self._by_torch
            or "step" in vars(one)
            or bool(one._optimizer_step_pre_hooks or one._optimizer_step_post_hooks)
            or bool(torch_optimizer._global_optimizer_pre_hooks or torch_optimizer._global_optimizer_post_hooks)
        )

    @property
    def each(self) -> list[Optimizer]:
        """Itself, as one of one."""
        return [self]

    @property
    def what_it_trains(self) -> str:
        """Its class, and the tensors and weights that it was given."""
        tensors, weights = len(self._parameters), sum(parameter.numel() for parameter in self._parameters)
        return f"{self.kind}: {tensors:,} tensor{'' if tensors == 1 else 's'}, {weights:,} weights"

    def check_schedule(self, schedule: Schedule) -> None:
        """Raises RecipeError where it would change a learning rate that the optimizer does not have."""
        if None in self._rates and schedule.changes:
            raise RecipeError(
                f"the optimizer {self.kind} has no learning rate ('lr' is None), which the recipe's schedule would "
                f"change; give it one, or leave 'recipe.schedule' constant, without warm-up and scale."
            )

    def take_rates(self, other: Optimizer) -> None:
        """From here on the learning rates are those that `other` was built with."""
        self._rates = other._rates

    def step(self, factor: float, only: Groups | None = None, at_rest: Collection[str] = ()) -> float | None:
        """One update by the parameters' `grad`, all learning rates times `factor`; returns the first of them, if any.

        An optimizer without one (`lr` is None) finds its own, under a constant schedule. only: these parameters, see
        `Some.groups`; one of `BY_PARAMETER` then does the same to them as in an update of all.
        """
        for group, rate in zip(self.of_torch.param_groups, self._rates, strict=True):
            if rate is None:
                continue
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate * factor)
            else:
                group["lr"] = rate * factor
        if only is None:
            self.of_torch.step()
        else:
            self._step_of(only[0])
        if not self._looked_for_kept_gradients:
            self._looked_for_kept_gradients = True
            self._check_gradients_are_not_kept()
        return None if self._rates[0] is None else factor * self._rates[0]

    def rests(self, at_rest: Collection[str]) -> bool:
        """Whether all its parameters are among these."""
        return bool(at_rest) and all(name in at_rest for name in self._names)

    def _step_of(self, groups: Sequence[list[nn.Parameter]]) -> None:
        if not self.may_draw and step_by_kernel(self.of_torch, groups):
            return
        one, before = self.of_torch, [group["params"] for group in self.of_torch.param_groups]
        wholes = one.param_groups
        try:
            for group, some in zip(wholes, groups, strict=True):
                group["params"] = some
            one.param_groups = [group for group in wholes if group["params"]]
            if one.param_groups:
                one.step()
        finally:
            one.param_groups = wholes
            for group, parameters in zip(wholes, before, strict=True):
                group["params"] = parameters

    def train(self) -> None:
        """Makes the parameters those that it trains, where it tells them from others."""
        if self.averages:
            self.of_torch.train()  # type: ignore[attr-defined]

    def eval(self) -> None:
        """Makes the parameters those that are to be evaluated and saved."""
        if self.averages:
            self.of_torch.eval()  # type: ignore[attr-defined]

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return self.of_torch.state_dict()

    def load(self, saved: Mapping[str, Any]) -> None:
        """Takes back what `state` gave, with the types it had. May use it up. Raises CheckpointError."""
        try:
            self.of_torch.load_state_dict(pytree.tree_map(lambda leaf: leaf, dict(saved)))  # which it may change
            put_back(saved, self.of_torch.state_dict())
        except Exception as error:  # its own code, which may raise anything
            raise CheckpointError(
                f"the optimizer {self.kind} that the recipe builds does not load the state that is saved "
                f"({described(error)}); build the same one each time, whose 'load_state_dict' takes what "
                f"its 'state_dict' gave."
            ) from error

    def doubts(self) -> list[str]:
        """Sentences on what it does its own way."""
        doubts = []
        held = {id(parameter) for group in self.of_torch.param_groups for parameter in group["params"]}
        left = [name for name, p in zip(self._names, self._parameters, strict=True) if id(p) not in held]
        if left:
            doubts.append(
                f"the optimizer {self.kind} has {len(left)} of the {len(self._names)} parameters in no group, "
                f"'{left[0]}' among them, so they keep their first values; give it all, or build the model with "
                f"requires_grad=False on those."
            )
        # Both, for an optimizer may have an initial_lr of its own.
        scheduled = hasattr(self.of_torch.step, "_wrapped_by_lr_sched")
        if scheduled and any("initial_lr" in group for group in self.of_torch.param_groups):
            doubts.append(
                f"a learning rate scheduler of torch has set the rates of the optimizer {self.kind}, and will not "
                f"change them any more; leave it out, and set the recipe's schedule."
            )
        if self.averages and self._alone:
            doubts.append(
                f"the optimizer {self.kind} averages the weights of its own steps, and under a rule with local steps "
                f"each worker has its own: the weights that are evaluated and saved are not averages; take a rule "
                f"without local steps, or another optimizer."
            )
        now = unsaved_state(self.of_torch)
        changed = [name for name in now if name not in self._unsaved or now[name] != self._unsaved[name]]
        if changed:
            doubts.append(
                f"the optimizer {self.kind} changes its attribute '{changed[0]}', which is in no state_dict and so in "
                f"no checkpoint: a resume or restart will give another result; keep it in the optimizer's 'state'."
            )
        return doubts

    def _check_parameters(self) -> None:
        known = {id(parameter) for parameter in self._parameters}
        held = [parameter for group in self.of_torch.param_groups for parameter in group["params"]]
        others = [parameter for parameter in held if id(parameter) not in known]
        if others:
            raise ComponentError(
                f"the optimizer {self.kind} holds {len(others)} parameters, the first of shape "
                f"{list(others[0].shape)}, that are none of the {len(known)} it was given to train, as where it is "
                f"made from another copy of the model; build it from what it is called with: the list of parameters "
                f"and, where it asks for 'named_parameters', their names."
            )

    def _rate_of(self, group: Mapping[str, Any]) -> float | None:
        if group["lr"] is None:
            return None
        try:
            rate = float(group["lr"])
        except (TypeError, ValueError):
            rate = math.nan
        if isinstance(group["lr"], str) or not math.isfinite(rate):
            raise ComponentError(
                f"the optimizer {self.kind} has the learning rate {shown(group['lr'])}; it must be a finite number, "
                f"which the recipe's schedule changes by step."
            )
        return rate

    def _check_gradients_are_not_kept(self) -> None:
        gradients = {p.grad.untyped_storage().data_ptr() for p in self._parameters if p.grad is not None}
        for where, value in tensors_in(self.state()):
            if is_plain(value) and value.numel() and value.untyped_storage().data_ptr() in gradients:
                raise ComponentError(
                    f"the optimizer {self.kind} keeps a gradient itself as its state '{where}', and the next step's "
                    f"gradient will lie in the same memory; let it keep a clone."
                )


def some_of(optimizer: Optimizer | Several, parameters: Sequence[nn.Parameter]) -> Some:
    """These parameters, for `step`."""
    wanted = {id(parameter) for parameter in parameters}
    groups = [
        [[p for p in group["params"] if id(p) in wanted] for group in one.of_torch.param_groups]
        for one in optimizer.each
    ]
    return Some(parameters, groups)


class Several:
    """Optimizers of parts of the parameters, used as one: each makes its step in turn."""

    def __init__(self, each: list[Optimizer]):
        self.each = each
        self.averages = any(one.averages for one in each)

    @property
    def kind(self) -> str:
        """Their classes' names."""
        return " and ".join(one.kind for one in self.each)

    @property
    def may_draw(self) -> bool:
        """As of one: whether any may."""
        return any(one.may_draw for one in self.each)

    def step(self, factor: float, only: Groups | None = None, at_rest: Collection[str] = ()) -> float | None:
        """As of one; the learning rate is that of the first. One whose parameters are all `at_rest` makes no step."""
        parts = [None] * len(self.each) if only is None else [[groups] for groups in only]
        steps = [(one, part) for one, part in zip(self.each, parts, strict=True) if not one.rests(at_rest)]
        return next(iter([one.step(factor, part) for one, part in steps]), None)

    def train(self) -> None:
        """As of one."""
        for one in self.each:
            one.train()

    def eval(self) -> None:
        """As of one."""
        for one in self.each:
            one.eval()

    def state(self) -> dict[str, Any]:
        """For a checkpoint: theirs, in order."""
        return {"several": [one.state() for one in self.each]}

    def load(self, saved: Mapping[str, Any]) -> None:
        """Takes back what `state` gave. Raises CheckpointError."""
        for one, state in zip(self.each, saved["several"], strict=True):
            one.load(state)

    def doubts(self) -> list[str]:
        """Sentences on what they do their own way."""
        return [why for one in self.each for why in one.doubts()]


def _called(component: Component, names: Sequence[str], parameters: Sequence[nn.Parameter]) -> Any:
    """What the component gives for the parameters and, where it has an argument `named_parameters`, for their names."""
    named = list(zip(names, parameters, strict=True))
    try:
        arguments = list(inspect.signature(component.load()).parameters)
    except (TypeError, ValueError):  # it has no signature, or cannot be called
        arguments = []
    if "named_parameters" not in arguments or "named_parameters" in component.args:
        return component.built(list(parameters))
    if arguments[0] == "named_parameters":
        return component.built(named)
    return Component(component.use, {**component.args, "named_parameters": named}).built(list(parameters))


def _built(
    component: Component, names: Sequence[str], parameters: Sequence[nn.Parameter], where: str
) -> torch.optim.Optimizer:
    given = component.load()
    if isinstance(given, torch.optim.Optimizer):
        kind = type(given).__name__
        raise ComponentError(
            f"the optimizer is a finished {kind}, whose parameters are not those that the workers train; give what "
            f"builds it from a list of parameters, such as lambda parameters: {kind}(parameters, lr=...)."
        )
    try:
        optimizer = _called(component, names, parameters)
    except ComponentError as error:
        cause = error.__cause__
        if (why := _refused(component, names, parameters, where, str(cause or error))) is not None:
            raise ComponentError(why) from (cause or error)
        if cause is None or not error.detail:  # it was about arguments
            raise
        raise ComponentError(
            f"the optimizer {component.describe()} could not be built from the list of parameters "
            f"({told(cause)}); give what builds it from that list or, by an argument "
            f"'named_parameters', from their names too.",
            detail=error.detail,
        ) from cause
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ComponentError(
            f"the optimizer {component.describe()} gave a {type(optimizer).__name__}; called with the list of "
            f"parameters, it must give one torch.optim.Optimizer (the recipe takes several, by patterns of names)."
        )
    if not all("lr" in group for group in optimizer.param_groups):
        raise ComponentError(
            f"the optimizer {component.describe()} has a group of parameters without 'lr', which the recipe's schedule "
            f"sets in each step; name its learning rate so."
        )
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise needs_closure(type(optimizer).__name__)
    return optimizer


def _refused(
    component: Component, names: Sequence[str], parameters: Sequence[nn.Parameter], where: str, said: str
) -> str | None:
    """A sentence on what an optimizer refused, as it `said`, where that can be seen: its `lr`, or vectors."""
    lr = component.args.get("lr", 0.0)
    if isinstance(lr, bool | str) or (isinstance(lr, int | float) and not 0 <= lr < math.inf):
        return (
            f"'{where}.args.lr' is {shown(lr)}, which the optimizer {component.describe()} refuses ({cut(said)}); it "
            f"must be a number, finite and at least 0."
        )
    others = [f"'{n}' of shape {list(p.shape)}" for n, p in zip(names, parameters, strict=True) if p.dim() != 2]
    if others and re.search(r"\b2-?D\b|\b(2|two)[- ]dim", said):
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        return (
            f"the optimizer {component.describe()} takes matrices alone ({cut(said)}), and {others[0]}{more} of its "
            f"{len(names)} parameters are none; give those to another optimizer, by a table [[optimizer]] with "
            f"'parameters' before this one."
        )
    return None


def needs_closure(kind: str) -> ComponentError:
    """The error for an optimizer that computes the objective itself."""
    return ComponentError(
        f"the optimizer {kind} needs a closure, which computes the objective again within a step, and that a team "
        f"cannot; take an optimizer whose step() needs none."
    )
