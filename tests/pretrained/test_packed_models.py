"""Packed documents for models of transformers, whole and with adapters: kept apart, or the model is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from instep import Team
from instep.data.packing import PackedRows
from instep.data.token_files import TokenFile
from instep.errors import ObjectiveError
from instep.objectives.language import NextToken
from instep.packed import PackedTokens
from instep.pretrained import hf, lora
from instep.recipe import Recipe
from support.harness import stopping_at, train_here
from support.kinds import quick

pytest.importorskip("peft")
pytest.importorskip("transformers")

from support.base_models import base_folder, recipe_on

END, CONTEXT = 255, 32


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_folder(tmp_path_factory.mktemp("base") / "llama")


def written(path: Path) -> Path:
    """Documents of 3 to 30 tokens, each with `END` after it."""
    draw = np.random.default_rng(0)
    texts = [np.append(draw.integers(0, END, draw.integers(2, 30)), END) for _ in range(40)]
    path.write_bytes(np.concatenate(texts).astype("<u2").tobytes())
    return path


def packed(path: Path) -> PackedTokens:
    rows = PackedRows([TokenFile(written(path))], CONTEXT, separator=END)
    found: PackedTokens = torch.utils.data.default_collate([rows[number] for number in range(8)])
    return found


def with_adapters(folder: Path) -> nn.Module:
    """Adapters that do something."""
    model = lora(folder)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(len(name)))
    return model


@pytest.mark.pure
@pytest.mark.parametrize("make", [hf, with_adapters])
def test_documents_that_share_a_row_have_the_loss_that_each_has_alone(make: Any, base: Path, tmp_path: Path) -> None:
    model, batch = make(base).train(), packed(tmp_path / "a.bin")
    total, alone, documents = NextToken()(model, batch), torch.zeros(()), 0
    for row in range(len(batch.inputs)):
        for number in range(1, int(batch.documents[row].max()) + 1):
            own, documents = batch.documents[row] == number, documents + 1
            alone = alone + NextToken()(model, (batch.inputs[row][own][None], batch.targets[row][own][None]))
    assert documents > len(batch.inputs)
    torch.testing.assert_close(total, alone)


@pytest.mark.pure
@pytest.mark.parametrize("make", [hf, lora])
@pytest.mark.parametrize(
    ("family", "sentence"),
    [
        ("opt", "OPTForCausalLM reads across documents"),
        ("bloom", "BloomForCausalLM.forward takes neither 'documents' nor 'position_ids'"),
    ],
)
def test_a_model_whose_documents_leak_is_refused_with_adapters_and_without(
    make: Any, family: str, sentence: str, tmp_path: Path
) -> None:
    model = make(base_folder(tmp_path / family, family))
    with pytest.raises(ObjectiveError, match=sentence):
        NextToken()(model, packed(tmp_path / "a.bin"))


@pytest.mark.processes
@pytest.mark.parametrize("name", quick(["lora", "sft"], "lora"))
def test_recipes_on_packed_rows_have_one_digest_for_any_team_and_after_a_resume(
    name: str, base: Path, tmp_path: Path
) -> None:
    recipe = on_packed_rows(name, base, written(tmp_path / "a.bin"))
    runs = [train_here(recipe, Team(workers=w, loaders=w % 2), tmp_path / str(w)) for w in (1, 3)]
    stopped = train_here(recipe, Team(workers=2), tmp_path / "stopped", client=stopping_at(2))
    assert stopped.result["interrupted"]
    runs.append(train_here(recipe, Team(workers=1), tmp_path / "stopped", resume=True))
    assert len({run.digest for run in runs}) == 1


def on_packed_rows(name: str, base: Path, path: Path) -> Recipe:
    return recipe_on(
        name, base, steps="4", batch="4", microbatches="4", data__use="instep.data.packing:packed_token_files",
        data__args=f'{{ pattern = "{path}", context = {CONTEXT}, separator = {END}, held_out = 0.2 }}',
    )  # fmt: skip
