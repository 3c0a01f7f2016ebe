"""Workers on one GPU, where there is one: deterministic kernels, resume, the same protocol.

No test uses the GPU in its own process: of that no fork could.
"""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

from instep.data.signature import signature
from instep.errors import ResourceError
from instep.offline.tape_replay import replay
from instep.recipe import Team
from instep.reduce.checksums import checksum
from instep.worker.device import to_device
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


def test_a_batch_comes_to_a_gpu_as_it_was() -> None:
    batch = {
        "rows": torch.randn(64, 512), "expanded": torch.ones(1).expand(4, 3), "empty": torch.empty(0, 3),
        "channels last": torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last), "text": "a",
        "packed": pack_sequence([torch.arange(3), torch.arange(2)]), "sparse": torch.eye(3).to_sparse(),
    }  # fmt: skip

    def there_and_back() -> bool:
        for _ in range(3):  # what is pinned for one batch is used again for the next
            found = to_device(batch, torch.device("cuda"))
            back = {name: each if name == "text" else each.cpu() for name, each in found.items()}
            same = found["channels last"].stride() == batch["channels last"].stride()  # type: ignore[attr-defined]
            if signature(back) != signature(batch) or not same:
                return False
        return True

    assert on_gpu(there_and_back)


def test_loaders_change_no_bit_on_a_gpu(tmp_path: Path) -> None:
    recipe = workloads.gpt()
    runs = [train_here(recipe, Team(workers=2, device="cuda:0", loaders=n), tmp_path / str(n)) for n in (0, 1)]
    assert len({run.digest for run in runs}) == 1


def test_a_gpu_more_than_there_are_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="a GPU for each worker, and torch finds"):
        train_here(workloads.gpt(), Team(workers=gpus() + 1, device="cuda"), tmp_path / "run")
