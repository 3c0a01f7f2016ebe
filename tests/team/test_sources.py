"""Source files that a process computes with: the same digests where the same files were loaded, and no others."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from instep import sources as of_sources
from instep.sources import first_difference, models, note_loaded, sources

SCRIPT = "class Net:\n    def forward(self):\n        return {number}\n\ndef loss(model, batch):\n    return {number}\n"


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file of a module that this process has loaded."""
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "module_of_sources.py"
    path.write_text("x = 1\n")
    importlib.import_module(path.stem)
    yield path
    del sys.modules[path.stem]


def test_another_file_of_a_module_is_a_difference_and_its_name_is_told(module: Path) -> None:
    before = sources()
    assert first_difference(before, sources()) == ""
    module.write_text("x = 2\n")
    assert first_difference(before, sources()) == "module module_of_sources"


def test_what_comes_with_python_or_is_installed_is_left_out() -> None:
    names = {name.split()[1].partition(".")[0] for name in sources()}
    assert "instep" in names
    assert names.isdisjoint({"pytest", "functools", "torch", "numpy", "importlib"})


def test_a_module_that_one_process_alone_has_loaded_is_no_difference(module: Path) -> None:
    here = sources()
    there = {name: digest for name, digest in here.items() if name != "module module_of_sources"}
    assert first_difference(here, there) == first_difference(there, here) == ""


def defined_in(script: Path) -> dict[str, Any]:
    """What a program defines that is run from there."""
    found: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(script.read_text(), script, "exec"), found)
    return found


@pytest.mark.parametrize("of", ["loss", "Net", "instance", "partial"])
def test_the_script_counts_where_the_recipe_holds_something_of_it(of: str, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.format(number=1))
    defined = defined_in(script)
    objects = {**defined, "instance": defined["Net"](), "partial": functools.partial(defined["loss"], None)}
    before = sources([objects[of]])
    assert "script train.py" in before
    script.write_text(SCRIPT.format(number=2))
    assert first_difference(before, sources([objects[of]])) == "script train.py"
    assert "script train.py" not in sources([len, int, 3])


def test_a_script_that_is_nowhere_is_passed_over(tmp_path: Path) -> None:
    script = tmp_path / "cell.py"
    script.write_text(SCRIPT.format(number=1))
    defined = defined_in(script)
    script.unlink()
    assert first_difference(sources([defined["loss"]]), {}) == ""


def test_files_and_weights_of_models_are_compared_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(of_sources, "_LOADED", {})
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(1 << 20))
    note_loaded("file llama/model.safetensors", path)
    note_loaded("model of the run runs/gpt", "5e88")
    before = models()
    assert set(before) == {"file llama/model.safetensors", "model of the run runs/gpt"}
    with open(path, "r+b") as file:
        file.seek(777_777)
        file.write(b"1")
    assert first_difference(before, models()) == "file llama/model.safetensors"
    path.unlink()
    note_loaded("model of the run runs/gpt", "5e89")
    assert first_difference(before, models()) == "model of the run runs/gpt"
