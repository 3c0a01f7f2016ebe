"""The README's Python runs as it stands."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from support.processes import Started

pytestmark = pytest.mark.processes

README = Path(__file__).parents[2] / "README.md"


def test_the_lines_of_python_run(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    (tmp_path / "example.py").write_text(code)
    started = Started([sys.executable, "example.py"], tmp_path, forked=True)
    assert started.ends() == 0, started.err
    assert not started.err
    digest, objective = started.out.split()
    assert re.fullmatch("[0-9a-f]{64}", digest)
    assert float(objective) < 1
    (result,) = (tmp_path / "runs").glob("*/result.json")
    assert json.loads(result.read_text())["digest"] == digest
