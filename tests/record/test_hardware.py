"""What a host is made of, as its files tell."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from instep.recipe import Team
from instep.record import tape
from instep.record.hardware import Hardware, gpu_kinds, hardware, hosts_of, in_words
from support.harness import train_here
from support.regression import regression


@pytest.mark.pure
def test_processor_cores_memory_and_gpus_are_told(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(2 * "processor\t: 0\nmodel name\t: AMD EPYC  9B14\n\n")
    (tmp_path / "meminfo").write_text("MemTotal:       24641536 kB\nMemFree: 1 kB\n")
    for bus in ("0000:01:00.0", "0000:02:00.0"):
        folder = tmp_path / "driver" / "nvidia" / "gpus" / bus
        folder.mkdir(parents=True)
        (folder / "information").write_text("Model: \t\t NVIDIA H200\nIRQ:   34\n")
    found = hardware(tmp_path)
    assert found == Hardware("AMD EPYC 9B14", len(os.sched_getaffinity(0)), 24641536 << 10, ("NVIDIA H200",) * 2)
    words = in_words({**found.table(), "cores": 2})
    assert words == "AMD EPYC 9B14, 2 cores, 23.5 GiB, 2 x NVIDIA H200"
    assert gpu_kinds({"hardware": found.table()}) == ["NVIDIA H200"]


@pytest.mark.pure
def test_a_system_that_tells_nothing_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_bytes(b"\xff\xfe")
    (tmp_path / "meminfo").write_text("MemTotal: many\n")
    found = hardware(tmp_path)
    assert (found.processor, found.memory_bytes, found.gpus) == ("unknown", 0, ())
    assert in_words({**found.table(), "cores": 1}) == "unknown, 1 core"


@pytest.mark.pure
def test_a_tape_of_before_tells_no_hardware_and_one_over_hosts_that_of_each() -> None:
    assert hosts_of({}) == []
    here = Hardware("a", 1, 0, ()).table()
    assert hosts_of({"hosts": [{"name": "x"}], "hardware": here}) == [("", here)]
    both = [{"name": name, "hardware": {**here, "gpus": [name]}} for name in ("x", "y")]
    assert [name for name, _ in hosts_of({"hosts": both, "hardware": here})] == ["x", "y"]
    assert gpu_kinds({"hosts": both}) == ["x", "y"]


@pytest.mark.processes
def test_a_run_tells_what_it_was_computed_on(tmp_path: Path) -> None:
    train_here(regression(steps=1), Team(workers=1), tmp_path / "run")
    started = next(tape.read(tmp_path / "run" / "tape.jsonl"))
    assert started["hardware"] == hardware().table()
    assert started["hardware"]["cores"] >= 1
