"""What goes to the workers comes out as it was: bits, strides, what shares memory; and lies in memory once for all."""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

import instep
from instep.errors import DataError
from instep.offline.cluster import Cluster
from instep.offline.simulation import simulate
from instep.recipe import Recipe, Team
from instep.team import pickling, plain
from instep.team.mapped_files import FileSpan
from support.harness import train_here
from support.regression import squares

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is mapped by Linux's means")

MANY = 4096
"""Elements of an array that leaves the pickle."""


@pytest.fixture(params=[MANY, 8], ids=["large", "small"])
def count(request: pytest.FixtureRequest) -> int:
    return int(request.param)


def sent(value: Any) -> tuple[Any, pickling.Pickled]:
    pickled = pickling.dump(value)
    return pickled.load(), pickled


def there(value: Any) -> Any:
    return sent(value)[0]


class Marked(torch.Tensor):
    """A subclass of a tensor."""


def test_tensors_come_out_as_they_went_in(count: int) -> None:
    base = torch.randn(4, count // 4)
    parameter = nn.Parameter(torch.randn(count), requires_grad=False)
    parameter.note = "kept"  # type: ignore[attr-defined]
    given = {
        "base": base, "transposed": base.t(), "part": base[1:, ::2], "expanded": torch.randn(count, 1).expand(count, 3),
        "asks": torch.randn(count, requires_grad=True), "parameter": parameter,
        "whole": torch.arange(count), "half": torch.randn(count).bfloat16(), "flags": torch.rand(count) > 0.5,
        "complex": torch.randn(count, dtype=torch.complex64).conj(), "empty": torch.empty(0, 3),
        "sparse": torch.eye(count // 4).to_sparse(), "marked": torch.randn(count).as_subclass(Marked),
    }  # fmt: skip
    found = there(given)
    for name, tensor in given.items():
        other = found[name]
        assert type(other) is type(tensor), name
        assert other.dtype == tensor.dtype
        assert other.requires_grad == tensor.requires_grad
        assert other.layout == tensor.layout
        if tensor.layout == torch.strided:
            assert other.stride() == tensor.stride(), name
            assert other.is_conj() == tensor.is_conj()
        one, two = (t.to_dense() if t.is_sparse else t for t in (other, tensor))
        assert torch.equal(one, two), name
    assert found["parameter"].note == "kept"


def test_what_shares_memory_still_does(count: int) -> None:
    base = torch.zeros(count)
    tied = nn.Linear(3, 3)
    model = nn.ModuleList([tied, tied, nn.Linear(3, 3)])
    model[2].weight = tied.weight
    found = there({"whole": base, "part": base[2:5], "bits": base.view(torch.int32), "again": base, "model": model})
    found["whole"][3] = 7.0
    assert found["part"][1] == 7.0
    assert found["bits"][3] == torch.tensor([7.0]).view(torch.int32)
    assert found["again"] is found["whole"]
    assert found["model"][0] is found["model"][1]
    assert found["model"][2].weight is found["model"][0].weight
    assert float(base[3]) == 0.0


def test_arrays_come_out_as_they_went_in(count: int) -> None:
    base = np.arange(2 * count, dtype=np.int64)
    fixed = np.arange(count)
    fixed.flags.writeable = False
    given = {
        "base": base, "steps": base[::2], "turned": base.reshape(2, -1).T, "fixed": fixed,
        "text": np.array(["a", "bc"] * count), "objects": np.array([{"a": 1}] * count, dtype=object),
        "records": np.zeros(count, dtype=[("a", "i1"), ("b", "f8")]), "masked": np.ma.masked_less(base, 5),
        "big": base.astype(">i8"), "scalar": np.float64(3), "bytes": bytearray(b"ab" * count),
    }  # fmt: skip
    found = there(given)
    for name, value in given.items():
        assert type(found[name]) is type(value)
        assert np.array_equal(found[name], value), name
        if isinstance(value, np.ndarray):
            assert found[name].dtype == value.dtype
            assert found[name].flags.writeable == value.flags.writeable


def test_a_write_is_a_process_s_own() -> None:
    pickled = pickling.dump([np.zeros(MANY), torch.zeros(MANY)])
    first, second = pickled.load(), pickled.load()
    for array in first:
        array[:] = 1.0
    assert not second[0].any()
    assert not second[1].any()


def test_functions_and_classes_of_a_program_go_too() -> None:
    table = torch.arange(MANY)

    class Here(TensorDataset):
        def last(self) -> int:
            return int(table[-1])

    found = there({"data": Here(table), "call": lambda: table.sum()})
    assert found["data"].last() == MANY - 1
    assert found["call"]() == table.sum()
    assert type(found["data"]).__name__ == "Here"


# ------------------------------------------------------------------------------------------------ memory-mapped files


@pytest.fixture
def file(tmp_path: Path) -> Path:
    np.save(tmp_path / "x.npy", np.arange(4 * MANY, dtype=np.float32).reshape(4, MANY))
    return tmp_path / "x.npy"


def of_files(pickled: pickling.Pickled) -> list[bool]:
    return [isinstance(span, FileSpan) for span in pickled.buffers]


@pytest.mark.parametrize("mode", ["r", "r+", "c"])
def test_a_memmap_travels_by_path(mode: Any, file: Path) -> None:
    mapped = np.load(file, mmap_mode=mode)
    given = [mapped, mapped[1:3, 5:], mapped[::-1, ::2], np.asarray(mapped), torch.from_numpy(np.load(file, "r+"))]
    found, pickled = sent(given)
    assert of_files(pickled) == [True] * 5
    assert pickled.pickle.stop < 4096
    for array, other in zip(given, found, strict=True):
        assert type(other) is type(array)
        assert (np.asarray(other) == np.asarray(array)).all()
        assert np.asarray(other).strides == np.asarray(array).strides
    found[0][0, 0] = found[4][0, 0] = -5.0
    assert np.load(file)[0, 0] == 0.0, "a worker's write stays its own"


def test_a_private_change_of_a_memmap_travels_too(file: Path) -> None:
    mapped = np.load(file, mmap_mode="c")
    mapped[2, 7] = -1.0
    found, pickled = sent(mapped)
    assert of_files(pickled) == [False]
    assert (found == mapped).all()


def test_tensors_of_files_travel_by_path(tmp_path: Path) -> None:
    import safetensors
    from safetensors.torch import save_file

    torch.arange(MANY).numpy().tofile(tmp_path / "x.bin")
    save_file({"a": torch.arange(MANY), "b": torch.arange(MANY) + 1}, tmp_path / "x.safetensors")
    torch.save({"a": torch.arange(MANY)}, tmp_path / "x.pt")
    with safetensors.safe_open(tmp_path / "x.safetensors", "pt") as opened:
        given = [
            torch.from_file(str(tmp_path / "x.bin"), shared=False, size=MANY, dtype=torch.int64),
            torch.load(tmp_path / "x.pt", mmap=True)["a"],
            opened.get_tensor("b"),
        ]
        found, pickled = sent(given)
    assert all(torch.equal(a, b) for a, b in zip(found, given, strict=True))
    assert of_files(pickled)[:2] == [True, True]


def test_a_file_that_was_replaced_or_is_gone_is_named(file: Path) -> None:
    mapped = np.load(file, mmap_mode="r")
    pickled = pickling.dump(mapped)
    os.rename(file, file.with_name("other"))
    with pytest.raises(DataError, match=f"{file}.* cannot be read: No such file or directory; leave it in place"):
        pickled.load()
    np.save(file, np.zeros((4, MANY), np.float32))
    with pytest.raises(DataError, match=f"{file}.* is another one since the run started"):
        pickled.load()
    found, pickled = sent(np.load(file.with_name("other"), mmap_mode="r"))
    assert of_files(pickled) == [True]
    assert (found == mapped).all()


def test_a_mapping_of_a_deleted_file_is_copied(file: Path) -> None:
    mapped = np.load(file, mmap_mode="r")
    file.unlink()
    found, pickled = sent(mapped)
    assert of_files(pickled) == [False]
    assert (found == mapped).all()


def test_memory_that_the_system_refuses_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    from instep.errors import ResourceError

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
    try:
        with pytest.raises(ResourceError, match="cannot be put into memory that the workers share: File too large"):
            pickling.dump(torch.zeros(1 << 16))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


# ------------------------------------------------------------------------------------------------------- plain objects


class Text(str):
    """A subclass, which may have code of its own."""


class Texts(list[str]):
    """Another."""


class Holder:
    """An object of the user's, with these attributes."""

    def __init__(self, **attributes: Any) -> None:
        self.__dict__.update(attributes)


def records(count: int = MANY) -> list[Any]:
    return [{"text": f"{i} a text", "tags": [i, str(i)], "where": (i, [i]), "kinds": {i}} for i in range(count)]


def apart(value: Any) -> bool:
    """Whether nearly nothing of it is in the pickle that holds code."""
    pickled = pickling.dump(value)
    return pickled.plain.stop - pickled.plain.start > 10 * (pickled.pickle.stop - pickled.pickle.start)


def test_large_plain_containers_are_pickled_apart_and_come_out_as_they_went_in() -> None:
    for given in (
        [f"{i}" for i in range(MANY)], records(), tuple((str(i), i, ()) for i in range(MANY)),
        {f"{i}": [b"a", 1.5, None, True] for i in range(MANY)}, set(range(MANY)),
        frozenset((i, frozenset({i})) for i in range(MANY)),
    ):  # fmt: skip
        assert apart(Holder(data=given))
        found = there(Holder(data=given)).data
        assert type(found) is type(given)
        assert found == given


def test_a_plain_container_met_again_is_the_same_one() -> None:
    texts, rows = [f"{i}" for i in range(MANY)], records()
    found = there(Holder(a=texts, b=[texts, rows], c=rows, call=lambda: texts))
    assert found.a is found.b[0] is found.call()
    assert found.c is found.b[1]


def test_what_can_change_and_is_held_by_others_too_is_still_shared() -> None:
    shared: list[Any] = [[i] for i in range(MANY)]
    again = dict(enumerate([[0]] * MANY))
    within: list[Any] = [(i, [i]) for i in range(MANY)]
    cycle: list[Any] = [[i] for i in range(MANY)]
    cycle[3].append(cycle)
    given = Holder(a=shared, one=shared[7], again=again, b=within, pair=within[7], cycle=cycle)
    found = there(given)
    assert found.a[7] is found.one
    assert found.again[0] is found.again[1]
    assert found.b[7] is found.pair
    assert found.cycle[3][1] is found.cycle
    assert (found.a, found.b) == (shared, within)


def test_subclasses_and_objects_of_the_user_s_stay_with_the_code() -> None:
    given: list[Any] = [
        [Text(i) for i in range(MANY)],
        Texts(str(i) for i in range(MANY)),
        [[i, Text(i)] for i in range(MANY)],
        {i: Holder(i=i) for i in range(MANY)},
    ]
    pickled = pickling.dump(given)
    assert pickled.plain.start == pickled.plain.stop
    found = pickled.load()
    assert type(found[0][5]) is type(found[2][5][1]) is Text
    assert type(found[1]) is Texts
    assert found[3][5].i == 5
    assert not apart([str(i) for i in range(8)])


def test_each_load_has_plain_parts_of_its_own() -> None:
    pickled = pickling.dump(Holder(data=records()))
    with pickled.prepared() as prepared:
        first, second = prepared.load().data, prepared.load().data
    first[0]["text"] = "changed"
    assert second == records()
    assert pickled.load().data == records()


def test_the_pickle_of_plain_parts_runs_no_code() -> None:
    import io
    import pickle

    with pytest.raises(pickle.UnpicklingError, match="is not plain"):
        plain.load_plain(io.BytesIO(pickle.dumps([os.getpid])))


# --------------------------------------------------------------------------------------------------------- whole runs


class Rows(Dataset[tuple[Tensor, Tensor]]):
    """Reads all of its rows before it gives the first one, and notes the process's memory then, in MiB.

    What lies in files, or is shared with others, does not count.
    """

    def __init__(self, rows: Any, notes: Path | None = None) -> None:
        self.rows, self.notes = rows, notes

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if self.notes is not None and not (self.notes / f"{os.getpid()}").exists():
            self.rows.sum()
            own, in_file = 0, False
            for first, *others in map(str.split, Path("/proc/self/smaps").read_text().splitlines()):
                if not first.endswith(":"):  # the head of a mapping; the fourth of the others is its file's inode
                    in_file = others[3] != "0"
                elif first in ("Private_Clean:", "Private_Dirty:") and not in_file:
                    own += int(others[0])
            (self.notes / f"{os.getpid()}").write_text(str(own / 1024))
        row = torch.tensor(np.asarray(self.rows[index, :3]))
        return row, row[:1]


def trained(data: Any, folder: Path, workers: int) -> str:
    recipe = Recipe(
        model=lambda: nn.Linear(3, 1), objective=squares, data=data, batch=8, microbatches=4, steps=3
    )  # fmt: skip
    return train_here(recipe, Team(workers=workers), folder).digest


@pytest.mark.processes
def test_data_of_any_kind_train_alike(file: Path, tmp_path: Path) -> None:
    made = np.load(file).repeat(4, axis=0)
    np.save(file, made)
    mapped = np.load(file, mmap_mode="r")
    kinds = [
        made,
        torch.from_numpy(made),
        mapped,
        torch.from_numpy(np.load(file, mmap_mode="c")),
        made[:, ::-1][:, ::-1],
    ]
    digests = {trained(Rows(rows), tmp_path / str(i), workers=1 + i % 3) for i, rows in enumerate(kinds)}
    digests.add(trained(lambda: Rows(made), tmp_path / "callable", workers=2))
    assert len(digests) == 1


@pytest.mark.processes
@pytest.mark.parametrize("kind", ["tensor", "array", "memmap"])
def test_data_are_in_memory_once_for_all_workers(kind: str, tmp_path: Path) -> None:
    def own_mib(mib: int) -> float:
        made: Any = np.ones((mib * 2**8, 1024), np.float32)
        if kind == "memmap":
            np.save(tmp_path / "x.npy", made)
            made = np.load(tmp_path / "x.npy", mmap_mode="r")
        notes = tmp_path / f"notes-{mib}"
        notes.mkdir()
        trained(Rows(torch.from_numpy(made) if kind == "tensor" else made, notes), tmp_path / f"run-{mib}", workers=2)
        return max(float(path.read_text()) for path in notes.iterdir())

    assert own_mib(60) - own_mib(1) < 30


class Records(Dataset[tuple[Tensor, Tensor]]):
    """Texts and records."""

    def __init__(self, count: int) -> None:
        self.texts, self.rows = [f"{i:04d}" for i in range(count)], records(count)

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        row = torch.tensor([float(len(self.texts[index])), float(self.texts[index][-1]), self.rows[index]["tags"][0]])
        self.rows[index]["text"] = "changed"  # in this process alone
        taken: Tensor = row / 1000
        return taken, taken[:1]


@pytest.mark.processes
def test_plain_objects_are_unpickled_once_before_the_forks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load, loads = plain.load_plain, tmp_path / "loads"

    def noted(file: Any) -> list[Any]:
        with loads.open("a") as notes:
            notes.write(f"{os.getpid()}\n")
        return load(file)

    monkeypatch.setattr(pickling, "load_plain", noted)
    data = Records(MANY)
    digests = {trained(data, tmp_path / str(workers), workers) for workers in (1, 2, 3)}
    assert loads.read_text().split() == [str(os.getpid())] * 3  # which supervises here, three runs
    digests.add(trained(lambda: Records(MANY), tmp_path / "callable", workers=2))
    assert len(digests) == 1
    assert data.rows == records()


@pytest.mark.processes
@pytest.mark.usefixtures("forked_pythons")
def test_runs_with_plain_objects_are_replayed_and_simulated(tmp_path: Path) -> None:
    recipe = Recipe(
        model=partial(nn.Linear, 3, 1), objective=squares, data=Records(MANY), batch=8, microbatches=4, steps=3
    )  # fmt: skip
    run = train_here(recipe, Team(workers=2), tmp_path / "run")
    assert instep.replay(run.path, recipe).same
    assert simulate(recipe, Cluster(workers=2), True, None, lambda event: None)["digest"] == run.digest
