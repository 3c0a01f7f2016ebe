"""Ray as what starts a run's agents: one on each node that the workers need, the first in this process. No torch.

Ray reserves processors, and GPUs, for the workers of each node. This process is a node's, and the client of agent 0; on
each other node an actor, `instep.team.ray_agent`, is the client of another agent. When this process ends Ray ends its
actors, and they their agents. An actor that dies is started again by Ray, as often as the team may be.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import random
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from instep.errors import ResourceError, WorkerError, described
from instep.recipe import Recipe, Team
from instep.team.meeting import SAY_S, SECRET_BYTES, address_of
from instep.team.messages import Failed, Request
from instep.team.pickling import pack
from instep.team.place import Place
from instep.team.ray_agent import AgentOrder, RayAgent
from instep.team.ray_cluster import Node, connected, most_bundles, nodes_here, ray

LOOK_S = 0.5
"""Seconds between two looks at what the actors have come to."""

GRACE_S = 5.0
"""Seconds after the end of an agent in which agent 0 tells of it, if it knows more."""

ENDING_S = 15.0
"""Seconds that the other agents have to end after the run's end."""

PORTS = range(20000, 32768)
"""Where agent 0 listens: neither what systems give away by themselves nor what Ray's workers use."""


@dataclass(frozen=True)
class RayNodes:
    """The nodes of a run, reserved for it. `place`: agent 0's; None where it is the only one. `rooms`: for how many
    workers each node has room. `environment`: variables for agent 0. `actors`: those of the other agents; `keeper`: one
    that has agent 0's GPUs meanwhile, where it needs some.
    """

    place: Place | None
    rooms: Sequence[int]
    environment: Mapping[str, str]
    addresses: Sequence[str]
    actors: Sequence[Any]
    keeper: Any

    @property
    def workers(self) -> int:
        """How many they have room for."""
        return sum(self.rooms)


class RayRun:
    """The agents of a run but the first, which Ray starts. `answers`: what each that was started will come to."""

    def __init__(self, nodes: RayNodes, request: Request, recipe: Recipe, answers: Sequence[Any] = ()):
        self._nodes, self._request, self._recipe = nodes, request, recipe
        self._answers = list(answers)
        self._ended: dict[int, tuple[float, str]] = {}  # of each agent that has ended: when that was seen, and why
        self._began, self._looked = False, 0.0

    def begin(self) -> None:
        """Starts them. Raises ResourceError, and what pickling raises."""
        if self._nodes.place is None:
            return
        library, plain = ray(), replace(self._request, recipe=None, place=None)  # type: ignore[arg-type]
        folder = ""
        with contextlib.suppress(OSError):  # it may be gone
            folder = os.getcwd()
        try:
            packed = library.put(pack(self._recipe))
            for agent, actor in enumerate(self._nodes.actors, 1):
                others = tuple(address for number, address in enumerate(self._nodes.addresses) if number != agent)
                room = self._nodes.rooms[agent]
                place = replace(self._nodes.place, agent=agent, host=agent, others=others, room=room)
                order = AgentOrder(plain, place, self._recipe.threads, folder)
                self._answers.append(actor.follow.remote(order, packed))
        except library.exceptions.RayError as error:
            raise ResourceError(
                f"the recipe cannot be sent by Ray ({described(error)}); look at the memory of Ray's object store, or "
                f"give a callable that builds the data in each worker."
            ) from error

    def see(self, event: Mapping[str, Any]) -> None:
        """Is told of all events."""
        self._began |= event["kind"] == "run_started"

    def look(self) -> None:
        """Raises WorkerError where an agent has ended before the run began; later agent 0 knows what to do."""
        now = time.monotonic()
        if self._began or now - self._looked < LOOK_S:
            return
        self._looked = now
        for agent, answer in enumerate(self._answers, 1):
            if agent not in self._ended and (why := _why_ended(answer)):
                self._ended[agent] = now, why
        for agent, (since, why) in self._ended.items():
            if now - since >= GRACE_S:
                where = f"Ray's node {self._nodes.addresses[agent]}"
                raise WorkerError(
                    f"agent {agent}, on {where}, ended before the run began: {why.rstrip('.')}; look there, "
                    f"in Ray's logs too."
                )

    def end(self) -> None:
        """Waits for their end."""
        with contextlib.suppress(Exception):  # what there is to say was said
            ray().wait(self._answers, num_returns=len(self._answers), timeout=ENDING_S)


def _why_ended(answer: Any) -> str:
    """What has ended an agent, if it has ended and was not told to."""
    library = ray()
    if not library.wait([answer], timeout=0)[0]:
        return ""
    try:
        said = library.get(answer)
    except Exception as error:
        return described(error)
    return said.sentence if isinstance(said, Failed) else "it was told to"


@contextlib.contextmanager
def ray_nodes(team: Team) -> Iterator[RayNodes | None]:
    """In the block, nodes are reserved for a run; None where it is not Ray that starts agents.

    Raises InstepError, where there are too few for long, too.
    """
    if team.launcher != "ray":
        yield None
        return
    with connected(team, team.workers), contextlib.ExitStack() as stack:
        nodes = nodes_here()
        wanted = most_bundles(team, nodes)
        group = _reserve(wanted, nodes, team.join_timeout_s)
        stack.callback(_remove, group)
        yield _on(group, wanted, nodes, team)


def _remove(group: Any) -> None:
    with contextlib.suppress(Exception):
        importlib.import_module("ray.util").remove_placement_group(group)


def _reserve(wanted: Sequence[Mapping[str, float]], nodes: Sequence[Node], within_s: float) -> Any:
    """Ray's placement group. Raises ResourceError where it does not come about."""
    groups = importlib.import_module("ray.util")
    own, other = {"ray.io/node-id": nodes[0].id}, {"ray.io/node-id": f"!{nodes[0].id}"}
    selectors = [own, *(other for _ in wanted[1:])]  # else Ray may first give this node away, and try again in 30 s
    group = groups.placement_group(list(wanted), strategy="STRICT_SPREAD", bundle_label_selector=selectors)
    began = said = time.monotonic()
    try:
        while not group.wait(1):
            now = time.monotonic()
            free = ray().available_resources()
            what = f"{len(wanted)} nodes of Ray's with {max(part['CPU'] for part in wanted):g} processors each"
            left = ", ".join(f"{free.get(name, 0):g} {name}s" for name in wanted[0])
            if now - began >= within_s:
                raise ResourceError(
                    f"{what} were not free in {now - began:.0f} s, {left} of the cluster being free; end what else "
                    f"runs there, take fewer workers, or raise team.join_timeout_s."
                )
            if now - said >= SAY_S:
                said = now
                print(f"instep: has waited {now - began:.0f} s for {what}; {left} are free.", file=sys.stderr)
    except BaseException:
        _remove(group)
        raise
    return group


def _on(group: Any, wanted: Sequence[Mapping[str, float]], nodes: Sequence[Node], team: Team) -> RayNodes:
    """What is reserved, with the actors."""
    library, util = ray(), importlib.import_module("ray.util")
    strategies = importlib.import_module("ray.util.scheduling_strategies")

    def actor(bundle: int) -> Any:
        return (
            library.remote(RayAgent)
            .options(
                num_cpus=wanted[bundle]["CPU"],
                num_gpus=wanted[bundle].get("GPU", 0),
                max_restarts=team.restarts,
                max_task_retries=team.restarts,
                scheduling_strategy=strategies.PlacementGroupSchedulingStrategy(
                    group, placement_group_bundle_index=bundle
                ),
            )
            .remote()
        )

    keeper = actor(0) if "GPU" in wanted[0] else None
    environment = dict(library.get(keeper.devices.remote())) if keeper is not None else {}
    by_id = {node.id: node.address for node in nodes}
    on = util.placement_group_table(group)["bundles_to_node_id"]
    addresses = [by_id[on[bundle]] for bundle in range(len(wanted))]
    rooms = [int(bundle["CPU"]) for bundle in wanted]
    place = replace(_first_place(addresses, team.interface), room=rooms[0]) if len(wanted) > 1 else None
    return RayNodes(place, rooms, environment, addresses, [actor(bundle) for bundle in range(1, len(wanted))], keeper)


def _first_place(addresses: Sequence[str], interface: str) -> Place:
    """Agent 0's."""
    head, agents = address_of(interface) if interface else addresses[0], len(addresses)
    return Place(
        agent=0,
        agents=agents,
        host=0,
        hosts=agents,
        local=0,
        launcher="ray",
        agents_by_host=(1,) * agents,
        head=head,
        others=tuple(addresses[1:]),
        port=_free_port(head),
        secret=os.urandom(SECRET_BYTES),
    )


def _free_port(address: str) -> int:
    """One that nobody listens at."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    for port in random.SystemRandom().sample(PORTS, 100):
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind((address, port))
            return port
    raise ResourceError(
        f"no port from {PORTS.start} to {PORTS.stop - 1} can be had at {address}, where agent 0 is to listen; look at "
        f"team.interface."
    )
