"""What is said of how two runs part, in a sentence. No torch."""

from __future__ import annotations

from instep.apart.found import Diffed
from instep.apart.levels import listed
from instep.apart.sides import Away, FoundAgain
from instep.equivalences.found import UNKNOWN
from instep.errors import cut

_KINDS = {
    "path": "The one goes another way than the other: {one} in A, and {other} in B.",
    "number": "A number of the operation is {one} in A and {other} in B.",
    "tensor": "The operation is given another tensor, which is neither parameter, buffer, batch nor made before.",
    "order": "What is given to it are tensors that the other run has too, in another order or grouping.",
    "draw": "Other random numbers are drawn.",
    "kernel": "It gives another result for the same inputs: another kernel, or other code that it calls.",
}
"""By how an operation parts."""

_PLACES = {
    "start": "The first weights are others: the seed, or how the model is built.",
    "batch": "The samples are others, with the same weights: the data, their order, or how they are collated.",
    "optimizer state": "The gradients are the same, and what the optimizer makes of them is not.",
    "weights": "The gradients are the same, and what the update makes of them is not.",
}
"""By what of a step parts first, where no operation does."""


def how_apart(found: Diffed, again: FoundAgain) -> str:
    """How two runs part that both come to what their tapes tell."""
    if again.how is not None:
        one, other = (cut(text) if text else "not given" for text in (again.how.one, again.how.other))
        how = _KINDS[again.how.kind].format(one=one, other=other)
        return f"In the optimizer's step: {how[0].lower()}{how[1:]}" if again.how.update else how
    if again.apart == 0:
        return _PLACES["start"]
    if again.kind:
        return _PLACES.get(again.kind, UNKNOWN)
    if found.b is not None and found.b.rule != found.a.rule:
        return "They are updated by other rules, so no single operation is looked for."
    if found.seen is not None and "order of arrival" in found.seen.what:
        return f"Contributions came in another order, which under rule '{found.a.rule}' decides."
    if found.a.rule != "synchronous":
        return f"{UNKNOWN} Under a rule that no lockstep keeps, an update is not looked at by operation."
    return UNKNOWN


def how_away(away: Away, start: int, unlike: str) -> str:
    """How a run parts from its own recipe, computed again here from version `start`."""
    what = [listed(away.tensors)] if away.tensors else []
    what += [f"the {figure}" for figure in away.figures[:3]]
    seen = f"version {away.version:,} is another in {', '.join(what)}" if what else away.sentence.rstrip(".")
    again = f"computed again from version {start:,}" if start else "computed again from its start"
    if unlike:
        return f"Made with {unlike} and {again} here, {seen}; that alone may be the cause."
    worker = " Which worker it was, the tape does not tell."
    if away.worker is not None:
        whose = (
            "the contributions are as they should be, and its share of the update is not"
            if away.owner
            else ("its contribution is another")
        )
        worker = f" Of worker {away.worker}, {whose}."
    return (
        f"{again[0].upper()}{again[1:]} with the same libraries on the same kind of processor, {seen}: a fault of "
        f"memory, processor or disk that does not repeat, or a changed file.{worker}"
    )
