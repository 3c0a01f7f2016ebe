"""What the processes of a team must have in common before they begin."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from instep.sources import first_difference


def difference(
    own: Mapping[str, Any], leads: Mapping[str, Any], who: str, leader: str, names: Collection[str] | None = None
) -> str:
    """A sentence on what `who` starts from and the leader does not, of these `names` or all; "" if there is nothing.

    own, leads: the facts of both.
    """
    if file := first_difference(leads.get("sources", {}), own.get("sources", {})):
        return (
            f"{who} has another {file} than {leader}, and the result would be that of neither; give all hosts the "
            f"same files, and read from the environment what is to differ."
        )
    for name, value in leads.items():
        if name in own and name != "sources" and own[name] != value and (names is None or name in names):
            samples = ", and each sample on its index besides" if name == "data" else ""
            files = "; all hosts need the same files" if "sources" in leads else ""
            return (
                f"{who} starts from other {name} than {leader} ({own[name]} instead of {value}); what builds them "
                f"must depend on its arguments and the seed alone{samples}{files}."
            )
    return ""
