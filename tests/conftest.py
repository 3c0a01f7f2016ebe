"""What holds for every test."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: teams are forked from the test process
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # to ask for a GPU must not stop forked workers from using it

import pytest
from hypothesis import HealthCheck, settings

from support import large_pages, shares

SLOW_TIMEOUT_S = 1200

for number in (signal.SIGINT, signal.SIGHUP):  # a shell starts what runs in the background deaf to these
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.SIG_DFL if number == signal.SIGHUP else signal.default_int_handler)

# The first example of a property may start processes or import torch: time is pytest-timeout's to watch.
settings.register_profile(
    "instep", parent=settings(), deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("instep")


STARTS = {"os.fork", "os.forkpty", "os.posix_spawn", "os.system", "subprocess.Popen"}
"""Events of Python's own by which a process is started (PEP 578)."""

HERE = os.getpid()
_started: set[str] = set()


def _note(event: str, _: tuple[Any, ...]) -> None:
    if event in STARTS and os.getpid() == HERE:
        _started.add(event)


sys.addaudithook(_note)


def pytest_runtest_logstart() -> None:
    """What a module's fixtures start as they end, after its last test, is not the next test's."""
    _started.clear()


@pytest.fixture(autouse=True)
def _of_its_kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Holds a test to what its mark says of it, or the lack of one: see `markers` in pyproject.toml."""
    pure, processes = (request.node.get_closest_marker(kind) is not None for kind in ("pure", "processes"))
    if pure and "torch" in sys.modules:
        import torch

        def computed(*_: Any, **__: Any) -> None:
            pytest.fail("a test that is marked pure computes a gradient; take the mark away")

        monkeypatch.setattr(torch.autograd, "backward", computed)
        monkeypatch.setattr(torch.autograd, "grad", computed)
    yield
    started = sorted(_started)
    _started.clear()
    if started and not processes:
        pytest.fail(f"it starts a process ({', '.join(started)}); mark it, or its file, with pytest.mark.processes")


@pytest.fixture
def forked_pythons() -> Iterator[None]:
    """New Pythons that Instep starts are forks of this process, without the seconds that an import of torch takes."""
    from support.forks import forking

    with forking():
        yield


@pytest.fixture
def agents_meet_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Agents of several hosts find each other on this machine, and the first one is not long in leaving."""
    from instep.team import farewell
    from support.agents import meet_here

    meet_here(monkeypatch, tmp_path)
    monkeypatch.setattr(farewell, "FAREWELL_S", 1.0)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--one-in",
        type=int,
        default=1,
        metavar="N",
        help="of the slow parameters of a test run one in N, at least one: the same ones each time",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Gives slow tests more time than the `timeout` in pyproject.toml, unless they name their own, and leaves out those
    that `--one-in` does.
    """
    slow = [item for item in items if item.get_closest_marker("slow")]
    for item in slow:
        if not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_TIMEOUT_S))
    left_out = shares.left_out((item.nodeid for item in slow), config.getoption("--one-in"))
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in left_out])
    items[:] = [item for item in items if item.nodeid not in left_out]


def pytest_collection_finish(session: pytest.Session) -> None:
    """Most tests fork this process, which has its modules now."""
    if session.items and Path("/proc/self/maps").exists():
        large_pages.collapse()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """A suite of which nothing passed, all being skipped, say, has shown nothing: its exit status is not 0."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or session.config.option.collectonly or exitstatus != pytest.ExitCode.OK:
        return
    if not reporter.stats.get("passed"):
        session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED
