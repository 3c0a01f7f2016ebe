"""Whether samples depend on their index and the seeded generators alone, so that they are alike for any team.

A data set or collate function that draws from a generator of its own gives other samples to another number of workers,
after a resume, and in a replay. It is seen by reading the same samples twice with the same seeds.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from instep.data import SHOWN_SAMPLES, Collate, Data, MapStyle, foreign
from instep.data.cursor import Cursor, fetch, load, rows_of
from instep.data.signature import signature
from instep.errors import DataError
from instep.randomness import key, seed_all
from instep.restore import kept_random_state

DRAWN = 8
"""Samples from anywhere that are read twice too."""

SLOW_S = 10.0
"""Seconds that reading these may take; else they are left out."""

_OBJECTS = 2000
"""How many objects are looked at, at most, in search of a generator."""


def check_repeats(data: Data, cursor: Cursor, seed: int) -> tuple[Any | None, str]:
    """Raises DataError, naming the data set or the collate function, where samples do not repeat.

    Step 0's first microbatch, 8 samples drawn from `seed` and the first of the held-out ones are each read twice in one
    order with one seed, and what the collate makes of them is compared by bits. The random state is left as it was.
    Returns that microbatch, where its samples came from a data set's own code, and a sentence to warn with, or "".
    """
    with kept_random_state():
        batch, per_sample_s = None, 0.0
        if rows_of(data.train, data.collate) is None:
            began = time.monotonic()
            first = cursor.microbatch(0, 0)
            batch = _read_twice(data.train, first, data.collate, key(seed, 0, 0, "data"))
            per_sample_s = (time.monotonic() - began) / (2 * len(first))
        others: list[tuple[MapStyle, list[int]]] = []
        if batch is not None:
            chance = random.Random(key(seed, "repeats"))
            drawn = [chance.randrange(cursor.samples) for _ in range(DRAWN)]
            size = cursor.usual_size
            others += [(data.train, drawn[i : i + size]) for i in range(0, DRAWN, size)]
        if data.held_out is not None and rows_of(data.held_out, data.collate) is None:
            others.append((data.held_out, list(range(min(len(data.held_out), DRAWN, cursor.usual_size)))))
        if 2 * sum(len(indices) for _, indices in others) * per_sample_s > SLOW_S:
            return batch, (
                f"a sample of the data set {_name(data.train)} takes {per_sample_s:.2g} s, so that only "
                f"{len(first)} were read twice to see whether they depend on the index and the seeds alone; a data set "
                f"that reads from files made ready beforehand is quicker."
            )
        for samples, indices in others:
            _read_twice(samples, indices, data.collate, key(seed, "repeats", len(samples)), let_fail=True)
    return batch, foreign.doubt(data.train, data.collate)


def what_does_not_repeat(data: Data) -> str:
    """A sentence on the first and last samples of the training or held-out data that do not repeat, or ""."""
    with kept_random_state():
        for samples in (data.train, data.held_out):
            if samples is not None:
                count = len(samples)
                ends = sorted({*range(min(count, SHOWN_SAMPLES)), *range(max(0, count - SHOWN_SAMPLES), count)})
                if (found := _first_other(samples, ends, 0)) is not None:
                    return _about_data_set(samples, found)
    return ""


def _read_twice(
    samples: MapStyle, indices: Sequence[int], collate: Collate | None, seed: int, *, let_fail: bool = False
) -> Any:
    """The batch, read a second time; None where `let_fail` and it cannot be read: training may never come there."""
    signatures = []
    for _ in range(2):
        seed_all(seed)
        try:
            batch = load(samples, indices, collate)
        except Exception:
            if let_fail:
                return None
            raise
        signatures.append(signature(batch))  # at once: what is read later may be this very object, changed
    if signatures[0] != signatures[1]:
        other = _first_other(samples, indices, seed)
        if other is None and collate is not None:
            again = partial(load, samples, indices, collate)
            raise DataError(
                _about(f"the collate function {_name(collate)}", "batch of the same samples", collate, again)
            )
        raise DataError(_about_data_set(samples, indices[0] if other is None else other))
    return batch


def _first_other(samples: MapStyle, indices: Sequence[int], seed: int) -> int | None:
    """The first of `indices` whose sample is another when it is read again."""
    found = []
    for _ in range(2):
        seed_all(seed)
        found.append([signature(sample) for sample in fetch(samples, indices)])
    return next((index for index, *pair in zip(indices, *found, strict=True) if pair[0] != pair[1]), None)


def _about_data_set(samples: MapStyle, index: int) -> str:
    again = partial(fetch, samples, [index])
    return _about(f"the data set {_name(samples)}", f"sample {index}", samples, again)


def _about(what: str, answer: str, owner: Any, again: Callable[[], Any]) -> str:
    """The sentence. `again` asks once more: a generator in `owner` that moves meanwhile is what it draws from."""
    generators = _generators_in(owner)
    before = [_state(generator) for _, generator in generators]
    again()
    moved = [path for (path, generator), state in zip(generators, before, strict=True) if _state(generator) != state]
    why = "it keeps state, or draws from elsewhere"
    if moved:
        kind = type(dict(generators)[moved[0]])
        why = f"it draws from a generator of its own ('{moved[0]}', of {kind.__module__.split('.')[0]})"
    return (
        f"{what} gives another {answer} when asked again after the same seeds for torch, numpy and random: {why}, so "
        f"that other teams, resumes and replays would train on other samples; draw from torch's, numpy's or Python's "
        f"global generators, which are seeded for each microbatch, or seed its own from one of them each time."
    )


def _name(value: Any) -> str:
    name = getattr(value, "__qualname__", None) or type(value).__qualname__
    return str(name)


def _state(generator: Any) -> str:
    state = next(
        state() if callable(state) else state.state
        for name in ("getstate", "get_state", "bit_generator")
        if (state := getattr(generator, name, None)) is not None
    )
    return signature(state)


def _generators_in(root: Any) -> list[tuple[str, Any]]:
    """Generators in `root`, at any depth: where, such as "transform.rng", and which. Not the global ones."""
    seen: set[int] = {id(random._inst), id(np.random.mtrand._rand), id(torch.default_generator)}
    queue: list[tuple[str, Any]] = [("", root)]
    generators: list[tuple[str, Any]] = []
    for place, (path, value) in enumerate(queue):  # which grows meanwhile
        if id(value) in seen or place > _OBJECTS:
            continue
        seen.add(id(value))
        if isinstance(value, (np.random.Generator, np.random.RandomState, random.Random, torch.Generator)):
            generators.append((path, value))
        else:
            queue += [(f"{path}.{name}".lstrip("."), part) for name, part in _parts(value)[:_OBJECTS]]
    return generators


def _parts(value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, (str, bytes, int, float, torch.Tensor, np.ndarray, type)):
        return []
    if isinstance(value, dict):
        return [(str(name), part) for name, part in list(value.items())]
    if isinstance(value, (list, tuple)):
        return [(str(place), part) for place, part in enumerate(value)]
    parts = list(getattr(value, "__dict__", {}).items())
    closure, code = getattr(value, "__closure__", None), getattr(value, "__code__", None)
    if closure and code:
        for name, cell in zip(code.co_freevars, closure, strict=True):
            try:
                parts.append((name, cell.cell_contents))
            except ValueError:  # not yet filled
                continue
    held = ("func", "args", "keywords", "__self__")  # of a partial and a method
    return parts + [(name.strip("_"), part) for name in held if (part := getattr(value, name, None)) is not None]
