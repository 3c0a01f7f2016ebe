"""The README's Python runs as it stands."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.processes

README = Path(__file__).parents[2] / "README.md"


def test_the_lines_of_python_run(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    (tmp_path / "example.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    digest, objective, path = done.stdout.split()
    assert re.fullmatch("[0-9a-f]{64}", digest)
    assert float(objective) < 1
    assert (tmp_path / path / "result.json").is_file()
