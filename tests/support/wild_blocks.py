"""Blocks that do what blocks do in the wild."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

WIDTH, LENGTH = 16, 32


class Block(nn.Module):
    """The second half of a transformer's block; what follows does something before it, or in it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.widen, self.back = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)

    def forward(self, x: Any) -> Any:
        return x + self.back(F.gelu(self.widen(self.norm(x))))


class TableOfItsOwn(Block):
    """A table that is no buffer: slices of it are no activations."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.randn(4096, WIDTH)

    def forward(self, x: Tensor) -> Any:
        return super().forward(x * self.table[: x.shape[1]])


class HalfInTraining(Block):
    """The block is in evaluation mode, and its BatchNorm is not."""

    def __init__(self) -> None:
        super().__init__()
        self.batch_norm = nn.BatchNorm1d(WIDTH)
        self.training = False

    def forward(self, x: Tensor) -> Any:
        return super().forward(self.batch_norm(x.transpose(1, 2)).transpose(1, 2))


class ReplacedBuffer(Block):
    """A running mean that is a new tensor after each forward."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Any:
        self.mean = 0.5 * self.mean + x.detach().mean((0, 1))
        return super().forward(x * (1 + self.mean))


class Codebook(Block):
    """A buffer that is larger than some activations, and changed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("book", torch.randn(512, WIDTH))

    def forward(self, x: Tensor) -> Any:
        with torch.no_grad():
            self.book.mul_(0.99).add_(x.mean())
        return super().forward(x * self.book[: x.shape[1]].clone())


class SharedBuffer(Block):
    """One buffer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Module()
        self.register_buffer("count", torch.ones(1))
        self.other.register_buffer("count", self.count)

    def forward(self, x: Tensor) -> Any:
        with torch.no_grad():
            self.count.add_(1)
        return super().forward(x * self.other.count.clone())


class ForeachOnLists(Block):
    """Operations on lists, which give nothing back."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("one", torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Any:
        with torch.no_grad():
            torch._foreach_mul_([self.one], 1.01)
        scaled = [x.detach() * 0.1, x.detach() * 0.2]
        torch._foreach_add_(scaled, 1.0)
        return super().forward(x * self.one.clone() + scaled[0] * scaled[1] * self.widen.weight[:WIDTH].sum())


class Rotary(Block):
    """Complex numbers, and a conjugate that is not resolved at once."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("turns", torch.polar(torch.ones(LENGTH, WIDTH // 2), torch.randn(LENGTH, WIDTH // 2)))

    def forward(self, x: Tensor) -> Any:
        turned = (torch.view_as_complex(x.unflatten(-1, (-1, 2))) * self.turns).conj() * 1.5
        return super().forward(torch.view_as_real(turned.resolve_conj()).flatten(-2))


class Fourier(Block):
    def forward(self, x: Tensor) -> Any:
        f = torch.fft.rfft(x, dim=-1)
        return super().forward(torch.fft.irfft(f * f.conj(), n=WIDTH, dim=-1))


class Experts(Block):
    """Each token goes to one of six experts; some get none."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 6)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH)) for _ in "123456"
        )

    def forward(self, x: Tensor) -> Any:
        h = self.norm(x).flatten(0, -2)
        gates = self.router(h).softmax(-1)
        out = torch.zeros_like(h)
        for number, expert in enumerate(self.experts):
            chosen = (gates.argmax(-1) == number).nonzero().flatten()
            out = out.index_add(0, chosen, expert(h[chosen]) * gates[chosen, number : number + 1])
        return x + out.view_as(x)


class Recurrent(Block):
    """On a CPU an LSTM gives scratch memory too, and a GRU changes what views of it were taken of."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru = nn.LSTM(WIDTH, WIDTH, batch_first=True), nn.GRU(WIDTH, WIDTH, batch_first=True)

    def forward(self, x: Tensor) -> Any:
        few = x[:, :8]
        return super().forward(few + self.lstm(few)[0] + self.gru(few)[0])


class InPlace(Block):
    def forward(self, x: Tensor) -> Any:
        h = self.widen(self.norm(x)) * 1
        h[:, :3].mul_(0.5).add_(1)
        y = self.back(h.relu_())
        y += x
        return y.relu_()


class Numbers(Block):
    """Values that leave for Python, and come back."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x * x.abs().mean().item() + torch.tensor(0.5) + torch.arange(WIDTH) / WIDTH)


class ReadPastTheDispatcher(Block):
    """Sizes as a list, numbers through numpy, and a padded sequence, which tells its lengths by a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.lstm = nn.Linear(WIDTH, 3), nn.LSTM(WIDTH, WIDTH, batch_first=True)

    def forward(self, x: Tensor) -> Any:
        lengths = (x.detach().mean((1, 2)) > 0) * 5 + 20
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        x = x + nn.utils.rnn.pad_packed_sequence(self.lstm(packed)[0], batch_first=True, total_length=LENGTH)[0]
        scale = torch.from_numpy((x.detach() * 2).sum(-1).numpy() * 0.1)
        h = self.norm(x).flatten(0, 1)
        expert = self.router(h).argmax(-1)
        order = expert.argsort()
        parts = h[order].split(torch.bincount(expert, minlength=3).tolist())
        y = torch.cat([F.gelu(self.widen(part)) * number for number, part in enumerate(parts)])
        return x * scale[..., None] + self.back(y[order.argsort()]).view_as(x)


class Sparse(Block):
    def forward(self, x: Tensor) -> Any:
        places = torch.stack([torch.arange(LENGTH)] * 2)
        diagonal = torch.sparse_coo_tensor(places, self.norm(x).mean((0, 2)), (LENGTH, LENGTH), check_invariants=False)
        return super().forward(x + torch.sparse.mm(diagonal, x[0]))


class Masked(torch.autograd.Function):
    """Keeps a tensor for its backward past autograd, which so cannot be had again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mask = (x > 0).float()
        return x * ctx.mask

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0] * ctx.mask


class CustomFunction(Block):
    def forward(self, x: Tensor) -> Any:
        return x + self.back(Masked.apply(self.widen(self.norm(x))))


class CheckpointInside(Block):
    def forward(self, x: Tensor) -> Any:
        return x + checkpoint(lambda y: self.back(F.gelu(self.widen(y))), self.norm(x), use_reentrant=False)


@dataclass
class Both:
    hidden: Tensor
    unused: Any


class Dataclasses(Block):
    """A dataclass in and out, with a value in it that nobody uses."""

    def forward(self, x: Any) -> Any:
        hidden = x.hidden if isinstance(x, Both) else x
        return Both(super().forward(hidden), torch.tanh(hidden).mean())


class Nested(Block):
    """Tuples in dicts in and out, and keywords that `torch.utils.checkpoint.checkpoint` has too."""

    def forward(self, x: Any, *, debug: Any = ({"scale": 1.5},), early_stop: bool = False) -> Any:
        hidden, before = x["a"] if isinstance(x, dict) else (x, x * 2)
        return {"a": (super().forward(hidden) * debug[0]["scale"], before + hidden)}


class Stack(nn.Module):
    def __init__(self, make: Callable[[], nn.Module], **named: Any):
        super().__init__()
        self.first, self.blocks, self.named = nn.Linear(WIDTH, WIDTH), nn.ModuleList(make() for _ in range(3)), named

    def forward(self, x: Tensor) -> Tensor:
        state: Any = self.first(x)
        for block in self.blocks:
            state = block(state, **self.named)
        state = state.hidden if isinstance(state, Both) else state
        found: Tensor = state["a"][0] + state["a"][1] if isinstance(state, dict) else state
        return found


def squares(model: nn.Module, batch: Tensor) -> Tensor:
    total: Tensor = model(batch).square().sum()
    return total


def case(make: Callable[[], nn.Module], **named: Any) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Stack(make, **named), torch.randn(8, LENGTH, WIDTH)


BLOCKS = [
    TableOfItsOwn, HalfInTraining, ReplacedBuffer, Codebook, SharedBuffer, ForeachOnLists, Rotary, Fourier, Experts,
    Recurrent, InPlace, Numbers, CustomFunction, CheckpointInside, Dataclasses, Nested, Sparse,
    ReadPastTheDispatcher,
]  # fmt: skip
