"""The benchmark of a GPU, rehearsed: it must work at the first try where a GPU is at hand for minutes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "gpu.py"

pytestmark = [pytest.mark.processes, pytest.mark.slow]


def test_every_part_comes_to_something_on_the_cpu(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    parts = ["tests", "speed", "digests", "workers", "memory"]
    sizes = ["--rounds", "1", "--steps", "1", "--no-compile", "--budget-s", "1000"]
    command = [sys.executable, BENCHMARK, "--device", "cpu", "--parts", *parts, *sizes, "--out", out]
    subprocess.run(command, check=True, capture_output=True, timeout=1100)
    found = json.loads(out.read_text())["parts"]
    assert sorted(found) == sorted(parts)
    assert not any("failed" in each or "left_out" in each for each in found.values()), found
    assert found["tests"]["status"] in (0, 5), "they pass or, without a GPU, are passed over"
    assert found["digests"]["bfloat16"]["one"]
    assert found["workers"]["bfloat16"]["one"]
    assert found["workers"]["bfloat16"]["1"] == found["digests"]["bfloat16"]["run 0"]
    assert found["memory"]["measured_bytes"] == found["memory"]["predicted_bytes"]
    assert set(found["speed"]) == {"Instep", "bare loop", "bare loop, deterministic", "DDP", "took_s"}
