"""Runs for other tools: traces and tables that hold what the tape does."""

from __future__ import annotations

import csv
import json
import math
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from instep.cli import main
from support import runs

pytestmark = pytest.mark.pure


def restarted(path: Path) -> Path:
    """A run of two workers, one twice as slow, with an evaluation and a restart that takes an update back."""
    start = [runs.started(), *runs.joined(2.0, 0, 1), *runs.step(1, 2.0, 3.0, slow=0.2), *runs.step(2, 2.5, 9.0)]
    start += [runs.event("evaluated", 2.7, version=2, objective=9.0, terms={"a": 9.0}, items=5)]
    start += [runs.event("left", 2.8, worker=1, why="worker 1 was killed by SIGKILL.")]
    again = [runs.started(t_s=3.0, resumed=True, version=1), *runs.joined(3.5, 0, 1), *runs.step(2, 3.5, 2.0)]
    again += [runs.event("evaluated", 3.8, version=2, objective=2.5, terms={"a": 2.5}, items=5)]
    return runs.folder(path, [*start, *again, *runs.step(3, 4.0, None), runs.ended(3, 5.0)])


def test_a_trace_has_every_worker_and_no_two_slices_at_once(tmp_path: Path) -> None:
    out = tmp_path / "trace.json"
    assert main(["export", str(restarted(tmp_path / "run")), "--to", "perfetto", "--out", str(out)]) == 0
    events: list[dict[str, Any]] = json.loads(out.read_text())["traceEvents"]
    names = [event["args"]["name"] for event in events if event["name"] == "thread_name"]
    assert names == ["worker 0", "worker 1"]
    by_thread = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            by_thread[event["tid"]].append(event)
    assert by_thread.keys() == {1, 2}
    for slices in by_thread.values():
        assert all(one["ts"] + one["dur"] <= other["ts"] for one, other in pairwise(slices))
        assert {each["name"] for each in slices} == {"computing", "communicating", "waiting"}
    computed = [each["dur"] for each in by_thread[2] if each["name"] == "computing"]
    assert computed == pytest.approx([2e5, 1e5, 1e5, 1e5], abs=2)
    assert [(event["tid"], event["name"]) for event in events if event["ph"] == "i"] == [
        (1, "joined"), (2, "worker 1 was killed by SIGKILL."), (2, "joined"),
    ]  # fmt: skip
    assert [event["args"] for event in events if event["name"] == "held-out objective"] == [{"held out": 2.5}]


def test_a_table_has_a_row_for_each_update_that_counts(tmp_path: Path) -> None:
    run, out = restarted(tmp_path / "run"), tmp_path / "updates.csv"
    assert main(["export", str(run), "--to", "csv", "--out", str(out)]) == 0
    rows = list(csv.DictReader(out.open()))
    assert [row["version"] for row in rows] == ["1", "2", "3"]
    assert [row["objective"] for row in rows] == ["3.0", "2.0", ""]
    assert [row["held_out"] for row in rows] == ["", "2.5", ""]
    assert [row["held_out_terms.a"] for row in rows] == ["", "2.5", ""]
    assert {row["contributions"] for row in rows} == {"2"}


def test_parquet_holds_what_csv_does(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    run = restarted(tmp_path / "run")
    for form in ("csv", "parquet"):
        assert main(["export", str(run), "--to", form, "--out", str(tmp_path / form)]) == 0
    table = parquet.read_table(tmp_path / "parquet").to_pylist()
    rows = list(csv.DictReader((tmp_path / "csv").open()))
    assert len(table) == len(rows) == 3
    for row, other in zip(table, rows, strict=True):
        assert row.keys() == other.keys()
        for name, value in row.items():
            assert other[name] == "" if value is None else math.isclose(float(other[name]), value)


def test_the_file_lies_beside_the_run_and_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    restarted(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    assert main(["export", "run", "--to", "csv"]) == 0
    assert capsys.readouterr().out == "run.csv\n"
    assert (tmp_path / "run.csv").is_file()


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("run --to parket", "--to is 'parket'; did you mean 'parquet'?"),
        ("run --to x", "--to is 'x'; a run is exported to perfetto, csv, parquet, hf."),
        ("nowhere --to csv", "there is no folder nowhere; give the folder of a run"),
        ("run --to csv --out no/x.csv", "--out 'no/x.csv' lies in a folder that is not there"),
        ("run --to csv --out run", "--out 'run' is a folder; name a file in it, such as run/run.csv."),
        ("begun --to csv", "the run in begun has no event on its tape yet; wait until it trains, then try again."),
        ("begun --to perfetto", "the run in begun has no event on its tape yet"),
        ("empty --to csv", "the run in empty has no event on its tape yet"),
    ],
)
def test_bad_input_to_export_is_a_sentence(
    given: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    restarted(tmp_path / "run")
    runs.folder(tmp_path / "empty", [])
    runs.folder(tmp_path / "begun", []).joinpath("tape.jsonl").unlink()
    monkeypatch.chdir(tmp_path)
    assert main(["export", *given.split()]) in (1, 2)
    assert sentence in capsys.readouterr().err
