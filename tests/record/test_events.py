"""Events: what is emitted, what a reader checks and what the documentation tells are what the structures say."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec import UNSET

from instep.offline.cluster import Cluster
from instep.offline.simulation import simulate
from instep.recipe import Team
from instep.record import schema, tape
from instep.record.event_kinds import TYPES
from instep.record.events import ComputedEvent, Event, MergedContribution, MergedEvent, WarnedEvent, plain
from instep.record.folder import RunFolder
from instep.rules import parse
from support import workloads
from support.harness import train_here

ROOT = Path(__file__).parents[2]


def structure_of(event: dict[str, Any], by: str) -> type[Event]:
    """The structure of an event, by the engine that emitted it."""
    found = [
        each
        for each in TYPES
        if each.kind == event["kind"] and (not each.by or any(name in by for name in each.by.split(", ")))
    ]
    assert len(found) == 1, (event, by)
    return found[0]


def check_events(events: list[dict[str, Any]], by: str) -> set[str]:
    """All fields are known, of their types and in their order. Returns the kinds."""
    for event in events:
        structure = structure_of(event, by)
        fields = {name: value for name, value in event.items() if name != "kind"}
        made = msgspec.convert(fields, structure)  # each value is of its field's type
        assert list(plain(made)) == list(event), "the order of the fields, and none is unknown"
    return {event["kind"] for event in events}


def trained(rule: str, **team: Any) -> Callable[[Path], tuple[list[dict[str, Any]], str]]:
    def train(path: Path) -> tuple[list[dict[str, Any]], str]:
        recipe = workloads.gpt(rule=parse(rule), steps=4, evaluate_every=2, checksum_every=2)
        train_here(recipe, Team(workers=2, **team), path)
        return list(tape.read(path / "tape.jsonl")), "server" if team else "lockstep"

    return train


def simulated(gradients: bool) -> Callable[[Path], tuple[list[dict[str, Any]], str]]:
    def run(path: Path) -> tuple[list[dict[str, Any]], str]:
        RunFolder.create(path)
        recipe = workloads.gpt(rule=parse("bounded_staleness:1"), steps=4, evaluate_every=2)
        simulate(recipe, Cluster(workers=2), gradients, path, lambda event: None)
        with_or_without = "simulation with gradients" if gradients else "simulation without gradients"
        return list(tape.read(path / "tape.jsonl")), with_or_without

    return run


CONTRIBUTION = {"computed", "pushed", "merged"}
RUN = {"run_started", "joined", "evaluated", "checkpointed", "run_ended"}


@pytest.mark.processes
@pytest.mark.parametrize(
    ("produced", "kinds"),
    [
        (trained("synchronous"), CONTRIBUTION | RUN | {"checksummed"}),
        (trained("bounded_staleness:1", engine="server"), CONTRIBUTION | RUN | {"released"}),
        (simulated(True), (CONTRIBUTION | RUN | {"released"}) - {"checkpointed"}),
        (simulated(False), (CONTRIBUTION | RUN | {"released"}) - {"checkpointed", "evaluated"}),
    ],
)
def test_what_each_engine_emits_is_what_the_structures_say(
    produced: Callable[[Path], tuple[list[dict[str, Any]], str]], kinds: set[str], tmp_path: Path
) -> None:
    events, by = produced(tmp_path / "run")
    assert kinds <= check_events(events, by)


def test_a_field_too_many_or_too_few_is_an_error_where_the_event_is_made() -> None:
    with pytest.raises(TypeError, match="wy"):
        WarnedEvent(wy="a letter is missing")  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="Missing required argument 'why'"):
        WarnedEvent()  # type: ignore[call-arg]


def test_an_event_is_the_same_on_the_other_side_of_a_pipe_and_fields_not_set_are_left_out() -> None:
    computed = ComputedEvent(t_s=1.5, worker=1, version=3, from_s=0.5, to_s=1.0, microbatches=[0, 2])
    assert pickle.loads(pickle.dumps(computed)) == computed
    assert computed.verify_s is UNSET
    assert plain(computed) == {
        "t_s": 1.5, "clock": "wall", "kind": "computed", "worker": 1, "version": 3, "from_s": 0.5, "to_s": 1.0,
        "microbatches": [0, 2],
    }  # fmt: skip
    part = MergedContribution(worker=0, version=0, microbatches=[0, 8])
    merged = MergedEvent(
        version=1, step=1, contributions=[part], weights=[1.0], staleness=[0], objective=None, terms={}, items=0,
        lr=0.1, grad_norm=0.0, train_s=0.5,
    )  # fmt: skip
    assert plain(merged)["contributions"] == [{"worker": 0, "version": 0, "microbatches": [0, 8]}]


def test_the_table_of_events_in_the_documentation_is_the_one_that_the_code_makes() -> None:
    told = (ROOT / "docs" / "record.md").read_text()
    assert schema.documented() in told, "renew it with: python -m instep.record.schema"
    assert set(schema.by_kind()) == {structure.kind for structure in TYPES}
