"""What Ray runs on each node of a run: the client of an agent, which is a process of its own. No torch.

Ray's threads are not there in what forks, so that the agent is none of Ray's own processes.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from instep.errors import InstepError, no_process
from instep.record.folder import RunFolder
from instep.team.client import say, supervised
from instep.team.messages import Cancelled, Failed, Finished, Request
from instep.team.pickling import Packed
from instep.team.place import Place

DEVICES = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class AgentOrder:
    """What an agent is started with. `request`: the run's, without its recipe and what a host has itself.

    folder: that the command runs in, which is taken where the node has it.
    """

    request: Request
    place: Place
    threads: int
    folder: str


class RayAgent:
    """An actor."""

    def devices(self) -> Mapping[str, str]:
        """The GPUs that Ray has given it, as a variable of the environment tells them."""
        return {DEVICES: os.environ[DEVICES]} if DEVICES in os.environ else {}

    def follow(self, order: AgentOrder, packed: Packed) -> Finished | Failed | Cancelled:
        """Has an agent follow agent 0 to the run's end. `packed`: the recipe."""
        with contextlib.suppress(OSError):
            os.chdir(order.folder)
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, 0, 0)  # Ray's processes are nice, if it is not told otherwise
        try:
            return Finished(self._followed(order, packed))
        except InstepError as error:
            return Failed.of(error)
        except KeyboardInterrupt:
            return Cancelled()

    def _followed(self, order: AgentOrder, packed: Packed) -> dict[str, Any]:
        try:
            recipe = packed.unpacked()
            folder = RunFolder(Path(tempfile.mkdtemp(prefix="instep-")))
        except OSError as error:
            raise no_process(f"agent {order.place.agent}", error) from error
        request = replace(
            order.request, recipe=recipe, folder=folder.path, place=order.place, began=time.monotonic(), environment={}
        )
        return supervised(folder, request, order.threads, [say])
