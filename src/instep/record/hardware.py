"""What a run was computed on, as far as the system's files tell: no library of a GPU is loaded for it. No torch."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta

from instep.record.team import HardwareOfHost

Name = Annotated[str, Meta(max_length=1000)]


@dataclass(frozen=True)
class Hardware:
    """Of one host. cores: that this process may use. memory_bytes: of the host, 0 where it does not tell. gpus: a name
    each.
    """

    processor: Name
    cores: Annotated[int, Meta(ge=0, lt=1 << 53)]
    memory_bytes: Annotated[int, Meta(ge=0, lt=1 << 53)]
    gpus: Annotated[Sequence[Name], Meta(max_length=1 << 10)]

    def table(self) -> HardwareOfHost:
        """As it stands on a tape."""
        return {**asdict(self), "gpus": list(self.gpus)}  # type: ignore[typeddict-item]


@cache
def hardware(proc: Path = Path("/proc")) -> Hardware:
    """That of this host. `proc`: the folder where the system tells of it."""
    models = _values(proc / "cpuinfo", "model name") or _values(proc / "cpuinfo", "Model")
    sizes = [text.removesuffix(" kB") for text in _values(proc / "meminfo", "MemTotal")]
    memory = [int(size) << 10 for size in sizes if size.isdecimal()]
    gpus = [
        name for told in sorted((proc / "driver" / "nvidia" / "gpus").glob("*/information"))
        for name in _values(told, "Model")
    ]  # fmt: skip
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 0
    return Hardware(next(iter(models), "unknown"), cores, next(iter(memory), 0), tuple(gpus))


def _values(path: Path, name: str) -> list[str]:
    """What follows `name:` in the lines of a file; nothing where it cannot be read."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        parts = (line.partition(":") for line in path.read_text().splitlines())
        return [" ".join(value.split()) for told, _, value in parts if told.strip() == name and value.strip()]
    return []


def hosts_of(started: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """What this ``run_started`` tells of the hardware of each host, with its name, "" where there is but one; nothing
    for older tapes and simulations.
    """
    found = [(each["name"], each["hardware"]) for each in started.get("hosts", ()) if each.get("hardware")]
    return found or [("", each) for each in (started.get("hardware"),) if each]


def in_words(told: Mapping[str, Any]) -> str:
    """Such as "AMD EPYC, 2 cores, 23.5 GiB, 8 x NVIDIA H200"."""
    cores, memory = told["cores"], told["memory_bytes"]
    parts = [told["processor"], f"{cores} core{'s' * (cores != 1)}", f"{memory / 2**30:.1f} GiB" if memory else ""]
    for kind, count in Counter(told["gpus"]).items():
        parts.append(kind if count == 1 else f"{count} x {kind}")
    return ", ".join(filter(None, parts))


def gpu_kinds(started: Mapping[str, Any]) -> list[str]:
    """The kinds of GPU of all hosts that this ``run_started`` tells of, each once."""
    return sorted({kind for _, told in hosts_of(started) for kind in told["gpus"]})
