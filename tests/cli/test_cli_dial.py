"""The commands of the dial: train --rule and --slow, replay, simulate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from instep import Cluster, api, rules
from instep import api as alone
from instep.cli import main
from instep.clock.times import WorkerTimes
from instep.recipe import Recipe, Team
from instep.record.result import Proof, Replayed

FILE = 'model = "m:M"\nobjective = "m:o"\ndata = "m:d"\nmicrobatches = 4\nbatch = 4\n'


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my.toml").write_text(FILE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the stand-ins were called with."""
    seen: dict[str, Any] = {}

    def train(recipe: Recipe, *, team: Team, **rest: Any) -> None:
        seen.update(recipe=recipe, team=team)

    def simulate(recipe: Recipe, cluster: Cluster, **rest: Any) -> None:
        seen.update(recipe=recipe, cluster=cluster, **rest)

    monkeypatch.setattr(api, "train", train)
    monkeypatch.setattr(alone, "simulate", simulate)
    return seen


def refused(capsys: pytest.CaptureFixture[str], line: str) -> str:
    """The sentence that a wrong command line ends in."""
    assert main(line.split()) != 0
    err = capsys.readouterr().err
    assert err.startswith("instep: ")
    assert err.count("\n") == 1, err
    return err


def test_a_rule_and_slow_workers_on_the_command_line(called: dict[str, Any]) -> None:
    assert main(["train", "my.toml", "--rule", "diloco:20,outer_lr=0.5", "--workers", "2", "--slow", "1:4x"]) == 0
    assert called["recipe"].rule == rules.parse("diloco:20,outer_lr=0.5")
    assert called["recipe"].rule.outer_lr == 0.5
    assert called["team"].slow == "1:4x"


def test_a_field_of_the_rule_beside_it_on_the_command_line(called: dict[str, Any]) -> None:
    for flag in ("--rule.fragments", "--recipe.rule.fragments"):
        assert main(["train", "my.toml", "--rule", "diloco:20", flag, "4", "--rule.outer-lr", "0.5"]) == 0
        assert called["recipe"].rule == rules.parse("diloco:20,fragments=4,outer_lr=0.5")
    assert main(["train", "my.toml", "--rule", "diloco:20", "--rule.overlap", "5", "--rule.mix", "0.25"]) == 0
    assert called["recipe"].rule == rules.parse("diloco:20,overlap=5,mix=0.25")


def test_a_rule_in_a_file_as_text_or_as_a_table(called: dict[str, Any], here: Path) -> None:
    (here / "text.toml").write_text(FILE + 'rule = "bounded_staleness:3"\n')
    assert main(["train", "text.toml"]) == 0
    assert called["recipe"].rule == rules.parse("bounded_staleness:3")
    (here / "table.toml").write_text(FILE + '[rule]\nname = "mine"\nquorum = "1"\nmax_lead = 3\n')
    assert main(["train", "table.toml"]) == 0
    assert called["recipe"].rule == rules.UpdateRule(name="mine", quorum="1", max_lead=3)


def test_simulate_by_the_letter(called: dict[str, Any]) -> None:
    line = "simulate my.toml --rule asynchronous --workers 1000 --slow 5%:4x --bandwidth 1Gb/s --latency 1ms"
    assert main([*line.split(), "--times", "normal:100ms,20ms", "--persistence", "0.5", "--no-gradients"]) == 0
    cluster = called["cluster"]
    assert cluster.workers == 1000
    assert cluster.network.bandwidth_bytes_per_s == 125e6
    assert cluster.network.latency_s == 0.001
    assert isinstance(cluster.times, WorkerTimes)
    assert (cluster.times.mean_s, cluster.times.deviation_s, cluster.times.persistence) == (0.1, 0.02, 0.5)
    assert [part.text for part in cluster.times.slow] == ["5%:4x"]
    assert called["gradients"] is False


@pytest.mark.parametrize(
    ("rule", "steps"), [("asynchronous", 50), ("local_sgd:8", 400), ("post_local_sgd:8,after=10", 330)]
)
def test_contributions_of_each_worker_give_the_steps(called: dict[str, Any], rule: str, steps: int) -> None:
    # 2 workers with 50 contributions make 100 pieces, 2 to a group: 50 groups.
    assert main(["simulate", "my.toml", "--rule", rule, "--workers", "2", "--contributions", "50"]) == 0
    assert called["recipe"].steps == steps


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("train my.toml --rule asynchronus", "did you mean 'asynchronous'?"),
        ("train my.toml --rule diloco:0", "local_steps' is 0"),
        ("train my.toml --rule diloco:x", "must be a whole number"),
        ("train my.toml --rule asynchronous,max_led=2", "did you mean 'max_lead'?"),
        ("simulate my.toml --bandwidth 0Gb/s", "bandwidth is 0"),
        ("simulate my.toml --bandwidth fast", "'fast'"),
        ("simulate my.toml --latency 5", "'5'"),
        ("simulate my.toml --workers 0", "--workers is 0"),
        ("simulate my.toml --failures 1h", "--failures and --persistence go with --times"),
        ("simulate my.toml --times 1s --restart 5s", "it goes with --failures"),
        ("simulate my.toml --batched --no-gradients", "leave one out"),
        ("simulate my.toml --steps 3 --contributions 4", "give one of them"),
        ("simulate my.toml --contributions 0", "--contributions is 0"),
        ("simulate my.toml --team.workers 4", "--team.workers sets a real team"),
        ("simulate nothing", "neither a built-in recipe nor a file"),
        ("replay nothing", "nothing"),
        ("replay nothing --out x", "--out goes with --rule"),
    ],
)
def test_what_is_wrong_is_one_sentence(capsys: pytest.CaptureFixture[str], line: str, words: str) -> None:
    assert words in refused(capsys, line)


def test_a_replay_says_whether_it_is_exact(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alone, "replay", lambda run: Replayed("ab" * 32, "ab" * 32, 7, "", Proof(1, 7, 21)))
    assert main(["replay", "run"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "versions  7",
        f"digest    {'ab' * 32}",
        "compared  21 contributions, 7 updates and 1 checkpoint",
        "The run's own digest: the replay is exact.",
    ]
    monkeypatch.setattr(alone, "replay", lambda run: Replayed("cd" * 32, "ab" * 32, 7, "version 3 differs in 'w'."))
    assert "version 3 differs in 'w'" in refused(capsys, "replay run")
    capsys.readouterr()
    monkeypatch.setattr(alone, "replay", lambda run: Replayed("cd" * 32, None, 7, "", Proof(0, 7)))
    said = refused(capsys, "replay run")
    assert "the run run never ended, so the tape has no digest to compare with; 7 updates" in said


@pytest.mark.processes
@pytest.mark.slow
def test_simulate_and_replay_for_real(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    line = "simulate gpt --rule bounded_staleness:2 --workers 3 --slow 1:4x --times 50ms --steps 3 --out sim"
    extra = ["--recipe.evaluate_samples", "8", "--recipe.sample_length", "0"]
    assert main([*line.split(), *extra]) == 0
    assert "bounded_staleness:2, by the virtual engine" in capsys.readouterr().out
    assert main(["replay", "sim"]) == 0
    assert "the replay is exact" in capsys.readouterr().out
    assert main(["replay", "sim", "--rule", "diloco:2", "--out", "other"]) == 0
    assert "diloco:2, by the virtual engine" in capsys.readouterr().out
