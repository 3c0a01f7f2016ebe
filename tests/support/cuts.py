"""A run over several hosts, some of which are cut off for a while: what the tape tells of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from support.hosts import Hosts
from support.machine_faults import Campaign
from support.patience import LONG_S

SEED, LEASE_S = 15, 5.0


class CutRun(Campaign):
    """By default of a worker on each host."""

    def __init__(self, hosts: Hosts, **more: Any):
        own: dict[str, Any] = {"lease_s": LEASE_S, "workers": len(hosts), "give_up_s": LONG_S}
        super().__init__(hosts, SEED, 0, **{**own, **more})

    def cut(self, host: int, seconds: float, meanwhile: Callable[[], Any] = lambda: None) -> float:
        """Cuts a host off for so long. Seconds from the end of that to the next update that all make together."""
        self.hosts.cut(host)
        until = time.monotonic() + seconds
        meanwhile()
        time.sleep(max(0.0, until - time.monotonic()))
        self.look()
        at = len(self._tape.events)
        self.hosts.heal(host)
        healed = time.monotonic()
        self.wait(lambda: self._all_go_on(at), LONG_S, "an update after the cut")
        return time.monotonic() - healed

    def loses(self, host: int) -> None:
        """Cuts a host off for good, until others do its part."""
        self._away.add(host)
        self.hosts.cut(host)
        self.look()
        at = len(self._tape.events)
        self.wait(lambda: self._all_go_on(at), LONG_S, "successors")

    def _all_go_on(self, at: int) -> bool:
        """Whether there was an update since this event, after all workers were in one group again."""
        again = [place for place in range(at, len(self._tape.events)) if self._all_regrouped(self._tape.events[place])]
        return bool(again and self._tape.since(again[-1], "merged"))

    def check(self, new: Sequence[int] = (), restarts: int | None = None) -> None:
        """Ends the run: the same processes, but for some `new` ones, have done each step once, from no checkpoint, with
        the same bits.
        """
        self._away.update(range(len(self.hosts)))  # nobody starts them again
        result = self.end()
        assert [event["version"] for event in self.told("run_started")] == [0], "no checkpoint was loaded"
        joined = sorted([*range(self._workers), *new])
        assert sorted(event["worker"] for event in self.told("joined")) == joined, "no other process has come"
        versions = [event["version"] for event in self.told("merged")]
        assert versions == list(range(1, len(versions) + 1))
        assert result["restarts"] == (len(new) if restarts is None else restarts)
        assert result["digest"] == self.undisturbed(result["steps"])["digest"]
