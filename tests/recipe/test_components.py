from __future__ import annotations

import functools
import os
import pickle
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st

from instep.components import Component, address_of, import_object
from instep.errors import ComponentError
from instep.tables import to_table

pytestmark = pytest.mark.pure


class Model:
    def __init__(self, width: int = 1, *, depth: int = 2, extra: Any = None) -> None:
        self.width, self.depth, self.extra = width, depth, extra

    @classmethod
    def small(cls) -> Model:
        return cls(3)


HERE = __name__


def test_an_address_and_its_object_are_one_component() -> None:
    by_address = Component(f"{HERE}:Model", {"width": 3})
    assert Component(Model, {"width": 3}) == by_address
    assert Component(functools.partial(Model, width=3)) == by_address
    assert Component.of({"use": f"{HERE}:Model", "args": {"width": 3}}) == by_address
    assert by_address.load() is Model
    assert by_address.build().width == 3


def test_a_partial_with_positional_arguments_stays_as_it_is() -> None:
    component = Component(functools.partial(Model, 5))
    assert component.address is None
    assert component.build().width == 5


def test_args_over_those_of_a_partial() -> None:
    assert dict(Component(functools.partial(Model, width=3, depth=1), {"width": 4}).args) == {"width": 4, "depth": 1}


def test_objects_without_an_address() -> None:
    def closure() -> int:
        return 7

    assert address_of(closure) is None
    assert address_of(lambda: 0) is None
    assert address_of(Model()) is None
    assert Component(closure).describe() == f"<{HERE}.test_objects_without_an_address.<locals>.closure>"
    assert Component(Model()).describe() == f"<{HERE}.Model object>"
    assert Component(closure).build() == 7


def test_an_object_that_hides_behind_its_name_has_no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Model
    monkeypatch.setitem(globals(), "Model", object)  # a wrapper took its name
    assert address_of(original) is None


def test_a_component_can_be_pickled() -> None:
    component = Component(Model, {"width": 3})
    assert pickle.loads(pickle.dumps(component)) == component


def test_args_are_a_copy() -> None:
    args = {"width": 3}
    component = Component(Model, args)
    args["width"] = 4
    assert component.args["width"] == 3


@pytest.mark.parametrize("address", ["model", "a:", ":b", "a b:c", "a:b c", "a..b:c", "a:b.", "a/b:c", "", "a:b:c"])
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(ComponentError, match=r"is not an address; write it as 'package.module:name'"):
        Component(address)


def test_the_description_of_an_object_is_no_address() -> None:
    with pytest.raises(ComponentError, match=r"<m.f> stands for an object of another program; give the object itself"):
        Component("<m.f>")


@pytest.mark.parametrize("value", [5, 0.5, True, None])
def test_plain_values_are_refused(value: Any) -> None:
    with pytest.raises(ComponentError, match=r"cannot be a component; give an object, or 'package.module:name'"):
        Component.of(value)
    with pytest.raises(ComponentError, match=r"cannot be a component"):
        Component.of({"use": value})


def test_a_table_without_use() -> None:
    with pytest.raises(ComponentError, match=r"has no key 'use'; write a component as {use = "):
        Component.of({"args": {"width": 3}})


def test_arguments_beside_use() -> None:
    with pytest.raises(ComponentError, match=r"unknown key 'width' beside 'use'.*: put arguments .* into 'args'"):
        Component.of({"use": f"{HERE}:Model", "width": 3})


def test_args_that_are_no_table() -> None:
    with pytest.raises(ComponentError, match=r"'args' of 'a:b' is 3; it must be a table"):
        Component.of({"use": "a:b", "args": 3})


def test_an_unknown_module() -> None:
    with pytest.raises(
        ComponentError, match=r"cannot import 'no_such_module' for 'no_such_module:Net' .*; check the sp"
    ):
        Component("no_such_module:Net").load()


def test_an_unknown_name() -> None:
    with pytest.raises(ComponentError, match=f"'{HERE}' has no 'Modle' .*; did you mean 'Model'\\?$"):
        import_object(f"{HERE}:Modle")
    with pytest.raises(ComponentError, match=f"'{HERE}' has no 'zzzzzz' .*\\.$"):
        import_object(f"{HERE}:zzzzzz")


@pytest.mark.parametrize("code", ["1 / 0", "def broken(:", "import no_such_dependency"])
def test_a_module_that_fails_while_it_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    name = f"failing_{abs(hash(code))}"
    (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ComponentError) as caught:
        import_object(f"{name}:Net")
    assert name in caught.value.message
    assert "\n" not in caught.value.message
    if "import" not in code:
        assert "mend that module" in caught.value.message
        assert "Traceback" in caught.value.detail


def test_a_name_with_dots() -> None:
    assert import_object(f"{HERE}:Model.small")().width == 3


def test_arguments_that_do_not_fit() -> None:
    with pytest.raises(
        ComponentError, match=f"{HERE}:Model does not take .*'widht'; did you mean 'width' instead of 'wi"
    ):
        Component(Model, {"widht": 3}).build()
    with pytest.raises(ComponentError, match=r"'x'; it takes width, depth, extra\.$"):
        Component(Model, {"x": 3}).build()
    with pytest.raises(ComponentError, match=r"missing a required argument: 'a'; it takes a\.$"):
        Component(lambda a, *rest, **more: a).build()


def test_an_error_of_the_callable_itself_is_not_hidden() -> None:
    def broken(width: int) -> None:
        raise TypeError("mine")

    with pytest.raises(TypeError, match=r"^mine$"):
        Component(broken, {"width": 1}).build()


def test_positional_arguments_come_first() -> None:
    assert Component(Model, {"depth": 3}).build(9).width == 9


def test_what_cannot_be_called() -> None:
    with pytest.raises(ComponentError, match=r"is a Model, which cannot be called"):
        Component(Model()).build()


# Arguments that are objects themselves


def test_a_callable_among_the_arguments() -> None:
    component = Component(Model, {"extra": {"use": f"{HERE}:Model"}})
    assert component.build().extra is Model
    bound = Component(Model, {"extra": [{"use": f"{HERE}:Model", "args": {"width": 4}}]}).build().extra[0]
    assert isinstance(bound, functools.partial)
    assert bound().width == 4
    assert Component(Model, {"extra": Component(Model)}).build().extra is Model


@pytest.mark.parametrize("value", [{"use": "text"}, {"use": "a:b", "more": 1}, {"use": 3}, "a:b", "<pad>"])
def test_arguments_that_only_resemble_one(value: Any) -> None:
    assert Component(Model, {"extra": value}).build().extra == value


def test_an_argument_of_another_program() -> None:
    with pytest.raises(ComponentError, match=r"<m.f> stands for an object of another program"):
        Component(Model, {"extra": {"use": "<m.f>"}}).build()


def saved(component: Component) -> Component:
    """The component after a way through TOML."""
    from instep.recipe import Recipe

    table = to_table(Recipe(model=component, objective="a:b", data="a:b"))
    return Component.of(tomllib.loads(tomli_w.dumps(table))["model"])


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"]))
    | st.just(Model),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abcdef-. ü", max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(PLAIN)
def test_arguments_survive_toml(value: Any) -> None:
    component = Component(Model, {"extra": value})
    again = saved(component)
    assert again.build().extra == value
    assert to_table_of(again) == to_table_of(component)


def to_table_of(component: Component) -> Any:
    from instep.tables import _component_table

    return _component_table(component)


@pytest.mark.parametrize(
    ("value", "read"),
    [
        ((0.9, 0.95), [0.9, 0.95]),
        (np.float32(0.5), 0.5),
        (np.int64(3), 3),
        (np.bool_(True), True),
        (Path("a/b"), os.path.join("a", "b")),
        (os.path.join, os.path.join),
    ],
)
def test_arguments_that_toml_has_no_type_for(value: Any, read: Any) -> None:
    found = saved(Component(Model, {"extra": value})).build().extra
    assert found == read
    assert type(found) is type(read)


def test_an_argument_without_an_address_is_described() -> None:
    table = to_table_of(Component(Model, {"extra": lambda: 0}))
    assert table["args"]["extra"]["use"].startswith(f"<{HERE}.")


def test_partials_with_other_arguments_are_told_apart() -> None:
    one, two = (to_table_of(Component(Model, {"extra": functools.partial(Model, width=w)})) for w in (1, 2))
    assert one != two


def test_none_is_not_the_default() -> None:
    assert to_table_of(Component(Model, {"width": None})) != to_table_of(Component(Model))
