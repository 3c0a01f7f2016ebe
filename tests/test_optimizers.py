"""Optimizers of every kind: what they keep is saved and resumed bit for bit, or refused in the first step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from harness import train_here
from instep.engines.state import difference, put_back, tensors_in
from instep.engines.trial import try_checkpoint
from instep.errors import CheckpointError, RecordError
from instep.recipe import Recipe, Team
from instep.rules import UpdateRule
from instep.rules import presets as p
from serving import replayed
from test_faults import one_sentence


class Narrow(nn.Module):
    """Parameters of two types."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.last = nn.Linear(4, 1, bias=False).to(torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(torch.tanh(self.first(x)).to(torch.bfloat16)).float()
        return out


def numbers() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(24, 3, generator=generator), torch.randn(24, 1, generator=generator))


def squares(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]) - batch[1]).square().sum()


def recipe_of(optimizer: Any, **changes: Any) -> Recipe:
    fields: dict[str, Any] = {
        "model": Narrow, "objective": squares, "data": numbers, "optimizer": optimizer, "batch": 6, "microbatches": 3,
        "steps": 5,
    }  # fmt: skip
    return Recipe(**{**fields, **changes})


# ------------------------------------------------------------------------------------------------- layouts of the state


class Plain(torch.optim.Optimizer):
    """A count and an average in entries of `state` that belong to no parameter."""

    def __init__(self, parameters: list[Tensor]):
        super().__init__(parameters, {"lr": 0.05})
        self.state["k"] = torch.tensor([0], dtype=torch.long)  # type: ignore[index]
        self.state["scale"] = 1.0  # type: ignore[index, assignment]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.state["k"] += 1  # type: ignore[index]
        self.state["scale"] *= 0.75  # type: ignore[index, operator]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    share = self.state["scale"] / self.state["k"].item()  # type: ignore[index]
                    parameter.add_(parameter.grad, alpha=-group["lr"] * share)


class Halves(Tensor):
    """A number in two parts, as quantised state has them; the tensor itself has no storage."""

    @staticmethod
    def __new__(cls, high: Tensor, low: Tensor) -> Halves:
        made: Halves = Tensor._make_wrapper_subclass(cls, high.shape, dtype=torch.float32)  # type: ignore[attr-defined]
        return made

    def __init__(self, high: Tensor, low: Tensor):
        self.high, self.low = high, low

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["high", "low"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], *rest: Any) -> Halves:
        return cls(inner["high"], inner["low"])

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (torch.ops.aten.detach.default, torch.ops.aten.clone.default, torch.ops.aten._to_copy.default):
            return cls(args[0].high.clone(), args[0].low.clone())
        raise NotImplementedError(str(function))


torch.serialization.add_safe_globals([Halves])


class Quantised(torch.optim.Optimizer):
    """Its momentum is kept in tensors of a class of its own."""

    def __init__(self, parameters: list[Tensor]):
        super().__init__(parameters, {"lr": 0.05})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                kept = self.state[parameter].get("momentum")
                whole = parameter.grad.float() + (0 if kept is None else 0.9 * (kept.high.float() + kept.low.float()))
                high = whole.to(torch.bfloat16)
                self.state[parameter]["momentum"] = Halves(high, (whole - high.float()).to(torch.bfloat16))
                parameter.add_(whole.to(parameter.dtype), alpha=-group["lr"])


class Both(torch.optim.Optimizer):
    """One optimizer for some parameters and another for the others, as a wrapper that has a layout of its own."""

    def __init__(self, parameters: list[Tensor]):
        self.inner = {
            "adam": torch.optim.Adam(parameters[:2], lr=0.05),
            "sgd": torch.optim.SGD(parameters[2:], lr=0.05, momentum=0.9),
        }
        self.param_groups = [group for each in self.inner.values() for group in each.param_groups]
        self.defaults, self.state = {}, {}  # type: ignore[assignment]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for each in self.inner.values():
            each.step()

    def state_dict(self) -> dict[str, Any]:
        return {name: each.state_dict() for name, each in self.inner.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, each in self.inner.items():
            each.load_state_dict(state_dict.pop(name))
        self.param_groups = [group for each in self.inner.values() for group in each.param_groups]


class Deep(torch.optim.Optimizer):
    """State in lists, dicts and texts below the parameter, in float32 also where the parameter is not."""

    def __init__(self, parameters: list[Tensor]):
        super().__init__(parameters, {"lr": 0.05})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    zeros = torch.zeros_like(parameter, dtype=torch.float32)
                    state.update(phase="even", parts={"fast": [zeros, 0], "pair": (zeros.clone(), "slow")})
                fast, (slow, kind) = state["parts"]["fast"], state["parts"]["pair"]
                assert kind == "slow"
                fast[0].mul_(0.9).add_(parameter.grad.float() / 3)
                fast[1] += 1
                slow.add_(fast[0], alpha=1 / fast[1] if state["phase"] == "even" else 0.1)
                state["phase"] = "odd" if state["phase"] == "even" else "even"
                parameter.add_((fast[0] + slow).to(parameter.dtype), alpha=-group["lr"])


LAYOUTS: list[Any] = [Plain, Quantised, Both, Deep]


def resumed_halfway(recipe: Callable[[int], Recipe], team: Team, path: Path) -> str:
    """The digest of a run that was ended after 2 steps and resumed."""
    train_here(recipe(2), team, path)
    return train_here(recipe(5), team, path, resume=True).digest


@pytest.mark.parametrize("optimizer", LAYOUTS)
def test_state_of_any_layout_is_resumed_bit_for_bit(optimizer: Any, tmp_path: Path) -> None:
    whole = train_here(recipe_of(optimizer), Team(workers=1), tmp_path / "whole")
    assert [event["why"] for event in whole.events if event["kind"] == "warned"] == []
    assert replayed(recipe_of(optimizer), whole.path).same
    for workers in (1, 3):
        recipe = lambda steps: recipe_of(optimizer, steps=steps)  # noqa: E731
        assert resumed_halfway(recipe, Team(workers=workers), tmp_path / str(workers)) == whole.digest


@pytest.mark.parametrize("optimizer", LAYOUTS)
def test_the_server_resumes_and_replays_state_of_any_layout(optimizer: Any, tmp_path: Path) -> None:
    def recipe(steps: int) -> Recipe:
        return recipe_of(optimizer, steps=steps, rule=p.asynchronous())

    digest = resumed_halfway(recipe, Team(workers=2), tmp_path / "run")
    found = replayed(recipe(5), tmp_path / "run")
    assert (found.same, found.digest) == (True, digest)


@pytest.mark.parametrize(
    "rule", [UpdateRule.from_text("diloco:2"), UpdateRule.from_text("local_sgd:2")], ids=lambda r: r.name
)
def test_local_steps_take_optimizers_of_any_layout(rule: UpdateRule, tmp_path: Path) -> None:
    for optimizer in LAYOUTS:
        recipe = recipe_of(optimizer, rule=rule, steps=4)
        run = train_here(recipe, Team(workers=2), tmp_path / optimizer.__name__)
        assert replayed(recipe, run.path).same


# ------------------------------------------------------------------------------------------- what cannot be resumed


class Notes:
    """An object in the state."""

    steps = 0


class WithObject(torch.optim.SGD):
    def __init__(self, parameters: list[Tensor]):
        super().__init__(parameters, lr=0.01)

    def step(self, closure: Any = None) -> Any:
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["notes"] = Notes()
        return super().step(closure)


class Forgetful(Plain):
    """Loads without a word, and not all."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({**state_dict, "state": {"k": state_dict["state"]["k"], "scale": 1.0}})


class Refusing(Plain):
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        raise NotImplementedError("later")


class Growing(Narrow):
    mask: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        if getattr(self, "mask", None) is None:
            self.register_buffer("mask", torch.ones(1))
        return super().forward(x)


@pytest.mark.parametrize(
    ("changes", "error", "sentence"),
    [
        ({"optimizer": WithObject}, RecordError, "the training state holds .*Notes, which torch.load refuses"),
        ({"optimizer": Forgetful}, CheckpointError, "the optimizer Forgetful .* has another 'state.scale'; keep all"),
        ({"optimizer": Refusing}, CheckpointError, "Refusing that the recipe .* .NotImplementedError: later.; build"),
        ({"model": Growing}, CheckpointError, "the model that the recipe builds has other tensors than the checkpoint"),
    ],
    ids=lambda value: str(next(iter(value.values()))) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("rule", [p.synchronous(), p.asynchronous()], ids=lambda rule: rule.name)
def test_what_cannot_be_resumed_is_refused_in_the_first_step(
    changes: dict[str, Any], error: Any, sentence: str, rule: UpdateRule, tmp_path: Path
) -> None:
    with pytest.raises(error, match=sentence) as caught:
        train_here(recipe_of(**{"optimizer": Plain, "rule": rule, **changes}), Team(workers=2), tmp_path / "run")
    assert one_sentence(caught.value.message)
    assert not list((tmp_path / "run/checkpoints").iterdir())


def test_a_checkpoint_is_tried_once_in_a_run_and_not_on_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def noted(*arguments: Any) -> None:
        with (tmp_path / "tried").open("a") as file:
            file.write("x")
        try_checkpoint(*arguments)

    monkeypatch.setattr("instep.engines.session.try_checkpoint", noted)
    resumed_halfway(lambda steps: recipe_of(Plain, steps=steps), Team(workers=2, checkpoint_every=1), tmp_path / "run")
    assert (tmp_path / "tried").read_text() == "x"


# ----------------------------------------------------------------------------------------------------- walking in state


def test_a_difference_is_named_by_its_place() -> None:
    one = {"a": [torch.tensor([1.0, float("nan")]), {"b": (1, "x", None)}], "c": float("nan")}
    same = {"a": (torch.tensor([1.0, float("nan")]), {"b": [1, "x", None]}), "c": float("nan")}
    assert difference(one, same) is None
    assert difference({"a": torch.tensor([0.0])}, {"a": torch.tensor([-0.0])}) == "a"
    assert difference({"a": torch.tensor([0.0])}, {"a": torch.tensor([0.0], dtype=torch.float64)}) == "a"
    assert difference({"a": [1, {"b": 2}]}, {"a": [1, {"b": 2.0}]}) == "a.1.b"
    assert difference({"a": 1}, {"a": 1, "b": 1}) == "b"
    assert difference({"a": {"b": 1}}, {"a": 1}) == "a"
    assert [where for where, _ in tensors_in(one)] == ["a.0"]


def test_types_are_put_back_at_every_depth() -> None:
    saved = {"a": {"b": [torch.ones(2, dtype=torch.float64), "text", (torch.ones(1, dtype=torch.int8),)]}}
    loaded = {"a": {"b": [torch.ones(2), "<generator>", (torch.ones(1),)]}}
    inner = loaded["a"]["b"][0]
    put_back(saved, loaded)
    assert difference(saved, loaded) is None
    assert loaded["a"]["b"][0] is inner, "whoever holds it sees the change"
