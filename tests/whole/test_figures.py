"""The page for students names the commands that its figures are made with, and shows those figures."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.pure

PROJECT = Path(__file__).parents[2]


def test_the_page_names_the_commands_that_its_figures_are_made_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(PROJECT)
    from benchmarks import figures

    text = (PROJECT / "docs" / "in-step-and-out-of-step.md").read_text()
    told = re.sub(r" \\\n *", " ", text.split("## The commands")[1].split("```")[1]).strip().splitlines()
    assert told == figures.commands()
    shown = set(re.findall(r"\]\(figures/([^)]+)\)", text))
    assert shown == {path.name for path in (PROJECT / "docs" / "figures").iterdir()}
