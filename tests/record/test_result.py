"""The result: one constructor, and the keys that every engine's result.json has had."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from instep.offline.cluster import Cluster
from instep.offline.simulation import simulate
from instep.recipe import Team
from instep.record.folder import RunFolder
from instep.record.result import Costs, Result
from instep.rules import parse
from instep.worker.milestones import Progress
from support import workloads
from support.harness import train_here

BOTH = {
    "recipe", "digest", "rule", "engine", "steps", "versions", "items", "workers", "microbatches", "objective_first",
    "objective_last", "held_out", "held_out_terms", "bits_per_byte", "gathered", "items_per_s", "wall_s", "restarts",
    "bytes_sent", "staleness_mean", "staleness_max", "delayed_max", "lead_max", "idle_share", "dropped", "skipped",
    "bad_batches", "moves", "ranges",
}  # fmt: skip
TRAINED = BOTH | {"checksum_s", "parameters", "interrupted", "stopped", "data_digest", "sample", "artifacts"}
SIMULATED = BOTH | {"contributions", "simulated_in_s", "scheduled_in_s"}


@pytest.mark.processes
@pytest.mark.parametrize(("rule", "engine"), [("synchronous", "auto"), ("asynchronous", "auto")])
def test_a_trained_run_has_all_its_keys_and_a_share_of_idle_time_for_each_worker(
    rule: str, engine: Any, tmp_path: Path
) -> None:
    recipe = workloads.gpt(rule=parse(rule), steps=2)
    result = train_here(recipe, Team(workers=2, engine=engine), tmp_path / "run").result
    assert result.keys() == TRAINED
    assert len(result["idle_share"]) == 2
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == result


@pytest.mark.processes
@pytest.mark.parametrize("gradients", [True, False])
def test_a_simulated_run_has_all_its_keys(gradients: bool, tmp_path: Path) -> None:
    RunFolder.create(tmp_path / "run")
    recipe = workloads.gpt(rule=parse("asynchronous"), steps=2)
    result = simulate(recipe, Cluster(workers=3), gradients, tmp_path / "run", lambda event: None)
    assert result.keys() == SIMULATED
    assert (result["digest"] is None, result["items"] is None) == (not gradients, not gradients)
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == result


def test_a_field_too_many_is_an_error() -> None:
    with pytest.raises(TypeError, match="itmes"):
        Result.of(asdict(Progress()), Costs(bytes_sent=0, idle_share=[]), itmes=3)
