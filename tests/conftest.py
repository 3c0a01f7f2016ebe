"""What holds for every test."""

from __future__ import annotations

import os
import signal

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: teams are forked from the test process
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # to ask for a GPU must not stop forked workers from using it

import pytest
from hypothesis import settings

SLOW_TIMEOUT_S = 1200

for number in (signal.SIGINT, signal.SIGHUP):  # a shell starts what runs in the background deaf to these
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.SIG_DFL if number == signal.SIGHUP else signal.default_int_handler)

# The first example of a property may start processes or import torch: time is pytest-timeout's to watch.
settings.register_profile("instep", parent=settings(), deadline=None, derandomize=True)
settings.load_profile("instep")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Gives slow tests more time than the `timeout` in pyproject.toml, unless they name their own."""
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_TIMEOUT_S))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """A suite of which nothing passed, all being skipped, say, has shown nothing: its exit status is not 0."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or session.config.option.collectonly or exitstatus != pytest.ExitCode.OK:
        return
    if not reporter.stats.get("passed"):
        session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED
