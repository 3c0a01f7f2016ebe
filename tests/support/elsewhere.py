"""Another environment: other libraries, or what makes of a processor another kind, in a Python of its own.

As a program, ``python -m support.elsewhere FILE`` does what the JSON document in FILE lists: runs to be trained, and
words for the command line, the exit status and output of which it writes into ``FILE.done``.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parents[1]


@dataclass(frozen=True)
class Elsewhere:
    """variables: of the environment; libraries: folders whose packages come before those that are here."""

    scratch: Path
    variables: Mapping[str, str]
    libraries: Sequence[Path] = ()

    def do(self, jobs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Does each of them there: `train` of a recipe's fields `of`, or the command line `words`."""
        file = self.scratch / "jobs.json"
        file.write_text(json.dumps(jobs))
        path = os.pathsep.join(map(str, [*self.libraries, TESTS, TESTS.parent / "src"]))
        variables = {**os.environ, **self.variables, "PYTHONPATH": path}
        done = subprocess.run(
            [sys.executable, "-m", "support.elsewhere", str(file)], env=variables, cwd=self.scratch, text=True,
            capture_output=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-4000:]
        found: list[dict[str, Any]] = json.loads(Path(f"{file}.done").read_text())
        return found


def other_numpy(version: str, scratch: Path) -> Elsewhere:
    """An environment with this NumPy, from the package index. Skips the test where that does not give it."""
    folder = scratch / f"numpy-{version}"
    installing = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--only-binary=:all:"]
    done = subprocess.run(
        [*installing, "--target", str(folder), f"numpy=={version}"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"NumPy {version} cannot be installed: {done.stderr.strip().splitlines()[-1:]}")
    return Elsewhere(scratch, {}, [folder])


def other_processor(scratch: Path) -> Elsewhere:
    """Without the wide instructions that torch takes where there are any."""
    return Elsewhere(scratch, {"ATEN_CPU_CAPABILITY": "default"})


def _done(job: Mapping[str, Any]) -> dict[str, Any]:
    from instep.cli import main
    from instep.recipe import Team
    from support.by_numpy import recipe
    from support.harness import train_here

    if "train" in job:
        train_here(recipe(**job["of"]), Team(**job["team"]), Path(job["train"]))
        return {}
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(list(job["words"]))
    return {"status": status, "out": out.getvalue(), "err": err.getvalue()}


def _main(file: str) -> None:
    from support.forks import forking

    with forking():
        found = [_done(job) for job in json.loads(Path(file).read_text())]
    Path(f"{file}.done").write_text(json.dumps(found))


if __name__ == "__main__":
    _main(sys.argv[1])
