"""``instep team``: what it shows of a run that goes on, and of one that does not."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from instep.cli import main, team
from instep.errors import WorkerError
from instep.record.folder import About, RunFolder
from instep.record.tape import Tape

pytestmark = pytest.mark.pure


def member(worker: int | None, **more: Any) -> dict[str, Any]:
    return {
        "worker": worker, "name": f"worker {worker}", "host": 0, "host_name": "node0", "pid": 1000, "since_s": 1.0,
        "for_s": 61.0, "microbatches_per_s": 5.0, "samples_per_s": 1234.0, "doing": "computing step 42, microbatch 3",
        "doing_for_s": 4.04, "stopped": False, "waits_for": [], "waits_for_s": None, **more,
    }  # fmt: skip


def table(*members: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "schema": 1, "run": "runs/gpt", "state": "training", "t_s": 62.0, "engine": "lockstep", "step": 41,
        "steps": 300, "version": 41, "restarts": 0, "members": list(members), "left": [], **more,
    }  # fmt: skip


def test_a_team_on_one_host_is_a_line_each_that_fits_a_usual_terminal() -> None:
    waits = {"waits_for": ["worker 1", "worker 2"], "waits_for_s": 12.3}
    left = [{"worker": 3, "t_s": 9.0, "why": f"worker 3 (pid {pid}) was killed by SIGKILL."} for pid in range(7)]
    team_of_4 = [member(0, **waits), member(1), member(2, stopped=True), member(3, doing="", samples_per_s=None)]
    found = list(team.lines(table(*team_of_4, restarts=1, left=left)))
    assert found[:6] == [
        "runs/gpt: training, step 41 of 300, version 41, 1:02, 1 restart",
        "worker      pid    there  samples/s  now",
        "0          1000     1:01      1,234  waits for worker 1 and 1 more, for 12 s",
        "1          1000     1:01      1,234  computing step 42, microbatch 3, for 4.0 s",
        "2          1000     1:01      1,234  stopped (SIGSTOP or a debugger)",
        "3          1000     1:01             starting, for 4.0 s",
    ]
    assert found[6:] == [f"left at 0:09: worker 3 (pid {pid}) was killed by SIGKILL." for pid in range(2, 7)]
    assert max(map(len, found)) < 80


def test_hosts_are_shown_where_there_are_several_and_a_server_by_its_name() -> None:
    found = list(team.lines(table(member(0), member(1, host=1, host_name="node1"), member(None, doing="done"))))
    assert found[1:] == [
        "worker  host      pid    there  samples/s  now",
        "0          0     1000     1:01      1,234  computing step 42, microbatch 3, for 4.0 s",
        "1          1     1000     1:01      1,234  computing step 42, microbatch 3, for 4.0 s",
        "server     0     1000     1:01      1,234  done",
        "host 1 is node1",
    ]


def test_loaders_are_a_line_each_that_fits_a_usual_terminal() -> None:
    reads = loader(0, doing="reading step 1,044, microbatch 15")
    team_of_1 = [member(0)], [reads, loader(1, died=2), loader(2, stopped=True)]
    found = list(team.lines(table(*team_of_1[0], loaders=team_of_1[1])))
    assert found[3:] == [
        "loader      pid     read      ahead  now",
        "0          2000    1,328         12  reading step 1,044, microbatch 15",
        "1          2000    1,328         12  waits until more is wanted; 2 died before",
        "2          2000    1,328         12  stopped (SIGSTOP or a debugger)",
    ]
    assert max(map(len, found)) <= 80
    over_hosts = [member(0), member(1, host=1, host_name="node1")], [loader(0), loader(1, host=1)]
    found = list(team.lines(table(*over_hosts[0], loaders=over_hosts[1])))
    assert found[4:] == [
        "loader  host      pid     read      ahead  now",
        "0          0     2000    1,328         12  waits until more is wanted",
        "1          1     2000    1,328         12  waits until more is wanted",
        "host 1 is node1",
    ]


def loader(number: int, **more: Any) -> dict[str, Any]:
    return {
        "loader": number, "name": f"loader {number}", "host": 0, "host_name": "node0", "pid": 2000, "read": 1328,
        "ahead": 12, "ahead_bytes": 1 << 20, "died": 0, "doing": "", "stopped": False, **more,
    }  # fmt: skip


def test_a_terminal_that_asks_while_the_run_ends_asks_again_and_shows_how_it_has_ended(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers: list[Any] = [table(member(0)), WorkerError("it has hung up"), table(state="ended", step=300)]

    def standing_of(_: Path) -> dict[str, Any]:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return dict(answer)

    monkeypatch.setattr(team, "standing_of", standing_of)
    monkeypatch.setattr(team, "LOOK_S", 0.0)
    team._watch(Path("runs/gpt"))
    assert capsys.readouterr().out.endswith("runs/gpt: ended, step 300 of 300, version 41, 1:02\n")
    answers += [table(), WorkerError("it has hung up")]
    monkeypatch.setattr(team, "SILENT_S", 0.0)
    with pytest.raises(WorkerError):
        team._watch(Path("runs/gpt"))


def test_what_others_have_written_is_nothing_that_a_terminal_obeys(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = table(member(0, doing="\x1b]0;title\x07"), run=os.fsdecode(b"runs/\xff"))
    monkeypatch.setattr(team, "standing_of", lambda run: odd)
    assert main(["team", "runs/gpt"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("\n") == 3
    assert printed.replace("\n", "").isprintable()


def made(path: Path, *events: dict[str, Any]) -> Path:
    began = {"kind": "run_started", "t_s": 0.0, "clock": "wall", "schema": 2, "version": 0, "step": 0, "steps": 5}
    with Tape(RunFolder.create(path, "seed = 1\n", About()).tape_path) as tape:
        for event in ({**began, "engine": "lockstep"}, *events):
            tape.write(event)
    return path


def test_a_run_that_does_not_go_on_says_how_it_has_ended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    why = {"kind": "failed", "t_s": 3.0, "clock": "wall", "why": "worker 0 raised ValueError: a pity."}
    killed, failed = made(tmp_path / "killed"), made(tmp_path / "failed", why)
    for run, said in (
        (killed, f"{killed}: ended in the middle, killed or cut off, step 0 of 5, version 0, 0:00\n"),
        (failed, f"{failed}: failed, step 0 of 5, version 0, 0:03\nworker 0 raised ValueError: a pity.\n"),
    ):
        assert main(["team", str(run)]) == 0
        assert capsys.readouterr().out == said
        assert main(["team", str(run), "--json"]) == 0
        document = json.loads(capsys.readouterr().out)
        assert (document["schema"], document["run"], document["members"]) == (1, str(run), [])


def test_what_is_no_run_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["team", str(tmp_path)]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert main(["team", str(tmp_path), "--team.workers", "3"]) == 2
    assert capsys.readouterr().err == "instep: --team.workers goes with 'instep train' only.\n"


def test_stacks_are_shown_by_whom_they_are_of_and_who_has_none_says_why(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    told = {"stack": None, "stack_by": None, "stack_wanted": False}
    stuck = member(1, **{**told, "stack": "Stack\n  File x\n", "stack_by": "faulthandler", "stack_wanted": True})
    stopped, silent = member(2, **{**told, "stopped": True, "stack_wanted": True}), member(3, **told, doing="")
    asked: list[tuple[Path, int | None]] = []

    def stacks_of(run: Path, worker: int | None) -> dict[str, Any]:
        asked.append((run, worker))
        return table(member(0, **told), stuck, stopped, {**silent, "stack_wanted": True})

    monkeypatch.setattr(team, "stacks_of", stacks_of)
    assert main(["team", "runs/gpt", "--stacks", "--worker", "1"]) == 0
    assert asked == [(Path("runs/gpt"), 1)]
    assert capsys.readouterr().out.partition("\n\n")[2] == (
        "worker 1, by faulthandler:\nStack\n  File x\n"
        "\nworker 2 is stopped (SIGSTOP or a debugger), and shows its stack once it goes on.\n"
        "\nworker 3 has shown no stack: it starts or ends, or the kernel holds it (a disk, a driver).\n"
    )
    assert list(team.stack_lines(table(member(0, **told)))) == [
        "no worker is stuck; --worker N shows the stack of any."
    ]
    assert list(team.stack_lines(table())) == [], "of a run that does not go on"
    assert main(["team", "runs/gpt", "--worker", "1"]) == 2
    assert "it goes with --stacks." in capsys.readouterr().err


def test_bounds_are_for_a_run_that_starts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["team", "runs/gpt", "--workers", "2..8"]) == 2
    assert capsys.readouterr().err == (
        "instep: --workers is '2..8'; a run that goes on is given a number, and bounds when it starts or is resumed "
        "(instep train).\n"
    )
