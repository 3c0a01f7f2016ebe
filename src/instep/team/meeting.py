"""How agents find agent 0, and which of a host's addresses the others are given. No torch in the agent's own process.

Under torchrun agent 0 leaves its address and the run's secret in torchrun's own store. A store's client blocks for
ever where the store's process is stopped (torch 2.13), and its threads are not there in what forks: so each question is
asked by a process of its own, which is killed when it takes too long. Under srun agent 0 leaves both in a file of the
user's home, which the hosts of a cluster have in common as a rule; where they don't, the secret is in the environment,
and the address follows from the list of hosts and the job's number. Ray brings both to the agents that it starts.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import ipaddress
import os
import select
import signal
import socket
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from instep.descendants import die_with_parent
from instep.errors import RecipeError, ResourceError, WorkerError, shown
from instep.team import meeting_file
from instep.team.link import MAGIC, AgentLink, Listener
from instep.team.messages import Failed
from instep.team.place import Place
from instep.team.waiting import ready_of

ANSWER_S = 5.0
"""Seconds that a store has to answer who looks for agent 0."""

PUBLISH_S = 30.0
"""Seconds that torchrun's store has to take agent 0's address: the process that asks may have torch to import."""

MORE_S = 2.0
"""Seconds that its other stores have, once one has taken it."""

OPEN_S = 0.5
"""Seconds in which a store that is there takes a connection."""

SAY_S = 10.0
"""Seconds between two lines on who is awaited."""

FAREWELL_S = 5.0
"""Seconds that the other agents have to hear of the run's end."""

SECRET_BYTES = 32
LEAST_SECRET = 16
"""Characters of a secret from the environment at least."""

_SIOCGIFADDR = 0x8915
_ANSWER_BYTES = 4096


@dataclass(frozen=True)
class Found:
    """Agent 0's address, and the run's secret."""

    address: tuple[str, int]
    secret: bytes


# --------------------------------------------------------------------------------------------------------- meeting


def draw_secret(place: Place, environ: Mapping[str, str]) -> bytes:
    """The run's secret, for agent 0. Raises RecipeError where srun's environment has one that is too short."""
    given = _given_secret(environ) if place.launcher == "srun" else None
    return place.secret or given or os.urandom(SECRET_BYTES)


def publish(place: Place, address: tuple[str, int], secret: bytes) -> None:
    """Has the other agents find agent 0. What an agent 0 before it said counts no more. Raises ResourceError."""
    if place.secret:
        return  # they have it, and the address, from who has started them
    value = msgspec.json.encode([*address, secret.hex()])
    if place.launcher == "srun":
        if _given_secret(os.environ) is None:
            meeting_file.write(_file(place), value)
        return
    answers = _ask([partial(_set, store, place, value) for store in place.stores], PUBLISH_S, wanted=b"", more_s=MORE_S)
    if not any(good for good, _ in answers):
        where = " or ".join(f"{host}, port {port}," for host, port in place.stores)
        why = next((said.decode(errors="replace") for _, said in answers if said), "it does not answer")
        raise ResourceError(
            f"agent 0 cannot tell the others its address, since torchrun's store at {where} is not to be reached "
            f"({why}); look whether torchrun still runs there."
        )


def withdraw(place: Place) -> None:
    """Takes away what `publish` has left in a file, for agent 0 at its end."""
    if place.launcher == "srun" and _given_secret(os.environ) is None:
        meeting_file.remove(_file(place))


def say_ended(place: Place) -> None:
    """Has those who look for agent 0 learn that it has failed. Raises ResourceError.

    Under torchrun, unless agent 0's own is the one that all meet at: with that its store ends, see `check_open`.
    """
    if place.launcher == "srun" and (secret := _given_secret(os.environ)) is not None:
        _say_to_who_comes(place, secret)
    elif place.launcher == "srun":
        meeting_file.write(_file(place), _ENDED)
    elif place.stores and not _is_here(place.stores[0][0]):
        _ask([partial(_set, store, place, _ENDED) for store in place.stores], PUBLISH_S, wanted=b"", more_s=MORE_S)


def _say_to_who_comes(place: Place, secret: bytes) -> None:
    """Waits a while for all others, and tells each that agent 0 has failed."""
    until, links, told = time.monotonic() + FAREWELL_S, list[AgentLink](), 0
    with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
        listener = stack.enter_context(contextlib.closing(Listener((own_address(place), place.port), secret)))
        while told < place.agents - 1 and time.monotonic() < until:
            ready = ready_of([*listener.sources(), *links], [], 0.2)
            for link in listener.accept():
                stack.enter_context(contextlib.closing(link)).send(Failed("WorkerError", _FAILED_BEFORE))
                links.append(link)
            for link in [link for link in links if link in ready]:
                try:
                    link.receive()
                except (EOFError, OSError):
                    links.remove(link)
                    told += 1


def _is_here(host: str) -> bool:
    """Whether this is a name or an address of this host."""
    with contextlib.suppress(OSError):
        return route_address(host) in {each[4][0] for each in socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)}
    return False


def find(place: Place, within_s: float) -> Found | None:
    """Where agent 0 is, as far as that can be told in so many seconds. Raises RecipeError as `draw_secret` does, and
    where the hosts have no folder in common that tells; WorkerError where agent 0 has failed before.
    """
    if place.secret:
        return Found((place.head, place.port), place.secret)
    if place.launcher == "srun":
        return _find_by_srun(place, within_s)
    answers = _ask([partial(_get, store, place) for store in place.stores], within_s, wanted=b"[")
    for good, answer in answers:
        if good and (found := _published(answer)) is not None:
            return found
    if (True, _ENDED) in answers and os.environ.get("TORCHELASTIC_MAX_RESTARTS") == "0":  # else it may come again
        raise WorkerError(_FAILED_BEFORE)
    return None


_FAILED_BEFORE = "the run failed before it began, as agent 0 says on the first host."


def _find_by_srun(place: Place, within_s: float) -> Found | None:
    if (secret := _given_secret(os.environ)) is not None:
        head = own_address(place) if place.host == 0 else place.head  # to itself it often is a loopback address
        try:
            address = str(socket.getaddrinfo(head, place.port, type=socket.SOCK_STREAM)[0][4][0])
        except OSError:
            return None
        return Found((address, place.port), secret)
    value = meeting_file.read(_file(place))
    if value == _ENDED:
        raise WorkerError(_FAILED_BEFORE)
    if (found := _published(value)) is not None:
        return found
    if _listens((place.head, place.port), within_s) and not meeting_file.read(_file(place)):
        raise RecipeError(
            f"host {place.host} does not see the file in {meeting_file.folder()} that agent 0 has left the run's "
            f"secret in, so the hosts have no such folder in common; put `export "
            f"INSTEP_SECRET=$(openssl rand -hex 32)` before srun."
        )
    return None


def _listens(address: tuple[str, int], within_s: float) -> bool:
    """Whether an agent 0 waits there."""
    with contextlib.suppress(OSError), socket.create_connection(address, within_s) as connection:
        return connection.recv(len(MAGIC), socket.MSG_WAITALL) == MAGIC
    return False


def _published(value: bytes) -> Found | None:
    """What `publish` has left there, if it is that."""
    with contextlib.suppress(msgspec.MsgspecError, ValueError):
        host, port, secret = msgspec.json.decode(value, type=_Published)
        return Found((host, port), bytes.fromhex(secret))
    return None


def _file(place: Place) -> str:
    """The name of the file in the home."""
    return f"srun-{place.run}"


_ENDED = b"ended"


def check_open(place: Place) -> None:
    """Raises WorkerError where nothing listens any more where torchrun's store was: agent 0 will not come then."""
    refused = ""
    for host, port in place.stores:
        try:
            socket.create_connection((host, port), OPEN_S).close()
            return
        except ConnectionRefusedError:
            refused = f"{host}, port {port}"
        except OSError:
            continue  # a name that is known elsewhere alone, or too slow a way
    if refused:
        raise WorkerError(
            f"agent {place.agent} ends: the torchrun that all meet at, at {refused}, has ended before agent 0 came; it "
            f"tells why."
        )


_Published = tuple[
    Annotated[str, Meta(max_length=255)], Annotated[int, Meta(gt=0, lt=1 << 16)], Annotated[str, Meta(max_length=1000)]
]


def _given_secret(environ: Mapping[str, str]) -> bytes | None:
    """That of the environment, if it has one. Raises RecipeError where it is short enough to be guessed."""
    secret = environ.get("INSTEP_SECRET", "")
    if secret and len(secret) < LEAST_SECRET:
        raise RecipeError(
            f"INSTEP_SECRET in the environment has {len(secret)} characters, and the agents of a run under srun need "
            f"one of at least {LEAST_SECRET} to know each other by; put `export INSTEP_SECRET=$(openssl rand -hex 32)` "
            f"before srun, or leave it out where the hosts have the home folder in common."
        )
    return secret.encode() or None


# ------------------------------------------------------------------------------------------- questions to a store


def _key(place: Place) -> str:
    return f"instep/{place.run}/agent 0"


def _store(address: tuple[str, int], within_s: float = PUBLISH_S) -> Any:
    from torch._C._distributed_c10d import TCPStore

    return TCPStore(
        address[0], address[1], is_master=False, wait_for_workers=False, timeout=timedelta(seconds=within_s)
    )


def _set(address: tuple[str, int], place: Place, value: bytes) -> bytes:
    _store(address).set(_key(place), value)
    return b""


def _get(address: tuple[str, int], place: Place) -> bytes:
    store = _store(address, ANSWER_S)
    return bytes(store.get(_key(place))) if store.check([_key(place)]) else b""


def _ask(
    questions: Sequence[Callable[[], bytes]], within_s: float, *, wanted: bytes, more_s: float = 0.0
) -> list[tuple[bool, bytes]]:
    """What each answers, in a process of its own, and whether that went well; those that take longer are left out.

    After an answer that begins with `wanted` the others have `more_s`.
    """
    until = time.monotonic() + within_s
    asked = dict(_asking(question) for question in questions)
    poll = select.poll()
    for reader in asked:
        poll.register(reader, select.POLLIN)
    answers: list[tuple[bool, bytes]] = []
    try:
        while len(answers) < len(asked) and (left := until - time.monotonic()) > 0:
            for reader, _ in poll.poll(1000 * left):
                said = os.read(reader, _ANSWER_BYTES)
                answers.append((said[:1] == b"+", said[1:]))
                poll.unregister(reader)
                if said.startswith(b"+" + wanted):
                    until = min(until, time.monotonic() + more_s)
    finally:
        for reader, pid in asked.items():
            os.close(reader)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)
    return answers


def _asking(question: Callable[[], bytes]) -> tuple[int, int]:
    """Has a new process answer: the descriptor that its answer comes from, and its number."""
    parent = os.getpid()
    reader, writer = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writer)
        return reader, pid
    try:
        die_with_parent()
        if os.getppid() != parent:
            os._exit(1)
        os.closerange(3, writer)  # a copy of another agent's connection would hide its end
        os.closerange(writer + 1, os.sysconf("SC_OPEN_MAX"))
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 2)  # torch complains of names that it cannot resolve
        try:
            answer = b"+" + question()
        except Exception as error:
            answer = b"-" + (str(error).splitlines() or [""])[0].encode(errors="replace")[:400]
        os.write(writer, answer[:_ANSWER_BYTES])
    finally:
        os._exit(0)  # C++ objects of the parent's are its own


# ------------------------------------------------------------------------------------------------------- addresses


def own_address(place: Place, interface: str = "") -> str:
    """The address of this host that the other agents are given: of `interface`, a name or an address, or else of the
    one on the way to them. Raises RecipeError where there is none, or no telling which.
    """
    if place.secret:
        return place.head
    if interface:
        return address_of(interface)
    if place.hosts == 1:
        return "127.0.0.1"
    for name in [*(host for host, _ in place.stores), *place.others]:
        with contextlib.suppress(OSError):
            address = route_address(name)
            if not ipaddress.ip_address(address.partition("%")[0]).is_loopback:
                return address
    with contextlib.suppress(OSError):  # names that resolve to this host itself, only here: the way to anywhere
        return route_address("192.0.2.1")  # an address of nobody (RFC 5737); nothing is sent
    found = [each for each in _interfaces().values() if not ipaddress.ip_address(each).is_loopback]
    if len(found) == 1:
        return found[0]
    listed = ", ".join(f"{name} {address}" for name, address in _interfaces().items())
    raise RecipeError(
        f"host {place.host} cannot tell by which of its interfaces ({listed}) the other hosts reach it; name one by "
        f"team.interface."
    )


def route_address(to: str, interface: str = "") -> str:
    """This host's own address on the way to another: what a socket there would be bound to; or that of `interface`.

    Raises OSError where there is no way.
    """
    if interface:
        return address_of(interface)
    error = OSError(errno.ENETUNREACH, "no way there")
    for family, _, _, _, address in socket.getaddrinfo(to, 9, type=socket.SOCK_DGRAM):
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect(address)  # nothing is sent
                return str(probe.getsockname()[0])
        except OSError as found:
            error = found
    raise error


def address_of(interface: str) -> str:
    """An interface's address, by its name; or the address itself, if it is one of this host's. Raises RecipeError."""
    here = _interfaces()
    if interface in here:
        return here[interface]
    try:
        family = socket.AF_INET6 if ipaddress.ip_address(interface).version == 6 else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind((interface, 0))
        return interface
    except (ValueError, OSError):
        listed = ", ".join(f"{name} ({address})" for name, address in here.items()) or "none"
        raise RecipeError(
            f"team.interface is {shown(interface)}, which is no interface with an address, and no address, of host "
            f"{socket.gethostname()}; it has {listed}."
        ) from None


def _interfaces() -> dict[str, str]:
    """Addresses (IPv4) of this host's interfaces, by name."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # it has none
                answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                found[name] = socket.inet_ntoa(answer[20:24])
    return found
