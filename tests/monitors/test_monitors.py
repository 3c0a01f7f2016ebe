from __future__ import annotations

import contextlib
import fcntl
import io
import math
import os
import re
import struct
import sys
import termios
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TextIO

import pytest

from instep.monitors.console import Console
from instep.monitors.progress import ProgressDisplay
from instep.rules.presets import parse
from instep.tables import to_table
from support.events import DIGEST, Event, a_run, ended, evaluated, merged, started
from support.patience import LONG_S


def plain(events: Any, **options: Any) -> str:
    file = io.StringIO()
    with Console(file, **options) as console:
        for event in events:
            console(event)
    return file.getvalue()


# Plain lines

RUN = f"""\
recipe      gpt, 20 steps
rule        synchronous, by the lockstep engine
parameters  4,812,032
samples     85,123, 32 a step
workers     2 on cpu, for 8 microbatches a step
run folder  runs/gpt

step  1/20  objective 3.9000
step  6/20  objective 3.4000  1,000 items/s  ETA 0:14
step 10/20  objective 3.0000  held-out 3.2500  2.5000 bits/byte  1,000 items/s  ETA 0:12
worker 1 (pid 7) was killed by SIGKILL.
restarted after step 10; restarts left: 2 of 3
step 11/20  objective 2.9000  1,000 items/s  ETA 0:10
step 16/20  objective 2.4000  1,000 items/s  ETA 0:04
step 20/20  objective 2.0000  held-out 3.2500  2.5000 bits/byte  1,000 items/s

steps       20
objective   3.9000 → 2.0000
held-out    3.2500
bits/byte   2.5000
items/s     1,234
time        12.3 s
restarts    1
sample
    def f():
        return 1\\x1b[31m\\r
    \\u202e

digest      {DIGEST}
run folder  runs/gpt
"""


def test_a_run_as_plain_lines() -> None:
    assert plain(a_run(died=True), path="runs/gpt") == RUN


def test_the_head_tells_the_hosts_and_how_many_workers_each_has() -> None:
    hosts = [{"host": n, "name": f"node{n}", "workers": 2 - n, "clock_error_s": 0.0} for n in range(2)]
    assert "\nhosts       node0 with 2, node1 with 1\n" in plain([{**started(), "hosts": hosts}])
    assert "hosts" not in plain([started()])


def test_what_each_of_several_optimizers_trains_is_a_line_of_the_head() -> None:
    trained = ["AdamW: 12 tensors, 49,152 weights", "Muon: 1 tensor, 4 weights"]
    shown = plain([{**started(), "optimizers": trained}])
    assert "\nparameters  4,812,032\noptimizer.0 AdamW: 12 tensors, 49,152 weights\noptimizer.1 Muon: 1" in shown
    assert "optimizer" not in plain([started()])


def test_an_interrupted_run_says_how_to_go_on() -> None:
    printed = plain([started(5.0, 7, resumed=True), merged(6, 8), ended(7, 8, interrupted=True)], path="my runs/a")
    assert "recipe      gpt, 20 steps, resumed after step 7\n" in printed
    assert "steps       8 of 20, interrupted\n" in printed
    assert printed.endswith(
        f"go on with  instep train --resume 'my runs/a'\ndigest      {DIGEST}\nrun folder  my runs/a\n"
    )


def test_without_a_path_and_without_contents_out_data() -> None:
    printed = plain([started(), merged(3, 1), ended(4, held_out=None)])
    assert "run folder" not in printed
    assert "held-out" not in printed
    assert "bits/byte" not in printed
    assert "sample\n" not in printed


def test_warnings_are_lines_of_their_own_without_control_characters() -> None:
    printed = plain([started(), {"t_s": 3.0, "kind": "warned", "why": "checkpoint a\x1b]0;b\x07 is damaged."}])
    assert printed.endswith("\nwarning: checkpoint a\\x1b]0;b\\x07 is damaged.\n")


def test_a_worker_is_named_where_the_reason_does_not() -> None:
    assert "worker 1: no sign of life\n" in plain([{"t_s": 1.0, "kind": "left", "worker": 1, "why": "no sign of life"}])


def test_workers_that_were_replaced_count_among_the_restarts() -> None:
    file = io.StringIO()
    console = Console(file=file)
    for event in (
        started(),
        {"t_s": 3, "kind": "left", "worker": 1, "why": "worker 1 was killed."},  # a successor takes its place
        {"t_s": 4, "kind": "left", "worker": 2, "why": "the server was killed."},
        started(9, resumed=True),
    ):
        console(event)
    assert "restarts left: 1 of 3" in file.getvalue()


def simulated(*, digest: str | None = DIGEST, idle: Sequence[float] = (0.25, 0.0)) -> str:
    """What is shown of a simulation whose 20 steps take a minute of virtual time each."""
    file = io.StringIO()
    console = Console(file=file)
    console({**started(), "clock": "virtual", "engine": "virtual"})
    for version in range(1, 21):
        console({**merged(60 * version, version), "clock": "virtual"})
    costs = {"versions": 20, "dropped": 0, "staleness_mean": 0.0, "staleness_max": 0, "lead_max": 0}
    costs |= {"bytes_sent": 123_000, "idle_share": list(idle), "engine": "virtual"}
    console({**ended(1200, **costs), "digest": digest, "clock": "virtual"})
    return file.getvalue()


def test_lines_about_a_simulation_come_as_time_passes_here_and_foretell_none() -> None:
    lines = [line for line in simulated().splitlines() if line.startswith("step ")]
    assert len(lines) == 1  # and not one for each five virtual seconds
    assert "ETA" not in simulated()


def test_a_simulation_tells_what_the_synchronous_rule_costs_too() -> None:
    assert re.search(r"^sent +123 kB$", simulated(), re.MULTILINE)
    assert re.search(r"^idle +25 %, 0 %$", simulated(), re.MULTILINE)
    many = r"^idle +mean 1 %, from 0 % \(worker 0\) to 75 % \(worker 95\)$"  # the slow ones are the last
    assert re.search(many, simulated(idle=[0.0] * 95 + [0.75]), re.MULTILINE)


def test_a_simulation_without_gradients_has_no_digest_to_show() -> None:
    assert "digest" not in simulated(digest=None)


def test_several_terms_are_shown() -> None:
    assert "objective 3.9000  kl 1.0000  bits 2.9000\n" in plain(
        [started(), merged(3, 1, terms={"kl": 1.0, "bits": 2.9})]
    )


def test_what_is_not_finite() -> None:
    printed = plain([started(), merged(3, 1, objective=math.nan), merged(9, 2, objective=None), ended(10)])
    assert printed.count("objective not finite") == 2


def test_unknown_kinds_are_passed_over() -> None:
    assert plain([{"t_s": 1.0, "kind": "dropped", "why": "late"}]) == ""


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_every_encoding_will_do(encoding: str) -> None:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(file, path="läuft/漢")
    for event in [started(), merged(3, 1), ended(4, sample="漢字")]:
        console(event)
    file.flush()
    printed = file.buffer.getvalue().decode(encoding)
    assert ("→" if encoding == "utf-8" else "->") in printed
    assert ("漢字" if encoding == "utf-8" else "\\u6f22\\u5b57") in printed


class Broken(io.StringIO):
    """A pipe whose reader leaves after some lines."""

    def __init__(self, error: Exception, after: int) -> None:
        super().__init__()
        self.error, self.left = error, after

    def write(self, text: str) -> int:
        if not self.left:
            raise self.error
        self.left -= 1
        return super().write(text)


@pytest.mark.parametrize("after", [0, 3, 20])
def test_a_reader_that_leaves_does_not_disturb_the_run(after: int) -> None:
    file = Broken(BrokenPipeError(), after)
    with Console(file) as console:
        for event in a_run():
            console(event)
    assert not file.left


def test_a_closed_file_does_not_disturb_the_run() -> None:
    file = io.StringIO()
    console = Console(file)
    file.close()
    for event in a_run():
        console(event)


def test_a_fault_of_the_monitor_is_not_hidden() -> None:
    with pytest.raises(ValueError, match=r"^mine$"):
        Console(Broken(ValueError("mine"), 0))(started())


# The terminal


@contextlib.contextmanager
def terminal(columns: int) -> Iterator[tuple[TextIO, Callable[[], str]]]:
    """A pseudo terminal: the file to write to, and a function that closes it and gives what came."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    file = os.fdopen(theirs, "w", encoding="utf-8")
    came: list[bytes] = []

    def read() -> None:
        with contextlib.suppress(OSError):
            while data := os.read(ours, 1 << 16):
                came.append(data)

    reader = threading.Thread(target=read)
    reader.start()

    def finish() -> str:
        file.close()
        reader.join(60)
        return b"".join(came).decode()

    try:
        yield file, finish
    finally:
        finish()
        os.close(ours)


def on_terminal(columns: int, events: Any, **options: Any) -> str:
    os.environ["COLUMNS"] = str(columns)  # rich asks the standard streams, which are no terminals here
    with terminal(columns) as (file, finish):
        with Console(file, **options) as console:
            console._screen._REFRESH_S = 0.0  # type: ignore[union-attr]
            for event in events:
                console(event)
        return finish()


@pytest.fixture(autouse=True)
def usual_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", "CLICOLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)


STYLE = re.compile(r"\x1b\[[0-9;]*m")


def screen(output: str) -> tuple[list[str], list[str]]:
    """What a terminal without an end of line shows at last, and each content that a line had when it was erased."""
    lines, erased, row = [""], [], 0
    for token in re.findall(r"\x1b\[[?0-9;]*[A-Za-z]|[\r\n]|[^\x1b\r\n]+", STYLE.sub("", output)):
        if token.endswith("K") and token.startswith("\x1b"):
            erased.append(lines[row])
            lines[row] = ""
        elif token == "\x1b[1A":
            row -= 1
        elif token == "\n":
            row += 1
            lines += [""] * (row == len(lines))
        elif token[0] not in "\x1b\r":
            lines[row] += token
    return [line.rstrip() for line in lines], [line for line in erased if line]


def test_the_terminal_shows_one_live_line_and_then_the_same_as_elsewhere() -> None:
    lines, live = screen(on_terminal(100, a_run(died=True), path="runs/gpt"))
    assert lines[:-1] == [line for line in RUN.splitlines() if not line.startswith("step ")]
    assert live[0] == "starting"
    bar = "━" * 12 + "─" * 12
    assert f"step 10/20  {bar}  objective 3.000  1,000 items/s  ETA 0:10" in live
    bar = "━" * 11 + "─" * 8
    assert f"step 12/20  {bar}  objective 2.800  held-out 2.500 bits/byte  1,000 items/s  ETA 0:09" in live
    assert any(line.endswith("restarting") for line in live)
    assert max(map(len, live)) <= 99


@pytest.mark.parametrize("columns", [20, 40, 60, 80, 200])
def test_the_live_line_fits(columns: int) -> None:
    lines, live = screen(on_terminal(columns, a_run(died=True)))
    assert max(map(len, live)) < columns
    assert all("step" in line or line == "starting" for line in live)
    assert "digest" in lines[-2]
    if columns >= 60:
        assert any(re.fullmatch(r"step 20/20 .*objective 2.000  held-out 2.500 b.*", line) for line in live)


def test_colours_and_the_cursor() -> None:
    output = on_terminal(80, a_run(died=True))
    assert "\x1b[31m" in output
    assert "\x1b[36m" in output
    assert output.rfind("\x1b[?25h") > output.rfind("\x1b[?25l") > -1


def test_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    output = on_terminal(80, a_run(died=True))
    assert set(STYLE.findall(output)) <= {"\x1b[0m", "\x1b[1m", "\x1b[2m"}
    assert "━" in output


def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    assert on_terminal(200, a_run(died=True), path="runs/gpt").replace("\r\n", "\n") == RUN


def show_and_raise(file: TextIO, events: list[Event]) -> None:
    with Console(file) as console:
        for event in events:
            console(event)
        raise KeyboardInterrupt


def test_an_error_leaves_the_terminal_in_order() -> None:
    with terminal(80) as (file, finish):
        events = [started(), merged(3, 1)]
        with pytest.raises(KeyboardInterrupt):
            show_and_raise(file, events)
        output = finish()
    lines, _ = screen(output)
    assert output.rfind("\x1b[?25h") > output.rfind("\x1b[?25l") > -1
    assert not any("step  1" in line for line in lines)


@pytest.mark.processes
def test_rich_is_imported_for_terminals_only() -> None:
    import subprocess

    code = "import sys, instep.monitors.console as m; m.Console(); print('rich' in sys.modules, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=LONG_S, check=True)
    assert done.stdout == "False False\n"


def shown(rule: str = "synchronous", *, virtual: bool = False, **result: Any) -> str:
    """What is shown of a run under a rule, from its beginning to its end."""
    file = io.StringIO()
    console = Console(file=file)
    begun = started(0.0)
    begun["recipe"]["rule"] = to_table(parse(rule))
    clock = {"clock": "virtual", "engine": "virtual"} if virtual else {}
    console({**begun, **clock})
    for version in (1, 2):
        console({**merged(6.0 * version, version), **clock})
    found = {
        "versions": 40, "dropped": 0, "staleness_mean": 1.5, "staleness_max": 3, "lead_max": 4, "bytes_sent": 1,
        "idle_share": [0.0], "rule": rule.partition(":")[0], **result,
    }  # fmt: skip
    console({**ended(12, 20, **found), **clock})
    return file.getvalue()


def test_a_rule_is_shown_with_its_value_and_each_figure_beside_its_bound() -> None:
    out = shown("bounded_staleness:4,max_staleness=7", delayed_max=9)
    assert re.search(r"^rule +bounded_staleness:4,max_staleness=7, by the", out, re.MULTILINE)
    assert re.search(r"^staleness +mean 1\.50, at most 3 versions, bound 7$", out, re.MULTILINE)
    assert re.search(r"^delayed +at most 9 versions, where a piece was given out again$", out, re.MULTILINE)
    assert re.search(r"^lead +at most 4 rounds, bound 4$", out, re.MULTILINE)
    assert re.search(r"^lead +at most 4 rounds$", shown("asynchronous"), re.MULTILINE), "it has none"


def test_seconds_of_a_virtual_clock_are_called_virtual() -> None:
    out = shown(virtual=True)
    assert "items/s     1,234 (virtual)" in out
    assert "time        12.3 s (virtual)" in out
    assert "items/s (virtual)" in next(line for line in out.splitlines() if line.startswith("step"))
    assert "virtual" not in shown()


def test_terms_and_metrics_of_held_out_data_are_shown_live_and_at_the_end() -> None:
    out = shown(held_out_terms={"objective": 3.25, "accuracy": 0.5})
    assert re.search(r"^ +accuracy +0\.5000$", out, re.MULTILINE)
    assert "objective 3.25" not in shown(held_out_terms={"objective": 3.25}), "that is the held-out objective"
    assert "auroc" in shown(held_out_terms={"objective": 3.25}, gathered={"auroc": 0.363})
    file = io.StringIO()
    console = Console(file=file, every_s=1e9)
    console(started(0.0))
    console(merged(1.0, 1))
    console(evaluated(2.0, 1, terms={"objective": 3.25, "accuracy": 0.5}))
    assert "held-out 3.2500  objective 3.2500  accuracy 0.5000" in file.getvalue()


def test_bytes_that_are_no_text_are_not_shown_as_a_sample() -> None:
    out = shown(sample="def \ufffd\ufffd)\x00\ufffd\x1cF{")
    assert re.search(r"^sample +no text yet: 42 % of it cannot be read$", out, re.MULTILINE)
    assert "\ufffd" not in out
    assert "    def f(x):\n        return x" in shown(sample="def f(x):\n    return x")


def test_items_a_second_are_those_of_the_result_where_all_steps_are_seen() -> None:
    """By the run's own count of the seconds in steps: trying the first checkpoint, say, is in no step."""
    progress = ProgressDisplay()
    progress.see(started(0.0))
    for version, (t_s, train_s) in enumerate([(5.0, 2.0), (19.0, 3.0), (20.0, 4.0)], 1):
        progress.see(merged(t_s, version, train_s=train_s))
    assert progress.items_per_s == 3000 / 4.0
    resumed = ProgressDisplay()
    resumed.see(started(0.0, 7, resumed=True))
    resumed.see(merged(5.0, 8, train_s=80.0))
    resumed.see(merged(6.0, 9, train_s=80.5))
    assert resumed.items_per_s == 1000 / 0.5, "of this session"


# Who holds the team up


def held_up(file: TextIO) -> None:
    with Console(file) as console:
        console._screen._REFRESH_S = 0.0  # type: ignore[union-attr]
        for event in (started(), merged(3, 1), merged(4, 2)):
            console(event)
        console.held_up("worker 2 on host 1", "computing step 3, microbatch 3", 1.2)
        console.held_up("worker 2 on host 1", "computing step 3, microbatch 3", 64.0)
        console.held_up("", "", 0.0)
        console(merged(6, 3))


@pytest.mark.parametrize("columns", [80, 40, 200])
def test_for_whom_the_team_waits_is_the_live_line_until_it_is_over(columns: int) -> None:
    os.environ["COLUMNS"] = str(columns)
    with terminal(columns) as (file, finish):
        held_up(file)
        output = finish()
    lines, live = screen(output)
    first, last = (line for line in live if line.startswith("waiting"))
    assert first.startswith("waiting for worker 2 on host 1: computing step 3, microbatch 3, for 1 s"[: columns - 1])
    assert last.startswith("waiting for worker 2 on host 1: computing step 3, microbatch 3, for 1:04"[: columns - 1])
    assert all(len(line) < columns for line in live), "never more than a line"
    assert not [line for line in lines if "waiting" in line], "and nothing of it stays"
    assert live[-1].startswith("step  3/20") or live[-2].startswith("step  3/20")


def test_for_whom_the_team_waits_is_no_matter_for_files_and_pipes() -> None:
    file = io.StringIO()
    held_up(file)
    assert "waiting" not in file.getvalue()


def test_a_death_that_another_worker_makes_good_is_told_in_two_lines() -> None:
    left = {"t_s": 1, "kind": "left", "worker": 1, "why": "worker 1 was killed."}
    stood_in = {"t_s": 1, "kind": "stood_in", "worker": 1, "by_worker": 0, "version": 1041, "microbatches": [4, 8]}
    says = "worker 0 does the part of worker 1 from step 1,042 on, until another process can"
    assert plain([started(), left, stood_in]).endswith(f"worker 1 was killed.\n{says}\n")


def test_a_team_that_was_changed_says_who_asked_and_costs_no_restart() -> None:
    asked = {"t_s": 3.0, "kind": "resized", "workers": 6, "before": 2, "by_whom": "ann, process 7"}
    again = started(9, resumed=True)
    again = {**again, "team": {**again["team"], "workers": 6}}
    left = {"t_s": 11, "kind": "left", "worker": 1, "why": "worker 1 was killed."}
    printed = plain([started(), asked, again, left, again])
    assert "\n6 workers instead of 2 after step 0, as ann, process 7 asked\n" in printed
    assert printed.endswith("worker 1 was killed.\nrestarted after step 0; restarts left: 2 of 3\n")
    printed = plain([asked, started(), left, again])
    assert "instead of" not in printed, "it was asked for before the run began"
    assert printed.endswith("worker 1 was killed.\nrestarted after step 0; restarts left: 2 of 3\n")
