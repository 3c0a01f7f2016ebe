"""Sentences name the field, the part of the model or the sample that is wrong, and what helps."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from instep.budget import as_size, parse_budget
from instep.by_pattern import ByPattern
from instep.components import Component
from instep.data.cursor import load
from instep.errors import CheckpointError, ComponentError, DataError, WorkerError
from instep.offline.tape_replay import replay
from instep.recipe import Recipe, Team
from instep.recipe_files import read_saved
from instep.record import tape
from instep.record.folder import RunFolder
from instep.record.resuming import recorded
from instep.worker.model import build_model
from instep.worker.optimizer import optimizer_of
from support.harness import train_here
from support.resuming import begin, recipe

pytestmark = pytest.mark.processes

NAMES = ["embedding.weight", "blocks.0.norm.weight", "blocks.0.linear.weight", "head.weight"]


def parts(first: Any, *others: Any) -> Any:
    return ByPattern.of({pattern: Component("torch.optim:AdamW") for pattern in (first, *others)})


def test_a_pattern_without_a_parameter_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(
        ComponentError, match=r"has 'embeding\*', and no parameter .*; did you mean that of 'embedding.w"
    ):
        parts(("*norm*", "embeding*"), "*").split(NAMES)
    with pytest.raises(ComponentError, match=r"has 'zzz', .*; names are such as 'embedding.weight'"):
        parts(("*norm*", "zzz"), "*").split(NAMES)
    assert parts("*norm*", ("*norm.weight", "*")).split(NAMES)[0] == [NAMES[1]], "what others have is passed over"
    with pytest.raises(ComponentError, match=r"add a last table for the others"):
        parts("*norm*").split(NAMES)


def optimizer(model: nn.Module, given: Any) -> Any:
    made: Recipe = recipe(optimizer=given)
    return optimizer_of(made, [n for n, _ in model.named_parameters()], list(model.parameters()))


@pytest.mark.parametrize("use", [torch.optim.SGD, torch.optim.AdamW, "instep.optimizers:adamw"])
def test_a_learning_rate_that_is_text_is_named(use: Any) -> None:
    with pytest.raises(
        ComponentError, match=r"'recipe\.optimizer\.args\.lr' is '0\.01', which the optimizer .* refuses"
    ):
        optimizer(nn.Linear(2, 2), Component(use, {"lr": "0.01"}))


def test_what_takes_matrices_alone_names_the_others() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    with pytest.raises(
        ComponentError, match=r"Muon takes matrices .*, and '0\.bias' of shape \[3\] and 2 more of its 4"
    ):
        optimizer(model, torch.optim.Muon)
    given = {"*weight": Component("torch.optim:AdamW", {"lr": -1.0}), "*": Component("torch.optim:Muon")}
    with pytest.raises(ComponentError, match=r"'recipe\.optimizer\[0\]\.args\.lr' is -1\.0"):
        optimizer(model, given)


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4, bais=False)  # type: ignore[call-arg]


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()


def test_a_part_of_a_model_that_cannot_be_built_is_found_by_file_and_line() -> None:
    line = inspect.getsourcelines(Inner)[1] + 3
    with pytest.raises(ComponentError, match=rf"keyword argument 'bais' \({__file__}, line {line}\)\.$") as caught:
        build_model(Component.of(Outer))
    assert isinstance(caught.value.__cause__, TypeError)


class Odd(Dataset[Any]):
    def __init__(self, sample: Any) -> None:
        self.sample = sample

    def __len__(self) -> int:
        return 9

    def __getitem__(self, index: int) -> Any:
        return self.sample if index == 5 else (torch.zeros(4), torch.zeros(()))


@pytest.mark.parametrize(
    ("sample", "words"),
    [
        (None, r"sample 5 is NoneType, and most are \(Tensor\[4\], Tensor\[\]\)"),
        ((torch.zeros(3), torch.zeros(())), r"sample 5 is \(Tensor\[3\], Tensor\[\]\), and most are"),
    ],
)
def test_a_sample_unlike_the_others_is_named(sample: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"samples 2, 3, 5 and 6 cannot be put into one batch .*, for {words}"):
        load(Odd(sample), [2, 3, 5, 6])


def test_a_replay_of_another_recipe_says_what_a_replay_takes(tmp_path: Path) -> None:
    begin(tmp_path / "run", recipe(), Team(), 2)
    table = read_saved(tmp_path / "run/recipe.toml")
    table.pop("team")
    with pytest.raises(CheckpointError, match="a replay computes the run again as it was: give its own") as caught:
        recorded(RunFolder(tmp_path / "run"), recipe(batch=16), table, replaying=True)
    assert "resume" not in str(caught.value)


def test_a_replay_with_another_rate_claims_nothing_of_the_weights(tmp_path: Path) -> None:
    path = tmp_path / "run"
    begin(path, recipe(steps=3, optimizer=torch.optim.Adam), Team(), 3)
    events: list[Mapping[str, Any]] = list(tape.read(path / "tape.jsonl"))
    other = recipe(steps=3, optimizer=functools.partial(torch.optim.Adam, lr=0.5))
    told = [{**e, "fingerprint": other.fingerprint()} if e["kind"] == "run_started" else e for e in events]
    found = replay(other, told)
    assert found.digest != found.recorded
    assert "learning rate is 0.001 on the tape and 0.5 here" in found.divergence
    assert "same" not in found.divergence


def test_small_sizes_are_told_in_kib_and_are_enough_as_a_budget() -> None:
    assert [as_size(n) for n in (1, 1500, 2**20, 3 * 2**20)] == ["0.1 KiB", "1.5 KiB", "1.0 MiB", "3.0 MiB"]
    assert all(parse_budget(as_size(n), "x").of(0) >= n for n in range(1, 2**22, 997))


# -------------------------------------------------------------------------------------- the line of the user's own code


def breaks(why: type[Exception]) -> Any:
    raise why("something in here")


HERE = rf"\({re.escape(__file__)}, line {inspect.getsourcelines(breaks)[1] + 1}\)\."


class Broken:
    """An objective that cannot be built."""

    def __init__(self) -> None:
        breaks(OSError)

    def __call__(self, model: nn.Module, batch: Any) -> Any: ...


@pytest.mark.parametrize("why", [ValueError, RuntimeError, KeyError])
@pytest.mark.parametrize("what", ["data", "model"])
def test_whatever_a_builder_raises_its_file_and_line_are_named(what: str, why: type[Exception], tmp_path: Path) -> None:
    with pytest.raises(ComponentError) as caught:
        train_here(recipe(**{what: functools.partial(breaks, why)}), Team(), tmp_path / "run")
    assert re.search(rf" could not be built: {why.__name__}: .*{HERE}$", caught.value.message)
    assert bool(caught.value.detail) == (why is not ValueError), "a wrong argument needs no traceback"


def test_an_objective_that_cannot_be_built_and_one_that_raises_name_file_and_line(tmp_path: Path) -> None:
    with pytest.raises(ComponentError) as caught:
        train_here(recipe(objective=Broken), Team(), tmp_path / "run")
    assert re.search(rf"Broken could not be built: OSError: .*{HERE}$", caught.value.message)
    with pytest.raises(WorkerError) as raised:
        train_here(recipe(objective=lambda model, batch: breaks(ZeroDivisionError)), Team(), tmp_path / "other")
    assert re.search(rf"^worker 0 raised ZeroDivisionError: .* while computing .*{HERE}$", raised.value.message)
