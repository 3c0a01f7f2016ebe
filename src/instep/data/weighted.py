"""Samples drawn by weight, each at most once an epoch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from instep.data import Data, MapStyle, as_data, fingerprint, makes_data
from instep.data.cursor import Cursor, fetch
from instep.data.order import hashed
from instep.errors import DataError, described
from instep.randomness import key

_BYTES = 16
"""What is held of a sample: its weight, and its place in the orders of two epochs."""

_CHUNK = 1 << 20

_LOG_2 = 0.6931471805599453


class Weighted(Dataset[Any]):
    """A map-style data set of whose samples an epoch draws so many, `draws`, by weight and without replacement.

    weights: of each sample ([N]), from 0; of those that are left, each draw takes one with a chance in proportion to
    its weight. It holds 16 bytes a sample, and 16 more while an epoch is drawn. Raises DataError for other weights, and
    where they are more than `index_bytes`.
    """

    def __init__(self, samples: MapStyle, weights: Any, draws: int, *, index_bytes: int = 10**9) -> None:
        count = len(samples)
        if count * _BYTES > index_bytes:
            raise DataError(
                f"drawing by weight holds {_BYTES} bytes a sample, {count * _BYTES:,} for {count:,} of them, and "
                f"'index_bytes' is {index_bytes:,}; put samples of about one weight into a data set each and mix these "
                f"by instep.data.mixture, or raise it."
            )
        self.samples, self.draws = samples, draws
        self.weights = _checked(weights, count)
        drawable = int(np.count_nonzero(self.weights))
        if not 1 <= draws <= drawable:
            raise DataError(
                f"an epoch is to draw {draws:,} samples, each at most once, and {drawable:,} have a weight above 0; "
                f"'draws' must be from 1 to that."
            )
        self._drawn: dict[tuple[int, int], Tensor] = {}

    @cached_property
    def digest(self) -> str:
        """SHA-256, in hexadecimal, of the weights, the draws and the digest of the samples, or their fingerprint."""
        weights = hashlib.sha256(self.weights.tobytes()).hexdigest()
        return hashlib.sha256(f"{fingerprint(self.samples)} {weights} {self.draws}".encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        return self.samples[index]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """Several samples, by one call where the data set has one."""
        return fetch(self.samples, indices)

    def epoch(self, seed: int, epoch: int) -> Tensor:
        """Which samples are drawn, in order ([draws], int32 where that holds them). Two are kept.

        Each sample has an exponential time at the rate of its weight, and the first are taken, which is such a draw
        (Efraimidis and Spirakis, "Weighted random sampling with a reservoir", 2006).
        """
        found = self._drawn.get((seed, epoch))
        if found is None:
            for old in list(self._drawn)[:-1]:  # this epoch stays while the next one is loaded ahead
                self._drawn.pop(old, None)  # another thread may have been here
            times = np.empty(len(self.weights))
            keyed = np.uint64(key(seed, epoch, "by weight"))
            for start in range(0, len(times), _CHUNK):
                part = slice(start, min(start + _CHUNK, len(times)))
                whole = (hashed(np.arange(part.start, part.stop), keyed) >> np.uint64(11)).astype(np.float64)
                uniform: NDArray[np.float64] = (whole + 0.5) * 2.0**-53
                with np.errstate(divide="ignore"):
                    times[part] = -logarithm(uniform) / self.weights[part]
            order = np.argsort(times, kind="stable")[: self.draws]
            found = torch.from_numpy(order.astype(np.int32 if len(times) < 1 << 31 else np.int64))
            self._drawn[seed, epoch] = found
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_drawn": {}}


def logarithm(numbers: NDArray[np.float64]) -> NDArray[np.float64]:
    """The natural one of positive numbers, within some units of the last place, the same to the bit on any processor,
    which numpy's own is not: only operations that IEEE 754 rounds in one way.
    """
    part, exponent = np.frexp(numbers)
    low = part < 0.7071
    part, exponent = np.where(low, 2 * part, part), exponent - low
    ratio = (part - 1) / (part + 1)  # log(part) is twice its area tangent
    square, series = ratio * ratio, np.zeros_like(ratio)
    for odd in range(21, 0, -2):
        series = series * square + 1 / odd
    found: NDArray[np.float64] = exponent * _LOG_2 + 2 * ratio * series
    return found


def _checked(weights: Any, count: int) -> NDArray[np.float64]:
    if isinstance(weights, (str, Path)):
        try:
            weights = np.load(Path(weights).expanduser(), allow_pickle=False)
        except (OSError, ValueError) as error:
            raise DataError(
                f"the weights cannot be read from {weights} ({described(error)}); give an array of numpy.save's."
            ) from error
    found = np.array(weights, dtype=np.float64)
    if found.shape != (count,):
        raise DataError(
            f"the weights have the shape {list(found.shape)}, and there are {count:,} samples; give one for each."
        )
    if bad := np.flatnonzero(~(np.isfinite(found) & (found >= 0))).tolist():
        raise DataError(f"the weight of sample {bad[0]} is {found[bad[0]]}; weights are numbers from 0.")
    return found


def weighted(data: Any, weights: Any, draws: int, *, index_bytes: int = 10**9) -> Data:
    """Data that train on a `Weighted` of `data`: a data set, a pair (training, held out), `Data`, or what gives such.

    weights: an array, or the path of one of `numpy.save`. Raises DataError as `Weighted`.
    """
    given = as_data(data() if makes_data(data) else data)
    return Data(
        Weighted(given.train, weights, draws, index_bytes=index_bytes), given.held_out, given.collate, given.codec
    )


@dataclass(frozen=True)
class WeightedCursor(Cursor):
    """A cursor each of whose epochs draws from `weighted`; `samples` are its draws."""

    weighted: Weighted | None = None

    def _take(self, step: int, span: range) -> Tensor:
        assert self.weighted is not None
        return self.weighted.epoch(self.seed, self.epoch(step))[span.start : span.stop].long()
