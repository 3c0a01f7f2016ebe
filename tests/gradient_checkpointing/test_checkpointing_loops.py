"""Plans in loops that are not Instep's: other weights for a call, generators of one's own, gradients on the way."""

from __future__ import annotations

import dataclasses
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from instep import gradient_checkpointing as gc
from instep.errors import CheckpointingError
from instep.gradient_checkpointing.structure import Act
from support.checkpointed import after_step, gpt, same, ten_plans
from support.wild_blocks import Block, case, squares

torch.set_num_threads(1)


def test_weights_that_are_swapped_in_for_a_call_are_those_of_the_second_pass() -> None:
    """As `torch.func.functional_call` does, which takes them off again before backward."""
    model, batch = case(Block)
    given = {name: (parameter.detach() * 1.5).requires_grad_() for name, parameter in model.named_parameters()}

    def gradients() -> list[Tensor]:
        loss = torch.func.functional_call(model, given, (batch,)).square().sum()
        return list(torch.autograd.grad(loss, list(given.values())))

    expected = gradients()
    for plan in list(ten_plans(gc.profile(model, squares, batch)))[3::3]:
        assert plan.checkpointed
        gc.apply(model, plan)
        before = [dict(module._parameters) for module in model.modules()]
        assert same(gradients(), expected)
        for module, held in zip(model.modules(), before, strict=True):
            assert module._parameters.keys() == held.keys()
            assert all(module._parameters[name] is parameter for name, parameter in held.items())


class DrawsByItself(Block):
    """From a generator of its own. Backward reads all that it makes, so that it can be recomputed as it is written."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator()

    def forward(self, x: Tensor) -> Any:
        y = super().forward(x * (torch.rand(x.shape, generator=self.generator) > 0.3))
        return y.tanh() if self.training else y.sigmoid()


def repeating_all(plan: gc.Plan) -> gc.Plan:
    """The plan with every operation done again in all its blocks, which no measured time may ask for."""
    return dataclasses.replace(
        plan,
        blocks=tuple(
            dataclasses.replace(
                block,
                choice=dataclasses.replace(block.choice, acts=(Act.REPEAT,) * len(block.kind.operations), kept=()),
            )
            for block in plan.blocks
        ),
    )


@pytest.mark.parametrize("training", [True, False])
def test_a_generator_of_the_models_own_gives_the_same_numbers_again(training: bool) -> None:
    model, batch = case(DrawsByItself)
    generators: list[torch.Generator] = [block.generator for block in model.blocks]  # type: ignore[union-attr,misc,assignment]

    def step() -> list[Tensor]:
        for seed, generator in enumerate(generators):
            generator.manual_seed(seed)
        return [*after_step(model, squares, batch), *(generator.get_state() for generator in generators)]

    states = [generator.get_state() for generator in generators]
    profile = gc.profile(model, squares, batch)
    assert all(map(torch.equal, states, [generator.get_state() for generator in generators]))
    model.train(training)  # in eval mode its operations are not the profiled ones, and everything is done again
    expected = step()
    plans = [*gc.plans(profile, most=3), *gc.plans(profile, price="flops")[-2:]]
    for plan in [*plans, repeating_all(plans[-1])]:
        applied = gc.apply(model, plan)
        for applied.verify in (True, False):
            assert same(step(), expected)
        gc.remove(model)


@pytest.mark.parametrize("first", [True, False])
def test_forwards_without_gradients_beside_the_one_with_them_are_no_obstacle(first: bool) -> None:
    """As of targets that the model makes itself, or of what microbatches share."""

    def objective(model: nn.Module, batch: Tensor) -> Tensor:
        if first:
            with torch.no_grad():
                target = model(batch)
        found = model(batch)
        if not first:
            with torch.no_grad():
                target = model(batch)
        return (found - target - 1).square().sum()

    model, batch = case(Block)
    expected = after_step(model, objective, batch)
    profile = gc.profile(model, objective, batch)
    assert len(profile.names) == 3
    for plan in list(ten_plans(profile))[3::3]:
        assert plan.checkpointed
        gc.apply(model, plan)
        assert same(after_step(model, objective, batch), expected)
        assert gc.measure(model, objective, batch)[0] == pytest.approx(plan.peak_bytes, rel=0.05)
        gc.remove(model)


def penalised(model: nn.Module, batch: Tensor) -> Tensor:
    x = batch.clone().requires_grad_()
    found = model(x)
    (slope,) = torch.autograd.grad(found.sum(), x, create_graph=True)
    return found.square().sum() + slope.square().sum()


def test_an_objective_that_takes_a_gradient_itself_can_be_profiled() -> None:
    model, batch = case(Block)
    expected = after_step(model, penalised, batch)
    gc.profile(model, penalised, batch)
    for plan in list(ten_plans(gc.profile(model, squares, batch)))[3::3]:
        gc.apply(model, plan)
        assert same(after_step(model, penalised, batch), expected)
        gc.remove(model)


class Descends(Block):
    def forward(self, x: Tensor) -> Any:
        with torch.enable_grad():
            energy = super().forward(x * 1).square().sum()
            return x - 0.1 * torch.autograd.grad(energy, x, create_graph=True)[0]


def test_a_block_that_takes_a_gradient_itself_is_a_sentence() -> None:
    model, batch = case(Descends)
    with pytest.raises(CheckpointingError, match=r"block 'blocks\.0' takes a gradient in its own forward"):
        gc.profile(model, squares, batch)


def test_a_buffer_that_is_expanded_is_left_as_it_is() -> None:
    model, batch = case(Block)
    model.register_buffer("ones", torch.ones(1).expand(4))
    gc.profile(model, squares, batch)
    assert model.ones.stride() == (0,)
    assert torch.equal(model.ones, torch.ones(4))  # type: ignore[arg-type]


def test_a_planned_model_that_has_run_can_be_pickled() -> None:
    model, batch = case(Block)
    plan = list(ten_plans(gc.profile(model, squares, batch)))[6]
    gc.apply(model, plan)
    expected = after_step(model, squares, batch)
    other = pickle.loads(pickle.dumps(model))
    assert same(after_step(other, squares, batch), expected)
    assert gc.measure(other, squares, batch)[0] == gc.measure(model, squares, batch)[0]


def test_a_price_that_is_none_is_a_sentence() -> None:
    model, batch = case(Block)
    profile = gc.profile(model, squares, batch)
    with pytest.raises(CheckpointingError, match="the price is 'time'; it is 'seconds' or 'flops'"):
        gc.plan(profile, budget_bytes=2**40, price="time")  # type: ignore[arg-type]


@pytest.mark.parametrize("frozen", [False, True])
def test_weights_that_autocast_casts_are_predicted(frozen: bool) -> None:
    """They are many beside few tokens. Its cache keeps those that train to its end, whatever the plan, and no others;
    and of a norm whose output is cast at once, backward needs mean and deviation alone."""
    model, objective, batch = gpt(width=64, heads=4, tied=False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not frozen or parameter.dim() < 2 or name.startswith("embedding"))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def cast(model: nn.Module, batch: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            total: Tensor = objective(model, batch)
        return total

    expected = torch.autograd.grad(cast(model, batch), trained)
    profile = gc.profile(model, cast, batch)
    assert gc.measure(model, cast, batch)[0] == profile.peak_bytes
    for plan in list(ten_plans(profile))[3::3]:
        applied = gc.apply(model, plan)
        for applied.verify in (True, False):
            assert same(list(torch.autograd.grad(cast(model, batch), trained)), list(expected))
        assert gc.measure(model, cast, batch)[0] == pytest.approx(plan.peak_bytes, rel=0.02)
        gc.remove(model)
