"""A team whose workers compile, started by a process that has compiled something itself, as a notebook may have."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.processes

PROGRAM = """
import torch
from pathlib import Path
from support.harness import train_here
from instep.recipe import Recipe, Team
from support.workloads import classify, images


def mlp():
    layers = [torch.nn.Sequential(torch.nn.Linear(8 + i, 9 + i), torch.nn.LayerNorm(9 + i)) for i in range(4)]
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(8), *layers, torch.nn.Linear(12, 10))


torch.set_num_threads(1)
model = mlp()
torch.compile(model)(images()[0][0][None]).sum().backward()
recipe = Recipe(
    name="mlp", model=lambda: model, objective=classify, data=images, batch=8, microbatches=2, steps=1, compile=True
)
print(train_here(recipe, Team(workers=2), Path("run")).digest)
"""


@pytest.mark.slow
def test_a_team_compiles_where_the_process_before_it_has(tmp_path: Path) -> None:
    paths = os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parents[2] / "src")])
    environment = {**os.environ, "PYTHONPATH": paths, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.strip()) == 64
