"""The arrays that the workers of a team share, and their sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from instep.reduce.buffers import Buffers
from instep.reduce.reduction import Reduction
from instep.transport.shared_memory import Region, attach

LEFT = 9
"""The mark, in `Exchange.stopped`, of a worker for which nobody needs to wait any more."""


@dataclass(frozen=True)
class Exchange:
    """What workers tell each other. W workers, M microbatches, T terms, P parameters, B buffers, E evaluations.

    The marks rise with the version and order everything else. In a step, all but `slots` is written before the
    worker's `posted` mark and read by the others between their sight of all of these and their own `done` mark, or
    written between these two and read after all are done; so nothing is overwritten before everybody has read it.
    Where weights are shared, they and the sum in node 0's slot are written and read by their owners alone between all
    `done` marks and the meeting at the step's end.
    """

    posted: NDArray[np.int64]
    """[W] s + 2 once the worker's nodes of step s, and its item counts of step s + 1, are there."""
    done: NDArray[np.int64]
    """[W] s + 2 once the worker has added its slice in step s. All done: the step is committed."""
    met: NDArray[np.int64]
    """[W] how often the worker came to a meeting of all, where weights are shared, as when its update is made."""
    evaluated: NDArray[np.int64]
    """[W] version + 1 once the worker's share of an evaluation at that version is there."""
    raised: NDArray[np.int64]
    """[W] 1 once the worker stops for what its code, or another's, raised; 2 if it could not even do that."""
    stopped: NDArray[np.int64]
    """[W] how far the worker is with its stopping, see `Lockstep.stop`; `LEFT` if it ended as it should."""
    sound: NDArray[np.int64]
    """[W] version + 1 of the worker's weights when it stopped; 0 where an update, or another change, is half made."""
    saved: NDArray[np.int64]
    """[1] the version of the newest checkpoint, as worker 0 says when it has stopped or done its part; 0 for none."""
    stop: NDArray[np.int64]
    """[1] as worker 0 saw it when it posted: whether to end after this step."""
    said: NDArray[np.int64]
    """[1] what worker 0 answers to a question that all must know the answer to."""
    parcels: NDArray[np.int64]
    """[W] bytes that the worker sends to worker 0 for a checkpoint."""
    parcel_bytes: NDArray[np.int64]
    """[W] length of what the worker hands to worker 0, see `Parcels`."""
    parcel_rooms: NDArray[np.uint8]
    """[W, bytes] a piece of it; [W, 0] where nothing is gathered."""
    parcels_met: NDArray[np.int64]
    """[W] how often the worker has met the others there."""
    counts: NDArray[np.int64]
    """[M, T] items of each term in the next step."""
    sums: NDArray[np.float64]
    """[M, T] the sum of each term."""
    touched: NDArray[np.uint8]
    """[W, P] 1 where a parameter had a gradient, and 2 where a microbatch left it requiring none."""
    changed: NDArray[np.uint8]
    """[W, B] whether a buffer was changed."""
    ends: NDArray[np.int64]
    """[W, B] in the first step, what tells whether a buffer ended differently from piece to piece; else 0."""
    norms: NDArray[np.float32]
    """[blocks] L2 norms of the blocks of the gradient."""
    written: NDArray[np.uint8]
    """[W, bytes] what the worker's microbatches wrote into parameters, see `WrittenParameters`."""
    evaluation_counts: NDArray[np.int64]
    """[E, T]"""
    evaluation_sums: NDArray[np.float64]
    """[E, T]"""
    slots: NDArray[np.float32]
    """[nodes, size] the gradient of each node of the tree; [0, 0] where it stays on a device. Parcels, too."""
    weights: NDArray[np.uint8]
    """[bytes] the weights, in their types, where all workers share them."""
    buffers: NDArray[np.float32]
    """[nodes, row_size] floating buffers."""
    integers: NDArray[np.int64]
    """[W, size] other buffers."""

    @classmethod
    def attach(cls, descriptor: int, regions: Mapping[str, Region]) -> Exchange:
        """Maps a file reserved for `regions`."""
        arrays: dict[str, Any] = dict(attach(descriptor, regions))
        return cls(**{field.name: arrays[field.name] for field in fields(cls)})


def regions(
    *,
    reduction: Reduction,
    microbatches: int,
    terms: int,
    parameters: int,
    buffers: Buffers,
    evaluations: int,
    weight_bytes: int,
    parcel_bytes: int,
    written_bytes: int,
    on_device: bool,
) -> dict[str, Region]:
    """The sizes of the arrays of an `Exchange`."""
    workers, layout, nodes = reduction.workers, reduction.layout, len(reduction.nodes)
    marks = Region((workers,), "int64")
    return {
        "posted": marks,
        "done": marks,
        "met": marks,
        "evaluated": marks,
        "raised": marks,
        "stopped": marks,
        "sound": marks,
        "saved": Region((1,), "int64"),
        "stop": Region((1,), "int64"),
        "said": Region((1,), "int64"),
        "parcels": Region((workers,), "int64"),
        "parcel_bytes": marks,
        "parcel_rooms": Region((workers, parcel_bytes), "uint8"),
        "parcels_met": marks,
        "counts": Region((microbatches, terms), "int64"),
        "sums": Region((microbatches, terms), "float64"),
        "touched": Region((workers, parameters), "uint8"),
        "changed": Region((workers, len(buffers.names)), "uint8"),
        "ends": Region((workers, len(buffers.names)), "int64"),
        "norms": Region((layout.blocks,), "float32"),
        "written": Region((workers, written_bytes), "uint8", reserve=False),
        "evaluation_counts": Region((evaluations, terms), "int64"),
        "evaluation_sums": Region((evaluations, terms), "float64"),
        "slots": Region((0, 0) if on_device else (nodes, layout.size), "float32"),
        "weights": Region((weight_bytes,), "uint8"),
        "buffers": Region((nodes, buffers.row_size), "float32", reserve=False),
        "integers": Region((workers, buffers.integer_layout.size), "int64", reserve=False),
    }
