"""The update rule: who waits for whom, which contributions merge into an update, and with what weights.

A rule is data, so that a recipe, a tape and a report can hold it. `instep.rules.ledger` is the one machine that obeys
it. Two of its gates differ: `max_lead` holds a fast worker back (the clock gate of SSP), `max_staleness` drops an old
contribution (the version gate).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from instep.errors import RecipeError, shown
from instep.rules.text import read_rule
from instep.tables import added, at_least, check_types

_QUORUM = re.compile(r"all|all-(\d{1,18})|all/(\d{1,18})|(\d{1,18})")


@dataclass(frozen=True, kw_only=True)
class UpdateRule:
    """The dial. `instep.rules.presets` has the rules with a name in the literature.

    Fields
    ------
    quorum: contributions that make an update: a number, "all" for one of each active worker, "all-2" for two fewer
        (backup workers), "all/3" for a third of them, rounded up (softsync): one at least.
    order: "round" merges the pieces of a round in the order of the canonical tree, once all are there; "arrival"
        merges contributions as they come.
    max_lead: rounds that a worker may be ahead of the slowest when it starts on a contribution; None for no bound.
    max_staleness: versions that a contribution may be behind when it is merged; older ones are dropped and their
        samples are given out again, and then waited for, so that no piece is dropped twice. None for no bound.
    max_wait_s: seconds after the first waiting contribution at which an update is made with what has come, though the
        quorum has not; only with order "arrival". None waits on.
    grace_s: seconds after the quorum is there in which the update waits for further contributions, unless all workers
        have sent one before (the grace window of Decoupled DiLoCo: Douillard et al., 2026, arXiv:2604.21428); it never
        goes on beyond `max_wait_s`. None makes it at once.
    local_steps: steps, H, that a worker takes by itself for one contribution.
    local_after: global batches until `local_steps` holds; until then it is 1.
    weight: "items" weighs the contributions of an update by their items; "staleness" also divides each one's share by
        1 + its staleness, without making up for it: stale updates are smaller.
    compensation: lambda of delay compensation: adds lambda * g * g * (weights now - weights of the base version) to
        each gradient g.
    outer: the server's optimizer. "none": contributions are gradients and the recipe's optimizer runs at the server.
        Otherwise they are deltas (weights pulled minus weights after the local steps), the recipe's optimizer runs at
        the worker, and the server takes a step of SGD with `outer_lr` and `outer_momentum` along their weighted mean,
        plain ("sgd"), with Nesterov momentum ("nesterov"), or with momentum that is brought up to date only once in
        `outer_buffer` updates ("delayed_nesterov").
    wire: the format of deltas on their way to the server and of the weights' change on its way to the workers:
        "float32", "bfloat16", or "int8" and "int4" in blocks of 64 with a scale each. What is lost by it is added to
        what is sent next.
    fragments: parts of the model, N, that are sent one after the other, each `local_steps` / N steps after the one
        before (Streaming DiLoCo: Douillard et al., 2025, arXiv:2501.18512); meanwhile each worker keeps its own
        weights of the others. 1 sends all of it at once. Only where all workers wait for each other.
    overlap: steps that a worker takes on its next contribution before it needs the update of its last one, so that it
        computes while that is sent, made and sent back (the same paper's tau). At most `local_steps` / `fragments`.
    mix: with `overlap`, the part of its own value of a fragment that a worker keeps when it takes the update's (the
        paper's alpha; 0.5, its uniform average, is tried there beside 0). 0 takes the update as it is, and gives up
        what the worker moved meanwhile.
    name: of the preset it was made from, or of your own.

    Raises RecipeError where the fields do not go together.
    """

    name: str = "custom"
    quorum: str = field(metadata={"also": int})
    order: Literal["round", "arrival"] = "arrival"
    max_lead: int | None = None
    max_staleness: int | None = None
    max_wait_s: float | None = None
    local_steps: int = 1
    local_after: int = 0
    weight: Literal["items", "staleness"] = "items"
    compensation: float = 0.0
    outer: Literal["none", "sgd", "nesterov", "delayed_nesterov"] = "none"
    outer_lr: float = 1.0
    outer_momentum: float = 0.0
    outer_buffer: int = 1
    wire: Literal["float32", "bfloat16", "int8", "int4"] = added("float32", default="float32")
    fragments: int = added(1, default=1)
    overlap: int = added(0, default=0)
    mix: float = added(0.5, default=0.5)
    grace_s: float | None = added(None, default=None)

    def __post_init__(self) -> None:
        check_types(self, "rule")
        self._check_numbers()
        self._check_together()
        self._check_fragments()

    @classmethod
    def from_text(cls, text: str) -> UpdateRule:
        """The rule written as ``NAME[:VALUE][,field=value ...]``, see `instep.rules.text`. Raises RecipeError."""
        return read_rule(text, cls, PRESETS)

    def quorum_of(self, workers: int) -> int:
        """How many contributions make an update while `workers` are active: at least 1, at most all."""
        match = _QUORUM.fullmatch(self.quorum)
        assert match, "it was checked"
        less, divisor, number = (int(group) if group else None for group in match.groups())
        if number is not None:
            wanted = number
        elif less is not None:
            wanted = workers - less
        else:
            wanted = -(-workers // (divisor or 1))
        return max(1, min(wanted, workers))

    def weights(self, items: Sequence[int], staleness: Sequence[int]) -> tuple[float, ...]:
        """The weight of each contribution of an update; equal ones before staleness where none has items."""
        total = sum(items)
        shares = [count / total for count in items] if total else [1 / len(items)] * len(items)
        if self.weight == "staleness":
            shares = [share / (1 + old) for share, old in zip(shares, staleness, strict=True)]
        return tuple(shares)

    @property
    def gradients(self) -> bool:
        """Whether contributions are gradients; else they are deltas."""
        return self.outer == "none"

    @property
    def stride(self) -> int:
        """Steps that a worker takes by itself for one contribution, which holds one of the fragments."""
        return self.local_steps // self.fragments

    @property
    def streams(self) -> bool:
        """Whether workers have weights of their own from one contribution to the next."""
        return self.fragments > 1 or self.overlap > 0

    @property
    def waits(self) -> bool:
        """Whether time passes that decides when an update is made."""
        return self.max_wait_s is not None or self.grace_s is not None

    @property
    def narrow(self) -> bool:
        """Whether what goes between workers and server has fewer bits than float32."""
        return self.wire != "float32"

    @property
    def lockstep(self) -> bool:
        """Whether all workers wait for each other in every round, so that arrival decides nothing."""
        return self.order == "round" and self.max_lead == 0

    @property
    def synchronous(self) -> bool:
        """Whether every update is one step of the recipe's optimizer on a whole global batch, in lockstep."""
        return self.lockstep and self.gradients

    def check_workers(self, workers: int) -> None:
        """Raises RecipeError where the rule cannot be obeyed with so many workers at the start."""
        match = _QUORUM.fullmatch(self.quorum)
        less, _, number = (int(group) if group else None for group in (match.groups() if match else ()))
        if number is not None and number > workers:
            raise RecipeError(
                f"'rule.quorum' is {number} and the team has {workers} {_workers(workers)}, fewer than an "
                f"update takes; set it to {workers} or less, or take more workers."
            )
        if less is not None and less >= workers:
            raise RecipeError(
                f"'rule.quorum' is {shown(self.quorum)} and the team has {workers} {_workers(workers)}, so nobody "
                f"would be waited for; keep fewer than {workers} in reserve, or take more workers."
            )

    def warnings(self) -> list[str]:
        """Sentences on what is allowed and known to go wrong."""
        in_part = self.order == "arrival" and self.quorum != "all"
        if self.outer in ("sgd", "nesterov") and self.outer_momentum and in_part:
            return [
                f"rule {shown(self.name)} applies outer momentum {self.outer_momentum:g} to few contributions at a "
                f"time, as they come, which is known to diverge (Liu et al., 2024); set outer to 'delayed_nesterov' "
                f"with an outer_buffer of several times the workers, or outer_momentum to 0."
            ]
        return []

    def _check_numbers(self) -> None:
        if not _QUORUM.fullmatch(self.quorum) or re.search(r"(^|\D)0+$", self.quorum):
            raise RecipeError(
                f"'rule.quorum' is {shown(self.quorum)}; write a number from 1, 'all', 'all-1' (one fewer) or 'all/2' "
                f"(half of them)."
            )
        least_of = {"local_steps": 1, "local_after": 0, "outer_buffer": 1, "fragments": 1, "overlap": 0}
        for key, least in least_of.items():
            at_least(f"rule.{key}", getattr(self, key), least)
        for key in ("max_lead", "max_staleness"):
            value = getattr(self, key)
            if value is not None and value < 0:
                raise RecipeError(f"'rule.{key}' is {value}; it must be at least 0 (leave it out for no bound).")
        if self.max_wait_s is not None and not 0 < self.max_wait_s < float("inf"):
            raise RecipeError(
                f"'rule.max_wait_s' is {self.max_wait_s}; it must be a finite number above 0 (leave it out to wait on)."
            )
        if self.grace_s is not None and not 0 < self.grace_s < float("inf"):
            raise RecipeError(
                f"'rule.grace_s' is {self.grace_s}; it must be a finite number above 0 (leave it out for none)."
            )
        if not 0 <= self.compensation < float("inf"):
            raise RecipeError(f"'rule.compensation' is {self.compensation}; it must be a finite number from 0.")
        if not 0 <= self.mix < 1:
            raise RecipeError(f"'rule.mix' is {self.mix}; it must be from 0 to below 1, which would take no update.")
        if not 0 < self.outer_lr < float("inf"):
            raise RecipeError(f"'rule.outer_lr' is {self.outer_lr}; it must be a finite number above 0.")
        if not 0 <= self.outer_momentum < 1:
            raise RecipeError(f"'rule.outer_momentum' is {self.outer_momentum}; it must be from 0 to below 1.")

    def _check_together(self) -> None:
        if self.order == "round" and self.quorum != "all":
            raise RecipeError(
                f"'rule.order' is 'round', which waits for every piece, and 'rule.quorum' is {shown(self.quorum)}; set "
                f"quorum to 'all', or order to 'arrival'."
            )
        if self.order == "round" and self.max_wait_s is not None:
            raise RecipeError(
                f"'rule.max_wait_s' is {self.max_wait_s}, and 'rule.order' is 'round', which waits for every piece; "
                f"leave it out, or set order to 'arrival'."
            )
        if self.grace_s is not None and self.quorum == "all":
            raise RecipeError(
                f"'rule.grace_s' is {self.grace_s}, and rule {shown(self.name)} waits for all, so that no quorum is "
                f"there before; leave it out, or set quorum to fewer, such as 'all-1', with order 'arrival'."
            )
        if self.local_steps > 1 and self.gradients:
            raise RecipeError(
                f"'rule.local_steps' is {self.local_steps} and 'rule.outer' is 'none': after several local steps a "
                f"contribution is a delta, which needs an outer optimizer; set rule.outer to 'sgd'."
            )
        if self.gradients and (self.outer_lr != 1 or self.outer_momentum or self.outer_buffer != 1):
            raise RecipeError("outer_lr, outer_momentum and outer_buffer go with an outer optimizer; set rule.outer.")
        if self.compensation and not self.gradients:
            raise RecipeError("'rule.compensation' is for gradients; it goes with rule.outer 'none' alone.")
        if self.narrow and self.gradients:
            raise RecipeError(
                f"'rule.wire' is {shown(self.wire)} and rule {shown(self.name)} sends gradients, which stay float32; "
                f"leave it out, or take a rule with local steps, such as 'diloco:20,wire={self.wire}'."
            )
        if self.outer_buffer > 1 and self.outer != "delayed_nesterov":
            raise RecipeError(
                f"'rule.outer_buffer' is {self.outer_buffer}, and 'rule.outer' is {self.outer!r}; only "
                f"'delayed_nesterov' has a buffer."
            )
        if self.outer == "delayed_nesterov" and self.outer_buffer < 2:
            raise RecipeError(
                f"'rule.outer_buffer' is {self.outer_buffer}, too small to delay anything; set it to several times "
                f"the workers, or rule.outer to 'nesterov'."
            )
        if self.local_after and self.local_steps == 1:
            raise RecipeError("'rule.local_after' goes with 'rule.local_steps' above 1.")

    def _check_fragments(self) -> None:
        if not self.overlap and self.mix != UpdateRule.mix:
            raise RecipeError(
                f"'rule.mix' is {self.mix}, and without 'rule.overlap' workers take each update as it is; leave it "
                f"out, or set overlap."
            )
        if not self.streams:
            return
        steps, name = self.local_steps, "fragments" if self.fragments > 1 else "overlap"
        count = getattr(self, name)
        what = f"'rule.{name}' is {count}"
        if self.gradients or steps == 1:
            raise RecipeError(
                f"{what} and rule {shown(self.name)} sends something after every step; leave it out, or take a rule "
                f"with local steps, such as 'diloco:{20 * count},{name}={count}'."
            )
        if not self.lockstep:
            why = "no update has the same fragment of all" if name == "fragments" else "there is nothing to overlap"
            raise RecipeError(
                f"{what} and under rule {shown(self.name)} workers do not wait for each other, so that {why}; leave it "
                f"out, or set order to 'round' and max_lead to 0."
            )
        if self.local_after:
            raise RecipeError(
                f"{what} and 'rule.local_after' is {self.local_after}, batches in which all weights are averaged after "
                f"every step; leave one of them out."
            )
        if steps % self.fragments:
            near = max(1, round(steps / count)) * count
            raise RecipeError(
                f"'rule.local_steps' is {steps} and 'rule.fragments' is {count}, one of which is sent after each "
                f"local_steps / fragments steps; set local_steps to a multiple of it, such as {near}."
            )
        self._check_overlap()

    def _check_overlap(self) -> None:
        if self.overlap > self.stride:
            raise RecipeError(
                f"'rule.overlap' is {self.overlap} and a worker sends something after every {self.stride} steps "
                f"(local_steps / fragments), before which it needs the last update; set overlap to at most that."
            )
        if self.fragments == 1 and self.overlap == self.stride and not self.mix:
            raise RecipeError(
                f"'rule.overlap' is {self.overlap}, as 'rule.local_steps', and with 'rule.mix' 0 a worker gives up all "
                f"that it moves meanwhile, so that it never sends anything; set overlap lower, or mix above 0."
            )


def _workers(count: int) -> str:
    return "worker" if count == 1 else "workers"


PRESETS: dict[str, Callable[..., UpdateRule]] = {}
"""All presets by name, from the strictest to the loosest. `instep.rules.presets`, imported with this room, fills it."""
