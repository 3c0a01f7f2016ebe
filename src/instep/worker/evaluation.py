"""The objective on held-out data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from numpy.typing import ArrayLike

from instep.data.cursor import held_out_batches
from instep.ema import name_of
from instep.errors import RecipeError
from instep.objectives.bound import exact_sum
from instep.objectives.gathers import Outputs, measure, outputs_of
from instep.randomness import key, seed_all
from instep.restore import kept_module_state, kept_random_state
from instep.worker.replica import Replica


@dataclass(frozen=True)
class Evaluation:
    """The objective on held-out data, the mean of each term, metrics included, and the items of the first term.

    gathered: the metrics that are no sums, over the whole of these data. doubts: a sentence on each that failed. turns:
    where objectives take turns, each one's; the objective is then the sum of them. ema: the same of each average of the
    weights, by decay, without what is gathered.
    The terms are weighed as in the recipe's last step, so that the objectives of a run's evaluations compare. The
    objective is not a number where no term that is minimised has an item.
    """

    objective: float
    terms: dict[str, float]
    items: int
    gathered: dict[str, float] = field(default_factory=dict)
    ema: dict[str, Evaluation] = field(default_factory=dict)
    doubts: tuple[str, ...] = ()
    turns: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        replica: Replica,
        counts: ArrayLike,
        sums: ArrayLike,
        outputs: Sequence[Outputs] = (),
        averages: Sequence[ArrayLike] = (),
    ) -> Evaluation:
        """From what the batches gave: counts [E, T] and sums [E, T] of T terms in E batches, and outputs of each, in
        one process, where the objective gathers them; averages: the sums of each average of the weights.
        """
        names = map(name_of, replica.recipe.ema) if averages else ()
        ema = {name: cls.of(replica, counts, own) for name, own in zip(names, averages, strict=True)}
        terms, last = replica.objective.terms or (), replica.recipe.steps - 1
        totals = dict(zip(terms, (sum(map(int, column)) for column in zip(*_rows(counts), strict=True)), strict=True))
        columns = dict(zip(terms, zip(*_rows(sums), strict=True), strict=True))
        means = {name: exact_sum(columns[name]) / total for name, total in totals.items() if total}
        objective = replica.objective.whole(means, last) if replica.objective.has_items(totals) else math.nan
        gathered, doubts = dict[str, float](), list[str]()
        if replica.objective.gathers and outputs:
            with kept_random_state():
                seed_all(key(replica.recipe.seed, "gathers"))
                gathered, doubts = measure(replica.objective.objective, outputs)
        turns = replica.objective.by_turn(means, last)
        return cls(objective, means, totals[terms[0]], gathered, ema, tuple(doubts), turns)

    def problem(self, version: int) -> str:
        """A sentence to warn with where the objective is not finite, else ""."""
        if math.isfinite(self.objective):
            return ""
        terms = ", ".join(f"'{name}' {value}" for name, value in self.terms.items()) or "no term has an item"
        return (
            f"the objective on the held-out data is {self.objective} at version {version} ({terms}), which is no best "
            f"and no progress; look at these data, which samples they hold and how the objective counts them."
        )

    def facts(self, version: int, replica: Replica) -> dict[str, Any]:
        """What a tape and a result say of it; for text with ``bits_per_byte``, and ``gathered`` where anything is.

        These are from the term "cross_entropy", or else from the objective if it minimises one term alone.
        """
        facts = {"version": version, **self._figures(replica), "items": self.items}
        if replica.objective.gathers:
            facts["gathered"] = self.gathered
        if self.ema:
            facts["ema"] = {name: each._figures(replica) for name, each in self.ema.items()}
        return facts

    def _figures(self, replica: Replica) -> dict[str, Any]:
        figures: dict[str, Any] = {"objective": self.objective, "terms": self.terms}
        if self.turns:
            figures["turns"] = self.turns
        codec = replica.data.codec
        nats = self.terms.get("cross_entropy", self.objective if len(replica.objective.minimised) == 1 else None)
        if codec is not None and nats is not None:
            figures["bits_per_byte"] = nats / math.log(2) / codec.bytes_per_token
        return figures


def _rows(array: ArrayLike) -> list[Any]:
    return list(array)  # type: ignore[arg-type]


def batches_held_out(replica: Replica) -> list[range]:
    """The indices of each batch of held-out samples, as large as a microbatch; none without held-out data.

    Raises RecipeError where the recipe's watch needs them and there are none.
    """
    data, recipe = replica.data, replica.recipe
    if data.held_out is None:
        patience = next((watch.patience for watch in recipe.watches if watch.patience is not None), None)
        if patience is not None:
            raise RecipeError(
                f"'watch.patience' is {patience} evaluations, and the data have nothing held out; give a "
                f"pair (training, held out), or leave patience out."
            )
        return []
    samples = len(data.held_out)
    if recipe.evaluate_samples is not None:
        samples = min(samples, recipe.evaluate_samples)
    return held_out_batches(samples, recipe.batch // recipe.microbatches)


class Evaluated(NamedTuple):
    """One held-out batch: its place among all, counts and sums by term, and the outputs that are gathered."""

    place: int
    counts: list[int]
    sums: list[float]
    outputs: Outputs


def evaluate(
    replica: Replica,
    batches: Sequence[range],
    places: range,
    advance: Callable[[], None],
    decay: float | None = None,
) -> Iterator[Evaluated]:
    """Those of `batches` that are at `places`, in eval mode and without gradients.

    `advance` is called after each batch. The model's mode and buffers are as before once the iterator has ended; what
    a forward writes into parameters is put back at once. Raises FirstWrite for those that none wrote before.
    decay: of the average that is evaluated, whose outputs are not gathered; None for the weights themselves.
    """
    assert replica.data.held_out is not None
    module, terms = replica.module, replica.objective.terms or ()
    with replica.averaged(decay), kept_module_state(module, training=False), torch.no_grad(), replica.autocast():
        for place in places:
            seed = key(replica.recipe.seed, "evaluate", place)
            batch = replica.to_device(replica.reader.read(replica.data.held_out, list(batches[place]), seed))
            counts = replica.objective.counts(batch)
            outputs: Outputs = {}
            with replica.written.kept("an evaluation"):
                sums = replica.objective.sums(replica.module, batch)
            if replica.objective.gathers and decay is None:
                seed_all(key(replica.recipe.seed, "outputs", place))
                with replica.written.kept("an evaluation"):
                    outputs = outputs_of(replica.objective.objective, replica.module, batch)
            yield Evaluated(place, [counts[name] for name in terms], [float(sums[name]) for name in terms], outputs)
            advance()


def evaluate_alone(
    replica: Replica, batches: Sequence[range], advance: Callable[[], None] = lambda: None
) -> Evaluation | None:
    """The objective on all of `batches`, computed by this process; None if there are none."""
    if not batches:
        return None
    found, *averages = (
        list(evaluate(replica, batches, range(len(batches)), advance, decay)) for decay in (None, *replica.recipe.ema)
    )
    counts, sums, outputs = ([getattr(each, name) for each in found] for name in ("counts", "sums", "outputs"))
    return Evaluation.of(replica, counts, sums, outputs, [[each.sums for each in own] for own in averages])
