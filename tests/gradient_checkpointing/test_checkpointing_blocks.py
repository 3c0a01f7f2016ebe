"""A plan is neutral on blocks of many kinds, verified and not, and takes what it said; others are refused."""

from __future__ import annotations

import gc as garbage
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from instep import gradient_checkpointing as gc
from instep.errors import CheckpointingError
from support.checkpointed import after_step, same, ten_plans
from support.kinds import quick
from support.wild_blocks import (
    BLOCKS,
    LENGTH,
    WIDTH,
    Block,
    Dataclasses,
    Experts,
    Nested,
    Recurrent,
    Sparse,
    Stack,
    case,
    squares,
)

torch.set_num_threads(1)


@pytest.mark.parametrize("make", quick(BLOCKS, *(set(BLOCKS) - {Recurrent, Experts})))  # these are slow
def test_a_plan_is_neutral_and_takes_what_it_said(make: Any) -> None:
    model, batch = case(make, **({"early_stop": True, "debug": ({"scale": 2.0},)} if make is Nested else {}))
    expected = after_step(model, squares, batch)
    profile = gc.profile(model, squares, batch)
    tried = 0
    for plan in [list(ten_plans(profile))[5], *gc.plans(profile, most=2, price="flops")]:
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
