"""Which weights are evaluated and saved: they need not be those that are trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from instep.recipe import Recipe
from instep.worker.averages import Averages
from instep.worker.optimizer import Optimizer, Several


class EvaluatedWeights:
    """Those of `module`: the trained ones, or what the `optimizer` gives for them where it averages weights itself, as
    schedule-free ones do; and beside them the averages of `Recipe.ema`.

    names: of the trained `parameters`, in the same order. Raises RecipeError for averages of such an optimizer.
    """

    def __init__(
        self,
        recipe: Recipe,
        module: nn.Module,
        names: Sequence[str],
        parameters: Sequence[nn.Parameter],
        optimizer: Optimizer | Several,
    ):
        self._module, self._names, self._parameters, self._optimizer = module, names, parameters, optimizer
        own = optimizer.kind if optimizer.averages else ""
        self.averages = Averages(recipe, module, names, parameters, own)
        self._apart = False  # the trained ones are others
        self._applied = False

    def stepped(self) -> None:
        """After a step of the optimizer."""
        self._apart = self._optimizer.averages

    @contextmanager
    def applied(self, decay: float | None = None) -> Iterator[None]:
        """In the block, the model has them, or the average of this `decay`.

        Afterwards it has the trained ones again, to the bit, which the optimizer's `train` alone would not give.
        """
        if decay is not None:
            with self.averages.applied(decay):
                yield
            return
        if self._applied or not self._apart:
            yield
            return
        trained = self._trained()
        self._applied = True
        try:
            self._optimizer.eval()
            yield
        finally:
            self._applied = False
            self._optimizer.train()
            self._take(trained)

    def model_state(self, decay: float | None = None) -> dict[str, Tensor]:
        """The model's state_dict with them; copies where it trains others."""
        with self.applied(decay):
            state = dict(self._module.state_dict())
            if decay is None and not self._applied:
                return state
            return {name: value.clone() for name, value in state.items()}

    def state(self) -> dict[str, Any]:
        """For a checkpoint: "weights", the trained ones, where they are others than are saved, and "ema"."""
        return ({"weights": self._trained()} if self._apart else {}) | self.averages.state()

    def load(self, training_state: Mapping[str, Any]) -> None:
        """Takes back what `state` gave. Raises CheckpointError for averages that are none of these."""
        self._apart = "weights" in training_state
        if self._apart:
            self._take(training_state["weights"])
        self.averages.load(training_state.get("ema"))

    def _trained(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in zip(self._names, self._parameters, strict=True)}

    @torch.no_grad()
    def _take(self, weights: Mapping[str, Tensor]) -> None:
        for name, parameter in zip(self._names, self._parameters, strict=True):
            parameter.copy_(weights[name])
