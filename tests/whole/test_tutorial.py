"""The tutorial's files and commands do what it says, word for word, with fewer steps; and the pages can be made."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from support.patience import LONG_S
from support.processes import wait_until

PROJECT = Path(__file__).parents[2]
TUTORIAL = (PROJECT / "docs" / "tutorial.md").read_text()
STEPS = 1200

pytestmark = [pytest.mark.processes, pytest.mark.slow]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TUTORIAL, re.DOTALL | re.MULTILINE)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "spirals.py").write_text(blocks("python")[0])
    recipe, changed = re.subn(r"^steps = \d+$", f"steps = {STEPS}", blocks("toml")[0], flags=re.MULTILINE)
    assert changed == 1
    (tmp_path / "spirals.toml").write_text(recipe)
    return tmp_path


def start(command: str, folder: Path) -> subprocess.Popen[str]:
    """Runs one of its lines in `folder`."""
    assert command in TUTORIAL
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    return subprocess.Popen(
        command, shell=True, cwd=folder, env=environment, text=True, executable="/bin/bash", start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def digest_in(folder: Path, run: str) -> str:
    return str(json.loads((folder / "runs" / run / "result.json").read_text())["digest"])


def test_its_commands_give_one_digest(folder: Path) -> None:
    def done(command: str, status: int = 0) -> str:
        process = start(command, folder)
        told, _ = process.communicate(timeout=LONG_S)
        assert process.returncode == status, told
        return told

    def steps_of(run: str) -> int:
        tape = folder / "runs" / run / "tape.jsonl"
        return tape.read_text().count('"kind": "merged"') if tape.exists() else 0

    done("instep train spirals.toml --workers 2")
    digest = digest_in(folder, "spirals")

    training = start("instep train spirals.toml --workers 3 --out runs/killed", folder)
    wait_until(lambda: steps_of("killed") > 20, LONG_S, "the run killed trains")
    done("kill -9 $(grep -o '\"worker\": 1, \"pid\": [0-9]*' runs/killed/tape.jsonl | grep -o '[0-9]*$')")
    told, _ = training.communicate(timeout=LONG_S)
    assert "SIGKILL" in told
    assert digest_in(folder, "killed") == digest

    stopped = start("instep train spirals.toml --out runs/stopped", folder)
    wait_until(lambda: steps_of("stopped") > 20, LONG_S, "the run stopped trains")
    os.killpg(stopped.pid, signal.SIGINT)
    assert "instep train --resume runs/stopped" in stopped.communicate(timeout=LONG_S)[0]
    done("instep train --resume runs/stopped --workers 4")
    assert digest_in(folder, "stopped") == digest
    assert digest in done("instep digest runs/stopped")

    assert "the replay is exact" in done("instep replay runs/killed")
    assert "staleness" in done("instep train spirals.toml --workers 2 --rule asynchronous --out runs/async")
    assert "the replay is exact" in done("instep replay runs/async")


def test_its_python_runs(folder: Path) -> None:
    (folder / "train.py").write_text(blocks("python")[1])
    ran = subprocess.run([sys.executable, "train.py"], cwd=folder, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def test_the_pages_are_made_without_a_warning(tmp_path: Path) -> None:
    made = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=PROJECT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    page = (tmp_path / "site" / "api.html").read_text()
    assert "<strong>skip_samples</strong>" in page
    assert not re.search(r'(src|href)="https?://(?!www\.mkdocs\.org)', page), "something is fetched from elsewhere"
