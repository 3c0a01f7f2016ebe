"""PackedTokens documents: no token lost, none twice, no target in another document, hardly any padding."""

from __future__ import annotations

import itertools
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from instep import Recipe, Team
from instep.data import Data, packing
from instep.data.packing import IGNORED, PackedRows, best_fit, document_ends, packed_token_files
from instep.data.token_files import TokenFile
from instep.errors import DataError, ObjectiveError, RecipeError
from instep.models import GPT
from instep.objectives.language import MaskedTokens, NextToken
from instep.packed import PackedTokens
from support.harness import train_here

END = 49


def documents(sizes: list[int], seed: int = 0) -> list[np.ndarray]:
    """Of tokens below `END`, each with that at its end."""
    draw = np.random.default_rng(seed)
    return [np.append(draw.integers(0, END, size - 1), END) for size in sizes]


def written(path: Path, texts: list[np.ndarray]) -> Path:
    path.write_bytes(np.concatenate([np.empty(0, np.int64), *texts]).astype("<u2").tobytes())
    return path


def slow_best_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    rows: list[list[int]] = []
    left: list[int] = []
    filled: list[int] = []
    for turn, number in enumerate(sorted(range(len(lengths)), key=lambda number: -lengths[number])):
        fitting = [row for row, room in enumerate(left) if room >= lengths[number]]
        if fitting:
            row = min(fitting, key=lambda row: (left[row], -filled[row]))
        else:
            row = len(rows)
            rows.append([])
            left.append(capacity)
            filled.append(turn)
        rows[row].append(number)
        left[row] -= lengths[number]
        filled[row] = turn
    return rows


@pytest.mark.pure
@given(st.lists(st.integers(1, 12), max_size=60))
def test_the_best_fit_is_that_of_a_search_through_all_rows(lengths: list[int]) -> None:
    assert best_fit(np.array(lengths, dtype=np.int64), 12) == slow_best_fit(lengths, 12)


@pytest.mark.pure
@given(st.lists(st.integers(1, 40), min_size=1, max_size=40), st.integers(1, 9), st.integers(0, 3))
def test_every_token_is_an_input_and_a_target_once_in_its_own_document(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], context: int, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("packed")
    texts = documents(sizes)
    cut = len(texts) // 2
    files = [TokenFile(written(folder / f"{n}.bin", part)) for n, part in enumerate((texts[:cut], texts[cut:]))]
    expected = sorted((int(a), int(b)) for text in texts for a, b in itertools.pairwise(text))
    if not expected:
        with pytest.raises(DataError, match="no document of at least 2 tokens"):
            len(PackedRows(files, context, separator=END, seed=seed))
        return
    rows = PackedRows(files, context, separator=END, seed=seed)
    found = []
    for row in (rows[number] for number in range(len(rows))):
        real = row.documents > 0
        assert ((row.inputs == IGNORED) == ~real).all()
        assert ((row.targets == IGNORED) == ~real).all()
        found += list(zip(row.inputs[real].tolist(), row.targets[real].tolist(), strict=True))
        for number in range(1, int(row.documents.max()) + 1):
            own = row.documents == number
            assert row.positions[own].tolist() == list(range(int(own.sum())))
            assert (row.inputs[own][1:] == row.targets[own][:-1]).all(), "it is one piece of one document"
            assert END not in row.inputs[own], "where it ends, it is a target alone"
    assert sorted(found) == expected
    assert rows.padding == 1 - len(expected) / (len(rows) * context)


@pytest.mark.pure
def test_windows_of_documents_are_packed_each_alone_in_an_order_of_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "WINDOW", 16)
    lengths = np.random.default_rng(1).integers(2, 30, 100)
    starts = np.cumsum(lengths) - lengths

    def packed(seed: int) -> list[tuple[int, int]]:
        parts = list(packing.pack(starts, lengths, 32, seed))
        assert len(parts) == 7
        return [(int(a), int(b)) for begun, sizes, _ in parts for a, b in zip(begun, sizes, strict=True)]

    assert packed(0) == packed(0)
    assert packed(0) != packed(1)
    assert (
        sorted(packed(0))
        == sorted(packed(1))
        == [(int(start), int(length) - 1) for start, length in zip(starts, lengths, strict=True)]
    )


@pytest.mark.pure
def test_documents_as_long_as_those_of_the_web_leave_hardly_any_padding() -> None:
    lengths = np.exp(np.random.default_rng(0).normal(6, 1, packing.WINDOW)).astype(np.int64) + 2
    rows = [count for _, _, counts in packing.pack(np.cumsum(lengths), lengths, 2048, 0) for count in counts]
    assert (lengths - 1).sum() / (len(rows) * 2048) >= 0.995


@pytest.mark.pure
def test_documents_end_where_the_index_says_or_at_separators(tmp_path: Path) -> None:
    texts = documents([3, 1, 7])
    file = TokenFile(written(tmp_path / "a.bin", texts))
    assert document_ends(file, END).tolist() == [3, 4, 11]
    assert document_ends(TokenFile(written(tmp_path / "b.bin", [*texts, np.array([5, 6])])), END).tolist() == [
        3,
        4,
        11,
        13,
    ]
    assert document_ends(TokenFile(written(tmp_path / "c.bin", [])), END).tolist() == []
    with pytest.raises(DataError, match="does not say where its documents end; give 'separator'"):
        document_ends(file)


@pytest.mark.pure
def test_the_index_is_made_once_and_again_for_other_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "a.bin", documents([5, 9, 3]))
    first = PackedRows([TokenFile(path)], 8, separator=END)
    expected = [row.inputs.tolist() for row in (first[number] for number in range(len(first)))]
    made = first.index_path.stat().st_ino
    again = PackedRows([TokenFile(path)], 8, separator=END)
    assert [again[number].inputs.tolist() for number in range(len(again))] == expected
    assert again.index_path.stat().st_ino == made
    again.index_path.write_bytes(again.index_path.read_bytes()[:-8])
    torn = PackedRows([TokenFile(path)], 8, separator=END)
    assert [torn[number].inputs.tolist() for number in range(len(torn))] == expected
    written(path, documents([5, 9, 3, 4]))
    assert PackedRows([TokenFile(path)], 8, separator=END).digest != first.digest


@pytest.mark.pure
def test_the_index_is_made_again_for_another_type_of_tokens_and_other_ends_of_documents(tmp_path: Path) -> None:
    path = written(tmp_path / "a.bin", documents([5, 9, 3, 7]))
    narrow, wide = (
        PackedRows([file], 8, separator=END) for file in (TokenFile(path, "uint16"), TokenFile(path, "uint32"))
    )
    assert narrow.digest != wide.digest
    assert narrow.index_path != wide.index_path

    def rows(sizes: list[int]) -> PackedRows:
        count = len(sizes)
        header = megatron_header(count) + np.array(sizes, "<i4").tobytes() + bytes(8 * count)
        path.with_suffix(".idx").write_bytes(header + np.arange(count + 1).astype("<i8").tobytes())
        return PackedRows([TokenFile(path)], 8)

    found: list[object] = []
    for sizes in ([5, 9, 3, 7], [4, 10, 3, 7]):
        packed = rows(sizes)
        found.append(sum(int((packed[number].documents > 0).sum()) for number in range(len(packed))))
        assert max(int(packed[number].positions.max()) for number in range(len(packed))) == 7
        found.append(packed.digest)
    assert found[0] == found[2] == 20
    assert found[1] != found[3]
    path.with_suffix(".idx").write_bytes(megatron_header(1, 1) + np.array([24], "<i4").tobytes() + bytes(16))
    with pytest.raises(DataError, match="says documents that do not cover its 1 sequences"):
        len(PackedRows([TokenFile(path)], 8))


def megatron_header(sequences: int, documents: int = 0) -> bytes:
    """The header of an index of Megatron's, of so many sequences."""
    return struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8, sequences, documents or sequences + 1)


class Leaking(GPT):
    def hidden(self, tokens: torch.Tensor, documents: torch.Tensor | None = None) -> torch.Tensor:
        return super().hidden(tokens)


class Counting(nn.Module):
    """Positions that go on from one document to the next."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places, self.output = nn.Embedding(50, 16), nn.Embedding(32, 16), nn.Linear(16, 50)

    def forward(self, tokens: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.output(self.tokens(tokens) + self.places.weight[: tokens.shape[1]])
        return out


class Unaware(nn.Module):
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return nn.functional.one_hot(tokens, 50).float()


def small(model: type[GPT] = GPT) -> GPT:
    torch.manual_seed(0)
    return model(vocabulary=50, context=16, width=16, depth=2, heads=2)


def batch(tmp_path: Path, context: int = 16) -> PackedTokens:
    path = written(tmp_path / "a.bin", documents([6, 5, 8, 4, 3, 9, 12, 7]))
    rows = PackedRows([TokenFile(path)], context, separator=END)
    found: PackedTokens = torch.utils.data.default_collate([rows[number] for number in range(len(rows))])
    return found


@pytest.mark.pure
def test_documents_that_share_a_row_have_the_loss_that_each_has_alone(tmp_path: Path) -> None:
    model, packed = small(), batch(tmp_path)
    for block in model.blocks:
        nn.init.normal_(block.attention.into_residual.weight)
    total = NextToken()(model, packed)
    alone = torch.zeros(())
    for row in range(len(packed.inputs)):
        for number in range(1, int(packed.documents[row].max()) + 1):
            own = packed.documents[row] == number
            alone = alone + NextToken()(model, (packed.inputs[row][own][None], packed.targets[row][own][None]))
    assert isinstance(total, torch.Tensor)
    torch.testing.assert_close(total, alone)
    assert NextToken().counts(packed) == int((packed.documents > 0).sum())


@pytest.mark.pure
@pytest.mark.parametrize(
    ("model", "match"),
    [
        (lambda: small(Leaking), "Leaking reads across documents: where the first one of a row is changed"),
        (Counting, "Counting gives a document other logits where it stands alone"),
        (Unaware, "Unaware.forward takes neither 'documents' nor 'position_ids'"),
    ],
)
def test_a_model_that_mixes_documents_is_refused(model: type[nn.Module], match: str, tmp_path: Path) -> None:
    with pytest.raises(ObjectiveError, match=match):
        NextToken()(model(), batch(tmp_path))


@pytest.mark.pure
def test_another_objective_refuses_packed_documents(tmp_path: Path) -> None:
    with pytest.raises(ObjectiveError, match="was given packed documents"):
        MaskedTokens()(small(), batch(tmp_path))


def recipe(path: Path, **fields: object) -> Recipe:
    return Recipe(
        model=small,
        data=lambda: packed_token_files(str(path), 16, 0.2, separator=END, vocabulary=50),
        objective=NextToken(),
        optimizer="torch.optim:AdamW",
        batch=4,
        microbatches=4,
        steps=6,
        **fields,
    )


@pytest.mark.processes
def test_packed_documents_train_to_one_digest(tmp_path: Path) -> None:
    path = written(tmp_path / "a.bin", documents(np.random.default_rng(2).integers(2, 30, 60).tolist()))
    digests = {train_here(recipe(path), Team(workers=workers), tmp_path / str(workers)).digest for workers in (1, 2, 3)}
    assert len(digests) == 1


@pytest.mark.pure
def test_a_token_above_the_vocabulary_names_row_and_file(tmp_path: Path) -> None:
    path = written(tmp_path / "a.bin", documents([6, 5]))
    rows = PackedRows([TokenFile(path)], 16, separator=END, vocabulary=40)
    with pytest.raises(DataError, match=r"row 0 has the token .* of .*a\.bin, and the vocabulary is 40"):
        rows[0]


@pytest.mark.pure
def test_a_folder_that_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    path = written(tmp_path / "a.bin", documents([6, 5]))
    with pytest.raises(DataError, match="the index of packed documents cannot be written to .*; give 'index'"):
        len(PackedRows([TokenFile(path)], 16, separator=END, index=path / "below a file"))


@pytest.mark.pure
def test_documents_are_held_out_by_share(tmp_path: Path) -> None:
    path = written(tmp_path / "a.bin", documents([4] * 20))
    data = packed_token_files(str(path), 9, 0.25, separator=END)
    assert isinstance(data, Data)
    assert isinstance(data.held_out, PackedRows)
    assert (len(data.train), len(data.held_out)) == (5, 2)
    with pytest.raises(RecipeError, match="'held_out' is 1.5; it is a share"):
        packed_token_files(str(path), 9, 1.5, separator=END)
