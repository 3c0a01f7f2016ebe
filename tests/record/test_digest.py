"""The digest: one stream of bytes, the same from memory and from a file, different for any difference."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from instep.errors import CheckpointError, RecordError
from instep.record import weights
from instep.record.digest import digest_of_file, digest_of_state
from instep.record.files import synced_file
from support.gpu import gpus, on_gpu

DTYPES = [getattr(torch, name) for name in weights._NAMES]


def write(path: Path, state: dict[str, torch.Tensor]) -> Path:
    with synced_file(path) as file:
        weights.write_weights(file, state)
    return path


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Any type, 0 to 3 dimensions, sizes from 0, any bytes (NaN too), any strides."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    count = torch.Size(shape).numel()
    if dtype is torch.bool:
        tensor = torch.randint(0, 2, (count,), generator=generator).bool()
    else:
        raw = torch.randint(0, 256, (count * dtype.itemsize,), dtype=torch.uint8, generator=generator)
        tensor = raw.view(dtype) if count else torch.empty(0, dtype=dtype)
    tensor = tensor.reshape(shape)
    if shape and draw(st.booleans()):
        tensor = tensor.permute(draw(st.permutations(range(len(shape)))))
    if shape and draw(st.booleans()):
        tensor = tensor[..., ::2]
    if dtype is torch.complex64 and draw(st.booleans()):
        tensor = tensor.conj()
    return tensor


states = st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=6), tensors(), max_size=5)


@given(state=states)
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_memory_and_file_agree(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = write(tmp_path / "model.safetensors", state)
    loaded = safetensors.torch.load_file(path)
    assert digest_of_state(state) == digest_of_file(path) == digest_of_state(loaded)
    assert {name: (t.dtype, t.shape) for name, t in loaded.items()} == {
        name: (t.dtype, t.shape) for name, t in state.items()
    }


@given(state=states)
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_files_of_the_safetensors_package_have_the_same_digest(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    state = {name: tensor.resolve_conj().clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(state, path)
    assert digest_of_file(path) == digest_of_state(state)


@given(state=states.filter(lambda state: any(t.numel() for t in state.values())), data=st.data())
@settings(max_examples=50)
def test_one_bit_changes_it(state: dict[str, torch.Tensor], data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(name for name, t in state.items() if t.numel())))
    other = {key: tensor.resolve_conj().clone(memory_format=torch.contiguous_format) for key, tensor in state.items()}
    assert digest_of_state(other) == digest_of_state(state)
    raw = other[name].view(-1).view(torch.uint8)
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << (0 if other[name].dtype is torch.bool else 7)
    assert digest_of_state(other) != digest_of_state(state)


def test_name_type_and_shape_count_and_order_does_not() -> None:
    zeros = torch.zeros(2, 3)
    digest = digest_of_state({"a": zeros, "b": torch.ones(1)})
    assert digest == digest_of_state({"b": torch.ones(1), "a": zeros})
    others = [
        {"a": zeros, "c": torch.ones(1)},
        {"a": zeros.T, "b": torch.ones(1)},
        {"a": zeros.flatten(), "b": torch.ones(1)},
        {"a": zeros.int(), "b": torch.ones(1)},
        {"a": torch.ones(1), "b": zeros},
        {"a": zeros},
        {"a": -zeros, "b": torch.ones(1)},
    ]
    assert len({digest, *map(digest_of_state, others)}) == len(others) + 1


def test_it_is_the_documented_stream() -> None:
    state = {"b": torch.tensor(3, dtype=torch.int16), "a": torch.tensor([[1.0], [2.0]])}
    stream = b'["a", "F32", [2, 1]]\n' + struct.pack("<2f", 1, 2) + b'["b", "I16", []]\n' + struct.pack("<h", 3)
    assert digest_of_state(state) == hashlib.sha256(stream).hexdigest()


def test_tied_weights_are_written_under_each_name(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3, bias=False), torch.nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    path = write(tmp_path / "model.safetensors", model.state_dict())
    loaded = safetensors.torch.load_file(path)
    assert sorted(loaded) == ["0.weight", "1.weight"]
    model.load_state_dict(loaded)
    assert digest_of_file(path) == digest_of_state(model.state_dict())


def test_tensors_are_aligned_in_the_file(tmp_path: Path) -> None:
    state = {"a": torch.ones(3).byte(), "b": torch.ones(3).bfloat16(), "c": torch.ones(1).double(), "d": torch.ones(3)}
    path = write(tmp_path / "model.safetensors", state)
    with path.open("rb") as file:
        stored = weights.read_header(file, path)
    assert [stored[name].start % state[name].itemsize for name in state] == [0, 0, 0, 0]


def test_parameters_and_inference_tensors_are_taken() -> None:
    with torch.inference_mode():
        inside = digest_of_state({"w": torch.ones(2)})
    assert inside == digest_of_state({"w": torch.nn.Parameter(torch.ones(2))})


@pytest.mark.processes
@pytest.mark.skipif(not gpus(), reason="no GPU here")
def test_tensors_on_a_gpu_are_taken(tmp_path: Path) -> None:
    state = {"w": torch.arange(6.0).reshape(2, 3).T, "n": torch.tensor(4)}

    def there() -> tuple[str, str]:
        moved = {name: tensor.cuda() for name, tensor in state.items()}
        return digest_of_state(moved), digest_of_file(write(tmp_path / "m.safetensors", moved))

    assert set(on_gpu(there)) == {digest_of_state(state)}


@pytest.mark.parametrize(
    "value", [{"epoch": 1}, None, 3.0, torch.eye(2).to_sparse(), torch.ones(1, device="meta"), torch.ones(1).cdouble()]
)
def test_what_is_no_dense_tensor_is_refused(value: object, tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"'layer\._extra_state' in the model's state_dict is"):
        digest_of_state({"layer._extra_state": value})  # type: ignore[dict-item]
    with pytest.raises(RecordError, match=r"layer\._extra_state"):
        write(tmp_path / "model.safetensors", {"layer._extra_state": value})  # type: ignore[dict-item]
    with pytest.raises(RecordError, match="__metadata__"):
        write(tmp_path / "model.safetensors", {"__metadata__": torch.ones(1)})


def build(header: object, body: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def entry(dtype: object = "F32", shape: object = (1,), offsets: object = (0, 4)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "cut off"),
        (b"\x10\0\0", "cut off"),
        (struct.pack("<Q", 2**63) + b"{}", "cut off"),
        (struct.pack("<Q", 100) + b"{}", "cut off"),
        (build(b"{nonsense", b""), "not JSON"),
        (build(b"[" * 100_000, b""), "not JSON"),
        (build(b"\xff\xfe", b""), "not JSON"),
        (build([1], b""), "not a table"),
        (build(b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{}}', b""), "not JSON"),
        (build({"a": 3}, b"1234"), "'a' contradicts itself"),
        (build({"a": entry(shape=[2])}, b"1234"), "'a' contradicts itself"),
        (build({"a": entry(offsets=[0, 8])}, b"12345678"), "'a' contradicts itself"),
        (build({"a": entry(shape=[-1], offsets=[4, 0])}, b"1234"), "'a' contradicts itself"),
        (build({"a": entry(shape=["1"])}, b"1234"), "'a' contradicts itself"),
        (build({"a": entry(dtype="F5")}, b"1234"), "'F5'"),
        (build({"a": entry()}, b"123"), "bytes"),
        (build({"a": entry()}, b"12345"), "bytes"),
        (build({"a": entry(), "b": entry(offsets=[2, 6])}, b"123456"), "'b' does not begin"),
        (build({"a": entry(), "b": entry(offsets=[6, 10])}, b"1234567890"), "'b' does not begin"),
    ],
)
def test_a_file_that_is_no_safetensors_is_refused(data: bytes, why: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=why) as caught:
        digest_of_file(path)
    assert str(path) in caught.value.message
    assert "\n" not in caught.value.message


def test_a_missing_file_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file"):
        digest_of_file(tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError, match="directory"):
        digest_of_file(tmp_path)


def test_big_tensors_are_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_CHUNK_BYTES", 5)
    state = {"a": torch.arange(100.0), "b": torch.arange(7, dtype=torch.uint8)}
    assert digest_of_file(write(tmp_path / "model.safetensors", state)) == digest_of_state(state)


@pytest.mark.processes
def test_the_digest_of_a_file_needs_no_torch(tmp_path: Path) -> None:
    path = write(tmp_path / "model.safetensors", {"w": torch.ones(3)})
    code = (
        "import sys; import instep.record.folder, instep.record.tape; from instep.record.digest import digest_of_file; "
        f"print(digest_of_file({str(path)!r})); assert not {{'torch', 'numpy'}} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.stdout.strip() == digest_of_state({"w": torch.ones(3)})
