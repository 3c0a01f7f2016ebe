"""What makes one doubt of a model, though it trains: that it is not quite the one that was built."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from instep.worker.trainable import Trainable
from instep.worker.training_mode import idle_dropouts


def model_doubts(module: nn.Module, built: Collection[str], trainable: Trainable) -> list[str]:
    """Sentences on a model that goes its own way, so that the run is not quite what it seems.

    built: the names of its state_dict as it was built.
    """
    doubts = []
    compiled = next((name for name in sorted(built) if "_orig_mod." in name), None)
    if compiled is not None:
        doubts.append(
            f"the model, or a part of it, is wrapped by torch.compile, so a plain one cannot load its weights: one "
            f"is named '{compiled}' instead of '{compiled.replace('_orig_mod.', '')}'; set "
            f"recipe.compile, or compile in place with module.compile()."
        )
    idle = idle_dropouts(module)
    if idle:
        also = f", and so are {len(idle) - 1} others" if idle[1:] else ""
        doubts.append(
            f"dropout layer '{idle[0]}' is in eval mode while the model trains, and drops nothing{also}; if it is "
            f"to drop, call train() on it where the model is built, else set its p to 0."
        )
    replaced = trainable.replaced()
    if replaced:
        doubts.append(
            f"parameter '{replaced[0]}' is another object than when the model was built, so that the optimizer "
            f"trains one which the model no longer uses; change its values in place, under torch.no_grad()."
        )
    others = sorted(set(built) ^ module.state_dict().keys())
    if others:
        doubts.append(
            f"the model gained or lost '{others[0]}' since it was built, so no new one can load its checkpoints: "
            f"no resume or restart will go on; have it all from the start."
        )
    return doubts
