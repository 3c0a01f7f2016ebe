"""Blocks that do what blocks do in the wild: a plan is neutral on each, verified and not, and takes what it said."""

from __future__ import annotations

import gc as garbage
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from checkpointed import after_step, same, ten_plans
from instep import gradient_checkpointing as gc
from instep.errors import CheckpointingError

torch.set_num_threads(1)

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
]  # fmt: skip


@pytest.mark.parametrize("make", BLOCKS)
def test_a_plan_is_neutral_and_takes_what_it_said(make: Any) -> None:
    model, batch = case(make, **({"early_stop": True, "debug": ({"scale": 2.0},)} if make is Nested else {}))
    expected = after_step(model, squares, batch)
    profile = gc.profile(model, squares, batch)
    tried = 0
    for plan in list(ten_plans(profile))[::3]:
        applied = gc.apply(model, plan)
        for applied.verify in (True, False):
            assert same(after_step(model, squares, batch), expected)
        if make is not Sparse:  # its bytes are not seen
            assert gc.measure(model, squares, batch)[0] == pytest.approx(plan.peak_bytes, rel=0.05)
        applied.remove()
        tried += bool(plan.checkpointed)
    assert tried >= 2


def test_experts_that_had_no_token_when_profiled_may_get_some() -> None:
    model, batch = case(Experts)
    biases = [block.router.bias for block in model.blocks]  # type: ignore[union-attr]

    def prefer(wanted: float) -> None:
        with torch.no_grad():
            for bias in biases:
                bias[3] = wanted  # type: ignore[index,operator]

    prefer(-100.0)
    profile = gc.profile(model, squares, batch)
    prefer(100.0)
    expected = after_step(model, squares, batch)
    for plan in ten_plans(profile):
        gc.apply(model, plan, verify=True)
        assert same(after_step(model, squares, batch), expected)


def test_frozen_blocks_train_under_a_plan() -> None:
    model, batch = case(Block)
    for part in (model.first, model.blocks[0], model.blocks[2]):  # type: ignore[index]
        part.requires_grad_(False)  # type: ignore[operator]

    def gradients() -> list[Tensor]:
        return list(torch.autograd.grad(squares(model, batch), [p for p in model.parameters() if p.requires_grad]))

    expected = gradients()
    for plan in ten_plans(gc.profile(model, squares, batch)):
        gc.apply(model, plan, verify=True)
        assert same(gradients(), expected)
        gc.remove(model)


def test_a_gradient_of_a_gradient_is_the_same() -> None:
    model, batch = case(Block)

    def penalised() -> list[Tensor]:
        images = batch.clone().requires_grad_()
        loss = squares(model, images)
        (slope,) = torch.autograd.grad(loss, images, create_graph=True)
        return list(torch.autograd.grad(loss + slope.square().sum(), list(model.parameters())))

    expected = penalised()
    for plan in list(ten_plans(gc.profile(model, squares, batch)))[::4]:
        gc.apply(model, plan)
        assert same(penalised(), expected)


class Stash(Block):
    """What a block sets on itself, for somebody to look at after the step."""

    calls = 0
    last: Tensor

    def forward(self, x: Tensor) -> Any:
        self.last, self.calls = self.widen(self.norm(x)), self.calls + 1
        return x + self.back(F.gelu(self.last))


def test_what_a_block_sets_on_itself_is_that_of_the_first_pass() -> None:
    """Recompute must not count twice, nor leave a tensor behind that it did not compute."""
    model, batch = case(Stash)
    squares(model, batch).backward()
    expected = [block.last.clone() for block in model.blocks]  # type: ignore[union-attr,operator]
    for plan in ten_plans(gc.profile(model, squares, batch)):
        gc.apply(model, plan)
        before = model.blocks[1].calls  # type: ignore[index,union-attr]
        squares(model, batch).backward()
        assert same([block.last for block in model.blocks], expected)  # type: ignore[union-attr,misc]
        assert model.blocks[1].calls == before + 1  # type: ignore[index,union-attr,operator]


def test_no_tensor_stays_behind() -> None:
    def alive() -> int:
        garbage.collect()
        return sum(type(thing) in (Tensor, nn.Parameter) for thing in garbage.get_objects())

    model, batch = case(Dataclasses)
    before = alive()
    for plan in ten_plans(gc.profile(model, squares, batch)):
        applied = gc.apply(model, plan, verify=True)
        squares(model, batch).backward()
        applied.remove()
        model.zero_grad()
        del applied
    assert alive() == before


class Spoiler(Block):
    """Changes a tensor in place that is neither its own nor a buffer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = torch.zeros(WIDTH)

    def forward(self, x: Tensor) -> Any:
        with torch.no_grad():
            self.mean.mul_(0.5).add_(x.mean((0, 1)))
        return super().forward(x + self.mean)


def test_a_block_that_changes_what_is_not_its_own_is_refused() -> None:
    model, batch = case(Spoiler)
    with pytest.raises(
        CheckpointingError, match=r"add_\.Tensor changes in place an input of block 'blocks\.0', or a te"
    ):
        gc.profile(model, squares, batch)


def test_a_block_whose_input_is_changed_afterwards_is_refused() -> None:
    class Adds(Stack):
        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x) * 1.0
            for block in self.blocks:
                x.add_(block(x))
            return x

    class Total(nn.Module):  # its backward does not read its input
        def __init__(self) -> None:
            super().__init__()
            self.widen, self.back = nn.Linear(WIDTH, WIDTH), nn.Sequential(nn.Linear(WIDTH, WIDTH))

        def forward(self, x: Tensor) -> Any:
            return self.back(F.gelu(self.widen(x.sum(1, keepdim=True))))

    torch.manual_seed(0)
    model, batch = Adds(Total), torch.randn(8, LENGTH, WIDTH)
    squares(model, batch).backward()  # as such it trains
    with pytest.raises(CheckpointingError, match=r"add_\.Tensor changes in place an input of block 'blocks\.0'"):
        gc.profile(model, squares, batch)


@pytest.mark.parametrize(
    ("objective", "said"),
    [
        (lambda model, batch: {}, "gave no scalar"),
        (lambda model, batch: {"loss": 1.0}, "gave no scalar"),
        (lambda model, batch: squares(model, batch).detach(), "depends on no weight"),
    ],
)
def test_an_objective_without_a_backward_is_a_sentence(objective: Any, said: str) -> None:
    model, batch = case(Block)
    with pytest.raises(CheckpointingError, match=said):
        gc.profile(model, objective, batch)


def test_a_model_without_a_weight_to_train_is_a_sentence() -> None:
    model, batch = case(Block)
    model.requires_grad_(False)
    with pytest.raises(CheckpointingError, match="depends on no weight"):
        gc.profile(model, squares, batch)
