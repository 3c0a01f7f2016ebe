"""Forwards that write parameters, under any rule: contributions carry what was written, and replays give it again."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from instep.clock.times import WorkerTimes
from instep.errors import RecipeError
from instep.offline.cluster import Cluster
from instep.offline.simulation import simulate
from instep.offline.tape_replay import replay
from instep.recipe import Recipe, Team
from instep.record import checkpoint, tape
from instep.record.folder import RunFolder
from instep.reduce.writes import Writes
from instep.reduce.written import WrittenParameters
from instep.rules import parse as rule
from instep.team.roster import Roster
from support import writers
from support.harness import train_here
from support.kinds import quick
from support.reference import reference_digests
from support.serving import RULES, check_tape, drive, replayed
from support.writers import Forced, Lookup, Teacher, Torn, recipe

# ------------------------------------------------------------------------------------------- what an update is to find


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trained = nn.Parameter(torch.tensor([1.0, 2.0, 4.0, 8.0]))
        self.frozen = nn.Parameter(torch.zeros(2), requires_grad=False)


def two() -> tuple[Two, WrittenParameters, Writes]:
    module = Two()
    written = WrittenParameters(module, [module.trained], ["trained", "frozen"])
    return module, written, Writes(written)


def wrote(written: WrittenParameters, parameter: torch.Tensor, **elements: float) -> torch.Tensor:
    """The row of a worker whose only microbatch wrote these elements, named e0, e1 and so on."""
    row = torch.zeros(written.row_bytes, dtype=torch.uint8)
    written.begin()
    with torch.no_grad():
        for name, value in elements.items():
            parameter[int(name[1:])] = value
    written.leave()
    written.post(row)
    return row


def test_of_the_present_version_the_new_value_is_taken() -> None:
    module, written, writes = two()
    rows = [wrote(written, module.trained, e0=0.1, e1=0.3), wrote(written, module.trained, e1=0.3, e3=-0.0)]
    found = writes.values(rows, [0, 0], 0)
    assert found["trained"].tolist() == [torch.tensor(0.1).item(), torch.tensor(0.3).item(), 4.0, -0.0]
    assert found.keys() == {"trained"}
    assert module.trained.tolist() == [1.0, 2.0, 4.0, 8.0]


def test_of_an_older_version_the_difference_is_added() -> None:
    module, written, writes = two()
    row = wrote(written, module.trained, e0=0.5, e1=1.0)
    writes.made(taken=True)
    with torch.no_grad():
        module.trained[0] += 0.25  # an update moved one element
    assert writes.values([row], [1], 1)["trained"].tolist() == [0.75, 1.0, 4.0, 8.0]


def test_what_was_written_since_is_not_written_twice() -> None:
    module, written, writes = two()
    row = wrote(written, module.trained, e0=0.5, e1=1.0)
    written.take(writes.values([row], [0], 0))
    writes.made(taken=True)
    late = wrote(two()[1], two()[0].trained)  # changed nothing
    assert writes.values([late], [1], 1) == {}
    with torch.no_grad():
        module.trained[2] = 3.5
    again = writes.values([wrote(*_fresh(), e0=0.5, e2=3.0)], [1], 1)["trained"]
    assert again.tolist() == [0.5, 1.0, 2.5, 8.0]
    writes.made(taken=True)
    assert writes.values([wrote(written, module.trained, e0=0.25)], [0], 2)["trained"][0] == 0.25


def _fresh() -> tuple[WrittenParameters, torch.Tensor]:
    module, written, _ = two()
    return written, module.trained


def test_an_update_left_out_wrote_nothing() -> None:
    module, written, writes = two()
    row = wrote(written, module.trained, e0=0.5)
    writes.values([row], [0], 0)
    writes.made(taken=False)
    assert writes.values([row], [1], 1)["trained"][0] == 0.5


def test_two_of_the_present_version_that_disagree_are_refused_by_name() -> None:
    module, written, writes = two()
    rows = [wrote(written, module.trained, e2=0.5), wrote(written, module.trained, e2=0.75)]
    with pytest.raises(RecipeError, match="step 8 left different values in the same element of parameter 'trained'"):
        writes.values(rows, [0, 0], 7)


def test_under_local_steps_differences_of_frozen_parameters_are_averaged() -> None:
    module, written, writes = two()
    rows = []
    for value in (1.0, 3.0):
        row = torch.zeros(written.row_bytes, dtype=torch.uint8)
        with torch.no_grad():
            module.frozen[1] = value
        written.post(row, written.differences([torch.zeros(2)]))
        module.frozen.data.zero_()
        rows.append(row)
    assert writes.means(rows, [0.25, 0.75], 0)["frozen"].tolist() == [0.0, 2.5]


# ---------------------------------------------------------------------------------------------------- the server engine


@pytest.mark.processes
@pytest.mark.parametrize("kind", quick(writers.KINDS, "max_norm", "forced"))
def test_synchronous_on_the_server_has_the_digest_of_lockstep(kind: str, tmp_path: Path) -> None:
    made = recipe(writers.KINDS[kind], steps=5)
    torch.set_num_threads(1)
    expected = reference_digests(made)[5]
    for workers in (1, 2, 3):
        run = train_here(made, Team(workers=workers, engine="server"), tmp_path / str(workers))
        assert run.digest == expected


@pytest.mark.parametrize("kind", ["max_norm", "forced", "teacher"])
@pytest.mark.parametrize("name", ["asynchronous", "local_sgd:2", "softsync:1"])
def test_a_worker_alone_comes_to_what_a_plain_loop_comes_to(name: str, kind: str) -> None:
    made = recipe(writers.KINDS[kind], steps=8, rule=rule(name))
    found = drive(made, 1).state
    for key, value in writers.plain_loop(made).state_dict().items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-5, msg=lambda text, key=key: key + text)


@pytest.mark.parametrize("name", ["asynchronous", "bounded_staleness:2", "softsync:2", "delay_compensated"])
def test_rows_of_an_embedding_keep_their_largest_norm_under_staleness(name: str) -> None:
    made = recipe(Lookup, rule=rule(name), steps=20, optimizer=lambda p: torch.optim.SGD(p, lr=0.01))
    norms = drive(made, 3).state["rows.weight"].norm(dim=1)
    assert 0.9 < float(norms.min()) <= float(norms.max()) < 1.05  # all of them 4 at the start


def known_from_the_start(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    build = Roster.__init__

    def knowing(self: Roster, *arguments: Any, **more: Any) -> None:
        build(self, *arguments, **more)
        self.written.update(names)

    monkeypatch.setattr(Roster, "__init__", knowing)


@pytest.mark.processes
@pytest.mark.parametrize("name", ["synchronous", "local_sgd:2"])
@pytest.mark.parametrize("how", quick([{"late": 5}, {"late": 6, "past": True}], {"late": 6, "past": True}))
def test_a_first_write_late_is_as_if_known_from_the_start(
    name: str, how: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = partial(torch.optim.SGD, lr=0.2)  # a worker's own optimizer starts anew when the team does
    made = recipe(partial(Forced, **how), steps=10, rule=rule(name), optimizer=lambda p: plain(p))
    team = Team(workers=2, engine="server", checkpoint_every=2, restarts=0)
    late = train_here(made, team, tmp_path / "late")
    assert late.result["restarts"] == 0
    assert sum("for the first time in" in e["why"] for e in late.events if e["kind"] == "warned") == 1
    check_tape(late.events, made)
    assert replayed(made, late.path).same
    known_from_the_start(monkeypatch, "weight")
    assert train_here(made, team, tmp_path / "known").digest == late.digest


@pytest.mark.processes
@pytest.mark.parametrize("kind", quick(["forced", "teacher"], "teacher"))
@pytest.mark.parametrize("name", ["asynchronous", "async_diloco:2,buffer=4", "delay_compensated"])
def test_a_real_run_is_replayed_with_its_checksums(name: str, kind: str, tmp_path: Path) -> None:
    made = recipe(
        writers.KINDS[kind], steps=8, rule=rule(name),
        optimizer=lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9),  # of any staleness
    )  # fmt: skip
    run = train_here(made, Team(workers=3, slow="1:3x", checkpoint_every=4), tmp_path / "run")
    found = replayed(made, run.path)
    assert found.same, found.divergence
    assert found.digest == run.digest


@pytest.mark.processes
def test_a_late_first_write_in_order_of_arrival_is_replayed(tmp_path: Path) -> None:
    made = recipe(partial(Forced, late=5, past=True), steps=10, rule=rule("asynchronous"))
    run = train_here(made, Team(workers=3, slow="1:3x", checkpoint_every=2), tmp_path / "run")
    found = replayed(made, run.path)
    assert found.same, found.divergence
    check_tape(run.events, made)


@pytest.mark.processes
def test_a_resumed_run_knows_what_was_written(tmp_path: Path) -> None:
    made = recipe(Teacher, steps=10)
    whole = train_here(made, Team(workers=2), tmp_path / "whole")
    first = recipe(Teacher, steps=4)
    train_here(first, Team(workers=2, engine="server"), tmp_path / "run")
    path, _ = checkpoint.newest_sound(tmp_path / "run" / "checkpoints")
    assert path is not None
    assert checkpoint.read_manifest(path).meta["written"] == ["teacher.weight", "teacher.bias"]
    for workers, engine in ((3, "server"), (1, "lockstep")):
        resumed = train_here(made, Team(workers=workers, engine=engine), tmp_path / "run", resume=True)
        assert resumed.digest == whole.digest


@pytest.mark.processes
def test_contributions_that_disagree_end_the_run_before_the_update(tmp_path: Path) -> None:
    made = recipe(partial(Torn, late=4), rule=rule("synchronous"))
    with pytest.raises(RecipeError, match="step 5 left different values in the same element of parameter 'scale'"):
        train_here(made, Team(workers=3, engine="server"), tmp_path / "run")
    saved, _ = checkpoint.newest_sound(tmp_path / "run" / "checkpoints")
    assert saved is not None
    assert saved.name == "step-00000004"


# ---------------------------------------------------------------------------------------------------- the virtual clock


def simulated(made: Recipe, folder: Path | None = None, **cluster: Any) -> dict[str, Any]:
    if folder is not None:
        RunFolder.create(folder)
    times = WorkerTimes.lognormal(0.1, 0.05, seed=1)
    return simulate(
        made, Cluster(**{"workers": 3, "times": times, "merge_s": 0.01, **cluster}), True, folder, lambda event: None
    )


@pytest.mark.processes
@pytest.mark.parametrize("kind", ["max_norm", "forced", "teacher"])
@pytest.mark.parametrize("name", quick(RULES, "synchronous", "asynchronous", "diloco"))
def test_a_simulation_under_any_rule_is_replayed(name: str, kind: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    made = recipe(writers.KINDS[kind], steps=6, rule=RULES[name])
    result = simulated(made, tmp_path / "run")
    found = replay(made, tape.read(tmp_path / "run" / "tape.jsonl"))
    assert found.same, found.divergence
    assert found.digest == result["digest"]
    if name == "synchronous":
        assert found.digest == reference_digests(made)[6]


@pytest.mark.processes
def test_a_simulation_begins_anew_at_a_late_first_write(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    made = recipe(partial(Forced, late=5))
    assert simulated(made, tmp_path / "run")["digest"] == reference_digests(made)[made.steps]
    assert replay(made, tape.read(tmp_path / "run" / "tape.jsonl")).same


class Counting(nn.Module):
    """Begins to write when it has been called often, and keeps count outside its buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.calls = nn.Linear(4, 3), 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.training and self.calls > 9:
            self.layer.weight.data.mul_(0.9)
        out: torch.Tensor = self.layer(x)
        return out


@pytest.mark.processes
@pytest.mark.parametrize("model", [Lookup, Teacher, Counting])
def test_what_writes_parameters_is_not_computed_for_many_at_once(model: Any) -> None:
    with pytest.raises(RecipeError, match="computed for many workers at once: its forwards write parameter"):
        simulated(recipe(model, rule=rule("asynchronous")), batched=True)
