"""Objectives of diffusion models and flow matching.

Times and noise are drawn in the objective's call from torch's generator, on the device of the samples: first the times,
then the noise. The engine seeds it for each microbatch, so that neither knows the worker.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from instep.errors import ObjectiveError, shown
from instep.objectives.protocol import check_numbers


@dataclass(frozen=True)
class Diffusion:
    """Squared error of what a model predicts of noised samples, summed over their values; it counts values.

    A batch is samples x [B, ...], or a pair (x, condition). With t drawn evenly from 0 to `steps` - 1 and standard
    normal noise e, the model is called as ``model(x_t, t)``, or ``model(x_t, t, condition)``, where
    ``x_t = a x + s e``, ``a^2 + s^2 = 1`` and t is [B], int64; its answer has the shape of x.

    Fields
    ------
    prediction: "epsilon", the noise e (DDPM, Ho et al., 2020, arXiv:2006.11239, equation 14), or "v", a e - s x
        (Salimans and Ho, 2022, arXiv:2202.00512, appendix D).
    weighting: of each sample by its signal-to-noise ratio r = a^2 / s^2. "uniform" is 1; "min_snr" is min(r, gamma)
        in terms of x, so min(r, gamma) / r for epsilon and min(r, gamma) / (r + 1) for v (Hang et al., 2023,
        arXiv:2303.09556); "truncated_snr" is max(r, 1) in terms of x (Salimans and Ho, 2022, section 4), for v alone.
    gamma: of "min_snr".
    schedule: "linear" betas from 1e-4 to 0.02, stretched to `steps` (Ho et al., 2020), or "cosine" (Nichol and
        Dhariwal, 2021, arXiv:2102.09672, equation 17).
    steps: how many times there are.

    Raises ObjectiveError for fields that do not go together, and an answer or samples of the wrong shape or type.
    Whether samples have about unit variance, as the schedules suppose, is not looked at.
    """

    prediction: Literal["epsilon", "v"] = "epsilon"
    weighting: Literal["uniform", "min_snr", "truncated_snr"] = "uniform"
    gamma: float = 5.0
    schedule: Literal["linear", "cosine"] = "cosine"
    steps: int = 1000

    def __post_init__(self) -> None:
        check_numbers(self)
        _one_of("prediction", self.prediction, ("epsilon", "v"))
        _one_of("weighting", self.weighting, ("uniform", "min_snr", "truncated_snr"))
        _one_of("schedule", self.schedule, ("linear", "cosine"))
        if self.steps < 1:
            raise ObjectiveError(f"'steps' is {self.steps}; it must be at least 1.")
        if not 0 < self.gamma < math.inf:
            raise ObjectiveError(f"'gamma' is {self.gamma}; it must be finite and above 0.")
        if self.weighting == "truncated_snr" and self.prediction == "epsilon":
            raise ObjectiveError(
                "weighting 'truncated_snr' makes the loss of epsilon infinite where all is noise; take prediction 'v'."
            )

    def counts(self, batch: Any) -> int:
        """The values of all samples."""
        return _samples(batch, "Diffusion")[0].numel()

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """The sum, a scalar."""
        x, condition = _samples(batch, "Diffusion")
        t = torch.randint(self.steps, (len(x),), device=x.device)
        noise = torch.randn_like(x)
        kept = self.signal(x.device)[t]
        a, s = (_like(value.sqrt().to(x.dtype), x) for value in (kept, 1 - kept))
        found = _answer(model, a * x + s * noise, t, condition, "Diffusion")
        wanted = noise if self.prediction == "epsilon" else a * noise - s * x
        return (_like(self.snr_weights(kept).to(found.dtype), x) * (found - wanted).square()).sum()

    def signal(self, device: torch.device | None = None) -> Tensor:
        """[steps] float64: a^2, the share of the samples' variance that is left at each time."""
        if self.schedule == "linear":
            scale = 1000 / self.steps
            betas = torch.linspace(scale * 1e-4, min(scale * 0.02, 0.999), self.steps, dtype=torch.float64)
        else:
            t = torch.arange(self.steps + 1, dtype=torch.float64) / self.steps
            level = ((t + 0.008) / 1.008 * math.pi / 2).cos().square()
            betas = (1 - level[1:] / level[:-1]).clamp(max=0.999)
        return (1 - betas).cumprod(0).to(device)

    def snr_weights(self, signal: Tensor) -> Tensor:
        """The weight of samples of whose variance the share `signal` is left, both [B] float64."""
        ratio = signal / (1 - signal)
        if self.weighting == "uniform":
            return torch.ones_like(ratio)
        of_x = ratio.clamp(max=self.gamma) if self.weighting == "min_snr" else ratio.clamp(min=1.0)
        return of_x / (ratio if self.prediction == "epsilon" else ratio + 1)


@dataclass(frozen=True)
class FlowMatching:
    """Squared error of the velocity from noise to data, summed over values; it counts values.

    Straight paths (Lipman et al., 2023, arXiv:2210.02747, with no least noise; rectified flow, Liu et al., 2023,
    arXiv:2209.03003): with noise e at time 0 and a sample x at time 1, ``x_t = (1 - t) e + t x`` and the velocity is
    ``x - e``. A batch is x [B, ...], or a pair (x, condition); the model is called as ``model(x_t, t)``, or
    ``model(x_t, t, condition)``, with t [B] of the samples' type, and gives a velocity of the shape of x.

    Fields
    ------
    times: "uniform" from 0 to 1, or "logit_normal", the logistic of a standard normal number (Esser et al., 2024,
        arXiv:2403.03206, section 3.1).

    Raises ObjectiveError for an answer or samples of the wrong shape or type.
    """

    times: Literal["uniform", "logit_normal"] = "uniform"

    def __post_init__(self) -> None:
        _one_of("times", self.times, ("uniform", "logit_normal"))

    def counts(self, batch: Any) -> int:
        """The values of all samples."""
        return _samples(batch, "FlowMatching")[0].numel()

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """The sum, a scalar."""
        x, condition = _samples(batch, "FlowMatching")
        draw = torch.rand if self.times == "uniform" else torch.randn
        t = draw(len(x), device=x.device, dtype=x.dtype)
        t = t if self.times == "uniform" else t.sigmoid()
        noise = torch.randn_like(x)
        found = _answer(model, torch.lerp(noise, x, _like(t, x)), t, condition, "FlowMatching")
        return (found - (x - noise)).square().sum()


def _samples(batch: Any, whose: str) -> tuple[Tensor, Any]:
    pair = isinstance(batch, (tuple, list)) and len(batch) == 2
    x = batch[0] if pair else batch
    if not isinstance(x, Tensor) or x.dim() < 2 or not x.is_floating_point():
        found = f"a tensor of shape {list(x.shape)} and {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        raise ObjectiveError(
            f"{whose} was given {found} for samples; give floating numbers of shape [batch, ...], or a pair of these "
            f"and a condition."
        )
    return x, batch[1] if pair else None


def _answer(model: nn.Module, x: Tensor, t: Tensor, condition: Any, whose: str) -> Tensor:
    output = model(x, t) if condition is None else model(x, t, condition)
    if not isinstance(output, Tensor) or output.shape != x.shape:
        shown = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ObjectiveError(
            f"the model gave {shown} for samples of shape {list(x.shape)}; {whose} needs an answer of their shape."
        )
    return output.float() if output.dtype in (torch.bfloat16, torch.float16) else output


def _like(values: Tensor, x: Tensor) -> Tensor:
    """[B] as [B, 1, ...], to multiply x [B, ...]."""
    return values.view(-1, *[1] * (x.dim() - 1))


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ObjectiveError(f"{shown(name)} is {shown(value)}; it is one of {', '.join(map(repr, known))}.")
