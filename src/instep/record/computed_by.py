"""What the bits of a computation hang on beside its recipe: versions of libraries, and the kind of processor."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from instep.record.hardware import gpu_kinds, hardware

_OF_BITS = ("torch", "numpy", "instep")

_NAMES = {"processor": "a processor", "GPU": "a GPU"}


def libraries() -> dict[str, str]:
    """The versions of what decides the bits."""
    import numpy
    import torch

    import instep

    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # a TorchVersion would make the client import torch to read it
        "numpy": numpy.__version__,
        "instep": instep.__version__,
    }


def processor() -> str:
    """Vendor and the instructions that torch uses: "GenuineIntel AVX512"."""
    import torch

    vendor = platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("vendor_id", "CPU implementer"):
                vendor = value.strip()
                break
    return f"{vendor} {torch.backends.cpu.get_cpu_capability()}"


def unrepeatable(started: Mapping[str, Any]) -> str:
    """A clause on what made this session so that equal runs need not have equal bits; "" where they have."""
    team, recipe = started["team"], started["recipe"]
    if team.get("mixed_processors"):
        return "processors of several kinds (team.mixed_processors)"
    several = team.get("device", "cpu") != "cpu" or recipe.get("threads", 1) > 1
    if team.get("deterministic") is False and several:
        return "kernels that need not repeat (team.deterministic is false)"
    return ""


def untold(started: Mapping[str, Any]) -> str:
    """A clause on what made this session, of which nobody knows whether it is here; "" where all is told."""
    if started["team"].get("device", "cpu") != "cpu" and not gpu_kinds(started):
        return "a kind of GPU that its tape does not tell"
    return "" if started.get("processor") else "a kind of processor that its tape does not tell"


def made_apart(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Name and both values of what decides the bits and differs, of two ``run_started``, where both tell it."""
    tables = [
        {
            **{name: each.get("libraries", {}).get(name) for name in _OF_BITS}, "processor": each.get("processor"),
            "GPU": " and ".join(gpu_kinds(each)) if each.get("team", {}).get("device", "cpu") != "cpu" else "",
        }
        for each in (one, other)
    ]  # fmt: skip
    pairs = [(name, a, tables[1][name]) for name, a in tables[0].items()]
    return [(name, a, b) for name, a, b in pairs if a and b and a != b]


def made_otherwise(started: Mapping[str, Any]) -> str:
    """A clause on what made the session that this ``run_started`` begins and is not here; "" where all is the same."""
    own_hardware = hardware().table()
    own_hardware["gpus"] = own_hardware["gpus"] or ["none"]
    here = {"libraries": libraries(), "processor": processor(), "hardware": own_hardware, "team": started["team"]}
    parts = [f"{_NAMES.get(name, name)} {there} (here {own})" for name, there, own in made_apart(started, here)]
    return " and ".join(parts)
