"""Many workers' gradients at once, by `torch.func.vmap`: for models so small that calls cost more than arithmetic.

What comes out equals what the contributor computes one after the other, but for the rounding of other kernels: other
bits. So it is asked for, and stands on the tape.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils import _pytree as pytree

from instep.data.cursor import take_rows
from instep.errors import RecipeError
from instep.objectives import Bound
from instep.rules.work import Work
from instep.turns import Turns
from instep.worker.contribution import Facts, Vectors, latest_of
from instep.worker.contributor import Contributor, Inputs

_FLOATS = 1 << 26
"""Elements of gradients that are computed at once, at most."""

Task = tuple[Work, Tensor]
"""A piece of work, and the weights to start from ([pack.size_bytes], uint8)."""


class Together:
    """Computes contributions of many workers at once, with one replica, under rules without local steps.

    Raises RecipeError where that cannot be done: layers that draw random numbers or change buffers, objectives that
    look at values, precision other than float32, and models whose answer on a batch depends on others'.
    """

    def __init__(self, contributor: Contributor):
        self._one = contributor
        if contributor.buffers.disturbed:
            raise _refused("training changes its buffers")
        if contributor.written.names:
            raise _refused(f"its forwards write parameter '{contributor.written.names[0]}'")
        if contributor.replica.recipe.precision != "float32":
            raise _refused("its precision is not float32")
        if any(parameter.dtype != torch.float32 for parameter in contributor.replica.parameters):
            raise _refused("its weights are not float32")
        if contributor.replica.trainable.by_step:
            turns = isinstance(contributor.replica.recipe.objective, Turns)
            frozen = "recipe.freeze freezes parameters in some steps alone"
            raise _refused("its objectives take turns" if turns else frozen)
        if contributor.replica.objective.shares:
            raise _refused("its objective looks at the whole batch")
        self._whole = _Whole(contributor.replica.module, contributor.replica.objective)
        self._names = [f"module.{name}" for name in contributor.replica.names]
        self._touched: tuple[int, ...] | None = None
        self._rows = contributor.replica.rows
        self._load = contributor.replica.cursor.microbatch_tensor if self._rows is not None else None

    def compute(self, tasks: Sequence[Task]) -> list[tuple[Facts, Vectors]]:
        """The contributions of `tasks`, in their order. Raises RecipeError, see above."""
        # Rows of tensors are taken for many at once: until then, a microbatch is its indices.
        inputs = [self._one.inputs(work, self._load) for work, _ in tasks]
        of_rows = pytree.tree_structure(list(self._rows or ()))
        groups: dict[Any, list[_Entry]] = {}  # by the shapes of the batch
        for place, each in enumerate(inputs):
            for microbatch, batch in {} if self._one.passes_over(each.totals) else each.batches.items():
                if self._rows is not None and len(batch):
                    groups.setdefault(len(batch), []).append(_Entry(place, microbatch, [batch], of_rows))
                elif self._rows is None and batch is not None:
                    leaves, structure = pytree.tree_flatten(batch)
                    groups.setdefault(_kind(leaves, structure), []).append(_Entry(place, microbatch, leaves, structure))
        found: list[dict[int, dict[str, float]]] = [{} for _ in tasks]
        none, rows = self._one.empty(), max(len(each.nodes) for each in inputs)
        # Numpy's zeros cost nothing where nothing is written, as in the gap after a small model.
        flat = torch.from_numpy(np.zeros((len(tasks), rows, self._one.layout.size), np.float32))
        vectors = [Vectors(gradient, none.buffers, none.integers, none.written) for gradient in flat.unbind(0)]
        for entries in groups.values():
            at_once = max(1, _FLOATS // self._one.layout.size)
            for start in range(0, len(entries), at_once):
                self._group(entries[start : start + at_once], tasks, inputs, found, flat)
        if self._touched is None:
            first = next((place for place, sums in enumerate(found) if sums), None)
            if first is not None:
                self._compare(tasks[first], vectors[first])
        made = []
        for (work, _), each, sums, vector in zip(tasks, inputs, found, vectors, strict=True):
            bad = [wrong for m, terms in sums.items() for wrong in self._one.replica.not_finite(terms, work.batch, m)]
            by_term = {name: tuple(sums[m][name] for m in sorted(sums)) for name in self._one.terms}
            touched = self._touched if sums and self._touched else ()
            facts = Facts(
                tuple(each.nodes), each.counts, by_term, len(sums), touched, (), latest=latest_of(work.batch, sums),
                bad=tuple(bad[:1]), empty=self._one.without_items(work.batch, each.counts),
            )  # fmt: skip
            made.append((facts, vector))
        return made

    def _group(
        self,
        entries: Sequence[_Entry],
        tasks: Sequence[Task],
        inputs: Sequence[Inputs],
        found: list[dict[int, dict[str, float]]],
        into: Tensor,
    ) -> None:
        """Computes microbatches of one shape, and adds their gradients to `into` ([tasks, nodes, size])."""
        stacked, structure = self._stacked(entries)
        dims = [0 if isinstance(leaf, Tensor) else None for leaf in stacked]
        objective = self._one.replica.objective
        steps = [tasks[entry.place][0].batch for entry in entries]
        weight = {step: objective.weights(step) for step in set(steps)}
        totals = [inputs[entry.place].totals for entry in entries]
        shares = {
            name: torch.tensor(
                [
                    weight[step][name] / total[name] if total[name] else 0.0
                    for step, total in zip(steps, totals, strict=True)
                ]
            )
            for name in objective.minimised
        }
        packs = [tasks[entry.place][1] for entry in entries]
        same = all(pack is packs[0] for pack in packs)
        weights = self._one.pack.parameters(packs[0]) if same else self._one.pack.stacked(packs)

        def one(parameters: dict[str, Tensor], leaves: list[Any], shares: dict[str, Tensor]) -> Any:
            sums = functional_call(self._whole, parameters, (pytree.tree_unflatten(leaves, structure),))
            return torch.stack([sums[name].float() * share for name, share in shares.items()]).sum(), sums

        versions = [weight._version for weight in weights]
        self._one.replica.doing = f"computing {len(entries)} microbatches at once"
        try:
            gradients, sums = vmap(grad(one, has_aux=True), in_dims=(None if same else 0, dims, 0))(
                dict(zip(self._names, weights, strict=True)), stacked, shares
            )
        except (RuntimeError, TypeError, ValueError) as error:
            raise _refused("torch.func.vmap cannot take its model or objective", str(error).strip()) from error
        written = zip(self._one.replica.names, weights, versions, strict=True)
        if (name := next((name for name, weight, before in written if weight._version != before), "")) != "":
            raise _refused(f"its forwards write parameter '{name}'")
        values = {name: value.tolist() for name, value in sums.items()}
        where = []
        for row, entry in enumerate(entries):
            found[entry.place][entry.microbatch] = {name: value[row] for name, value in values.items()}
            nodes = enumerate(inputs[entry.place].nodes)
            node = next(i for i, (start, stop) in nodes if start <= entry.microbatch < stop)
            where.append(entry.place * into.shape[1] + node)
        rows = into.view(-1, into.shape[2])
        once = where == list(range(len(rows)))
        for view, name in zip(self._one.layout.views_of_many(rows), self._names, strict=True):
            if once:  # a fifth of the time
                view.copy_(gradients[name])
            else:
                view.index_add_(0, torch.tensor(where), gradients[name])

    def _stacked(self, entries: Sequence[_Entry]) -> tuple[list[Any], pytree.TreeSpec]:
        """The leaves of K microbatches of one shape, tensors as [K, ...], and the structure of a batch."""
        columns = zip(*(entry.leaves for entry in entries), strict=True)
        stacked = [torch.stack(column) if isinstance(column[0], Tensor) else column[0] for column in columns]
        if self._rows is None:
            return stacked, entries[0].structure
        taken = [leaf.unflatten(0, stacked[0].shape) for leaf in take_rows(self._rows, stacked[0].flatten())]
        return taken, entries[0].structure

    def _compare(self, task: Task, vectors: Vectors) -> None:
        """Computes the first contribution by itself too: which parameters have gradients, and whether they agree."""
        alone = self._one.empty()
        facts = self._one.compute(*task, alone)
        scale = float(alone.gradient.abs().max())
        apart = float((alone.gradient - vectors.gradient).abs().max())
        if not apart <= 1e-3 * scale:
            raise _refused(f"a gradient came out otherwise than alone, by {apart:.2g} of {scale:.2g}")
        self._touched = facts.touched


class _Whole(nn.Module):
    """Model and objective as one module, so that a functional call reaches the model's parameters."""

    def __init__(self, module: nn.Module, objective: Bound):
        super().__init__()
        self.module, self._objective = module, objective

    def forward(self, batch: Any) -> dict[str, Tensor]:
        return self._objective.sums(self.module, batch)


class _Entry(NamedTuple):
    """One microbatch of the task at `place`, taken apart. leaves: or else the indices of its rows."""

    place: int
    microbatch: int
    leaves: list[Any]
    structure: pytree.TreeSpec


def _kind(leaves: list[Any], structure: pytree.TreeSpec) -> Any:
    """What microbatches that are computed at once have in common."""
    shapes = ((leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else repr(leaf) for leaf in leaves)
    return structure, tuple(shapes)


def _refused(why: str, detail: str = "") -> RecipeError:
    return RecipeError(
        f"this recipe cannot be computed for many workers at once: {why.rstrip('.')}; leave out --batched.",
        detail=detail,
    )
