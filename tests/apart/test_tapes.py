"""The first level of `instep diff`: what tapes alone show, and what is refused in a sentence."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from instep.apart.levels import fields_apart, seen_apart
from instep.apart.told import Told, take, told
from instep.cli import main
from instep.recipe import Recipe
from instep.tables import as_saved
from support.runs import ended, event, folder, joined, merged, started
from support.sentences import one_sentence

pytestmark = pytest.mark.pure

GOLDEN = Path(__file__).parents[1] / "golden" / "folders"


def run(path: Path, *, sums: dict[int, str], objective: float = 1.0, tail: str = "", **start: Any) -> Path:
    """A run of 4 updates; `sums` are checksums of its one tensor by version."""
    events = [started(**{"digest": "0" * 64, **start}), *joined(1.0, 0, 1)]
    for version in range(1, 5):
        events.append(merged(version, 1.0 + version, objective if version == 3 else 2.0))
        if version in sums:
            told = {"weights": {"layer.weight": sums[version]}, "optimizer": {}, "took_s": 0.0}
            events.append(event("checksummed", 1.0 + version, version=version, **told))
    return folder(path, [*events, *([] if tail else [ended(4, 9.0)])], tail=tail)


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    status = main(["diff", *words])
    out = capsys.readouterr()
    lines = [line for line in out.out.splitlines() if "/" not in line]  # a path is not broken, however long
    assert max(map(len, lines), default=0) <= 80
    return status, out.out, out.err


SAME = {2: "0" * 8, 4: "1" * 8}


def test_equal_tapes_say_so_with_a_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = run(tmp_path / "a", sums=SAME), run(tmp_path / "b", sums=SAME, cut=3, team={"workers": 3, "device": "cpu"})
    status, out, err = shown(capsys, str(a), str(b))
    assert (status, err) == (0, "")
    assert " ".join(out.split()).endswith(
        "The runs are the same: 1 tensor in 2 versions, 4 updates, 2 digests compared."
    )


def test_the_first_version_that_differs_is_named_with_the_last_that_does_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = run(tmp_path / "a", sums=SAME), run(tmp_path / "b", sums={2: "0" * 8, 4: "7" * 8})
    status, out, err = shown(capsys, str(a), str(b), "--tapes")
    text = " ".join(out.split())
    assert status == 1
    assert "tensors 1, in 2 versions (2, 4); in 4 differs 'layer.weight'" in text
    assert "the tapes part in update 4, in 'layer.weight'; all that was compared up to version 2 is the same" in text
    assert one_sentence(err.strip())


def test_figures_part_where_checksums_are_not_yet_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = run(tmp_path / "a", sums=SAME), run(tmp_path / "b", sums=SAME, objective=1.5)
    status = main(["diff", str(a), str(b), "--tapes", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert status == 1
    assert (found["verdict"], found["tapes"]["alike"], found["tapes"]["first"]) == ("undecided", 2, 3)
    assert found["tapes"]["what"] == ["objective"]


def test_recipes_are_compared_field_by_field_and_the_rest_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = run(tmp_path / "a", sums=SAME)
    b = run(tmp_path / "b", sums={2: "9" * 8}, seed=1, data_digest="e" * 64, libraries={"torch": "2.12.1"})
    status, out, _ = shown(capsys, str(a), str(b), "--tapes")
    text = " ".join(out.split())
    assert status == 1
    for line in ("recipe.seed: 0 in A, 1 in B", "data other training data", "torch: '2.13.0' in A, '2.12.1' in B"):
        assert line in text, line
    assert "The recipes differ, in recipe.seed; the tapes part in update 2" in text


def test_a_tape_that_is_still_written_is_compared_as_far_as_it_goes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = run(tmp_path / "a", sums=SAME), run(tmp_path / "b", sums=SAME, tail='{"kind": "mer')
    status, out, _ = shown(capsys, str(a), str(b))
    assert status == 0
    assert "B " in out
    assert "not ended" in out


def test_of_runs_of_two_lengths_the_sentence_says_up_to_where(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = run(tmp_path / "a", sums=SAME), run(tmp_path / "b", sums=SAME)
    lines = (b / "tape.jsonl").read_text().splitlines()
    kept = [line for line in lines if '"version": 4' not in line and "run_ended" not in line]
    (b / "tape.jsonl").write_text("\n".join(kept) + "\n")
    status, out, _ = shown(capsys, str(a), str(b))
    assert status == 0
    assert "The runs are the same up to version 3, the last that both have: 1 tensor" in " ".join(out.split())


def test_a_tape_of_before_lacks_fields_and_is_of_the_same_recipe(tmp_path: Path) -> None:
    old = told(GOLDEN / "lockstep")
    new = copy.deepcopy(old)
    new.starts = [{**start, "recipe": as_saved(Recipe, start["recipe"])} for start in new.starts]
    assert new.start["recipe"] != old.start["recipe"]
    assert fields_apart(old, new) == []


@pytest.mark.parametrize(("name", "decides"), [("synchronous", False), ("asynchronous", True)])
def test_who_sent_what_parts_no_runs_whose_updates_it_does_not_decide(name: str, decides: bool) -> None:
    one = told(GOLDEN / name)
    other = copy.deepcopy(one)
    other.arrivals = {version: [(9, *rest) for _, *rest in found] for version, found in one.arrivals.items()}
    assert (seen_apart(one, other).first is not None) == decides


def test_one_run_alone_has_no_other_tape(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = shown(capsys, str(run(tmp_path / "a", sums=SAME)), "--tapes")
    assert (status, out) == (2, "")
    assert one_sentence(err.strip())


def test_a_file_that_was_changed_is_refused_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, file = run(tmp_path / "a", sums=SAME), tmp_path / "file"
    table = asdict(told(a)) | {"starts": [{"recipe": {}}]}
    file.write_text(json.dumps({"kind": "a run for instep diff", "schema": 1, "told": table}))
    status, _, err = shown(capsys, str(a), str(file))
    assert status == 1
    assert one_sentence(err.strip())


@pytest.mark.parametrize("place", ["none", "empty", "file"])
def test_what_is_no_run_is_refused_in_one_sentence(
    place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = run(tmp_path / "a", sums=SAME)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("no run")
    status, out, err = shown(capsys, str(a), str(tmp_path / place))
    assert (status, out) == (1, "")
    assert one_sentence(err.strip())
    assert place in err


def test_a_damaged_tape_is_compared_up_to_the_damage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = run(tmp_path / "a", sums=SAME), run(tmp_path / "b", sums=SAME)
    lines = (b / "tape.jsonl").read_text().splitlines()
    (b / "tape.jsonl").write_text("\n".join([*lines[:6], "{nonsense", *lines[7:]]) + "\n")
    status, out, _ = shown(capsys, str(a), str(b))
    assert status == 0
    assert "line 7 of the tape" in " ".join(out.split())


def test_a_field_that_decides_nothing_is_said_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = run(tmp_path / "a", sums=SAME)
    recipe = started()["recipe"] | {"checksum_every": 7}
    b = run(tmp_path / "b", sums=SAME, recipe=recipe)
    status, out, _ = shown(capsys, str(a), str(b))
    assert status == 0
    assert "recipe.checksum_every: 50 in A, 7 in B (decides nothing)" in out


def test_contributions_that_a_later_start_took_back_are_none_of_the_update() -> None:
    def pushed(worker: int, version: int) -> dict[str, Any]:
        return event("pushed", 1.0, worker=worker, version=version, bytes=4, items=1, checksum=["0" * 8])

    found = Told("run")
    take(
        found,
        [started(), pushed(0, 0), pushed(1, 0), merged(1, 1.0, 1.0), pushed(0, 1), pushed(1, 1), merged(2, 2.0, 1.0)],
    )
    take(found, [started(version=1), pushed(0, 1), merged(2, 3.0, 1.0)])
    assert {version: sorted(workers) for version, workers in found.pushed.items()} == {1: [0, 1], 2: [0]}
