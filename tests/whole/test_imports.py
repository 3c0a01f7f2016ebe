"""C9: what a person waits for at the command line is free of torch, and every public name is there."""

from __future__ import annotations

import subprocess
import sys

import pytest

import instep
from support.patience import LONG_S


def loaded_after(code: str) -> set[str]:
    """The modules that a fresh Python has loaded after `code`."""
    code = f"import sys\n{code}\nprint(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=LONG_S, check=True)
    return set(done.stderr.split())


@pytest.mark.processes
@pytest.mark.parametrize(
    "code",
    [
        "import instep",
        "import instep.recipe",
        "import instep.record.tape",
        "import instep.api",
        "import instep.cli",
        "from instep import train, Recipe, Team, Run, Monitor, Console, Component, Schedule, InstepError, errors",
        "import instep; dir(instep)",
        "from instep.cli import main; assert main(['recipes']) == 0",
        "from instep.cli import main; assert main(['train', 'gpt', '--workers', '0']) == 1",
    ],
)
def test_no_torch(code: str) -> None:
    modules = loaded_after(code)
    assert "instep" in modules
    assert "torch" not in modules


@pytest.mark.processes
def test_what_needs_torch_imports_it() -> None:
    """The test above can fail."""
    assert "torch" in loaded_after("from instep import objective")


def test_every_public_name_is_there() -> None:
    for name in instep.__all__:
        assert getattr(instep, name) is not None
    assert set(instep.__all__) <= set(dir(instep))
    namespace: dict[str, object] = {}
    exec("from instep import *", namespace)
    assert set(instep.__all__) <= set(namespace)


def test_public_names_are_those_that_lazy_import_knows() -> None:
    assert set(instep.__all__) == set(instep._PUBLIC) | set(instep._MODULES)


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="module 'instep' has no attribute 'trian'"):
        instep.trian  # noqa: B018
