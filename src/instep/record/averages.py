"""The averages of weights (`Recipe.ema`) in a checkpoint, for whoever uses them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from instep.ema import name_of
from instep.errors import RecordError
from instep.record.checkpoint import Loaded

if TYPE_CHECKING:
    from torch import nn


def give_average(model: nn.Module, saved: Loaded, decay: float) -> None:
    """Gives a model that has the weights of a checkpoint the average of this decay in their place: of the parameters
    that were trained and of floating buffers. Raises RecordError where the checkpoint has no such average.
    """
    import torch

    averages = saved.training_state.get("ema", {}).get("averages", {})
    if name_of(decay) not in averages:
        has = f"those of the decays {', '.join(averages)}" if averages else "none, for its recipe has no 'ema'"
        raise RecordError(
            f"the checkpoint of version {saved.version} has no average of the decay {decay}, but {has}; ask for one "
            f"that it has, or for the weights themselves."
        )
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for name, average in averages[name_of(decay)].items():
            own[name].copy_(average)
