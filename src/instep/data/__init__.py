"""What is trained on: map-style data sets, addressed by index alone. `instep.data.cursor` says which index is when."""

from __future__ import annotations

import hashlib
import inspect
import pickle
from collections.abc import Callable, Collection, Mapping, Sized
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset, IterableDataset

from instep.components import Component
from instep.data import foreign
from instep.errors import DataError, described
from instep.randomness import seed_all
from instep.restore import kept_random_state

Collate = Callable[[list[Any]], Any]

SHOWN_SAMPLES = 8
"""How many samples at each end of a data set its fingerprint looks at."""


class MapStyle(Protocol):
    """A data set with a length whose samples are had by index, as `torch.utils.data.Dataset`.

    Where it has ``__getitems__(indices) -> list of samples``, a microbatch is fetched by one call of it. Where it has
    ``digest``, text that changes whenever its content does, the run's record holds that.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class Codec(Protocol):
    """Between text and tokens. It makes a data set one of text: bits per byte and a sample are then reported."""

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text that one token stands for, on average."""
        ...

    def encode(self, text: str, /) -> list[int]: ...

    def decode(self, tokens: list[int], /) -> str: ...


@dataclass(frozen=True)
class Data:
    """Data sets and how to read them.

    Fields
    ------
    train: what is trained on.
    held_out: what the objective is evaluated on; None for no evaluation.
    collate: makes a batch of a list of samples; None takes `torch.utils.data.default_collate`.
    codec: for text, see `Codec`.

    Raises DataError for a data set that is empty or not map-style.
    """

    train: MapStyle
    held_out: MapStyle | None = None
    collate: Collate | None = None
    codec: Codec | None = None

    def __post_init__(self) -> None:
        _check(self.train, "training")
        if self.held_out is not None:
            _check(self.held_out, "held-out")


def as_data(value: Any) -> Data:
    """`value` as `Data`: one already, a pair (training, held out), or a map-style data set. Raises DataError.

    A list of data sets, as `torch.utils.data.random_split` gives it, is taken for a tuple.
    """
    if isinstance(value, Data):
        return value
    if isinstance(value, list) and value and all(isinstance(part, Dataset) for part in value):
        value = tuple(value)
    if isinstance(value, tuple):
        if len(value) != 2:
            raise DataError(f"the data is a tuple of {len(value)}; give a pair, (training, held out), or one data set.")
        if all(isinstance(part, (Tensor, np.ndarray)) for part in value):
            raise DataError(
                "the data is a pair of arrays, which could be inputs and targets or training and held-out data; "
                "give torch.utils.data.TensorDataset(inputs, targets), or instep.Data(train=..., held_out=...)."
            )
        return Data(*value)
    return Data(value)


def from_component(component: Component) -> Data:
    """The data that a recipe names: a function or class is called with its arguments, a data set is taken as it is.

    Raises ComponentError and DataError.
    """
    target = component.load()
    return as_data(component.built() if component.args or makes_data(target) else target)


def makes_data(target: Any) -> bool:
    """Whether it is to be called for a data set, and is none."""
    return inspect.isclass(target) or (callable(target) and not indexed(target))


def digest(data: Data) -> str:
    """SHA-256, in hexadecimal, that tells whether two runs had the same data.

    It covers each data set's own ``digest``, where it has one. Else it is a fingerprint, cheap and not a proof: the
    length and the first and last 8 samples, read with fixed random seeds. Raises DataError where reading fails.
    """
    return digest_without(data, frozenset())[0]


def digest_without(data: Data, left_out: Collection[int]) -> tuple[str, list[int]]:
    """As `digest`, and which of the training samples `left_out` it would cover but cannot: they fail to be read."""
    sha, unread = hashlib.sha256(), list[int]()
    for name, samples, may_fail in (("train", data.train, left_out), ("held_out", data.held_out, ())):
        if samples is not None:
            sha.update(f"{name} {len(samples)} {_digest(samples, may_fail, unread)}\n".encode())
    return sha.hexdigest(), unread


def fingerprint(samples: MapStyle) -> str:
    """Of a data set, as `digest` has it."""
    return _digest(samples, (), [])


def _digest(samples: MapStyle, may_fail: Collection[int], unread: list[int]) -> str:
    own = getattr(samples, "digest", None)
    if isinstance(own, str):
        return own
    count = len(samples)
    sha = hashlib.sha256()
    with kept_random_state():
        for index in sorted({*range(min(count, SHOWN_SAMPLES)), *range(max(0, count - SHOWN_SAMPLES), count)}):
            seed_all(index)
            try:
                content = sample(samples, index)
            except DataError:
                if index not in may_fail:
                    raise
                unread.append(index)
                continue
            leaves, structure = pytree.tree_flatten(content)
            sha.update(str(structure).encode())
            for leaf in leaves:
                sha.update(_leaf_bytes(leaf))
    return sha.hexdigest()


def _leaf_bytes(leaf: Any) -> bytes:
    if isinstance(leaf, Tensor) and leaf.layout == torch.strided:
        flat = leaf.detach().cpu().contiguous().reshape(-1)
        return f"{leaf.dtype}{list(leaf.shape)}".encode() + flat.view(torch.uint8).numpy().tobytes()
    if isinstance(leaf, np.ndarray) and leaf.dtype != object:
        return f"{leaf.dtype}{list(leaf.shape)}".encode() + leaf.tobytes()
    try:
        return pickle.dumps(leaf, protocol=4)
    except Exception:  # what cannot be pickled is known by its type alone
        return type(leaf).__qualname__.encode()


def sample(samples: MapStyle, index: int) -> Any:
    """Sample `index`. Raises DataError where the data set fails."""
    try:
        return samples[index]
    except Exception as error:
        raise failed(samples, f"sample {index}", error) from error


def failed(samples: MapStyle, what: str, error: Exception) -> DataError:
    """The error for a data set that raised `error` on `what`."""
    whose = f"the data set {type(samples).__name__} of {len(samples)} samples failed to give {what}"
    if isinstance(error, DataError):
        return DataError(f"{whose}: {error.message}")
    return DataError(f"{whose} ({described(error)}); every index from 0 to its length must give a sample.")


def _check(value: Any, name: str) -> None:
    if isinstance(value, DataLoader):
        raise DataError(f"the {name} data is a DataLoader; give its data set, since Instep makes the batches itself.")
    if not indexed(value) or not isinstance(value, Sized):
        raise DataError(
            f"the {name} data is of type {type(value).__name__}, which has no length or no samples by index; "
            f"{foreign.way(value)}."
        )
    if len(value) == 0:
        raise DataError(f"the {name} data is empty; give at least one sample.")
    if isinstance(value, Mapping) and 0 not in value:
        keys = ", ".join(map(repr, list(value)[:5]))
        raise DataError(
            f"the {name} data is a {type(value).__name__} with the keys {keys}, which has no samples by index; give a "
            f"map-style data set, or a pair (training, held out) of such."
        )


def indexed(value: Any) -> bool:
    """Whether it may be a data set. An iterable one of torch's is where it has samples by index all the same."""
    if isinstance(value, IterableDataset) and type(value).__getitem__ is Dataset.__getitem__:
        return False
    return hasattr(value, "__getitem__") and not inspect.isclass(value) and not isinstance(value, (str, bytes))
