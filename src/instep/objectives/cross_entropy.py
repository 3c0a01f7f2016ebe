"""Cross entropy over rows of logits, with a gradient that is known without autograd."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class CrossEntropy:
    """Sums over rows of logits [n, V] with `targets` [n]: the loss, then each of `metrics`.

    With label smoothing e (Szegedy et al., 2016, arXiv:1512.00567) and z-loss (PaLM, Chowdhery et al., 2022,
    arXiv:2204.02311) of weight z, the loss of a row is ``log Z - (1 - e) x_target - e mean(x) + z (log Z)^2``, where x
    are its logits and Z the sum of their exponentials.
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    metrics: tuple[str, ...] = ()

    def __call__(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        """The sums."""
        total = F.cross_entropy(logits, targets, reduction="sum", label_smoothing=self.label_smoothing)
        if self.z_loss:
            total = total + self.z_loss * logits.logsumexp(1).square().sum()
        with torch.no_grad():
            plain = F.cross_entropy(logits, targets, reduction="sum") if "cross_entropy" in self.metrics else total
            right = (logits.argmax(1) == targets).sum().to(total.dtype) if "accuracy" in self.metrics else total
        return total, *self._reported(plain, right)

    def with_gradient(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        """The sums; `logits` become the gradient, softmax (1 + 2 z log Z) - e / V, less 1 - e at the target."""
        smoothing, z, at = self.label_smoothing, self.z_loss, targets[:, None]
        wanted = logits.gather(1, at)
        mean = logits.mean(1, keepdim=True) if smoothing else wanted
        right = (logits.argmax(1) == targets).sum() if "accuracy" in self.metrics else targets.sum()
        most = logits.amax(1, keepdim=True)
        sums = logits.sub_(most).exp_().sum(1, keepdim=True)
        log_z = most + sums.log()
        logits.mul_((1 + 2 * z * log_z) / sums if z else 1 / sums)
        if smoothing:
            logits.sub_(smoothing / logits.shape[1])
        logits.scatter_add_(1, at, torch.full_like(wanted, smoothing - 1))
        plain = (log_z - wanted).sum()
        total = plain + smoothing * (wanted - mean).sum() if smoothing else plain
        total = total + z * log_z.square().sum() if z else total
        return total, *self._reported(plain, right.to(total.dtype))

    def _reported(self, plain: Tensor, right: Tensor) -> list[Tensor]:
        return [{"cross_entropy": plain, "accuracy": right}[name] for name in self.metrics]
