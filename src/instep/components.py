"""Components: the user's model, data set, objective and optimizer, named so that a TOML file can hold them."""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib
import inspect
import sys
import traceback
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, cast

from instep.errors import ComponentError, InstepError, cut, described, place, shown


@dataclass(frozen=True)
class Component:
    """A callable or object of the user's, with the keyword arguments it is called with.

    `use` is an address, ``"package.module:name"``, or any Python object. `args` are keyword arguments.
    A `functools.partial` without positional arguments is taken apart into these two, so
    ``partial(GPT, width=256)`` and ``Component("instep.models:GPT", {"width": 256})`` are the same component.

    Inside `args`, a component, or a table ``{"use": address}``, stands for the object at that address, not called;
    with ``"args"`` beside it, for that callable with these arguments bound, a `functools.partial`.
    """

    use: Any
    args: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.use, functools.partial) and not self.use.args:
            object.__setattr__(self, "args", {**self.use.keywords, **self.args})
            object.__setattr__(self, "use", self.use.func)
        if isinstance(self.use, str):
            _check_address(self.use)
        else:
            object.__setattr__(self, "use", address_of(self.use) or self.use)
        object.__setattr__(self, "args", MappingProxyType(dict(self.args)))

    def __reduce__(self) -> tuple[Any, ...]:
        return (Component, (self.use, dict(self.args)))  # a mappingproxy cannot be pickled

    @classmethod
    def of(cls, value: Any) -> Component:
        """`value` as a component: one already, a table ``{use, args}``, an address, or any object."""
        if isinstance(value, Component):
            return value
        if isinstance(value, Mapping) and "use" in value:
            unknown = sorted(set(value) - {"use", "args"})
            if unknown:
                raise ComponentError(
                    f"unknown key {shown(unknown[0])} beside 'use'; a component has 'use' and 'args': "
                    f"put arguments of the callable into 'args'."
                )
            args = value.get("args", {})
            if not isinstance(args, Mapping):
                raise ComponentError(
                    f"'args' of {shown(value['use'])} is {shown(args)}; it must be a table of keyword arguments."
                )
            return cls(_usable(value["use"]), args)
        if type(value) is dict:
            raise ComponentError(
                f"{shown(value)} has no key 'use'; write a component as "
                f"{{use = 'package.module:name', args = {{...}}}}."
            )
        return cls(_usable(value))

    @property
    def address(self) -> str | None:
        """``"package.module:name"``, or None for an object that no other process could import."""
        return self.use if isinstance(self.use, str) else None

    def describe(self) -> str:
        """The address, or a name in angle brackets for an object that has none."""
        return self.address or f"<{_name_of(self.use)}>"

    def load(self) -> Any:
        """The object itself, imported if need be. Raises ComponentError."""
        return import_object(self.use) if isinstance(self.use, str) else self.use

    def keywords(self) -> dict[str, Any]:
        """`args` as the callable gets them, with objects in place of what stands for them. Raises ComponentError."""
        return {key: _resolve(value) for key, value in self.args.items()}

    def build(self, *positional: Any) -> Any:
        """Calls the object with `positional` and `args`. Raises ComponentError where arguments don't fit."""
        target = self.load()
        if not callable(target):
            raise ComponentError(f"{self.describe()} is a {type(target).__name__}, which cannot be called.")
        args = self.keywords()
        try:
            signature = inspect.signature(target)
        except (TypeError, ValueError):  # some C callables have none
            return target(*positional, **args)
        try:
            signature.bind(*positional, **args)
        except TypeError as error:
            raise ComponentError(
                f"{self.describe()} does not take the arguments given to it: {cut(error)}{self._suggestion(signature)}"
            ) from None
        return target(*positional, **args)

    def built(self, *positional: Any) -> Any:
        """As `build`. Raises ComponentError where the user's code raises anything else than an InstepError."""
        try:
            return self.build(*positional)
        except InstepError:
            raise
        except Exception as error:
            about_arguments = isinstance(error, TypeError | ValueError | AssertionError)  # a sentence is enough
            raise ComponentError(
                f"{self.describe()} could not be built: {described(error)}{place(error)}.",
                detail="" if about_arguments else traceback.format_exc(),
            ) from error

    def _suggestion(self, signature: inspect.Signature) -> str:
        by_keyword = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        names = [name for name, parameter in signature.parameters.items() if parameter.kind in by_keyword]
        for key in self.args:
            close = difflib.get_close_matches(key, names, 1) if key not in names else []
            if close:
                return f"; did you mean {shown(close[0])} instead of {shown(key)}?"
        return f"; it takes {', '.join(names)}." if names else "; it takes none."


def import_object(address: str) -> Any:
    """Imports ``"package.module:name"``; `name` may have dots. Raises ComponentError."""
    module_name, _, path = address.partition(":")
    try:
        target: Any = importlib.import_module(module_name)
    except ImportError as error:
        raise ComponentError(
            f"cannot import {shown(module_name)} for {shown(address)} ({cut(error)}); "
            f"check the spelling, or start from the folder that holds the module."
        ) from error
    except Exception as error:  # the module's own code failed
        raise ComponentError(
            f"importing {shown(module_name)} for {shown(address)} raised {type(error).__name__} ({cut(error)}); mend "
            f"that module.",
            detail=traceback.format_exc(),
        ) from error
    for part in path.split("."):
        try:
            target = getattr(target, part)
        except AttributeError:
            close = difflib.get_close_matches(part, dir(target), 1)
            hint = f"; did you mean {shown(close[0])}?" if close else "."
            raise ComponentError(
                f"{shown(module_name)} has no {shown(path)} (asked for by {shown(address)}){hint}"
            ) from None
    return target


@contextlib.contextmanager
def importable(paths: Iterable[str]) -> Iterator[None]:
    """In the block, modules are also found in the folders `paths`, and there first."""
    before = list(sys.path)
    sys.path[:0] = paths
    try:
        yield
    finally:
        sys.path[:] = before


def address_of(value: Any) -> str | None:
    """The address under which `value` can be imported anywhere, or None (closures, instances, ``__main__``)."""
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if not isinstance(module, str) or not isinstance(name, str) or module == "__main__" or "<" in name:
        return None
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return f"{module}:{name}" if found is value else None


def _name_of(value: Any) -> str:
    name = getattr(value, "__qualname__", None)
    if name is None:
        return f"{type(value).__module__}.{type(value).__qualname__} object"
    return f"{cast(str, getattr(value, '__module__', '?'))}.{name}"


def _usable(value: Any) -> Any:
    if isinstance(value, (bool, int, float, types.NoneType)):
        raise ComponentError(f"{shown(value)} cannot be a component; give an object, or 'package.module:name'.")
    return value


def _resolve(value: Any) -> Any:
    """An argument as the callable gets it: what stands for an object, however deep, becomes that object."""
    if isinstance(value, Component):
        args = value.keywords()
        return functools.partial(value.load(), **args) if args else value.load()
    if type(value) is dict:
        use = value.get("use")
        if isinstance(use, str) and set(value) <= {"use", "args"} and (_is_address(use) or use.startswith("<")):
            return _resolve(Component.of(value))
        return {key: _resolve(item) for key, item in value.items()}
    if type(value) is list or type(value) is tuple:
        return type(value)(map(_resolve, value))
    return value


def _is_address(value: Any) -> bool:
    if not isinstance(value, str):
        return False
    module, colon, name = value.partition(":")
    return bool(colon) and all(part.isidentifier() for part in [*module.split("."), *name.split(".")])


def _check_address(address: str) -> None:
    if address.startswith("<"):
        raise ComponentError(f"{address} stands for an object of another program; give the object itself, in Python.")
    if not _is_address(address):
        raise ComponentError(f"{shown(address)} is not an address; write it as 'package.module:name'.")
