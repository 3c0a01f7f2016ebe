"""Objectives of autoencoders."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from instep.errors import ObjectiveError, shown
from instep.objectives.protocol import Warmup, Weight, check_numbers


@dataclass(frozen=True)
class VAE:
    """The negative evidence lower bound of a variational autoencoder (Kingma and Welling, 2014, arXiv:1312.6114).

    Two terms, each with a denominator of its own. "reconstruction" is summed over the values of x and counts these;
    "kl", from the posterior to a standard normal prior (appendix B there), is summed over the latents of a sample and
    counts samples. So the bound itself, by value of x, has a `kl_weight` of 1 / (values in a sample).

    A batch is x [B, ...], or a sequence whose first part it is. The model maps x to a triple (reconstruction, mean, log
    variance): the first of the shape of x, the others [B, Z]. `reparametrised` draws the latents between.

    Fields
    ------
    likelihood: "gaussian" with unit variance, half the squared error, without its constant; or "bernoulli", for x from
        0 to 1, with the reconstruction as logits.
    kl_weight: of the term "kl": beta (Higgins et al., 2017).
    warmup_steps: steps over which that weight rises from 0 (Bowman et al., 2016, arXiv:1511.06349).

    Raises ObjectiveError for answers of another shape, and x outside 0 to 1 under "bernoulli". That a model's two heads
    are exchanged, or that it gives a standard deviation for a log variance, cannot be seen.
    """

    likelihood: Literal["gaussian", "bernoulli"] = "gaussian"
    kl_weight: float = 1.0
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.likelihood not in ("gaussian", "bernoulli"):
            raise ObjectiveError(f"'likelihood' is {shown(self.likelihood)}; it is 'gaussian' or 'bernoulli'.")
        if not 0 <= self.kl_weight < math.inf:
            raise ObjectiveError(f"'kl_weight' is {self.kl_weight}; it is a finite weight, from 0.")
        Warmup(self.kl_weight, self.warmup_steps)

    @property
    def weights(self) -> Mapping[str, Weight]:
        """Of the term "kl"."""
        return {"kl": Warmup(self.kl_weight, self.warmup_steps)}

    def counts(self, batch: Any) -> dict[str, int]:
        """Values of x, and samples."""
        x = _values(batch)
        return {"reconstruction": x.numel(), "kl": len(x)}

    def __call__(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        """The two sums, see the class."""
        x = _values(batch)
        answer = model(x)
        if not isinstance(answer, (tuple, list)) or len(answer) != 3 or not all(isinstance(a, Tensor) for a in answer):
            raise ObjectiveError(
                f"the model gave a {type(answer).__name__}; VAE needs a triple of tensors (reconstruction, mean, log "
                f"variance)."
            )
        output, mean, log_variance = (a.float() if a.dtype in (torch.bfloat16, torch.float16) else a for a in answer)
        if output.shape != x.shape:
            raise ObjectiveError(
                f"the model's reconstruction has shape {list(output.shape)} and its input {list(x.shape)}; make the "
                f"decoder's head as wide as a sample."
            )
        if mean.shape != log_variance.shape or len(mean) != len(x) or mean.dim() < 2:
            raise ObjectiveError(
                f"the model's mean has shape {list(mean.shape)} and its log variance {list(log_variance.shape)}, for "
                f"{len(x)} samples; make the encoder's head twice as wide as the latents, and halve it: [{len(x)}, Z] "
                f"each."
            )
        if self.likelihood == "gaussian":
            reconstruction = 0.5 * (output - x).square().sum()
        else:
            reconstruction = F.binary_cross_entropy_with_logits(output, self._shares(x, output), reduction="sum")
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum()
        return {"reconstruction": reconstruction, "kl": kl}

    def _shares(self, x: Tensor, found: Tensor) -> Tensor:
        least, most = (float(value) for value in x.aminmax())
        if not 0 <= least <= most <= 1:
            raise ObjectiveError(
                f"the samples are from {least:.6g} to {most:.6g}; under likelihood 'bernoulli' they are from 0 to 1: "
                f"scale them, or take 'gaussian'."
            )
        return x.to(found.dtype)


def reparametrised(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Latents drawn from the posterior, of its shape, with gradients for both (Kingma and Welling, 2014, 2.4).

    Random numbers are from torch's generator, which is seeded for each microbatch.
    """
    return mean + (0.5 * log_variance).exp() * torch.randn_like(mean)


def _values(batch: Any) -> Tensor:
    x = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if not isinstance(x, Tensor) or x.dim() < 2 or not x.is_floating_point():
        found = f"a tensor of shape {list(x.shape)} and {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        raise ObjectiveError(f"VAE was given {found} for samples; give floating numbers of shape [batch, ...].")
    return x
