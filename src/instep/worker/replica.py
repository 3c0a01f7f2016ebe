"""One worker's copy of what the recipe trains, and the computing of one microbatch."""

from __future__ import annotations

import bisect
import copy
import dataclasses
import itertools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from instep import data, objectives
from instep.data.cursor import rows_of, samples_in_words, take_rows
from instep.data.mixture import cursor_over
from instep.errors import CheckpointError, DataError, NonFiniteError, RecipeError, RecomputeError
from instep.randomness import key, key_of_step, seed_all
from instep.recipe import Recipe
from instep.reduce.written import WrittenParameters
from instep.worker.averages import Averages
from instep.worker.device import autocast, prepare_device, to_device
from instep.worker.evaluated_weights import EvaluatedWeights
from instep.worker.extra_state import ExtraState
from instep.worker.model import build_for_training, check_parameters, check_tokenizer, compiled, model_doubts
from instep.worker.optimizer import Some, optimizer_of, some_of
from instep.worker.out_of_turn import out_of_turn
from instep.worker.sample_reader import SampleReader
from instep.worker.scaler import Scaler
from instep.worker.single_samples import check_single_samples
from instep.worker.spot_checks import ChecksByTurn, SpotChecks
from instep.worker.trainable import Trainable, freeze


class Replica:
    """Model, optimizer, objective and data of a recipe, built on one device.

    `like`: another of the same recipe in this process, whose data it reads too. `retries`: how often samples are read
    again that the system refuses. `written`: the names of parameters that forwards are known to write. `deterministic`:
    as `Team.deterministic`. `tell`: is called with what it does from then on, in words, see `doing`.

    Raises ComponentError, DataError, RecipeError or ResourceError where the recipe cannot be built.
    """

    def __init__(
        self,
        recipe: Recipe,
        device: str,
        like: Replica | None = None,
        retries: int = 0,
        written: Collection[str] = (),
        *,
        deterministic: bool = True,
        tell: Callable[[str], None] = lambda what: None,
    ):
        self.recipe, self._tell = recipe, tell
        self.device = prepare_device(device, recipe.threads, deterministic=deterministic)
        self.doing = "building the data set"
        seed_all(key(recipe.seed, "data"))
        self.data: data.Data = data.from_component(recipe.data) if like is None else like.data
        self.reader = SampleReader(self.data.collate, retries)
        self.cursor = cursor_over(
            self.data.train, batch=recipe.batch, microbatches=recipe.microbatches, seed=recipe.seed,
            ragged=recipe.ragged, drop_last=recipe.drop_last, order=recipe.order,
        )  # fmt: skip
        self.objective = objectives.of_recipe(recipe.objective)
        if self.objective.shares and not recipe.rule.synchronous:
            raise RecipeError(
                f"the objective {recipe.objective.describe()} compares each sample with its whole global batch, which "
                f"rule '{recipe.rule.name}' never computes from the same weights; set rule to 'synchronous'."
            )
        self._starts = [change.version for change in recipe.changes]
        self._check_skipped()
        self._build(written)
        self.checks: SpotChecks | ChecksByTurn | None = None
        """What is verified of the gradient checkpointing plan that is on the model."""
        self._forward: Any = compiled(self.module) if recipe.compile else self.module
        self._shared: tuple[Any, dict[int, Any]] = (None, {})
        self._in_hand: tuple[int, int] | None = None
        self._enter(0)
        torch.set_num_threads(recipe.threads)  # the user's modules may have set another number when imported
        self.doing = "waiting for the team"

    @property
    def doing(self) -> str:
        """What it does, for a sentence after "while": whoever has it do something says so here."""
        return self._doing

    @doing.setter
    def doing(self, what: str) -> None:
        self._doing = what
        self._tell(what)

    def _build(self, written: Collection[str]) -> None:
        """Builds model and optimizer."""
        recipe = self.recipe
        self.doing = "building the model"
        seed_all(key(recipe.seed, "model"))
        self.module = build_for_training(recipe.model, self.device)
        check_tokenizer(self.module, self.data.codec)
        self._built = set(self.module.state_dict())
        at_rest = out_of_turn(recipe, self.module, freeze(self.module, recipe))
        self.names = [name for name, parameter in self.module.named_parameters() if parameter.requires_grad]
        self.parameters = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        check_parameters(self.names, self.parameters)
        self._extra_state = ExtraState(self.module)
        self.trainable = Trainable(self.module, self.names, self.parameters, at_rest)
        """Which of them require a gradient at present."""
        self._lr: float | None = None
        self.scaler = Scaler(recipe.loss_scale)
        """The loss scale, which gradients that come out of `compute` still have."""
        self.written = WrittenParameters(self.module, self.parameters, written)
        """The parameters that its own forwards write."""
        self.doing = "building the optimizer"
        seed_all(key(recipe.seed, "optimizer"))
        self.optimizer = optimizer_of(recipe, self.names, self.parameters, self.trainable.others)
        self.evaluated = EvaluatedWeights(recipe, self.module, self.names, self.parameters, self.optimizer)

    def again(self, device: torch.device) -> Replica:
        """One whose model and optimizer are built again, as after a restart, in eager mode; all else is this one's."""
        other = copy.copy(self)
        other.device = device
        other._build(self.written.names)
        other.checks, other._forward = None, other.module
        return other

    def enter(self, version: int) -> bool:
        """Lets hold what the recipe's changes up to `version` say, and nothing of later ones. Whether that is new."""
        if bisect.bisect_right(self._starts, version) == self.entered:
            return False
        self._enter(version)
        return True

    def _enter(self, version: int) -> None:
        phase = self.recipe.phase(version)
        self.entered = bisect.bisect_right(self._starts, version)
        """How many of the recipe's changes hold."""
        self.schedule, self.watch = phase.schedule, phase.watch
        self.cursor = dataclasses.replace(self.cursor, skipped=phase.skipped)
        self._shared = (None, {})
        for one in self.optimizer.each:
            one.check_schedule(phase.schedule)
        if phase.lr != self._lr:
            seed_all(key(self.recipe.seed, "optimizer"))
            other_rates = self.recipe.with_lr(phase.lr)
            changed = optimizer_of(other_rates, self.names, self.parameters, self.trainable.others)
            for own, other in zip(self.optimizer.each, changed.each, strict=True):
                own.take_rates(other)
            self._lr = phase.lr

    def _check_skipped(self) -> None:
        highest = max((index for change in self.recipe.changes for index in change.skip_samples), default=-1)
        if highest >= self.cursor.samples:
            raise DataError(
                f"skip_samples (--skip-samples) holds {highest}, and the {self.cursor.samples} samples are counted "
                f"from 0; leave it out."
            )

    @cached_property
    def size(self) -> int:
        """How many weights are trained."""
        return sum(parameter.numel() for parameter in self.parameters)

    @property
    def rows(self) -> tuple[Tensor, ...] | None:
        """The data's tensors, where a batch is some of their rows and holds as many items; else None."""
        known = self.objective.counts_samples and self.device.type == "cpu"
        return rows_of(self.data.train, self.data.collate) if known else None

    def batch(self, step: int, microbatch: int) -> Any | None:
        """The samples of one microbatch, collated, on the device; None where the ragged end of an epoch has none."""
        indices = self.cursor.microbatch_tensor(step, microbatch)
        if not indices.numel():
            return None
        self.doing, self._in_hand = f"loading step {step + 1}, microbatch {microbatch}", (step, microbatch)
        rows, seed = rows_of(self.data.train, self.data.collate), (self.recipe.seed, step, microbatch, "data")
        if rows is not None:
            if not self.objective.counts_samples:  # else nothing of the user's runs before the next seed
                seed_all(key_of_step(*seed))
            return to_device(take_rows(rows, indices), self.device)
        place, draws = (step, microbatch, self.entered), not self.objective.counts_samples
        batch = self.reader.batch(self.data.train, indices.tolist(), key_of_step(*seed), place, draws=draws)
        return to_device(batch, self.device)

    def learn_terms(self, step: int, batch: Any | None = None) -> Any:
        """Learns the objective's terms from the first microbatch of `step`, which it reads, if need be, and returns."""
        self.doing = "looking for microbatches that are too small"
        check_single_samples(self, step)
        places = range(self.recipe.microbatches)
        later = ((at, place) for at in itertools.count(step) for place in places)
        step, first = next((at, place) for at, place in later if self.cursor.microbatch_size(at, place))
        if batch is None:
            batch = self.batch(step, first)
        self.doing = f"computing a first forward on step {step + 1}, microbatch {first}"
        seed_all(key(self.recipe.seed, "terms"))
        if self.trainable.by_step:
            self.trainable.require_all()
        with self.written.probing():
            self.objective = objectives.learn_terms(self.objective, self.module, batch)
        return batch

    def compute(self, step: int, microbatch: int, batch: Any, totals: Mapping[str, int]) -> dict[str, Tensor]:
        """The gradient of a microbatch's share of the step's objective, by the loss scale, into the parameters' hooks.

        `totals` are the items of each term over the whole batch of the step; they divide the sums, so that what the
        microbatches give adds up to the gradient of the objective on the whole batch. A term without items in the whole
        batch adds nothing, nor does a metric. Returns the sums, metrics included, detached.
        """
        objective = self.objective.at(step)
        shared = self._share(step, microbatch) if objective.shares else None
        self.doing, self._in_hand = f"computing step {step + 1}, microbatch {microbatch}", (step, microbatch)
        if self.checks is not None:
            self.checks.choose(step, microbatch)
        # Dropout knows the place, never the worker.
        seed_all(key_of_step(self.recipe.seed, step, microbatch, "compute"))
        with self.autocast():
            sums = objective.sums(self._forward, batch, shared)
        weights = self.scaler.scaled(objective.weights(step))
        # In float32, and divided before backward: afterwards gradients are only added, and only in the tree.
        given = [
            (sums[name], weight if totals[name] else 0.0, max(1, totals[name])) for name, weight in weights.items()
        ]
        try:
            if len(given) == 1 and type(given[0][0]) is Tensor:
                given[0][0].backward(_root(*given[0]))
            else:
                torch.stack([weight * (value.float() / total) for value, weight, total in given]).sum().backward()
        except RecomputeError as error:
            raise (error if self.checks is None else self.checks.say(error)) from None
        if self.checks is not None:
            self.checks.computed(step)
        self._extra_state.check(step)
        return self.objective.without_turn | {name: value.detach() for name, value in sums.items()}

    def verified(self) -> dict[str, Any]:
        """For the tape: `verify_s`, the seconds of comparing recomputed values since this was asked last, if any."""
        seconds = 0.0 if self.checks is None else self.checks.took_s()
        return {"verify_s": round(seconds, 6)} if seconds else {}

    def _share(self, step: int, microbatch: int) -> objectives.Shared:
        """What all microbatches of `step` share, computed once for the present weights: a forward of the whole batch.

        Every worker computes all of it for itself, so that no bit of it depends on the team.
        """
        now = step, self.written.mark
        if self._shared[0] != now:
            parts: dict[int, Any] = {}
            for place in range(self.recipe.microbatches):
                batch = self.batch(step, place)
                if batch is not None:
                    self.doing = f"computing what microbatch {place} of step {step + 1} shares"
                    seed_all(key(self.recipe.seed, step, place, "compute"))
                    with self.autocast():
                        parts[place] = self.objective.share(self._forward, batch)
                    self.written.put_back()
            self._shared = now, parts
        parts = self._shared[1]
        self.doing = f"computing step {step + 1}, microbatch {microbatch}"
        return objectives.Shared(tuple(parts.values()), list(parts).index(microbatch))

    def some(self, indices: Sequence[int]) -> Some:
        """Some of the parameters, for `update`."""
        return some_of(self.optimizer, [self.parameters[index] for index in indices])

    def update(self, step: int, gradients: Sequence[Tensor | None], some: Some | None = None) -> float | None:
        """The optimizer's update from version `step`; returns its learning rate, the first one, if it has any.

        gradients[i] has parameter i's shape, float32; None means that no microbatch gave the parameter a gradient.
        some: of these parameters alone, which only an optimizer of `BY_PARAMETER` can do.
        """
        parameters, groups = (self.parameters, None) if some is None else some
        self.doing = f"updating the weights in step {step + 1}"
        factor = self.schedule.factor(step, self.recipe.steps)
        if self.optimizer.may_draw:  # alike in every worker
            seed_all(key(self.recipe.seed, step, "update"))
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = None if gradient is None else gradient.to(parameter.dtype)
        frozen = self.trainable.frozen_at(step)  # though a gradient of before may have come late
        at_rest = {self.names[index] for index in frozen if self.parameters[index].grad is None}
        rate = self.optimizer.step(factor, groups, at_rest)
        self.evaluated.stepped()
        for parameter in parameters:
            parameter.grad = None
        return rate

    def doubts(self) -> list[str]:
        """Sentences on a model or optimizer that goes its own way, so that the run is not quite what it seems."""
        return self.reader.doubts() + model_doubts(self.module, self._built, self.trainable) + self.optimizer.doubts()

    @property
    def averages(self) -> Averages:
        """Those of `Recipe.ema`."""
        return self.evaluated.averages

    def averaged(self, decay: float | None = None) -> AbstractContextManager[None]:
        """See `EvaluatedWeights.applied`."""
        return self.evaluated.applied(decay)

    def saved_state(self, decay: float | None = None) -> dict[str, Tensor]:
        """See `EvaluatedWeights.model_state`."""
        return self.evaluated.model_state(decay)

    def training_state(self) -> dict[str, Any]:
        """What a checkpoint holds beside the weights: the optimizer's state, and buffers outside the state_dict.

        Where parameters ceased to require a gradient, "ceased" are their names. Where the optimizer trains other
        weights than are saved, those are "weights". "loss_scale" is there with float16 alone.
        """
        kept = self.module.state_dict().keys()
        buffers = {name: buffer for name, buffer in self.module.named_buffers() if name not in kept}
        off = {"ceased": self.trainable.off_names} if self.trainable.off else {}
        more = {**off, **self.evaluated.state(), **self.scaler.state()}
        return {"optimizer": self.optimizer.state(), "buffers": buffers, **more}

    def load(self, model_state: Mapping[str, Tensor], training_state: Mapping[str, Any]) -> None:
        """Takes the state of a checkpoint of the same recipe. Raises CheckpointError where it does not fit."""
        try:
            self.module.load_state_dict(dict(model_state))
            buffers = dict(self.module.named_buffers())
            with torch.no_grad():
                for name, value in training_state["buffers"].items():
                    buffers[name].copy_(value)
            self.evaluated.load(training_state)
        except (RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(
                "the model that the recipe builds has other tensors than the checkpoint; build all of them at the "
                "start, and the same ones each time.",
                detail=f"{type(error).__name__}: {error}",
            ) from error
        self._extra_state.restart()
        if not isinstance(training_state.get("optimizer"), Mapping):
            raise CheckpointError(
                "the training state of the checkpoint holds no state of an optimizer; use an earlier one."
            )
        ceased = training_state.get("ceased", ())
        if not isinstance(ceased, (list, tuple)):
            raise CheckpointError("the training state of the checkpoint is not as it was written; use an earlier one.")
        self.trainable.take_names(ceased)
        self.optimizer.load(training_state["optimizer"])
        self.scaler.load(training_state.get("loss_scale"))

    def not_finite(self, sums: Mapping[str, float], step: int, microbatch: int) -> list[NonFiniteError]:
        """The errors for those terms whose sums over a microbatch are not finite."""
        return [
            NonFiniteError(
                f"term '{term}' of the objective is {value} in step {step + 1}, microbatch {microbatch} "
                f"({self.samples_of(step, microbatch)})."
            )
            for term, value in sums.items()
            if not math.isfinite(value)
        ]

    def samples_in_hand(self) -> str:
        """The samples of the microbatch that is loaded or computed, in brackets for a message; "" in other work."""
        if self._in_hand is None or not self.doing.startswith(("loading", "computing")):
            return ""
        return f" ({self.samples_of(*self._in_hand)})"

    def samples_of(self, step: int, microbatch: int) -> str:
        """The samples of a microbatch, for a message: "samples 3, 17 and 204"."""
        return samples_in_words(self.cursor.microbatch(step, microbatch))

    def to_device(self, batch: Any) -> Any:
        """`batch` with its tensors on the replica's device."""
        return to_device(batch, self.device)

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision that the recipe asks for."""
        return autocast(self.device, self.recipe.precision)


def _root(value: Tensor, weight: float, total: int) -> Tensor:
    """The gradient of ``weight * (value.float() / total)`` for `value`, to the bit as backward gives it."""
    return _root_of(weight, total, value.dtype, value.device).clone()  # which backward may hand on as it is


@lru_cache(maxsize=64)
def _root_of(weight: float, total: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return (torch.ones((), device=device) * weight / total).to(dtype)
