"""A campaign for `instep diff`: runs of another library version or kind of processor, to the update and the tensor."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import instep
from instep.recipe import Team
from instep.record import tape
from support.by_numpy import data, recipe
from support.elsewhere import Elsewhere, other_numpy, other_processor
from support.harness import train_here
from support.proved import missed, save

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("forked_pythons")]

SEED = 17
NUMPY = "1.26.4"
"""A version whose transforms have other bits than those of any later one: it computes them with twice as many."""


@dataclass(frozen=True)
class Case:
    """A recipe, by the fields of `support.by_numpy.recipe`, and of how many workers its runs are, here and there."""

    what: str
    number: int
    of: dict[str, Any]

    @property
    def teams(self) -> tuple[dict[str, Any], dict[str, Any]]:
        return tuple({"workers": 1 + (self.number + k) % 3, "checkpoint_every": 3, "keep": 99} for k in (0, 1))  # type: ignore[return-value]


def of_updates() -> Iterator[Case]:
    """NumPy smooths one tensor from one update on."""
    tensors = ["first.weight", "norm.weight", "last.weight", "first.bias"]
    for number in range(12):
        of = {"tensor": tensors[number % 4], "update": 1 + (5 * number) % 8, "seed": number}
        yield Case("an update", number, of)


def of_layers() -> Iterator[Case]:
    """NumPy smooths what few samples come to: in which update the first of them is drawn, hangs on the seed."""
    features = data().tensors[0][:, 0].sort(descending=True).values
    for number in range(8):
        beyond = float(features[number % 2 : number % 2 + 2].mean())
        yield Case("a layer", number, {"beyond": beyond, "seed": 100 + number})


def of_processors() -> Iterator[Case]:
    for number in range(4):
        yield Case("a processor", number, {"seed": 200 + number})


def _sums(run: Path) -> list[tuple[int, dict[str, str]]]:
    told = (event for event in tape.read(run / "tape.jsonl") if event["kind"] == "checksummed")
    return [(event["version"], {**event["weights"], **event["optimizer"]}) for event in told]


def truth(one: Path, other: Path) -> tuple[int, list[str]]:
    """The first update after which any tensor has another checksum, by the tapes of runs that tell all, and which."""
    for a_told, b_told in zip(*map(_sums, (one, other)), strict=True):
        (version, a), (_, b) = a_told, b_told
        if names := [name for name in a if a[name] != b[name]]:
            return version, names
    raise AssertionError("they are the same")


def found_of(cases: Sequence[Case], there: Elsewhere) -> list[dict[str, Any]]:
    """Trains each here and there, and follows what `instep diff` says; `held`: whether that leads to the place."""
    parted, telling = ([_pair(case, there, kind) for case in cases] for kind in ("run", "telling"))
    jobs = []
    for pairs, more in ((parted, {}), (telling, {"checksum_every": 1})):
        for case, (a, b) in zip(cases, pairs, strict=True):
            own, other = case.teams
            train_here(recipe(**case.of, **more), Team(**own), a)
            jobs.append({"train": str(b), "of": {**case.of, **more}, "team": other})
    there.do(jobs)
    seen = [instep.diff(a, b) for a, b in parted]
    files = [f"{b}.json" for _, b in parted]
    words = [
        shlex.split(each.goes_on.partition(",")[0].replace("FILE", shlex.quote(file)))[1:]
        for each, file in zip(seen, files, strict=True)
    ]
    done = there.do([{"words": each} for each in words])
    lines = []
    for case, (a, _), all_told, first, file, end in zip(cases, parted, telling, seen, files, done, strict=True):
        assert end["status"] == 0, end
        update, tensors = truth(*all_told)
        found = instep.diff(a, file)
        at = found.place
        where = None if at is None else [at.step, at.tensor]
        held = (first.verdict, found.verdict, where) == ("undecided", "reproducibly different", [update, tensors[0]])
        lines.append({
            "elsewhere": case.what, "number": case.number, "made": [each.name for each in first.made],
            "update": update, "tensors": len(tensors), "found": where, "held": held,
        })  # fmt: skip
    return lines


def _pair(case: Case, there: Elsewhere, kind: str) -> tuple[Path, Path]:
    """The folders of a run here and there."""
    here, other = (there.scratch / f"{case.what}-{case.number}-{kind}-{where}" for where in ("here", "there"))
    return here, other


@pytest.mark.slow
def test_two_runs_of_another_kind_of_processor_are_found_to_update_and_tensor(tmp_path: Path) -> None:
    there = other_processor(tmp_path)
    if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("this processor has no wide instructions")
    lines = found_of(list(of_processors())[:2], there)
    assert [line["made"] for line in lines] == [["processor"]] * 2
    assert missed(lines) == []


@pytest.mark.slow
def test_two_runs_of_another_library_version_are_found_to_update_and_tensor(tmp_path: Path) -> None:
    lines = found_of([list(of_updates())[5], list(of_layers())[3]], other_numpy(NUMPY, tmp_path))
    assert [line["made"] for line in lines] == [["numpy"]] * 2
    assert missed(lines) == []


@pytest.mark.prove
def test_twenty_runs_of_another_library_version_and_four_of_another_kind_of_processor(tmp_path: Path) -> None:
    began = time.monotonic()
    (tmp_path / "numpy").mkdir()
    (tmp_path / "processor").mkdir()
    lines = found_of([*of_updates(), *of_layers()], other_numpy(NUMPY, tmp_path / "numpy"))
    assert len(lines) == 20
    lines += found_of(list(of_processors()), other_processor(tmp_path / "processor"))
    save("differences_elsewhere", lines, seed=SEED, began=began, other_numpy=NUMPY)
    assert missed(lines) == []
