"""How messages between hosts are written: every one is decoded by its schema. No torch, and nothing is unpickled.

A message is an array in msgpack, of its name and its fields in order. A name or a field too many or too few, a wrong
type or what is longer than its limit is refused. What was sent comes out as it went in: numbers bit for bit, tuples as
tuples.
"""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from functools import cache
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import msgspec
from msgspec import UNSET, Meta
from msgspec.msgpack import Ext

from instep.record.event_kinds import TYPES
from instep.record.events import Event, MergedContribution
from instep.record.result import Costs
from instep.team import messages as m
from instep.team.messages import Failed
from instep.team.wire_messages import (
    LONGEST,
    Count,
    FromMember,
    MemberLost,
    Name,
    Names,
    NotComing,
    Table,
    WireError,
)


class TooLong(WireError):
    """A message has more bytes than can be sent at once."""


MESSAGE_BYTES = 16 << 20
"""Bytes of a message at most."""

DETAIL_CHARACTERS = 1 << 18
"""Of a detail, at the end, what crosses at most."""

_NONE = Annotated[Mapping[str, Any], Meta(max_length=0)]
_NO_FILES = Annotated[tuple[str, ...], Meta(max_length=0)]

_FIELDS: Mapping[type, tuple[Any, ...]] = {
    m.Events: (tuple[Event, ...],),
    m.Failed: (Name, str, str),
    m.Finished: (Table,),
    m.Ready: (Table, _NONE, _NO_FILES),
    m.Agreed: (Table, _NONE),
    m.Digest: (Count, Name),
    m.FoundWritten: (Names, str),
    m.FoundWrong: (Count, Count, Count, Count, Count, Name),
    m.StoppedAt: (Count,),
    m.Ended: (Table, Name, bool, Table, Costs | None, Count),
    m.Left: (Count, str),
}
"""Types of the fields of messages that cross between processes of one host too."""

_EVENTS: Mapping[str, type[Event]] = {each.__name__: each for each in TYPES}


@cache
def _fields_of(kind: type) -> tuple[Any, ...]:
    if (found := _FIELDS.get(kind)) is not None:
        return found
    hints = get_type_hints(kind, include_extras=True)
    return tuple(hints[each.name] for each in fields(kind))


def encode(message: Any) -> bytes:
    """The bytes of a message. Raises TypeError where a value is none that crosses, TooLong where it is."""
    content = msgspec.msgpack.encode(_plain(_cut(message)))
    if len(content) > MESSAGE_BYTES:
        raise TooLong(f"a {type(message).__name__} of {len(content):,} bytes; at most {MESSAGE_BYTES:,} can be sent")
    return content


def _cut(message: Any) -> Any:
    """The message with the end of a detail that is too long to cross."""
    if isinstance(message, FromMember) and isinstance(message.message, Failed):
        return replace(message, message=_cut(message.message))
    if isinstance(message, Failed | MemberLost | NotComing) and len(message.detail) > DETAIL_CHARACTERS:
        return replace(message, detail=message.detail[-DETAIL_CHARACTERS:])
    return message


def decode(content: bytes, union: Any) -> Any:
    """The message, one of `union`. Raises WireError where it is none, or breaks its schema."""
    try:
        return _of(union, _DECODER.decode(content))
    except (msgspec.MsgspecError, TypeError, ValueError, RecursionError) as error:
        raise WireError(f"a message was not understood: {error}") from error


# --------------------------------------------------------------------------------------------------------- encoding

_TUPLE, _INTEGER = 1, 2


def _plain(value: Any) -> Any:
    """What msgpack has for it: a message is an array of its name and fields, an event of its name and its table."""
    kind = type(value)
    if value is None or kind in (bool, float, str, bytes):
        return value
    if kind is int:
        return value if -(1 << 63) <= value < 1 << 64 else Ext(_INTEGER, str(value).encode())
    if kind is list:
        return [_plain(each) for each in value]
    if kind is tuple:
        return Ext(_TUPLE, msgspec.msgpack.encode([_plain(each) for each in value]))
    if isinstance(value, Event | MergedContribution):
        table = {name: getattr(value, name) for name in value.__struct_fields__}
        return [kind.__name__, {name: _plain(each) for name, each in table.items() if each is not UNSET}]
    if isinstance(value, m.Ready):
        value = replace(value, memory={}, files=())  # which are its host's
    if isinstance(value, m.Agreed):
        value = replace(value, memory={})
    if is_dataclass(kind):
        return [kind.__name__, *(_plain(getattr(value, each.name)) for each in fields(kind))]
    if isinstance(value, Mapping):
        return {_key(name): _plain(each) for name, each in value.items()}
    for plain in (int, float, str):  # a subclass, such as an enumeration or a float of numpy
        if isinstance(value, plain):
            return _plain(plain(value))
    if getattr(value, "shape", None) == () and hasattr(value, "item"):  # another number of numpy
        return _plain(value.item())
    raise TypeError(f"a {kind.__name__} cannot be sent to another host")


def _key(name: Any) -> Any:
    if isinstance(name, str | int):
        return _plain(name)
    raise TypeError(f"a {type(name).__name__} cannot be a key in what is sent to another host")


def _hook(code: int, content: memoryview) -> Any:
    if code == _TUPLE:
        found = _DECODER.decode(content)
        if isinstance(found, list):
            return tuple(found)
    if code == _INTEGER and len(content) <= 1000:
        return int(bytes(content))
    raise ValueError("a value of an unknown type")


_DECODER: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(ext_hook=_hook)

# --------------------------------------------------------------------------------------------------------- decoding


def _of(wanted: Any, value: Any) -> Any:
    """`value` as this type, which may be a message, an event, several of them, or what msgspec knows."""
    origin, arguments = get_origin(wanted), get_args(wanted)
    if wanted is Event:
        return _event(value)
    if isinstance(wanted, type) and is_dataclass(wanted):
        return _message({wanted.__name__: wanted}, value)
    if origin in (Union, types.UnionType) and (kinds := _dataclasses(arguments)):
        return None if value is None and type(None) in arguments else _message(kinds, value)
    if origin is tuple and (arguments[0] is Event or is_dataclass(arguments[0])):
        if not isinstance(value, list | tuple) or len(value) > LONGEST:
            raise ValueError(f"a list of at most {LONGEST:,} was expected")
        return type(value)(_of(arguments[0], each) for each in value)
    msgspec.convert(value, wanted)
    return value


def _dataclasses(union: Sequence[Any]) -> dict[str, type]:
    return {each.__name__: each for each in union if isinstance(each, type) and is_dataclass(each)}


def _message(kinds: Mapping[str, type], value: Any) -> Any:
    if not isinstance(value, list) or not value or not isinstance(value[0], str):
        raise ValueError("no message")
    kind = kinds.get(value[0])
    if kind is None:
        raise ValueError(f"a message of an unknown kind, {value[0][:40]!r}")
    wanted = _fields_of(kind)
    if len(value) - 1 != len(wanted):
        raise ValueError(f"a {kind.__name__} has {len(wanted)} fields, not {len(value) - 1}")
    given = (_of(each, given) for each, given in zip(wanted, value[1:], strict=True))
    return kind(**dict(zip((each.name for each in fields(kind)), given, strict=True)))


def _event(value: Any) -> Event:
    """What was sent of it, held to its fields' types."""
    kind, table = _structure(_EVENTS, value)
    found: Event
    if "contributions" in table:
        parts = [_structure({"MergedContribution": MergedContribution}, each)[1] for each in table["contributions"]]
        msgspec.convert({**table, "contributions": parts}, kind)
        found = kind(**{**table, "contributions": [MergedContribution(**each) for each in parts]})
    else:
        msgspec.convert(table, kind)
        found = kind(**table)
    return found


def _structure(kinds: Mapping[str, type[Any]], value: Any) -> tuple[type[Any], dict[str, Any]]:
    match value:
        case [str(name), dict(table)] if name in kinds:
            kind = kinds[name]
            if unknown := table.keys() - set(kind.__struct_fields__):
                raise ValueError(f"a {name} with an unknown field, {str(min(unknown, key=str))[:40]!r}")
            return kind, table
    raise ValueError("no event that is known")
