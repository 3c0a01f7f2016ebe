"""Ray's cluster: connected to, or started, and what its nodes have. No torch."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from instep.errors import RecipeError, ResourceError, described, shown
from instep.ranges import share_out
from instep.recipe import Team
from instep.team.signals import deaf

ANSWER_S = 5.0
"""Seconds that Ray's head has to answer."""

_STORE_BYTES = 100 << 20  # of a cluster of one node, where nothing is sent; Ray would take a third of the memory

_QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0"
_KIND = slice(3, 4)  # of a frame of HTTP/2; 4 is what a server begins with


@dataclass(frozen=True)
class Node:
    """One of Ray's. own: this process's."""

    name: str
    address: str
    id: str
    cpus: float
    gpus: float
    own: bool


@contextlib.contextmanager
def connected(team: Team, workers: int | None = None) -> Iterator[None]:
    """In the block, Ray is there: the one that the program is connected to, or RAY_ADDRESS names, or this machine is a
    node of, or else one that is started for the run. Nothing happens where it is not Ray that starts agents.

    workers: how many there will be, if that is known. Raises RecipeError and ResourceError.
    """
    if team.launcher != "ray":
        yield
        return
    library = ray()
    if library.is_initialized():
        _check_node()
        yield
        return
    with _as_before():
        _connect(library, workers or 1)
    try:
        yield
    finally:
        with deaf(), _as_before():
            library.shutdown()


def ray() -> Any:
    """The package. Raises RecipeError where it is not installed."""
    try:
        with _as_before():
            return importlib.import_module("ray")
    except ImportError:
        raise RecipeError(
            "team.launcher 'ray' needs Ray, which is not installed; install it with: pip install 'instep[ray]'."
        ) from None


@contextlib.contextmanager
def _as_before() -> Iterator[None]:
    """After the block, signals are answered as before, and the environment is as it was: Ray alters both."""
    main = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)} if main else {}
    missing = {name: value for name, value in _QUIET.items() if name not in os.environ}
    os.environ.update(missing)
    try:
        yield
    finally:
        for name in missing:
            os.environ.pop(name, None)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _connect(library: Any, workers: int) -> None:
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    address = os.environ.get("RAY_ADDRESS", "")
    _check_address(address)
    try:
        if address != "local":
            with contextlib.suppress(*([] if address else [ConnectionError])):
                library.init(address="auto", **quiet)
                return
        cpus = max(workers, len(os.sched_getaffinity(0)))  # as without Ray, more workers than processors may train
        light = {"include_dashboard": False, "object_store_memory": _STORE_BYTES}
        library.init(address="local", num_cpus=cpus, **light, **quiet)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        where = f"the cluster at RAY_ADDRESS, {shown(address)}," if address else "a cluster of Ray's"
        raise ResourceError(
            f"{where} cannot be used from here ({described(error)}); start Ray on this machine as one of the cluster's "
            f"nodes, by `ray start --address=HOST:PORT`, or leave RAY_ADDRESS out for a cluster of this machine alone."
        ) from error


def _check_address(address: str) -> None:
    """Raises RecipeError where it is that of a client alone, ResourceError where no Ray answers: Ray itself would ask
    for minutes.
    """
    if "://" in address:
        raise RecipeError(
            f"RAY_ADDRESS is {shown(address)}, by which this process would be outside Ray's cluster, and agent 0 is to "
            f"run on one of its nodes; run the command there, by `ray job submit` for one."
        )
    host, _, port = address.rpartition(":")
    if not port.isdigit() or int(port) >= 1 << 16:
        return
    try:
        with socket.create_connection((host.strip("[]"), int(port)), ANSWER_S) as connection:
            if os.environ.get("RAY_USE_TLS", "0") not in ("", "0"):
                return
            connection.sendall(_PREFACE)
            why = "" if connection.recv(9, socket.MSG_WAITALL)[_KIND] == b"\4" else "what listens there is no Ray"
    except OSError as error:
        why = error.strerror or "it does not answer"
    if why:
        raise ResourceError(
            f"Ray's head at {address}, as RAY_ADDRESS tells, is not to be reached ({why}); look whether it runs (ray "
            f"status), or leave RAY_ADDRESS out."
        )


def _check_node() -> None:
    client = importlib.import_module("ray.util.client")
    if client.ray.is_connected():
        raise RecipeError(
            "the program is connected to Ray from outside its cluster, and agent 0 is to run on one of its nodes; run "
            "it there, by `ray job submit` for one."
        )


def nodes_here() -> list[Node]:
    """Those that live and have processors, this process's first."""
    library = ray()
    own = library.get_runtime_context().get_node_id()
    found = [
        Node(
            name=str(each["NodeManagerHostname"]),
            address=str(each["NodeManagerAddress"]),
            id=str(each["NodeID"]),
            cpus=float(each["Resources"].get("CPU", 0)),
            gpus=float(each["Resources"].get("GPU", 0)),
            own=each["NodeID"] == own,
        )
        for each in library.nodes()
        if each["Alive"]
    ]
    return sorted((node for node in found if node.own or node.cpus >= 1), key=lambda node: not node.own)


def count_of_workers(team: Team) -> int:
    """How many there are if nobody says: one on each node, or for each GPU where all nodes have as many."""
    nodes = [node for node in nodes_here() if node.own or node.gpus >= 1 or team.device != "cuda"]
    each = min(int(node.gpus) for node in nodes) if team.device == "cuda" else 1
    return len(nodes) * max(1, each)


def bundles_for(team: Team, nodes: Sequence[Node]) -> list[dict[str, float]]:
    """What is asked of each node, this process's first: as many nodes as workers, or as there are and have enough.

    Raises RecipeError and ResourceError.
    """
    if team.device.startswith("cuda:") and team.device != "cuda:0":
        raise RecipeError(
            f"team.device is {shown(team.device)}, and Ray decides which GPUs a run has; take 'cuda', or 'cuda:0' for "
            f"the first of those."
        )
    for agents in range(min(team.workers, len(nodes)), 0, -1):
        wanted = [_bundle(team.device, share) for share in share_out(team.workers, [1] * agents)]
        if _fit(wanted, nodes):
            return wanted
    gpu = team.device != "cpu"
    have = ", ".join(f"{node.name} {node.cpus:g}" + (f" and {node.gpus:g} GPUs" if gpu else "") for node in nodes)
    raise ResourceError(
        f"{team.workers} workers need a processor{' and a GPU' if gpu else ''} each, nearly as many of them on each "
        f"node of Ray's, and what the nodes have is too little: {have}, the first being that of this command; take "
        f"fewer workers, or give Ray more (ray start --num-cpus)."
    )


def most_bundles(team: Team, nodes: Sequence[Node]) -> list[dict[str, float]]:
    """As `bundles_for`, with as many workers as the nodes have room for where the team has bounds."""
    if (limits := team.limits) is None:
        return bundles_for(team, nodes)
    for workers in range(min(limits.most, sum(int(node.cpus) for node in nodes)), limits.least, -1):
        with contextlib.suppress(ResourceError):
            return bundles_for(replace(team, workers=workers), nodes)
    return bundles_for(replace(team, workers=limits.least), nodes)


def _bundle(device: str, workers: int) -> dict[str, float]:
    gpus = {"cpu": 0, "cuda": workers}.get(device, 1)
    return {"CPU": float(workers), **({"GPU": float(gpus)} if gpus else {})}


def _fit(wanted: Sequence[Mapping[str, float]], nodes: Sequence[Node]) -> bool:
    """Whether the first node has what is wanted of it, and there are others for the rest. All parts are nearly equal,
    the larger ones wanting more of everything.
    """

    def enough(node: Node, part: Mapping[str, float]) -> bool:
        return node.cpus >= part["CPU"] and node.gpus >= part.get("GPU", 0)

    rest, larger = list(nodes[1:]), sorted(wanted[1:], key=lambda part: -part["CPU"])
    for part in larger:
        able = [node for node in rest if enough(node, part)]
        if not able:
            return False
        rest.remove(min(able, key=lambda node: (node.cpus, node.gpus)))
    return enough(nodes[0], wanted[0])
