"""Optimizers of every kind: what they keep is saved and resumed bit for bit, or refused in the first step."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from instep.errors import CheckpointError, ComponentError, RecipeError, RecordError
from instep.offline.cluster import Cluster
from instep.offline.simulation import simulate
from instep.recipe import Recipe, Schedule, Team
from instep.rules import UpdateRule
from instep.rules import presets as p
from instep.worker.optimizer_state import difference, put_back, tensors_in
from instep.worker.trial import try_checkpoint, try_optimizer
from support import workloads
from support.harness import Client, act_on, train_here
from support.kinds import quick
from support.regression import numbers, regression
from support.sentences import one_sentence
from support.serving import replayed

pytestmark = pytest.mark.processes


class Narrow(nn.Module):
    """Parameters of two types."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.last = nn.Linear(4, 1, bias=False).to(torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(torch.tanh(self.first(x)).to(torch.bfloat16)).float()
        return out


def recipe_of(optimizer: Any, **changes: Any) -> Recipe:
    fields = {"model": Narrow, "data": partial(numbers, 24), "batch": 6, "microbatches": 3, "steps": 5}
    return regression(optimizer=optimizer, **{**fields, **changes})


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
        if function in (torch.ops.aten.detach.default, torch.ops.aten._to_copy.default):  # and no clone, as in the wild
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
    train_here(recipe(2), team, path, tried=True)
    return train_here(recipe(5), team, path, resume=True).digest


@pytest.mark.parametrize("optimizer", LAYOUTS)
def test_state_of_any_layout_is_resumed_bit_for_bit(optimizer: Any, tmp_path: Path) -> None:
    whole = train_here(recipe_of(optimizer), Team(workers=1), tmp_path / "whole")
    assert [event["why"] for event in whole.events if event["kind"] == "warned"] == []
    assert replayed(recipe_of(optimizer), whole.path).same
    for workers in (3,) if optimizer is not LAYOUTS[0] else (1, 3):
        recipe = lambda steps: recipe_of(optimizer, steps=steps)  # noqa: E731
        assert resumed_halfway(recipe, Team(workers=workers), tmp_path / str(workers)) == whole.digest


@pytest.mark.parametrize("optimizer", quick(LAYOUTS, *LAYOUTS[:2]))
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
        train_here(
            recipe_of(**{"optimizer": Plain, "rule": rule, **changes}), Team(workers=2), tmp_path / "run", tried=True
        )
    assert one_sentence(caught.value.message)
    assert not list((tmp_path / "run/checkpoints").iterdir())


@pytest.mark.parametrize("engine", ["lockstep", "server"])
def test_all_is_tried_once_in_a_run_and_not_on_a_restart_or_resume(
    engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def noted(name: str, function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            with (tmp_path / "tried").open("a") as file:
                file.write(f"{name} ")
            return function(*arguments, **options)

        return call

    monkeypatch.setattr("instep.team.session.try_checkpoint", noted("checkpoint", try_checkpoint))
    monkeypatch.setattr("instep.team.session.try_optimizer", noted("optimizer", try_optimizer))
    team = Team(workers=2, checkpoint_every=1, engine=engine)
    client = Client(act_on("merged", lambda pid: os.kill(pid, signal.SIGKILL), version=1))
    train_here(recipe_of(Plain, steps=2), team, tmp_path / "run", client=client, tried=True)
    train_here(recipe_of(Plain, steps=3), team, tmp_path / "run", resume=True, tried=True)
    assert (tmp_path / "tried").read_text() == "optimizer checkpoint "


def test_a_budget_for_memory_leaves_the_checkpoint_untried(tmp_path: Path) -> None:
    run = train_here(workloads.gpt(steps=2), Team(memory="80%"), tmp_path / "run", tried=True)
    lines = [event["why"] for event in run.events if event["kind"] == "warned"]
    assert lines == []


def test_a_state_above_the_limit_leaves_the_checkpoint_untried_with_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("instep.worker.trial.MOST_BYTES", 11)
    run = train_here(recipe_of(Deep), Team(workers=2), tmp_path / "run", tried=True)
    (line,) = (event["why"] for event in run.events if event["kind"] == "warned")
    assert line.startswith("whether a checkpoint can be loaded was not tried: the optimizer's state takes 0.0 GB, and")
    assert one_sentence(line)


# ------------------------------------------------------------------------------------------------------ the trial step


class Closed(torch.optim.SGD):
    """As sharpness-aware ones: it computes the objective again within a step."""

    def __init__(self, parameters: list[Tensor]):
        super().__init__(parameters, lr=0.01)

    def step(self, closure: Any = None) -> Any:
        if closure is None:
            raise RuntimeError("Sharpness Aware Minimization requires closure, but it was not provided")


class Second(Closed):
    """As those that use the Hessian."""

    def step(self, closure: Any = None) -> Any:
        gradients = [parameter.grad for group in self.param_groups for parameter in group["params"]]
        torch.autograd.grad([each.sum() for each in gradients], self.param_groups[0]["params"])


class Wanting(Closed):
    def step(self, closure: Any = None) -> Any:
        raise RuntimeError("Gradient tensor 0 has no graph. When calling loss.backward(), set create_graph to True")


class Failing(Closed):
    def step(self, closure: Any = None) -> Any:
        raise IndexError("no such group")


class Counted(torch.optim.SGD):
    """Every fifth step is another one, by a count that is in no state."""

    def __init__(self, parameters: list[Tensor]):
        super().__init__(parameters, lr=0.01)
        self.count = [0]

    def step(self, closure: Any = None) -> Any:
        self.count[0] += 1
        for _ in range(2 if self.count[0] % 5 == 0 else 1):
            super().step(closure)


class Keeper(torch.optim.SGD):
    def __init__(self, parameters: list[Tensor]):
        super().__init__(parameters, lr=0.01)

    def step(self, closure: Any = None) -> Any:
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["last"] = [parameter.grad]
        return super().step(closure)


REFUSED: list[tuple[Any, str]] = [
    (Closed, "the optimizer Closed needs a closure, which computes the objective again within a step"),
    (lambda p: torch.optim.LBFGS(p), "the optimizer LBFGS needs a closure"),
    (Second, "the optimizer Second needs gradients of gradients .create_graph=True., and Instep's are sums over"),
    (Wanting, "the optimizer Wanting needs gradients of gradients"),
    (Failing, "the optimizer Failing cannot make a step, tried on random gradients .IndexError: no such group.; it"),
    (lambda p: torch.optim.SparseAdam(p), "the optimizer SparseAdam takes sparse gradients alone, and Instep adds up"),
    (Counted, "the optimizer Counted goes on otherwise after a resume: tried on random gradients, it comes to another"),
    (
        Keeper,
        "the optimizer Keeper keeps a gradient itself as its state 'state.0.last.0', and the next step's gradient",
    ),
    (lambda p: torch.optim.SGD(p, lr="fast"), "could not be built|has the learning rate 'fast'; it must be a number"),
]


@pytest.mark.parametrize(("optimizer", "sentence"), REFUSED, ids=[words.split()[2] for _, words in REFUSED])
def test_what_an_optimizer_asks_for_in_vain_is_a_sentence_before_the_first_step(
    optimizer: Any, sentence: str, tmp_path: Path
) -> None:
    client = Client()
    with pytest.raises(ComponentError, match=sentence) as caught:
        train_here(recipe_of(optimizer), Team(workers=2), tmp_path / "run", client=client, tried=True)
    assert one_sentence(caught.value.message)
    assert "merged" not in {event["kind"] for event in client.events}


@pytest.mark.parametrize("optimizer", [Failing, Counted])
def test_the_server_and_the_virtual_clock_try_the_optimizer_too(optimizer: Any, tmp_path: Path) -> None:
    name = optimizer.__name__
    for rule in (p.asynchronous(), UpdateRule.from_text("local_sgd:2")):
        with pytest.raises(ComponentError, match=f"the optimizer {name}"):
            train_here(recipe_of(optimizer, rule=rule), Team(workers=2), tmp_path / rule.name, tried=True)
        with pytest.raises(ComponentError, match=f"the optimizer {name}"):
            simulate(recipe_of(optimizer, rule=rule), Cluster(workers=2), True, None, lambda event: None)


def test_the_trial_leaves_no_trace_on_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def drawing(parameters: list[Tensor]) -> torch.optim.Optimizer:
        made = Deep(parameters)
        made.param_groups[0]["lr"] = 0.05 + torch.rand(()).item() / 100 + random.random() / 100
        return made

    digests = []
    for name in ("with", "without"):
        digests.append(train_here(recipe_of(drawing), Team(workers=2), tmp_path / name, tried=True).digest)
        monkeypatch.setattr("instep.team.session.try_optimizer", lambda build, **_: None)
        monkeypatch.setattr("instep.team.session.try_checkpoint", lambda *_: None)
    assert digests[0] == digests[1]


def test_a_trial_that_dies_is_a_warning(tmp_path: Path) -> None:
    before = os.getpid()

    class Dying(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            if os.getppid() != before:  # neither here nor in a worker
                os.kill(os.getpid(), signal.SIGKILL)
            return super().step(closure)

    run = train_here(recipe_of(lambda p: Dying(p, lr=0.01)), Team(workers=2), tmp_path / "run", tried=True)
    (line,) = (event["why"] for event in run.events if event["kind"] == "warned")
    assert line == (
        "a first step of the optimizer could not be tried aside: it was killed by SIGKILL, as the kernel does when "
        "memory runs out; the run goes on all the same."
    )


# ------------------------------------------------------------------------------------------- rates, names, parameters


def test_an_optimizer_without_a_learning_rate_is_left_alone_under_a_constant_schedule(tmp_path: Path) -> None:
    def adafactor(parameters: list[Tensor]) -> torch.optim.Optimizer:
        made = torch.optim.Adafactor(parameters, lr=0.05)
        made.param_groups[0]["lr"] = None
        made.register_step_pre_hook(lambda own, *_: own.param_groups[0].update(lr=0.05))
        made.register_step_post_hook(lambda own, *_: own.param_groups[0].update(lr=None))
        return made

    run = train_here(recipe_of(adafactor), Team(workers=2), tmp_path / "run", tried=True)
    assert {event["lr"] for event in run.events if event["kind"] == "merged"} == {None}
    plain = train_here(recipe_of(lambda p: torch.optim.Adafactor(p, lr=0.05)), Team(), tmp_path / "plain")
    assert run.digest == plain.digest
    for schedule in (Schedule("cosine"), Schedule(warmup_steps=1), Schedule(scale=0.5)):
        with pytest.raises(
            RecipeError, match=r"Adafactor has no learning rate .'lr' is None., which the recipe's"
        ) as e:
            train_here(recipe_of(adafactor, schedule=schedule), Team(), tmp_path / str(schedule.factor(0, 9)))
        assert one_sentence(e.value.message)


def test_an_initial_rate_of_the_optimizers_own_is_no_scheduler(tmp_path: Path) -> None:
    def own(parameters: list[Tensor]) -> torch.optim.Optimizer:
        made = torch.optim.SGD(parameters, lr=0.01)
        made.param_groups[0]["initial_lr"] = 0.01
        return made

    run = train_here(recipe_of(own), Team(), tmp_path / "run")
    assert [event for event in run.events if event["kind"] == "warned"] == []


def test_parameters_of_another_copy_of_the_model_are_refused(tmp_path: Path) -> None:
    model = Narrow()

    def configure(parameters: list[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.SGD([{"params": [p for p in model.parameters() if p.dim() > 1]}], lr=0.01)

    with pytest.raises(
        ComponentError, match=r"SGD holds 2 parameters, the first of shape .4, 3., that are none of the 3"
    ):
        train_here(recipe_of(configure, model=model), Team(workers=2), tmp_path / "run")
    extra = torch.zeros(3, requires_grad=True)
    with pytest.raises(ComponentError, match=r"SGD holds 1 parameters, the first of shape .3., that are none of"):
        train_here(recipe_of(lambda p: torch.optim.SGD([*p, extra], lr=0.01)), Team(), tmp_path / "extra")


def test_parameters_in_no_group_are_warned_of(tmp_path: Path) -> None:
    run = train_here(recipe_of(lambda p: torch.optim.SGD(p[:1], lr=0.01)), Team(workers=2), tmp_path / "run")
    (line,) = (event["why"] for event in run.events if event["kind"] == "warned")
    assert line.startswith("the optimizer SGD has 2 of the 3 parameters in no group, 'first.bias' among them, so they")
    assert one_sentence(line)


def by_keyword(parameters: list[Tensor], lr: float, *, named_parameters: Any) -> torch.optim.Optimizer:
    named = dict(named_parameters)
    assert [id(p) for p in named.values()] == [id(p) for p in parameters]
    decayed = [p for name, p in named.items() if name.endswith("weight")]
    others = [p for name, p in named.items() if not name.endswith("weight")]
    return torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], lr=lr)


def first_of_all(named_parameters: Any, lr: float) -> torch.optim.Optimizer:
    return by_keyword([p for _, p in named_parameters], lr, named_parameters=named_parameters)


def test_names_reach_an_optimizer_that_asks_for_them(tmp_path: Path) -> None:
    made = [partial(by_keyword, lr=0.01), partial(first_of_all, lr=0.01)]
    runs = [
        train_here(recipe_of(each), Team(workers=w), tmp_path / str(w), tried=True) for w, each in enumerate(made, 1)
    ]
    assert runs[0].digest == runs[1].digest
    assert not [event for event in runs[0].events if event["kind"] == "warned"]


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
