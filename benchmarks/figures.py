"""The figures of docs/in-step-and-out-of-step.md: ``python benchmarks/figures.py``, or ``make figures``.

Runs the commands that are named there, and takes the figures from the reports that they make, as Chromium shows them.
Runs and reports stay in runs/figures, which is made anew. The simulations have times that are given, not measured, so
that their figures are the same on any machine.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RUNS, FIGURES = ROOT / "runs" / "figures", ROOT / "docs" / "figures"
WIDTH = 1000

CLUSTER = "--steps 120 --workers 4 --slow 3:4x --times 100ms --merge 5ms --bandwidth 1Gb/s"
OFTEN = "--recipe.evaluate_every 10 --recipe.evaluate_samples 64"
SHARES = (95, 85, 75, 65)
RULES = ("synchronous", "bounded_staleness:2", "asynchronous", "diloco:5")


def commands() -> list[str]:
    """As a person types them at the top of the repository."""
    folders = [f"runs/figures/{rule.replace(':', '-')}" for rule in RULES]
    simulations = [
        f"instep simulate gpt --rule {rule} {CLUSTER} {OFTEN} --out {folder}"
        for rule, folder in zip(RULES, folders, strict=True)
    ]
    planned = [f"runs/figures/memory-{share}" for share in SHARES]
    plans = [
        f"instep train gpt --steps 3 --workers 2 --memory {share}% --out {folder}"
        for share, folder in zip(SHARES, planned, strict=True)
    ]
    return [
        *simulations, f"instep report {' '.join(folders)} --out runs/figures/report.html",
        *plans, f"instep report {' '.join(planned)} --out runs/figures/memory.html",
    ]  # fmt: skip


def draw() -> None:
    """Takes the figures from the two pages."""
    from support.browser import opened

    with opened(RUNS / "report.html", width=WIDTH) as (shown, complaints):
        shown.wait_for_timeout(500)
        legend = shown.locator("ul.legend")
        _picture(shown, "panels.png", shown.locator(".panels"), legend.nth(0))
        _picture(shown, "workers.png", legend.nth(1), *shown.locator("figure.strip").all())
        _picture(shown, "staleness.png", shown.locator("#staleness"))
        assert not complaints, complaints
    with opened(RUNS / "memory.html", width=WIDTH) as (shown, complaints):
        shown.wait_for_timeout(500)
        _picture(shown, "memory.png", shown.locator("#memory"))
        assert not complaints, complaints


def _picture(shown: Any, name: str, *parts: Any) -> None:
    """The part of the page that these fill together."""
    boxes = [part.bounding_box() for part in parts]
    left, top = min(box["x"] for box in boxes), min(box["y"] for box in boxes)
    right, bottom = (max(box[at] + box[size] for box in boxes) for at, size in (("x", "width"), ("y", "height")))
    clip = {"x": left - 6, "y": top - 6, "width": right - left + 12, "height": bottom - top + 12}
    shown.screenshot(path=str(FIGURES / name), clip=clip, full_page=True)


def main() -> None:
    """Runs all commands, and writes docs/figures."""
    sys.path[0] = str(ROOT / "tests")
    from support.browser import why_not

    if why := why_not():
        sys.exit(f"The figures are taken from a browser, and {why}; install Chromium and the dev extra.")
    shutil.rmtree(RUNS, ignore_errors=True)
    FIGURES.mkdir(exist_ok=True)
    RUNS.mkdir(parents=True)
    for command in commands():
        print(f"$ {command}", flush=True)
        subprocess.run([sys.executable, "-m", *shlex.split(command)], cwd=ROOT, check=True)
    draw()


if __name__ == "__main__":
    main()
