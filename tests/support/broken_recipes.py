"""Recipes that break a promise, each in one way that people's recipes do, and what is said of it."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, library, nn
from torch.utils.data import Dataset, TensorDataset

from instep import Recipe, objective

SAMPLES, BATCH, WIDE, CLASSES = 41, 12, 6, 4


@dataclass(frozen=True)
class Broken:
    """refuted: the equivalence. says: what its sentence has in it; where: what its place has, by field."""

    name: str
    fields: Callable[[], dict[str, Any]]
    refuted: str
    says: str
    where: dict[str, Any] = field(default_factory=dict)

    def recipe(self) -> Recipe:
        """Made anew each time: state in it starts from nothing."""
        return recipe(**self.fields())


def recipe(**fields: Any) -> Recipe:
    """A sound one, but for `fields`."""
    given: dict[str, Any] = {
        "model": lambda: nn.Linear(WIDE, CLASSES), "objective": entropy, "data": samples(), "batch": BATCH,
        "microbatches": 4, "steps": 12, "optimizer": lambda p: torch.optim.Adam(p, lr=0.05), "name": "tried",
    }  # fmt: skip
    return Recipe(**{**given, **fields})


def samples(count: int = SAMPLES) -> TensorDataset:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(count, WIDE, generator=generator)
    return TensorDataset(x, torch.randint(0, CLASSES, (count,), generator=generator))


def entropy(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")


class Listed(Dataset[Any]):
    """Samples by `give(index, x, y)`."""

    def __init__(self, give: Callable[[Any, int, Tensor, Tensor], Any]):
        self.pairs, self._give = samples(), give
        self.rng, self.seen, self.last = np.random.default_rng(0), dict[int, int](), torch.zeros(WIDE)

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Any:
        return self._give(self, index, *self.pairs[index])


class Net(nn.Module):
    """Two layers, and `between(self, x)`, which gets what the first one gives."""

    def __init__(self, between: Callable[[Any, Tensor], Tensor], **parts: Any):
        super().__init__()
        self.first, self.last = nn.Linear(WIDE, 8), nn.Linear(8, CLASSES)
        self._between = between
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self._between(self, self.first(x)))  # type: ignore[no-any-return]


def net(between: Callable[[Any, Tensor], Tensor], **parts: Callable[[], Any]) -> dict[str, Any]:
    return {"model": lambda: Net(between, **{name: part() for name, part in parts.items()})}


# ------------------------------------------------------------------------------------------------------------ in models


def own_dropout(self: Any, x: Tensor) -> Tensor:
    return x * (torch.rand(x.shape, generator=self.random) < 0.8) if self.training else x


def counted(self: Any, x: Tensor) -> Tensor:
    if self.training:
        self.calls += 1
    return x * (1 + 0.01 * self.calls)


def moving_mean(self: Any, x: Tensor) -> Tensor:
    if self.training:
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
    return x - self.mean


CALLS = [0]
"""A global that a forward counts in."""


def counted_globally(self: Any, x: Tensor) -> Tensor:
    if self.training:
        CALLS[0] += 1
    return torch.tanh(x) if CALLS[0] % 3 else torch.relu(x)


def by_process(self: Any, x: Tensor) -> Tensor:
    return x * (1.0 + os.getpid() % 1009 / 1e6)


def unfrozen_late(self: Any, x: Tensor) -> Tensor:
    self.calls += self.training
    return x if self.calls > 9 else x.detach()


def batch_mean(self: Any, x: Tensor) -> Tensor:
    return x - x.mean(0, keepdim=True)


def logged(self: Any, x: Tensor) -> Tensor:
    if self.training:
        self.history.append(float(x.detach().abs().max()))
    return x / max(self.history, default=1.0)


KERNELS = "broken"


@library.custom_op(f"{KERNELS}::unrepeatable", mutates_args=())
def unrepeatable(x: Tensor) -> Tensor:
    """A kernel that does not repeat."""
    return x * (1 + time.perf_counter_ns() % 9973 * 1e-6)


unrepeatable.register_autograd(lambda ctx, grad: grad)


class Untied(Net):
    """Its second weight is the first one, until it is loaded."""

    def __init__(self) -> None:
        super().__init__(lambda self, x: x)
        self.other = nn.Linear(8, CLASSES)
        self.other.weight = self.last.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(x) + self.other(torch.tanh(x))  # type: ignore[no-any-return]

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        self.other.weight = nn.Parameter(state_dict["other.weight"].clone() * 1.5)
        return super().load_state_dict({k: v for k, v in state_dict.items() if k != "other.weight"}, strict=False)


class Forgets(Net):
    """Its extra state is not taken back."""

    def __init__(self) -> None:
        super().__init__(lambda self, x: x * (1 + 0.01 * self.calls))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += self.training
        return super().forward(x)

    def get_extra_state(self) -> Tensor:
        return torch.tensor([self.calls])

    def set_extra_state(self, state: Tensor) -> None:
        pass


class Block(nn.Module):
    """A block whose second pass sees another value."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.scale = nn.Linear(8, 256), nn.Linear(256, 8), 1.0

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(torch.relu(self.up(x)) * self.scale))  # type: ignore[no-any-return]


class Scaled(nn.Module):
    """Sets its blocks' scale for the forward alone, as an adapter does, so that a recompute sees another."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDE, 8), nn.Linear(8, CLASSES)
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            block.scale = 0.5  # type: ignore[assignment]
            x = block(x)
        for block in self.blocks:
            block.scale = 1.0  # type: ignore[assignment]
        return self.last(x)  # type: ignore[no-any-return]


def built_by_clock() -> nn.Module:
    model = nn.Linear(WIDE, CLASSES)
    generator = torch.Generator().manual_seed(time.time_ns() % 2**31)
    with torch.no_grad():
        model.weight.normal_(generator=generator)
    return model


# -------------------------------------------------------------------------------------------------------- in objectives


def mean(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def mean_of_some(model: nn.Module, batch: Any) -> Tensor:
    """As a mean over targets that are not ignored, times the samples: no mean any more, and no sum."""
    targets = torch.where(batch[1] == 0, -100, batch[1])
    total = F.cross_entropy(model(batch[0]), targets, ignore_index=-100, reduction="sum")
    return len(targets) * total / (targets >= 0).sum().clamp(min=1)


@objective(counts=lambda batch: 1)
def mean_of_pieces(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def by_pieces(model: nn.Module, batch: Any) -> Tensor:
    return entropy(model, batch) * len(batch[0]) / 8


def contrasted(model: nn.Module, batch: Any) -> Tensor:
    features = F.normalize(model(batch[0]), dim=1)
    return F.cross_entropy(features @ features.detach().T, torch.arange(len(features)), reduction="sum")


def random_mean(model: nn.Module, batch: Any) -> Tensor:
    return F.mse_loss(model(batch[0] + torch.randn_like(batch[0])), F.one_hot(batch[1], CLASSES).float())


@objective(counts=lambda batch: (batch[1] >= 0).sum())
def of_some(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], ignore_index=-100, reduction="sum")


def counting() -> Callable[[nn.Module, Any], Tensor]:
    count = 0

    def counted(model: nn.Module, batch: Any) -> Tensor:
        nonlocal count
        count += model.training
        return entropy(model, batch) * (1 + 0.1 * count)

    return counted


def mean_in_one_term(model: nn.Module, batch: Any) -> dict[str, Tensor]:
    return {"fit": entropy(model, batch), "size": 8 * model(batch[0]).var(0, unbiased=False).sum() * len(batch[0])}


# -------------------------------------------------------------------------------------------------------------- in data


def in_place(self: Any, index: int, x: Tensor, y: Tensor) -> Any:
    return x.mul_(0.9), y


def after_another(self: Any, index: int, x: Tensor, y: Tensor) -> Any:
    mixed, self.last = 0.9 * x + 0.1 * self.last, x
    return mixed, y


def as_first_seen(self: Any, index: int, x: Tensor, y: Tensor) -> Any:
    return x + self.seen.setdefault(index, len(self.seen)), y


def unreadable(self: Any, index: int, x: Tensor, y: Tensor) -> Any:
    if index == in_step(1, 2):
        raise OSError("image file is truncated (3 bytes not processed)")
    return x, y


def in_step(step: int, microbatch: int) -> int:
    """A sample of it."""
    from instep.data.cursor import Cursor

    return Cursor(samples=SAMPLES, batch=BATCH, microbatches=4, seed=0).microbatch(step, microbatch)[0]


def spoilt(value: float = float("inf")) -> TensorDataset:
    data = samples()
    data.tensors[0][in_step(1, 2), 0] = value
    return data


def all_masked() -> TensorDataset:
    from instep.data.cursor import Cursor

    data = samples()
    data.tensors[1][Cursor(samples=SAMPLES, batch=BATCH, microbatches=4, seed=0).indices(2)] = -100
    return data


# -------------------------------------------------------------------------------------------------------- in optimizers


class Own(torch.optim.Optimizer):
    """Momentum; where it is kept is `how`'s."""

    def __init__(self, parameters: Any, how: str):
        super().__init__(parameters, {"lr": 0.05})
        self.how, self.kept, self.steps = how, dict[int, Tensor](), 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.steps += 1
        for group in self.param_groups:
            for place, p in enumerate(group["params"]):
                if p.grad is None:
                    continue
                state = self.kept if self.how == "aside" else self.state[p]
                known: Any = place if self.how == "aside" else "momentum"
                state[known] = 0.9 * state.get(known, torch.zeros_like(p)) + p.grad
                rate = group["lr"] / (self.steps if self.how == "counts" else 1)
                p.sub_(rate * state[known])

    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict)
        if self.how == "drops":
            self.state.clear()


class Both:
    """Two optimizers in one, without a state."""

    def __init__(self, parameters: Any):
        given = list(parameters)
        self.each = torch.optim.Adam(given[:1]), torch.optim.SGD(given[1:], lr=0.1)

    def step(self) -> None:
        for each in self.each:
            each.step()


def of_another_copy(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(nn.Linear(WIDE, CLASSES).parameters(), lr=0.1)


MODELS = [
    Broken("dropout of its own generator",
           lambda: net(own_dropout, random=lambda: torch.Generator().manual_seed(1)), "workers",
           r"generator of its own.*'model\.random' changes", {"step": 1, "operation": "aten.rand.generator"}),
    Broken("a counter in an attribute", lambda: net(counted, calls=lambda: 0), "workers",
           r"A Python number is .* kept outside of tensors.*'model\.calls' changes", {"step": 1, "microbatch": 2}),
    Broken("a counter in an attribute, resumed", lambda: net(counted, calls=lambda: 0), "resume",
           r"A Python number is .*'model\.calls' changes", {"step": 3}),
    Broken("a counter in a global", lambda: net(counted_globally), "workers",
           r"goes another way.*global CALLS.*changes", {"step": 1}),
    Broken("a running mean that is no buffer", lambda: net(moving_mean, mean=lambda: torch.zeros(8)), "workers",
           r"neither parameter nor buffer.*'model\.mean' changes", {"step": 1, "operation": "aten.mul.Tensor"}),
    Broken("a list of what was seen", lambda: net(logged, history=lambda: list[float]()), "workers",
           r"A Python number is .*'model\.history"),
    Broken("the process's number", lambda: net(by_process), "workers", r"A Python number is 1\.", {"step": 1}),
    Broken("unfrozen after some calls", lambda: net(unfrozen_late, calls=lambda: 0), "workers", r"'model\.calls'"),
    Broken("a kernel that does not repeat", lambda: net(lambda self, x: unrepeatable(x) if self.training else x),
           "workers", "does not repeat", {"step": 1}),
    Broken("BatchNorm", lambda: net(lambda self, x: self.norm(x), norm=lambda: nn.BatchNorm1d(8)), "full batch",
           r"In 'norm' \(BatchNorm1d\) samples see each other", {"module": "norm"}),
    Broken("BatchNorm on one sample",
           lambda: {**net(lambda self, x: self.norm(x), norm=lambda: nn.BatchNorm1d(8)), "microbatches": 12}, "recipe",
           "one sample"),
    Broken("a mean over the batch in a forward", lambda: net(batch_mean), "full batch",
           "In the forward of Net, before 'last', samples see each other"),
    Broken("weights that are built by the clock", lambda: {"model": built_by_clock}, "workers",
           "built with other weights", {"step": None, "tensor": "weight"}),
    Broken("tying that a load breaks", lambda: {"model": Untied}, "recipe", "could not be resumed"),
    Broken("extra state that is not taken back", lambda: {"model": Forgets}, "recipe", "another '_extra_state'"),
    Broken("a value that a recompute does not see", lambda: {"model": Scaled}, "memory",
           r"operation \d of block 'blocks\.\d', .* gave another value in recompute"),
]  # fmt: skip

OBJECTIVES = [
    Broken("a mean", lambda: {"objective": mean}, "recipe", "is a mean, not a sum"),
    Broken("a mean with random numbers", lambda: {"objective": random_mean}, "recipe", "is a mean, not a sum"),
    Broken("a mean over some targets", lambda: {"objective": mean_of_some}, "full batch", "no sum over samples"),
    Broken("a mean that counts as one", lambda: {"objective": mean_of_pieces}, "full batch",
           r"counts of term 'objective'"),
    Broken("divided by the pieces", lambda: {"objective": by_pieces}, "full batch", "no sum over samples"),
    Broken("one term of two", lambda: {"objective": mean_in_one_term}, "full batch", "no sum over samples"),
    Broken("contrasts within a piece", lambda: {"objective": contrasted}, "full batch", "no sum over samples"),
    Broken("a counter in a closure", lambda: {"objective": counting()}, "workers", r"objective \(count\)' changes"),
    Broken("a step whose targets are all masked", lambda: {"objective": of_some, "data": all_masked()}, "workers",
           "step 3 has no items to learn from"),
]  # fmt: skip

DATA = [
    Broken("a generator of the data set", lambda: {"data": Listed(lambda s, i, x, y: (x + s.rng.normal(), y))},
           "recipe", "draws from a generator of its own"),
    Broken("fresh entropy", lambda: {"data": Listed(lambda s, i, x, y: (x + np.random.default_rng().random(), y))},
           "recipe", "asked again"),
    Broken("another library's random device",
           lambda: {"data": Listed(lambda s, i, x, y: (x + random.SystemRandom().random(), y))},
           "recipe", "asked again"),
    Broken("the time of day", lambda: {"data": Listed(lambda s, i, x, y: (x + time.time_ns() % 10**6 / 10**6, y))},
           "recipe", "asked again"),
    Broken("in place", lambda: {"data": Listed(in_place)}, "recipe", "keeps state"),
    Broken("the sample before", lambda: {"data": Listed(after_another)}, "recipe", "keeps state"),
    Broken("the order of first reading", lambda: {"data": Listed(as_first_seen)}, "data", "microbatches differ"),
    Broken("the process that reads", lambda: {"data": Listed(lambda s, i, x, y: (x + os.getpid() % 1009, y))},
           "workers", "samples are others", {"step": 1, "microbatch": 0}),
    Broken("a sample that cannot be read", lambda: {"data": Listed(unreadable)}, "data", "image file is truncated"),
    Broken("a sample that is not finite", lambda: {"data": spoilt()}, "workers", "step 2, microbatch 2"),
]  # fmt: skip

OPTIMIZERS = [
    Broken("momentum kept aside", lambda: {"optimizer": lambda p: Own(p, "aside")}, "recipe", "goes on otherwise"),
    Broken("steps counted aside", lambda: {"optimizer": lambda p: Own(p, "counts")}, "recipe", "goes on otherwise"),
    Broken("a load that drops momentum", lambda: {"optimizer": lambda p: Own(p, "drops")}, "recipe", "resume"),
    Broken("two in one without a state", lambda: {"optimizer": Both}, "recipe", "optimizer"),
    Broken("of another model's copy", lambda: {"optimizer": of_another_copy}, "recipe", "parameter"),
]  # fmt: skip

ALL = [*MODELS, *OBJECTIVES, *DATA, *OPTIMIZERS]
