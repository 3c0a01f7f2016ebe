"""As `support.machine_faults`, under a rule with a server: who is left goes on, and all that the workers were given to
compute is merged once, whoever computes it.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from support.fault_kinds import KINDS, LOST, Fault
from support.machine_faults import Campaign


class ServedCampaign(Campaign):
    """One run, and the faults that it suffers. A loss of agent 0 costs the steps since the last checkpoint."""

    kinds = tuple(kind for kind in KINDS if not kind.endswith("to one other"))  # workers do not speak to each other
    most_again = None
    every, pause_s = 30, 0.2
    rule = """\
[rule]
name = "bounded_staleness"
quorum = "1"
order = "arrival"
max_lead = 4
"""

    def __init__(self, *arguments: Any, **more: Any):
        super().__init__(*arguments, **more)
        self._read, self._since = 0, set[int | str]()

    def whole(self) -> bool:
        """Whether all workers have taken part in updates since one last came or went, and a checkpoint is there."""
        events = self._tape.events
        for event in events[self._read :]:
            match event["kind"]:
                case "run_started" | "joined" | "left":
                    self._since.clear()
                case "checkpointed":
                    self._since.add("checkpoint")
                case "merged":
                    self._since |= {each["worker"] for each in event["contributions"]}
        self._read = len(events)
        return len(self._since) == self._workers + 1

    def _cured(self, fault: Fault) -> bool:
        return self.whole() and (fault.kind not in LOST or bool(self._tape.since(self._at, "run_started")))

    def replayed(self) -> bool:
        """Whether the run's tape gives its digest."""
        command = self.hosts[0].start(sys.executable, "-m", "instep", "replay", "run", OMP_NUM_THREADS="1")
        return command.ends(600) == 0 and "the replay is exact" in command.out

    def audit(self) -> dict[str, list[int]]:
        """See `audit`."""
        return audit(self._tape.events)


def audit(events: Sequence[Mapping[str, Any]]) -> dict[str, list[int]]:
    """Pieces that the weights at the end have twice, and those that they lack though no worker has them at the end.

    What came after a version is undone where the run goes on from that one.
    """
    merged: list[Mapping[str, Any]] = []
    in_hand: dict[int, int] = {}
    for event in events:
        match event["kind"]:
            case "run_started":
                merged = [each for each in merged if each["version"] <= event["version"]]
                in_hand = {}
            case "merged":
                merged.append(event)
            case "released":
                in_hand[event["worker"]] = event["piece"]
    counts = Counter(each["piece"] for event in merged for each in event["contributions"])
    given = range(max([*counts, *in_hand.values()], default=-1) + 1)
    return {
        "merged_twice": sorted(piece for piece, count in counts.items() if count > 1),
        "lost": sorted(set(given) - set(counts) - set(in_hand.values())),
    }
