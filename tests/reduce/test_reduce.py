"""Many gradients into one: what real autograd gives, folded and added by any team, is the tree's sum, bit for bit."""

from __future__ import annotations

import copy
import fnmatch
import itertools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from instep.errors import RecipeError
from instep.reduce.buffers import Buffers
from instep.reduce.fold import Fold
from instep.reduce.layout import ALIGN, Layout
from instep.reduce.reduction import Reduction
from instep.reduce.tree import tree_sum
from support.gradients import add_cut
from support.reference import next_buffer

finite = st.floats(-1e3, 1e3, width=32)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equality that tells -0.0 from 0.0."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


# ------------------------------------------------------------------------------------------------------------- layout


def tensors_of_all_kinds() -> list[Tensor]:
    return [
        torch.randn(5, 3),
        torch.randn(()),
        torch.randn(0),
        torch.randn(4, 0, 2),
        torch.randn(2, 8, 3, 3).to(memory_format=torch.channels_last),
        torch.randn(1, 8, 1, 1).to(memory_format=torch.channels_last),
        torch.randn(6, 4).t(),
        torch.randn(1, 7, 1),
        torch.randn(3, 4)[:, ::2],  # not dense
        torch.randn(3, 1).expand(3, 5),  # overlaps itself
        torch.randn(17),
    ]


def test_every_tensor_finds_its_values_back() -> None:
    tensors = tensors_of_all_kinds()
    layout = Layout.of(tensors, block=64)
    flat = torch.zeros(layout.size + 5)[5:]  # views must start where the vector does
    for view, tensor in zip(layout.views(flat), tensors, strict=True):
        view.copy_(tensor)
    for view, tensor in zip(layout.views(flat), tensors, strict=True):
        assert same_bits(view, tensor)
    flat.zero_()
    assert all(not view.any() for view in layout.views(flat))


def test_tensors_do_not_overlap_and_start_on_cache_lines() -> None:
    tensors = tensors_of_all_kinds()
    layout = Layout.of(tensors, block=64)
    flat = torch.zeros(layout.size)
    for view in layout.views(flat):
        view.add_(1)
    assert flat.max() == 1
    assert flat.sum() == sum(tensor.numel() for tensor in tensors)
    assert all(offset % ALIGN == 0 for offset in layout.offsets)


def test_dense_tensors_keep_their_strides() -> None:
    """An optimizer that sees another order of elements than the parameter's would be slow, or copy."""
    tensors = [tensor for tensor in tensors_of_all_kinds() if tensor.numel()][:6]
    layout = Layout.of(tensors, block=1)
    for view, tensor in zip(layout.views(torch.zeros(layout.size)), tensors, strict=True):
        assert view.stride() == tensor.stride()


shares = st.lists(st.integers(1, 9), min_size=1, max_size=5)


@given(st.lists(st.integers(0, 100), max_size=5), st.integers(1, 64), st.integers(1, 12), shares)
def test_slices_of_workers_are_all_blocks_once(sizes: list[int], block: int, workers: int, pieces: list[int]) -> None:
    layout = Layout.of([torch.empty(size) for size in sizes], block=block)
    assert layout.size == layout.blocks * layout.block
    assert 0 < layout.block <= max(block, ALIGN)
    if sum(sizes) >= block:
        assert layout.block == block
    reduction = Reduction(layout, workers, workers, pieces)
    assert len(reduction.cuts) == len(reduction.pieces) == len(pieces)
    assert [b for cuts in reversed(reduction.cuts) for cut in cuts for b in cut] == list(range(layout.blocks))
    assert sum(map(reduction.blocks_of, range(workers))) == layout.blocks


# --------------------------------------------------------------------------------------------------------------- fold


class Odd(nn.Module):
    """Parameters of all kinds. Which get a gradient, and which one, is in the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Parameter(torch.ones(3))
        self.scalar = nn.Parameter(torch.ones(()))
        self.low = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
        self.high = nn.Parameter(torch.ones(2, dtype=torch.float64))
        self.images = nn.Parameter(torch.ones(1, 2, 2, 2).to(memory_format=torch.channels_last))
        self.words = nn.Embedding(4, 2, sparse=True)

    def loss(self, batch: dict[str, Any]) -> Tensor:
        """Linear in the parameters, so that the batch's numbers are the gradients."""
        total = torch.zeros((), requires_grad=True).sum()
        for name in ("plain", "scalar", "low", "high", "images"):
            for factors in batch[name]:  # several: the parameter is used several times, as tied weights are
                parameter: nn.Parameter = getattr(self, name)
                factor = torch.tensor(factors, dtype=parameter.dtype).reshape(parameter.shape)
                total = total + (parameter * factor).sum()
        if batch["words"]:
            total = total + self.words(torch.tensor(batch["words"])).square().sum()
        return total


def factors_for(count: int) -> st.SearchStrategy[list[list[float]]]:
    return st.lists(st.lists(finite | st.just(-0.0), min_size=count, max_size=count), max_size=2)


batches = st.none() | st.fixed_dictionaries(
    {
        "plain": factors_for(3),
        "scalar": factors_for(1),
        "low": factors_for(2),
        "high": factors_for(2),
        "images": factors_for(8),
        "words": st.lists(st.integers(0, 3), max_size=3),
    }
)


def by_the_definition(model: Odd, given: list[dict[str, Any] | None]) -> list[Tensor]:
    """Each parameter's gradient, float32, over all microbatches in tree order; None has no samples."""
    parameters = list(model.parameters())
    leaves: list[list[Tensor]] = []
    for batch in given:
        found: tuple[Tensor | None, ...] = (None,) * len(parameters)
        if batch is not None:
            found = torch.autograd.grad(model.loss(batch), parameters, allow_unused=True)
        zeros = [torch.zeros(p.shape) for p in parameters]
        leaves.append([z if g is None else g.to_dense().float() for g, z in zip(found, zeros, strict=True)])
    return [tree_sum([leaf[index] for leaf in leaves], torch.add) for index in range(len(parameters))]


class Team:
    """Workers in one process: the folds of all, one after the other, and their slices."""

    def __init__(self, model: nn.Module, microbatches: int, workers: int):
        self.parameters = list(model.parameters())
        self.layout = Layout.of(self.parameters, block=16)
        self.reduction = Reduction(self.layout, microbatches, workers)
        self.slots = [torch.full((self.layout.size,), torch.nan) for _ in self.reduction.nodes]
        for slot in self.slots:
            gaps = torch.ones_like(slot)
            for view in self.layout.views(gaps):
                view.zero_()
            slot[gaps.bool()] = 0  # as fresh shared memory has there

    def gradients(self, loss: Callable[[Any], Tensor], given: list[Any]) -> tuple[list[Tensor], list[bool]]:
        """The gradient of each parameter over `given`, and whether any microbatch gave it one."""
        touched = [False] * len(self.parameters)
        for worker, bounds in enumerate(self.reduction.ranges):
            own = [self.slots[index] for index in self.reduction.slots_of(worker)]
            fold = Fold(self.layout, self.parameters, self.reduction.nodes_of(worker), own)
            try:
                fold.begin()
                for batch in given[slice(*bounds)]:
                    fold.begin_leaf()
                    if batch is not None:
                        loss(batch).backward()
                    fold.end_leaf()
            finally:
                fold.close()
            touched = [a or b for a, b in zip(touched, fold.touched, strict=True)]
        for worker in reversed(range(len(self.reduction.ranges))):
            add_cut(self.reduction, worker, self.slots)
        homes = [self.slots[self.reduction.slots_of(worker)[0]] for worker in range(len(self.reduction.ranges))]
        assert all(same_bits(home, homes[0]) for home in homes), "each worker reads the whole gradient in its home"
        return self.layout.views(homes[0]), touched


@given(st.data())
def test_any_team_gives_the_gradient_of_the_definition(data: st.DataObject) -> None:
    given = data.draw(st.lists(batches, min_size=1, max_size=9))
    workers = data.draw(st.integers(1, len(given)))
    model = Odd()
    expected = by_the_definition(model, given)
    gradients, touched = Team(model, len(given), workers).gradients(model.loss, given)
    for found, wanted in zip(gradients, expected, strict=True):
        assert same_bits(found, wanted)
    named = [name.partition(".")[0] for name, _ in model.named_parameters()]
    assert touched == [any(batch and batch[name] for batch in given) for name in named]
    assert all(parameter.grad is None for parameter in model.parameters())


@given(st.data())
def test_a_piece_is_what_it_stays_when_it_is_told_of_in_any_cutting(data: st.DataObject) -> None:
    given = data.draw(st.lists(batches, min_size=1, max_size=6))
    model = Odd()
    parameters, expected = list(model.parameters()), by_the_definition(model, given)
    layout = Layout.of(parameters, block=1)
    bounds = [0, *sorted(data.draw(st.lists(st.integers(0, layout.size), max_size=4))), layout.size]
    pieces = [slice(start, stop) for start, stop in itertools.pairwise(bounds)][::-1]
    slot, told = torch.zeros(layout.size), list[Tensor]()
    fold = Fold(layout, parameters, [(0, len(given))], [slot])
    fold.tell(pieces, lambda done: told.extend(slot[piece].clone() for piece in pieces[len(told) : done]))
    for _ in range(2):  # in the first step it learns in how many parts gradients come
        told.clear()
        fold.begin()
        for batch in given:
            fold.begin_leaf()
            if batch is not None:
                model.loss(batch).backward()
            fold.end_leaf()
        assert len(told) == len(pieces)
        assert all(same_bits(then, slot[piece]) for then, piece in zip(told, pieces, strict=True))
        assert all(same_bits(found, wanted) for found, wanted in zip(layout.views(slot), expected, strict=True))
    fold.close()


@pytest.mark.parametrize("microbatches", [1, 2, 4])
def test_pieces_are_told_of_while_backward_still_computes_others(microbatches: int) -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    layout = Layout.of(list(model.parameters()), block=16)
    slot, seen = torch.zeros(layout.size), list[list[float]]()
    fold = Fold(layout, list(model.parameters()), [(0, microbatches)], [slot])
    fold.tell([slice(16, 32), slice(0, 16)], lambda done: seen.append(slot[:16].tolist()) if done == 1 else None)
    for _ in range(2):
        seen.clear()
        fold.begin()
        for _ in range(microbatches):
            fold.begin_leaf()
            model(torch.randn(3, 4)).square().sum().backward()
            fold.end_leaf()
    assert len(seen) == 1
    assert seen[0] != slot[:16].tolist(), "the first layer's gradient was not there yet"
    fold.close()


def test_a_gradient_that_comes_in_parts_when_one_has_gone_is_refused() -> None:
    model = Recurrent()
    parameters = list(model.parameters())
    layout = Layout.of(parameters, block=16)
    fold = Fold(layout, parameters, [(0, 1)], [torch.zeros(layout.size)])
    fold.tell([slice(start, start + 16) for start in reversed(range(0, layout.size, 16))], lambda done: None)
    for times in (1, 2):
        fold.begin()
        fold.begin_leaf()
        loss = model(torch.ones(2, 3), times).sum()
        if times == 1:
            loss.backward()
            fold.end_leaf()
    with pytest.raises(RecipeError, match="came in several parts"):
        loss.backward()
    fold.close()


def test_minus_zero_becomes_what_the_tree_makes_of_it() -> None:
    """Gradients: -0.0, none, none. The tree adds (-0.0 + 0.0) + 0.0; a team that skipped the additions kept -0.0."""
    model = nn.Linear(1, 1, bias=False)
    for workers in (1, 2, 3):
        team = Team(model, 3, workers)
        (gradient,), _ = team.gradients(lambda x: (model.weight * x).sum(), [torch.tensor(-0.0), None, None])
        assert same_bits(gradient, torch.zeros(1, 1))
        (gradient,), _ = team.gradients(lambda x: (model.weight * x).sum(), [torch.tensor(-0.0)] * 3)
        assert same_bits(gradient, torch.full((1, 1), -0.0))


def test_a_fold_serves_step_after_step() -> None:
    model = nn.Linear(2, 1)
    layout = Layout.of(list(model.parameters()), block=1)
    slot = torch.zeros(layout.size)
    fold = Fold(layout, list(model.parameters()), [(0, 5)], [slot])
    for step in range(3):
        x = torch.randn(5, 2, generator=torch.Generator().manual_seed(step))
        fold.begin()
        for row in x:
            fold.begin_leaf()
            model.weight.mul(row).sum().backward()
            fold.end_leaf()
        assert same_bits(layout.views(slot)[0], tree_sum(list(x[:, None]), torch.add))
        assert fold.touched == [True, False]
    fold.close()
    model(torch.ones(2)).backward()
    assert model.weight.grad is not None, "a closed fold takes no gradients"


class Recurrent(nn.Module):
    """One layer used twice, each time recomputed by reentrant checkpointing: its gradient comes in two parts."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 16)
        self.again = nn.Linear(16, 16)

    def forward(self, x: Tensor, times: int = 2) -> Tensor:
        x = self.first(x)
        for _ in range(times):
            x = checkpoint(lambda y: torch.tanh(self.again(y)), x, use_reentrant=True)
        return x


def test_gradients_that_come_in_parts() -> None:
    torch.manual_seed(0)
    model, batches = Recurrent(), list(torch.randn(8, 4, 3))
    parameters = list(model.parameters())
    for empty in (0, 2):  # with the first microbatches empty, the parts are not foreseen
        given: list[Any] = [None] * empty + batches[empty:]
        leaves = [[torch.zeros(p.shape) for p in parameters] for _ in given]
        for x, leaf in zip(given[empty:], leaves[empty:], strict=True):
            model(x).sum().backward()
            for parameter, gradient in zip(parameters, leaf, strict=True):
                gradient.copy_(parameter.grad)
                parameter.grad = None
        expected = [tree_sum([leaf[index] for leaf in leaves], torch.add) for index in range(len(parameters))]
        for workers in (1, 2, 3, 8):
            found, _ = Team(model, 8, workers).gradients(lambda x: model(x).sum(), given)
            assert all(same_bits(a, b) for a, b in zip(found, expected, strict=True))


def test_parts_that_come_unforeseen_are_refused() -> None:
    model = Recurrent()
    given = [(torch.ones(1, 3), 1), (torch.ones(1, 3), 2)]
    with pytest.raises(RecipeError, match=r"shape \[16(, 16)?\] came in several parts.* set use_reentrant to False"):
        Team(model, 2, 1).gradients(lambda pair: model(*pair).sum(), given)


# ---------------------------------------------------------------------------------------------------------- reduction


@given(st.integers(1, 20), st.data(), st.integers(0, 2**31))
def test_slices_add_up_to_the_tree_for_any_team(microbatches: int, data: st.DataObject, seed: int) -> None:
    workers = data.draw(st.integers(1, microbatches))
    generator = torch.Generator().manual_seed(seed)
    layout = Layout.of([torch.empty(data.draw(st.integers(1, 100)))], block=16)
    leaves = [torch.randn(layout.size, generator=generator) for _ in range(microbatches)]
    reduction = Reduction(layout, microbatches, workers)
    slots = [tree_sum(leaves[slice(*node)], torch.add).clone() for node in reduction.nodes]
    order = list(range(workers))
    random.Random(seed).shuffle(order)  # slices are apart from each other, so any order will do
    norms = {worker: add_cut(reduction, worker, slots) for worker in order}
    expected = tree_sum(leaves, torch.add)
    for worker in range(workers):
        assert same_bits(slots[reduction.slots_of(worker)[0]], expected)
    together = torch.cat([norms[worker] for worker in range(workers)])
    assert same_bits(together, torch.cat([torch.linalg.vector_norm(row[None], dim=1) for row in expected.split(16)]))


# ------------------------------------------------------------------------------------------------------------ buffers


class Buffered(nn.Module):
    """Buffers of all kinds, changed in place or put anew."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([1.0, -2.0]))
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("flags", torch.tensor([False, True, False]))
        self.register_buffer("still", torch.tensor([torch.nan, 5.0]))
        self.register_buffer("none", torch.empty(0))
        self.inner = nn.Module()
        self.inner.register_buffer("small", torch.zeros(2, dtype=torch.bfloat16), persistent=False)

    def see(self, values: tuple[float, int, bool, bool]) -> None:
        number, count, flag, anew = values
        if anew:
            self.mean = self.mean * 0.5 + number
            self.flags = self.flags | torch.tensor([flag, False, False])
        else:
            self.mean.mul_(0.5).add_(number)
            self.flags[0] |= flag
        self.count += count
        self.inner.small += number


seen = st.none() | st.tuples(finite, st.integers(0, 5), st.booleans(), st.booleans())


@given(st.lists(seen, min_size=1, max_size=9).filter(lambda values: any(v is not None for v in values)), st.data())
def test_buffers_are_the_mean_or_the_maximum_for_any_team(given: list[Any], data: st.DataObject) -> None:
    workers = data.draw(st.integers(1, len(given)))
    alone = [Buffered() for _ in given]
    for model, values in zip(alone, given, strict=True):
        if values is not None:
            model.see(values)
    full = [model for model, values in zip(alone, given, strict=True) if values is not None]

    models = [Buffered() for _ in range(workers)]
    step_buffers(models, given)
    for model in models:
        for name, buffer in Buffered().named_buffers():
            left = [dict(one.named_buffers())[name] for one in alone]
            if not any(bits(value).tolist() != bits(buffer).tolist() for value in left):
                expected = buffer
            elif buffer.is_floating_point():
                none = torch.zeros(buffer.shape)
                terms = [none if v is None else value.float() for value, v in zip(left, given, strict=True)]
                expected = (tree_sum(terms, torch.add) / len(full)).to(buffer.dtype)
            else:
                expected = torch.stack(left).amax(0)
            assert same_bits(dict(model.named_buffers())[name], expected), name


def step_buffers(models: list[Any], given: list[Any], buffers: list[Buffers] | None = None) -> list[Buffers]:
    """One step of a team, each worker with a model of its own, and ranges of any sizes, none too."""
    ends = sorted(random.Random(99 * len(given) + len(models)).choices(range(len(given) + 1), k=len(models) - 1))
    ranges = list(itertools.pairwise([0, *ends, len(given)]))
    reduction = Reduction(Layout.of([torch.empty(1)], block=1), len(given), len(models), ranges=ranges)
    buffers = buffers or [Buffers(model) for model in models]
    flags = []
    for model, own, bounds in zip(models, buffers, reduction.ranges, strict=True):
        own.begin()
        for values in given[slice(*bounds)]:
            if values is not None:
                model.see(values)
            own.leave(filled=values is not None)
        flags.append(own.changed())
    changed = np.flatnonzero(np.any(flags, axis=0)).tolist()
    rows = [torch.zeros(buffers[0].row_size) for _ in reduction.nodes]
    integers = [torch.zeros(buffers[0].integer_layout.size, dtype=torch.int64) for _ in models]
    for worker, own in enumerate(buffers):
        slots = [rows[index] for index in reduction.slots_of(worker)]
        own.post(changed, reduction.ranges[worker][0], reduction.nodes_of(worker), slots, integers[worker])
    filled = [place for place, values in enumerate(given) if values is not None]
    last = next(w for w, (start, stop) in enumerate(reduction.ranges) if start <= filled[-1] < stop)
    for own in buffers:
        own.finish(changed, reduction.plan, rows, integers, len(filled), (reduction.slots_of(last)[0], last))
    return buffers


MODES = st.sampled_from(["mean", "max", "last", "frozen", "sum", "sum:0.9", "sum:0"])
WHOLE = MODES.filter(lambda mode: mode not in ("mean", "sum:0.9"))
TRUTH = WHOLE.filter(lambda mode: not mode.startswith("sum"))


class Wider(Buffered):
    """With buffers of 64 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("wide", torch.tensor([1 / 3, -2.0], dtype=torch.float64))
        self.register_buffer("large", torch.tensor([1 << 60, -7]))

    def see(self, values: tuple[float, int, bool, bool]) -> None:
        super().see(values)
        self.wide = self.wide * 0.9 + values[0]
        self.large.mul_(2 * values[2] - 1).add_(values[1])


@given(
    st.lists(seen, min_size=1, max_size=9).filter(lambda values: any(v is not None for v in values)),
    st.tuples(MODES, MODES, MODES, WHOLE, WHOLE, TRUTH),
    st.data(),
)
def test_buffers_of_any_mode_are_those_of_the_definition_for_any_team(
    given: list[Any], chosen: tuple[str, ...], data: st.DataObject
) -> None:
    workers = data.draw(st.integers(1, len(given)))
    patterns = dict(zip(["mean", "wide", "inner.*", "count", "large", "flags"], chosen, strict=True))
    alone = [Wider() for _ in given]
    for model, values in zip(alone, given, strict=True):
        if values is not None:
            model.see(values)
    models = [Wider() for _ in range(workers)]
    step_buffers(models, given, [Buffers(model, patterns) for model in models])
    for name, start in Wider().named_buffers():
        left = [None if v is None else dict(m.named_buffers())[name] for m, v in zip(alone, given, strict=True)]
        changed = any(value is not None and not same_bits(value, start) for value in left)
        mode = next((mode for pattern, mode in patterns.items() if fnmatch.fnmatch(name, pattern)), "mean")
        expected = next_buffer(mode, start, left).to(start.dtype) if changed else start
        for model in models:
            assert same_bits(dict(model.named_buffers())[name], expected), (name, mode)


def test_every_microbatch_starts_from_the_buffers_of_the_last_step() -> None:
    models = [Buffered(), Buffered()]
    given = [(1.0, 1, False, False), (2.0, 2, True, True), (4.0, 0, False, False), (8.0, 0, False, False)]
    buffers = step_buffers(models, given)
    assert models[0].mean.tolist() == [0.5 + 15 / 4, -1 + 15 / 4]
    assert models[0].count == 5
    objects = [model.mean for model in models]
    step_buffers(models, given, buffers)
    assert models[0].mean.tolist() == [(0.5 + 15 / 4) / 2 + 15 / 4, (-1 + 15 / 4) / 2 + 15 / 4]
    assert models[0].count == 7
    assert all(model.mean is old for model, old in zip(models, objects, strict=True)), "compiled code holds the object"


def test_buffers_that_lockstep_cannot_share() -> None:
    model = Buffered()
    buffers = Buffers(model)
    model.mean = torch.zeros(3)
    with pytest.raises(RecipeError, match=r"buffer 'mean' changed its shape from \(2,\) to \(3,\)"):
        buffers.leave(filled=True)
    model = copy.deepcopy(Buffered())
    model.register_buffer("wave", torch.zeros(1, dtype=torch.complex64))
    buffers = Buffers(model)
    buffers.leave(filled=True)  # a constant one, as a rotary table is, is nobody's harm
    model.wave += 1
    with pytest.raises(RecipeError, match="buffer 'wave' is complex and was changed in training"):
        buffers.leave(filled=True)
