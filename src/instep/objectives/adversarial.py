"""The two objectives of a generative adversarial network, which take turns, see `instep.turns`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from instep.errors import ObjectiveError
from instep.objectives.protocol import check_numbers


@dataclass(frozen=True)
class Discriminator:
    """What a discriminator minimises: the cross entropy of telling samples from made ones (Goodfellow et al., 2014,
    arXiv:1406.2661, algorithm 1).

    Two terms, "real" and "fake", each over as many samples; the metric "right" is the share of both that it tells. With
    a `penalty`, the term "penalty" is the squared norm of the gradient of a sample's logit for the sample, weighted by
    penalty / 2 (R1: Mescheder et al., 2018, arXiv:1801.04406), without which such nets need not converge.

    A batch is x [B, ...], or a sequence of x and its conditions, such as classes, each [B, ...]. The model has two
    parts, `generator(noise, *conditions)` and `discriminator(x, *conditions)`, which gives logits [B], and the number
    `latents`, Z: noise is standard normal, [B, Z], drawn anew in each call. Each sample and one that is made under its
    conditions lie side by side in one batch of 2 B, so that a norm over the batch would see both.

    penalty: gamma there; 0 for none. smoothing: of the target 1 of samples, to 1 - smoothing (one-sided: Salimans et
    al., 2016, arXiv:1606.03498).

    Raises ObjectiveError for other models and answers, a `smoothing` that is not from 0 to below 1, and a
    `penalty` that is negative.
    """

    penalty: float = 0.0
    smoothing: float = 0.0
    metrics = ("right",)

    def __post_init__(self) -> None:
        check_numbers(self)
        if not 0 <= self.smoothing < 1:
            raise ObjectiveError(f"'smoothing' is {self.smoothing}; it must be from 0 to below 1.")
        if not 0 <= self.penalty < math.inf:
            raise ObjectiveError(f"'penalty' is {self.penalty}; it is a finite weight, from 0.")

    @property
    def weights(self) -> dict[str, float]:
        """Of the term "penalty"."""
        return {"penalty": self.penalty / 2} if self.penalty else {}

    def counts(self, batch: Any) -> dict[str, int]:
        """Samples, and as many again that are made."""
        x, _ = _parts(batch)
        penalty = {"penalty": len(x)} if self.penalty else {}
        return {"real": len(x), "fake": len(x), **penalty, "right": 2 * len(x)}

    def __call__(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        """The sums, see the class. Only the discriminator gets a gradient."""
        x, conditions = _parts(batch)
        with torch.no_grad():
            made = _made(model, x, conditions)
        if made.shape != x.shape:
            raise ObjectiveError(
                f"the model's generator made samples of shape {list(made.shape)}, and those of the data are "
                f"{list(x.shape)}; make its head as wide as a sample."
            )
        learns = torch.is_grad_enabled()
        with torch.set_grad_enabled(learns or self.penalty > 0):
            x = x.detach().requires_grad_() if self.penalty else x
            both = torch.stack((x, made.to(x.dtype)), dim=1).flatten(0, 1)
            logits = _logits(model, both, [each.repeat_interleave(2, dim=0) for each in conditions])
            real, fake = logits.view(-1, 2).unbind(1)
            slopes = torch.autograd.grad(real.sum(), x, create_graph=learns) if self.penalty else ()
        penalty = {"penalty": slopes[0].square().sum()} if slopes else {}
        target = torch.full_like(real, 1 - self.smoothing)
        return {
            "real": F.binary_cross_entropy_with_logits(real, target, reduction="sum"),
            "fake": F.softplus(fake).sum(),  # -log(1 - sigmoid)
            **penalty,
            "right": (real > 0).sum() + (fake < 0).sum(),
        }


@dataclass(frozen=True)
class Generator:
    """What a generator minimises: that made samples are taken for real ones, by -log D(G(z)), the non-saturating
    objective (Goodfellow et al., 2014, arXiv:1406.2661, section 3), summed over as many as a batch has samples.

    Batch and model are as for `Discriminator`. Train the generator alone by it: the turn's `parameters` say so.
    """

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """The sum."""
        x, conditions = _parts(batch)
        return F.softplus(-_logits(model, _made(model, x, conditions), conditions)).sum()


def _made(model: nn.Module, x: Tensor, conditions: Sequence[Tensor]) -> Tensor:
    """As many samples as there are in x, of noise from torch's generator, which is seeded for each microbatch."""
    generator, latents = getattr(model, "generator", None), getattr(model, "latents", None)
    if not callable(generator) or not callable(getattr(model, "discriminator", None)) or type(latents) is not int:
        raise ObjectiveError(
            f"the model {type(model).__name__} is no adversarial pair; give it two parts, 'generator' and "
            f"'discriminator', and the number 'latents' of noise that the first takes."
        )
    made = generator(torch.randn(len(x), latents, device=x.device, dtype=x.dtype), *conditions)
    if not isinstance(made, Tensor):
        raise ObjectiveError(f"the model's generator gave a {type(made).__name__}; it must give a tensor of samples.")
    return made


def _logits(model: Any, x: Tensor, conditions: Sequence[Tensor]) -> Tensor:
    """[B], in float32 at least."""
    found = model.discriminator(x, *conditions)
    if not isinstance(found, Tensor) or found.shape not in ((len(x),), (len(x), 1)):
        told = f"a tensor of shape {list(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
        raise ObjectiveError(
            f"the model's discriminator gave {told} for {len(x)} samples; it must give one logit for each, "
            f"[{len(x)}], without a sigmoid."
        )
    logits = found.view(len(x))
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


def _parts(batch: Any) -> tuple[Tensor, list[Tensor]]:
    """Samples and conditions."""
    parts = list(batch) if isinstance(batch, (tuple, list)) else [batch]
    fits = parts and all(isinstance(part, Tensor) and part.dim() and len(part) == len(parts[0]) for part in parts)
    if not fits or not parts[0].is_floating_point():
        raise ObjectiveError(
            f"an adversarial objective was given a {type(batch).__name__} for a batch; give floating numbers of shape "
            f"[batch, ...], or a sequence of such and of conditions, each [batch, ...]."
        )
    return parts[0], parts[1:]
