"""A variational autoencoder for small pictures."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from instep.models.sizes import check_sizes


class VAENet(nn.Module):
    """Pictures x, [B, 1, S, S], to a triple: their reconstruction, of that shape, and mean and log variance, [B, Z].

    Encoder and decoder are multilayer perceptrons (Kingma and Welling, 2014, arXiv:1312.6114, appendix C). In training
    the reconstruction is of latents drawn from the posterior, in eval mode of their mean. Raises RecipeError for
    numbers that fit no model.
    """

    def __init__(self, *, side: int = 8, latents: int = 8, width: int = 256) -> None:
        super().__init__()
        check_sizes("VAENet", side=side, latents=latents, width=width)
        self.side, self.latents = side, latents
        self.encoder = nn.ModuleList([nn.Linear(side * side, width), nn.Linear(width, width)])
        self.posterior = nn.Linear(width, 2 * latents)
        self.decoder = nn.ModuleList([nn.Linear(latents, width), nn.Linear(width, width)])
        self.out = nn.Linear(width, side * side)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_variance = self.encode(x)
        drawn = mean
        if self.training:
            drawn = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
        return self.decode(drawn), mean, log_variance

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the posterior of `x`, each [B, Z]."""
        hidden = x.flatten(1)
        for layer in self.encoder:
            hidden = F.silu(layer(hidden))
        mean, log_variance = self.posterior(hidden).chunk(2, dim=1)
        return mean, log_variance

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures, [B, 1, S, S], of `latents`, [B, Z]: logits or values, as the objective's likelihood takes them."""
        hidden = latents
        for layer in self.decoder:
            hidden = F.silu(layer(hidden))
        out: Tensor = self.out(hidden)
        return out.view(-1, 1, self.side, self.side)
