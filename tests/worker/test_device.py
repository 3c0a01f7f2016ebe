"""Which device a worker gets, and what it says where it gets none: all of it without a GPU."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from instep.errors import ResourceError, WorkerError
from instep.recipe import Recipe, Team
from instep.team import groups, session
from instep.worker import device as devices
from instep.worker.contributor import Contributor
from instep.worker.device import check_nccl, device_of, peak_bytes
from instep.worker.trial import in_a_copy
from support import workloads
from support.gpu import gpus
from support.harness import train_here


@pytest.mark.pure
def test_each_worker_of_a_host_has_the_gpu_of_its_place_there_or_all_have_one() -> None:
    assert [device_of("cuda", place, 3, 4) for place in range(3)] == ["cuda:0", "cuda:1", "cuda:2"]
    assert [device_of("cuda:1", place, 3, 2) for place in range(3)] == ["cuda:1"] * 3
    assert device_of("cpu", 1, 2, 0) == "cpu"


@pytest.mark.pure
@pytest.mark.parametrize(
    ("device", "workers", "gpus", "visible", "sentence"),
    [
        ("cuda", 1, 0, None, "team.device is 'cuda', and torch finds no GPU here; set team.device to 'cpu'."),
        (
            "cuda:0", 2, 0, "",
            "team.device is 'cuda:0', and torch finds no GPU here (CUDA_VISIBLE_DEVICES is ''); set team.device to "
            "'cpu'.",
        ),
        (
            "cuda", 3, 2, "0,1",
            "team.device is 'cuda', a GPU for each worker, and torch finds 2 GPUs here (CUDA_VISIBLE_DEVICES is '0,1') "
            "for 3 workers; set team.workers to 2 for this host, or team.device to 'cuda:0', which they then share.",
        ),
        (
            "cuda:1", 1, 1, None,
            "team.device is 'cuda:1', and torch finds 1 GPU here, counted from 0; set team.device to 'cuda:0'.",
        ),
    ],
)  # fmt: skip
def test_a_gpu_that_is_not_there_is_named_with_the_field_and_what_is(
    device: str, workers: int, gpus: int, visible: str | None, sentence: str
) -> None:
    with pytest.raises(ResourceError) as error:
        device_of(device, 0, workers, gpus, visible)
    assert error.value.message == sentence


@pytest.mark.pure
def test_workers_with_a_gpu_each_are_refused_where_torch_has_no_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    check_nccl(Team(device="cuda").by_nccl, 1)
    check_nccl(Team(device="cuda:0", workers=2).by_nccl, 2)
    with pytest.raises(ResourceError, match="2 workers with a GPU each reach each other by NCCL, which this torch was"):
        check_nccl(Team(device="cuda", workers=2).by_nccl, 2)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    check_nccl(Team(device="cuda", workers=2).by_nccl, 2)


class Posing:
    """GPUs that torch is to find; what lies on them lies on the CPU. `folder`: for notes on who takes which."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, gpus: int, folder: Path):
        self._folder = folder
        folder.mkdir()

        def own(device: str, place: int, workers: int) -> str:
            (folder / str(place)).write_text(device_of(device, place, workers, gpus))
            return "cpu"

        monkeypatch.setattr(session, "own_device", own)
        monkeypatch.setattr(session, "check_nccl", lambda needed, workers: None)
        monkeypatch.setattr(groups, "is_gpu", lambda device: True)

    @property
    def taken(self) -> list[str]:
        return [path.read_text() for path in sorted(self._folder.iterdir())]


@pytest.mark.processes
@pytest.mark.parametrize(("device", "found"), [("cuda:1", ["cuda:1"] * 3), ("cuda", ["cuda:0", "cuda:1", "cuda:2"])])
def test_a_team_on_gpus_in_lockstep_has_the_bits_of_one_worker(
    device: str, found: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are copied through memory where workers share one, and go by the wire of GPUs where each has its own."""
    made = {name: workloads.ALL[name](steps=4) for name in ("gpt", "convnet")}
    alone = {name: train_here(recipe, Team(), tmp_path / name).digest for name, recipe in made.items()}
    posing = Posing(monkeypatch, 3, tmp_path / "taken")
    for name, recipe in made.items():
        run = train_here(recipe, Team(workers=3, device=device), tmp_path / f"{name}-3")
        assert run.digest == alone[name]
        assert posing.taken == found


@pytest.mark.processes
@pytest.mark.parametrize("rule", ["diloco:2", "diloco:2,wire=int8", "synchronous"])
def test_workers_on_gpus_send_a_server_the_bits_of_workers_on_its_own_device(
    rule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = workloads.gpt(rule=rule, steps=4)
    expected = train_here(recipe, Team(workers=2, engine="server"), tmp_path / "cpu").digest
    posing = Posing(monkeypatch, 2, tmp_path / "taken")
    monkeypatch.setattr(Contributor, "_at_home", False)
    run = train_here(recipe, Team(workers=2, engine="server", device="cuda"), tmp_path / "gpus")
    assert run.digest == expected
    assert posing.taken == ["cuda:0", "cuda:1"], "and the server none"


@pytest.mark.processes
def test_what_torch_has_counted_on_a_gpu_is_on_the_tape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert peak_bytes(torch.device("cpu")) is None
    monkeypatch.setattr(session, "peak_bytes", lambda device: (1000, 2000))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    for engine in ("lockstep", "server"):
        run = train_here(workloads.gpt(steps=1), Team(workers=2, engine=engine), tmp_path / engine)
        told = {event["worker"]: event for event in run.events if event["kind"] == "gpu_memory"}
        assert sorted(told) == [0, 1]
        assert (told[1]["gpu"], told[1]["peak_bytes"], told[1]["reserved_bytes"]) == ("a GPU", 1000, 2000)


class Puts(nn.Module):
    """Its operation has no deterministic kernel, on a CPU neither, of which torch speaks where threads are several."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        twice = torch.zeros(3).put_(torch.tensor([0, 0]), torch.tensor([1.0, 1.0]))
        return x * (self.weight + twice)


def puts(**changes: Any) -> Recipe:
    data = torch.utils.data.TensorDataset(torch.randn(8, 3))
    return Recipe(
        model=Puts, objective=lambda model, batch: model(batch[0]).square().sum(), data=data, batch=4, microbatches=2,
        steps=2, threads=2, **changes,
    )  # fmt: skip


@pytest.mark.processes
def test_an_operation_without_a_deterministic_kernel_is_named_with_the_field_that_lets_it_pass(tmp_path: Path) -> None:
    with pytest.raises(WorkerError) as error:
        train_here(puts(), Team(), tmp_path / "refused")
    assert error.value.message.startswith("worker 0 came to put_ while ")
    assert "set team.deterministic to false and do without the promise of the same bits" in error.value.message
    run = train_here(puts(), Team(deterministic=False), tmp_path / "passes")
    assert [e["why"] for e in run.events if e["kind"] == "warned"] == [
        "team.deterministic is false, so that equal runs may come to other bits."
    ]


@pytest.mark.processes
def test_matrix_products_on_a_gpu_are_asked_to_be_deterministic_unless_that_is_turned_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def prepared(deterministic: bool) -> tuple[str, bool, str]:
        device = devices.prepare_device("cuda", 1, deterministic=deterministic)
        return str(device), torch.are_deterministic_algorithms_enabled(), os.environ["CUBLAS_WORKSPACE_CONFIG"]

    assert in_a_copy(lambda: prepared(True)) == ("cuda", True, ":4096:8")
    assert in_a_copy(lambda: prepared(False)) == ("cuda", False, ":4096:8")


@pytest.mark.processes
@pytest.mark.skipif(bool(gpus()), reason="a GPU is here")
@pytest.mark.parametrize("engine", ["lockstep", "server"])
@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_a_team_on_gpus_where_there_is_none_ends_with_one_sentence(device: str, engine: str, tmp_path: Path) -> None:
    team = Team(workers=2, device=device, engine=engine)
    with pytest.raises(ResourceError, match=f"team.device is '{device}', and torch finds no GPU here"):
        train_here(workloads.gpt(), team, tmp_path / "run", tried=True)
    assert not (tmp_path / "run/result.json").exists()
