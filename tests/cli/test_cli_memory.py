"""``instep memory``: the trade as people see it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from instep.cli import main

SMALL = """\
batch = 4
microbatches = 2
steps = 1
[model]
use = "instep.models.gpt:GPT"
args = { vocabulary = 256, context = 64, width = 32, depth = 3, heads = 2 }
[objective]
use = "instep.objectives.language:NextToken"
[data]
use = "instep.data.text:text_files"
args = { pattern = "words.txt", context = 64 }
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "small.toml").write_text(SMALL)
    (tmp_path / "words.txt").write_text("memory is not free, nor is time. " * 200)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rows(text: str) -> list[tuple[float, int]]:
    """The table's sizes in MiB and shares in per cent."""
    rows = re.findall(r"^ *([\d.]+) ([KM])iB +(\d+) % ", text, re.MULTILINE)
    return [(in_mib(size, unit), int(share)) for size, unit, share in rows]


def in_mib(size: str, unit: str) -> float:
    return float(size) / (1024 if unit == "K" else 1)


def test_the_trade_is_a_table_and_every_share_in_it_can_be_had(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["memory", "small.toml"]) == 0
    out = capsys.readouterr().out
    found = rows(out)
    assert found[0][1] == 100
    assert len(found) >= 5
    assert found == sorted(found, reverse=True)
    assert "nothing recomputed" in out
    assert main(["memory", "small.toml", "--budget", f"{found[-1][1]}%"]) == 0


@pytest.mark.parametrize("budget", ["75%", "750kB"])
def test_a_budget_shows_its_plan_predicted_and_measured(budget: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["memory", "small.toml", "--budget", budget]) == 0
    out = capsys.readouterr().out
    found = re.findall(r"^(?:budget|predicted|measured) +([\d.]+) ([KM])iB", out, re.MULTILINE)
    sizes = [in_mib(*size) for size in found]
    assert sizes[1] <= sizes[0]
    assert sizes[2] == pytest.approx(sizes[1], abs=0.11)
    assert "this plan costs" in out
    assert re.search(r"^larger +[\d.]+ [KM]iB would cost", out, re.MULTILINE)
    assert "blocks." in out


def test_a_budget_above_what_there_is_recomputes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["memory", "small.toml", "--budget", "1GiB"]) == 0
    assert "blocks.0 to blocks.2 (3 blocks): not checkpointed" in capsys.readouterr().out


def test_a_recipe_that_compiles_is_planned_as_in_its_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """For the least FLOPs: some are made again only where nothing cheaper is left."""
    assert main(["memory", "small.toml", "--recipe.compile", "true", "--budget", "80%"]) == 0
    out = " ".join(capsys.readouterr().out.split())  # however wide the terminal
    assert "The recipe compiles: plans are for the least FLOPs" in out
    assert re.search(r"predicted [^=]*? 0\.0 % more FLOPs measured", out)
    assert "this plan costs 0.0 % of the step's FLOPs; none within the budget costs less than 0.0 %" in out


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        ("40", "--budget is '40'; write bytes with their unit"),
        ("512Mb", "--budget is '512Mb'; write bytes with their unit"),
        ("0%", "--budget is '0%'; a share is above 0 %"),
        ("0MiB", "--budget is '0MiB'; it must be above 0"),
        ("1kB", r"no plan fits into 1.0 KiB: the least that one needs is \d"),
        (
            "2%",
            r"no plan fits into .* KiB: the least that one needs is [\d.]+ KiB, \d+ % of the [\d.]+ MiB with nothing",
        ),
    ],
)
def test_a_wrong_budget_is_one_sentence(budget: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["memory", "small.toml", "--budget", budget]) != 0
    captured = capsys.readouterr()
    assert re.search(said, captured.err)
    assert captured.err.count("\n") == 1
    assert not captured.out


@pytest.mark.processes  # where matplotlib was never used before, it has a program list the fonts
@pytest.mark.parametrize("name", ["trade.png", "trade.svg"])
def test_the_plot_is_drawn(name: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert main(["memory", "small.toml", "--budget", "80%", "--plot", name]) == 0
    drawn = (here / name).read_bytes()
    assert len(drawn) > 5000
    assert drawn.startswith(b"\x89PNG") if name.endswith("png") else b"<svg" in drawn
    assert f"drawn in {name}" in capsys.readouterr().out


def test_a_plot_that_cannot_be_drawn_is_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert main(["memory", "small.toml", "--plot", "trade.docx"]) != 0
    assert "name a .png, .svg or .pdf" in capsys.readouterr().err
    assert main(["memory", "small.toml", "--plot", "nowhere/trade.png"]) != 0
    assert "lies in a folder that is not there" in capsys.readouterr().err
