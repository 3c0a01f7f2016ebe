"""A source file that is edited while a run goes on changes nothing of it: who comes later imports what was imported."""

from __future__ import annotations

import os
import py_compile
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from instep.recipe import Team
from instep.sources import KeptSources, first_difference, import_kept, sources
from support.agents import train_on
from support.harness import Client, told, train_here
from support.patience import LONG_S
from support.regression import regression

pytestmark = pytest.mark.processes

SOURCE = """
from torch import nn

SCALE = 1.0


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 1)

    def forward(self, x):
        return SCALE * self.inner(x)
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a module that no process has imported."""
    folder = tmp_path / "sources"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    file = folder / "shapes_of_a_user.py"
    file.write_text(SOURCE)
    return file


def edit(file: Path) -> None:
    """As an editor does it, and as another run that imports it then."""
    (other := file.with_suffix(".new")).write_text(SOURCE.replace("SCALE = 1.0", "SCALE = 2.0"))
    other.replace(file)
    py_compile.compile(str(file))


@pytest.mark.parametrize("workers", [1, 3])
def test_a_successor_computes_what_the_others_do(workers: int, tmp_path: Path, module: Path) -> None:
    recipe = regression(model="shapes_of_a_user:Line", steps=12)
    wanted = train_here(recipe, Team(), tmp_path / "alone").digest

    def act(event: dict[str, Any]) -> None:
        if event["kind"] == "merged" and event["version"] == 3 and len(told(client, "joined")) == workers:
            edit(module)
            os.kill(told(client, "joined")[-1]["pid"], signal.SIGKILL)

    client: Client = Client(act)
    run = train_here(recipe, Team(workers=workers, remember=2), tmp_path / "run", client=client)
    assert run.result["restarts"] == 1
    assert run.digest == wanted
    assert "shapes_of_a_user" not in sys.modules


@pytest.mark.parametrize("all_die", [False, True], ids=["one dies", "all die"])
@pytest.mark.usefixtures("agents_meet_here")
def test_on_other_hosts_too_and_where_the_team_starts_again(all_die: bool, tmp_path: Path, module: Path) -> None:
    recipe = regression(model="shapes_of_a_user:Line", steps=12)
    wanted = train_here(recipe, Team(), tmp_path / "alone").digest

    def act(event: dict[str, Any]) -> None:
        if event["kind"] == "merged" and event["version"] == 3 and not edited.exists():
            edited.touch()
            edit(module)
            for each in told(client, "joined")[0 if all_die else 1 :]:
                os.kill(each["pid"], signal.SIGKILL)

    client: Client = Client(act)
    edited = tmp_path / "edited"
    team = Team(workers=2, lease_s=LONG_S, checkpoint_every=2, restarts=2)
    run, others = train_on((1, 1), recipe, team, tmp_path / "run", client=client)
    assert len(told(run, "run_started")) == 1 + all_die
    assert not [why for event in told(run, "warned") if "differ" in (why := event["why"])]
    assert run.digest == wanted
    assert [each.result for each in others] == [run.result]


def test_a_digest_is_of_what_is_imported_whatever_became_of_the_file(
    module: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = KeptSources()
    kept.keep([str(module)])
    monkeypatch.setattr(sys, "meta_path", sys.meta_path[:])
    try:
        __import__("shapes_of_a_user")
        before = sources()
        assert "module shapes_of_a_user" in before
        edit(module)
        assert first_difference(before, sources()) == "module shapes_of_a_user"
        import_kept(kept.of)
        assert sources() == before
    finally:
        sys.modules.pop("shapes_of_a_user", None)


def test_only_what_was_kept_is_read_from_memory_and_nothing_is_compiled_to_the_disk(
    tmp_path: Path, module: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside = module.with_name("another_of_a_user.py")
    beside.write_text("VALUE = 1")
    kept = KeptSources()
    kept.keep([str(module), str(tmp_path / "gone.py")])
    assert [*kept.of] == [str(module)]
    edit(module)
    beside.write_text("VALUE = 2")
    before = sys.meta_path[:]
    monkeypatch.setattr(sys, "meta_path", before)
    import_kept({})
    assert sys.meta_path == before
    import_kept(kept.of)
    try:
        found = __import__("shapes_of_a_user"), __import__("another_of_a_user")
        assert (found[0].SCALE, found[1].VALUE) == (1.0, 2)
        assert found[0].__file__ == str(module)
    finally:
        sys.modules.pop("shapes_of_a_user", None)
        sys.modules.pop("another_of_a_user", None)
