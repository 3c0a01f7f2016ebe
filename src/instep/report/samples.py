"""What models made, for the page: texts, pictures and figures, at a run's end and during it."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from instep.report.comparison import Comparison
from instep.report.history import History, MadeAt

_MOST_PICTURE_BYTES = 300_000
"""Of all pictures of a page: larger ones stay in their run folders."""

_MOST_MOMENTS = 6
"""Of a run; of more as many are shown, evenly spaced, and always its end."""

_MOST_CHARACTERS = 1000
"""Of a text during the run."""

_PICTURES = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".svg": "svg+xml"}


def samples(found: Comparison) -> list[dict[str, Any]]:
    """A rule each that has some; of each its moments, in order."""
    chosen = [_chosen(group.runs[0]) for group in found.groups]
    pictures = _pictures([group.runs[0] for group in found.groups], chosen)
    shown = []
    for place, group in enumerate(found.groups):
        moments = [
            {
                "at": f"version {each.version:,}" + (", at the end" if each.seconds is None else ""),
                "text": each.text if each.text is None or each.seconds is None else each.text[:_MOST_CHARACTERS],
                "figures": {name: _short(value) for name, value in each.figures.items()},
                "pictures": pictures[place, at],
            }
            for at, each in enumerate(chosen[place])
        ]
        moments = [each for each in moments if each["text"] or each["figures"] or each["pictures"]]
        if moments:
            shown.append({"group": place, "label": group.label, "moments": moments})
    return shown


def _chosen(run: History) -> list[MadeAt]:
    """The moments to show; the end, of which a run's folder may hold more than its tape tells."""
    during = [each for each in run.shown if each.seconds is not None]
    end = [each for each in run.shown if each.seconds is None]
    files = _files(run.path / "artifacts", run.path)
    if files:
        last = end[0] if end else MadeAt(run.updates, None, None, (), {})
        end = [MadeAt(last.version, None, last.text, files, last.figures)]
    count = min(len(during), _MOST_MOMENTS - 1)
    kept = [during[(place + 1) * len(during) // count - 1] for place in range(count)]
    return kept + end


def _pictures(
    runs: Sequence[History], chosen: Sequence[Sequence[MadeAt]]
) -> dict[tuple[int, int], list[dict[str, str]]]:
    """By place of run and moment. Where not all have room the last moments of all come first."""
    places = [(run, at) for run, moments in enumerate(chosen) for at in range(len(moments))]
    left, found = _MOST_PICTURE_BYTES, {place: list[dict[str, str]]() for place in places}
    for run, at in sorted(places, key=lambda place: (len(chosen[place[0]]) - place[1], place[0])):
        for name in chosen[run][at].files:
            kind, path = _PICTURES.get(Path(name).suffix.lower()), runs[run].path / name
            content = _content(path, runs[run].path, left) if kind is not None else b""
            if content:
                left -= len(content)
                url = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
                found[run, at].append({"name": _inside(name), "url": url})
    return found


def _inside(name: str) -> str:
    """A file's name in the folder of what was made at one time."""
    folder, *inside = PurePosixPath(name).parts
    return "/".join(inside[folder == "artifacts-at" :])


def _content(path: Path, folder: Path, most: int) -> bytes:
    """Of a file in a run's folder; nothing where it is larger or gone, or leads out of it."""
    try:
        inside = path.resolve().is_relative_to(folder.resolve())
        return path.read_bytes() if inside and path.is_file() and path.stat().st_size <= most else b""
    except OSError:
        return b""


def _files(folder: Path, run: Path) -> list[str]:
    try:
        return sorted(path.relative_to(run).as_posix() for path in folder.rglob("*") if path.is_file())
    except OSError:
        return []


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
