"""What kind of processor this is, as far as the bits of what it computes hang on that."""

from __future__ import annotations

import contextlib
import platform
from pathlib import Path


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
