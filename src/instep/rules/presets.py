"""The update rules that have a name, each a function of a few arguments that gives an `UpdateRule`."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

from instep.errors import RecipeError, shown
from instep.rules.rule import PRESETS, UpdateRule

_ROUNDS: dict[str, Any] = {"quorum": "all", "order": "round", "max_lead": 0, "max_staleness": 0}


def synchronous() -> UpdateRule:
    """Every worker in every update: bulk synchronous parallel (Valiant, 1990). The default, and the reference."""
    return UpdateRule(name="synchronous", **_ROUNDS)


def backup_workers(spare: int = 1) -> UpdateRule:
    """Synchronous, without waiting for the `spare` slowest of each round (Chen et al., 2016, arXiv:1604.00981).

    Departs from the paper in that a late worker's samples are not lost: they are given out again, and waited for then.
    """
    _check_count("backup_workers", "spare", spare)
    return UpdateRule(name="backup_workers", quorum=f"all-{spare}", max_lead=0, max_staleness=0)


def bounded_staleness(lead: int = 4) -> UpdateRule:
    """Stale synchronous parallel, SSP: at most `lead` rounds ahead of the slowest (Ho et al., NIPS 2013).

    With 0, rounds are merged whole and in the order of the tree, which is synchronous, bit for bit.
    """
    if lead == 0:
        return UpdateRule(name="bounded_staleness", **_ROUNDS)
    return UpdateRule(name="bounded_staleness", quorum="1", max_lead=lead)


def softsync(splits: int = 2) -> UpdateRule:
    """An update for each W / `splits` contributions, stale ones damped (Zhang et al., 2015, arXiv:1511.05950).

    W / `splits` is rounded up, so that with fewer workers than splits each contribution is an update.
    """
    _check_count("softsync", "splits", splits)
    return UpdateRule(name="softsync", quorum=f"all/{splits}", weight="staleness")


def asynchronous() -> UpdateRule:
    """Nobody waits: an update for each contribution (Downpour SGD: Dean et al., NIPS 2012)."""
    return UpdateRule(name="asynchronous", quorum="1")


def delay_compensated(strength: float = 0.04) -> UpdateRule:
    """Asynchronous, gradients corrected to first order for their delay (DC-ASGD: Zheng et al., ICML 2017).

    `strength` is the paper's lambda. The paper's adaptive variant is not built.
    """
    return UpdateRule(name="delay_compensated", quorum="1", compensation=strength)


def local_sgd(local_steps: int = 8) -> UpdateRule:
    """Each worker takes `local_steps` by itself, then weights are averaged (Stich, ICLR 2019)."""
    return UpdateRule(name="local_sgd", local_steps=local_steps, outer="sgd", **_ROUNDS)


def post_local_sgd(local_steps: int = 8, after: int = 100) -> UpdateRule:
    """Averaging in every step for the first `after` global batches, then local SGD (Lin et al., ICLR 2020)."""
    return UpdateRule(name="post_local_sgd", local_steps=local_steps, local_after=after, outer="sgd", **_ROUNDS)


def diloco(local_steps: int = 500, outer_lr: float = 0.7, outer_momentum: float = 0.9) -> UpdateRule:
    """Local steps, then an outer step of Nesterov momentum along their mean (Douillard et al., 2023, arXiv:2311.08105).

    The outer rate and momentum are the paper's.
    """
    return UpdateRule(
        name="diloco", local_steps=local_steps, outer="nesterov", outer_lr=outer_lr, outer_momentum=outer_momentum,
        **_ROUNDS,
    )  # fmt: skip


def async_diloco(
    local_steps: int = 50, buffer: int = 8, outer_lr: float = 0.7, outer_momentum: float = 0.9
) -> UpdateRule:
    """DiLoCo without waiting, with delayed Nesterov momentum (Liu et al., 2024, arXiv:2401.09135).

    `buffer` updates share one step of the momentum; the paper takes several times the workers.
    """
    return UpdateRule(
        name="async_diloco", quorum="1", local_steps=local_steps, outer="delayed_nesterov", outer_buffer=buffer,
        outer_lr=outer_lr, outer_momentum=outer_momentum,
    )  # fmt: skip


_ALL: tuple[Callable[..., UpdateRule], ...] = (
    synchronous, backup_workers, bounded_staleness, softsync, asynchronous, delay_compensated, local_sgd,
    post_local_sgd, diloco, async_diloco,
)  # fmt: skip

PRESETS.update({preset.__name__: preset for preset in _ALL})


def parse(text: str) -> UpdateRule:
    """The rule written as ``NAME[:VALUE][,field=value ...]``, see `instep.rules.text`. Raises RecipeError."""
    return UpdateRule.from_text(text)


def text_of(rule: UpdateRule) -> str:
    """The rule as `parse` reads it, with the value of the preset: ``bounded_staleness:4``; its name alone if custom."""
    if rule.name not in PRESETS:
        return rule.name
    arguments = inspect.signature(PRESETS[rule.name]).parameters
    number = rule.quorum.replace("/", "-").rpartition("-")[2]
    values = {
        "spare": number, "splits": number, "lead": rule.max_lead, "strength": rule.compensation,
        "after": rule.local_after, "buffer": rule.outer_buffer, **vars(rule),
    }  # fmt: skip
    text = rule.name
    for place, (name, argument) in enumerate(arguments.items()):
        if place == 0:
            text += f":{values[name]}"
        elif values[name] != argument.default:
            text += f",{name}={values[name]}"
    try:
        made = parse(text)
    except RecipeError:  # a field was changed that the preset's argument stands for
        text, made = rule.name, PRESETS[rule.name]()
    for field in dataclasses.fields(UpdateRule):
        value = getattr(rule, field.name)
        if value != getattr(made, field.name):
            text += f",{field.name}={'none' if value is None else value}"
    return text


def _check_count(rule: str, argument: str, value: Any) -> None:
    if type(value) is not int or value < 1:
        raise RecipeError(f"'{rule}:{argument}' is {shown(value)}; it must be a whole number from 1.")
