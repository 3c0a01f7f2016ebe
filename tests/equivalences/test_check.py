"""`instep.check`: sound recipes prove all, nothing is green without a count, and it ends without a trace."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import instep
from instep.cli import main
from instep.descendants import children
from instep.equivalences import checking
from instep.equivalences.claims import CLAIMS
from instep.equivalences.found import Checked, Compared, Equivalence, Where
from instep.equivalences.proving import prove
from instep.equivalences.real import with_processes
from instep.equivalences.whole_batch import _off
from support.broken_recipes import entropy, recipe

pytestmark = pytest.mark.processes


class Blocks(nn.Module):
    """Repeated blocks with dropout, so that there is something to recompute."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 4)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 64), nn.GELU(), nn.Dropout(0.2), nn.Linear(64, 16))
            for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return self.last(x)  # type: ignore[no-any-return]


def test_a_sound_recipe_proves_all_and_every_proof_has_a_count(tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []
    found, _ = prove(recipe(model=Blocks, clip_norm=1.0), list(CLAIMS), tmp_path, seen.append)
    assert [each.name for each in found] == [name for name in CLAIMS if name != "processes"]
    assert {each.name: each.why for each in found if each.verdict != "proved"} == {}
    for each in found:
        assert each.compared.tensors or each.compared.samples, each
        assert each.compared.steps or each.name == "recipe", each
    by_name = {each.name: each.compared for each in found}
    assert by_name["workers"].workers == (1, 2, 3, 4)
    assert by_name["resume"].workers == (1, 2)
    assert by_name["full batch"].samples == 12 + 5  # the smaller batch at an epoch's end, too
    trained = len(list(Blocks().parameters()))
    assert by_name["full batch"].tensors == trained
    assert by_name["workers"].tensors == trained * (1 + 1 + 3)  # gradient, weight and Adam's state
    assert [event["kind"] for event in seen] == ["checking", "checked"] * len(found)


def test_what_is_not_run_says_why_and_is_not_green(tmp_path: Path) -> None:
    found, _ = prove(recipe(batch=12, microbatches=1), ["workers", "memory"], tmp_path)
    verdicts = {each.name: each for each in found}
    assert verdicts["workers"].verdict == verdicts["memory"].verdict == "not run"
    assert "one microbatch" in verdicts["workers"].why
    assert "no repeated block" in verdicts["memory"].why
    assert not Checked("none", "", (verdicts["workers"],)).proved


def test_random_numbers_that_are_not_by_sample_leave_the_whole_batch_out(tmp_path: Path) -> None:
    def shaken(model: nn.Module, batch: Any) -> Tensor:
        return entropy(model, (batch[0] + torch.randn(6), batch[1]))

    found, _ = prove(recipe(objective=shaken), ["full batch"], tmp_path)
    assert found[1].verdict == "not run"
    assert "not by sample" in found[1].why


def test_a_team_of_processes_that_loses_a_worker_is_proved(forked_pythons: None, tmp_path: Path) -> None:
    found = with_processes(recipe(), tmp_path / "run")
    assert found.verdict == "proved", found
    assert found.compared.workers == (2, 1)
    assert found.compared.steps >= 5
    assert found.compared.tensors == 2 + 2 * 3  # weights and Adam's state


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary folders go."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_ctrl_c_leaves_no_process_and_no_folder(forked_pythons: None, temporary: Path) -> None:
    before = children()

    def press(event: dict[str, Any]) -> None:
        if event["name"] == "workers":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        instep.check(recipe(), only=["workers", "resume"], monitors=[press])
    assert list(temporary.glob("instep-check-*")) == []
    assert children() - before == set()


def test_a_refused_recipe_shows_the_sentence_and_the_rest_is_not_run(forked_pythons: None, temporary: Path) -> None:
    def mean(model: nn.Module, batch: Any) -> Tensor:
        return entropy(model, batch) / len(batch[0])

    found = instep.check(recipe(objective=mean))
    assert found.refuted == (found["recipe"],)
    assert "is a mean, not a sum" in found["recipe"].why
    assert {each.verdict for each in found if each.name != "recipe"} == {"not run"}
    assert {each.why for each in found if each.name != "recipe"} == {"Instep refuses the recipe: see 'recipe'."}


def test_an_unknown_equivalence_is_refused_with_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(instep.errors.RecipeError, match="did you mean 'workers'"):
        instep.check(recipe(), only=["worker"])
    assert main(["check", "gpt", "--only", "worker"]) == 2
    assert "did you mean 'workers'" in capsys.readouterr().err


PROVED = Equivalence(
    "workers", CLAIMS["workers"], "proved", Compared(tensors=4, steps=4, workers=(1, 2)), note="As said."
)
REFUTED = Equivalence(
    "resume", CLAIMS["resume"], "refuted", Compared(tensors=4, steps=2, workers=(1, 2)), "A number is kept aside.",
    Where(step=3, microbatch=1, tensor="a.weight", operation="aten.mul.Tensor", module="a", ulps=12.0),
)  # fmt: skip
NOT_RUN = Equivalence("memory", CLAIMS["memory"], "not run", why="there are no blocks.")


def shown(monkeypatch: pytest.MonkeyPatch, *found: Equivalence) -> None:
    def check(given: Any, **_: Any) -> Checked:
        return Checked(given.name, "f", found, 1.0, 2.0, {"torch": "2"})

    monkeypatch.setattr(checking, "check", check)


def test_the_command_shows_counts_places_and_causes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown(monkeypatch, PROVED, NOT_RUN)
    assert main(["check", "gpt"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "workers proved 4 tensors, 4 steps, 1/2 workers" in said
    assert "memory: not run, for there are no blocks." in said
    assert "Equivalences: 1 proved, 1 not run." in said
    shown(monkeypatch, PROVED, REFUTED)
    assert main(["check", "gpt"]) == 1
    out, err = capsys.readouterr()
    said = " ".join(out.split())
    assert "step 3, microbatch 1, 'a.weight', operation aten.mul.Tensor, in 'a', off by 12 ulp" in said
    assert "A number is kept aside." in said
    assert err == "instep: of recipe gpt is refuted: resume; see above.\n"


def test_the_document_has_a_stable_form(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    shown(monkeypatch, PROVED, REFUTED)
    assert main(["check", "gpt", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    docs = (Path(__file__).parents[2] / "docs" / "check.md").read_text()
    assert told["schema"] == 1
    assert all(f"`{key}`" in docs for key in told), told.keys()
    first, second = told["equivalences"]
    assert all(f"`{key}`" in docs for key in {**first, **first["compared"], **second["place"]})
    assert first["compared"] == {"tensors": 4, "steps": 4, "workers": [1, 2], "samples": 0}
    assert second["place"]["ulps"] == 12.0
    assert all(f"`{name}`" in docs for name in CLAIMS)


def test_a_gradient_that_is_no_number_is_as_far_off_as_can_be() -> None:
    sound, broken = torch.ones(3), torch.tensor([1.0, float("nan"), 1.0])
    for found, expected in ((sound, broken), (broken, sound), (broken, broken)):
        off = _off({"a": sound, "b": found}, {"a": sound, "b": expected})
        assert off == {"a": 0.0, "b": float("inf")}


def test_that_a_recipe_can_be_built_proves_nothing_of_it() -> None:
    def checked(*others: Equivalence) -> Checked:
        built = Equivalence("recipe", CLAIMS["recipe"], "proved")
        return Checked(recipe="r", fingerprint="f", equivalences=(built, *others), took_s=0, cpu_s=0, libraries={})

    assert not checked().proved
    assert not checked(Equivalence("memory", CLAIMS["memory"], "not run", why="no plan fits.")).proved
    assert checked(Equivalence("data", CLAIMS["data"], "proved", Compared(samples=8))).proved
    assert not checked(Equivalence("data", CLAIMS["data"], "refuted")).proved
