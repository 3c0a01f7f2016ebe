"""Flags with dots: ``--recipe.schedule.kind wsd`` sets any field of a recipe or team."""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from instep.by_pattern import ByPattern
from instep.components import Component
from instep.differences import flat
from instep.errors import InstepError, RecipeError, cut, shown
from instep.recipe import Recipe, Team, parse
from instep.recipe_files import path_of, read
from instep.rules import UpdateRule
from instep.turns import Turns

Settings = Sequence[tuple[str, str]]
"""Names of fields, such as ``recipe.schedule.kind``, each with the text of its value."""


SEVERAL_BY_FLAG = (
    "of several optimizers, change the tables in the recipe's file, or scale all learning rates by "
    "--recipe.schedule.scale, which alone may change on a resume."
)
"""What helps where a flag is to set a part of one of several optimizers."""

_PATTERNS = ("recipe.buffers.", "recipe.freeze.")
"""What follows one of them is one name, whose dots are its own."""


class UsageError(InstepError):
    """The command line is wrong."""

    exit_status = 2


def refuse(settings: Settings) -> None:
    """Raises UsageError where there are any: the command takes none."""
    if settings:
        raise UsageError(f"--{cut(settings[0][0])} goes with 'instep train' only.")


def check_new_file(path: Path, flag: str) -> None:
    """Raises UsageError where no file can be written that `flag` names: not after the work."""
    if len(os.fsencode(path.name)) > 255:
        raise UsageError(f"{flag} {shown(str(path))} is longer than names of files are; choose a shorter one.")
    if not path.absolute().parent.is_dir():
        raise UsageError(
            f"{flag} {shown(str(path))} lies in a folder that is not there; make it, or name another file."
        )


def split(argv: Sequence[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """Parts `argv` into the flags with dots, as (name, text of the value), and the rest. Raises UsageError."""
    settings: dict[str, str] = {}
    rest: list[str] = []
    tokens = iter(argv)
    for token in tokens:
        name, equals, value = token.partition("=")
        if token == "--":
            rest += [token, *tokens]
        elif not (name.startswith("--") and "." in name):
            rest.append(token)
        else:
            text = value if equals else next(tokens, None)
            if text is None or (not equals and text.startswith("--")):
                raise UsageError(f"{cut(name)} needs a value, as in {cut(name)}=VALUE.")
            if name[2:] in settings:
                raise UsageError(f"{cut(name)} is given twice; give it once.")
            settings[name[2:]] = text
    return list(settings.items()), rest


def merge(table: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """Sets each of `settings` in `table`, laid out like a recipe file; gives the same table.

    Raises UsageError for a name that no field has, and RecipeError where the table has no room for it.
    """
    settings = [(f"recipe.{name}" if name.startswith("rule.") else name, text) for name, text in settings]
    if "team.workers" in dict(settings):  # a number, which a recipe's bounds are not to outlast
        if "team.bounds" in dict(settings):
            raise UsageError("--team.workers and --team.bounds both say how many workers there are; give one of them.")
        _room(table, "team", "team").pop("bounds", None)
    ordered = sorted(settings, key=lambda setting: setting[0].count("."))  # a whole before its parts
    patterns = [setting for setting in settings if setting[0].startswith(_PATTERNS)]
    # Of patterns the first that matches decides: each goes before those that are there, the last of all first.
    for name, text in [*(setting for setting in ordered if setting not in patterns), *reversed(patterns)]:
        side, *parts = name.split(".")
        if side == "recipe":
            _set(Recipe, table, parts, text, name)
        elif side == "team":
            _set(Team, _room(table, "team", "team"), parts, text, name)
        else:
            raise _unknown(name)
    return table


def with_short(settings: Settings, short: Iterable[tuple[str, str, object]]) -> Settings:
    """`settings` and the short flags that were given: (flag, the name with dots that it stands for, value)."""
    given = [(name, dotted, str(value)) for name, dotted, value in short if value is not None]
    given = [(name, "team.bounds" if _are_bounds(dotted, value) else dotted, value) for name, dotted, value in given]
    for name, dotted, _ in given:
        if dotted in dict(settings):
            raise UsageError(f"--{name} and --{dotted} set the same field; give one of them.")
    return [*settings, *((dotted, value) for _, dotted, value in given)]


def _are_bounds(name: str, text: str) -> bool:
    """Whether the number of workers is given as "2..8"."""
    return name == "team.workers" and ".." in text


def _set(cls: type, table: dict[str, Any], parts: list[str], text: str, name: str) -> None:
    key, rest = parts[0].replace("-", "_"), parts[1:]
    hints = get_type_hints(cls)
    if key not in hints:
        raise _unknown(name)
    hint = hints[key]
    where = name.removesuffix("." + ".".join(rest)) if rest else name
    if not rest:
        value = _value(text, hint)
        table.pop(key, None) if value is None else table.update({key: value})
    elif hint in (Component, ByPattern, Turns) or Component in get_args(hint):
        table[key] = _component_table(cls, key, table.get(key))
        _set(Component, _room(table, key, where), rest, text, name)
    elif name.startswith(_PATTERNS):
        given = flat(_room(table, key, where))
        pattern = ".".join(rest)
        table[key] = {pattern: toml_value(text), **{other: mode for other, mode in given.items() if other != pattern}}
    elif hint is UpdateRule and isinstance(table.get(key), str) and len(rest) == 1:
        table[key] += f",{rest[0].replace('-', '_')}={text}"  # of the rule that it tells
    elif (inside := _inside(hint)) is not None:
        _set(inside, _room(table, key, where), rest, text, name)
    elif get_origin(hint) is Mapping and all(rest):
        inner = _room(table, key, where)
        for part in rest[:-1]:
            where = f"{where}.{part}"
            inner = _room(inner, part, where)
        inner[rest[-1]] = toml_value(text)
    else:
        raise _unknown(name)


def _inside(hint: Any) -> type | None:
    """What a field of this type has its table of, if it has one; an optional one too."""
    hints = get_args(hint) if type(None) in get_args(hint) else (hint,)
    return next((each for each in hints if hasattr(each, "__dataclass_fields__")), None)


def _room(table: dict[str, Any], key: str, where: str) -> dict[str, Any]:
    inner = table.setdefault(key, {})
    if isinstance(inner, list):
        remedy = SEVERAL_BY_FLAG if key == "optimizer" else "change the tables in the recipe's file."
        raise RecipeError(
            f"'{where}' is a list of {len(inner)} tables, and a part of it cannot be set by a flag; {remedy}"
        )
    if not isinstance(inner, dict):
        raise RecipeError(f"'{where}' is {shown(inner)}, and a part of it cannot be set; it must be a table.")
    return inner


def _component_table(cls: type, key: str, value: Any) -> Any:
    """A component of the file as a table that flags can change: an address alone, or left out, gets its table."""
    if isinstance(value, str):
        return {"use": value}
    factory = cls.__dataclass_fields__[key].default_factory  # type: ignore[attr-defined]
    if value is None and callable(factory):
        default = factory()
        return {"use": default.describe(), "args": dict(default.args)}
    return {} if value is None else value


def _value(text: str, hint: Any) -> Any:
    """The text of a flag as a value for a field of the type `hint`; None takes an optional field away."""
    if type(None) in get_args(hint) and text == "none":
        return None
    value = toml_value(text)
    return text if hint is str and not isinstance(value, str) else value


def toml_value(text: str) -> Any:
    """`text` as the TOML value it is, or else as it stands; ``.5``, ``5.``, ``True`` and ``False`` are read too."""
    if text in ("True", "False"):
        return text == "True"
    if re.fullmatch(r"[+-]?(\d+\.|\.\d+)([eE][+-]?\d+)?", text):
        return float(text)
    try:
        table = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):  # no TOML, a number of too many digits, or brackets too deep
        return text
    value = table.pop("value")
    return value if not table and isinstance(value, (bool, int, float, str, list, dict)) else text


def whole_number(text: str, flag: str) -> int:
    """The value of a flag that counts something, read as in TOML. Raises UsageError."""
    value = toml_value(text)
    if type(value) is not int:
        raise UsageError(f"{flag} is {shown(value)}, of type {type(value).__name__}; it must be a whole number.")
    return value


def share(text: str, flag: str) -> float:
    """The value of a flag that is a number. Raises UsageError."""
    value = toml_value(text)
    if type(value) not in (int, float):
        raise UsageError(f"{flag} is {shown(value)}; it must be a number.")
    return float(value)


def unknown_flag(token: str, flags: Sequence[str], command: str) -> UsageError:
    """The error for a flag without dots that is none of `flags`, those of the command."""
    flag = token.partition("=")[0]
    ends: dict[str, str] = {}
    if command == "train":  # which takes any field by its whole name
        ends = {known.rpartition(".")[2]: f"--{known}" for known in _names()}
    name = flag.lstrip("-").replace("-", "_")
    near = [
        ends.get(name),
        _MEANT.get(name) if command in ("train", "simulate") else None,
        *difflib.get_close_matches(flag, flags, 1),
    ]
    near += [ends[end] for end in difflib.get_close_matches(name, list(ends), 1)]
    return UsageError(f"there is no flag {cut(flag)}; {_hint(next(filter(None, near), ''), command)}")


def _unknown(name: str) -> UsageError:
    known = list(_names())
    parts = name.replace("-", "_").split(".")
    if parts[:2] == ["recipe", "optimizer"] and len(parts) > 2 and parts[2].isdecimal():
        return UsageError(f"there is no flag --{cut(name)}: {SEVERAL_BY_FLAG}")
    if len(parts) > 2 and ".".join([*parts[:2], "args"]) in known:
        near = ".".join([*parts[:2], "args", *parts[2:]])
    else:
        near = next(iter(difflib.get_close_matches(name.replace("-", "_"), known, 1)), "")
    if len(parts) == 2 and parts[1] in _MEANT:
        return UsageError(f"there is no flag --{cut(name)}; {_hint(_MEANT[parts[1]])}")
    return UsageError(f"there is no flag --{cut(name)}; {_hint(near and f'--{near}')}")


_MEANT = {
    "lr": "--recipe.optimizer.args.lr", "learning_rate": "--recipe.optimizer.args.lr",
    "weight_decay": "--recipe.optimizer.args.weight_decay", "betas": "--recipe.optimizer.args.betas",
    "momentum": "--recipe.optimizer.args.momentum", "batch_size": "--recipe.batch",
    "warmup": "--recipe.schedule.warmup_steps", "warmup_steps": "--recipe.schedule.warmup_steps",
    "max_steps": "--steps", "iterations": "--steps",
    "num_workers": "--workers", "nproc": "--workers", "nproc_per_node": "--workers", "world_size": "--workers",
    "output": "--out", "output_dir": "--out", "fp16": "--recipe.precision", "bf16": "--recipe.precision",
    "clip": "--recipe.clip_norm", "max_grad_norm": "--recipe.clip_norm",
    "gradient_accumulation_steps": "--recipe.microbatches", "accumulation": "--recipe.microbatches",
    "resume_from_checkpoint": "--resume",
}  # fmt: skip
"""Names that other programs have for what flags here set."""


def _hint(near: str, command: str = "train") -> str:
    return f"did you mean {near}?" if near else f"see 'instep {command} --help'."


def _names() -> Iterator[str]:
    """The names of all fields, with dots."""
    for side, cls in (("recipe", Recipe), ("team", Team)):
        for key, hint in get_type_hints(cls).items():
            yield f"{side}.{key}"
            one = Component if hint in (ByPattern, Turns) else _inside(hint)
            for part in getattr(one, "__dataclass_fields__", ()):
                yield f"{side}.{key}.{part}"


def parsed(given: str, settings: Settings) -> tuple[Recipe, Team]:
    """Recipe and team, with `settings`. Raises RecipeError and UsageError."""
    return parse(merge(read(given), settings))


def import_paths(given: str | None) -> tuple[str, ...]:
    """Where a recipe's modules are looked for: beside its file, and in the current folder."""
    folders = [Path.cwd()] if given is None else [path_of(given).resolve().parent, Path.cwd()]
    return tuple(dict.fromkeys(map(str, folders)))
