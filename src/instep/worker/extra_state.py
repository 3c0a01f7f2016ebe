"""What modules keep in a state_dict by `get_extra_state`: in training it must stay as it is."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from instep.bits import same_bits
from instep.errors import RecipeError


class ExtraState:
    """The extra state of a model's modules, as it was when the model was built or loaded."""

    def __init__(self, module: nn.Module):
        self._modules = [
            (n, m) for n, m in module.named_modules() if type(m).get_extra_state is not nn.Module.get_extra_state
        ]
        self.restart()

    def restart(self) -> None:
        """Takes the present state as the right one."""
        self._known = [copy.deepcopy(module.get_extra_state()) for _, module in self._modules]

    def check(self, step: int) -> None:
        """Raises RecipeError, after a forward of `step`, where it is another one."""
        for (name, module), known in zip(self._modules, self._known, strict=True):
            if not _same(module.get_extra_state(), known):
                self._put_back()
                whose = f"module '{name}'" if name else "the model"
                raise RecipeError(
                    f"{whose} changed its extra state (get_extra_state) in step "
                    f"{step + 1}; it is not set back before each microbatch, so the result would depend on the team: "
                    f"hold what changes in a buffer."
                )

    def _put_back(self) -> None:
        for (_, module), known in zip(self._modules, self._known, strict=True):
            if type(module).set_extra_state is not nn.Module.set_extra_state:
                module.set_extra_state(copy.deepcopy(known))


def _same(a: Any, b: Any) -> bool:
    """Whether two tensors have the same bits. What is no tensor is refused where it would be saved."""
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return True
    return same_bits(a.detach().cpu(), b.detach().cpu())
