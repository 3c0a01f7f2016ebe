"""Rows of several documents: a model is told which input is of which, and asked once whether it keeps them apart.

A model whose ``forward`` takes ``documents`` is given these, [B, T], and ``positions`` where it takes them, see
`instep.packed.PackedTokens`; attention may then look from an input at earlier ones of the same document alone. One that
takes ``position_ids``, as those of transformers do, is given the positions, of which it makes out the documents, though
only where it keeps no cache. Of a model with adapters of peft the model below them says what it takes.
"""

from __future__ import annotations

import inspect
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.func import functional_call

from instep.errors import ObjectiveError
from instep.packed import PackedTokens
from instep.restore import kept_module_state, kept_random_state

_LEAK, _APART = 1e-3, 0.05
"""Shares of the largest logit by which those of a document may differ where another one is changed, and where it stands
alone: the same kernels on the same numbers, and other ones."""

_PROBED: WeakSet[nn.Module] = WeakSet()


def told_apart(model: nn.Module, batch: PackedTokens) -> dict[str, Any]:
    """What `model` is given beside the inputs. Raises ObjectiveError where it takes none, or lets documents leak."""
    model = getattr(model, "_orig_mod", model)
    taken = inspect.signature(_below_adapters(model).forward).parameters
    if "documents" in taken:
        names = {"documents": "documents", "positions": "positions"}
    elif "position_ids" in taken:
        names = {"position_ids": "positions"}
    else:
        raise ObjectiveError(
            f"the rows hold several documents, and {_name(model)}.forward takes neither 'documents' nor "
            f"'position_ids', so that it would read across them; let it take 'documents' ([B, T]) and keep attention "
            f"inside each, or give data that are not packed."
        )
    told = {name: getattr(batch, field) for name, field in names.items() if name in taken}
    plain = {"use_cache": False} if "position_ids" in names and "use_cache" in taken else {}
    if model not in _PROBED:
        _probe(model, batch, told, plain)
    return {**told, **plain}


def _below_adapters(model: nn.Module) -> nn.Module:
    """The model that peft has put adapters on, to which it hands what it does not name itself."""
    base: Any = getattr(model, "get_base_model", None)
    found = base() if callable(base) else model
    return found if isinstance(found, nn.Module) else model


def _name(model: nn.Module) -> str:
    return type(_below_adapters(model)).__name__


def _probe(model: nn.Module, batch: PackedTokens, told: dict[str, Tensor], plain: dict[str, bool]) -> None:
    """Looks at the second document of one row, in eval mode, once for each model; leaves no trace.

    Weights that are zero, as those that write into the residual stream may be at first, would hide a leak, so they are
    others meanwhile.
    """
    rows = (batch.documents == 2).any(1).nonzero().flatten()
    if not len(rows):
        return
    row = slice(int(rows[0]), int(rows[0]) + 1)
    inputs = batch.inputs[row].clamp(min=0)
    told = {name: each[row] for name, each in told.items()}
    first, second = ((batch.documents[row] == number)[0] for number in (1, 2))
    other = inputs.clone()
    other[:, first] = torch.where(inputs[:, first] == 0, inputs[:, second].max().clamp(min=1), 0)
    alone = {name: torch.ones_like(each) if name == "documents" else each for name, each in told.items()}
    with torch.no_grad(), kept_random_state(), kept_module_state(model, training=False):
        moved = {
            name: torch.randn_like(each) / max(1, each.shape[-1]) ** 0.5
            for name, each in model.named_parameters()
            if each.dim() > 1 and each.is_floating_point() and not bool(each.any())
        }

        def logits(tokens: Tensor, told: dict[str, Tensor]) -> Tensor:
            answer: Any = functional_call(model, moved, (tokens,), {**told, **plain})
            found: Tensor = getattr(answer, "logits", answer)
            return found.float()

        seen = logits(inputs, told)[:, second]
        changed = logits(other, told)[:, second]
        single = logits(inputs[:, second], {name: each[:, second] for name, each in alone.items()})
    scale = float(seen.abs().max())
    leak, apart = (float((seen - found).abs().max()) for found in (changed, single))
    if not leak <= _LEAK * scale:
        raise ObjectiveError(
            f"{_name(model)} reads across documents: where the first one of a row is changed, logits of the "
            f"second change by up to {leak:.2g}, of at most {scale:.2g}; keep attention, and whatever else mixes "
            f"positions, inside each document, or give data that are not packed."
        )
    if not apart <= _APART * scale:
        raise ObjectiveError(
            f"{_name(model)} gives a document other logits where it stands alone: by up to {apart:.2g}, of at "
            f"most {scale:.2g}; let its positions begin anew with each document, as 'positions' has them, or give data "
            f"that are not packed."
        )
    _PROBED.add(model)
