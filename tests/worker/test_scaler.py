"""Training under float16: the loss scale, and what it leaves out, are the same for any team, and as torch has them."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import instep
from instep.data import Data
from instep.engines.seat import Seat
from instep.engines.standing_in import StandIn
from instep.errors import NonFiniteError
from instep.loss_scale import LossScale
from instep.monitors.progress import ProgressDisplay
from instep.monitors.scalars import scalars
from instep.objectives import objective
from instep.offline.cluster import Cluster
from instep.offline.simulation import simulate
from instep.recipe import Recipe, Team
from instep.record import checkpoint, tape
from instep.record.digest import digest_of_state
from instep.run import Run
from instep.team.judging import third_result
from instep.watch import Watch
from instep.worker.gradients import Gradients
from instep.worker.noting import noted_alone
from instep.worker.replica import Replica
from instep.worker.standalone import replica_before
from support import workloads
from support.deaths import before
from support.deaths import run as run_with_deaths
from support.harness import Outcome, stopping_at, train_here
from support.kinds import quick
from support.serving import RULES, replayed

pytestmark = pytest.mark.processes

SAMPLES = 64


class Net(nn.Module):
    """With BatchNorm: an update that is left out must leave buffers too."""

    def __init__(self, norm: bool = True) -> None:
        super().__init__()
        middle = nn.BatchNorm1d(16) if norm else nn.Identity()
        self.layers = nn.Sequential(nn.Linear(4, 16), middle, nn.Tanh(), nn.Linear(16, 1))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)[:, 0]
        return out


@objective
def squares(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]) - batch[1]).square().sum()


def data() -> Data:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(SAMPLES, 4, generator=generator)
    return Data(TensorDataset(x, x.sum(1)), TensorDataset(x[:16], x[:16].sum(1)))


def scaled(**fields: Any) -> Recipe:
    """Its scale begins far too large, and grows so soon that it is too large again and again."""
    scale = LossScale(**{"init": 2.0**18, "growth_interval": 2, **fields.pop("scale", {})})
    defaults: dict[str, Any] = {
        "model": Net, "objective": squares, "data": data, "batch": 16, "microbatches": 8, "steps": 20,
        "optimizer": lambda p: torch.optim.AdamW(p, lr=0.01), "clip_norm": 1.0, "name": "scaled",
        "precision": "float16", "loss_scale": scale,
    }  # fmt: skip
    return Recipe(**{**defaults, **fields})


def scales(run: Outcome) -> list[tuple[float, int]]:
    """By update, the scale, and whether it was left out."""
    return [(each["loss_scale"], each.get("overflows", 0)) for each in tape.latest(run.events)]


EVERY = {"checkpoint_every": 1, "keep": 0}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    run = train_here(scaled(), Team(workers=1, **EVERY), tmp_path_factory.mktemp("alone") / "run")
    left_out = [place for place, (_, overflow) in enumerate(scales(run)) if overflow]
    assert left_out[:3] == [0, 1, 2], "the scale begins too large"
    assert len(left_out) > len(range(left_out[0], left_out[-1])) / 4
    assert left_out != list(range(len(left_out))), "and becomes so again"
    return run


# ------------------------------------------------------------------------------------------------------ as torch has it


def plain_loop(recipe: Recipe) -> tuple[dict[str, Tensor], list[tuple[float, int]]]:
    """The recipe with torch's own scaler, one microbatch after the other; and its scales."""
    replica = Replica(recipe, "cpu")
    module, how = replica.module, recipe.loss_scale
    assert how is not None
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler(
        "cpu", how.init, growth_factor=how.growth, backoff_factor=how.backoff, growth_interval=how.growth_interval
    )
    found = []
    for step in range(recipe.steps):
        optimizer.zero_grad()
        used = scaler.get_scale()
        for microbatch in range(recipe.microbatches):
            batch = replica.batch(step, microbatch)
            with torch.autocast("cpu", torch.float16):
                loss = squares(module, batch) / recipe.batch
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        if recipe.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(module.parameters(), recipe.clip_norm)
        scaler.step(optimizer)
        scaler.update()
        found.append((used, int(scaler.get_scale() < used)))
    return module.state_dict(), found


@pytest.mark.parametrize("clip_norm", quick([None, 0.5], 0.5))
def test_fifty_updates_are_those_of_torchs_scaler(clip_norm: float | None, tmp_path: Path) -> None:
    recipe = scaled(model=lambda: Net(norm=False), steps=50, clip_norm=clip_norm)
    weights, expected = plain_loop(recipe)
    run = train_here(recipe, Team(workers=2), tmp_path / "run")
    assert scales(run) == expected
    assert 5 < run.result["overflows"] == sum(left_out for _, left_out in expected) < 40
    newest, _ = checkpoint.newest_sound(tmp_path / "run" / "checkpoints")
    assert newest is not None
    for name, value in checkpoint.load(newest).model_state.items():
        torch.testing.assert_close(value, weights[name], rtol=1e-4, atol=1e-5)


def test_gradients_that_float16_does_not_hold_are_kept_by_the_scale() -> None:
    """Each is some 2^-27, of which float16 has nothing."""

    def tiny(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return 2.0**-27 * model(batch[0]).float().sum()

    found = {}
    for init in (1.0, 2.0**16):
        recipe = scaled(model=lambda: Net(norm=False), objective=tiny, steps=1, scale={"init": init})
        replica = Replica(recipe, "cpu")
        replica.learn_terms(0)
        replica.compute(0, 0, replica.batch(0, 0), {"objective": 1})
        found[init] = replica.parameters[-1].grad
    assert float(found[1.0].abs().max()) == 0.0  # type: ignore[union-attr]
    assert float(found[2.0**16]) == pytest.approx(2 * 2.0**-27 * 2**16, rel=1e-3)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------------- any team


@pytest.mark.parametrize("workers", quick([2, 3, 5, 8], 3, 5))
def test_any_number_of_workers_leaves_out_the_same_updates(workers: int, alone: Outcome, tmp_path: Path) -> None:
    run = train_here(scaled(), Team(workers=workers, **EVERY), tmp_path / "run")
    assert run.digests == alone.digests
    assert scales(run) == scales(alone)
    assert run.result["overflows"] == alone.result["overflows"] > 3
    assert run.result["bad_batches"] == run.result["skipped"] == 0


def test_an_update_that_is_left_out_changes_nothing_and_counts(alone: Outcome) -> None:
    merged = tape.latest(alone.events)
    for version, (scale, left_out) in enumerate(scales(alone), 1):
        told = merged[version - 1]
        assert (alone.digests.get(version - 1) == alone.digests[version]) is bool(left_out) or version == 1
        assert (told["lr"] == 0.0) is bool(left_out)
        assert math.isfinite(told["objective"])
        assert "bad_batches" not in told
        assert (told["grad_norm"] is None or not math.isfinite(told["grad_norm"])) is bool(left_out)
        if left_out and version < len(merged):
            assert merged[version]["loss_scale"] == scale / 2
    assert alone.result["objective_last"] < alone.result["objective_first"]


def test_a_server_with_all_in_step_has_the_same_bits(alone: Outcome, tmp_path: Path) -> None:
    run = train_here(scaled(), Team(workers=2, engine="server", **EVERY), tmp_path / "run")
    assert run.digests == alone.digests
    assert scales(run) == scales(alone)
    assert replayed(scaled(), tmp_path / "run").same


def test_a_replay_leaves_out_the_same_updates(alone: Outcome) -> None:
    replay = replayed(scaled(), alone.path)
    assert replay.same, replay.divergence


def test_another_first_scale_is_another_result_unless_none_is_too_large(alone: Outcome, tmp_path: Path) -> None:
    team = Team(workers=2)
    other = train_here(scaled(scale={"init": 2.0**19}), team, tmp_path / "large")
    assert other.digest != alone.digest
    kept = {"growth_interval": 1000}
    lower, low = (
        train_here(
            scaled(scale={"init": 2.0**power, **kept}, steps=8, model=lambda: Net(norm=False)),
            team,
            tmp_path / str(power),
        )
        for power in (13, 14)
    )
    assert "overflows" not in low.result
    assert lower.digest == low.digest, "a power of two changes no bit"


# --------------------------------------------------------------------------------------------- deaths, resumes, audits


@pytest.mark.parametrize(
    "dies",
    [
        pytest.param(lambda step: before(StandIn, "until_left", 1, step), id="in it"),
        pytest.param(lambda step: before(StandIn, "until_settled", 1, calls=step + 1), id="as it is left out"),
        pytest.param(lambda step: before(StandIn, "between", 0, calls=step + 1), id="after it"),
        pytest.param(lambda step: before(Seat, "compute", 1, step), id="before it", marks=pytest.mark.slow),
    ],
)
def test_a_worker_that_dies_in_an_update_that_is_left_out_changes_no_bit(
    dies: Any, alone: Outcome, tmp_path: Path
) -> None:
    left_out = [place for place, (_, overflow) in enumerate(scales(alone)) if overflow]
    step = next(place for place in left_out if place > 3)
    run = run_with_deaths(scaled(), 2, tmp_path / "team", dies(step), **EVERY)
    assert run.result["restarts"] >= 1
    assert run.digest == alone.digest
    assert scales(run) == scales(alone)


@pytest.mark.parametrize("version", quick(range(1, 12), 2, 5, 8))
def test_a_resume_goes_on_with_the_scale_of_then(version: int, alone: Outcome, tmp_path: Path) -> None:
    path, recipe = tmp_path / "run", scaled()
    stopped = train_here(recipe, Team(workers=2), path, client=stopping_at(version))
    assert stopped.result["interrupted"]
    run = train_here(recipe, Team(workers=3), path, resume=True)
    assert run.digest == alone.digest
    assert run.result["overflows"] == alone.result["overflows"]


def test_one_worker_that_dies_goes_on_with_the_scale_that_was_remembered(alone: Outcome, tmp_path: Path) -> None:
    run = run_with_deaths(
        scaled(), 1, tmp_path / "team", before(Seat, "compute", 0, 9), checkpoint_every=100, remember=4
    )
    assert run.result["restarts"] == 1
    assert run.digest == alone.digest


def test_an_audit_finds_workers_alike(alone: Outcome, tmp_path: Path) -> None:
    run = train_here(scaled(), Team(workers=2, audit="50%"), tmp_path / "run")
    assert run.digest == alone.digest
    assert run.result["audit"]["looked_at"] > 16
    assert run.result["audit"]["wrong"] == []


@pytest.mark.slow
def test_a_third_process_computes_a_microbatch_with_the_scale_of_the_other_two() -> None:
    recipe = scaled(model=lambda: Net(norm=False))
    replica = replica_before(0, recipe, "cpu", (), lambda replica: None)
    replica.scaler.take(2.0**9)
    gradients, totals = Gradients(replica), {"objective": recipe.batch}
    gradients.assign_own([(1, 2)])
    assert third_result(recipe, replica, 0, 1, totals) == noted_alone(replica, gradients, 0, 1, totals)


@pytest.mark.slow
def test_a_memory_plan_and_loaders_change_no_bit(tmp_path: Path) -> None:
    recipe = workloads.gpt(precision="float16", loss_scale=LossScale(init=2.0**24, growth_interval=2))
    first, *others = (
        train_here(recipe, Team(workers=2, **team), tmp_path / str(place))
        for place, team in enumerate([{}, {"memory": "60%"}, {"loaders": 1, "shard": "none"}])
    )
    assert first.result["overflows"] > 1
    assert [each.digest for each in others] == [first.digest] * 2


@pytest.mark.slow
def test_a_compiled_model_leaves_out_the_same_updates_for_any_team(tmp_path: Path) -> None:
    recipe = scaled(compile=True, model=lambda: Net(norm=False))
    one, three = (train_here(recipe, Team(workers=w), tmp_path / str(w)) for w in (1, 3))
    assert one.digest == three.digest
    assert scales(one) == scales(three)
    assert one.result["overflows"] > 3


# ------------------------------------------------------------------------------------------------------- other rules


@pytest.mark.parametrize("rule", quick([r for r in RULES if r != "synchronous"], "asynchronous", "diloco"))
def test_a_run_under_every_rule_is_replayed_with_its_scales(rule: str, tmp_path: Path) -> None:
    recipe = scaled(rule=RULES[rule], clip_norm=None)
    run = train_here(recipe, Team(workers=2), tmp_path / "run")
    assert run.result["overflows"] > 3
    replay = replayed(recipe, tmp_path / "run")
    assert replay.same, replay.divergence
    merged = tape.latest(run.events)
    assert all(("loss_scale" in each) is recipe.rule.gradients for each in merged)
    assert sum(each.get("overflows", 0) for each in merged) == run.result["overflows"]
    assert math.isfinite(run.result["held_out"])


def test_local_steps_that_are_left_out_are_those_of_torchs_scaler_in_each_lane(tmp_path: Path) -> None:
    """One worker, whose lane is then all that there is."""
    recipe = scaled(rule=RULES["local_sgd"], clip_norm=None, model=lambda: Net(norm=False))
    _, expected = plain_loop(recipe)
    run = train_here(recipe, Team(workers=1), tmp_path / "run")
    assert run.result["overflows"] == sum(left_out for _, left_out in expected)


def test_a_simulation_has_scales_too_and_is_replayed(tmp_path: Path) -> None:
    recipe = scaled(rule=RULES["asynchronous"])
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    result = simulate(recipe, Cluster(workers=3), True, tmp_path / "run", lambda event: None)
    assert result["overflows"] > 3
    replay = replayed(recipe, tmp_path / "run")
    assert (replay.divergence, replay.digest) == ("", result["digest"])


# ------------------------------------------------------------------------------------------------ what no scale can do


@objective
def steep(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Its gradient is infinite whatever the scale."""
    return squares(model, batch) + (model(batch[0]) * 0).abs().sqrt().sum()


@pytest.mark.parametrize("team", [Team(workers=2), Team(workers=2, engine="server")], ids=["lockstep", "server"])
def test_a_gradient_that_no_scale_makes_finite_ends_the_run_in_a_sentence(team: Team, tmp_path: Path) -> None:
    recipe = scaled(objective=steep, scale={"init": 8.0, "least": 1.0})
    with pytest.raises(NonFiniteError, match=r"is not finite, with a loss scale of 1, the least, in step 4") as found:
        train_here(recipe, team, tmp_path / "run")
    assert "set watch.bad_batch to 'skip'" in str(found.value)


def test_under_local_steps_too(tmp_path: Path) -> None:
    recipe = scaled(objective=steep, scale={"init": 2.0, "least": 1.0}, rule=RULES["local_sgd"])
    with pytest.raises(NonFiniteError, match=r"is not finite, with a loss scale of 1, the least, in local step 2 of 2"):
        train_here(recipe, Team(workers=2), tmp_path / "run")


def test_a_rollback_takes_the_scale_back_too(tmp_path: Path) -> None:
    def spiky() -> Data:
        training = data().train
        training.tensors[1][40] = 1e3
        return Data(training)

    watch = Watch(spike="rollback", window=4, deviations=20.0, rollback_every=4)
    recipe = scaled(watch=watch, data=spiky, steps=24, batch=8, microbatches=4)
    one, three = (train_here(recipe, Team(workers=w), tmp_path / str(w)) for w in (1, 3))
    assert one.result["skipped"] > 0
    assert one.digest == three.digest
    assert scales(one) == scales(three)
    assert replayed(recipe, one.path).same


# -------------------------------------------------------------------------------------------------- what a person sees


def test_the_live_line_and_trackers_show_the_scale(alone: Outcome) -> None:
    shown = ProgressDisplay()
    for event in alone.events:
        if event["kind"] in ("run_started", "merged"):
            shown.see(event)
    last = tape.latest(alone.events)[-1]
    assert f"2^{int(math.log2(last['loss_scale']))}" in [part.long for part in shown.parts() if part.label == "scale"]
    assert scalars(last)["optimizer/loss_scale"] == last["loss_scale"]


@pytest.mark.usefixtures("forked_pythons")
def test_weights_of_any_version_are_computed_again_from_a_checkpoint_before(alone: Outcome, tmp_path: Path) -> None:
    recipe = scaled()
    run = train_here(recipe, Team(workers=2, checkpoint_every=6, keep_best=False), tmp_path / "run")
    opened = Run(run.path, run.result, recipe)
    for version in (4, 9):
        assert digest_of_state(opened.at(version).state_dict()) == alone.digests[version]


@pytest.mark.slow
def test_a_check_proves_a_sound_recipe_whose_first_scale_is_too_large() -> None:
    found = instep.check(scaled(model=lambda: Net(norm=False), clip_norm=None), only=["workers", "full batch"])
    assert found.proved


def test_the_state_is_in_the_checkpoint(alone: Outcome) -> None:
    newest, _ = checkpoint.newest_sound(alone.path / "checkpoints")
    assert newest is not None
    state = checkpoint.load(newest).training_state["loss_scale"]
    last = scales(alone)[-1]
    assert state["scale"] in (last[0], last[0] / 2, last[0] * 2)
    assert dataclasses.asdict(scaled().loss_scale)["growth_interval"] > state["good"] >= 0  # type: ignore[arg-type]
