"""What trackers show of a `sampled` or a `run_ended` event beside numbers: files, pictures among them, and a text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

_PICTURES = (".png", ".jpg", ".jpeg", ".gif")

MOST_BYTES = 64 << 20
"""Of a file that goes to a tracker: pictures and texts, not exported models."""


@dataclass(frozen=True)
class MadeOf:
    """files: by their names in the folder of artifacts, those that are there. text: a sample, or None."""

    files: Mapping[str, Path]
    text: str | None

    @property
    def pictures(self) -> dict[str, Path]:
        """Those of the files."""
        return {name: path for name, path in self.files.items() if path.suffix.lower() in _PICTURES}


def picture_size(path: Path) -> tuple[int, int]:
    """Width and height of a PNG in pixels; (0, 0) of another."""
    with path.open("rb") as file:
        head = file.read(24)
    return (int.from_bytes(head[16:20]), int.from_bytes(head[20:24])) if head[:4] == b"\x89PNG" else (0, 0)


def made_of(event: Mapping[str, Any], folder: Path) -> MadeOf:
    """What the event tells of a run in this folder."""
    if event["kind"] == "sampled":
        return MadeOf(_found(event["files"], folder, 2), event["sample"])
    result = event["result"]
    return MadeOf(_found((result.get("artifacts") or {}).get("files", ()), folder, 1), result.get("sample"))


def _found(files: Any, folder: Path, above: int) -> dict[str, Path]:
    named = {"/".join(PurePosixPath(name).parts[above:]): folder / name for name in files}
    return {name: path for name, path in named.items() if path.is_file() and path.stat().st_size <= MOST_BYTES}
