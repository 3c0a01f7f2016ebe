"""Who wins: targets, seeds, labels, and the sentences on them."""

from __future__ import annotations

from pathlib import Path

import pytest

from instep.report.comparison import Comparison, compare, differences, doubts, facts, verdict
from instep.report.document import document
from instep.report.reading import read, read_all
from support import runs

pytestmark = pytest.mark.pure

FALLING = [3.0 - 0.1 * step for step in range(1, 26)]


def found_of(*paths: Path, target: float | None = None) -> Comparison:
    return compare(read_all(paths), target)


def test_the_first_to_the_target_wins_and_synchronous_may(tmp_path: Path) -> None:
    slow = runs.curve(tmp_path / "a", "asynchronous", FALLING, step_s=0.3)
    fast = runs.curve(tmp_path / "s", "synchronous", FALLING, step_s=0.2)
    found = found_of(slow, fast, target=2.0)
    assert [group.to_target("seconds").mean for group in found.groups] == pytest.approx([10 * 0.3, 10 * 0.2])  # type: ignore[union-attr]
    assert verdict(found).startswith(
        "synchronous wins: it reached a held-out objective of 2.0000 first, after 2.0 s; asynchronous took 1.5 times "
        "as long, 3.0 s."
    )
    slower = runs.curve(tmp_path / "t", "synchronous", FALLING, step_s=0.4)
    assert verdict(found_of(slower, slow, target=2.0)).startswith(
        "asynchronous reached a held-out objective of 2.0000 first, after 3.0 s; synchronous took 1.3 times as long, "
        "4.0 s."
    )


def test_the_target_is_the_highest_end_of_those_near_the_best(tmp_path: Path) -> None:
    paths = [
        runs.curve(tmp_path / "s", "synchronous", [3.0, 2.0, 1.0]),
        runs.curve(tmp_path / "a", "asynchronous", [3.0, 2.0, 1.05]),
        runs.curve(tmp_path / "d", "diloco:20", [3.0, 2.5, 2.0]),
    ]
    found = found_of(*paths)
    assert found.target == 1.05
    assert [group.reached for group in found.groups] == [1, 1, 0]
    assert "diloco" not in verdict(found).partition(".")[0]


def test_seeds_of_one_rule_are_one_row_with_their_spread(tmp_path: Path) -> None:
    paths = [
        runs.curve(tmp_path / f"s{seed}", "synchronous", [value + 0.1 * seed for value in FALLING], seed=seed)
        for seed in range(3)
    ]
    (group,) = found_of(*paths, target=2.0).groups
    assert len(group.runs) == 3
    assert group.final is not None
    assert (group.final.low, group.final.mean, group.final.high) == pytest.approx((0.5, 0.6, 0.7))
    seconds = group.to_target("seconds")
    assert seconds is not None
    assert (seconds.low, seconds.high) == pytest.approx((0.2 * 10, 0.2 * 12))


def test_seeds_that_overlap_do_not_tell_rules_apart(tmp_path: Path) -> None:
    paths = [
        runs.curve(tmp_path / f"{rule}{seed}", rule, FALLING, seed=seed, step_s=0.2 + step + 0.1 * seed)
        for rule, step in (("synchronous", 0.0), ("asynchronous", 0.05)) for seed in range(2)
    ]  # fmt: skip
    assert "which these seeds do not tell apart" in verdict(found_of(*paths, target=2.0))


def test_what_no_rule_reaches_is_said(tmp_path: Path) -> None:
    paths = [runs.curve(tmp_path / rule, rule, FALLING) for rule in ("synchronous", "asynchronous")]
    found = found_of(*paths, target=0.01)
    assert verdict(found) == "No rule reached a held-out objective of 0.0100."
    assert [rule["time_to_target_s"] for rule in document(found)["rules"]] == [None, None]


def test_runs_under_one_rule_are_told_apart_by_what_differs(tmp_path: Path) -> None:
    team = {"workers": 3, "device": "cpu", "restarts": 3, "slow": ""}
    paths = [
        runs.curve(tmp_path / "two", "diloco:20", FALLING),
        runs.curve(tmp_path / "three", "diloco:20", FALLING, team=team),
        runs.curve(tmp_path / "again", "diloco:20", FALLING, team=team),
        runs.curve(tmp_path / "s", "synchronous", FALLING),
    ]
    assert [group.label for group in found_of(*paths).groups] == [
        "diloco:20, workers 2", "diloco:20, workers 3, three", "diloco:20, workers 3, again", "synchronous",
    ]  # fmt: skip
    names = [name for name, _ in differences([read(path) for path in paths])]
    assert "team.workers" in names
    assert any("The runs differ in more than the rule: team.workers" in doubt for doubt in doubts(found_of(*paths)))


def test_a_reader_is_told_what_makes_a_verdict_doubtful(tmp_path: Path) -> None:
    short = runs.curve(tmp_path / "d", "diloco:20", [3.0, 2.0])
    still = runs.folder(
        tmp_path / "s", [runs.started(clock="virtual"), *runs.joined(2.0, 0, 1), *runs.step(1, 2.0, 3.0)]
    )
    told = " ".join(doubts(found_of(short, still)))
    for part in (
        "diloco:20 made only 2 updates of the weights; with fewer than 20 a rule has hardly begun",
        f"The run in {still} is going on or killed.", "seconds of a virtual clock and some of the wall clock",
        "Each rule ran with one seed",
    ):  # fmt: skip
        assert part in told
    assert facts(found_of(short)) == "1 run of 100 steps by 2 workers, 0.4 s on the wall clock, 1 seed."


def test_few_evaluations_leave_the_target_to_the_training_objective(tmp_path: Path) -> None:
    events = [runs.started(), *runs.joined(2.0, 0, 1)]
    for version in range(1, 31):
        events += runs.step(version, 2.0 + version, 3.0 - version / 20)
    path = runs.folder(tmp_path / "s", [*events, runs.ended(30, 40.0)])
    found = found_of(path, target=2.0)
    assert (found.what, found.final_what) == ("training objective", "training objective")
    assert [cost.items for cost in found.groups[0].costs if cost] == [8 * 20]


def test_the_document_has_every_run_in_full(tmp_path: Path) -> None:
    path = runs.curve(tmp_path / "s", "synchronous", FALLING)
    told = document(found_of(path, target=2.0))
    assert told["schema"] == 1
    assert told["target"] == {"objective": 2.0, "of": "held-out objective", "chosen": True}
    (run,) = told["rules"][0]["runs"]
    assert (run["updates"], run["items"], run["state"], run["staleness"]) == (25, 200, "ended", {"0": 25})
    assert [point["objective"] for point in run["held_out"]] == FALLING


def test_synchronous_with_ranges_that_follow_speed_and_held_equal_are_told_apart(tmp_path: Path) -> None:
    team = {"workers": 2, "device": "cpu", "restarts": 3, "slow": "1:4x"}
    moved = runs.curve(tmp_path / "m", "synchronous", FALLING, step_s=0.2, team=team | {"balance": "auto"})
    equal = runs.curve(tmp_path / "e", "synchronous", FALLING, step_s=0.4, team=team | {"balance": "off"})
    free = runs.curve(tmp_path / "a", "asynchronous", FALLING, step_s=0.3, team=team | {"balance": "auto"})
    found = found_of(moved, equal, free, target=2.0)
    labels = ["synchronous, ranges balanced", "synchronous, ranges equal", "asynchronous"]
    assert [group.label for group in found.groups] == labels
    assert verdict(found).startswith(
        "synchronous, ranges balanced wins: it reached a held-out objective of 2.0000 first, after 2.0 s; asynchronous "
        "took 1.5 times as long, 3.0 s."
    )
    told = verdict(found_of(equal, free, target=2.0))
    assert "asynchronous reached a held-out objective of 2.0000 first, after 3.0 s; synchronous took 1.3 times" in told
    assert not [doubt for doubt in doubts(found) if "differ in more" in doubt]


def test_one_worker_and_two_are_told_apart_by_their_number_alone(tmp_path: Path) -> None:
    paths = [
        runs.curve(tmp_path / str(workers), "synchronous", FALLING, team={"workers": workers, "balance": "auto"})
        for workers in (1, 2)
    ]
    assert [group.label for group in found_of(*paths).groups] == ["synchronous, workers 1", "synchronous, workers 2"]


def test_runs_with_budgets_of_memory_are_told_apart_by_them(tmp_path: Path) -> None:
    team = {"workers": 2, "device": "cpu", "restarts": 3, "slow": ""}
    paths = [
        runs.curve(tmp_path / name, "synchronous", FALLING, team=team | {"memory": name}) for name in ("80%", "60%")
    ]
    assert [group.label for group in found_of(*paths).groups] == ["synchronous, memory 80%", "synchronous, memory 60%"]


def test_runs_of_other_recipes_are_told_apart_by_their_names_or_folders(tmp_path: Path) -> None:
    other = runs.started()["recipe"] | {"name": "large", "batch": 16, "microbatches": 8, "clip_norm": 1.0}
    unnamed = other | {"name": "tiny", "clip_norm": 2.0, "ragged": "spread"}
    first = runs.curve(tmp_path / "a", "synchronous", FALLING)
    second = runs.curve(tmp_path / "b", "synchronous", FALLING, recipe=other)
    assert [group.label for group in found_of(first, second).groups] == ["synchronous, tiny", "synchronous, large"]
    third = runs.curve(tmp_path / "c", "synchronous", FALLING, recipe=unnamed)
    assert [group.label for group in found_of(first, third).groups] == ["synchronous, a", "synchronous, c"]
