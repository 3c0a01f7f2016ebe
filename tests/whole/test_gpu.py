"""Workers on one GPU, where there is one: deterministic kernels, resume, the same protocol.

No test uses the GPU in its own process: of that no fork could.
"""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import pytest
import torch

from instep.errors import ResourceError
from instep.offline.tape_replay import replay
from instep.recipe import Team
from instep.reduce.checksums import checksum
from support import workloads
from support.gpu import gpus, on_gpu
from support.harness import train_here

pytestmark = [pytest.mark.processes, pytest.mark.skipif(not gpus(), reason="no GPU here")]


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.int64])
def test_a_checksum_is_the_same_wherever_the_tensor_lies(kind: torch.dtype) -> None:
    values = (1000 * torch.randn(5_000_001)).to(kind)
    assert on_gpu(lambda: checksum([values.cuda()])) == checksum([values])


@pytest.mark.parametrize("name", workloads.ALL)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_one_digest_a_recipe_and_device(name: str, precision: str, tmp_path: Path) -> None:
    recipe = workloads.ALL[name](precision=precision)
    team = Team(device="cuda", checkpoint_every=1, keep=0)
    first = train_here(recipe, team, tmp_path / "first")
    assert train_here(recipe, team, tmp_path / "second").digests == first.digests
    for version in range(4, recipe.steps + 1):
        shutil.rmtree(tmp_path / f"second/checkpoints/step-{version:08d}")
    assert train_here(recipe, team, tmp_path / "second", resume=True).digest == first.digest
    on_cpu = train_here(recipe, Team(), tmp_path / "cpu").result["objective_last"]
    assert first.result["objective_last"] == pytest.approx(on_cpu, rel=0.1)


@pytest.mark.parametrize("name", workloads.ALL)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_workers_that_share_a_gpu_have_the_bits_of_one(name: str, precision: str, tmp_path: Path) -> None:
    recipe = workloads.ALL[name](precision=precision)
    runs = [train_here(recipe, Team(workers=w, device="cuda:0"), tmp_path / str(w)) for w in (1, 2, 3)]
    assert len({run.digest for run in runs}) == 1
    told = [event for event in runs[1].events if event["kind"] == "gpu_memory"]
    assert sorted(event["worker"] for event in told) == [0, 1]
    assert all(0 < event["peak_bytes"] <= event["reserved_bytes"] for event in told)


@pytest.mark.parametrize("rule", ["synchronous", "asynchronous", "diloco:2", "diloco:2,wire=int8"])
def test_a_run_whose_workers_compute_on_a_gpu_for_a_server_is_replayed(rule: str, tmp_path: Path) -> None:
    recipe = workloads.gpt(rule=rule, steps=6)
    run = train_here(recipe, Team(workers=2, device="cuda:0", engine="server"), tmp_path / "run")
    replayed = on_gpu(partial(replay, recipe, run.events))
    assert replayed.same, replayed.divergence
    assert replayed.digest == run.digest


def test_a_gpu_more_than_there_are_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="a GPU for each worker, and torch finds"):
        train_here(workloads.gpt(), Team(workers=gpus() + 1, device="cuda"), tmp_path / "run")
