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
    parts = ["tests", "speed", "digests", "workers", "memory", "more digests"]
    sizes = ["--rounds", "1", "--steps", "1", "--no-compile", "--budget-s", "200"]
    command = [sys.executable, BENCHMARK, "--device", "cpu", *sizes, "--out", out]
    subprocess.run(command, check=True, capture_output=True, timeout=240)
    found = json.loads(out.read_text())["parts"]
    assert sorted(found) == sorted(parts)
    assert not any("failed" in each or "left_out" in each for each in found.values()), found
    assert found["tests"]["status"] == 0, found
    assert [name for part in parts[2:4] for name in found[part] if name != "took_s"] == ["bfloat16"] * 2
    each = {f"{part}, {name}": it for part in (*parts[2:4], parts[5]) for name, it in found[part].items()}
    assert {name for name, it in each.items() if not isinstance(it, dict) or not it["one"]} == {
        f"{part}, took_s" for part in (*parts[2:4], parts[5])
    }
    assert len(set(each["workers, bfloat16"].values())) == 2, "a digest, and that it is one"
    assert found["memory"]["measured_bytes"] == found["memory"]["predicted_bytes"]
    assert set(found["speed"]) == {"Instep", "bare loop", "bare loop, deterministic", "DDP", "took_s"}
