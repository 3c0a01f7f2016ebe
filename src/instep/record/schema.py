"""What the structures of `instep.record.event_kinds` say: to a reader, which checks it, and to a person. No torch.

``python -m instep.record.schema`` prints the table of events that docs/record.md holds.
"""

from __future__ import annotations

from functools import cache

from msgspec import inspect

from instep.record import shapes
from instep.record.event_kinds import TYPES
from instep.record.events import Event, MergedContribution


@cache
def by_kind() -> dict[str, shapes.Table]:
    """What the fields of each kind of event must be, where they are there."""
    found: dict[str, dict[str, shapes.Shape]] = {}
    for structure in TYPES:
        found.setdefault(structure.kind, {}).update({each.name: _shape(each.type) for each in _fields(structure)})
    return {kind: shapes.Table({**fields, "kind": shapes.TEXT}) for kind, fields in found.items()}


@cache
def any_event() -> shapes.Table:
    """What every event must be, of unknown kinds too."""
    return shapes.Table({**{each.name: _shape(each.type) for each in _fields(Event)}, "kind": shapes.TEXT})


def _fields(structure: type[Event | MergedContribution]) -> tuple[inspect.Field, ...]:
    found = inspect.type_info(structure)
    assert isinstance(found, inspect.StructType)
    return found.fields


def _shape(found: inspect.Type) -> shapes.Shape:
    match found:
        case inspect.Metadata(extra={"has": wanted}):
            return _shape(inspect.type_info(wanted))
        case inspect.Metadata():
            return _shape(found.type)
        case inspect.IntType():
            return shapes.whole(found.ge or 0, shapes.LARGEST if found.le is None else found.le)
        case inspect.ListType():
            return shapes.SPAN if found.max_length == 2 else shapes.Each(_shape(found.item_type))
        case inspect.DictType(value_type=inspect.AnyType()):
            return shapes.ANY_TABLE
        case inspect.DictType():
            return shapes.All(_shape(found.value_type))
        case inspect.UnionType():  # with null
            return shapes.Maybe(_shape(found.types[0]))
        case inspect.LiteralType():
            return shapes.one_of(*map(str, found.values))
        case inspect.TypedDictType() | inspect.StructType():
            return shapes.Table({each.name: _shape(each.type) for each in found.fields})
    return {inspect.FloatType: shapes.NUMBER, inspect.StrType: shapes.TEXT, inspect.BoolType: shapes.FLAG}[type(found)]


def documented() -> str:
    """The table of events, in Markdown."""
    rows = [("event", "field", "type", "meaning"), ("---",) * 4, ("*every one*", "", "", "")]
    rows += [("", *_row(each)) for each in _fields(Event)]
    for kind in dict.fromkeys(structure.kind for structure in TYPES):
        structures = [structure for structure in TYPES if structure.kind == kind]
        by = structures[0].by if len(structures) == 1 else ""
        sentence = (structures[0].__doc__ or "").partition("\n")[0]
        rows.append((f"`{kind}`", "", "", f"**{sentence}**{f' By: {by}.' if by else ''}"))
        for name in dict.fromkeys(name for structure in structures for name in structure.__struct_fields__[2:]):
            having = [structure for structure in structures if name in structure.__struct_fields__]
            found = [each for structure in having for each in _fields(structure) if each.name == name]
            lacking = [structure for structure in structures if structure not in having]
            by = f"by: {', '.join(each.by for each in having)}" if lacking else ""
            if 0 < len(lacking) < len(having):
                by = f"not by: {', '.join(each.by for each in lacking)}"
            rows.append(("", *_row(max(found, key=lambda each: not each.required), by)))
            if name == "contributions":
                rows += [("", *_row(each, within="… ")) for each in _fields(MergedContribution)]
    return "".join(f"| {' | '.join(row)} |\n".replace("|  |", "| |").replace("|  |", "| |") for row in rows)


def _row(each: inspect.Field, by: str = "", within: str = "") -> tuple[str, str, str]:
    """Field, type and meaning. `by`: who tells it."""
    told = each.type if isinstance(each.type, inspect.Metadata) else None
    meaning = (told.extra_json_schema or {}).get("description", "") if told else ""
    where = (told.extra or {}).get("where", "") if told else ""
    return f"`{within}{each.name}`", _named(each.type), "; ".join(filter(None, (meaning, where, by)))


def _named(found: inspect.Type) -> str:
    """A type in words."""
    match found:
        case inspect.Metadata(type=inner, extra={"unit": unit}):
            return f"{unit} or null" if isinstance(inner, inspect.UnionType) else str(unit)
        case inspect.Metadata(extra={"has": wanted}):
            return _named(inspect.type_info(wanted))
        case inspect.Metadata():
            return _named(found.type)
        case inspect.UnionType():
            return f"{_named(found.types[0])} or null"
        case inspect.ListType():
            return "[start, stop]" if found.max_length == 2 else f"list of {_named(found.item_type).removesuffix('s')}s"
        case inspect.DictType() if not isinstance(found.value_type, inspect.AnyType):
            return f"table of {_named(found.value_type).replace('number', 'numbers')}"
        case inspect.LiteralType():
            return " or ".join(f"`{value}`" for value in found.values)
    return _NAMES.get(type(found), "table")


_NAMES = {
    inspect.IntType: "whole number", inspect.FloatType: "number", inspect.StrType: "text", inspect.BoolType: "flag",
}  # fmt: skip


if __name__ == "__main__":
    print(documented(), end="")
