"""Update rules: the presets are those of the literature, and what does not go together is refused in a sentence."""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
import tomllib
from typing import Any

import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st

from instep.errors import RecipeError
from instep.rules import PRESETS, UpdateRule, parse
from instep.rules.presets import (
    async_diloco,
    asynchronous,
    backup_workers,
    bounded_staleness,
    delay_compensated,
    diloco,
    local_sgd,
    post_local_sgd,
    softsync,
    synchronous,
    text_of,
)  # fmt: skip
from instep.tables import from_table, to_table
from support.ledgers import ANY_RULE, presets

pytestmark = pytest.mark.pure

PLAIN: dict[str, Any] = {
    "max_lead": None, "max_staleness": None, "max_wait_s": None, "local_steps": 1, "local_after": 0, "weight": "items",
    "compensation": 0.0, "outer": "none", "outer_lr": 1.0, "outer_momentum": 0.0, "outer_buffer": 1, "wire": "float32",
    "fragments": 1, "overlap": 0, "mix": 0.5, "grace_s": None,
}  # fmt: skip
LOCKSTEP: dict[str, Any] = {"order": "round", "quorum": "all", "max_lead": 0, "max_staleness": 0}
FREE: dict[str, Any] = {"order": "arrival", "quorum": "1"}

TABLE: list[tuple[UpdateRule, str, dict[str, Any]]] = [
    (synchronous(), "synchronous", LOCKSTEP),
    (backup_workers(2), "backup_workers", FREE | {"quorum": "all-2", "max_lead": 0, "max_staleness": 0}),
    (bounded_staleness(0), "bounded_staleness", LOCKSTEP),
    (bounded_staleness(3), "bounded_staleness", FREE | {"max_lead": 3}),
    (softsync(3), "softsync", FREE | {"quorum": "all/3", "weight": "staleness"}),
    (asynchronous(), "asynchronous", FREE),
    (delay_compensated(0.5), "delay_compensated", FREE | {"compensation": 0.5}),
    (local_sgd(7), "local_sgd", LOCKSTEP | {"local_steps": 7, "outer": "sgd"}),
    (post_local_sgd(7, 30), "post_local_sgd", LOCKSTEP | {"local_steps": 7, "local_after": 30, "outer": "sgd"}),
    (
        diloco(),
        "diloco",
        LOCKSTEP | {"local_steps": 500, "outer": "nesterov", "outer_lr": 0.7, "outer_momentum": 0.9},
    ),
    (
        async_diloco(20, 12),
        "async_diloco",
        FREE
        | {"local_steps": 20, "outer": "delayed_nesterov", "outer_lr": 0.7, "outer_momentum": 0.9, "outer_buffer": 12},
    ),
]


@pytest.mark.parametrize(("rule", "name", "fields"), TABLE, ids=[f"{name}-{n}" for n, (_, name, _) in enumerate(TABLE)])
def test_each_preset_is_its_row_of_the_design(rule: UpdateRule, name: str, fields: dict[str, Any]) -> None:
    assert dataclasses.asdict(rule) == PLAIN | fields | {"name": name}


def test_the_table_holds_every_preset_and_every_preset_cites_its_source() -> None:
    assert {name for _, name, _ in TABLE} == PRESETS.keys()
    for name, preset in PRESETS.items():
        assert preset().name == name
        assert re.search(r"\b(19|20)\d\d\b", inspect.getdoc(preset) or ""), name


def test_which_presets_send_gradients_and_which_are_in_lockstep() -> None:
    rules = [preset() for preset in PRESETS.values()]
    assert [rule.name for rule in rules if not rule.gradients] == [
        "local_sgd", "post_local_sgd", "diloco", "async_diloco",
    ]  # fmt: skip
    assert [rule.name for rule in rules if rule.lockstep] == ["synchronous", "local_sgd", "post_local_sgd", "diloco"]
    assert [rule.name for rule in [*rules, bounded_staleness(0)] if rule.synchronous] == [
        "synchronous", "bounded_staleness",
    ]  # fmt: skip
    assert not UpdateRule(quorum="all", max_lead=0).lockstep, "by arrival is not by round"


@pytest.mark.parametrize(
    ("quorum", "wanted"),
    [
        ("all", [1, 2, 3, 4, 5, 6]),
        ("all-2", [1, 1, 1, 2, 3, 4]),
        ("all/2", [1, 1, 2, 2, 3, 3]),
        ("all/4", [1, 1, 1, 1, 2, 2]),
        ("1", [1, 1, 1, 1, 1, 1]),
        ("4", [1, 2, 3, 4, 4, 4]),
        (4, [1, 2, 3, 4, 4, 4]),
    ],
)
def test_a_quorum_for_one_to_six_workers(quorum: Any, wanted: list[int]) -> None:
    rule = UpdateRule(quorum=quorum)
    assert [rule.quorum_of(workers) for workers in range(1, 7)] == wanted
    assert rule.quorum_of(0) == 1


# ---------------------------------------------------------------------------------------------------------- the text


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("asynchronous", asynchronous()),
        ("bounded_staleness:4", bounded_staleness(4)),
        ("bounded_staleness:0", dataclasses.replace(synchronous(), name="bounded_staleness")),
        ("bounded_staleness,lead=0", bounded_staleness(0)),
        (" diloco : 20 , outer_lr = 0.5 ", diloco(20, outer_lr=0.5)),
        ("post_local_sgd:5,after=9", post_local_sgd(5, 9)),
        ("async_diloco,buffer=3,local_steps=4", async_diloco(4, 3)),
        ("delay_compensated:1e-2", delay_compensated(0.01)),
        ("asynchronous,quorum=3,max_staleness=2", UpdateRule(name="asynchronous", quorum="3", max_staleness=2)),
        ("bounded_staleness:2,max_lead=none", UpdateRule(name="bounded_staleness", quorum="1")),
        ("softsync:2,max_wait_s=1.5,name=mine", dataclasses.replace(softsync(2), max_wait_s=1.5, name="mine")),
        ("asynchronous,max_wait_s=None", asynchronous()),
        ("synchronous,outer=none", synchronous()),
        ("local_sgd:1,outer=none", dataclasses.replace(synchronous(), name="local_sgd")),
        ("asynchronous,weight=staleness", dataclasses.replace(asynchronous(), weight="staleness")),
    ],
)
def test_a_rule_as_text(text: str, rule: UpdateRule) -> None:
    assert parse(text) == UpdateRule.from_text(text) == rule


@pytest.mark.parametrize("name", PRESETS)
def test_a_name_alone_is_the_preset(name: str) -> None:
    assert parse(name) == PRESETS[name]()


def sentence(error: pytest.ExceptionInfo[RecipeError]) -> str:
    """The message, which is one sentence."""
    message = str(error.value)
    assert re.fullmatch(r"[^\n]*[.?]", message), message
    assert not re.search(r"[.?!] +[A-Z]", message), message
    return message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("asynchronos", "'asynchronos' is no update rule; did you mean 'asynchronous'?"),
        ("diloko:20", "'diloko' is no update rule; did you mean 'diloco'?"),
        ("zzz", "'zzz' is no update rule; the rules are synchronous, backup_workers,"),
        ("", "'' is no update rule; the rules are"),
        ("asynchronous:3", "rule 'asynchronous' takes no value, and 'asynchronous:3' gives it '3'."),
        ("diloco:", "'diloco:local_steps' is ''; it must be a whole number."),
        ("diloco:many", "'diloco:local_steps' is 'many'; it must be a whole number."),
        ("diloco:2.5", "'diloco:local_steps' is '2.5'; it must be a whole number."),
        ("diloco:none", "'diloco:local_steps' is 'none'; it must be a whole number."),
        ("diloco:20,outer_lr=fast", "'diloco,outer_lr' is 'fast'; it must be a number."),
        ("diloco:20,outer_rl=1", "rule 'diloco' has no field 'outer_rl'; did you mean 'outer_lr'?"),
        ("diloco:20,xyz=1", "rule 'diloco' has no field 'xyz'; its fields are local_steps, outer_lr, outer_momentum,"),
        ("diloco:20,outer_lr", "'outer_lr' in the rule 'diloco:20,outer_lr' is no 'field=value'."),
        ("diloco:20,", "'' in the rule 'diloco:20,' is no 'field=value'."),
        ("diloco:20,local_steps=3", "'local_steps' is given twice in the rule 'diloco:20,local_steps=3'."),
        ("diloco,outer_lr=1,outer_lr=1", "'outer_lr' is given twice in the rule"),
        ("asynchronous,quorum=2,quorum=3", "'quorum' is given twice in the rule"),
        ("asynchronous,max_lead=few", "'asynchronous,max_lead' is 'few'; it must be a whole number, or none."),
        ("asynchronous,max_wait_s=x", "'asynchronous,max_wait_s' is 'x'; it must be a number, or none."),
        ("asynchronous,weight=none", "'rule.weight' is 'none'; it must be one of 'items', 'staleness'."),
        ("asynchronous,order=chance", "'rule.order' is 'chance'; it must be one of 'round', 'arrival'."),
        ("asynchronous,order=round", "and 'rule.quorum' is '1'; set quorum to 'all', or order to 'arrival'."),
        ("asynchronous,wire=int8", "and rule 'asynchronous' sends gradients, which stay float32; leave it out, or"),
        ("synchronous,wire=int8", "'rule.wire' is 'int8' and rule 'synchronous' sends gradients, which stay float32;"),
        ("diloco:20,wire=int3", "'rule.wire' is 'int3'; it must be one of 'float32', 'bfloat16', 'int8', 'int4'."),
        ("asynchronous,compensation=nan", "'rule.compensation' is nan; it must be a finite number from 0."),
        ("backup_workers:0", "'backup_workers:spare' is 0; it must be a whole number from 1."),
        ("backup_workers:-1", "'backup_workers:spare' is -1; it must be a whole number from 1."),
        ("softsync:0", "'softsync:splits' is 0; it must be a whole number from 1."),
        ("bounded_staleness:-1", "'rule.max_lead' is -1; it must be at least 0 (leave it out for no bound)."),
        ("local_sgd:0", "'rule.local_steps' is 0; it must be at least 1."),
        ("async_diloco,buffer=1", "'rule.outer_buffer' is 1, too small to delay anything;"),
    ],
)
def test_a_text_that_is_no_rule_is_refused(text: str, expected: str) -> None:
    with pytest.raises(RecipeError) as error:
        parse(text)
    assert expected in sentence(error)


@given(st.text(alphabet="dilocoasyn:,=0123456789.- _", max_size=30) | st.text(max_size=20))
def test_any_text_is_a_rule_or_refused(text: str) -> None:
    for each in (text, f"diloco{text}", f"softsync:{text}", f"asynchronous,{text}"):
        try:
            rule = parse(each)
        except RecipeError as error:
            message = error.message
        else:
            assert parse(each) == rule
            continue
        assert message[-1] in ".?"


# -------------------------------------------------------------------------------------------------------- the fields

DELTAS: dict[str, Any] = {"quorum": "1", "outer": "nesterov"}
STREAMING: dict[str, Any] = {**LOCKSTEP, "outer": "nesterov", "local_steps": 4, "fragments": 2}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"quorum": "most"}, "'rule.quorum' is 'most'; write a number from 1,"),
        ({"quorum": 0}, "'rule.quorum' is '0'; write a number from 1,"),
        ({"quorum": -2}, "'rule.quorum' is '-2'; write a number from 1,"),
        ({"quorum": "all-0"}, "'rule.quorum' is 'all-0'; write"),
        ({"quorum": "all/0"}, "'rule.quorum' is 'all/0'; write"),
        ({"quorum": "all-"}, "'rule.quorum' is 'all-'; write"),
        ({"quorum": 1.5}, "'rule.quorum' is 1.5, of type float; it must be a str."),
        ({"quorum": True}, "'rule.quorum' is True, of type bool; it must be a str."),
        ({"quorum": "1", "max_lead": 1.0}, "'rule.max_lead' is 1.0, of type float; it must be a whole number."),
        ({"quorum": "1", "max_lead": -1}, "'rule.max_lead' is -1; it must be at least 0"),
        ({"quorum": "1", "max_staleness": -3}, "'rule.max_staleness' is -3; it must be at least 0"),
        ({"quorum": "1", "max_wait_s": 0}, "'rule.max_wait_s' is 0.0; it must be a finite number above 0"),
        ({"quorum": "1", "max_wait_s": math.nan}, "'rule.max_wait_s' is nan; it must be a finite number above 0"),
        ({"quorum": "1", "max_wait_s": math.inf}, "'rule.max_wait_s' is inf; it must be a finite number above 0"),
        ({**LOCKSTEP, "max_wait_s": 1.0}, "'rule.max_wait_s' is 1.0, and 'rule.order' is 'round', which waits"),
        ({**LOCKSTEP, "quorum": "all-1"}, "'rule.order' is 'round', which waits for every piece, and 'rule.quorum' is"),
        ({**DELTAS, "local_steps": 0}, "'rule.local_steps' is 0; it must be at least 1."),
        ({"quorum": "1", "local_steps": 2}, "a contribution is a delta, which needs an outer optimizer;"),
        ({**DELTAS, "local_steps": 2, "local_after": -1}, "'rule.local_after' is -1; it must be at least 0."),
        ({**DELTAS, "local_after": 3}, "'rule.local_after' goes with 'rule.local_steps' above 1."),
        ({"quorum": "1", "compensation": -0.1}, "'rule.compensation' is -0.1; it must be a finite number from 0."),
        ({**DELTAS, "compensation": 0.1}, "'rule.compensation' is for gradients;"),
        ({**DELTAS, "outer_lr": 0.0}, "'rule.outer_lr' is 0.0; it must be a finite number above 0."),
        ({**DELTAS, "outer_lr": math.inf}, "'rule.outer_lr' is inf; it must be a finite number above 0."),
        ({**DELTAS, "outer_momentum": 1.0}, "'rule.outer_momentum' is 1.0; it must be from 0 to below 1."),
        ({**DELTAS, "outer_momentum": math.nan}, "'rule.outer_momentum' is nan; it must be from 0 to below 1."),
        ({**DELTAS, "outer_buffer": 0}, "'rule.outer_buffer' is 0; it must be at least 1."),
        ({**DELTAS, "outer_buffer": 4}, "'rule.outer_buffer' is 4, and 'rule.outer' is 'nesterov'; only"),
        ({**DELTAS, "outer": "delayed_nesterov"}, "'rule.outer_buffer' is 1, too small to delay anything;"),
        ({"quorum": "1", "outer_lr": 0.5}, "outer_lr, outer_momentum and outer_buffer go with an outer optimizer;"),
        ({"quorum": "1", "grace_s": 0}, "'rule.grace_s' is 0.0; it must be a finite number above 0"),
        (
            {"quorum": "all", "grace_s": 1.0},
            "'rule.grace_s' is 1.0, and rule 'custom' waits for all, so that no quorum",
        ),
        ({**LOCKSTEP, "grace_s": 1.0}, "leave it out, or set quorum to fewer, such as 'all-1', with order 'arrival'."),
        ({**DELTAS, "fragments": 0}, "'rule.fragments' is 0; it must be at least 1."),
        ({**LOCKSTEP, "fragments": 2}, "'rule.fragments' is 2 and rule 'custom' sends something after every step;"),
        (
            {**LOCKSTEP, "outer": "sgd", "fragments": 2},
            "or take a rule with local steps, such as 'diloco:40,fragments=2'.",
        ),
        ({**DELTAS, "local_steps": 4, "fragments": 2}, "under rule 'custom' workers do not wait for each other,"),
        ({**STREAMING, "local_after": 3}, "'rule.fragments' is 2 and 'rule.local_after' is 3, batches in which"),
        ({**STREAMING, "local_steps": 5}, "set local_steps to a multiple of it, such as 4."),
        ({**STREAMING, "fragments": 5}, "set local_steps to a multiple of it, such as 5."),
        ({**STREAMING, "overlap": -1}, "'rule.overlap' is -1; it must be at least 0."),
        ({**STREAMING, "overlap": 3}, "something after every 2 steps (local_steps / fragments), before which it needs"),
        (
            {**LOCKSTEP, "outer": "sgd", "overlap": 1},
            "'rule.overlap' is 1 and rule 'custom' sends something after every",
        ),
        (
            {**DELTAS, "local_steps": 4, "overlap": 1},
            "'rule.overlap' is 1 and under rule 'custom' workers do not wait for each other, so that there is nothing",
        ),
        ({**STREAMING, "fragments": 1, "overlap": 1, "local_after": 3}, "'rule.overlap' is 1 and 'rule.local_after'"),
        ({**STREAMING, "fragments": 1, "overlap": 4, "mix": 0}, "so that it never sends anything; set overlap lower,"),
        ({**STREAMING, "overlap": 1, "mix": 1}, "'rule.mix' is 1.0; it must be from 0 to below 1"),
        ({**STREAMING, "overlap": 1, "mix": math.nan}, "'rule.mix' is nan; it must be from 0 to below 1"),
        ({**STREAMING, "mix": 0.25}, "'rule.mix' is 0.25, and without 'rule.overlap' workers take each update as it"),
        ({"quorum": "1", "outer": "adam"}, "'rule.outer' is 'adam'; it must be one of 'none', 'sgd',"),
    ],
)
def test_fields_that_do_not_go_together_are_refused(fields: dict[str, Any], expected: str) -> None:
    with pytest.raises(RecipeError) as error:
        UpdateRule(**fields)
    assert expected in sentence(error)


@pytest.mark.parametrize(
    ("rule", "workers", "expected"),
    [
        (UpdateRule(quorum=5), 4, "'rule.quorum' is 5 and the team has 4 workers, fewer than an update takes;"),
        (UpdateRule(quorum=2), 1, "'rule.quorum' is 2 and the team has 1 worker,"),
        (backup_workers(4), 4, "'rule.quorum' is 'all-4' and the team has 4 workers, so nobody would be waited for;"),
    ],
)
def test_a_rule_that_its_team_cannot_obey_is_refused(rule: UpdateRule, workers: int, expected: str) -> None:
    with pytest.raises(RecipeError) as error:
        rule.check_workers(workers)
    assert expected in sentence(error)
    rule.check_workers(workers + 1)


def test_rules_for_all_workers_go_with_any_team() -> None:
    for rule in (synchronous(), asynchronous(), diloco(), bounded_staleness(3), softsync(2)):
        rule.check_workers(1)


def test_a_part_of_less_than_one_worker_is_one() -> None:
    """As it is when workers leave."""
    softsync(5).check_workers(4)
    assert [softsync(5).quorum_of(workers) for workers in (1, 4, 5, 6)] == [1, 1, 1, 2]


def test_outer_momentum_one_by_one_is_warned_of() -> None:
    risky = UpdateRule(name="mine", quorum="1", local_steps=4, outer="nesterov", outer_momentum=0.9)
    (warning,) = risky.warnings()
    assert "rule 'mine' applies outer momentum 0.9 to few contributions at a time" in warning
    assert "set outer to 'delayed_nesterov'" in warning
    assert not dataclasses.replace(risky, outer_momentum=0.0).warnings()
    assert not dataclasses.replace(risky, quorum="all").warnings(), "all workers in each update"
    assert not dataclasses.replace(risky, quorum="all", order="round", max_lead=0).warnings()


def test_no_preset_warns() -> None:
    assert [preset().warnings() for preset in PRESETS.values()] == [[]] * len(PRESETS)


# ---------------------------------------------------------------------------------------------------------- as a table


@given(ANY_RULE)
def test_a_rule_comes_back_from_toml_as_it_was(rule: UpdateRule) -> None:
    table = tomllib.loads(tomli_w.dumps(to_table(rule)))
    assert from_table(UpdateRule, table, "rule") == rule


def test_a_quorum_may_be_a_number_in_a_table() -> None:
    assert from_table(UpdateRule, tomllib.loads("quorum = 2"), "rule") == UpdateRule(quorum="2")
    for text in ("quorum = true", "quorum = 2.0", "quorum = [2]"):
        with pytest.raises(RecipeError, match="'rule.quorum' is .*; it must be text"):
            from_table(UpdateRule, tomllib.loads(text), "rule")
    with pytest.raises(RecipeError, match="'rule.quorum' is '0'; write a number from 1"):
        from_table(UpdateRule, tomllib.loads("quorum = 0"), "rule")
    with pytest.raises(RecipeError, match="'rule.name' is 3, of type int"):
        from_table(UpdateRule, {"quorum": 2, "name": 3}, "rule")


def test_a_misspelt_field_of_a_table_is_refused() -> None:
    with pytest.raises(RecipeError, match="unknown key 'rule.max_leed'; did you mean 'max_lead'\\?"):
        from_table(UpdateRule, {"quorum": "1", "max_leed": 2}, "rule")
    with pytest.raises(RecipeError, match="'rule.quorum' is missing"):
        from_table(UpdateRule, {"max_lead": 2}, "rule")


def test_a_rule_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        synchronous().max_lead = 1  # type: ignore[misc]


@given(presets())
def test_a_rule_is_told_as_it_is_written(rule: UpdateRule) -> None:
    assert parse(text_of(rule)) == rule


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("synchronous", "synchronous"),
        ("bounded_staleness", "bounded_staleness:4"),
        ("backup_workers:2", "backup_workers:2"),
        ("diloco:20,outer_lr=0.5", "diloco:20,outer_lr=0.5"),
        ("asynchronous,max_staleness=8", "asynchronous,max_staleness=8"),
        ("bounded_staleness:3,max_lead=none", "bounded_staleness,max_lead=none"),
    ],
)
def test_a_rule_is_told_with_its_value(text: str, told: str) -> None:
    assert text_of(parse(text)) == told
    assert parse(told) == parse(text)
