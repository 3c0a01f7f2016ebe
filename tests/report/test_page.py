"""The page: one file that says what the tapes say, in a browser at any width, light and dark."""

from __future__ import annotations

import base64
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from instep.cli import main
from instep.recipe import Team
from instep.report import page
from instep.report.comparison import compare
from instep.report.document import document
from instep.report.figures import _covered
from instep.report.reading import read_all
from instep.rules import parse
from support import browser, runs, workloads
from support.harness import train_here

SETTLED = "() => new Promise(done => setTimeout(() => requestAnimationFrame(done), 60))"
"""After what the page itself has put off for a moment, as it does with a pointer's moves, however slow it is."""

FALLING = [3.0 - 0.1 * step for step in range(1, 26)]

PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


def page_of(tmp_path: Path) -> Path:
    """A page with every section: stale contributions, a loss, a plan, a sample, a picture, a hostile name."""
    plan = runs.event(
        "planned", 1.2, budget_bytes=2**20, nothing_recomputed_bytes=2**21, predicted_bytes=2**20 - 5,
        measured_bytes=2**20 - 9, extra_flops=0.1, extra_time=0.1, blocks=2, checkpointed=1,
    )  # fmt: skip
    events = [runs.started(seed=1), plan, *runs.joined(2.0, 0, 1)]
    for version in range(1, 26):
        events += runs.step(version, 2.0 + version, 3.0 - version / 20, slow=0.5)
        events += [runs.event("evaluated", 2.6 + version, version=version, objective=2.9, terms={}, items=5)]
    (tmp_path / "outside.png").write_bytes(PIXEL)
    for version in (8, 16):
        events += [
            runs.event(
                "sampled", 2.7 + version, version=version, sample=f"text {version} <i>", took_s=0.1,
                files=[f"artifacts-at/{version}/dot.png", "../outside.png"], figures={"recognised": version / 20},
            )
        ]  # fmt: skip
    events += [runs.event("left", 30.0, worker=1, why="worker 1 was killed by SIGKILL; <b>see</b> its log.")]
    first = runs.folder(tmp_path / "s", [*events, runs.ended(25, 31.0, sample="</script><script>alert(1)</script>")])
    (first / "artifacts").mkdir()
    (first / "artifacts" / "dot.png").write_bytes(PIXEL)
    for version in (8, 16):
        (first / "artifacts-at" / str(version)).mkdir(parents=True)
        (first / "artifacts-at" / str(version) / "dot.png").write_bytes(PIXEL)
    stale = [runs.started(rule="bounded_staleness:1"), *runs.joined(2.0, 0, 1)]
    for version in range(1, 26):
        at = 2.0 + version / 2
        stale += [
            runs.event("released", at - 0.4, worker=version % 2, version=version - 1, piece=version),
            runs.event(
                "computed", at - 0.1, worker=version % 2, version=version - 1, from_s=at - 0.35, to_s=at - 0.1,
                batch=0, local_steps=1, microbatches=[0, 2],
            ),
            runs.event("pushed", at - 0.05, worker=version % 2, version=version - 1, bytes=40, items=8),
            runs.merged(version, at, 3.0 - version / 20, staleness=(min(version - 1, version % 4),)),
            runs.event("evaluated", at, version=version, objective=3.0 - version / 20, terms={}, items=5),
        ]  # fmt: skip
    second = runs.folder(tmp_path / "b", [*stale, runs.ended(25, 16.0)])
    out = tmp_path / "report.html"
    page.write(compare(read_all([first, second])), out)
    return out


@pytest.mark.pure
def test_what_others_wrote_is_text_on_the_page(tmp_path: Path) -> None:
    text = page_of(tmp_path).read_text()
    assert "<script>alert" not in text
    assert "&lt;/script&gt;&lt;script&gt;alert(1)" in text
    assert "<b>see</b>" not in text
    assert text.count("</script>") == 3
    assert text.count("data:image/png;base64," + base64.b64encode(PIXEL).decode()) == 3, "none from outside the folder"
    moments = re.findall(r'class="moment"><span class="note">(.*?)</span>', text)
    assert moments == ["version 8", "version 16", "version 25, at the end"]
    assert "text 8 &lt;i&gt;" in text
    assert "<dt>recognised</dt><dd>0.8</dd>" in text


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize(("width", "dark", "touch"), [(1280, False, False), (1280, True, False), (390, True, True)])
def test_every_panel_is_there_and_shows_values(width: int, dark: bool, touch: bool, tmp_path: Path) -> None:
    if why := browser.why_not():
        pytest.skip(why)
    path = page_of(tmp_path)
    with browser.opened(path, width=width, dark=dark, touch=touch) as (shown, complaints):
        assert shown.evaluate("document.documentElement.scrollWidth") <= width
        ground = shown.evaluate("getComputedStyle(document.body).backgroundColor")
        assert sum(map(int, re.findall(r"\d+", ground)[:3])) < 150 if dark else ground == "rgb(255, 255, 255)"
        for name in ("items", "seconds", "bytes", "strip-0", "strip-1", "staleness", "memory"):
            plot = shown.locator(f"#{name} .nsewdrag").first
            plot.scroll_into_view_if_needed()
            box = plot.bounding_box()
            assert box is not None, name
            assert box["width"] > 150, name
            assert _some_value(shown, name, box, touch), name
        for moment in shown.locator(".moment").all():
            moment.scroll_into_view_if_needed()
            box = moment.bounding_box()
            assert box is not None
            assert 0 <= box["x"] < width
        assert shown.locator(".moment img").evaluate_all("all => all.every(each => each.naturalWidth > 0)")
        assert complaints == []


def _some_value(shown: Any, name: str, box: dict[str, float], touch: bool) -> str:
    """What a pointer or a finger, moved over the plot in a grid, is shown first."""
    for across in (0.03, 0.1, 0.3, 0.5, 0.7, 0.92):
        for down in (0.1, 0.25, 0.5, 0.75, 0.97):
            x, y = box["x"] + across * box["width"], box["y"] + down * box["height"]
            if touch:
                shown.touchscreen.tap(x, y)
            else:
                shown.mouse.move(x, y)
            shown.evaluate(SETTLED)
            text = shown.locator(f"#{name} .hoverlayer .hovertext").all_text_contents()
            if text and re.search(r"\d", text[0]):
                return str(text[0])
    return ""


@pytest.mark.pure
def test_covered_seconds_are_those_of_each_cell() -> None:
    from array import array

    generator = np.random.default_rng(0)
    for _ in range(50):
        cuts = np.sort(generator.uniform(-1, 11, 2 * generator.integers(0, 20)))
        edges = np.linspace(0, 10, int(generator.integers(2, 30)))
        found = _covered(array("d", cuts), edges)
        for cell in range(len(edges) - 1):
            expected = sum(
                max(0.0, min(end, edges[cell + 1]) - max(begin, edges[cell]))
                for begin, end in zip(cuts[::2], cuts[1::2], strict=True)
            )
            assert math.isclose(found[cell], expected, abs_tol=1e-9)


@pytest.mark.processes
def test_figures_are_those_of_the_tapes_by_plain_loops(tmp_path: Path) -> None:
    rules = ["synchronous", "asynchronous", "diloco:2"]
    for rule in rules:
        recipe = workloads.gpt(rule=parse(rule), steps=6, evaluate_every=2, evaluate_samples=8)
        train_here(recipe, Team(workers=2), tmp_path / rule)
    told = document(compare(read_all([tmp_path / rule for rule in rules])))
    target = told["target"]["objective"]
    assert told["target"]["of"] == "held-out objective"
    for row in told["rules"]:
        (run,) = row["runs"]
        events = [json.loads(line) for line in (tmp_path / row["rule"] / "tape.jsonl").read_text().splitlines()]
        result = events[-1]["result"]
        begin = next(event["t_s"] for event in events if event["kind"] == "joined")
        merges = {event["version"]: event for event in events if event["kind"] == "merged"}
        assert run["bytes"] == result["bytes_sent"]
        assert (run["digest"], run["updates"]) == (result["digest"], result["versions"])
        assert run["items"] == result["items"]
        evaluated = {event["version"]: event["objective"] for event in events if event["kind"] == "evaluated"}
        assert all(0 < event["took_s"] < event["t_s"] for event in events if event["kind"] == "evaluated")
        assert {point["version"]: point["objective"] for point in run["held_out"]} == evaluated
        reached = next(version for version, objective in sorted(evaluated.items()) if objective <= target)
        assert row["time_to_target_s"]["mean"] == pytest.approx(merges[reached]["t_s"] - begin)
        items = sum(merge["items"] for version, merge in merges.items() if version <= reached)
        assert row["items_to_target"]["mean"] == items
        staleness = [old for merge in merges.values() for old in merge["staleness"]]
        assert run["staleness"] == {str(old): staleness.count(old) for old in sorted(set(staleness))}


@pytest.mark.slow
def test_a_page_of_eight_long_runs_is_small(tmp_path: Path) -> None:
    for number in range(8):
        events = [runs.started(rule="asynchronous", seed=number), *runs.joined(2.0, *range(16))]
        for version in range(1, 2500):
            at = 2.0 + version / 2
            worker = version % 16
            events += [
                runs.event("released", at - 0.4, worker=worker, version=version - 1, piece=version),
                runs.event(
                    "computed", at - 0.1, worker=worker, version=version - 1, from_s=at - 0.35, to_s=at - 0.1,
                    batch=0, local_steps=1, microbatches=[0, 2],
                ),
                runs.event("pushed", at - 0.05, worker=worker, version=version - 1, bytes=40, items=8),
                runs.merged(version, at, 3.0 + math.sin(version), staleness=(min(version - 1, version % 40),)),
            ]  # fmt: skip
        runs.folder(tmp_path / str(number), [*events, runs.ended(2500, 1300.0)])
    out = tmp_path / "report.html"
    page.write(compare(read_all([tmp_path / str(number) for number in range(8)])), out)
    assert out.stat().st_size <= 6e6


@pytest.mark.processes
def test_a_report_imports_no_torch(tmp_path: Path) -> None:
    runs.curve(tmp_path / "s", "synchronous", FALLING)
    code = (
        "import sys\nfrom instep.cli import main\n"
        f"assert main(['report', {str(tmp_path / 's')!r}, '--out', {str(tmp_path / 'r.html')!r}]) == 0\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "r.html").stat().st_size > 1e6


@pytest.mark.pure
def test_the_command_shows_the_table_and_the_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [str(runs.curve(tmp_path / rule, rule, FALLING)) for rule in ("synchronous", "asynchronous")]
    assert main(["report", *paths, "--out", str(tmp_path / "r.html"), "--target", "2"]) == 0
    shown = capsys.readouterr().out
    for part in ("2 runs of 100 steps by 2 workers", "time to", "synchronous", "The page is "):
        assert part in shown
    assert main(["report", *paths, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rules"][1]["rule"] == "asynchronous"


@pytest.mark.pure
@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ([], "report takes the folders of runs: instep report runs/A runs/B."),
        (["nowhere"], "there is no folder nowhere; give the folder of a run, such as runs/NAME."),
        (["begun"], "the run in begun has no event on its tape yet; wait until it trains, then try again."),
        (["run", "--target", "low"], "--target is 'low'; it must be a number, an objective such as 1.6."),
        (["run", "--target", "nan"], "--target is 'nan'; it must be a number, an objective such as 1.6."),
        (["run", "--out", "."], "--out '.' is a folder; name a file in it, such as report.html."),
        (
            ["run", "--out", "no/r.html"],
            "--out 'no/r.html' lies in a folder that is not there; make it, or name another",
        ),
    ],
)
def test_bad_input_to_report_is_a_sentence(
    given: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    runs.curve(tmp_path / "run", "synchronous", FALLING)
    runs.folder(tmp_path / "begun", []).joinpath("tape.jsonl").unlink()
    assert main(["report", *given]) in (1, 2)
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()
