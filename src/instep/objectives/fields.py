"""The check that every objective of Instep's makes of its fields."""

from __future__ import annotations

import dataclasses
from typing import Any, get_type_hints

from instep.tables import coerce


def check_numbers(objective: Any) -> None:
    """Raises RecipeError where a field of the dataclass `objective` that is to be a number, or a flag, is none.

    A whole number is taken for any number. For `__post_init__`.
    """
    hints = get_type_hints(type(objective))
    for field in dataclasses.fields(objective):
        hint = hints[field.name]
        if hint in (int, float, bool):
            value = coerce(hint, getattr(objective, field.name), f"{type(objective).__name__}.{field.name}")
            object.__setattr__(objective, field.name, value)
