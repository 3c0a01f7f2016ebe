"""C8: a user's mistake or a machine's fault ends in one sentence, without a hang, an orphan or a loss."""

from __future__ import annotations

import math
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from instep.errors import (
    CheckpointError,
    ComponentError,
    DataError,
    InstepError,
    NonFiniteError,
    ObjectiveError,
    RecipeError,
    RecordError,
    ResourceError,
    WorkerError,
)
from instep.recipe import Team
from instep.record import checkpoint
from instep.record.folder import RunFolder
from instep.team.journal import ClientGone
from instep.worker.replica import Replica
from support import workloads
from support.full_disk import full_disk
from support.harness import Client, act_on, train_here
from support.regression import numbers, regression, squares
from support.sentences import one_sentence

pytestmark = pytest.mark.processes

# ------------------------------------------------------------------------------------------------- workers that fail


def test_a_killed_worker_is_named_and_another_stands_in_for_it_or_the_team_starts_again(tmp_path: Path) -> None:
    when: list[float] = []

    def kill(pid: int) -> None:
        when.append(time.monotonic())
        os.kill(pid, signal.SIGKILL)

    see = act_on("merged", kill, version=3)
    named: list[float] = []

    def watch(event: dict[str, Any]) -> None:
        see(event)
        if event["kind"] == "left":
            named.append(time.monotonic())

    run = train_here(regression(), Team(workers=2, checkpoint_every=2), tmp_path / "run", client=Client(watch))
    left = next(e for e in run.events if e["kind"] == "left")
    assert left["worker"] == 1
    assert "worker 1 (pid " in left["why"]
    assert "SIGKILL" in left["why"]
    assert named[0] - when[0] < 60
    started = [e["version"] for e in run.events if e["kind"] == "run_started"]
    assert started == ([0] if run.result.get("stood_in") else [0, 2]), "back where it was changing something just then"
    assert run.result["restarts"] == 1


def test_a_worker_that_gets_nowhere_is_named(tmp_path: Path) -> None:
    def stuck(model: nn.Module, batch: Any) -> Tensor:
        if torch.is_grad_enabled() and bool((batch[0] == numbers()[7][0]).all(1).any()):
            time.sleep(1000)
        return squares(model, batch)

    team = Team(workers=2, restarts=0, stall_timeout_s=1.5)
    with pytest.raises(WorkerError, match=r"worker \d \(pid \d+\) answers, but has finished nothing for") as caught:
        train_here(regression(objective=stuck), team, tmp_path / "run")
    assert one_sentence(caught.value.message)


def test_c_code_that_holds_the_interpreter_is_not_taken_for_dead(tmp_path: Path) -> None:
    def busy(model: nn.Module, batch: Any) -> Tensor:
        if torch.is_grad_enabled() and not hasattr(model, "was_busy"):
            model.was_busy = True  # type: ignore[assignment]
            sum(range(100_000_000))  # seconds inside one C call
        return squares(model, batch)

    run = train_here(regression(objective=busy, steps=1), Team(answer_timeout_s=0.5, restarts=0), tmp_path / "run")
    assert run.result["steps"] == 1


def test_a_worker_that_raises_gives_its_traceback_and_no_restart(tmp_path: Path) -> None:
    def faulty(model: nn.Module, batch: Any) -> Tensor:
        if torch.is_grad_enabled() and bool((batch[0] == numbers()[7][0]).all(1).any()):
            raise KeyError("no such thing")
        return squares(model, batch)

    with pytest.raises(WorkerError, match=r"worker \d raised KeyError: 'no such thing' while computing step") as caught:
        train_here(regression(objective=faulty), Team(workers=2), tmp_path / "run")
    assert one_sentence(caught.value.message)
    assert "in faulty" in caught.value.detail


def test_a_worker_that_exits_is_named(tmp_path: Path) -> None:
    def leaving(model: nn.Module, batch: Any) -> Tensor:
        if torch.is_grad_enabled():
            os.write(1, b"last words\n")
            os._exit(3)
        return squares(model, batch)

    with pytest.raises(
        WorkerError, match=r"ended with exit status 3 in the middle of the run; the team has started again 1 ti"
    ) as caught:
        train_here(regression(objective=leaving), Team(restarts=1), tmp_path / "run")
    assert "last words" in caught.value.detail


def test_what_a_killed_worker_printed_is_in_its_log(tmp_path: Path) -> None:
    code = """
import os, pathlib, sys
from instep.team.logs import redirect_output
redirect_output(pathlib.Path(sys.argv[1]))
print("before its end")
os.kill(os.getpid(), 9)
"""
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    subprocess.run([sys.executable, "-c", code, tmp_path / "log"], env=buffered, check=False)
    assert (tmp_path / "log").read_text() == "before its end\n"


def test_processes_that_the_users_code_starts_can_be_terminated(tmp_path: Path) -> None:
    def helped(model: nn.Module, batch: Any) -> Tensor:
        helper = subprocess.Popen(["sleep", "60"])
        helper.terminate()
        assert helper.wait(60) == -signal.SIGTERM
        return squares(model, batch)

    def terminate(pid: int) -> None:
        os.kill(pid, signal.SIGTERM)

    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # as the launcher starts the supervisor
    try:
        client = Client(act_on("merged", terminate))
        run = train_here(
            regression(objective=helped, steps=2), Team(workers=2, restarts=0), tmp_path / "run", client=client
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    assert run.result["steps"] == 2, "a scheduler's SIGTERM to all is for the client alone"


class Counting(torch.optim.SGD):
    """Its rate falls by a count of its own."""

    def __init__(self, parameters: list[Tensor]):
        super().__init__(parameters, lr=0.01)
        self.count = 0

    def step(self, closure: Any = None) -> Any:
        self.count += 1
        self.param_groups[0]["lr"] /= self.count
        return super().step(closure)


class Noted(torch.optim.SGD):
    """Counts for itself, which changes nothing."""

    count = 0

    def __init__(self, parameters: list[Tensor]):
        super().__init__(parameters, lr=0.01)

    def step(self, closure: Any = None) -> Any:
        self.count += 1
        return super().step(closure)


class Saved(Counting):
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "count": self.count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.count = state_dict.pop("count")
        super().load_state_dict(state_dict)


def scheduled(parameters: list[Tensor]) -> torch.optim.Optimizer:
    made = torch.optim.SGD(parameters, lr=0.01)
    torch.optim.lr_scheduler.LambdaLR(made, lambda step: 0.1)
    return made


def test_a_model_that_grows_is_warned_of(tmp_path: Path) -> None:
    class Growing(nn.Linear):
        mask: Tensor | None

        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            if self.calls == 12:  # later than the first step, after which a checkpoint is tried
                self.register_buffer("mask", torch.ones(1))
            return super().forward(x)

    run = train_here(regression(model=lambda: Growing(3, 1)), Team(checkpoint_every=2), tmp_path / "run")
    (why,) = [event["why"] for event in run.events if event["kind"] == "warned"]
    assert why.startswith("the model gained or lost 'mask' since it was built, so no new one can load")
    assert one_sentence(why)


@pytest.mark.parametrize("part", [False, True])
def test_a_model_that_was_compiled_by_wrapping_is_warned_of_by_its_names(part: bool) -> None:
    def model() -> nn.Module:
        whole = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
        if not part:
            return torch.compile(whole)  # type: ignore[return-value]
        whole[0] = torch.compile(whole[0])  # type: ignore[assignment]
        return whole

    (why,) = Replica(regression(model=model), "cpu").doubts()
    name = "0._orig_mod.bias" if part else "_orig_mod.0.bias"
    assert f"one is named '{name}' instead of '0.bias'; set recipe.compile, or compile in place with module.comp" in why
    in_place = nn.Linear(3, 1)
    in_place.compile()
    assert Replica(regression(model=in_place), "cpu").doubts() == []


@pytest.mark.parametrize(
    ("optimizer", "warnings"),
    [
        (Noted, ["the optimizer Noted changes its attribute 'count', which is in no state_dict and so in no"]),
        (scheduled, ["a learning rate scheduler of torch has set the rates of the optimizer SGD, and will not"]),
        (Saved, []),
        (lambda parameters: torch.optim.AdamW(parameters), []),
    ],
)
def test_an_optimizer_that_goes_its_own_way_is_warned_of_once(
    optimizer: Any, warnings: list[str], tmp_path: Path
) -> None:
    run = train_here(regression(optimizer=optimizer), Team(workers=2, checkpoint_every=2), tmp_path / "run")
    found = [event["why"] for event in run.events if event["kind"] == "warned"]
    assert [why[: len(start)] for why, start in zip(found, warnings, strict=True)] == warnings
    assert all(map(one_sentence, found))


def test_no_process_outlives_its_client(tmp_path: Path) -> None:
    pids: list[int] = []

    def leave(event: dict[str, Any]) -> None:
        if event["kind"] == "joined":
            pids.append(event["pid"])
        if event["kind"] == "merged":
            client.leave()

    client = Client(leave)
    with pytest.raises(ClientGone):
        train_here(regression(steps=1000), Team(workers=2), tmp_path / "run", client=client)
    assert len(pids) == 2
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


# --------------------------------------------------------------------------------------------------- the user's input


def mean(model: nn.Module, batch: Any) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def infinite(model: nn.Module, batch: Any) -> dict[str, Tensor]:
    return {"fit": squares(model, batch), "bar": model(batch[0]).sum() * (math.inf if len(batch[0]) else 1)}


CASES: list[tuple[str, dict[str, Any], type[InstepError], str]] = [
    ("loss", {"objective": nn.CrossEntropyLoss(reduction="sum")}, ComponentError, "is a loss of .predictions, targets"),
    ("loss class", {"objective": nn.MSELoss}, ComponentError, "is a loss of .predictions, targets"),
    ("loss function", {"objective": nn.functional.mse_loss}, ComponentError, "is a loss of .predictions, targets"),
    ("mean", {"objective": mean}, ObjectiveError, "'objective' .*is a mean, not a sum"),
    ("not a sum", {"objective": lambda m, b: m(b[0])}, ObjectiveError, "must be a scalar"),
    ("no tensor", {"objective": lambda m, b: 3.0}, ObjectiveError, "must be a tensor"),
    ("infinite", {"objective": infinite}, NonFiniteError, "term 'bar' of the objective is .* in step 1, microbatch 0"),
    ("no model", {"model": lambda: 3}, ComponentError, "must give a torch.nn.Module"),
    ("frozen", {"model": lambda: nn.Linear(3, 1).requires_grad_(False)}, RecipeError, "no parameter that requires"),
    ("lazy", {"model": lambda: nn.LazyLinear(1)}, RecipeError, "has no shape yet"),
    ("no optimizer", {"optimizer": lambda parameters: 3}, ComponentError, "must give one torch.optim.Optimizer"),
    ("closure", {"optimizer": lambda p: torch.optim.LBFGS(p)}, ComponentError, "LBFGS"),
    ("finished", {"optimizer": torch.optim.SGD(nn.Linear(3, 1).parameters())}, ComponentError, "a finished SGD, whose"),
    ("no lr", {"optimizer": lambda p: torch.optim.Optimizer(p, {"rate": 1.0})}, ComponentError, "without 'lr', which"),
    ("rate", {"optimizer": lambda p: torch.optim.SGD(p, lr=-1.0)}, ComponentError, "Invalid learning rate"),
    ("no data", {"data": lambda: TensorDataset(torch.zeros(0, 3))}, DataError, "empty"),
    ("little data", {"data": lambda: TensorDataset(torch.zeros(7, 3))}, DataError, "7 samples .* batch of 8"),
    ("no module", {"model": "no_such_module:Net"}, ComponentError, "cannot import 'no_such_module'"),
    ("no name", {"model": "torch.nn:Linaer"}, ComponentError, "did you mean 'Linear'"),
]


@pytest.mark.parametrize(
    ("changes", "error", "sentence"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
def test_bad_input_is_one_sentence(
    changes: dict[str, Any], error: type[InstepError], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=sentence) as caught:
        train_here(regression(**changes), Team(workers=2), tmp_path / "run")
    assert one_sentence(caught.value.message), caught.value.message


def test_a_gradient_that_is_not_finite_names_the_parameter(tmp_path: Path) -> None:
    def root(model: nn.Module, batch: Any) -> Tensor:
        return (model(batch[0]) * 0).sqrt().sum() + squares(model, batch)

    with pytest.raises(NonFiniteError, match="gradient of 'weight' is not finite in step 1"):
        train_here(regression(objective=root), Team(workers=2), tmp_path / "run")


def test_a_step_without_items_is_refused(tmp_path: Path) -> None:
    def nothing(batch: Any) -> int:
        return 0

    def objective(model: nn.Module, batch: Any) -> Tensor:
        return squares(model, batch)

    objective.counts = nothing  # type: ignore[attr-defined]
    with pytest.raises(ObjectiveError, match="step 1 has no items to learn from"):
        train_here(regression(objective=objective), Team(), tmp_path / "run")


def test_workers_that_build_other_weights_are_named(tmp_path: Path) -> None:
    def model() -> nn.Module:
        built = nn.Linear(3, 1)
        with torch.no_grad():
            built.weight.fill_(os.getpid())
        return built

    with pytest.raises(WorkerError, match="worker 1 starts from other weights than worker 0"):
        train_here(regression(model=model), Team(workers=2), tmp_path / "run")


def test_workers_that_drift_apart_are_named(tmp_path: Path) -> None:
    class Drifting(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                group["lr"] *= 1 + os.getpid() % 1000 / 1e4
            return super().step(closure)

    recipe = regression(optimizer=lambda parameters: Drifting(parameters, lr=0.01))
    with pytest.raises(WorkerError, match=r"worker \d has other weights than worker \d at version 2"):
        train_here(recipe, Team(workers=2, checkpoint_every=2), tmp_path / "run")


def test_a_run_folder_that_exists_is_refused(tmp_path: Path) -> None:
    train_here(regression(), Team(), tmp_path / "run")
    with pytest.raises(RecordError, match="resume"):
        train_here(regression(), Team(), tmp_path / "run")


# --------------------------------------------------------------------------------------------------- disk and memory


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path) -> None:
    recipe = regression()
    whole = train_here(recipe, Team(checkpoint_every=2), tmp_path / "run")
    file = tmp_path / "run/checkpoints/step-00000006/model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    resumed = train_here(recipe, Team(workers=2), tmp_path / "run", resume=True)
    assert "step-00000006" in next(e["why"] for e in resumed.events if e["kind"] == "warned")
    assert next(e["version"] for e in resumed.events if e["kind"] == "run_started") == 4
    assert resumed.digest == whole.digest


def test_fewer_steps_than_were_done_are_refused(tmp_path: Path) -> None:
    train_here(regression(), Team(), tmp_path / "run")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.toml")}
    with pytest.raises(RecipeError, match="has done 6 steps already, and 'recipe.steps' is 5; give 6 or more"):
        train_here(regression(steps=5), Team(), tmp_path / "run", resume=True)
    assert {path: path.read_bytes() for path in before} == before
    assert train_here(regression(), Team(), tmp_path / "run", resume=True).result["steps"] == 6


def test_only_damaged_checkpoints_end_a_resume(tmp_path: Path) -> None:
    train_here(regression(), Team(), tmp_path / "run")
    for manifest in (tmp_path / "run").rglob("manifest.json"):
        manifest.write_bytes(manifest.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="no checkpoint .* is sound"):
        train_here(regression(), Team(), tmp_path / "run", resume=True)


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path: Path) -> None:
    train_here(regression(), Team(), tmp_path / "run")
    with pytest.raises(CheckpointError, match="belongs to another recipe"):
        train_here(regression(seed=1), Team(), tmp_path / "run", resume=True)


def test_a_full_disk_keeps_the_earlier_checkpoint(tmp_path: Path) -> None:
    recipe = workloads.gpt(steps=400)
    with full_disk(tmp_path, 1 << 20) as disk:
        with pytest.raises(ResourceError, match="No space left|full") as caught:
            train_here(recipe, Team(workers=2, checkpoint_every=1, keep=0), disk / "run")
        assert one_sentence(caught.value.message)
        path, problems = checkpoint.newest_sound(RunFolder(disk / "run").checkpoints)
        assert path is not None
        assert not problems
        assert checkpoint.load(path).version > 1


def test_memory_that_is_not_there_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("instep.transport.memory._available_bytes", lambda: 1000)
    with pytest.raises(ResourceError, match="MiB of shared memory, and 0 MiB are free; take fewer workers"):
        train_here(workloads.gpt(steps=2), Team(workers=2), tmp_path / "run")


def test_memory_that_the_system_refuses(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, limits[1]))
    try:
        with pytest.raises(ResourceError, match="limit on the size of files, ulimit -f, is smaller; raise it"):
            train_here(workloads.gpt(steps=2), Team(workers=2), tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_only_one_process_trains_in_a_folder(tmp_path: Path) -> None:
    train_here(regression(), Team(), tmp_path / "run")
    with RunFolder(tmp_path / "run").locked(), pytest.raises(RecordError, match="by another process"):
        train_here(regression(), Team(), tmp_path / "run", resume=True)


def test_processes_that_the_system_refuses(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 12, limits[1]))
    try:
        with pytest.raises(ResourceError, match=r"process \d of the 8 workers cannot be started: Too many open files"):
            train_here(regression(microbatches=8), Team(workers=8), tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_device_that_is_not_there(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ResourceError, match="no GPU"):
        train_here(regression(), Team(device="cuda"), tmp_path / "run")
