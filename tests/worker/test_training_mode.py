"""What a model changes of itself while it trains: train and eval mode, and which parameters require a gradient."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from instep.data.cursor import Cursor
from instep.errors import RecipeError
from instep.offline.cluster import Cluster
from instep.offline.simulation import simulate
from instep.randomness import key, seed_all
from instep.recipe import Recipe, Team
from instep.record import checkpoint
from instep.record.folder import RunFolder
from instep.restore import kept_module_state
from instep.rules import UpdateRule
from instep.worker.model import idle_dropouts, into_training
from support.harness import Outcome, train_here
from support.serving import replayed

pytestmark = pytest.mark.processes


def samples(count: int = 64) -> TensorDataset:
    inputs = torch.randn(count, 8, generator=torch.Generator().manual_seed(3))
    return TensorDataset(inputs, inputs[:, :4].argmax(1))


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")


def recipe(model: Any, **changes: Any) -> Recipe:
    fields: dict[str, Any] = {
        "model": model,
        "objective": loss,
        "data": samples,
        "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.3, momentum=0.5, weight_decay=0.1),
        "batch": 16,
        "microbatches": 8,
        "steps": 8,
    }
    return Recipe(**{**fields, **changes})


def plain_loop(made: Recipe) -> dict[str, Tensor]:
    torch.set_num_threads(1)
    seed_all(key(made.seed, "model"))
    model, data = made.model.build(), samples()
    optimizer = made.optimizer.build([p for p in model.parameters() if p.requires_grad])
    cursor = Cursor(samples=len(data), batch=made.batch, microbatches=made.microbatches, seed=made.seed)
    for step in range(made.steps):
        model.train()
        inputs, labels = (tensor[cursor.indices(step)] for tensor in data.tensors)
        optimizer.zero_grad()
        (loss(model, (inputs, labels)) / len(labels)).backward()
        optimizer.step()
    return dict(model.state_dict())


def state_of(run: Outcome) -> dict[str, Tensor]:
    newest, _ = checkpoint.newest_sound(RunFolder.open(run.path).checkpoints)
    assert newest is not None
    return dict(checkpoint.load(newest).model_state)


def is_plain_loop(run: Outcome, made: Recipe) -> None:
    for name, value in plain_loop(made).items():
        torch.testing.assert_close(state_of(run)[name], value, rtol=1e-5, atol=1e-6)


def warnings_of(run: Outcome) -> list[str]:
    return [event["why"] for event in run.events if event["kind"] == "warned"]


# --------------------------------------------------------------------------------------------------------------- modes


class FrozenStatistics(nn.Module):
    """The usual way to freeze BatchNorm: every `train()` leaves it in eval mode, and here its weights frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 4)
        self.norm.running_mean.fill_(0.3)
        self.norm.running_var.fill_(2.0)

    def train(self, mode: bool = True) -> FrozenStatistics:
        super().train(mode)
        self.norm.eval().requires_grad_(False)
        return self

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.norm(self.first(x)))
        return out


@pytest.mark.parametrize("model", [FrozenStatistics, lambda: FrozenStatistics().eval()], ids=["training", "eval"])
def test_an_override_of_train_runs_as_in_a_plain_loop(model: Any, tmp_path: Path) -> None:
    made = recipe(model, steps=4)
    run = train_here(made, Team(workers=2), tmp_path / "run")
    assert state_of(run)["norm.running_mean"].tolist() == pytest.approx([0.3] * 6)
    made_for_the_loop = recipe(FrozenStatistics, steps=4)
    is_plain_loop(run, made_for_the_loop)


def test_parts_in_eval_mode_under_a_root_in_training_stay_so_and_come_back_after_an_evaluation() -> None:
    model = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 8), nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 4)))
    model[0].eval()
    model[2].eval()
    into_training(model)
    modes = {name: part.training for name, part in model.named_modules()}
    assert modes == {"": True, "0": False, "1": True, "2": False, "2.0": False, "2.1": False}
    with kept_module_state(model, training=False):
        assert not any(part.training for part in model.modules())
        model[1], model[2] = nn.Linear(8, 8).eval(), model[2].train()  # by a model that puts others in their places
        model[1].weight.requires_grad_(False)
        model[2][1].weight.requires_grad_(False)
    assert {name: part.training for name, part in model.named_modules()} == modes
    assert model[2][1].weight.requires_grad
    model.eval()
    into_training(model)
    assert all(part.training for part in model.modules())


def test_a_method_of_another_kind_that_is_named_train_is_not_called() -> None:
    class Fitted(nn.Sequential):
        def train(self, samples: Any) -> Any:  # type: ignore[override]
            raise AssertionError(samples)

    model = Fitted(nn.Linear(2, 2).eval(), nn.Dropout(0.5))
    model.training = False
    into_training(model)
    assert all(part.training for part in model.modules())


class Adapted(nn.Module):
    """Laid out as peft does it: the wrapper says training, and its base is as `from_pretrained` left it."""

    def __init__(self) -> None:
        super().__init__()
        self.peft_config = {"default": object()}
        self.base_model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 4)).eval()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base_model(x)
        return out


def test_an_adapted_model_trains_whole_and_other_idle_dropouts_are_warned_of(tmp_path: Path) -> None:
    model = nn.ModuleDict({"student": Adapted(), "teacher": Adapted().eval(), "free": nn.Dropout(0.0).eval()})
    into_training(model)
    assert all(part.training for part in model["student"].modules())
    assert not any(part.training for part in model["teacher"].modules()), "frozen whole, on purpose"
    assert idle_dropouts(model) == ["teacher.base_model.1"]

    class Idle(Adapted):
        def __init__(self) -> None:
            super().__init__()
            del self.peft_config

    (why,) = warnings_of(train_here(recipe(Idle, steps=1), Team(), tmp_path / "idle"))
    assert why.startswith("dropout layer 'base_model.1' is in eval mode while the model trains, and drops nothing; if")
    whole = train_here(recipe(Adapted, steps=1), Team(), tmp_path / "adapted")
    assert not warnings_of(whole)
    assert whole.digest != train_here(recipe(Idle, steps=1), Team(), tmp_path / "other").digest


# ------------------------------------------------------------------------------------------------------------- freezing


class Freezing(nn.Module):
    """Its first layer begins or ceases to require a gradient as a counter in a buffer says."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.first, self.last, self.how = nn.Linear(8, 6), nn.Linear(6, 4), how
        self.register_buffer("n", torch.zeros((), dtype=torch.int64))
        self.first.requires_grad_(how != "late")

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.n += 1
            n = int(self.n)
            if self.how == "late" and n > 5:
                self.first.requires_grad_(True)
            elif self.how == "from 5 on" and n > 4:
                self.first.requires_grad_(False)
            elif self.how == "between":
                self.first.requires_grad_(n == 1 or n > 5)
            elif self.how == "once" and n in (3, 6):  # and the flag itself remembers
                self.first.requires_grad_(n == 6)
            elif self.how == "by samples" and bool(x[0, 0] > 1.5):
                self.first.weight.requires_grad_(False)
        out: Tensor = self.last(torch.relu(self.first(x)))
        if self.training and self.how == "after its use" and n > 4:
            self.first.requires_grad_(False)
        return out


@pytest.mark.parametrize(("engine", "workers"), [("lockstep", 1), ("lockstep", 3), ("server", 2)])
def test_a_parameter_that_begins_to_require_a_gradient_is_refused_by_name(
    engine: Any, workers: int, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError) as caught:
        train_here(recipe(lambda: Freezing("late")), Team(workers=workers, engine=engine), tmp_path / "run")
    assert caught.value.message.startswith("parameter 'first.weight' began to require a gradient in step 6, and")
    assert "build it requiring one and freeze it after the first step" in caught.value.message


@pytest.mark.parametrize("how", ["from 5 on", "between", "after its use"])
def test_a_parameter_is_frozen_and_unfrozen_as_in_a_plain_loop(how: str, tmp_path: Path) -> None:
    made = recipe(lambda: Freezing(how))
    is_plain_loop(train_here(made, Team(workers=2), tmp_path / "run"), made)


@pytest.mark.parametrize("how", ["once", "by samples"])
def test_a_parameter_that_ceases_to_require_a_gradient_is_without_one_for_any_team_and_engine(
    how: str, tmp_path: Path
) -> None:
    made = recipe(lambda: Freezing(how))
    teams: list[tuple[Any, int]] = [("lockstep", 1), ("lockstep", 3), ("server", 2)]
    runs = [
        train_here(made, Team(workers=w, engine=engine, checkpoint_every=1, keep=0), tmp_path / f"{engine}{w}")
        for engine, w in teams
    ]
    assert len({run.digest for run in runs}) == 1
    if how != "by samples":
        is_plain_loop(runs[0], made)
    assert replayed(made, runs[1].path).same
    assert replayed(made, runs[2].path).same
    assert simulate(made, Cluster(workers=2), True, None, lambda event: None)["digest"] == runs[0].digest
    for version in range(5, 9):
        shutil.rmtree(runs[1].path / "checkpoints" / f"step-{version:08d}")
    assert train_here(made, Team(workers=3), runs[1].path, resume=True).digest == runs[0].digest


@pytest.mark.parametrize("rule", ["asynchronous", "local_sgd:2", "async_diloco:2,buffer=2"])
def test_a_run_whose_parameters_cease_to_require_a_gradient_can_be_replayed_under_any_rule(
    rule: str, tmp_path: Path
) -> None:
    made = recipe(lambda: Freezing("once"), rule=UpdateRule.from_text(rule))
    run = train_here(made, Team(workers=2, checkpoint_every=2), tmp_path / "run")
    assert replayed(made, run.path).same


class Growing(nn.Linear):
    """Puts another parameter in its weight's place in the third step."""

    def __init__(self) -> None:
        super().__init__(8, 4)
        self.register_buffer("n", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.n += self.training
        if self.training and int(self.n) == 3:
            self.weight = nn.Parameter(self.weight.detach() * 2)
        return super().forward(x)


def test_a_parameter_that_is_put_in_the_place_of_another_is_warned_of(tmp_path: Path) -> None:
    run = train_here(recipe(Growing, steps=4, microbatches=1), Team(), tmp_path / "run")
    assert [why[:68] for why in warnings_of(run)] == [
        "parameter 'weight' is another object than when the model was built, "
    ]


# --------------------------------------------------------------------------------------------------------- extra state


class Counting(nn.Linear):
    """Keeps a number in its state_dict, which it may change."""

    def __init__(self, at: int) -> None:
        super().__init__(8, 4)
        self.calls, self.at = 0, at

    def get_extra_state(self) -> Tensor:
        return torch.tensor([max(0, self.calls - self.at)])

    def set_extra_state(self, state: Tensor) -> None:
        self.calls = int(state[0])

    def forward(self, x: Tensor) -> Tensor:
        self.calls += self.training
        return super().forward(x)


@pytest.mark.parametrize(("engine", "workers"), [("lockstep", 1), ("lockstep", 2), ("server", 2)])
def test_extra_state_that_a_step_changes_is_refused_by_module_for_any_team(
    engine: Any, workers: int, tmp_path: Path
) -> None:
    team = Team(workers=workers, engine=engine)
    made = recipe(lambda: nn.Sequential(nn.Linear(8, 8), Counting(6)), microbatches=4)
    with pytest.raises(RecipeError) as caught:
        train_here(made, team, tmp_path / "run")
    assert caught.value.message.startswith("module '1' changed its extra state (get_extra_state) in step ")
    assert "hold what changes in a buffer" in caught.value.message
    still = train_here(recipe(lambda: Counting(1000), microbatches=4), team, tmp_path / "still")
    assert int(state_of(still)["_extra_state"]) == 0
