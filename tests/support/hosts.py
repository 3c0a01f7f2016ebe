"""Hosts for tests: namespaces of this machine, each with a network, a name, processes, memory and files of its own.

A host cannot tell that it is none: its interface has an address that the others reach, its name resolves to 127.0.0.1
alone, as on many machines, /tmp, /dev/shm, HOME and what is run are its own, everything else can only be read, and its
clocks are not those of the others. Names and addresses are drawn for each set of hosts.

All is held by processes that the kernel kills when the one that made them dies, so that nothing is left of a test that
was killed. Needs root, iproute2 and util-linux: else tests are skipped, or fail where INSTEP_HOSTS is "required".
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest

from support.copied_disk import copy_all
from support.patience import LONG_S

Made = TypeVar("Made")

HOME, WORK = "/tmp/home", "/tmp/work"
"""On each host: the user's folder, and the one that commands run in."""

SHIFT_S = 3
"""Seconds that the wall clock of Python's processes is ahead on host 1, twice as many on host 2, and so on."""

_SHARE = """\
import ctypes, os, sys
library = ctypes.CDLL(None, use_errno=True)
def done(value):
    assert value >= 0, os.strerror(ctypes.get_errno())
    return value
folder, source, *others = sys.argv[1:]
space = {pid: os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY) for pid in (source, *others)}
for other in others:
    done(library.setns(space[source], 0))
    tree = done(library.syscall(428, -100, folder.encode(), 1))  # open_tree, a clone
    done(library.setns(space[other], 0))
    done(library.syscall(429, tree, b"", -100, folder.encode(), 4))  # move_mount
"""

_NAMESPACES = ["--net", "--mount", "--uts", "--ipc", "--pid", "--time"]
_ROOT = Path(__file__).resolve().parents[2]
_FIRST = Path(__file__).with_name("host_first.py")


@functools.cache
def missing() -> str:
    """Why there can be no hosts here, or ""."""
    for program in ("ip", "tc", "unshare", "nsenter", "setpriv", "mount"):
        if shutil.which(program) is None:
            return f"there is no {program} here"
    needs = "ip link add name va type veth peer name vb && mount -t tmpfs own /tmp"
    tried = subprocess.run(
        ["unshare", *_NAMESPACES, "--fork", "sh", "-c", needs],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return f"no namespaces here: {tried.stderr.strip()}" if tried.returncode else ""


class Recorded:
    """A process in a session of its own, whose output goes into two files of `folder`."""

    def __init__(self, command: Sequence[str], folder: Path, name: str, **more: Any):
        self._out, self._err = folder / f"{name}.out", folder / f"{name}.err"
        with self._out.open("w") as out, self._err.open("w") as err:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True, **more
            )

    @property
    def out(self) -> str:
        return self._out.read_text()

    @property
    def err(self) -> str:
        return self._err.read_text()


class Command(Recorded):
    """A command on a host, its output in files of this machine."""

    def __init__(self, host: Host, arguments: Sequence[str], environment: Mapping[str, str]):
        name = f"{host.number}-{next(host.commands)}"
        super().__init__(host.entering([*_environment(environment), *arguments]), host.outputs, name)

    @property
    def pid(self) -> int:
        """Of the command itself, as this machine counts."""
        until = time.monotonic() + 60
        while time.monotonic() < until:
            with contextlib.suppress(OSError, ValueError, IndexError):
                (child,) = _children(self.process.pid)
                return child
            time.sleep(0.005)
        raise ProcessLookupError("the command is not there")

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def ends(self, within_s: float = LONG_S) -> int:
        """Waits for its end; gives the exit status."""
        try:
            return self.process.wait(within_s)
        except subprocess.TimeoutExpired:
            pytest.fail(f"it did not end in {within_s} s; stdout {self.out!r}, stderr {self.err!r}")


class Host:
    """One of them. `address`: of its interface, which has the name `interface`."""

    def __init__(
        self, number: int, name: str, address: str, interface: str, outputs: Path, commands: Iterator[int] | None = None
    ):
        self.number, self.name, self.address, self.interface, self.outputs = number, name, address, interface, outputs
        monotonic = str(1000 * (number + 1))  # seconds since another start of the machine
        self.commands, self._entered = commands or itertools.count(), list[Command]()
        first = {"name": name, "seconds": SHIFT_S * number, "code": _code(), "folders": [HOME, WORK]}
        with (outputs / f"{number}.err").open("w") as err:
            self._process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "unshare", *_NAMESPACES, "--monotonic", monotonic, "--boottime",
                 monotonic, "--fork", "--kill-child", sys.executable, "-S", "-E", str(_FIRST), json.dumps(first)],
                stdout=subprocess.PIPE, stderr=err, stdin=subprocess.DEVNULL,
            )  # fmt: skip
        assert self._process.stdout is not None
        if self._process.stdout.readline() != b"ready\n":
            self._process.kill()
            pytest.fail(f"the host does not start: {(outputs / f'{number}.err').read_text()}")
        (self.pid,) = _children(self._process.pid)
        self.environment = {
            **{name: value for name, value in os.environ.items() if name in ("PATH", "LANG", "LC_ALL", "VIRTUAL_ENV")},
            "HOME": HOME, "TMPDIR": "/tmp", "PYTHONPATH": f"/tmp/hook:{WORK}", "PYTHONDONTWRITEBYTECODE": "1",
        }  # fmt: skip

    def path(self, inside: str = WORK) -> Path:
        """Where this machine finds a file of the host's."""
        return Path(f"/proc/{self.pid}/root") / inside.lstrip("/")

    def start(self, *arguments: str, **environment: str) -> Command:
        """Begins a command in the folder `WORK`."""
        self._entered.append(Command(self, arguments, {**self.environment, **environment}))
        return self._entered[-1]

    def run(self, *arguments: str, within_s: float = LONG_S, **environment: str) -> str:
        """What a command prints. Fails if it does."""
        command = self.start(*arguments, **environment)
        assert command.ends(within_s) == 0, command.err
        return command.out

    def entering(self, arguments: Sequence[str]) -> list[str]:
        """The command line that runs another on the host."""
        return ["setpriv", "--pdeathsig", "KILL", "nsenter", "--target", str(self.pid), "--all", f"--wd={self.path()}",
                *arguments]  # fmt: skip

    def enter(self) -> None:
        """Moves this thread to the host's network, name and System V's shared memory."""
        library = ctypes.CDLL(None, use_errno=True)
        for kind in ("net", "uts", "ipc"):
            descriptor = os.open(f"/proc/{self.pid}/ns/{kind}", os.O_RDONLY)
            assert library.setns(descriptor, 0) == 0, os.strerror(ctypes.get_errno())
            os.close(descriptor)

    def made_there(self, make: Callable[[], Made]) -> Made:
        """What this makes in the host's network, by a thread of this process: its sockets stay there."""
        found: list[Made] = []

        def work() -> None:
            self.enter()
            found.append(make())

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        return found[0]

    def traffic(self) -> tuple[int, int]:
        """Bytes that its interface has received and sent, frames and all."""
        for line in Path(f"/proc/{self.pid}/net/dev").read_text().splitlines():
            name, _, counts = line.strip().partition(":")
            if name == self.interface:
                numbers = counts.split()
                return int(numbers[0]), int(numbers[8])
        raise AssertionError(f"it has no interface {self.interface}")

    def processes(self) -> list[int]:
        """All that run on the host but its first, as this machine counts."""
        own = os.readlink(f"/proc/{self.pid}/ns/pid")
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if os.readlink(entry / "ns/pid") == own and _state(entry) != "Z":
                    found.append(int(entry.name))
        return [pid for pid in found if pid != self.pid]

    def stop(self) -> None:
        """Suspends all that runs there."""
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)

    def go_on(self) -> None:
        """Wakes all that was suspended."""
        self._wake_entered()
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    def _wake_entered(self) -> None:
        """What has entered the host suspends itself with what it has started there."""
        for command in self._entered:
            if command.process.poll() is None:
                command.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """Ends the host and all that runs on it, without a word to the others."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self._wake_entered()  # or nobody would bury its dead
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


class Hosts:
    """So many, on one network. Skips the test where there can be none. `outputs`: a folder for what commands print.

    named: whether each can resolve the names of the others.
    """

    def __init__(self, count: int, outputs: Path, *, named: bool = True):
        if why := missing():
            if os.environ.get("INSTEP_HOSTS") == "required":
                pytest.fail(f"{why}, and INSTEP_HOSTS is required")
            pytest.skip(why)
        outputs.mkdir(exist_ok=True, parents=True)
        draw = random.Random()
        self.subnet, word = f"10.{draw.randint(64, 250)}.{draw.randint(0, 255)}", f"{draw.getrandbits(20):05x}"
        self._network = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "sh", "-c", "echo ready; exec sleep infinity"],
            stdout=subprocess.PIPE,
        )
        self.hosts: list[Host] = []
        self._named, self._disks = named, dict[int, int]()
        try:
            assert self._network.stdout is not None
            assert self._network.stdout.readline() == b"ready\n"
            self._ip("ip link add name bridge type bridge", "ip link set bridge up")
            for number, last in enumerate(draw.sample(range(2, 250), count)):
                self.hosts.append(Host(number, f"n{number}-{word}", f"{self.subnet}.{last}", f"net{word}", outputs))
                self._plug(self.hosts[-1])
            for host in self.hosts:
                self._introduce(host)
        except BaseException:
            self.close()
            raise

    def _plug(self, host: Host) -> None:
        port, card = f"port{host.number}", f"02:00:00:00:01:{host.number:02x}"  # the same after another start
        self._ip(
            f"ip link add {port} type veth peer name {host.interface} address {card} netns {host.pid}",
            f"ip link set {port} master bridge up",
        )
        self._ip(
            f"ip addr add {host.address}/24 dev {host.interface}",
            f"ip link set {host.interface} up",
            "ip link set lo up",
            at=host.pid,
        )

    def _ip(self, *commands: str, at: int | None = None) -> None:
        """Runs commands in a network: by default in the one between the hosts."""
        where = at or self._network.pid
        subprocess.run(["nsenter", "--target", str(where), "--net", "sh", "-ec", "\n".join(commands)], check=True)

    def __getitem__(self, number: int) -> Host:
        return self.hosts[number]

    def __iter__(self) -> Iterator[Host]:
        return iter(self.hosts)

    def __len__(self) -> int:
        return len(self.hosts)

    def put(self, files: Mapping[str, str | bytes]) -> None:
        """Puts files into the folder `WORK` of all."""
        for host in self:
            for name, content in files.items():
                path = host.path() / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content.encode() if isinstance(content, str) else content)

    def share(self, folder: str) -> None:
        """Gives all hosts this folder of the first, as a network's file system does."""
        pids = [str(host.pid) for host in self]
        subprocess.run([sys.executable, "-c", _SHARE, folder, *pids], check=True)

    def cut(self, number: int) -> None:
        """Takes the host's cable out: nothing comes, nothing goes, and nobody is told."""
        self._ip(f"ip link set port{number} nomaster")

    def heal(self, number: int) -> None:
        """Puts it in again, and undoes `cut_from`, `cut_to` and `cut_between`."""
        port, host = f"port{number}", self[number]
        self._ip(f"ip neigh flush dev {host.interface} nud permanent || true", at=host.pid)
        self._ip(f"ip link set {port} master bridge up", f"tc qdisc del dev {port} root 2>/dev/null || true")
        self._ip(f"tc qdisc del dev {host.interface} root 2>/dev/null || true", at=host.pid)

    def cut_from(self, number: int) -> None:
        """What the host sends is lost; it still hears the others."""
        self._ip(f"tc qdisc replace dev {self[number].interface} root pfifo limit 0", at=self[number].pid)

    def cut_to(self, number: int) -> None:
        """What is sent to the host is lost; the others still hear it."""
        self._ip(f"tc qdisc replace dev port{number} root pfifo limit 0")

    def cut_between(self, number: int, other: int) -> None:
        """What the host sends to that other one is lost; nothing else is."""
        there = f"{self[other].address} lladdr 02:00:00:00:00:01 dev {self[number].interface}"  # a card of nobody
        self._ip(f"ip neigh replace {there} nud permanent", at=self[number].pid)

    def shut(self, number: int, but: int) -> None:
        """A firewall there: nothing comes to the ports that the system gives to programs, but from this one."""
        of_card = f"ip rule add pref %s iif {self[number].interface} ipproto tcp"
        rules = [f"{of_card % 50} sport {but} lookup local", f"{of_card % 100} dport 32768-60999 blackhole"]
        self._ip(*rules, "ip rule add pref 200 lookup local", "ip rule del pref 0", at=self[number].pid)

    def crash(self, number: int) -> None:
        """Takes the cable out and ends the host, so that nobody is told; its folder `WORK` is kept for `boot`."""
        host = self[number]
        disk = os.open(host.path(), os.O_PATH | os.O_DIRECTORY)
        self._ip(f"ip link set port{number} nomaster")
        host.kill()
        self._ip(f"ip link del port{number} 2>/dev/null || true")
        self._disks[number] = disk

    def boot(self, number: int) -> None:
        """Starts it again, with its name, address and folder `WORK`."""
        old, disk = self[number], self._disks.pop(number)
        host = Host(number, old.name, old.address, old.interface, old.outputs, old.commands)
        self.hosts[number] = host
        copy_all(f"/proc/self/fd/{disk}", host.path())
        os.close(disk)
        self._plug(host)
        self._introduce(host)

    def _introduce(self, host: Host) -> None:
        """Has it resolve the names of the others."""
        if self._named:
            with host.path("/tmp/hosts").open("a") as file:  # which is /etc/hosts there
                file.writelines(f"{other.address} {other.name}\n" for other in self.hosts if other is not host)

    def shape(self, number: int, rate: str) -> None:
        """Limits both ways to a rate such as ``100mbit``."""
        limit = f"root tbf rate {rate} burst 256k latency 50ms"
        self._ip(f"tc qdisc replace dev port{number} {limit}")
        self._ip(f"tc qdisc replace dev {self[number].interface} {limit}", at=self[number].pid)

    def close(self) -> None:
        """Ends all, and all that runs there."""
        for host in self.hosts:
            host.kill()
        self._network.kill()
        self._network.wait()
        assert self._network.stdout is not None
        self._network.stdout.close()

    def __enter__(self) -> Hosts:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _environment(variables: Mapping[str, str]) -> list[str]:
    return ["env", "--ignore-environment", *(f"{name}={value}" for name, value in variables.items())]


def _children(pid: int) -> list[int]:
    return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def _state(entry: Path) -> str:
    return (entry / "stat").read_text().rpartition(")")[2].split()[0]


def _code() -> list[str]:
    """Folders that a host must find although they may lie in one that it has for itself."""
    return sorted({str(_ROOT), sys.prefix, sys.base_prefix, str(Path(sys.executable).resolve().parent)})
