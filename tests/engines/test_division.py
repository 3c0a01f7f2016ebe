"""Ranges from step to step: when a decision holds, what it needs of memory, what is told of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from instep.engines import balance
from instep.engines.division import Division, Stopwatch, most_nodes
from instep.recipe import Team
from instep.reduce.layout import Layout
from instep.reduce.levels import levels_of
from instep.reduce.reduction import Reduction
from instep.reduce.tree import maximal_nodes
from support import workloads
from support.harness import train_here
from support.reference import reference_digests


def division(machines: list[int], microbatches: int = 16) -> Division:
    found = Division(Reduction(Layout((), (), (), 1, 1), microbatches, levels_of(machines)), None, machines)
    found.follow([16] * sum(machines))
    return found


@pytest.mark.pure
def test_no_range_has_more_nodes_than_there_is_memory_for() -> None:
    for microbatches in range(1, 40):
        sizes = [
            len(maximal_nodes(start, stop, microbatches))
            for start in range(microbatches)
            for stop in range(start, microbatches + 1)
        ]
        assert max(sizes) <= most_nodes(microbatches)
    assert [most_nodes(count) for count in (1, 2, 3, 4, 16, 1024)] == [1, 1, 2, 2, 6, 18]


@pytest.mark.pure
def test_what_is_decided_after_a_step_holds_from_the_next_but_one_on() -> None:
    found, told = division([2]), list[bool]()
    for _ in range(balance.FIRST_STEPS + 4):
        told.append(found.begin())
        found.decide([0.01, 0.04])
    at = balance.FIRST_STEPS + 2
    assert told == [step == at for step in range(len(told))]
    assert found.now.ranges == found.next.ranges == [(0, 13), (13, 16)]
    assert found.seconds == pytest.approx([0.01, 0.04])
    assert found.told() == {"moves": 1, "ranges": [[0, 13], [13, 16]]}


@pytest.mark.pure
def test_what_moves_stays_on_its_machine() -> None:
    found = division([2, 1, 2], 20)
    for _ in range(balance.FIRST_STEPS + 4):
        found.begin()
        found.decide([0.01, 0.04, 0.04, 0.04, 0.01])
    assert found.now.ranges == [(0, 7), (7, 8), (8, 12), (12, 13), (13, 20)]


@pytest.mark.pure
def test_ranges_for_which_memory_is_short_are_not_taken() -> None:
    found = Division(Reduction(Layout((), (), (), 1, 1), 16, 2), None, [2])
    found.follow([2, 2])
    for _ in range(balance.FIRST_STEPS + 4):
        found.begin()
        found.decide([0.01, 0.04])
    assert found.now.ranges == [(0, 8), (8, 16)], "13 are three nodes"


@pytest.mark.pure
def test_a_microbatch_takes_what_most_of_those_with_samples_took(monkeypatch: pytest.MonkeyPatch) -> None:
    advanced, now_s = list[float](), [0.0]
    monkeypatch.setattr("instep.engines.division.time.monotonic", lambda: now_s[0])
    watch = Stopwatch(lambda: advanced.append(now_s[0]))
    watch.begin()
    for seconds in (1.0, 1.25, 900.0, 0.0):
        now_s[0] += seconds
        watch.advance()
    assert len(advanced) == 4
    assert watch.seconds([True, True, True, False]) == 1.25
    assert watch.seconds([False] * 4) == 0.0


@pytest.mark.processes
def test_a_slow_worker_gets_less_and_the_tape_and_the_result_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a stopwatch that shows the same for every microbatch, whatever else the machine does. The smaller batch at the
    end of an epoch, step 8, is none to go by.
    """
    monkeypatch.setattr(Stopwatch, "seconds", lambda self, filled: 0.01 * any(filled))
    recipe = workloads.gpt(steps=16, batch=8, microbatches=8)
    run = train_here(recipe, Team(workers=2, slow="1:3x"), tmp_path / "auto")
    off = train_here(recipe, Team(workers=2, balance="off"), tmp_path / "off")
    torch.set_num_threads(1)
    assert run.digest == off.digest == reference_digests(recipe)[16]
    (moved,) = [event for event in run.events if event["kind"] == "ranges_moved"]
    assert (moved["version"], moved["ranges"]) == (balance.FIRST_STEPS + 3, [[0, 6], [6, 8]])
    assert moved["microbatch_s"] == pytest.approx([0.01, 0.03])
    assert (run.result["moves"], run.result["ranges"]) == (1, moved["ranges"])
    for version, spans in ((moved["version"] - 1, [[0, 4], [4, 8]]), (moved["version"], moved["ranges"])):
        computed = [e for e in run.events if e["kind"] == "computed" and e["version"] == version]
        assert {e["worker"]: e["microbatches"] for e in computed} == dict(enumerate(spans))
        merged = next(e for e in run.events if e["kind"] == "merged" and e["version"] == version + 1)
        assert [each["microbatches"] for each in merged["contributions"]] == spans
    assert (off.result["moves"], off.result["ranges"]) == (0, None)
    assert not [event for event in off.events if event["kind"] == "ranges_moved"]
