"""Objectives that compare each sample with all others of its batch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from instep.errors import ObjectiveError
from instep.objectives.protocol import TERM, Shared, check_numbers


@dataclass(frozen=True)
class CLIP:
    """Symmetric cross entropy of matching pairs, each against the whole global batch; it counts pairs.

    From CLIP (Radford et al., 2021, arXiv:2103.00020, figure 3): with unit embeddings a_i, b_i and a scale s, half of
    ``-log softmax_j(s a_i b_j)_i`` and half of ``-log softmax_j(s a_j b_i)_i``, summed over pairs i; j runs over all
    pairs of the global batch, however it was cut into microbatches and spread over workers.

    A batch is a pair of tensors, B rows each. The model maps both, ``model(first, second)``, to their embeddings, each
    [B, D], and may give the logarithm of s, a scalar, as a third. Embeddings are scaled to unit length here.

    The gradient is exact, in two passes as in GradCache (Gao et al., 2021, arXiv:2101.06983): first the embeddings of
    all microbatches without gradients, then each microbatch's gradient against all of these. What it costs, for a
    global batch of N pairs: every worker computes the first pass over the whole batch by itself, data loading included,
    so that W workers are at most 4 W / (W + 3) times as fast as one (1.6 times for 2, below 4 for any), a backward
    taking two forwards; and each microbatch takes some N^2 D multiplications and N^2 numbers of memory.

    Held-out data are compared within batches as large as a microbatch, so held-out and training objectives differ.
    Only synchronous rules are taken: the whole batch must meet the same weights.

    Fields
    ------
    log_scale: logarithm of s where the model gives none; the paper starts from log(1 / 0.07).
    """

    log_scale: float = math.log(1 / 0.07)
    metrics: tuple[str, ...] = field(default=("accuracy",), init=False)

    def __post_init__(self) -> None:
        check_numbers(self)
        if not math.isfinite(self.log_scale):
            raise ObjectiveError(f"'log_scale' is {self.log_scale}; it must be finite.")

    def share(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        """The embeddings of one microbatch, each [B, D]."""
        first, second, _ = self._embed(model, batch)
        return first, second

    def __call__(self, model: nn.Module, batch: Any, shared: Shared) -> Mapping[str, Tensor]:
        """The sum over this microbatch's pairs, with the gradient of the whole batch's sum in its embeddings.

        The pairs of other microbatches depend on these embeddings too, as their negatives. Their terms are added as
        ``x - x.detach()``: nothing in value, all in gradient. There the scale is held fixed, since each microbatch
        gives its gradient for its own pairs.
        """
        first, second, log_scale = self._embed(model, batch)
        before = sum(len(part[0]) for part in shared.parts[: shared.own])
        own = slice(before, before + len(first))
        parts = [list(side) for side in zip(*shared.parts, strict=True)]
        parts[0][shared.own], parts[1][shared.own] = first, second
        cosines = torch.cat(parts[0]) @ torch.cat(parts[1]).T  # [N, N]
        scale = log_scale.exp()
        ours, theirs = _losses(scale * cosines), _losses(scale.detach() * cosines)
        others = theirs.sum() - theirs[own].sum()
        right = cosines.argmax(1)[own] == torch.arange(own.start, own.stop, device=cosines.device)
        return {TERM: ours[own].sum() + (others - others.detach()), "accuracy": right.to(ours.dtype).sum()}

    def _embed(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        if not isinstance(batch, (tuple, list)) or len(batch) != 2 or len(batch[0]) != len(batch[1]):
            raise ObjectiveError(
                f"CLIP cannot read a batch of type {type(batch).__name__}; give a pair of tensors with as many rows."
            )
        answer = model(*batch)
        fits = (
            isinstance(answer, (tuple, list)) and len(answer) in (2, 3) and all(isinstance(a, Tensor) for a in answer)
        )
        if not fits or answer[0].dim() != 2 or answer[0].shape != answer[1].shape or len(answer[0]) != len(batch[0]):
            shown = ", ".join(str(list(a.shape)) for a in answer[:2]) if fits else f"a {type(answer).__name__}"
            raise ObjectiveError(
                f"the model gave {shown} for {len(batch[0])} pairs; CLIP needs two tensors of embeddings of one shape, "
                f"[{len(batch[0])}, D], and at most a scalar log scale beside them."
            )
        wide = [a.float() if a.dtype in (torch.bfloat16, torch.float16) else a for a in answer]
        first, second = (F.normalize(a, dim=1) for a in wide[:2])
        scale = wide[2] if len(wide) == 3 else first.new_tensor(self.log_scale)
        if scale.numel() != 1:
            raise ObjectiveError(f"the model's log scale has shape {list(scale.shape)}; it must be a scalar.")
        return first, second, scale.reshape(())


def _losses(logits: Tensor) -> Tensor:
    """[N]: half of each row's cross entropy and half of each column's, the diagonal being right."""
    right = torch.arange(len(logits), device=logits.device)
    rows, columns = (F.cross_entropy(each, right, reduction="none") for each in (logits, logits.T))
    return (rows + columns) / 2
