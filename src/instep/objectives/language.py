"""Objectives of language models: next token, masked tokens, distillation."""

from __future__ import annotations

import math
import traceback
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from instep.errors import ObjectiveError, cut, shown
from instep.objectives.cross_entropy import CrossEntropy
from instep.objectives.documents import told_apart
from instep.objectives.frozen import frozen, on_device
from instep.objectives.protocol import TERM, check_numbers
from instep.objectives.vocabulary import Predictions, predict
from instep.packed import PackedTokens

TokenBatch = Tensor | tuple[Tensor, Tensor] | list[Tensor] | PackedTokens

MASKED_SHARES = (0.8, 0.1)
"""Of the tokens that are chosen: those that become the mask, and those that become any token (Devlin et al., 2019)."""


@dataclass(frozen=True)
class NextToken:
    """Cross entropy of the next token, in nats, summed over the targets that are not `ignore_index`; it counts these.

    A batch is whole numbers, [B, T + 1], whose first T columns are inputs and last T are targets; or a pair
    (inputs, targets), each [B, T]. The model maps inputs, [B, T], to logits, [B, T, V], or to an object that has
    them as ``.logits``. Padding stands at the end of a row: the model is fed token 0 there. Logits of half precision
    are taken in float32. Where the model offers hidden states and head, logits that are many are never held at once,
    see `instep.objectives.vocabulary`. Of `PackedTokens` no target is in another document than its input, and the
    model is told the documents, see `instep.objectives.documents`.

    Fields
    ------
    label_smoothing: share of the target's probability that is spread evenly over the vocabulary, as in
        `torch.nn.functional.cross_entropy` (Szegedy et al., 2016, arXiv:1512.00567).
    z_loss: weight of log(Z)^2 for each target, Z being the softmax's denominator (PaLM, Chowdhery et al., 2022,
        arXiv:2204.02311, section 5, with 1e-4).
    accuracy: whether to report, as a metric, how often the likeliest token is the target.

    With any of these, the plain cross entropy is the metric "cross_entropy", unless it is the objective itself.
    Raises ObjectiveError for a share or weight out of range. In this and every other objective, RecipeError tells of a
    field of the wrong type.
    """

    ignore_index: int = -100
    _: KW_ONLY
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    accuracy: bool = False

    def __post_init__(self) -> None:
        check_numbers(self)
        if not 0 <= self.label_smoothing < 1:
            raise ObjectiveError(f"label_smoothing is {self.label_smoothing}; it is a share, from 0 to below 1.")
        if not 0 <= self.z_loss < math.inf:
            raise ObjectiveError(f"z_loss is {self.z_loss}; it is a finite weight, from 0.")

    @property
    def metrics(self) -> tuple[str, ...]:
        """What is reported beside the objective."""
        plain = not self.label_smoothing and not self.z_loss
        return (() if plain else ("cross_entropy",)) + (("accuracy",) if self.accuracy else ())

    def counts(self, batch: TokenBatch) -> int:
        """The number of targets that are not ignored. Raises ObjectiveError for a batch of another kind."""
        _, targets = self._read(batch)
        return int((targets != self.ignore_index).sum())

    def __call__(self, model: nn.Module, batch: TokenBatch) -> Tensor | Mapping[str, Tensor]:
        """The sum, a scalar; with metrics, a mapping of it, as "objective", and them.

        Raises ObjectiveError for tokens outside the vocabulary or logits of another shape.
        """
        inputs, targets = self._read(batch)
        apart = told_apart(model, batch) if isinstance(batch, PackedTokens) else {}
        predictions, targets = read_predictions(model, inputs, targets, self.ignore_index, type(self).__name__, **apart)
        check_tokens(targets, predictions.vocabulary, "target")
        sums = predictions.total(CrossEntropy(self.label_smoothing, self.z_loss, self.metrics), targets)
        return dict(zip((TERM, *self.metrics), sums, strict=True)) if self.metrics else sums[0]

    def _read(self, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        if isinstance(batch, PackedTokens):
            inputs, targets, documents, _ = batch
            padding = documents == 0
            batch = inputs.masked_fill(padding, self.ignore_index), targets.masked_fill(padding, self.ignore_index)
        return inputs_and_targets(batch, type(self).__name__)


@dataclass(frozen=True)
class MaskedTokens(NextToken):
    """Cross entropy of hidden tokens (BERT, Devlin et al., 2019, arXiv:1810.04805), like `NextToken` in all else.

    A batch is a pair (inputs, targets), each [B, T]: targets are `ignore_index` wherever a token was not hidden.
    `mask_tokens` makes it, in the data set's collate function, so that its items can be counted beforehand.
    """

    def _read(self, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        if isinstance(batch, (Tensor, PackedTokens)):
            found = f"one tensor, of shape {list(batch.shape)}" if isinstance(batch, Tensor) else "packed documents"
            raise ObjectiveError(
                f"MaskedTokens was given {found}; give a pair (inputs, targets), as mask_tokens makes it, in the "
                f"data's collate function."
            )
        return super()._read(batch)


def mask_tokens(
    tokens: Tensor, *, mask: int, vocabulary: int, share: float = 0.15, ignore_index: int = -100
) -> tuple[Tensor, Tensor]:
    """A pair (inputs, targets), each [B, T], of `tokens` [B, T]: each is hidden with probability `share`.

    Of those, 80 % become `mask`, 10 % any of the `vocabulary`, 10 % stay (Devlin et al., 2019). Random numbers are from
    torch's generator, which is seeded for each microbatch before its samples are read. Padding stays as it is. Raises
    ObjectiveError for a `share` that is none.
    """
    if not 0 <= share <= 1:
        raise ObjectiveError(f"'share' is {share}; it is a share of the tokens, from 0 to 1.")
    chosen = (torch.rand(tokens.shape) < share) & (tokens != ignore_index)
    targets = tokens.masked_fill(~chosen, ignore_index)
    fate, others = torch.rand(tokens.shape), torch.randint(vocabulary, tokens.shape)
    masked, swapped = MASKED_SHARES
    inputs = torch.where(chosen & (fate < masked), mask, tokens)
    return torch.where(chosen & (fate >= masked) & (fate < masked + swapped), others, inputs), targets


@dataclass(frozen=True)
class Distillation:
    """Kullback-Leibler divergence between teacher and student, in nats, summed over targets that are not ignored.

    A batch is as for `NextToken`; with ``teacher=None`` it is a triple (inputs, targets, probabilities), the last of
    shape [B, T, V]: the teacher's, at temperature 1.

    Fields
    ------
    teacher: a `torch.nn.Module`, or a callable that builds one, which is frozen; its answers are as the student's.
    temperature: t; both softmaxes are of logits / t, and the sum is multiplied by t^2, so that gradients keep their
        size (Hinton et al., 2015, arXiv:1503.02531).
    direction: "forward" is KL(teacher || student), "reverse" KL(student || teacher) (MiniLLM, Gu et al., 2023,
        arXiv:2306.08543, by token, on given text), where a probability of 0 counts as the least normal number.
    hard: share of the cross entropy of the targets themselves, at temperature 1; the rest is the divergence.

    The metric "cross_entropy" is that of the targets. Raises ObjectiveError for a teacher with another vocabulary, for
    probabilities that are negative or do not sum to 1 within 1e-3, and ComponentError for a teacher that is no model.
    That the teacher numbers its tokens as the student does cannot be seen.
    """

    teacher: Any = None
    temperature: float = 1.0
    direction: Literal["forward", "reverse"] = "forward"
    hard: float = 0.0
    ignore_index: int = -100
    metrics: tuple[str, ...] = field(default=("cross_entropy",), init=False)

    def __post_init__(self) -> None:
        check_numbers(self)
        if not 0 < self.temperature < math.inf:
            raise ObjectiveError(f"the temperature is {self.temperature}; it must be finite and above 0.")
        if self.direction not in ("forward", "reverse"):
            raise ObjectiveError(f"the direction is {shown(self.direction)}; it is 'forward' or 'reverse'.")
        if not 0 <= self.hard <= 1:
            raise ObjectiveError(f"'hard' is {self.hard}; it is a share, from 0 to 1.")
        if self.teacher is not None:
            object.__setattr__(self, "teacher", frozen(self.teacher, "Distillation's teacher"))

    def counts(self, batch: Any) -> int:
        """The number of targets that are not ignored. Raises ObjectiveError for a batch of another kind."""
        _, targets, _ = self._read(batch)
        return int((targets != self.ignore_index).sum())

    def __call__(self, model: nn.Module, batch: Any) -> Mapping[str, Tensor]:
        """The sums, see the class."""
        inputs, targets, probabilities = self._read(batch)
        student, kept = read_predictions(model, inputs, targets, self.ignore_index, "Distillation")
        check_tokens(kept, student.vocabulary, "target")
        if probabilities is None:
            with torch.no_grad():
                teacher = on_device(self.teacher, inputs.device)
                asked, _ = read_predictions(teacher, inputs, targets, self.ignore_index, "Distillation's teacher")
        else:
            rows = _kept_rows(targets, self.ignore_index)
            asked = Predictions(logits=_log_of(probabilities.flatten(0, 1)[rows]))
        if asked.vocabulary != student.vocabulary:
            raise ObjectiveError(
                f"the teacher knows {asked.vocabulary} tokens and the model {student.vocabulary}; distil from a "
                f"teacher with the model's own vocabulary."
            )
        f = partial(_divergence, self.temperature, self.direction == "reverse", self.hard)
        return dict(zip((TERM, *self.metrics), student.total(f, kept, asked), strict=True))

    def _read(self, batch: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        if self.teacher is not None:
            return (*inputs_and_targets(batch, "Distillation"), None)
        if not isinstance(batch, (tuple, list)) or len(batch) != 3:
            raise ObjectiveError(
                "Distillation has no teacher, and the batch is no triple (inputs, targets, probabilities); give one "
                "or the other."
            )
        inputs, targets = inputs_and_targets(tuple(batch[:2]), "Distillation")
        probabilities = batch[2]
        if not isinstance(probabilities, Tensor) or probabilities.shape[:-1] != targets.shape:
            found = list(probabilities.shape) if isinstance(probabilities, Tensor) else type(probabilities).__name__
            raise ObjectiveError(
                f"the teacher's probabilities are {found}; give them as [{targets.shape[0]}, {targets.shape[1]}, "
                f"vocabulary], one row for each target."
            )
        return inputs, targets, probabilities


def read_predictions(
    model: nn.Module, inputs: Tensor, targets: Tensor, ignore_index: int, whose: str, **others: Any
) -> tuple[Predictions, Tensor]:
    """What `model` predicts at the targets that are not ignored, and these targets, [N].

    `inputs` and `targets` are [B, T]; `others` is what the model is given beside. Padding is fed as token 0. Raises
    ObjectiveError for inputs outside the vocabulary, where the model tells it, as ``vocabulary`` or
    ``config.vocab_size``, or fails to look one up, and for logits of another shape.
    """
    inputs = inputs.masked_fill(_padding(inputs, ignore_index), 0)
    vocabulary = getattr(model, "vocabulary", getattr(getattr(model, "config", None), "vocab_size", None))
    if isinstance(vocabulary, int):
        check_tokens(inputs, vocabulary, "input")
    rows = _kept_rows(targets, ignore_index)
    try:
        return predict(model, inputs, rows, whose, **others), targets.flatten()[rows]
    except IndexError as error:
        least, most = (int(value) for value in inputs.aminmax())
        raise ObjectiveError(
            f"the model failed to look something up ({cut(error)}) for input tokens from {least} to {most} in texts of "
            f"{inputs.shape[1]}; mark padding with the objective's ignore_index, or give the model a vocabulary and a "
            f"context that hold them.",
            detail=traceback.format_exc(),
        ) from error


def inputs_and_targets(batch: Any, whose: str) -> tuple[Tensor, Tensor]:
    """Inputs and targets, each [B, T] int64, of a batch as `NextToken` takes it. Raises ObjectiveError."""
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
        shape = f" and shape {list(batch.shape)}" if isinstance(batch, Tensor) else ""
        raise ObjectiveError(
            f"{whose} cannot read a batch of type {type(batch).__name__}{shape}; give tokens of shape "
            f"[batch, length + 1], or a pair (inputs, targets) of one shape, [batch, length]."
        )
    for part in (inputs, targets):
        if part.is_floating_point() or part.is_complex() or part.dtype == torch.bool:
            raise ObjectiveError(
                f"{whose} was given tokens of {part.dtype}; they must be whole numbers, as torch.int64."
            )
    return inputs.long(), targets.long()


def check_tokens(tokens: Tensor, vocabulary: int, kind: str) -> None:
    """Raises ObjectiveError for a token outside the vocabulary."""
    if not tokens.numel():
        return
    least, most = (int(value) for value in tokens.aminmax())
    if least < 0 or most >= vocabulary:
        raise ObjectiveError(
            f"{kind} token {least if least < 0 else most} is outside the model's vocabulary of {vocabulary} "
            f"(0 to {vocabulary - 1}); mark padding with the objective's ignore_index, or raise the model's vocabulary."
        )


def _divergence(
    temperature: float, reverse: bool, hard: float, logits: Tensor, targets: Tensor, teacher: Tensor
) -> tuple[Tensor, Tensor]:
    student = F.log_softmax(logits / temperature, dim=1)
    asked = F.log_softmax(teacher.to(logits.dtype) / temperature, dim=1)
    least, never = math.log(torch.finfo(asked.dtype).tiny), asked == -math.inf
    asked.masked_fill_(never, least)  # or 0 log 0 would not be a number
    masked = student.detach() == -math.inf  # such as words that make up a round vocabulary
    if bool(masked.any()):
        student = student.masked_fill(masked if reverse else masked & never, least)
    of, to = (student, asked) if reverse else (asked, student)
    total = temperature**2 * F.kl_div(to, of, reduction="sum", log_target=True)
    with torch.set_grad_enabled(hard > 0 and torch.is_grad_enabled()):
        own = F.cross_entropy(logits, targets, reduction="sum")
    return (1 - hard) * total + hard * own if hard else total, own


def _log_of(probabilities: Tensor) -> Tensor:
    """Logits of `probabilities` [N, V]. Raises ObjectiveError where these are none."""
    wide = probabilities if probabilities.dtype == torch.float64 else probabilities.float()
    sums = wide.sum(1)
    off = (sums - 1).abs()
    if len(wide) and not (bool((wide >= 0).all()) and float(off.max()) <= 1e-3):
        least, furthest = float(wide.min()), float(sums[off.nan_to_num(math.inf).argmax()])
        what = f"are as low as {least:.6g}" if least < 0 else f"sum to {furthest:.6g}"
        raise ObjectiveError(
            f"the teacher's probabilities {what}; they must be at least 0 and sum to 1 over the vocabulary: give the "
            f"softmax of the teacher's logits."
        )
    return wide.log()


def _kept_rows(targets: Tensor, ignore_index: int) -> Tensor:
    return (targets.flatten() != ignore_index).nonzero().squeeze(1)


def _padding(inputs: Tensor, ignore_index: int) -> Tensor:
    padding = inputs == ignore_index
    if ignore_index >= 0:  # it may be a token as well, and then only a row's tail of it is padding
        padding = padding.flip(1).long().cumprod(1).flip(1).bool()
    return padding
