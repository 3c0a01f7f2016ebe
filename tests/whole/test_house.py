"""The house: files and functions that one can read in one go, no circle of imports, one name for one class."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import instep

pytestmark = pytest.mark.pure

SRC = Path(instep.__file__).parent

MOST_LINES = 400
"""Of a file."""

MOST_OF_A_FUNCTION = 60
"""Lines, with its decorators and docstring."""

LONG_FUNCTIONS: dict[str, str] = {
    "cli/commands.py:app": "declares the command line",
    "cli/commands.py:app.simulate": "declares the command line",
    "cli/commands.py:app.train": "declares the command line",
}

Trees = dict[str, ast.Module]
Function = ast.FunctionDef | ast.AsyncFunctionDef


def trees_of(folder: Path) -> Trees:
    """All modules below a folder, by path in it."""
    return {str(path.relative_to(folder)): ast.parse(path.read_bytes()) for path in sorted(folder.rglob("*.py"))}


def functions_of(tree: ast.AST, inside: str = "") -> Iterator[tuple[str, Function]]:
    """All functions and methods, nested ones too, each with its name in the module."""
    for node in ast.iter_child_nodes(tree):
        named = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
        name = f"{inside}{node.name}" if named else inside.rstrip(".")
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield name, node
        yield from functions_of(node, f"{name}." if name else "")


def length(function: Function) -> int:
    first = min([function.lineno, *(decorator.lineno for decorator in function.decorator_list)])
    return (function.end_lineno or first) - first + 1


def long_files(folder: Path) -> set[str]:
    lines = {path: len(path.read_bytes().splitlines()) for path in folder.rglob("*.py")}
    return {str(path.relative_to(folder)) for path, count in lines.items() if count > MOST_LINES}


def long_functions(trees: Trees) -> set[str]:
    found = ((path, name, function) for path, tree in trees.items() for name, function in functions_of(tree))
    return {f"{path}:{name}" for path, name, function in found if length(function) > MOST_OF_A_FUNCTION}


def imports_of(trees: Trees, package: str) -> dict[str, set[str]]:
    """By module, the modules of the package that it imports: at its top, or in a function; not for types alone."""
    modules = {path: ".".join([package, *Path(path).with_suffix("").parts]).removesuffix(".__init__") for path in trees}
    known = set(modules.values())

    def imported(node: ast.AST, path: str) -> Iterator[str]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} imports by a relative name"
            whole = {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            yield from (name if name in known else str(node.module) for name in whole.values())
        for child in ast.iter_child_nodes(node):
            yield from imported(child, path)

    return {module: (known & set(imported(trees[path], path))) - {module} for path, module in modules.items()}


def circle(imports: dict[str, set[str]]) -> list[str]:
    """Modules each of which imports the next one, the last one being the first; none if there are no such."""
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def shared_names(trees: Trees) -> dict[str, list[str]]:
    """The public classes of one name in several modules."""
    places: dict[str, list[str]] = {}
    for path, tree in trees.items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(path)
    return {name: paths for name, paths in places.items() if len(paths) > 1}


def test_no_file_is_too_long_to_read() -> None:
    assert long_files(SRC) == set()


def test_no_function_is_too_long_to_read() -> None:
    assert long_functions(trees_of(SRC)) == LONG_FUNCTIONS.keys(), "the exceptions, and no others"


def test_no_module_imports_in_a_circle() -> None:
    assert circle(imports_of(trees_of(SRC), "instep")) == []


def test_a_file_of_tests_has_its_name_alone() -> None:
    """Python imports two of one name as one."""
    names = [path.name for path in Path(__file__).parents[1].rglob("test_*.py")]
    assert sorted(name for name in set(names) if names.count(name) > 1) == []


def test_a_class_has_its_name_alone() -> None:
    assert shared_names(trees_of(SRC)) == {}


ONE_STEP = {
    r"replica\.compute\(": {"worker/gradients.py"},
    r"\bFold\(": {"worker/gradients.py"},
    r"\.judge\(": {"worker/updates.py"},
    r"\.written\.take\(": {"worker/updates.py", "worker/contributor.py"},  # in local steps, by each worker
    r"replica\.update\(": {"worker/updates.py", "worker/trial.py", "engines/sharding.py", "engines/piecewise.py"},
    r"\b_passes\(": {"worker/milestones.py"},
    r"\.unevaluated\b": {"worker/milestones.py", "team/process.py", "engines/server.py"},  # after a restart
}
"""What a step is made of, and the only files that do it."""


@pytest.mark.parametrize("part", ONE_STEP)
def test_a_step_is_written_once(part: str) -> None:
    found = {
        str(path.relative_to(SRC)) for path in SRC.rglob("*.py") if re.search(rf"(?<!def ){part}", path.read_text())
    }
    assert found == ONE_STEP[part]


def told(tree: ast.AST) -> set[str]:
    """The texts of a module that are no docstrings and no single words."""
    alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    texts = (node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str))
    return {str(text.value) for text in texts if id(text) not in alone and " " in str(text.value)}


OF_SEVERAL_HOSTS = {
    "api.py", "cli/train.py", "record/events.py", "run.py", "team/alike.py", "team/first_agent.py", "team/follower.py",
    "team/hosts.py", "team/joining.py", "team/link.py", "team/meeting.py", "team/place.py", "team/ray_agent.py",
    "team/ray_cluster.py", "team/ray_nodes.py", "team/received.py", "team/taking_up.py",
}  # fmt: skip
"""What tells of several: there users know them as agents, see docs/machines.md."""


def test_sentences_call_the_process_that_supervises_a_run_by_one_name() -> None:
    """Its users know the agent of the code as the supervisor of the run, where there is one."""
    texts = {text for name, tree in trees_of(SRC).items() if name not in OF_SEVERAL_HOSTS for text in told(tree)}
    assert [text for text in texts if re.search(r"\bagents?\b", text)] == []
    naming = [text for text in texts if "the supervisor" in text]
    assert len(naming) >= 4
    assert [text for text in naming if "the supervisor of the run" not in text] == []


def test_what_is_looked_for_is_found(tmp_path: Path) -> None:
    """The tests above can fail."""
    (tmp_path / "room").mkdir()
    (tmp_path / "room" / "__init__.py").write_text("")
    (tmp_path / "long.py").write_text("x = 1\n" * (MOST_LINES + 1))
    body = "        pass\n" * MOST_OF_A_FUNCTION
    (tmp_path / "one.py").write_text(f"class Name:\n    def method(self):\n{body}\nimport house.room.two\n")
    (tmp_path / "room" / "two.py").write_text("class Name: ...\ndef late():\n    from house import one\n")
    (tmp_path / "types.py").write_text("if TYPE_CHECKING:\n    from house.room import three\n")
    (tmp_path / "room" / "three.py").write_text("from house.types import x\n")
    trees = trees_of(tmp_path)
    assert long_files(tmp_path) == {"long.py"}
    assert long_functions(trees) == {"one.py:Name.method"}
    assert set(circle(imports_of(trees, "house"))) == {"house.one", "house.room.two"}
    assert shared_names(trees) == {"Name": ["one.py", "room/two.py"]}
