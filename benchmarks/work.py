"""The work that all contenders do, and how a contender is told. No torch."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CONTEXT, SAMPLES, SEED = 80, 2, 0
"""Tokens of a sample, samples of a microbatch, seed."""

MODEL: dict[str, Any] = {"vocabulary": 256, "context": CONTEXT, "width": 256, "depth": 6, "heads": 4}
"""Arguments of the GPT."""


@dataclass(frozen=True)
class Options:
    """One contender.

    address: the socket of the gates.
    folder: where it may write.
    steps: how many it does in all.
    workers, microbatches: of the team, and of each step.
    own: for a plain loop, the microbatches that it computes; empty for all.
    in_step: of how many plain loops this is one, which wait for each other after every step; 0 for none.
    slow: how many times as long as it needs the last worker of DDP takes for its computing, by sleeping.
    ddp: arguments for DistributedDataParallel beside the module.
    rule: Instep's update rule.
    """

    address: str
    folder: str
    steps: int
    workers: int
    microbatches: int
    own: tuple[int, ...] = ()
    in_step: int = 0
    slow: float = 1.0
    ddp: dict[str, Any] = field(default_factory=dict)
    rule: str = "synchronous"

    def leave(self, rank: int, **found: Any) -> None:
        """Writes what a process came to, so that the benchmark can check that all did the same work."""
        Path(self.folder, f"outcome-{rank}.json").write_text(json.dumps(found))
