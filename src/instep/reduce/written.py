"""Parameters that a model's own forwards write: `nn.Embedding`'s max_norm, weights that a layer normalises in place.

Every microbatch of a step starts from the step's weights. Afterwards an element that microbatches changed takes the
value that they left, on which all that changed it must agree bit for bit, and the update goes on from there. So the
result is one for any number of workers, as with buffers. Frozen parameters are written alike.

For that, who computes must know what is written: `WrittenParameters.probing` finds it in first forwards, and
`WrittenParameters.check`, by the count of changes that torch keeps and now and then by the bits, in all later ones.
What is found late ends the step before anything comes of it (`FirstWrite`), and its parameters are known from then on.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from instep.bits import INTEGERS, bits_of, same_bits
from instep.errors import RecipeError
from instep.reduce.checksums import checksum
from instep.reduce.layout import ALIGN_BYTES, placed

_version = operator.attrgetter("_version")  # of all parameters in every forward: the quickest way


class FirstWrite(Exception):
    """A forward wrote parameters that were not known to be written, so that what was computed is of no use.

    names: of them. where: what was being done, such as "step 50".
    """

    def __init__(self, names: Collection[str], where: str):
        super().__init__(f"{', '.join(map(repr, names))} in {where}")
        self.names, self.where = tuple(names), where


class WrittenElements(NamedTuple):
    """What forwards left in a parameter. All have its shape; bits are integers of its elements' size.

    mask: the elements that were changed, bool. new: what they hold now, bits; old: what they held before.
    """

    mask: Tensor
    new: Tensor
    old: Tensor

    def applied_to(self, value: Tensor) -> Tensor:
        """A copy of `value` with the new elements in their places."""
        made = value.clone()
        bits_of(made).copy_(torch.where(self.mask, self.new, bits_of(made)))
        return made


class Trace(NamedTuple):
    """What tells whether parameters were changed: in place, replaced, or (sums, where asked for) past autograd."""

    versions: list[int]
    places: list[int]
    sums: list[str]


class WrittenParameters:
    """One process's parameters, and what its microbatches write into those that are known to be written.

    `names` are these, in the module's order; `known` beside them at the start. What they leave travels as one row of
    `row_bytes` bytes.
    """

    def __init__(self, module: nn.Module, trained: Sequence[Tensor], known: Collection[str] = ()):
        named = list(module.named_parameters())
        self._all: dict[str, Tensor] = dict(named)
        self._trained = {id(parameter) for parameter in trained}
        self._plain = {name for name, parameter in named if _is_plain(parameter)}
        self._steps = 0
        self._left: dict[str, WrittenElements] = {}
        self._torn: set[str] = set()
        self.names: tuple[str, ...] = ()
        self._set(known)

    @property
    def trains(self) -> bool:
        """Whether one of them is trained."""
        return any(id(self._all[name]) in self._trained for name in self.names)

    @property
    def frozen(self) -> list[Tensor]:
        """Those that are not trained."""
        return [self._all[name] for name in self.names if id(self._all[name]) not in self._trained]

    def learn(self, names: Collection[str]) -> None:
        """Knows these too from now on. Raises RecipeError for a type of tensor that cannot be set back."""
        if not set(names) <= set(self.names):
            self._set({*self.names, *names})

    def agree(self, names: Collection[str], where: str) -> None:
        """Knows those that the team knows. Raises FirstWrite where this process knows of more."""
        more = [name for name in self.names if name not in names]
        if more:
            raise FirstWrite(more, where)
        self.learn(names)

    # ------------------------------------------------------------------------------------------------ finding writes

    @contextmanager
    def probing(self, *, learn: bool = True) -> Iterator[None]:
        """Around first forwards: puts back what they write and, with `learn`, knows it from then on.

        It takes a copy of the trained parameters, and of the frozen ones unless they are larger. Raises FirstWrite for
        what it has no copy of.
        """
        trained = sum(self._all[name].nbytes for name in self._plain if id(self._all[name]) in self._trained)
        frozen = sum(self._all[name].nbytes for name in self._plain if id(self._all[name]) not in self._trained)
        copied = [
            name for name in self._all
            if name in self._plain and (id(self._all[name]) in self._trained or frozen <= trained or name in self.names)
        ]  # fmt: skip
        homes = {name: self._all[name].data for name in copied}
        copies = {name: home.clone() for name, home in homes.items()}
        others = [name for name in self._all if name not in copies]
        before = _trace(*self._tensors(self._all), sums=False)
        sums = _trace(*self._tensors(others), sums=True)
        try:
            yield
        finally:
            changed = self._differing(self._all, before) | {
                name for name in copied if not same_bits(self._all[name].detach(), copies[name])
            }
            late = (changed & set(others)) | self._differing(others, sums)
            for name in changed & set(copied):
                _put_back(self._all[name], homes[name], copies[name])
        if late:
            raise FirstWrite(sorted(late), "a first forward")
        if learn:
            self.learn(changed)

    def look(self, *, closely: bool) -> Trace:
        """What `check` compares with later: free, but `closely`, when all bits are read, for writes through ``.data``,
        which torch does not count."""
        return _trace(*self._watched, sums=closely)

    def check(self, before: Trace, where: str) -> None:
        """Raises FirstWrite where others than those known were written since `look`."""
        if before != _trace(*self._watched, sums=bool(before.sums)):
            raise FirstWrite(sorted(self._differing(self._unknown, before)), where)

    @property
    def mark(self) -> tuple[int, tuple[int, ...]]:
        """Other whenever the weights may be others than before, but for what microbatches write and is put back."""
        return self._steps if self.names else 0, tuple(map(_version, self._watched[0]))

    # --------------------------------------------------------------------------------------------- one step's writes

    def begin(self) -> None:
        """Starts a step: what the known parameters hold now is what its microbatches start from."""
        self._steps += 1
        self._left, self._torn = {}, set()
        for name in self.names:
            self._kept[name].copy_(self._all[name].detach())

    def leave(self) -> None:
        """After a microbatch: notes what it changed, and puts it back."""
        for name in self.names:
            now = self._all[name].detach()
            if now.shape != self._kept[name].shape or now.dtype != self._kept[name].dtype:
                raise RecipeError(
                    f"parameter '{name}' became one of shape {list(now.shape)} and {now.dtype} in a forward, and was "
                    f"of shape {list(self._kept[name].shape)} and {self._kept[name].dtype}; a parameter must keep both."
                )
            changed = not same_bits(now, self._kept[name])
            if changed:
                self._note(name, bits_of(now))
            if changed or now.data_ptr() != self._homes[name].data_ptr():
                _put_back(self._all[name], self._homes[name], self._kept[name])

    def put_back(self) -> None:
        """Gives the known parameters what they held at the step's start."""
        for name in self.names:
            _put_back(self._all[name], self._homes[name], self._kept[name])

    def kept(self, where: str = "", *, closely: bool = False) -> _Kept:
        """Around a step's microbatches, or forwards whose writes are not wanted: what they write is put back.

        Raises FirstWrite for what was not known, if told `where`, in place of any other error: that may come of it, and
        weights so changed are not those of any version. `closely`: see `look`.
        """
        return _Kept(self, where, closely)

    def own(self, step: int) -> dict[str, WrittenElements]:
        """What this process's microbatches left, by name. Raises RecipeError where they disagree."""
        if self._torn:
            raise _disagreement(next(name for name in self.names if name in self._torn), step)
        return self._left

    def differences(self, before: Sequence[Tensor]) -> dict[str, WrittenElements]:
        """What the `frozen` ones hold now and did not in `before`, in that order; by name."""
        changes = {}
        frozen = [name for name in self.names if id(self._all[name]) not in self._trained]
        for name, earlier in zip(frozen, before, strict=True):
            new, old = bits_of(self._all[name].detach()), bits_of(earlier).to(self._all[name].device)
            if not torch.equal(new, old):
                changes[name] = WrittenElements(new != old, new, old)
        return changes

    def take(self, values: Mapping[str, Tensor]) -> None:
        """Gives parameters, by name, the values in which an update is to find them."""
        with torch.no_grad():
            for name, value in values.items():
                self._all[name].copy_(value)

    def after(self, changes: Mapping[str, WrittenElements]) -> dict[str, Tensor]:
        """The values of the parameters after `changes`."""
        return {name: change.applied_to(self._all[name].detach()) for name, change in changes.items()}

    def value(self, name: str) -> Tensor:
        """The parameter of this name, detached."""
        return self._all[name].detach()

    # --------------------------------------------------------------------------------------------------------- rows

    @property
    def wrote(self) -> bool:
        """Whether this process's microbatches left anything, or disagreed."""
        return bool(self._left or self._torn)

    def post(self, row: Tensor, changes: Mapping[str, WrittenElements] | None = None) -> None:
        """Writes what this process's microbatches left into `row` ([row_bytes], uint8, on the CPU); or `changes`."""
        for name, (flag, mask, new, old) in self._views(row).items():
            change = (self._left if changes is None else changes).get(name)
            if change is None and int(flag):  # rows are compared by their bytes
                for part in (mask, new, old):
                    part.zero_()
            flag.fill_(2 if name in self._torn else change is not None)
            if change is not None:
                mask.copy_(change.mask)
                new.copy_(change.new)
                old.copy_(change.old)

    def read(self, row: Tensor, step: int) -> dict[str, WrittenElements]:
        """The changes in `row`, by name, as views of it. Raises RecipeError where its microbatches disagreed."""
        changes = {}
        for name, (flag, mask, new, old) in self._views(row).items():
            if int(flag) == 2:
                raise _disagreement(name, step)
            if int(flag):
                device = self._all[name].device
                changes[name] = WrittenElements(mask.to(device), new.to(device), old.to(device))
        return changes

    def merged(
        self, rows: Sequence[Tensor], step: int, only: Collection[str] | None = None
    ) -> dict[str, WrittenElements]:
        """The changes of several processes that started from the same weights, in one; of `only` these parameters.

        Raises RecipeError where they disagree on an element.
        """
        if not self.names:
            return {}
        changes: dict[str, WrittenElements] = {}
        for row in rows:
            for name, change in self.read(row, step).items():
                if only is not None and name not in only:
                    continue
                joined = _join(changes.get(name), change)
                if joined is None:
                    raise _disagreement(name, step)
                changes[name] = joined
        return changes

    # ------------------------------------------------------------------------------------------------------- inside

    def _set(self, names: Collection[str]) -> None:
        for name in names:
            if name in self._all and name not in self._plain:
                raise RecipeError(
                    f"a forward writes parameter '{name}', a {type(self._all[name]).__name__}, which cannot be put "
                    f"back bit by bit; hold it as a plain torch.nn.Parameter, or write it in no forward."
                )
        self.names = tuple(name for name in self._all if name in names)
        self._unknown = [name for name in self._all if name not in self.names]
        self._watched = self._tensors(self._unknown)
        self._homes = {name: self._all[name].data for name in self.names}
        self._kept = {name: home.clone() for name, home in self._homes.items()}
        numel = [self._all[name].numel() for name in self.names]
        nbytes = [self._all[name].nbytes for name in self.names]
        parts = zip(numel, nbytes, strict=True)
        sizes = [size for count, bits in parts for size in (1, count, bits, bits)]
        self._offsets, self.row_bytes = placed(sizes, ALIGN_BYTES)

    def _views(self, row: Tensor) -> dict[str, tuple[Tensor, Tensor, Tensor, Tensor]]:
        """By name, as views of `row`: flag (0, 1 changed, 2 disagreed), mask, new and old bits."""
        views, offsets = {}, iter(self._offsets)
        for name in self.names:
            shape, count, nbytes = self._kept[name].shape, self._kept[name].numel(), self._kept[name].nbytes
            kind = INTEGERS[self._kept[name].element_size()]
            flag = row.narrow(0, next(offsets), 1)
            mask = row.narrow(0, next(offsets), count).view(torch.bool).view(shape)
            new, old = (row.narrow(0, next(offsets), nbytes).view(kind).view(shape) for _ in range(2))
            views[name] = (flag, mask, new, old)
        return views

    def _note(self, name: str, bits: Tensor) -> None:
        old = bits_of(self._kept[name])
        joined = _join(self._left.get(name), WrittenElements(bits != old, bits.clone(), old))
        if joined is None:
            self._torn.add(name)
        else:
            self._left[name] = joined

    def _tensors(self, names: Iterable[str]) -> tuple[list[Tensor], list[Tensor]]:
        """The parameters of these names, and those of them whose bits can be read."""
        return [self._all[name] for name in names], [self._all[name] for name in names if name in self._plain]

    def _differing(self, names: Iterable[str], before: Trace) -> set[str]:
        now = _trace(*self._tensors(names), sums=bool(before.sums))
        plain = [name for name in names if name in self._plain]
        found = {n for n, a, b in zip(names, before.versions, now.versions, strict=True) if a != b}
        found |= {n for n, a, b in zip(plain, before.places, now.places, strict=True) if a != b}
        return found | {n for n, a, b in zip(plain, before.sums, now.sums, strict=False) if a != b}


class _Kept:
    """`WrittenParameters.kept`, which every step enters: a generator would take twice as long."""

    def __init__(self, written: WrittenParameters, where: str, closely: bool):
        self._written, self._where, self._closely = written, where, closely

    def __enter__(self) -> None:
        self._before = self._written.look(closely=self._closely)
        self._written.begin()

    def __exit__(self, *_: object) -> None:
        self._written.put_back()
        if self._where:
            self._written.check(self._before, self._where)


def _trace(parameters: Sequence[Tensor], plain: Sequence[Tensor], *, sums: bool) -> Trace:
    return Trace(list(map(_version, parameters)), list(map(Tensor.data_ptr, plain)), checksum(plain) if sums else [])


def _join(one: WrittenElements | None, other: WrittenElements) -> WrittenElements | None:
    """Both changes of the same weights in one; None where they disagree on an element."""
    if one is None:
        return other
    if bool((one.mask & other.mask & (one.new != other.new)).any()):
        return None
    return WrittenElements(one.mask | other.mask, torch.where(other.mask, other.new, one.new), one.old)


def _put_back(parameter: Tensor, home: Tensor, kept: Tensor) -> None:
    if parameter.data_ptr() != home.data_ptr():
        parameter.data = home
    with torch.no_grad():
        parameter.copy_(kept)


def _disagreement(name: str, step: int) -> RecipeError:
    return RecipeError(
        f"the forwards of step {step + 1} left different values in the same element of parameter '{name}', so that its "
        f"value would depend on the order of the microbatches; the weights were left as they were before this step: "
        f"write what depends on the samples into a buffer, or set recipe.microbatches to 1."
    )


def _is_plain(parameter: Tensor) -> bool:
    """Whether its bits can be read and written: no subclass that is more than a name, no sparse or quantized tensor."""
    return (
        parameter.layout == torch.strided
        and not parameter.is_meta
        and not parameter.is_complex()
        and not parameter.is_quantized
        and not isinstance(parameter, nn.parameter.UninitializedParameter)
        and type(parameter).__torch_dispatch__ is torch._C._disabled_torch_dispatch_impl
    )
