"""The first process of a host of `support.hosts`: makes it what it is, and buries its dead until it is killed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

_HOOK = """\
import time
seconds, time_s, time_ns = {seconds}, time.time, time.time_ns
time.time, time.time_ns = lambda: time_s() + seconds, lambda: time_ns() + int(seconds * 1e9)
"""


def begin(name: str, seconds: float, code: list[str], folders: list[str]) -> None:
    """The first process of a host: makes it what it is, and then buries its dead until it is killed."""
    held = {folder: os.open(folder, os.O_PATH) for folder in code if folder.startswith(("/tmp/", "/run/", "/dev/"))}
    own = ["/tmp", "/dev/shm", "/run", *(each for each in ["/var/tmp"] if os.path.isdir(each))]
    commands = ["mount --make-rprivate /", "mount -t proc proc /proc", *(f"mount -t tmpfs own {each}" for each in own)]
    for folder, descriptor in held.items():  # a path would lead into what covers it now
        commands.append(f"mkdir -p {folder}; mount --no-canonicalize --bind /proc/self/fd/{descriptor} {folder}")
        commands.append(f"mount -o remount,bind,ro {folder}")
    commands += [f"mkdir -p {' '.join(folders)} /tmp/hook", f"echo '127.0.0.1 {name} localhost' >/tmp/hosts"]
    commands += ["mount --bind /tmp/hosts /etc/hosts", f"hostname {name}", "mount -o remount,bind,ro /"]
    for folder in _mounted_below("/"):
        if not folder.startswith((*own, "/proc", "/dev", "/sys")):
            commands.append(f"mount -o remount,bind,ro {folder}")
    subprocess.run(["sh", "-ec", "\n".join(commands)], check=True, pass_fds=list(held.values()))
    Path("/tmp/hook/sitecustomize.py").write_text(_HOOK.format(seconds=seconds))
    print("ready", flush=True)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})  # it is kept until it is waited for
    while True:
        with contextlib.suppress(ChildProcessError):
            while True:
                os.waitpid(-1, 0)
        signal.sigwait({signal.SIGCHLD})


def _mounted_below(root: str) -> list[str]:
    lines = Path("/proc/self/mounts").read_text().splitlines()
    return [path for line in lines if (path := line.split()[1]) != root]


if __name__ == "__main__":
    begin(**json.loads(sys.argv[1]))
