"""Objectives of language models."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from instep.errors import ObjectiveError

TokenBatch = Tensor | tuple[Tensor, Tensor] | list[Tensor]


@dataclass(frozen=True)
class NextToken:
    """Cross entropy of the next token, in nats, summed over the targets that are not `ignore_index`; it counts these.

    A batch is whole numbers, [B, T + 1], whose first T columns are inputs and last T are targets; or a pair
    (inputs, targets), each [B, T]. The model maps inputs, [B, T], to logits, [B, T, V], or to an object that has
    them as ``.logits``. Padding stands at the end of a row: the model is fed token 0 there. Logits of half precision
    are taken in float32.
    """

    ignore_index: int = -100

    def counts(self, batch: TokenBatch) -> int:
        """The number of targets that are not ignored. Raises ObjectiveError for a batch of another kind."""
        _, targets = _inputs_and_targets(batch)
        return int((targets != self.ignore_index).sum())

    def __call__(self, model: nn.Module, batch: TokenBatch) -> Tensor:
        """The sum, a scalar. Raises ObjectiveError for tokens outside the vocabulary or logits of another shape."""
        inputs, targets = _inputs_and_targets(batch)
        inputs = inputs.masked_fill(self._padding(inputs), 0)
        vocabulary = getattr(model, "vocabulary", None)
        if isinstance(vocabulary, int):
            _check_tokens(inputs, vocabulary, "input")
        answer = model(inputs)
        logits: Tensor = getattr(answer, "logits", answer)
        if not isinstance(logits, Tensor) or logits.dim() != 3 or logits.shape[:2] != targets.shape:
            found = list(logits.shape) if isinstance(logits, Tensor) else type(answer).__name__
            raise ObjectiveError(
                f"the model gave {found} for tokens of shape {list(inputs.shape)}; NextToken needs logits of shape "
                f"[{targets.shape[0]}, {targets.shape[1]}, vocabulary]."
            )
        _check_tokens(targets.masked_fill(targets == self.ignore_index, 0), logits.shape[2], "target")
        if logits.dtype in (torch.bfloat16, torch.float16):
            logits = logits.float()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=self.ignore_index, reduction="sum")

    def _padding(self, inputs: Tensor) -> Tensor:
        padding = inputs == self.ignore_index
        if self.ignore_index >= 0:  # it may be a token as well, and then only a row's tail of it is padding
            padding = padding.flip(1).long().cumprod(1).flip(1).bool()
        return padding


def _inputs_and_targets(batch: TokenBatch) -> tuple[Tensor, Tensor]:
    if isinstance(batch, Tensor) and batch.dim() == 2 and batch.shape[1] >= 2:
        inputs, targets = batch[:, :-1], batch[:, 1:]
    elif (
        isinstance(batch, (tuple, list))
        and len(batch) == 2
        and all(isinstance(part, Tensor) and part.dim() == 2 for part in batch)
        and batch[0].shape == batch[1].shape
    ):
        inputs, targets = batch
    else:
        raise ObjectiveError(
            f"NextToken cannot read a batch of type {type(batch).__name__}{_shape(batch)}; give tokens of shape "
            f"[batch, length + 1], or a pair (inputs, targets) of one shape, [batch, length]."
        )
    for part in (inputs, targets):
        if part.is_floating_point() or part.is_complex() or part.dtype == torch.bool:
            raise ObjectiveError(
                f"NextToken was given tokens of {part.dtype}; they must be whole numbers, as torch.int64."
            )
    return inputs.long(), targets.long()


def _shape(batch: object) -> str:
    return f" and shape {list(batch.shape)}" if isinstance(batch, Tensor) else ""


def _check_tokens(tokens: Tensor, vocabulary: int, kind: str) -> None:
    if not tokens.numel():
        return
    least, most = (int(value) for value in tokens.aminmax())
    if least < 0 or most >= vocabulary:
        raise ObjectiveError(
            f"{kind} token {least if least < 0 else most} is outside the model's vocabulary of {vocabulary} "
            f"(0 to {vocabulary - 1}); mark padding with NextToken's ignore_index, or raise the model's vocabulary."
        )
