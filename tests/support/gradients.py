"""Gradients as a team has them."""

from __future__ import annotations

import torch
from torch import Tensor

from instep.reduce.fold import Fold
from instep.reduce.layout import Layout
from instep.reduce.reduction import Reduction
from instep.worker.replica import Replica


def instep_gradient(replica: Replica, step: int, workers: int) -> list[Tensor]:
    """What a team computes, its workers one after the other."""
    microbatches = replica.recipe.microbatches
    layout = Layout.of(replica.parameters, block=64)
    reduction = Reduction(layout, microbatches, workers)
    slots = [torch.zeros(layout.size) for _ in reduction.nodes]
    batches = [replica.batch(step, microbatch) for microbatch in range(microbatches)]
    counts = [replica.objective.counts(batch) for batch in batches if batch is not None]
    totals = {name: sum(count[name] for count in counts) for name in counts[0]}
    for worker, bounds in enumerate(reduction.ranges):
        own = [slots[index] for index in reduction.slots_of(worker)]
        fold = Fold(layout, replica.parameters, reduction.nodes_of(worker), own)
        fold.begin()
        for microbatch in range(*bounds):
            fold.begin_leaf()
            if batches[microbatch] is not None:
                replica.compute(step, microbatch, batches[microbatch], totals)
            fold.end_leaf()
        fold.close()
    for worker in range(workers):
        add_cut(reduction, worker, slots)
    return layout.views(slots[0])


def add_cut(reduction: Reduction, worker: int, slots: list[Tensor]) -> Tensor:
    """Adds the worker's cut of all nodes in place, and puts it into each worker's first one; its blocks' norms."""
    cut = reduction.pieces[0][worker]
    (part,) = reduction.add(worker, [slot[cut] for slot in slots])
    for other in range(1, reduction.workers):
        slots[reduction.slots_of(other)[0]][cut] = part
    return reduction.norms(part)
