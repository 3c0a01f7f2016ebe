"""Which samples make up which microbatch: a function of (seed, epoch, index), never of a worker."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import TensorDataset, default_collate

from instep.data import Collate, MapStyle, failed, sample
from instep.data.order import Groups, OrderKind, take
from instep.errors import DataError, cut, told

SHOWN_SAMPLES = 16
"""Indices of samples that a message names at most."""


@dataclass(frozen=True)
class Cursor:
    """Addresses every sample of every epoch, by step and microbatch. It has no state.

    Each epoch goes through all samples once, in an order of its own. Its last batch may be smaller than `batch`; unless
    it is dropped it is used, cut into as many microbatches as their usual size asks for, and those beyond are empty. No
    batch spans two epochs.

    Fields
    ------
    samples: length of the data set.
    batch: samples of one step.
    microbatches: pieces of each batch. Their sizes differ by at most one, empty ones aside.
    seed: the recipe's.
    ragged: "even" cuts a last batch of n samples into ceil(n / usual size) pieces; "spread" over all microbatches,
        however small the pieces become.
    drop_last: leaves the last, smaller batch of each epoch out.
    skipped: samples that are left out, wherever they come. Their batches are smaller; all others are as they were.
    order: of an epoch's samples, see `instep.data.order`.
    groups: samples that are had together, which the order "keyed" then keeps near each other.

    Raises DataError for a data set that is empty or smaller than a batch.
    """

    samples: int
    batch: int
    microbatches: int
    seed: int
    ragged: Literal["even", "spread"] = "even"
    drop_last: bool = False
    skipped: frozenset[int] = frozenset()
    order: OrderKind = "keyed"
    groups: Groups | None = None

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise DataError("the training data is empty; give at least one batch of samples.")
        if self.samples < self.batch:
            raise DataError(
                f"the training data is too small: {self.samples} samples do not fill one batch of {self.batch}; "
                f"set recipe.batch to {self.samples} or less, or give more data."
            )

    @cached_property
    def steps_per_epoch(self) -> int:
        """Steps of one epoch, the one with the smaller batch included unless it is dropped."""
        return self.samples // self.batch if self.drop_last else -(-self.samples // self.batch)

    @cached_property
    def usual_size(self) -> int:
        """Samples of each microbatch of a whole batch."""
        return self.batch // self.microbatches

    def epoch(self, step: int) -> int:
        """The epoch, from 0, that `step`, from 0, lies in."""
        return step // self.steps_per_epoch

    def size(self, step: int) -> int:
        """Samples in the batch of `step`."""
        return len(self._batch(step)) if self.skipped else len(self._span(step))

    def indices(self, step: int) -> list[int]:
        """Indices of the whole batch of `step`: its microbatches, one after the other."""
        return _listed(self._batch(step))

    def microbatch(self, step: int, index: int) -> list[int]:
        """Indices of microbatch `index`, from 0, of `step`. Empty where a small batch does not reach all."""
        return _listed(self.microbatch_tensor(step, index))

    def microbatch_tensor(self, step: int, index: int) -> Tensor:
        """The same as a tensor ([samples of it], int64)."""
        part = self._part(step, index)
        return self._batch(step)[part.start : part.stop] if self.skipped else self._take(step, part)

    def microbatch_size(self, step: int, index: int) -> int:
        """How many they are."""
        return len(self._part(step, index))

    def _part(self, step: int, index: int) -> range:
        span = range(self.size(step)) if self.skipped else self._span(step)
        if not span:
            return span
        pieces = self.microbatches if self.ragged == "spread" else -(-len(span) // self.usual_size)
        index = min(index, pieces)  # those beyond begin and end where the batch does
        return span[len(span) * index // pieces : len(span) * min(index + 1, pieces) // pieces]

    def _span(self, step: int) -> range:
        start = step % self.steps_per_epoch * self.batch
        return range(start, min(start + self.batch, self.samples))

    def _batch(self, step: int) -> Tensor:
        whole = self._take(step, self._span(step))
        return whole[~torch.isin(whole, torch.tensor(sorted(self.skipped)))] if self.skipped else whole

    def _take(self, step: int, span: range) -> Tensor:
        return take(self.order, self.samples, self.seed, self.epoch(step), span, self.groups)


def _listed(indices: Tensor) -> list[int]:
    found: list[int] = indices.tolist()
    return found


def samples_in_words(indices: Sequence[int]) -> str:
    """Samples for a message: "samples 3, 17 and 204"."""
    shown = [f"{index}" for index in indices[:SHOWN_SAMPLES]]
    if len(indices) > len(shown):
        shown.append(f"{len(indices) - len(shown)} more")
    listed = " and ".join(filter(None, [", ".join(shown[:-1]), *shown[-1:]]))
    return f"sample{'' if len(indices) == 1 else 's'} {listed}"


def load(
    samples: MapStyle,
    indices: Sequence[int],
    collate: Collate | None = None,
    reading: Callable[[int], None] = lambda index: None,
) -> Any:
    """The batch of samples `indices`, at least one, in this order. reading: is called with each before it is read, with
    -1 where several are read at once. Raises DataError where the data set fails.
    """
    tensors = rows_of(samples, collate)
    if tensors is not None:
        return take_rows(tensors, torch.tensor(indices))
    fetched = fetch(samples, indices, reading)
    reading(-1)
    try:
        return (default_collate if collate is None else collate)(fetched)
    except Exception as error:
        raise DataError(
            f"{samples_in_words(indices)} cannot be put into one batch ({told(error)}){_odd_ones(fetched, indices)}; "
            f"all samples must be alike, or recipe.data have a 'collate' that takes them."
        ) from error


def _odd_ones(fetched: Sequence[Any], indices: Sequence[int]) -> str:
    """In words, which samples are of another kind or shape than most."""
    kinds = [cut(pytree.tree_map(_kind, each)).replace("'", "") for each in fetched]
    usual = max(kinds, key=kinds.count)
    odd = [index for index, kind in zip(indices, kinds, strict=True) if kind != usual]
    if not odd:
        return ""
    return f", for sample {odd[0]} is {kinds[list(indices).index(odd[0])]}, and most are {usual}"


def _kind(leaf: Any) -> str:
    return type(leaf).__name__ + (f"{list(leaf.shape)}" if isinstance(leaf, Tensor) else "")


def fetch(samples: MapStyle, indices: Sequence[int], reading: Callable[[int], None] = lambda index: None) -> list[Any]:
    """The samples themselves, in this order. reading: as for `load`. Raises DataError where the data set fails."""
    together = getattr(samples, "__getitems__", None)
    if not callable(together):
        fetched = []
        for index in indices:
            reading(index)
            fetched.append(sample(samples, index))
        return fetched
    try:
        return list(together(list(indices)))
    except Exception as error:
        raise failed(samples, f"samples {list(indices)}", error) from error


def rows_of(samples: MapStyle, collate: Collate | None) -> tuple[Tensor, ...] | None:
    """The tensors whose rows make up the samples, collated by default; None for all but a plain TensorDataset."""
    if collate is not None or type(samples) is not TensorDataset:
        return None
    for tensor in samples.tensors:
        if not (type(tensor) is Tensor and tensor.layout is torch.strided and tensor.is_cpu and tensor.is_contiguous()):
            return None
    return samples.tensors


def take_rows(tensors: Sequence[Tensor], indices: Tensor) -> list[Tensor]:
    """What the default collate makes of these samples: each tensor's rows at `indices` (int64), [N, ...]."""
    return [tensor.index_select(0, indices) for tensor in tensors]


def held_out_batches(samples: int, size: int) -> list[range]:
    """Indices 0 to `samples` in order, `size` at a time; the last batch may be smaller."""
    return [range(start, min(start + size, samples)) for start in range(0, samples, size)]
