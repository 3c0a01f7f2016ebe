"""One worker on one GPU, where there is one: deterministic kernels, resume, the same protocol."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from instep.recipe import Team
from instep.reduce.checksums import checksum
from support import workloads
from support.harness import train_here

pytestmark = [pytest.mark.processes, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")]


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.int64])
def test_a_checksum_is_the_same_wherever_the_tensor_lies(kind: torch.dtype) -> None:
    values = (1000 * torch.randn(5_000_001)).to(kind)
    assert checksum([values.cuda()]) == checksum([values])


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
