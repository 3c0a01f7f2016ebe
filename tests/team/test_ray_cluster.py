"""What is asked of Ray's nodes, and what a user is told who asks for too much; no Ray is needed for that."""

from __future__ import annotations

import socket
import sys
import threading
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

import instep
from instep.errors import InstepError, RecipeError, ResourceError, WorkerError
from instep.recipe import Recipe
from instep.team import meeting, ray_nodes
from instep.team.messages import Failed
from instep.team.place import Place, place_of
from instep.team.ray_cluster import Node, bundles_for, connected, most_bundles
from instep.team.ray_nodes import RayNodes, RayRun

pytestmark = pytest.mark.pure

RAY = instep.Team(launcher="ray")


def nodes(*processors: float, gpus: float = 0) -> list[Node]:
    return [Node(f"n{n}", f"10.0.0.{n}", str(n), cpus, gpus, n == 0) for n, cpus in enumerate(processors)]


@pytest.mark.parametrize(
    ("workers", "processors", "shares"),
    [
        (8, (4, 4), [4, 4]),
        (3, (4, 4), [1, 2]),
        (1, (4, 4), [1]),
        (2, (4, 4, 4), [1, 1]),
        (5, (2, 1, 3), [2, 3]),  # a part for the second node would be more than it has
        (4, (4, 0.5), [4]),
        (5, (1, 2, 2), [1, 2, 2]),
    ],
)
def test_workers_go_to_as_many_of_rays_nodes_as_have_processors_for_their_part(
    workers: int, processors: tuple[float, ...], shares: list[int]
) -> None:
    assert bundles_for(replace(RAY, workers=workers), nodes(*processors)) == [{"CPU": share} for share in shares]


def test_a_team_with_bounds_has_as_many_workers_as_rays_nodes_have_processors_for_nearly_equal_parts_of() -> None:
    team = replace(RAY, bounds="2..8")
    for processors, shares in [((8, 8), [4, 4]), ((2, 3), [2, 3]), ((1, 4), [1, 2]), ((3,), [3]), ((1, 1), [1, 1])]:
        assert most_bundles(team, nodes(*processors)) == [{"CPU": share} for share in shares]
    with pytest.raises(ResourceError, match="2 workers need a processor each"):
        most_bundles(team, nodes(1))


def test_each_worker_on_cuda_has_a_gpu_of_rays() -> None:
    team = replace(RAY, workers=4, device="cuda")
    assert bundles_for(team, nodes(8, 8, gpus=2)) == [{"CPU": 2, "GPU": 2}] * 2
    assert bundles_for(replace(team, device="cuda:0"), nodes(8, 8, gpus=1)) == [{"CPU": 2, "GPU": 1}] * 2
    with pytest.raises(ResourceError, match="4 workers need a processor and a GPU each, .* n0 8 and 1 GPUs, n1 8 and "):
        bundles_for(team, nodes(8, 8, gpus=1))
    with pytest.raises(RecipeError, match="'cuda:1', and Ray decides which GPUs"):
        bundles_for(replace(team, device="cuda:1"), nodes(8, 8, gpus=2))


def test_too_few_processors_are_told_with_what_each_of_rays_nodes_has() -> None:
    with pytest.raises(ResourceError, match="9 workers need a processor each, .* too little: n0 4, n1 4, the first"):
        bundles_for(replace(RAY, workers=9), nodes(4, 4))
    with pytest.raises(ResourceError, match="n0 0, n1 4"):
        bundles_for(replace(RAY, workers=2), nodes(0, 4))


def test_ray_that_is_not_installed_is_told_with_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RecipeError, match=r"pip install 'instep\[ray\]'"), connected(RAY):
        pass


class FakeRay:
    def is_initialized(self) -> bool:
        return False


def refused(monkeypatch: pytest.MonkeyPatch, address: str) -> str:
    monkeypatch.setitem(sys.modules, "ray", FakeRay())
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(InstepError) as told, connected(RAY):
        pass
    return told.value.message


def test_a_cluster_of_rays_that_does_not_answer_is_refused_before_ray_asks_for_minutes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

        def answer() -> None:
            connection, _ = listener.accept()
            connection.recv(100)
            connection.sendall(b"220 mail.example.com")
            connection.close()

        thread = threading.Thread(target=answer)
        thread.start()
        assert "what listens there is no Ray" in refused(monkeypatch, f"127.0.0.1:{port}")
        thread.join()
    assert "Connection refused" in refused(monkeypatch, f"127.0.0.1:{port}")


def test_a_client_outside_rays_cluster_is_told_to_run_the_command_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "run the command there, by `ray job submit`" in refused(monkeypatch, "ray://head:10001")


def test_agents_that_ray_starts_know_the_first_ones_address_and_secret_from_it() -> None:
    place = Place(1, 2, 1, 2, 0, "ray", (1, 1), head="10.0.0.7", port=20123, secret=b"drawn by the first")
    assert meeting.find(place, 0.0) == meeting.Found(("10.0.0.7", 20123), b"drawn by the first")
    first = replace(place, agent=0, host=0)
    assert meeting.own_address(first) == "10.0.0.7"
    assert meeting.draw_secret(first, {}) == b"drawn by the first"
    meeting.publish(first, ("10.0.0.7", 20123), b"drawn by the first")
    assert "drawn" not in repr(place)


def test_who_asks_ray_for_agents_takes_its_own_place_from_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    environment: dict[str, Any] = {"TORCHELASTIC_RUN_ID": "x", "SLURM_STEP_ID": "0"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert place_of("ray") is None


def test_a_recipe_is_refused_before_ray_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    recipe = Recipe(model="m:Net", objective="m:loss", data="m:data", batch=2, microbatches=2, steps=1)
    with pytest.raises(RecipeError, match="3 workers are more than the 2 microbatches"):
        instep.train(recipe, team=replace(RAY, workers=3))


class RayOf:
    """Whose one agent has ended, with this word or error; or none has, with None."""

    def __init__(self, said: Any):
        self.said = said

    def wait(self, answers: list[Any], timeout: float) -> tuple[list[Any], list[Any]]:
        return (answers, []) if self.said is not None else ([], answers)

    def get(self, answer: Any) -> Any:
        if isinstance(self.said, Exception):
            raise self.said
        return self.said


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (
            Failed("DataError", "no such data."),
            "agent 1, on Ray's node 10.0.0.1, ended before the run began: no such data",
        ),
        (ModuleNotFoundError("No module named 'instep'"), "began: ModuleNotFoundError: No module named 'instep'; look"),
    ],
)
def test_an_agent_that_ends_before_the_run_begins_ends_it_unless_the_first_knows_more(
    said: Any, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, library = [100.0], RayOf(None)
    monkeypatch.setattr(ray_nodes, "ray", lambda: library)
    monkeypatch.setattr(ray_nodes, "time", SimpleNamespace(monotonic=lambda: now[0]))
    run = RayRun(RayNodes(None, [1, 1], {}, ["10.0.0.0", "10.0.0.1"], [], None), None, None, ["of agent 1"])  # type: ignore[arg-type]
    run.look()
    library.said, now[0] = said, 200.0
    run.look()
    now[0] += ray_nodes.GRACE_S - 0.1
    run.look()
    now[0] += 1
    with pytest.raises(WorkerError, match=told):
        run.look()
    run.see({"kind": "run_started"})
    run.look()
