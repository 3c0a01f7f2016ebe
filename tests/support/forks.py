"""New Pythons for tests that are not about starting one: forks of this process, which has imported torch already."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing.process
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

from instep.team import launcher
from instep.team.processes import import_before_forks

OURS = (str(Path(__file__).parents[2]), sys.prefix)
"""Where modules are no other test's: they may lie below the folder for temporary files too."""


class Fork:
    """As `subprocess.Popen`, of a Python that calls `target` and ends with the status that it gives."""

    def __init__(
        self,
        target: Callable[[], int | None],
        *,
        cwd: Any = None,
        stdin: Any,
        stdout: Any,
        stderr: Any,
        env: Mapping[str, str],
        pass_fds: Sequence[int] = (),
        start_new_session: bool = False,
    ):
        import_before_forks()
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid:
            return
        status = 1
        try:
            gc.freeze()
            if start_new_session:
                os.setsid()
            _open_anew([stdin, stdout, stderr], pass_fds)
            os.chdir(cwd or ".")
            os.environ.clear()
            os.environ.update(env)
            _forget()
            status = target() or 0
        except SystemExit as end:
            status = int(end.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(OSError):
                sys.stdout.flush()
            os._exit(status)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float = float("inf")) -> int:
        until = time.monotonic() + timeout
        while (status := self.poll()) is None:
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired("a fork", timeout)
            time.sleep(0.005)
        return status

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _open_anew(standard: Sequence[Any], others: Sequence[int]) -> None:
    """Has these three and the others open, and nothing else."""
    null = os.open(os.devnull, os.O_RDWR)
    given = [null if file == subprocess.DEVNULL else file.fileno() for file in standard]
    for number, descriptor in enumerate([os.dup(each) for each in given]):
        os.dup2(descriptor, number)
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        if descriptor > 2 and descriptor not in others:
            with contextlib.suppress(OSError):
                os.close(descriptor)
    sys.stdin = sys.__stdin__ = os.fdopen(0, closefd=False)  # type: ignore[misc]  # it is called final
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    sys.__stdout__, sys.__stderr__ = sys.stdout, sys.stderr  # type: ignore[misc]


def _forget() -> None:
    """What a new Python would not know: handlers of signals, children, the program, and modules of other tests."""
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    multiprocessing.process._children.clear()  # type: ignore[attr-defined]
    sys.modules["__main__"] = ModuleType("__main__")
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None) or ""
        if file.startswith(tempfile.gettempdir()) and not file.startswith(OURS):
            del sys.modules[name]


def _python(command: Sequence[str], **options: Any) -> Fork:
    """For `python -c CODE`."""
    return Fork(lambda: exec(command[2], {"__name__": "__main__"}), **options)


def forking() -> Any:
    """What patches Instep's launcher so that its new Pythons are forks."""
    names = {**vars(subprocess), "Popen": _python}
    return mock.patch.object(launcher, "subprocess", SimpleNamespace(**names))


def script(path: str, **options: Any) -> Fork:
    """For `python PATH`, whose own new Pythons are forks too."""

    def main() -> None:
        sys.argv[:] = [path]
        with forking():
            exec(compile(Path(path).read_text(), path, "exec"), vars(sys.modules["__main__"]))

    return Fork(main, **options)


def instep(*line: str, **options: Any) -> Fork:
    """For `python -m instep LINE`, whose own new Pythons are forks too."""

    def main() -> int:
        from instep.cli import main

        sys.argv[:] = ["instep", *line]
        sys.path.insert(0, os.getcwd())
        with forking():
            return main()

    return Fork(main, **options)
