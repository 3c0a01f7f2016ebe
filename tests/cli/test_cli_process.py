"""The command in a process of its own: what it imports, how it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from support.patience import LONG_S
from support.processes import INSTEP, Started, wait_until, write_project

pytestmark = pytest.mark.processes


def printed_by(code: str) -> str:
    """What a fresh Python prints on stdout that imports sys and main and runs `code`."""
    code = f"import sys; from instep.cli import main; {code}"
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=LONG_S, check=True
    ).stdout


def test_help_is_light() -> None:
    done = subprocess.run([sys.executable, "-m", "instep", "--help"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Usage: instep")
    modules = printed_by("main(['--help']); print(sorted(sys.modules))")
    assert "'instep.cli'" in modules
    for heavy in ("torch", "numpy", "cyclopts", "rich", "tomllib"):
        assert f"'{heavy}'" not in modules


@pytest.mark.parametrize(
    "argv", ["['recipes']", "['digest', 'nowhere']", "['train', 'nowhere']", "['train', '--help']"]
)
def test_no_command_imports_torch_itself(argv: str) -> None:
    assert printed_by(f"main({argv}); print('torch' in sys.modules)").endswith("False\n")


@pytest.mark.parametrize("argv", [["--help"], ["train", "--help"]])
def test_a_reader_that_leaves_is_no_error(argv: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-m", "instep", *argv]
    done = subprocess.run(
        command, stdout=write, stderr=subprocess.PIPE, env=buffered, text=True, timeout=LONG_S, check=False
    )
    os.close(write)
    assert done.stderr == ""
    assert done.returncode == 128 + signal.SIGPIPE


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="processes are found through /proc")
@pytest.mark.parametrize("how", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_no_simulation_outlives_its_command(how: signal.Signals, tmp_path: Path) -> None:
    project = write_project(tmp_path)
    line = (
        "simulate my.toml --rule asynchronous --workers 1000 --contributions 20000 --no-gradients --times 1s --out out"
    )
    started = Started([*INSTEP, *line.split()], project, forked=True)
    try:
        blocks = project / "out" / "tape"
        wait_until(lambda: blocks.exists() and any(blocks.iterdir()), LONG_S, "a schedule that goes on", started)
        started.process.send_signal(how)
        assert started.ends() == (130 if how is signal.SIGTERM else -signal.SIGKILL)
        assert (project / "out").exists() == (how is signal.SIGKILL)  # half of it is of no use to anybody
    finally:
        started.end()
