"""A plan: the described cluster, its timing beside simulations, its gradients, and what the command says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from instep.cli import main
from instep.clock.times import WorkerTimes
from instep.errors import RecipeError
from instep.offline.simulation import simulate
from instep.planning.course import Course, order_of, timing
from instep.planning.described import Description, read
from instep.planning.ways import usual_workers
from instep.rules.presets import parse
from instep.worker.replica import Replica
from support.workloads import gpt

CLUSTER = """
workers = 4
microbatch = "lognormal:100ms,40ms"
slow = "3:3x"
failures = "20s"
restart = "1s"
bandwidth = "1MB/s"
latency = "1ms"
update = "2ms"
checkpoint = "500ms"
"""

TINY = """
batch = 8
microbatches = 4
steps = 16
evaluate_samples = 8
model = { use = "instep.models.gpt:GPT", args = { vocabulary = 256, context = 16, width = 16, depth = 1, heads = 2 } }
objective = "instep.objectives.language:NextToken"
data = { use = "instep.data.text:text_files", args = { pattern = "text.txt", context = 16, held_out = 0.2 } }
optimizer = { use = "instep.optimizers:adamw", args = { lr = 1e-2 } }
"""


def described(tmp_path: Path, text: str = CLUSTER) -> Description:
    path = tmp_path / "cluster.toml"
    path.write_text(text)
    return read(path)


@pytest.mark.pure
@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "'cluster.workers' is missing"),
        ("workers = 0", "somebody has to train"),
        ("workers = -3", "it must be from 1 to"),
        ("workers = 2.5", "'cluster.workers' is 2.5"),
        ("workers = 2\nbandwith = '1Gb/s'", "unknown key 'cluster.bandwith'; did you mean 'bandwidth'?"),
        ("workers = 2\nspeeds = [1, -2]", "a speed must be above 0"),
        ("workers = 2\nspeeds = [1, 0]", "a speed must be above 0"),
        ("workers = 3\nspeeds = [1, 2]", "give one number for each worker"),
        ("workers = 2\nspeeds = [1, 2]\nslow = '1:2x'", "give one of them"),
        ("workers = 2\nslow = '5:2x'", "names no worker"),
        ("workers = 2\nmicrobatch = 'soon'", "'soon'"),
        ("workers = 2\nmicrobatch = '-1s'", "'-1s'"),
        ("workers = 2\npersistence = 0.5", "goes with a 'cluster.microbatch' that varies"),
        ("workers = 2\nfailures = 'daily'", "'cluster.failures' is 'daily'"),
        ("workers = 2\nfailures = '0s'", "the mean time between failures is 0 s"),
        ("workers = 2\nbandwidth = '1Gb'", "the bandwidth is '1Gb'"),
        ("workers = 2\nlatency = '1'", "the latency is '1'"),
        ("workers = 2\nupdate = 'x'", "'cluster.update' is 'x'"),
        ("workers = 2\ncheckpoint = '-1s'", "'cluster.checkpoint' is '-1s'"),
        ("workers = two", "is not valid TOML"),
    ],
)
def test_a_description_that_cannot_be_is_refused_in_a_sentence(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(RecipeError) as found:
        described(tmp_path, text)
    assert told in found.value.message
    assert "\n" not in str(found.value)


@pytest.mark.pure
def test_a_description_that_is_not_there_is_refused_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be read: No such file"):
        read(tmp_path / "none.toml")


@pytest.mark.pure
def test_fewer_workers_are_the_fastest_of_the_cluster() -> None:
    found = Description(workers=5, speeds=(0.5, 1.0, 2.0, 0.25, 1.0))
    assert found.fastest(3) == (1, 2, 4)
    times = found.cluster((1, 2, 3), 0.1, 0.0, 0).times
    assert isinstance(times, WorkerTimes)
    assert [times.draws(3)(worker) for worker in range(3)] == pytest.approx([0.1, 0.05, 0.4])
    assert usual_workers(found, 8) == [5, 1, 3]
    assert usual_workers(found, 2) == [2, 1]


@pytest.mark.pure
@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("nothing-like-it", "--target", "1"), "neither a built-in recipe nor a file"),
        (("gpt", "--target", "low"), "--target is 'low'"),
        (("gpt", "--target", "1", "--by", "money"), "--by is 'money'; it must be time or bytes."),
        (("gpt", "--target", "1", "--budget", "0"), "--budget is '0'"),
        (("gpt", "--target", "1", "--budget", "300%"), "--budget is '300%'"),
        (("gpt", "--target", "1", "--rules", "synchronus"), "did you mean 'synchronous'?"),
        (("gpt", "--target", "1", "--rules", "synchronous,team.balance=off"), "--rules sets team.balance"),
        (("gpt", "--target", "1", "--workers", "9"), "--workers is '9'"),
        (("gpt", "--target", "1", "--seeds", "0,0"), "--seeds is '0,0'"),
        (("gpt", "--target", "1", "--team.workers", "2"), "sets a real team"),
        (("gpt", "--target", "1", "--recipe.rule", "diloco:5"), "give --rules"),
    ],
)
def test_a_wrong_command_line_is_refused_before_anything_is_computed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], told: str
) -> None:
    described(tmp_path)
    assert main(["plan", *arguments, "--cluster", str(tmp_path / "cluster.toml")]) in (1, 2)
    told_of = capsys.readouterr().err
    assert told in told_of
    assert told_of.count("\n") == 1


@pytest.mark.processes
@pytest.mark.parametrize("rule", ["synchronous", "asynchronous", "diloco:2", "softsync:2"])
def test_a_course_is_timed_and_computed_as_a_simulation_is(rule: str, tmp_path: Path) -> None:
    recipe = gpt(rule=parse(rule), evaluate_every=2)
    cluster = described(tmp_path).cluster((0, 1, 2), 0.0, 0.0, 1)
    seen: list[dict[str, Any]] = []
    result = simulate(recipe, cluster, True, None, lambda event: seen.append(dict(event)))
    clock, course = timing(recipe, cluster, Replica(recipe, "cpu")), Course(recipe, cluster)
    course.to(1)
    assert 1 <= course.step < recipe.steps
    course.to(recipe.steps)
    assert course.ended
    evaluated = [event for event in seen if event["kind"] == "evaluated"]
    assert [objective for _, objective in course.points] == [event["objective"] for event in evaluated]
    assert [clock.seconds(step) for step, _ in course.points] == [event["t_s"] for event in evaluated]
    assert (clock.found.wall_s, clock.found.bytes_sent) == (result["wall_s"], result["bytes_sent"])
    assert clock.bytes(recipe.steps) == result["bytes_sent"]


@pytest.mark.processes
def test_runs_of_one_order_have_one_curve_whatever_the_cluster(tmp_path: Path) -> None:
    quick = Description(workers=3, microbatch="10ms", update="0")
    slow = Description(workers=3, microbatch="lognormal:1s,500ms", slow="1:3x", bandwidth="1MB/s", update="1ms")
    for rule in ("synchronous", "local_sgd:2", "diloco:2"):
        recipe = gpt(rule=parse(rule), evaluate_every=2)
        found = [each.cluster((0, 1, 2), 0.0, 0.0, 1) for each in (quick, slow)]
        courses = [Course(recipe, cluster) for cluster in found]
        for course in courses:
            course.to(recipe.steps)
        assert courses[0].points == courses[1].points
        assert order_of(recipe, found[0]) == order_of(recipe, found[1]) != ""
    recipe = gpt(rule=parse("asynchronous"))
    assert order_of(recipe, quick.cluster((0, 1, 2), 0.0, 0.0, 1)) == ""


def plan(tmp_path: Path, *arguments: str, cluster: str = CLUSTER) -> int:
    described(tmp_path, cluster)
    (tmp_path / "tiny.toml").write_text(TINY.replace("text.txt", str(tmp_path / "text.txt")))
    (tmp_path / "text.txt").write_text("in step and out of step, " * 200)
    return main(["plan", str(tmp_path / "tiny.toml"), "--cluster", str(tmp_path / "cluster.toml"), *arguments])


@pytest.mark.processes
def test_the_command_tells_what_to_run_within_its_budget(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--rules", "synchronous,asynchronous,diloco:2", "--seeds", "0,1", "--budget", "90%", "--json")
    assert plan(tmp_path, "--target", "4.5", *flags) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["schema"] == 1
    assert found["work"]["made"] <= found["work"]["allowed"] == int(0.9 * found["work"]["all"])
    assert found["work"]["made"] == sum(way["computed"] for way in found["ways"])
    pick = next(way for way in found["ways"] if way["label"] == found["pick"])
    assert pick["state"] == "reached"
    assert pick["label"] in found["pareto"]
    assert all((way["state"] == "reached") == bool(way["reached"]) for way in found["ways"])
    assert found["decided"] == (not found["undecided"])
    assert found["checkpoints"]["every_s"] > 0
    assert found["command"].startswith(f"instep train {tmp_path / 'tiny.toml'} --rule {pick['rule']} --workers ")
    least = min(each["seconds"] for way in found["ways"] for each in way["reached"] if each["seed"] == 0)
    assert next(each["seconds"] for each in pick["reached"] if each["seed"] == 0) <= 1.25 * least


@pytest.mark.processes
@pytest.mark.parametrize(
    ("rules", "more", "told"),
    [
        ("backup_workers:3", "", "there is no way to train on this cluster: 'rule.quorum' is 'all-3'"),
        ("local_sgd:2", "--recipe.data=planless:data", "nothing held out"),
        ("local_sgd:2", "--recipe.watch.spike=stop", "no way can be computed"),
    ],
)
def test_what_cannot_be_planned_is_told_in_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], rules: str, more: str, told: str
) -> None:
    (tmp_path / "planless.py").write_text("def data():\n    return [[1] * 16] * 64\n")
    flags = ("--target", "1", "--workers", "3", "--rules", rules, *filter(None, [more]))
    assert plan(tmp_path, *flags) == 1
    shown = capsys.readouterr().err
    assert told in shown
    assert shown.count("\n") == 1


@pytest.mark.processes
def test_a_target_that_nothing_reaches_is_told_in_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--target", "0.01", "--rules", "synchronous,asynchronous", "--workers", "2")
    assert plan(tmp_path, *flags, cluster="workers = 3") == 0  # times are measured here
    shown = " ".join(capsys.readouterr().out.split())
    assert "No way reached a held-out objective of 0.0100 within the budget; the lowest was" in shown
    assert "Run:" not in shown
