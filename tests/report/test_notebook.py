"""What a notebook shows of a run: figures as its tape has them, valid markup, and nothing that is run."""

from __future__ import annotations

import html
import sys
from xml.etree import ElementTree

import pytest

from instep.errors import ResourceError
from instep.recipe import Team
from instep.record import tape
from instep.report.notebook import shown_run
from instep.run import Run, RunElsewhere
from support import workloads
from support.harness import train_here

pytestmark = pytest.mark.processes

SVG = "{http://www.w3.org/2000/svg}svg"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    recipe = workloads.convnet(evaluate_every=3)
    path = tmp_path_factory.mktemp("notebook") / "a & <b>"
    return Run(path, train_here(recipe, Team(workers=1), path).result, recipe)


def test_curves_are_a_data_frame_of_the_tape(run: Run) -> None:
    pandas = pytest.importorskip("pandas")
    events = list(tape.read(run.path / "tape.jsonl"))
    merges = tape.latest(events)
    frame = run.curves()
    assert isinstance(frame, pandas.DataFrame)
    assert frame.index.name == "version"
    assert frame.index.to_list() == [event["version"] for event in merges]
    assert frame["objective"].to_list() == [event["objective"] for event in merges]
    told = frame["held_out"].dropna()
    assert dict(told) == {e["version"]: e["objective"] for e in events if e["kind"] == "evaluated" and e["version"] > 0}
    assert frame.reset_index().to_dict("records")[0]["lr"] == run.updates()[0]["lr"]


def test_without_pandas_it_is_a_sentence(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ResourceError, match=r"pip install pandas; run.updates\(\) gives the same rows without"):
        run.curves()


def test_a_notebook_shows_the_figures_and_the_curve(run: Run) -> None:
    pytest.importorskip("matplotlib")
    shown = run._repr_html_()
    ElementTree.fromstring(shown)  # it is well formed, with the folder's name escaped
    assert run.digest in shown
    assert f"{run.held_out:.4f}" in shown
    assert html.escape(str(run.path)) in shown
    assert "<script" not in shown
    assert len(list(ElementTree.fromstring(shown).iter(SVG))) == 1
    assert len(shown) < 100_000


def test_without_matplotlib_or_the_folder_it_is_the_table(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = RunElsewhere(1, run.result, run.recipe, ())._repr_html_()
    assert run.digest in elsewhere
    assert "<svg" not in elsewhere
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    shown = run._repr_html_()
    assert run.digest in shown
    assert "<svg" not in shown


def test_a_long_curve_is_thinned_and_what_was_not_evaluated_is_left_out(run: Run) -> None:
    pytest.importorskip("matplotlib")
    rows = [{"version": v, "objective": 1 / v, "held_out": None} for v in range(1, 100_001)]
    shown = shown_run({**run.result, "held_out": None}, rows, "")
    assert len(shown) < 100_000
    assert "held out" not in shown
    assert "run folder" not in shown
