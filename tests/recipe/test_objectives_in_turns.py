"""How a recipe says which objectives take turns, and what is refused of it."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from instep.errors import InstepError
from instep.monitors.progress import ProgressDisplay
from instep.monitors.scalars import scalars
from instep.objectives import learn_terms, of_recipe
from instep.objectives.adversarial import Discriminator, Generator
from instep.recipe import Recipe, Team, dumps, parse
from instep.rules import UpdateRule
from instep.turns import Turns
from instep.worker.replica import Replica
from instep.worker.spikes import Watcher
from support.adversaries import Pair, adversarial, turns
from support.sentences import one_sentence

FILE: dict[str, Any] = {
    "model": "support.adversaries:Pair",
    "data": "support.adversaries:ring",
    "objective": [
        {
            "name": "judge", "parameters": ["discriminator.*"], "steps": 2,
            "use": "instep.objectives.adversarial:Discriminator", "args": {"smoothing": 0.1},
        },
        {"name": "maker", "parameters": "gen*", "use": "instep.objectives.adversarial:Generator"},
    ],
}  # fmt: skip


@contextmanager
def refused(said: str) -> Iterator[None]:
    """The block raises an error of one sentence that says this."""
    with pytest.raises(InstepError) as caught:
        yield
    assert said in caught.value.message
    assert one_sentence(caught.value.message)


@pytest.mark.pure
def test_a_file_tells_of_turns_and_is_written_as_it_was_read() -> None:
    recipe = parse(FILE)[0]
    assert isinstance(recipe.objective, Turns)
    assert [turn.name for turn in recipe.objective.parts] == ["judge", "maker"]
    first, second = FILE["objective"]
    assert recipe.to_table()["objective"] == [{**first, "parameters": "discriminator.*"}, second]
    text = dumps(recipe, Team())
    assert "[[objective]]" in text
    again = parse(tomllib.loads(text))[0]
    assert again == recipe
    assert again.fingerprint() == recipe.fingerprint()


@pytest.mark.pure
@pytest.mark.parametrize("change", [{"steps": 3}, {"parameters": "*"}, {"name": "other"}, {"args": {"smoothing": 0.2}}])
def test_whatever_turns_say_decides_the_result(change: dict[str, Any]) -> None:
    first, second = FILE["objective"]
    other = parse({**FILE, "objective": [{**first, **change}, second]})[0]
    assert other.fingerprint() != parse(FILE)[0].fingerprint()
    assert parse({**FILE, "objective": [second, first]})[0].fingerprint() != parse(FILE)[0].fingerprint()


@pytest.mark.pure
def test_a_step_has_its_turn_by_its_number_alone() -> None:
    order = Turns.of(turns(3, 2))
    assert isinstance(order, Turns)
    assert [order.place(step) for step in range(12)] == [0, 0, 0, 1, 1, 0, 0, 0, 1, 1, 0, 0]
    assert order.place(5 * 10**15 + 4) == 1
    assert [order.firsts(start) for start in (0, 2, 3, 4, 5)] == [[0, 3], [2, 3], [5, 3], [5, 4], [5, 8]]


WRONG: dict[str, tuple[Any, str]] = {
    "no name": ([{"parameters": "*", "use": Generator}], "has no key 'name'"),
    "no parameters": ([{"name": "one", "use": Generator}], "has no key 'parameters'"),
    "no objective": ([{"name": "one", "parameters": "*"}], "has no key 'use'"),
    "an unknown key": ([{"name": "one", "parameters": "*", "use": Generator, "step": 2}], "unknown key 'step'"),
    "a name of words": ([{"name": "a b", "parameters": "*", "use": Generator}], "'a b'"),
    "no steps": ([{"name": "one", "parameters": "*", "use": Generator, "steps": 0}], "objective 'one' is 0"),
    "half a step": ([{"name": "one", "parameters": "*", "use": Generator, "steps": 0.5}], "is 0.5"),
    "no pattern": ([{"name": "one", "parameters": [], "use": Generator}], "'parameters' of the objective 'one'"),
    "none": ([], "empty list"),
    "two of one name": ([turns()[0], turns()[0]], "two objectives that take turns have the name 'discriminator'"),
}


@pytest.mark.pure
@pytest.mark.parametrize("name", WRONG)
def test_what_are_no_turns_is_refused(name: str) -> None:
    given, said = WRONG[name]
    with refused(said):
        adversarial(objective=given)


RULES = ["asynchronous", "bounded_staleness:2", "backup_workers:1", "softsync:2", "delay_compensated"]


@pytest.mark.pure
@pytest.mark.parametrize("rule", [*RULES, "async_diloco:4", "diloco:4,fragments=2"])
def test_rules_that_would_mix_turns_are_refused(rule: str) -> None:
    with refused("'local_sgd:3'"):
        adversarial(rule=UpdateRule.from_text(rule), objective=turns(2, 1))


@pytest.mark.pure
@pytest.mark.parametrize("rule", ["synchronous", "bounded_staleness:0", "local_sgd:3", "post_local_sgd:2", "diloco:6"])
def test_rules_in_which_all_wait_for_each_other_are_taken(rule: str) -> None:
    assert adversarial(rule=UpdateRule.from_text(rule)).rule.lockstep


NOT_OF_THE_MODEL: dict[str, tuple[dict[str, Any], str]] = {
    "a pattern of no parameter": ({"parameters": "discriminater.*"}, "did you mean that of 'discriminator."),
    "a parameter without a turn": ({"parameters": "discriminator.0.*"}, "'discriminator.3.weight' is trained in no"),
}


@pytest.mark.parametrize("name", NOT_OF_THE_MODEL)
def test_turns_that_do_not_fit_the_model_are_refused(name: str) -> None:
    change, said = NOT_OF_THE_MODEL[name]
    first, second = turns()
    with refused(said):
        Replica(adversarial(objective=[{**first, **change}, second]), "cpu")


@pytest.mark.parametrize(("freeze", "said"), [
    ({"discriminator.*": "all"}, "trains nothing"),
    ({"discriminator.*": "4..7"}, "is frozen in step 4"),
])  # fmt: skip
def test_a_turn_whose_parameters_are_all_frozen_is_refused(freeze: dict[str, str], said: str) -> None:
    parts = {"*": lambda parameters: torch.optim.SGD(parameters, lr=0.1)}
    with refused(said):
        Replica(adversarial(freeze=freeze, optimizer=parts), "cpu")
    Replica(adversarial(freeze={"discriminator.0.*": "all"}, optimizer=parts), "cpu")


def shares(model: nn.Module, batch: Any, shared: Any) -> Tensor:
    return torch.zeros(())


setattr(shares, "share", lambda model, batch: batch)  # noqa: B010


def test_an_objective_that_sees_the_whole_batch_takes_no_turns() -> None:
    first, second = turns()
    with refused("takes turns with others"):
        Replica(adversarial(objective=[{**first, "use": shares}, second]), "cpu")


def test_terms_are_called_after_the_turn_and_count_in_it_alone() -> None:
    order = Turns.of(turns())
    batch = [torch.randn(6, 2)]
    whole = learn_terms(of_recipe(order), Pair(), batch)
    names = ("discriminator.real", "discriminator.fake", "generator", "discriminator.right")
    assert whole.terms == names
    assert whole.counts(batch) == dict(zip(names, (6, 6, 6, 12), strict=True))
    assert whole.counts_at(0, batch) == dict(zip(names, (6, 6, 0, 12), strict=True))
    assert whole.counts_at(1, batch) == dict(zip(names, (0, 0, 6, 0), strict=True))
    assert [whole.turn(whole.counts_at(step, batch)) for step in (0, 1)] == ["discriminator", "generator"]
    assert [whole.items(whole.counts_at(step, batch)) for step in (0, 1)] == [6, 6]
    assert whole.weights(0) == dict.fromkeys(names[:3], 1.0)


def test_the_watch_compares_an_objective_with_those_of_its_own_turn() -> None:
    replica = Replica(adversarial(), "cpu")
    watcher = Watcher(replica, None)  # type: ignore[arg-type]
    window = replica.watch.window
    for step in range(window):
        assert not watcher.judge(2 * step, 1.0 + step % 3 / 10, "discriminator").answer
        assert not watcher.judge(2 * step + 1, 100.0 + step % 3, "generator").answer
    other = Watcher(replica, None)  # type: ignore[arg-type]
    other.load(watcher.state())
    for each in (watcher, other):
        assert not each.judge(2 * window, 1.2, "discriminator").answer
        assert each.judge(2 * window + 1, 1000.0, "generator").answer == "warn"
        assert each.judge(2 * window + 2, 50.0, "discriminator").answer == "warn", "which is usual in the other turn"


def merged(version: int, turn: str, value: float, **terms: float) -> dict[str, Any]:
    return {
        "kind": "merged", "version": version, "step": version, "objective": value, "terms": terms, "items": 5,
        "turn": turn, "t_s": float(version), "train_s": float(version),
    }  # fmt: skip


@pytest.mark.pure
def test_a_line_and_trackers_show_each_objective_by_its_name() -> None:
    shown = ProgressDisplay()
    shown.see({"kind": "run_started", "step": 0, "steps": 4, "t_s": 0.0, "clock": "wall"})
    first = merged(1, "judge", 1.5, **{"judge.real": 0.5, "judge.fake": 1.0})
    second = merged(2, "maker", 0.25, maker=0.25)
    shown.see(first)
    shown.see(second)
    line = shown.line(evaluated=False)
    for text in ("judge 1.5000", "maker 0.2500", "judge.real 0.5000", "judge.fake 1.0000"):
        assert line.count(text) == 1, line
    assert "objective" not in line
    assert [(part.label, part.long) for part in shown.parts()[1:3]] == [("judge", "1.500"), ("maker", "0.250")]
    evaluated = {
        "kind": "evaluated", "version": 2, "objective": 2.0, "terms": {"judge.real": 1.25, "maker": 0.75},
        "turns": {"judge": 1.25, "maker": 0.75}, "t_s": 3.0,
    }  # fmt: skip
    shown.see(evaluated)
    assert "held-out judge 1.2500  held-out maker 0.7500" in shown.line(evaluated=True)
    assert scalars(first)["objective/train/judge"] == 1.5
    assert scalars(second)["objective/train/maker"] == 0.25
    assert scalars(evaluated)["objective/held_out/judge"] == 1.25


BAD: dict[str, tuple[Any, Any, str]] = {
    "no pair": (nn.Linear(2, 1), Discriminator(), "is no adversarial pair"),
    "a wide head": (Pair(), Discriminator(), "the model's generator made samples of shape [3, 2]"),
    "several logits": (Pair(), Generator(), "it must give one logit for each"),
}


@pytest.mark.parametrize("name", BAD)
def test_an_adversarial_objective_says_what_it_needs(name: str) -> None:
    model, objective, said = BAD[name]
    batch = torch.randn(3, 3 if name == "a wide head" else 2)
    if name == "several logits":
        model.discriminator[-1] = nn.Linear(8, 2)
    with refused(said):
        objective(model, batch)
    with pytest.raises(InstepError, match="adversarial objective was given"):
        objective(model, [torch.arange(3)])
    with refused("'smoothing' is 1"):
        Discriminator(smoothing=1)
    with refused("'penalty' is -1"):
        Discriminator(penalty=-1)


def test_conditions_go_with_their_samples() -> None:
    class Conditional(nn.Module):
        latents = 1

        def generator(self, noise: Tensor, label: Tensor) -> Tensor:
            return -label[:, None].float()

        def discriminator(self, x: Tensor, label: Tensor) -> Tensor:
            return x[:, 0] * label

    labels = torch.tensor([1, 2, 3])
    sums = Discriminator()(Conditional(), (labels[:, None].float(), labels))
    squares = labels.float().square()
    assert torch.equal(sums["real"], nn.functional.softplus(-squares).sum())
    assert torch.equal(sums["fake"], nn.functional.softplus(-squares).sum())
    assert sums["right"] == 6
    made = Generator()(Conditional(), (labels[:, None].float(), labels))
    assert torch.equal(made, nn.functional.softplus(squares).sum())


def test_one_objective_is_as_ever() -> None:
    recipe = Recipe(model=nn.Linear(1, 1), objective=Generator, data=[1])
    assert recipe.objective.describe() == "instep.objectives.adversarial:Generator"
    assert recipe.to_table()["objective"] == {"use": "instep.objectives.adversarial:Generator"}
