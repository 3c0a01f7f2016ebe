"""Data: every sample of an epoch once, by step and microbatch; text as bytes."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
import random
import sysconfig
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, default_collate, random_split

import instep.data as data_module
from instep.components import Component
from instep.data import Data, as_data, digest, order
from instep.data.cursor import Cursor, held_out_batches, load, rows_of
from instep.data.text import Bytes, Windows, stdlib_text, text_files
from instep.errors import ComponentError, DataError, RecipeError
from instep.randomness import seed_all
from instep.worker.replica import Replica

pytestmark = pytest.mark.pure


@st.composite
def cursors(draw, **fixed):
    microbatches = draw(st.integers(1, 9))
    batch = microbatches * draw(st.integers(1, 5))
    fields = {"ragged": draw(st.sampled_from(["even", "spread"])), "drop_last": draw(st.booleans())}
    fields |= {"order": draw(st.sampled_from(["keyed", "permutation"])), **fixed}
    return Cursor(draw(st.integers(batch, 5 * batch + 3)), batch, microbatches, draw(st.integers(0, 2**40)), **fields)


def forget_orders():
    for known in (order._block, order.keys, order._permutation):
        known.cache_clear()


def microbatches_of(cursor, step):
    return [cursor.microbatch(step, index) for index in range(cursor.microbatches)]


# --- the cursor -----------------------------------------------------------------------------------------------------


@given(cursors(), st.integers(0, 3))
def test_each_epoch_uses_every_sample_exactly_once_but_for_a_batch_that_is_dropped(cursor, epoch):
    first = epoch * cursor.steps_per_epoch
    steps = range(first, first + cursor.steps_per_epoch)
    used = Counter(index for step in steps for piece in microbatches_of(cursor, step) for index in piece)
    assert {cursor.epoch(step) for step in steps} == {epoch}
    assert cursor.epoch(steps.stop) == epoch + 1
    assert set(used.values()) == {1}
    dropped = cursor.samples % cursor.batch if cursor.drop_last else 0
    assert len(used) == cursor.samples - dropped
    assert used.keys() <= set(range(cursor.samples))


@given(cursors(), st.integers(0, 20))
def test_microbatches_make_up_the_batch_in_order(cursor, step):
    pieces = microbatches_of(cursor, step)
    assert [index for piece in pieces for index in piece] == cursor.indices(step)
    assert len(cursor.indices(step)) == cursor.size(step)
    assert [len(piece) for piece in pieces] == [cursor.microbatch_size(step, m) for m in range(cursor.microbatches)]


@given(cursors(ragged="even"), st.integers(0, 20))
def test_a_batch_is_cut_into_as_few_pieces_as_hold_it_of_one_size_give_or_take_one(cursor, step):
    sizes = [len(piece) for piece in microbatches_of(cursor, step)]
    pieces = math.ceil(cursor.size(step) / cursor.usual_size)
    assert min(sizes[:pieces]) > 0
    assert max(sizes[:pieces]) - min(sizes[:pieces]) <= 1
    assert max(sizes) <= cursor.usual_size
    assert sizes[pieces:] == [0] * (cursor.microbatches - pieces)
    if cursor.usual_size > 2:
        assert 1 not in sizes or cursor.size(step) == 1


@given(cursors(ragged="spread"), st.integers(0, 20))
def test_the_cut_over_all_microbatches_is_what_it_was(cursor, step):
    batch, parts = cursor.indices(step), cursor.microbatches
    edges = [len(batch) * part // parts for part in range(parts + 1)]
    assert microbatches_of(cursor, step) == [batch[a:b] for a, b in itertools.pairwise(edges)]


@given(cursors())
def test_whole_batches_and_the_order_do_not_depend_on_how_the_last_one_is_cut(cursor):
    for change in ({"ragged": "even"}, {"ragged": "spread"}, {"drop_last": not cursor.drop_last}):
        other = dataclasses.replace(cursor, **change)
        for step in range(cursor.samples // cursor.batch):
            assert microbatches_of(cursor, step) == microbatches_of(other, step)


@given(cursors())
def test_only_the_last_batch_of_an_epoch_is_smaller(cursor):
    sizes = [cursor.size(step) for step in range(cursor.steps_per_epoch)]
    assert set(sizes[:-1]) <= {cursor.batch}
    assert sizes[-1] == (cursor.batch if cursor.drop_last else cursor.samples % cursor.batch or cursor.batch)


def test_the_sizes_of_the_last_batch_that_leave_a_piece_of_one_sample():
    def single(ragged):
        ends = {rest: Cursor(320 + rest, 32, 8, 0, ragged) for rest in range(1, 33)}
        return [rest for rest, c in ends.items() if 1 in map(len, microbatches_of(c, 10))]

    assert single("even") == [1]  # as in a plain loop
    assert single("spread") == list(range(1, 16))


@given(cursors(), st.lists(st.tuples(st.integers(0, 20), st.integers(0, 8)), max_size=10))
def test_an_address_means_the_same_whatever_was_asked_before(cursor, asked):
    for step, index in asked:
        cursor.microbatch(step, index % cursor.microbatches)
    fresh = dataclasses.replace(cursor)
    forget_orders()
    assert [fresh.indices(step) for step in range(12)] == [cursor.indices(step) for step in range(12)]


def test_orders_depend_on_seed_and_epoch_and_on_nothing_else():
    torch.manual_seed(1)
    orders = {(seed, epoch): tuple(Cursor(64, 64, 1, seed).indices(epoch)) for seed in range(3) for epoch in range(3)}
    assert len(set(orders.values())) == 9
    torch.manual_seed(2)
    forget_orders()
    assert tuple(Cursor(64, 64, 1, 2).indices(2)) == orders[2, 2]
    assert [Cursor(64, 8, 8, 2).indices(step) for step in range(16, 18)] == [
        list(orders[2, 2][:8]),
        list(orders[2, 2][8:16]),
    ]


def test_the_order_of_samples_is_what_it_was():
    """A change here changes the digest of every run."""
    ten = Cursor(10, 10, 2, 0, order="permutation")
    assert dataclasses.replace(ten, batch=4).indices(0) == ten.indices(0)[:4]
    generator = torch.Generator().manual_seed(
        int.from_bytes(hashlib.sha256(b"7/3/order").digest()[:8], "little") >> 1,
    )
    assert Cursor(10, 10, 2, 7, order="permutation").indices(3) == torch.randperm(10, generator=generator).tolist()


def test_a_ragged_batch_may_leave_microbatches_empty():
    cursor = Cursor(11, 8, 8, 0)
    assert [len(piece) for piece in microbatches_of(cursor, 1)].count(0) == 5
    assert sum(len(piece) for piece in microbatches_of(cursor, 1)) == 3


@pytest.mark.parametrize(("samples", "words"), [(0, ["empty"]), (7, ["too small", "7 samples", "batch of 8"])])
def test_too_little_data_is_refused(samples, words):
    with pytest.raises(DataError) as caught:
        Cursor(samples, 8, 2, 0)
    assert all(word in str(caught.value) for word in words)


@given(st.integers(0, 50), st.integers(1, 12))
def test_held_out_batches_go_through_all_in_order(samples, size):
    batches = held_out_batches(samples, size)
    assert [index for batch in batches for index in batch] == list(range(samples))
    assert all(len(batch) == size for batch in batches[:-1])
    assert all(0 < len(batch) <= size for batch in batches)


# --- loading --------------------------------------------------------------------------------------------------------


class Numbers(Dataset):
    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index == 13:
            raise ValueError("unlucky")
        return torch.tensor([index])


class ManyNumbers(Numbers):
    def __getitems__(self, indices):
        self.asked = indices
        return [torch.tensor([index]) for index in indices]


def test_load_collates_samples_in_order():
    assert load(Numbers(9), [4, 2, 7]).tolist() == [[4], [2], [7]]
    assert load(Numbers(9), [4, 2], lambda samples: [s.item() for s in samples]) == [4, 2]
    pair = load(TensorDataset(torch.arange(5), torch.arange(5) * 2), [3, 1])
    assert [part.tolist() for part in pair] == [[3, 1], [6, 2]]


@pytest.mark.parametrize("shape", [(), (0,), (3,), (1, 4, 4), (3, 4, 4), (3, 1, 1), (2, 3, 4, 5)])
@pytest.mark.parametrize("indices", [[2], [8, 0, 8], list(range(9))])
def test_rows_of_a_tensor_data_set_are_what_the_default_collate_makes_of_its_samples(shape, indices):
    tensors = (torch.randn(9, *shape), torch.arange(9), torch.randn(9, *shape) > 0)
    samples = TensorDataset(*tensors)
    found, expected = load(samples, indices), default_collate([samples[index] for index in indices])
    assert rows_of(samples, None) is not None
    assert type(found) is type(expected)
    for a, b in zip(found, expected, strict=True):
        assert (a.dtype, a.stride()) == (b.dtype, b.stride())
        assert torch.equal(a, b)


def test_only_a_plain_tensor_data_set_is_taken_for_rows():
    class Mine(TensorDataset):
        def __getitem__(self, index):
            return tuple(tensor[index] + 1 for tensor in self.tensors)

    ones = torch.ones(4, 2)
    last_first = TensorDataset(torch.ones(4, 3, 2, 2).to(memory_format=torch.channels_last))
    assert rows_of(Mine(ones), None) is None
    assert rows_of(TensorDataset(ones.T), None) is None
    assert rows_of(last_first, None) is None
    assert rows_of(TensorDataset(ones), default_collate) is None
    assert torch.equal(load(Mine(ones), [0])[0], 2 * ones[:1])


def test_load_asks_for_several_samples_at_once_where_it_can():
    samples = ManyNumbers(9)
    assert load(samples, range(2, 5)).tolist() == [[2], [3], [4]]
    assert samples.asked == [2, 3, 4]


def test_a_data_set_that_fails_is_named_with_the_sample():
    with pytest.raises(DataError, match=r"Numbers of 20 samples .*sample 13 .*ValueError: unlucky"):
        load(Numbers(20), [1, 13])
    failing = ManyNumbers(9)
    failing.__class__ = type("Failing", (ManyNumbers,), {"__getitems__": lambda self, indices: 1 / 0})
    with pytest.raises(DataError, match=r"Failing .*samples \[1, 2\] .*ZeroDivisionError"):
        load(failing, [1, 2])


# --- what is taken for data -----------------------------------------------------------------------------------------


def test_data_sets_pairs_and_data_are_taken():
    train, held_out = Numbers(3), Numbers(2)
    data = Data(train, held_out, collate=list)
    assert as_data(data) is data
    assert as_data((train, held_out)) == Data(train, held_out)
    assert as_data(train) == Data(train)
    assert as_data([1, 2]) == Data([1, 2])  # a list is map-style
    assert as_data(torch.zeros(3, 2)).held_out is None
    by_index = {0: 1, 1: 2}
    assert as_data(by_index) == Data(by_index)


def test_a_random_split_is_a_pair():
    train, held_out = random_split(Numbers(10), [0.7, 0.3])
    assert as_data([train, held_out]) == Data(train, held_out)
    with pytest.raises(DataError, match="tuple of 3"):
        as_data(random_split(Numbers(9), [3, 3, 3]))


def test_data_sets_by_name_are_refused():
    with pytest.raises(DataError, match=r"the training data is a dict with the keys 'train', 'test', which has no sam"):
        as_data({"train": Numbers(3), "test": Numbers(2)})


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(3))


class Lengthless(Dataset):
    def __getitem__(self, index):
        return index


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (Stream(), ["Stream", "map-style"]),
        (Lengthless(), ["Lengthless", "map-style"]),
        (Numbers, ["map-style"]),
        (DataLoader(Numbers(3)), ["DataLoader", "makes the batches"]),
        (5, ["int", "map-style"]),
        (None, ["NoneType"]),
        ("text", ["str", "map-style"]),
        (Numbers(0), ["training", "empty"]),
        ((Numbers(3), Numbers(0)), ["held-out", "empty"]),
        ((Numbers(3), Numbers(2), Numbers(1)), ["tuple of 3", "pair"]),
        ((torch.zeros(3, 2), torch.zeros(3)), ["pair of arrays", "TensorDataset"]),
    ],
)
def test_other_data_is_refused(value, words):
    with pytest.raises(DataError) as caught:
        as_data(value)
    assert all(word in str(caught.value) for word in words), caught.value


def make(count=4):
    return Numbers(count), Numbers(2)


@pytest.mark.parametrize(
    ("component", "sizes"),
    [
        (Component(make), (4, 2)),
        (Component(make, {"count": 5}), (5, 2)),
        (Component(Numbers, {"count": 5}), (5, None)),
        (Component(Numbers(6)), (6, None)),
        (Component((Numbers(6), Numbers(1))), (6, 1)),
        (Component(Data(Numbers(6))), (6, None)),
        (Component([1, 2, 3]), (3, None)),
    ],
)
def test_a_component_is_called_or_taken_as_it_is(component, sizes):
    data = data_module.from_component(component)
    assert (len(data.train), None if data.held_out is None else len(data.held_out)) == sizes


def test_a_component_with_wrong_arguments_is_refused():
    with pytest.raises(ComponentError, match="cuont"):
        data_module.from_component(Component(make, {"cuont": 5}))


# --- the digest of data ---------------------------------------------------------------------------------------------


class Noisy(Numbers):
    def __getitem__(self, index):
        return {"x": torch.rand(2) + random.random() + np.random.rand(), "n": index, "a": np.arange(index)}


def test_digest_tells_data_apart():
    base = torch.arange(100.0).reshape(50, 2)
    changed_first, changed_last = base.clone(), base.clone()
    changed_first[3, 0] += 1
    changed_last[-3, 1] += 1
    different = [
        as_data(base),
        as_data(base[:-1]),
        as_data(base.double()),
        as_data(changed_first),
        as_data(changed_last),
        Data(base, base),
        Data(base, base[:20]),
        as_data(torch.zeros(50, 2)),
        as_data(torch.zeros(60, 2)),
        as_data(torch.zeros(60, 2, dtype=torch.int32)),
        as_data(torch.zeros(60, 2, 1)),
        Data(Noisy(20)),
        Data(Noisy(21)),
        Data(["a", "b", None]),
        Data(["a", "c", None]),
        Data([lambda: 1]),
    ]
    digests = [digest(data) for data in different]
    assert len(set(digests)) == len(digests)
    seed_all(1)
    assert digests == [digest(data) for data in different]  # random samples included
    assert all(len(text) == 64 for text in digests)
    assert digest(as_data(base.clone())) == digests[0]


def test_digest_leaves_random_state_alone_and_takes_a_data_sets_own():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    digest(Data(Noisy(20)))
    assert torch.equal(torch.get_rng_state(), before)
    own, other = Noisy(20), Numbers(20)
    own.digest = other.digest = "d"
    assert digest(Data(own)) == digest(Data(other))


# --- text -----------------------------------------------------------------------------------------------------------


@given(st.binary(min_size=2, max_size=60), st.integers(1, 9))
def test_windows_predict_every_byte_but_the_first_once(text, context):
    windows = Windows(text, context)
    targets = bytes(byte for window in windows for byte in window[1:].tolist())
    assert targets == text[1 : 1 + len(windows) * context]
    assert len(text) - 1 - len(targets) < context
    assert all(window.shape == (context + 1,) and window.dtype == torch.int64 for window in windows)
    inputs = bytes(byte for window in windows for byte in window[:-1].tolist())
    assert inputs == text[: len(inputs)]


@given(st.binary(min_size=2, max_size=60), st.integers(1, 5))
def test_mixed_windows_are_the_same_windows(text, context):
    plain, mixed = Windows(text, context), Windows(text, context, mixed=True)
    assert sorted(window.tolist() for window in plain) == sorted(window.tolist() for window in mixed)
    assert plain.digest == mixed.digest == hashlib.sha256(text).hexdigest()


def test_the_first_mixed_windows_come_from_all_over():
    windows = Windows(bytes(100 * [0]) + bytes(100 * [1]) + bytes(100 * [2]), 1, mixed=True)
    assert {int(window[0]) for window in windows.__getitems__(range(20))} == {0, 1, 2}


def test_windows_at_once_are_those_one_by_one():
    windows = Windows(bytes(range(200)), 7, mixed=True)
    assert torch.equal(torch.stack(windows.__getitems__([5, 0, 20])), torch.stack([windows[i] for i in (5, 0, 20)]))
    for wrong in (-1, len(windows)):
        with pytest.raises(IndexError):
            windows[wrong]
    with pytest.raises(RecipeError, match="context"):
        Windows(b"abc", 0)


@given(st.text())
def test_bytes_decode_what_they_encode(text):
    codec = Bytes()
    tokens = codec.encode(text)
    assert all(0 <= token < codec.vocabulary for token in tokens)
    if "\ufffd" not in text:
        assert codec.decode(tokens) == text
    assert len(tokens) * codec.bytes_per_token == len(text.encode(errors="replace"))


def test_bytes_that_are_no_text_are_replaced():
    assert Bytes().decode([0x61, 0xFF, 0x62]) == "a\ufffdb"
    assert Bytes().encode("\ud800") == [ord("?")]


@pytest.fixture(scope="module")
def library():
    return stdlib_text(context=128)


def test_standard_library_is_the_text(library):
    train, held_out = library.train, library.held_out
    size = train.text.numel() + held_out.text.numel()
    assert size > 5_000_000
    assert 0.02 < held_out.text.numel() / size < 0.1
    assert train.digest == hashlib.sha256(train.text.numpy().tobytes()).hexdigest()
    assert library.codec == Bytes()
    assert digest(stdlib_text(context=128)) == digest(library)
    batch = load(train, [0, 5], library.collate)
    assert batch.shape == (2, 129)
    assert batch.dtype == torch.int64


def test_modules_are_whole_and_either_trained_on_or_held_out(library):
    root = Path(sysconfig.get_paths()["stdlib"])
    train, held_out = (part.text.numpy().tobytes() for part in (library.train, library.held_out))
    places = []
    for name in ("ast", "asyncio/tasks", "dataclasses", "heapq", "json/decoder", "os", "random", "tarfile", "this"):
        source = (root / f"{name}.py").read_bytes()
        assert (source in train) != (source in held_out), name
        places.append(train.find(source))
    trained_on = [place for place in places if place >= 0]
    assert len(trained_on) > 3
    assert trained_on == sorted(trained_on)
    for path in ("test/test_ast.py", "idlelib/idle_test/htest.py"):
        if (root / path).is_file():
            source = (root / path).read_bytes()
            assert source not in train
            assert source not in held_out


def test_text_files_hold_out_their_end(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_bytes(b"b" * 50)
    (tmp_path / "sub" / "c.txt").write_bytes(b"c" * 48)
    (tmp_path / "a.md").write_bytes(b"a" * 10)
    monkeypatch.chdir(tmp_path)
    data = text_files("**/*.txt", context=4, held_out=0.2)
    assert data.train.text.numpy().tobytes() + data.held_out.text.numpy().tobytes() == b"b" * 50 + b"\n" + b"c" * 48
    assert data.held_out.text.numel() == 19
    assert text_files(["*.md", "*.txt", "b.txt"], 4, 0.2).train.text.numpy().tobytes()[:12] == b"a" * 10 + b"\nb"


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"pattern": "*.none"}, DataError, ["*.none", "pattern"]),
        ({"pattern": "b.txt"}, DataError, ["held-out", "too small", "2 bytes"]),
        ({"pattern": "b.txt", "context": 100}, DataError, ["training", "too small"]),
        ({"pattern": "b.txt", "held_out": 1.0}, RecipeError, ["1.0", "share"]),
    ],
)
def test_text_files_that_do_not_do_are_refused(tmp_path, monkeypatch, arguments, error, words):
    (tmp_path / "b.txt").write_bytes(b"b" * 50)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error) as caught:
        text_files(**{"context": 4, **arguments})
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_python_without_its_source_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(DataError, match="source"):
        stdlib_text(8)


def test_a_packed_sequence_moves_to_a_device_as_a_whole():
    """Its batch_sizes must stay on the CPU."""
    packed = pack_sequence([torch.zeros(5, 2), torch.zeros(3, 2)])
    replica = SimpleNamespace(device=torch.device("meta"))
    moved, other = Replica.to_device(replica, (packed, torch.zeros(2)))
    assert (moved.data.device.type, moved.batch_sizes.device.type, other.device.type) == ("meta", "cpu", "meta")
