"""Which source files a process computes with, and which models it has loaded: on all hosts of a run the same, and the
files at all times.

Processes that come while a run goes on import what those have imported that began it, whatever became of the files.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

MOST_FILES = 2000
"""Files that are told of at most, in the order of their names."""

_LOADED: dict[str, Path | str] = {}
"""Models that this process has loaded: files, by name, or digests of weights."""

_INSTALLED = {"site-packages", "dist-packages"}
_OF_THE_HOST = {"__main__", "sitecustomize", "usercustomize"}
"""The entry of a process of Instep's, and what Python itself runs at its start."""


def sources(objects: Iterable[Any] = ()) -> dict[str, str]:
    """A digest of each source file that modules were loaded from, Python's own and installed packages aside, and of the
    scripts where these objects are defined: ``{"module shapes.net": "5e88...", "script train.py": "81fe..."}``. Of what
    this process imports as it was, that.
    """
    found = {f"module {name}": path for name, path in _modules() if not _is_installed(path)}
    found |= {f"script {path.name}": path for each in objects for path in _scripts(each)}
    told: dict[str, str] = {}
    for name, path in itertools.islice(sorted(found.items()), MOST_FILES):
        try:
            told[name] = hashlib.sha256(_read(path)).hexdigest()[:16]
        except OSError:
            continue  # of a notebook, or gone since
    return told


def note_loaded(name: str, what: Path | str) -> None:
    """Notes what a model was loaded from: a file, or the digest of its weights. name: the same on every host."""
    _LOADED[name] = what


def models() -> dict[str, str]:
    """A digest of each file, and of all weights, that `note_loaded` was told of; files are read whole."""
    told: dict[str, str] = {}
    for name, what in sorted(_LOADED.items()):
        if isinstance(what, str):
            told[name] = what
            continue
        try:
            with open(what, "rb") as file:
                told[name] = hashlib.file_digest(file, "sha256").hexdigest()[:16]
        except OSError:
            continue  # gone since
    return told


def first_difference(one: Any, other: Any) -> str:
    """The first name under which two such tables differ; "" where they don't. What one alone has is no difference:
    code may load modules when it needs them.
    """
    return next((name for name, digest in sorted(one.items()) if other.get(name, digest) != digest), "")


def own_files(objects: Iterable[Any] = ()) -> list[str]:
    """The source files that this process has imported, but for Python's own, Instep's and installed packages; and the
    scripts where these objects are defined.
    """
    found = {path for name, path in _modules() if name.partition(".")[0] != "instep" and not _is_installed(path)}
    found |= {path for each in objects for path in _scripts(each)}
    return sorted(map(str, found))[:MOST_FILES]


class KeptSources:
    """Source files as they were when the first process of a run told of them. `of`: by path."""

    def __init__(self) -> None:
        self.of: dict[str, bytes] = {}

    def keep(self, files: Iterable[str]) -> None:
        """Reads those of them that are new."""
        for file in files:
            if file not in self.of:
                with contextlib.suppress(OSError):
                    self.of[file] = Path(file).read_bytes()


def import_kept(kept: Mapping[str, bytes]) -> None:
    """From now on this process imports these files, by path, as they were."""
    if kept:
        sys.meta_path.insert(0, _Finder(kept))


class _Finder(MetaPathFinder):
    """Finds modules where others find them, and reads them here."""

    def __init__(self, kept: Mapping[str, bytes]):
        self.kept = kept

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        for finder in sys.meta_path:
            spec = None if isinstance(finder, _Finder) else finder.find_spec(fullname, path, target)
            if spec is not None:
                file = spec.origin or ""
                if file not in self.kept or not isinstance(spec.loader, SourceFileLoader):
                    return None
                spec.loader = _Loader(fullname, file, self.kept[file])
                return spec
        return None


class _Loader(SourceFileLoader):
    """Of one file, past what Python may have compiled of it since."""

    def __init__(self, fullname: str, path: str, source: bytes):
        super().__init__(fullname, path)
        self._source = source

    def get_code(self, fullname: str) -> CodeType:
        code: CodeType = self.source_to_code(self._source, self.path)
        return code

    def get_data(self, path: str) -> bytes:
        return self._source if path == self.path else super().get_data(path)


def _read(path: Path) -> bytes:
    """As this process imports it."""
    for finder in sys.meta_path:
        if isinstance(finder, _Finder) and str(path) in finder.kept:
            return finder.kept[str(path)]
    return path.read_bytes()


def _modules() -> Iterator[tuple[str, Path]]:
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if name not in _OF_THE_HOST and isinstance(file, str) and file.endswith(".py"):
            yield name, Path(file)


def _is_installed(path: Path) -> bool:
    return not _INSTALLED.isdisjoint(path.parts) or any(path.is_relative_to(folder) for folder in _python())


@functools.cache
def _python() -> tuple[str, ...]:
    paths = sysconfig.get_paths()
    return tuple({paths["stdlib"], paths["platstdlib"]})


def _scripts(defined: Any) -> Iterator[Path]:
    """Files of what was pickled by value since no other process could import it."""
    while isinstance(defined, functools.partial):
        defined = defined.func
    of = defined if isinstance(defined, type) or hasattr(defined, "__code__") else type(defined)
    if getattr(of, "__module__", None) != "__main__":
        return
    for each in vars(of).values() if isinstance(of, type) else [of]:
        if (code := getattr(each, "__code__", None)) is not None:
            yield Path(code.co_filename)
