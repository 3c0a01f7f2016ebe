"""Recompute made wrong on purpose: verification names the operation. And what a user may get wrong."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from instep import gradient_checkpointing as gc
from instep.errors import CheckpointingError, RecomputeError
from support.checkpointed import after_step, gpt, ten_plans

torch.set_num_threads(1)

SCALE = {"now": 1.0}


class Part(nn.Module):
    """A block whose forward can be made to depend on what changes between its two passes."""

    def __init__(self, fault: str):
        super().__init__()
        self.widen, self.other, self.back = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)
        self.fault, self.calls = fault, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        h = self.widen(x)
        if self.fault == "random":
            h = h * random.random()
        elif self.fault == "global":
            h = h * SCALE["now"]
        elif self.fault == "counter":
            h = h + (self.widen if self.calls % 2 else self.other)(x)
        elif self.fault == "operations":
            h = F.gelu(h) if self.calls % 2 else F.relu(h)
        return self.back(F.gelu(h)) + x


class Parts(nn.Module):
    def __init__(self, fault: str = "", spoil: bool = False):
        super().__init__()
        self.blocks = nn.ModuleList(Part(fault) for _ in range(2))
        self.spoil = spoil

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            y = block(x=x)
            if self.spoil and block is self.blocks[0]:
                with torch.no_grad():
                    x.mul_(2.0)  # the block's input, after it was read
            x = y
        SCALE["now"] += 1.0
        return x


def total(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch * 1.0).square().sum()


def planned(fault: str, spoil: bool = False) -> Parts:
    """The model with a plan that recomputes most of it."""
    torch.manual_seed(0)
    profile = gc.profile(Parts(), total, torch.randn(4, 8))
    operations = profile.kinds[0].operations
    model = Parts(fault, spoil)
    if fault:
        for block in model.blocks:
            block.calls = 0
        try:
            profile = gc.profile(model, total, torch.randn(4, 8))
        except CheckpointingError:
            assert fault in (
                "counter",
                "operations",
            )  # another weight has another backward, which the profile itself notices
    assert operations
    plan = gc.plan(profile, budget_bytes=gc.least_bytes(profile))
    gc.apply(model, plan, verify=True)
    for block in model.blocks:
        block.calls = 0
    return model


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        ("random", r"block 'blocks\.\d', mul\.Tensor in 'blocks\.\d', gave another value"),
        ("global", r"block 'blocks\.\d', mul\.Tensor in 'blocks\.\d', gave another value"),
        ("counter", r"block 'blocks\.\d', t\.default in 'blocks\.\d', gave another value"),
        ("operations", r"is relu\.default in recompute, where the first pass had gelu\.default"),
    ],
)
def test_verification_names_the_operation_that_went_wrong(fault: str, named: str) -> None:
    """On the first three stock `torch.utils.checkpoint` says nothing and gives a wrong gradient, as the test after
    this one records; on the fourth too, since GELU and ReLU save one tensor of one shape each."""
    model = planned(fault)
    with pytest.raises(RecomputeError, match=named):
        total(model, torch.randn(4, 8)).backward()


@pytest.mark.parametrize("fault", ["random", "global", "counter", "operations"])
def test_stock_torch_is_silent_on_the_same_faults(fault: str) -> None:
    """Its determinism check compares shapes, types and devices alone: the gradient is wrong, and nobody is told."""
    torch.manual_seed(0)
    block = Part(fault)
    x = torch.randn(4, 8)

    def gradient(recompute: bool) -> Tensor:
        block.calls, SCALE["now"] = 0, 1.0
        random.seed(0)
        out = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
        SCALE["now"] = 2.0
        out.square().sum().backward()
        assert block.widen.weight.grad is not None
        found = block.widen.weight.grad.clone()
        block.zero_grad()
        return found

    assert not torch.equal(gradient(True), gradient(False))


def test_an_input_that_is_changed_in_place_afterwards_is_named() -> None:
    """Stock torch notices a change of a positional argument, by its version, and not of one given by keyword, as here:
    then its gradient is silently wrong."""
    model = planned("", spoil=True)
    with pytest.raises(RecomputeError, match=r"block 'blocks\.\d', addmm\.default in 'blocks\.\d\.widen'"):
        total(model, torch.randn(4, 8)).backward()


def test_without_verification_a_right_block_is_still_right_and_another_order_is_still_named() -> None:
    model = planned("")
    expected = Parts()
    expected.load_state_dict(model.state_dict())
    batch = torch.randn(4, 8)
    assert all(map(torch.equal, after_step(model, total, batch), after_step(expected, total, batch)))


def test_random_operations_after_a_kept_one_get_their_own_numbers_again() -> None:
    """Stock torch's selective contexts leave a kept random operation out of the second pass, so that the next one
    draws its numbers: a wrong gradient, silently."""
    model, objective, batch = gpt(dropout=0.3)
    expected = after_step(model, objective, batch)
    mixed = 0
    for plan in ten_plans(gc.profile(model, objective, batch)):
        for block in plan.blocks:
            acts = [a for a, op in zip(block.choice.acts, block.kind.operations, strict=False) if op.random]
            mixed += len(set(acts)) > 1
        gc.apply(model, plan, verify=True)
        assert all(map(torch.equal, after_step(model, objective, batch), expected))
    assert mixed


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x.add_(1.0)
        out: Tensor = self.layer(x)
        return out


class Two(nn.Module):
    def __init__(self, make: Any):
        super().__init__()
        self.parts = nn.ModuleList([make(), make()])

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x)
        return x


def test_what_a_user_may_get_wrong_is_a_sentence() -> None:
    batch = torch.randn(4, 8)
    flat = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    with pytest.raises(CheckpointingError, match="has no repeated block"):
        gc.profile(flat, total, batch)
    assert gc.profile(flat, total, batch, blocks=["0", "2"]).names == ("0", "2")
    with pytest.raises(CheckpointingError, match="no part 'body'"):
        gc.profile(flat, total, batch, blocks=["body"])
    with pytest.raises(CheckpointingError, match="lies inside block 'parts'"):
        gc.profile(Two(lambda: Part("")), total, batch, blocks=["parts", "parts.0"])
    with pytest.raises(CheckpointingError, match=r"aten\.add_\.Tensor changes in place an input of block 'parts\.0'"):
        gc.profile(Two(InPlace), total, batch)
    with pytest.raises(CheckpointingError, match="gave no scalar"):
        gc.profile(Parts(), lambda model, batch: model(batch), batch)
    model = Parts()
    profile = gc.profile(model, total, batch)
    with pytest.raises(CheckpointingError, match="the least that one needs is"):
        gc.plan(profile, budget_bytes=1)
    generous = gc.plan(profile, budget_bytes=2**40)
    assert generous.checkpointed == 0  # more than there is: nothing to recompute
    with pytest.raises(CheckpointingError, match="the plan is of another model"):
        gc.apply(flat, generous)
    gc.apply(model, gc.plan(profile, budget_bytes=gc.least_bytes(profile)))
    with pytest.raises(CheckpointingError, match="has a plan on it already"):
        gc.profile(model, total, batch)


def test_a_profile_leaves_the_model_as_it_was() -> None:
    model, objective, batch = gpt(dropout=0.2)
    parameters = list(model.parameters())
    parameters[0].grad = torch.ones_like(parameters[0])
    state = torch.get_rng_state()
    before = [parameter.clone() for parameter in parameters]
    gc.profile(model, objective, batch)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, before, parameters))
    assert torch.equal(parameters[0].grad, torch.ones_like(parameters[0]))
    assert all(parameter.grad is None for parameter in parameters[1:])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
