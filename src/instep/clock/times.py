"""How long workers take: distributions of times, slow workers, failures."""

from __future__ import annotations

import itertools
import math
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import NormalDist
from typing import Any, Literal, TypedDict, Unpack

import numpy as np
from numpy.typing import NDArray

from instep.clock.slow import Slow, slow_factors
from instep.clock.units import duration_s, number
from instep.errors import RecipeError, RecordError, shown

_CHUNK = 128
"""Numbers that a worker draws at once."""

_NORMAL = NormalDist()

_FORMS = "'100ms', 'normal:100ms,20ms' or 'lognormal:100ms,20ms' (mean, standard deviation), or 'bootstrap:FILE'"


@dataclass(frozen=True)
class Failures:
    """A worker fails `mean_time_between_s` after it came, on average (exponentially), and is back `restart_s` later."""

    mean_time_between_s: float
    restart_s: float

    def __post_init__(self) -> None:
        mean_s, restart_s = number(self.mean_time_between_s), number(self.restart_s)
        if not 0 < mean_s < math.inf:
            raise RecipeError(f"the mean time between failures is {mean_s:g} s; it must be above 0 and finite.")
        if not 0 <= restart_s < math.inf:
            raise RecipeError(f"the restart after a failure takes {restart_s:g} s; it must be a finite time from 0.")


class _Rest(TypedDict, total=False):
    """What every kind of `WorkerTimes` may be given."""

    slow: tuple[Slow, ...]
    failures: Failures | None
    seed: int


class _Varying(_Rest, total=False):
    """And those that vary."""

    persistence: float


@dataclass(frozen=True, kw_only=True)
class WorkerTimes:
    """Seconds that a worker needs for one microbatch; one number is drawn for each contribution.

    Make one with `constant`, `normal`, `lognormal`, `bootstrap` or `from_text`.

    Fields
    ------
    mean_s, deviation_s: of the distribution; of a normal one before it is cut off at 0.
    samples_s: for "bootstrap": the times that are drawn from, each equally likely.
    persistence: from 0, every contribution draws anew, to 1, a worker keeps what it drew at its start. A worker's
        times are the quantiles of a Gaussian series z with z' = p z + sqrt(1 - p^2) e, e standard normal (AR(1), with
        correlation p between neighbours): whatever p is, the times of many workers have the same distribution.
    slow: workers that take a multiple of that.
    failures: None for none.
    seed: a worker's times and failures are functions of (seed, worker), whoever else there is and whatever happens.

    Raises RecipeError.
    """

    distribution: Literal["constant", "normal", "lognormal", "bootstrap"] = "constant"
    mean_s: float = 0.0
    deviation_s: float = 0.0
    samples_s: tuple[float, ...] = field(default=(), repr=False)
    persistence: float = 0.0
    slow: tuple[Slow, ...] = ()
    failures: Failures | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= number(self.persistence) <= 1:
            raise RecipeError(
                f"the persistence is {number(self.persistence):g}; it must be from 0 (times are drawn anew for every "
                f"contribution) to 1 (a worker keeps its own)."
            )
        mean_s, deviation_s = number(self.mean_s), number(self.deviation_s)
        if self.distribution == "bootstrap":
            if not self.samples_s:
                raise RecipeError("there are no times to draw from; give at least one.")
            for time_s in map(number, self.samples_s):
                if not 0 < time_s < math.inf:
                    raise RecipeError(f"{time_s:g} s is among the times to draw from; they must be above 0 and finite.")
        elif not 0 < mean_s < math.inf:
            raise RecipeError(f"the mean time of a microbatch is {mean_s:g} s; it must be above 0 and finite.")
        if not 0 <= deviation_s < math.inf:
            raise RecipeError(f"the standard deviation of times is {deviation_s:g} s; it must be finite, from 0.")
        if type(self.seed) is not int:
            raise RecipeError(f"the seed of the worker times is {shown(self.seed)}; it must be a whole number.")

    @classmethod
    def constant(cls, time_s: float, **rest: Unpack[_Rest]) -> WorkerTimes:
        """Always the same."""
        return cls(distribution="constant", mean_s=time_s, **rest)

    @classmethod
    def normal(cls, mean_s: float, deviation_s: float, **rest: Unpack[_Varying]) -> WorkerTimes:
        """The normal distribution of this mean and standard deviation, given that it is above 0."""
        return cls(distribution="normal", mean_s=mean_s, deviation_s=deviation_s, **rest)

    @classmethod
    def lognormal(cls, mean_s: float, deviation_s: float, **rest: Unpack[_Varying]) -> WorkerTimes:
        """The lognormal distribution that itself has this mean and standard deviation."""
        return cls(distribution="lognormal", mean_s=mean_s, deviation_s=deviation_s, **rest)

    @classmethod
    def bootstrap(cls, samples: Iterable[float] | Path, **rest: Unpack[_Varying]) -> WorkerTimes:
        """Times seen before, in seconds: a list, or a file of numbers with spaces, commas or line ends between them."""
        samples_s = _read(samples) if isinstance(samples, Path) else tuple(float(time_s) for time_s in samples)
        return cls(distribution="bootstrap", samples_s=samples_s, **rest)

    @classmethod
    def from_text(
        cls,
        text: str,
        *,
        persistence: float = 0.0,
        slow: tuple[Slow, ...] = (),
        failures: Failures | None = None,
        seed: int = 0,
    ) -> WorkerTimes:
        """As on a command line: "100ms", "normal:100ms,20ms", "lognormal:100ms,20ms" or "bootstrap:FILE"."""
        kind, colon, rest = (part.strip() for part in text.partition(":"))
        if not colon:
            kind, rest = "constant", text
        if kind == "bootstrap":
            return cls.bootstrap(Path(rest), persistence=persistence, slow=slow, failures=failures, seed=seed)
        if kind not in ("constant", "normal", "lognormal") or rest.count(",") != (kind != "constant"):
            raise RecipeError(f"{shown(text)} are no worker times; write {_FORMS}.")
        mean_s, *deviation_s = (
            duration_s(part, f"{shown(part.strip())} in the worker times") for part in rest.split(",")
        )
        if kind == "constant":
            return cls.constant(mean_s, slow=slow, failures=failures, seed=seed)
        make = cls.normal if kind == "normal" else cls.lognormal
        return make(mean_s, deviation_s[0], persistence=persistence, slow=slow, failures=failures, seed=seed)

    def draws(self, workers: int) -> Callable[[int], float]:
        """A function from a worker to the seconds a microbatch of its next contribution, `slow` included.

        Raises RecipeError, see `slow_factors`.
        """
        factors = slow_factors(self.slow, workers)
        if self.distribution == "constant" or (self.deviation_s == 0 and self.distribution != "bootstrap"):
            always: list[float] = (self.mean_s * factors).tolist()
            return always.__getitem__
        generators = [self._generator(worker, 0) for worker in range(workers)]
        z = array("d", [generator.standard_normal() for generator in generators])  # what each worker draws next
        # One flat table of C doubles, [_CHUNK, workers], since workers are about equally far: at 10,000 workers, what
        # is not in the cache is what takes time. The first numbers of all are made at once, later ones by worker.
        quantiles, table = self._quantiles(), array("d")
        innovations = np.stack([generator.standard_normal(_CHUNK) for generator in generators], axis=1)
        *series, last = self._series(np.array(z), innovations)
        for values in series:
            table.frombytes((quantiles(values) * factors).tobytes())
        z = array("d", last.tobytes())
        places, end = array("q", range(workers)), len(table)

        def draw(worker: int) -> float:
            place = places[worker]
            if place >= end:
                *series, z[worker] = self._series(z[worker], generators[worker].standard_normal(_CHUNK).tolist())
                table[worker::workers] = array("d", (quantiles(np.array(series)) * factors[worker]).tobytes())
                place = worker
            places[worker] = place + workers
            return table[place]

        return draw

    def uptimes(self, worker: int) -> Iterator[float]:
        """Without end: seconds from a worker's coming to its failure, if it has `failures`."""
        if self.failures is None:
            return
        generator = self._generator(worker, 1)
        while True:
            yield self.failures.mean_time_between_s * generator.standard_exponential()

    def _generator(self, worker: int, purpose: int) -> np.random.Generator:
        return np.random.default_rng(np.random.SeedSequence(self.seed % (1 << 64), spawn_key=(worker, purpose)))

    def _series(self, z: Any, innovations: Iterable[Any]) -> Iterator[Any]:
        """z and what follows on it by each innovation: of one worker (floats) or of several (arrays)."""
        keep, renew = self.persistence, math.sqrt(1 - self.persistence**2)
        yield z
        for e in innovations:
            z = keep * z + renew * e
            yield z

    def _quantiles(self) -> Callable[[NDArray[np.float64]], NDArray[np.float64]]:
        """A function from standard normal numbers to those of the distribution at the same quantiles."""
        mean, deviation = self.mean_s, self.deviation_s
        if self.distribution == "lognormal":
            variance = math.log1p((deviation / mean) ** 2)
            location, scale = math.log(mean) - variance / 2, math.sqrt(variance)
            return lambda z: np.exp(location + scale * z)
        erfc, half = math.erfc, -math.sqrt(0.5)
        if self.distribution == "bootstrap":
            ordered, count = sorted(self.samples_s), len(self.samples_s)
            return lambda z: np.array([ordered[min(int(count * 0.5 * erfc(half * v)), count - 1)] for v in z.tolist()])
        # Cut off at 0, from above: of a time's probability of being exceeded, what the cut leaves of the whole.
        whole, inverse = 0.5 * erfc(half * mean / deviation), _NORMAL.inv_cdf
        almost_one, least = 1 - 2**-53, mean * 1e-9
        return lambda z: np.array(
            [max(least, mean - deviation * inverse(min(whole * 0.5 * erfc(-half * v), almost_one))) for v in z.tolist()]
        )


def _read(path: Path) -> tuple[float, ...]:
    """The numbers in a file."""
    try:
        words = path.read_text().replace(",", " ").split()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        raise RecipeError(
            f"the file of times {path} cannot be read: {why}; name a file of numbers, in seconds."
        ) from error
    times_s = []
    for word in words:
        try:
            times_s.append(float(word))
        except ValueError:
            raise RecipeError(
                f"{shown(word)} in the file of times {path} is no number; put times in seconds there."
            ) from None
    if not times_s:
        raise RecipeError(f"the file of times {path} is empty; put times in seconds there, at least one.")
    return tuple(times_s)


@dataclass(frozen=True)
class RecordedTimes:
    """Seconds a microbatch, by worker, in the order in which they were measured; worn out, a list starts anew."""

    by_worker: tuple[tuple[float, ...], ...]
    failures: None = None

    @classmethod
    def of(cls, found: Mapping[int, Sequence[float]], workers: int) -> RecordedTimes:
        """From times by worker. Raises RecordError where a worker has none."""
        missing = [worker for worker in range(workers) if not found.get(worker)]
        if missing:
            raise RecordError(
                f"the tape has no time of worker {missing[0]}, who pushed nothing in that run; its arrivals under "
                f"another rule cannot be told."
            )
        return cls(tuple(tuple(found[worker]) for worker in range(workers)))

    def draws(self, workers: int) -> Callable[[int], float]:
        """A function from a worker to the seconds a microbatch of its next contribution."""
        series = [itertools.cycle(times) for times in self.by_worker[:workers]]
        return lambda worker: next(series[worker])

    def uptimes(self, worker: int) -> Iterator[float]:
        """Nothing: nobody fails."""
        return iter(())
