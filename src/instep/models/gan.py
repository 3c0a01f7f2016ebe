"""The two nets of a generative adversarial network for small pictures."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from instep.models.sizes import check_sizes


class GANNet(nn.Module):
    """Both nets: `generator` and `discriminator`, for pictures [B, 1, S, S] from -1 to 1 of the classes `labels`, [B].

    Multilayer perceptrons, of which the generator's is normalised within a sample: what a sample comes to knows no
    others. `model(noise, labels)` is the generator's picture. Raises RecipeError for numbers that fit no model.
    """

    def __init__(self, *, side: int = 8, classes: int = 10, latents: int = 16, width: int = 256) -> None:
        super().__init__()
        check_sizes("GANNet", side=side, classes=classes, latents=latents, width=width)
        self.side, self.classes, self.latents = side, classes, latents
        self.generator = GeneratorNet(side, classes, latents, width)
        self.discriminator = DiscriminatorNet(side, classes, width)

    def forward(self, noise: Tensor, labels: Tensor) -> Tensor:
        made: Tensor = self.generator(noise, labels)
        return made


class GeneratorNet(nn.Module):
    """Noise, [B, Z], and classes, [B], to pictures, [B, 1, `side`, `side`], from -1 to 1."""

    def __init__(self, side: int, classes: int, latents: int, width: int) -> None:
        super().__init__()
        self.side = side
        self.names = nn.Embedding(classes, latents)
        self.layers = nn.Sequential(
            nn.Linear(2 * latents, width), nn.LayerNorm(width), nn.ReLU(),
            nn.Linear(width, width), nn.LayerNorm(width), nn.ReLU(),
            nn.Linear(width, side * side), nn.Tanh(),
        )  # fmt: skip

    def forward(self, noise: Tensor, labels: Tensor) -> Tensor:
        made: Tensor = self.layers(torch.cat((noise, self.names(labels)), dim=1))
        return made.view(-1, 1, self.side, self.side)


class DiscriminatorNet(nn.Module):
    """Pictures and their classes to logits, [B]: how much rather each is of the data than made.

    The class comes in by its inner product with the picture's features (Miyato and Koyama, 2018, arXiv:1802.05637).
    """

    def __init__(self, side: int, classes: int, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(side * side, width), nn.LeakyReLU(0.2), nn.Linear(width, width), nn.LeakyReLU(0.2)
        )
        self.out = nn.Linear(width, 1)
        self.names = nn.Embedding(classes, width)
        nn.init.normal_(self.names.weight, std=width**-0.5)

    def forward(self, pictures: Tensor, labels: Tensor) -> Tensor:
        features = self.layers(pictures)
        logits: Tensor = self.out(features)[:, 0] + (features * self.names(labels)).sum(1)
        return logits
