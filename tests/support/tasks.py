"""A small task for every objective, each with the objective's definition, slow and obvious, in float64.

A definition gets the model in float64 and the global batch as its microbatches, each with the seed that its random
numbers come from; it puts all samples together and writes the formula down without any code of the objective.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset, default_collate

from instep.data import Data
from instep.objectives.autoencoder import VAE
from instep.objectives.contrastive import CLIP
from instep.objectives.diffusion import Diffusion, FlowMatching
from instep.objectives.language import Distillation, MaskedTokens, NextToken, mask_tokens
from instep.objectives.preference import DPO
from instep.randomness import seed_all
from support.workloads import padded

WORDS, PADDING = 32, -100

Drawn = list[tuple[int, Any]]
"""Microbatches, each with its seed."""

Definition = Callable[[nn.Module, Drawn, int], Tensor]
"""From the model in float64, the global batch and the step."""


@dataclass(frozen=True)
class Task:
    model: Callable[[], nn.Module]
    objective: Callable[[], Any]
    data: Callable[[int, int, int, torch.dtype], Data]
    """From the number of samples, the length of the longest, a seed, and the type of what is no token."""
    definition: Definition


# --------------------------------------------------------------------------------------------------------------- text


class Texts(Dataset[list[int]]):
    """Texts of `shortest` to `longest` tokens."""

    def __init__(self, count: int, longest: int, seed: int, shortest: int = 2):
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(shortest, longest + 1, (count,), generator=generator).tolist()
        self.texts = [torch.randint(0, WORDS, (length,), generator=generator).tolist() for length in lengths]

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> list[int]:
        return self.texts[index]


class Pairs(Dataset[tuple[list[int], list[int]]]):
    """Two texts each."""

    def __init__(self, count: int, longest: int, seed: int):
        self.first, self.second = Texts(count, longest, seed), Texts(count, longest, seed + 1)

    def __len__(self) -> int:
        return len(self.first)

    def __getitem__(self, index: int) -> tuple[list[int], list[int]]:
        return self.first[index], self.second[index]


class Reader(nn.Module):
    """Predicts the next token from the mean of those so far. Offers hidden states and head."""

    vocabulary = WORDS

    def __init__(self, seed: int | None = None, words: int = WORDS) -> None:
        super().__init__()
        if seed is not None:
            torch.manual_seed(seed)
        self.embedding = nn.Embedding(words, 16)
        self.mix = nn.Linear(16, 24)
        self.head = nn.Linear(24, words)

    def hidden(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        so_far = x.cumsum(1) / torch.arange(1, tokens.shape[1] + 1)[:, None]
        return torch.tanh(self.mix(so_far))

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.head(self.hidden(tokens))
        return out


def masked(samples: list[list[int]]) -> tuple[Tensor, Tensor]:
    return mask_tokens(padded(samples), mask=0, vocabulary=WORDS, share=0.4)


def with_probabilities(samples: list[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
    tokens = padded(samples)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    logits = torch.sin(torch.arange(WORDS) * (inputs[..., None] + 1.0))
    return inputs, targets, logits.softmax(-1)


def pairs(samples: list[tuple[list[int], list[int]]]) -> dict[str, Tensor]:
    return {"chosen": padded([s[0] for s in samples]), "rejected": padded([s[1] for s in samples])}


def judged_pairs(samples: list[tuple[list[int], list[int]]]) -> dict[str, Tensor]:
    batch = pairs(samples)
    given = {f"{side}_reference": -batch[side].clamp(min=0).sum(1) / 40.0 for side in ("chosen", "rejected")}
    return {**batch, **given}


def texts(collate: Any = padded) -> Callable[[int, int, int, torch.dtype], Data]:
    return lambda count, longest, seed, dtype: Data(Texts(count, longest, seed), collate=collate)


def text_pairs(collate: Any = pairs) -> Callable[[int, int, int, torch.dtype], Data]:
    return lambda count, longest, seed, dtype: Data(Pairs(count, longest, seed), collate=collate)


def rows_of(tokens: Tensor) -> list[list[int]]:
    """The texts of a padded batch."""
    return [[int(token) for token in row if token != PADDING] for row in tokens]


def log_probabilities(model: nn.Module, inputs: list[int]) -> Tensor:
    """[T, V], by the definition of the softmax."""
    exponentials = model(torch.tensor([inputs]))[0].exp()
    out: Tensor = (exponentials / exponentials.sum(1, keepdim=True)).log()
    return out


def next_token(model: nn.Module, drawn: Drawn, step: int) -> Tensor:
    found: list[Tensor] = []
    for _, batch in drawn:
        for text in rows_of(batch):
            predicted = log_probabilities(model, text[:-1])
            found += [-predicted[t, token] for t, token in enumerate(text[1:])]
    return torch.stack(found).mean()


def smoothed_z(model: nn.Module, drawn: Drawn, step: int) -> Tensor:
    found = []
    for _, batch in drawn:
        for text in rows_of(batch):
            predicted = log_probabilities(model, text[:-1])
            z = model(torch.tensor([text[:-1]]))[0].exp().sum(1).log()
            for t, token in enumerate(text[1:]):
                wanted = torch.full((WORDS,), 0.1 / WORDS, dtype=torch.float64)
                wanted[token] += 0.9
                found.append(-(wanted * predicted[t]).sum() + 0.01 * z[t] ** 2)
    return torch.stack(found).mean()


def masked_token(model: nn.Module, drawn: Drawn, step: int) -> Tensor:
    found = []
    for _, (inputs, targets) in drawn:
        for text, wanted in zip(inputs, targets, strict=True):
            length = int((text != PADDING).sum())
            predicted = log_probabilities(model, text[:length].tolist())
            found += [-predicted[t, token] for t, token in enumerate(wanted.tolist()) if token != PADDING]
    return torch.stack(found).mean() if found else sum(p.sum() * 0 for p in model.parameters())  # type: ignore[return-value]


def softmax(logits: Tensor, temperature: float) -> Tensor:
    exponentials = (logits / temperature).exp()
    return exponentials / exponentials.sum(1, keepdim=True)


def forward_divergence(model: nn.Module, drawn: Drawn, step: int) -> Tensor:
    teacher = Reader(7).double()
    found: list[Tensor] = []
    for _, batch in drawn:
        for text in rows_of(batch):
            p, q = (softmax(m(torch.tensor([text[:-1]]))[0], 2.0) for m in (teacher, model))
            apart = (p.detach() * (p.detach() / q).log()).sum(1)
            predicted = log_probabilities(model, text[:-1])
            found += [0.7 * 4 * apart[t] - 0.3 * predicted[t, token] for t, token in enumerate(text[1:])]
    return torch.stack(found).mean()


def reverse_divergence(model: nn.Module, drawn: Drawn, step: int) -> Tensor:
    found = []
    for _, (inputs, targets, probabilities) in drawn:
        for text, wanted, given in zip(inputs, targets, probabilities, strict=True):
            length = int((wanted != PADDING).sum())
            q = softmax(model(text[None, :length])[0], 1.0)
            found += list((q * (q / given[:length].double()).log()).sum(1))
    return torch.stack(found).mean()


def preference(smoothing: float, given: bool, model: nn.Module, drawn: Drawn, step: int) -> Tensor:
    reference = Reader(7).double()
    found = []
    for _, batch in drawn:
        for index in range(len(batch["chosen"])):
            ratios = []
            for side in ("chosen", "rejected"):
                text = rows_of(batch[side][index][None])[0]
                own, theirs = (
                    torch.stack([log_probabilities(m, text[:-1])[t, token] for t, token in enumerate(text[1:])]).sum()
                    for m in (model, reference)
                )
                ratios.append(own - (batch[f"{side}_reference"][index].double() if given else theirs.detach()))
            p = 1 / (1 + (-0.5 * (ratios[0] - ratios[1])).exp())
            found.append(-(1 - smoothing) * p.log() - smoothing * (1 - p).log())
    return torch.stack(found).mean()


# ------------------------------------------------------------------------------------------------------------ pictures


def pictures(conditioned: bool = False) -> Callable[[int, int, int, torch.dtype], Data]:
    def make(count: int, longest: int, seed: int, dtype: torch.dtype) -> Data:
        x = torch.randn(count, 2, 3, generator=torch.Generator().manual_seed(seed)).to(dtype)
        return Data(TensorDataset(x, x.sum((1, 2)))) if conditioned else Data(x, collate=default_collate)

    return make


class Denoiser(nn.Module):
    """From pictures, times and perhaps a condition, to something of the pictures' shape."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 20), nn.Tanh(), nn.Linear(20, 6))

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        time = t / 1000 if t.dtype == torch.int64 else t
        other = torch.zeros_like(time) if condition is None else condition
        sides = [part.to(x.dtype)[:, None] for part in (time, other)]
        out: Tensor = self.layers(torch.cat([x.flatten(1), *sides], dim=1)).view_as(x)
        return out


def noised(drawn: Drawn, draw: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor, Any]:
    """All samples, times, noise and conditions, in float64; each microbatch draws its own."""
    found = []
    for seed, batch in drawn:
        x, condition = batch if isinstance(batch, list) else (batch, torch.zeros(len(batch)))
        seed_all(seed)
        times = draw(x)
        found.append((x.double(), times, torch.randn_like(x).double(), condition.double()))
    x, t, noise, condition = (torch.cat(parts) for parts in zip(*found, strict=True))
    return x, t, noise, condition


def levels(schedule: str) -> Tensor:
    """alpha-bar of the 1000 times."""
    product, found = 1.0, []
    for t in range(1000):
        if schedule == "linear":
            beta = 1e-4 + (0.02 - 1e-4) * t / 999
        else:
            now, after = (math.cos((u / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for u in (t, t + 1))
            beta = min(1 - after / now, 0.999)
        product *= 1 - beta
        found.append(product)
    return torch.tensor(found, dtype=torch.float64)


def denoising(prediction: str, weighting: str, schedule: str, model: nn.Module, drawn: Drawn, step: int) -> Tensor:
    x, t, noise, _ = noised(drawn, lambda x: torch.randint(1000, (len(x),)))
    squared = levels(schedule)[t][:, None, None]
    a, s = squared.sqrt(), (1 - squared).sqrt()
    found = model(a * x + s * noise, t)
    ratio = squared / (1 - squared)
    if prediction == "epsilon":
        wanted, scale = noise, ratio
    else:
        wanted, scale = a * noise - s * x, ratio + 1
    at_x = {"uniform": scale, "min_snr": ratio.clamp(max=5), "truncated_snr": ratio.clamp(min=1)}[weighting]
    return (at_x / scale * (found - wanted) ** 2).mean()


def flow(times: str, model: nn.Module, drawn: Drawn, step: int) -> Tensor:
    def draw(x: Tensor) -> Tensor:
        if times == "uniform":
            return torch.rand(len(x), dtype=x.dtype).double()
        return 1 / (1 + (-torch.randn(len(x), dtype=x.dtype).double()).exp())

    x, t, noise, condition = noised(drawn, draw)
    found = model((1 - t[:, None, None]) * noise + t[:, None, None] * x, t, condition)
    return ((found - (x - noise)) ** 2).mean()


class AutoEncoder(nn.Module):
    """Draws in float32, whatever its weights are, so that the definition meets the same noise."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(6, 8), nn.Linear(4, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_variance = self.encoder(x.flatten(1)).tanh().chunk(2, dim=1)
        z = mean + (0.5 * log_variance).exp() * torch.randn(mean.shape).to(mean.dtype)
        return self.decoder(z).view_as(x), mean, log_variance


def bound(likelihood: str, weight: float, model: nn.Module, drawn: Drawn, step: int) -> Tensor:
    apart, divergence = [], []
    for seed, batch in drawn:
        x = (batch[0] if isinstance(batch, list) else batch).double()
        seed_all(seed)
        found, mean, log_variance = model(x)
        if likelihood == "gaussian":
            apart.append((found - x) ** 2 / 2)
        else:
            p = 1 / (1 + (-found).exp())
            apart.append(-x * p.log() - (1 - x) * (1 - p).log())
        std = log_variance.exp().sqrt()
        divergence.append((-std.log() + (std**2 + mean**2) / 2 - 0.5).sum(1))
    return torch.cat(apart).mean() + weight * min(1.0, step / 2) * torch.cat(divergence).mean()


def shades(count: int, longest: int, seed: int, dtype: torch.dtype) -> Data:
    return Data(torch.rand(count, 2, 3, generator=torch.Generator().manual_seed(seed)).to(dtype))


class TwoTowers(nn.Module):
    """With noise in its embeddings, drawn in float32, so that both passes must meet the same random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 8), nn.Linear(5, 8)
        self.log_scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, b = self.first(first).tanh(), self.second(second).tanh()
        noise = torch.randn(a.shape).to(a.dtype) if self.training else torch.zeros_like(a)
        return a + 0.3 * noise, b - 0.3 * noise, self.log_scale


def matches(count: int, longest: int, seed: int, dtype: torch.dtype) -> Data:
    generator = torch.Generator().manual_seed(seed)
    first, noise = (torch.randn(count, 5, generator=generator) for _ in range(2))
    return Data(TensorDataset(first.to(dtype), (first + noise).to(dtype)))


def global_contrast(model: nn.Module, drawn: Drawn, step: int) -> Tensor:
    found = []
    for seed, (first, second) in drawn:
        seed_all(seed)
        found.append(model(first.double(), second.double()))
    a, b = (torch.cat([embeddings[side] for embeddings in found]) for side in (0, 1))
    log_scale = found[0][2]
    a, b = (side / (side**2).sum(1, keepdim=True).sqrt() for side in (a, b))
    exponentials = (log_scale.exp() * a @ b.T).exp()
    right = exponentials.diagonal()
    return -((right / exponentials.sum(1)).log() + (right / exponentials.sum(0)).log()).mean() / 2


def diffusion(prediction: Any, weighting: Any, schedule: Any) -> Task:
    return Task(
        Denoiser,
        lambda: Diffusion(prediction, weighting, schedule=schedule),
        pictures(),
        partial(denoising, prediction, weighting, schedule),
    )


TASKS: Mapping[str, Task] = {
    "next token": Task(Reader, NextToken, texts(), next_token),
    "smoothed, z-loss": Task(Reader, lambda: NextToken(label_smoothing=0.1, z_loss=0.01), texts(), smoothed_z),
    "masked tokens": Task(Reader, lambda: MaskedTokens(accuracy=True), texts(masked), masked_token),
    "distillation": Task(
        Reader, lambda: Distillation(Reader(7), temperature=2.0, hard=0.3), texts(), forward_divergence
    ),
    "reverse distillation": Task(
        Reader, lambda: Distillation(direction="reverse"), texts(with_probabilities), reverse_divergence
    ),
    "dpo": Task(Reader, lambda: DPO(0.5, reference=Reader(7)), text_pairs(), partial(preference, 0.0, False)),
    "dpo, given": Task(Reader, lambda: DPO(0.5, 0.1), text_pairs(judged_pairs), partial(preference, 0.1, True)),
    "epsilon": diffusion("epsilon", "uniform", "linear"),
    "epsilon, min-SNR": diffusion("epsilon", "min_snr", "cosine"),
    "v, min-SNR": diffusion("v", "min_snr", "linear"),
    "v, truncated SNR": diffusion("v", "truncated_snr", "cosine"),
    "flow": Task(Denoiser, FlowMatching, pictures(conditioned=True), partial(flow, "uniform")),
    "flow, logit-normal": Task(
        Denoiser, lambda: FlowMatching("logit_normal"), pictures(conditioned=True), partial(flow, "logit_normal")
    ),
    "vae": Task(AutoEncoder, lambda: VAE(kl_weight=0.5, warmup_steps=2), pictures(), partial(bound, "gaussian", 0.5)),
    "vae, bernoulli": Task(
        AutoEncoder, lambda: VAE("bernoulli", 0.5, warmup_steps=2), shades, partial(bound, "bernoulli", 0.5)
    ),
    "clip": Task(TwoTowers, CLIP, matches, global_contrast),
}
