"""Objectives from pairs of which one was preferred."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from instep.errors import ObjectiveError
from instep.objectives.frozen import frozen, on_device
from instep.objectives.language import check_tokens, inputs_and_targets, read_predictions
from instep.objectives.protocol import TERM, check_numbers

SIDES = ("chosen", "rejected")


@dataclass(frozen=True)
class DPO:
    """Direct preference optimisation (Rafailov et al., 2023, arXiv:2305.18290, equation 7), summed over pairs.

    For a pair with log-ratios c and r of model to reference, of the chosen and the rejected text, it is
    ``-log sigmoid(beta (c - r))``. It counts pairs.

    A batch is a mapping of "chosen" and "rejected" to tokens as `NextToken` takes them, B rows each: [B, T + 1], or a
    pair (inputs, targets), each [B, T], with `ignore_index` as the target wherever a token is not judged, such as in
    the prompt. Without a reference model it also maps "chosen_reference" and "rejected_reference" to the reference's
    log-probabilities, [B], which `sequence_log_probabilities` computes.

    Fields
    ------
    beta: how strongly the model is held to the reference.
    label_smoothing: the probability that a pair is the wrong way round (conservative DPO, Mitchell, 2023).
    reference: a `torch.nn.Module`, or a callable that builds one, which is frozen; its answers are as the model's.

    Metrics: "accuracy", whether beta c > beta r, and "margin", beta (c - r).

    Raises ObjectiveError for a batch that is none, a text without a target, a reference with another vocabulary and
    log-probabilities above 0. That given log-probabilities are of the reference, and of these texts, cannot be seen.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    reference: Any = None
    ignore_index: int = -100
    metrics: tuple[str, ...] = field(default=("accuracy", "margin"), init=False)

    def __post_init__(self) -> None:
        check_numbers(self)
        if not 0 < self.beta < math.inf:
            raise ObjectiveError(f"beta is {self.beta}; it must be finite and above 0.")
        if not 0 <= self.label_smoothing < 0.5:
            raise ObjectiveError(f"label_smoothing is {self.label_smoothing}; it must be from 0 to below 0.5.")
        if self.reference is not None:
            object.__setattr__(self, "reference", frozen(self.reference, "DPO's reference"))

    def counts(self, batch: Any) -> int:
        """The number of pairs. Raises ObjectiveError for a batch that holds none."""
        rows = [len(inputs_and_targets(_of(batch, side), "DPO")[1]) for side in SIDES]
        if rows[0] != rows[1]:
            raise ObjectiveError(f"the batch has {rows[0]} chosen texts and {rows[1]} rejected; give as many of both.")
        return rows[0]

    def __call__(self, model: nn.Module, batch: Any) -> Mapping[str, Tensor]:
        """The sums, see the class."""
        pairs = self.counts(batch)
        chosen, rejected = (self._log_ratios(model, batch, side, pairs) for side in SIDES)
        margin = self.beta * (chosen - rejected)
        losses = -(1 - self.label_smoothing) * F.logsigmoid(margin) - self.label_smoothing * F.logsigmoid(-margin)
        return {TERM: losses.sum(), "accuracy": (margin > 0).to(losses.dtype).sum(), "margin": margin.detach().sum()}

    def _log_ratios(self, model: nn.Module, batch: Any, side: str, pairs: int) -> Tensor:
        """[B]: log-probabilities of the texts of one side under the model, minus those under the reference."""
        tokens = _of(batch, side)
        inputs, targets = inputs_and_targets(tokens, "DPO")
        without = (targets == self.ignore_index).all(1)
        if bool(without.any()):
            raise ObjectiveError(
                f"pair {int(without.nonzero()[0])} of the batch has no token to judge in its {side} text: all targets "
                f"are {self.ignore_index}; leave such pairs out."
            )
        own, vocabulary = _log_probabilities(model, inputs, targets, self.ignore_index, "DPO")
        if self.reference is None:
            given = _of(batch, f"{side}_reference")
            if not isinstance(given, Tensor) or given.shape != (pairs,) or not bool((given <= 0).all()):
                found = list(given.shape) if isinstance(given, Tensor) else type(given).__name__
                found = f"{float(given.max()):.6g}" if found == [pairs] else found
                raise ObjectiveError(
                    f"'{side}_reference' of the batch is {found}; give the reference's log-probabilities of the "
                    f"{pairs} texts, [{pairs}], none above 0."
                )
            return own - given.to(own.dtype)
        with torch.no_grad():
            reference = on_device(self.reference, inputs.device)
            theirs, known = _log_probabilities(reference, inputs, targets, self.ignore_index, "DPO's reference")
        if known != vocabulary:
            raise ObjectiveError(
                f"the reference knows {known} tokens and the model {vocabulary}; take a reference with the model's "
                f"own vocabulary, such as the model that training starts from."
            )
        return own - theirs


def sequence_log_probabilities(model: nn.Module, tokens: Any, ignore_index: int = -100) -> Tensor:
    """[B]: the log-probability of each text, summed over its targets; `tokens` as `NextToken` takes them.

    With gradients where they are recorded. To precompute a reference's, call it in eval mode and under no_grad.
    Raises ObjectiveError for tokens outside the vocabulary.
    """
    inputs, targets = inputs_and_targets(tokens, "sequence_log_probabilities")
    return _log_probabilities(model, inputs, targets, ignore_index, "sequence_log_probabilities")[0]


def _log_probabilities(
    model: nn.Module, inputs: Tensor, targets: Tensor, ignore_index: int, whose: str
) -> tuple[Tensor, int]:
    predictions, kept = read_predictions(model, inputs, targets, ignore_index, whose)
    check_tokens(kept, predictions.vocabulary, "target")
    values = predictions.each(_target_log_probability, kept)
    rows = torch.zeros(targets.numel(), dtype=values.dtype, device=values.device)
    where = (targets.flatten() != ignore_index).nonzero().squeeze(1)
    return rows.index_copy(0, where, values).view_as(targets).sum(1), predictions.vocabulary


def _target_log_probability(logits: Tensor, targets: Tensor) -> Tensor:
    return -F.cross_entropy(logits, targets, reduction="none")


def _of(batch: Any, name: str) -> Any:
    if not isinstance(batch, Mapping) or name not in batch:
        found = f"has {', '.join(map(repr, batch))}" if isinstance(batch, Mapping) else f"is a {type(batch).__name__}"
        raise ObjectiveError(
            f"DPO needs '{name}' and the batch {found}; map 'chosen' and 'rejected' to tokens, and without a "
            f"reference model 'chosen_reference' and 'rejected_reference' to log-probabilities."
        )
    return batch[name]
