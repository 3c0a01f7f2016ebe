"""What a user calls first has an example in its docstring, and these run, one after the other, as they stand."""

from __future__ import annotations

import dataclasses
import doctest
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import instep

pytestmark = pytest.mark.processes

FIRST: tuple[Callable[..., Any], ...] = (
    instep.objective,
    instep.Recipe,
    instep.Team,
    instep.train,
    instep.Run.model,
    instep.replay,
    instep.simulate,
    instep.gradient_checkpointing.profile,
    instep.gradient_checkpointing.plan,
    instep.gradient_checkpointing.apply,
)
"""In the order of a session: each may use what those before it have made."""


@pytest.mark.usefixtures("forked_pythons")
def test_the_examples_of_what_is_called_first_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = {"instep": instep, "torch": torch, "dataclasses": dataclasses, "__name__": "__main__"}
    reader, runner, said = doctest.DocTestParser(), doctest.DocTestRunner(verbose=False), list[str]()
    for number, function in enumerate(FIRST):
        test = reader.get_doctest(str(function.__doc__), names, function.__qualname__, None, number)
        assert test.examples, f"{function.__qualname__} has no example"
        runner.run(test, out=said.append, clear_globs=False)
        names = test.globs
        assert not said, "".join(said)
