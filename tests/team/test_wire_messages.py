"""What crosses between hosts: every message comes out as it went in, and what is none is refused."""

from __future__ import annotations

import dataclasses
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args, get_type_hints

import msgspec
import numpy as np
import pytest
from hypothesis import Phase, example, find, given, settings
from hypothesis import strategies as st

from instep.record import events as ev
from instep.record.event_kinds import TYPES
from instep.record.result import Costs
from instep.team import messages as m
from instep.team import wire_format
from instep.team import wire_messages as w
from instep.team.orders import Member
from instep.team.regroup_messages import LeftGroup, NotRegrouped, Regrouped
from instep.transport.memory import Region
from support.patience import LONG_S

pytestmark = pytest.mark.pure

file_names = st.from_regex(r"^\w[\w .-]{0,20}\Z")
counts = st.integers(0, (1 << 53) - 1)
words = st.text(max_size=20)
floats = st.floats()
plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 90), 1 << 90) | floats | words | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.lists(inner, max_size=4).map(tuple) | st.dictionaries(words, inner),
    max_leaves=8,
)
tables = st.dictionaries(words, plain, max_size=4)
members = st.builds(Member, *(counts for _ in dataclasses.fields(Member)))
costs = st.builds(Costs, bytes_sent=counts, staleness_mean=floats, idle_share=st.lists(floats))
merged = st.builds(
    ev.MergedEvent,
    t_s=floats,
    version=counts,
    step=counts,
    contributions=st.lists(
        st.builds(ev.MergedContribution, worker=st.integers(0, 99), version=counts, microbatches=st.just([0, 2]))
    ),
    weights=st.lists(floats | st.integers(0, 9)),  # a whole number is one on the tape, too
    staleness=st.lists(counts),
    objective=st.none() | floats,
    terms=st.dictionaries(words, floats),
    items=counts,
    lr=floats,
    grad_norm=st.none() | floats,
    train_s=floats | st.just(0),
)
warned = st.builds(ev.WarnedEvent, t_s=floats, why=words, version=counts)
joined = st.builds(ev.JoinedEvent, t_s=floats, worker=st.integers(0, 99), pid=counts, host=words)

from_workers = st.one_of(
    st.builds(m.Events, st.lists(st.one_of(merged, warned, joined), max_size=3)),
    st.builds(m.Ready, tables, st.just({})),
    st.builds(m.Digest, counts, words),
    st.builds(m.Sync),
    st.builds(m.FoundWritten, st.lists(words) | st.lists(words).map(tuple), words),
    st.builds(m.PeersLost, words, words, counts, st.booleans()),
    st.builds(m.KeepingState),
    st.builds(m.FoundWrong, counts, counts, counts, counts, counts, words),
    st.builds(NotRegrouped, counts, words),
    st.builds(Regrouped, counts),
    st.builds(LeftGroup, counts),
    st.builds(m.StoppedAt, counts),
    st.builds(m.Failed, words, words, words),
    st.builds(m.Ended, tables, words, st.booleans(), tables, st.none() | costs, counts),
)
to_workers = st.one_of(
    st.builds(m.Agreed, tables, st.just({})),
    st.builds(m.Synced),
    st.builds(m.StopRun),
    st.builds(m.Left, counts, words),
)
shown = st.builds(
    w.Shown, members, counts, floats, floats, words, floats, st.none() | floats, st.booleans(), st.booleans()
)
loaders = st.builds(w.LoaderShown, counts, counts, counts, counts, counts, counts, counts, words, st.booleans())
BY_HAND: dict[type, st.SearchStrategy[Any]] = {
    w.FromMember: st.builds(w.FromMember, members, from_workers),
    w.ToMember: st.builds(w.ToMember, members, to_workers),
    m.Failed: st.builds(m.Failed, words, words, words),
    m.Finished: st.builds(m.Finished, tables),
    w.HelloAgent: st.builds(
        w.HelloAgent, counts, counts, counts, counts, words, words, counts, st.dictionaries(words, words), words, words,
        tables, words, st.builds(w.Hardware, words, counts, counts, st.lists(words).map(tuple)),
        st.none() | st.builds(w.Kept, st.none() | words, counts, file_names, words), counts,
    ),
    w.KeptGiven: st.builds(
        w.KeptGiven, file_names, st.lists(merged | warned, max_size=3).map(tuple), words, st.booleans()
    ),
    w.StartMembers: st.builds(
        w.StartMembers, counts, st.lists(members, max_size=3).map(tuple), st.none() | file_names, tables, st.booleans(),
        st.none() | words, st.lists(words).map(tuple), st.lists(counts).map(tuple), st.tuples(words, counts), words,
        words, st.booleans(),
    ),
    w.RegroupMembers: st.builds(
        w.RegroupMembers, counts, counts, st.lists(members, max_size=3).map(tuple), st.booleans(), counts, counts,
        st.booleans(), counts,
    ),
    w.HelloAgain: st.builds(w.HelloAgain, counts, words, counts, floats, st.lists(members, max_size=3).map(tuple)),
    w.GoMembers: st.builds(w.GoMembers, counts, tables),
    w.MembersShown: st.builds(
        w.MembersShown, st.lists(shown, max_size=3).map(tuple), counts, tables,
        st.lists(loaders, max_size=3).map(tuple),
    ),
    w.StacksWanted: st.builds(w.StacksWanted, counts, st.lists(counts).map(tuple)),
}  # fmt: skip


def of_field(kind: Any) -> st.SearchStrategy[Any]:
    """Values that a field of an event may have."""
    unset = st.just(msgspec.UNSET) if msgspec.UnsetType in get_args(kind) else st.nothing()
    return unset | _of_info(msgspec.inspect.type_info(kind))


def _of_info(info: Any) -> st.SearchStrategy[Any]:
    i = msgspec.inspect
    match info:
        case i.Metadata():
            return _of_info(info.type)
        case i.UnionType():
            return st.one_of([_of_info(each) for each in info.types])
        case i.StructType():
            return st.builds(ev.MergedContribution, worker=st.integers(0, 9), version=counts)
        case i.IntType():
            return st.integers(info.ge or 0, info.le or 1 << 40)
        case i.ListType():
            return st.lists(_of_info(info.item_type), min_size=info.min_length or 0, max_size=info.max_length or 3)
        case i.VarTupleType():
            return st.lists(_of_info(info.item_type), max_size=3).map(tuple)
        case i.DictType():
            return (
                tables if isinstance(info.value_type, i.AnyType) else st.dictionaries(words, _of_info(info.value_type))
            )
        case i.TypedDictType():
            return st.fixed_dictionaries({each.encode_name: _of_info(each.type) for each in info.fields})
        case i.StrType() if info.pattern:
            return file_names
        case i.LiteralType():
            return st.sampled_from(info.values)
    return {
        i.FloatType: floats,
        i.StrType: words,
        i.BytesType: st.binary(max_size=9),
        i.BoolType: st.booleans(),
        i.NoneType: st.none(),
        i.AnyType: plain,
    }[type(info)]


def built(kind: type) -> st.SearchStrategy[Any]:
    """Messages of this kind."""
    if kind in BY_HAND:
        return BY_HAND[kind]
    hints = get_type_hints(kind, include_extras=True)
    return st.builds(kind, **{name: members if hint is Member else of_field(hint) for name, hint in hints.items()})


def same(found: Any, sent: Any) -> bool:
    """Equal in value and type all through, floats bit for bit."""
    if isinstance(sent, float) and isinstance(found, float):
        return struct.pack("d", found) == struct.pack("d", sent)
    if type(found) is not type(sent):
        return False
    if isinstance(sent, list | tuple):
        return len(found) == len(sent) and all(map(same, found, sent))
    if isinstance(sent, dict):
        return list(found) == list(sent) and all(same(found[name], sent[name]) for name in sent)
    if isinstance(sent, msgspec.Struct):
        return all(same(getattr(found, name), getattr(sent, name)) for name in sent.__struct_fields__)
    if dataclasses.is_dataclass(sent):
        return all(same(getattr(found, each.name), getattr(sent, each.name)) for each in dataclasses.fields(sent))
    return bool(found == sent)


@given(st.one_of(*map(built, get_args(w.ToAgent0))))
@example(w.Beat(0, struct.unpack("d", b"\1\2\3\4\5\6\xf8\x7f")[0], -0.0, 5e-324))
def test_every_message_to_agent_0_comes_out_as_it_went_in(message: Any) -> None:
    assert same(wire_format.decode(wire_format.encode(message), w.ToAgent0), message)


@given(st.one_of(*map(built, get_args(w.FromAgent0))))
def test_every_message_from_agent_0_comes_out_as_it_went_in(message: Any) -> None:
    assert same(wire_format.decode(wire_format.encode(message), w.FromAgent0), message)


@pytest.mark.parametrize("kind", BY_HAND, ids=lambda kind: kind.__name__)
def test_each_field_that_may_be_left_out_is_drawn(kind: type) -> None:
    for each in dataclasses.fields(kind):
        if each.default is not dataclasses.MISSING:
            find(
                BY_HAND[kind],
                lambda message, each=each: getattr(message, each.name) != each.default,
                settings=settings(phases=[Phase.generate]),  # whichever: a small one takes minutes
            )


def test_all_that_workers_and_their_supervisor_say_crosses() -> None:
    for wire, union in ((w.FromMember, m.WorkerToSupervisor), (w.ToMember, m.SupervisorToWorker)):
        assert set(get_args(get_type_hints(wire)["message"])) == set(get_args(union))


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.__name__)
def test_every_kind_of_event_crosses(kind: type[ev.Event]) -> None:
    @settings(max_examples=10)
    @given(st.data())
    def tried(data: st.DataObject) -> None:
        table = {
            name: data.draw(of_field(each.type)) for each in msgspec.structs.fields(kind) if (name := each.encode_name)
        }
        event = kind(**table)
        found = wire_format.decode(wire_format.encode(w.FromMember(Member(1, 0), m.Events([event]))), w.ToAgent0)
        assert same(found.message.events[0], event)

    tried()


def test_memory_stays_on_its_host_and_numbers_of_numpy_become_pythons() -> None:
    ready = m.Ready({"version": np.int64(3), "x": np.float64(0.5), "y": np.float32(0.25)}, {"w": Region((2,), "uint8")})
    found = wire_format.decode(wire_format.encode(w.FromMember(Member(1, 0), ready)), w.ToAgent0)
    assert same(found.message, m.Ready({"version": 3, "x": 0.5, "y": 0.25}, {}))
    with pytest.raises(TypeError, match="a PosixPath cannot be sent"):
        wire_format.encode(m.Finished({"path": Path("x")}))


def test_a_detail_crosses_without_its_beginning_and_what_is_too_long_does_not() -> None:
    failed = wire_format.decode(
        wire_format.encode(m.Failed("WorkerError", "it raised", "x" * (1 << 20) + "end")), w.FromAgent0
    )
    assert len(failed.detail) == wire_format.DETAIL_CHARACTERS
    assert failed.detail.endswith("end")
    raised = w.FromMember(Member(1, 1), m.Failed("WorkerError", "it raised", "x" * wire_format.MESSAGE_BYTES))
    assert len(wire_format.encode(raised)) < wire_format.DETAIL_CHARACTERS + 200
    with pytest.raises(w.WireError, match=r"a Finished of 16,777,\d+ bytes"):
        wire_format.encode(m.Finished({"x": bytes(wire_format.MESSAGE_BYTES)}))


MEMBER = ["Member", *[0 for _ in dataclasses.fields(Member)]]
WARNED = ["WarnedEvent", {"t_s": 0.0, "clock": "wall", "why": "x"}]
BAD: dict[str, tuple[Any, str]] = {
    "no array": ({"Beat": 1}, "no message"),
    "an empty one": ([], "no message"),
    "a number for a name": ([7], "no message"),
    "an unknown kind": (["Exec", "rm"], "an unknown kind, 'Exec'"),
    "a kind of the other direction": (["Welcome", None, 0.0, ""], "an unknown kind, 'Welcome'"),
    "a kind that only Python knows": (["Request"], "an unknown kind"),
    "a field too many": (["Beat", 1, 0.5, 0.0, 0.0, 9, 9, 9], "a Beat has 6 fields, not 7"),
    "a field too few": (["Beat", 1, 0.5], "a Beat has 6 fields, not 2"),
    "a wrong type": (["Beat", "1", 0.5, 0.0, 0.0, 0, 0], "Expected `int`, got `str`"),
    "a count below 0": (["Beat", -1, 0.5, 0.0, 0.0, 0, 0], "`int` >= 0"),
    "too long a name": (["LogPart", "x" * 256, b""], "length <= 255"),
    "too long a log": (["LogPart", "x", bytes(w.LOG_BYTES + 1)], "length <= 65536"),
    "too long a list": (["FromMember", MEMBER, ["Events", [WARNED] * (w.LONGEST + 1)]], "a list of at most 65,536"),
    **{
        f"a log of the name {name!r}": (["LogPart", name, b""], "regex")
        for name in ("", ".", "..", "../x", "a/../../x", "/etc/passwd", "a/b", "a\n", "a\0")
    },
    "no member": (["FromMember", ["StopRun"], ["Sync"]], "an unknown kind, 'StopRun'"),
    "memory": (["FromMember", MEMBER, ["Ready", {}, {"w": 1}, []]], "length <= 0"),
    "an unknown event": (["FromMember", MEMBER, ["Events", [["Event", {}]]]], "no event that is known"),
    "an event with an unknown field": (
        ["FromMember", MEMBER, ["Events", [["WarnedEvent", {"why": "x", "evil": 1}]]]],
        "an unknown field, 'evil'",
    ),
    "an event with a wrong type": (["FromMember", MEMBER, ["Events", [["WarnedEvent", {"why": 1}]]]], "`str`, got"),
    "an event without a field": (["FromMember", MEMBER, ["Events", [["WarnedEvent", {}]]]], "missing required field"),
    "a value of an unknown type": (["LogPart", msgspec.msgpack.Ext(9, b"x"), b""], "unknown type"),
    "a number without end": (["Beat", msgspec.msgpack.Ext(2, b"9" * 2000), 0.0, 0.0, 0.0, 0, 0], "unknown type"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_breaks_its_schema_is_refused(name: str) -> None:
    value, why = BAD[name]
    with pytest.raises(w.WireError, match=why):
        wire_format.decode(msgspec.msgpack.encode(value), w.ToAgent0)


def test_nesting_without_end_is_refused() -> None:
    with pytest.raises(w.WireError):
        wire_format.decode(b"\x91" * 1_000_000, w.ToAgent0)
    deep = b"\x90"
    for _ in range(3000):
        deep = msgspec.msgpack.encode([msgspec.msgpack.Ext(1, deep)])
    with pytest.raises(w.WireError):
        wire_format.decode(deep, w.ToAgent0)


@given(st.binary(max_size=200))
def test_no_bytes_do_more_than_be_refused(content: bytes) -> None:
    with pytest.raises(w.WireError):
        wire_format.decode(content, w.ToAgent0)


@given(st.one_of(*map(built, get_args(w.ToAgent0))).map(wire_format.encode), st.data())
def test_a_message_with_a_byte_changed_is_refused_or_another_message(content: bytes, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(content) - 1))
    changed = content[:at] + bytes([data.draw(st.integers(0, 255))]) + content[at + 1 :]
    try:
        found = wire_format.decode(changed, w.ToAgent0)
    except w.WireError:
        return
    assert isinstance(found, get_args(w.ToAgent0))


@pytest.mark.parametrize("module", ["wire_format", "link", "place", "meeting"])
def test_nothing_that_arrives_is_unpickled(module: str) -> None:
    text = (Path(w.__file__).parent / f"{module}.py").read_text()
    assert "import pickle" not in text
    assert "pickling" not in text
    assert "torch.load" not in text


@pytest.mark.processes
def test_the_link_and_its_messages_need_no_torch() -> None:
    code = "import sys, instep.team.link, instep.team.meeting; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=LONG_S)
