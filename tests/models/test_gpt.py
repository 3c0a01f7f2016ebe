"""The reference model, its optimizer and its recipe."""

from __future__ import annotations

import math
import tomllib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from instep import data, objectives, recipe, recipe_files
from instep.components import Component
from instep.data.cursor import Cursor, load
from instep.errors import ComponentError, DataError, RecipeError
from instep.models import GPT, generate
from instep.models.gpt import rotary_turns, rotate
from instep.objectives.language import NextToken
from instep.optimizers import adamw


def small(**changes):
    """A model whose blocks do something from the start."""
    torch.manual_seed(0)
    model = GPT(**{"vocabulary": 11, "context": 8, "width": 16, "depth": 2, "heads": 2, **changes})
    for block in model.blocks:
        for layer in (block.attention, block.mlp):
            nn.init.normal_(layer.into_residual.weight, std=0.2)
    return model


# --- the model ------------------------------------------------------------------------------------------------------


@given(st.integers(1, 3), st.integers(1, 8), st.integers(0, 2**20))
def test_a_logit_depends_on_its_past_and_present_alone(batch, length, seed):
    model = small()
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 11, (batch, length), generator=generator)
    position = seed % length
    changed = tokens.clone()
    changed[:, position] = (changed[:, position] + 1) % 11
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    assert before.shape == (batch, length, 11)
    assert torch.equal(before[:, :position], after[:, :position])
    assert (before[:, position:] != after[:, position:]).any(dim=-1).all()


def test_the_order_of_the_past_matters():
    model = small(depth=1)  # a second layer would know it from the causal mask
    with torch.no_grad():
        there, back = model(torch.tensor([[1, 2, 3, 4]])), model(torch.tensor([[3, 1, 2, 4]]))
    assert not torch.allclose(there[:, -1], back[:, -1])


@given(st.integers(0, 20), st.integers(0, 20), st.integers(0, 20))
def test_rotary_products_depend_on_the_distance_alone(query_at, key_at, shift):
    torch.manual_seed(0)
    cos, sin = rotary_turns(64, 8, torch.device("cpu"))
    query, key = torch.randn(1, 8), torch.randn(1, 8)

    def product(i, j):
        return (rotate(query, (cos[i], sin[i])) * rotate(key, (cos[j], sin[j]))).sum()

    torch.testing.assert_close(product(query_at, key_at), product(query_at + shift, key_at + shift))
    torch.testing.assert_close(rotate(query, (cos[query_at], sin[query_at])).norm(), query.norm())


def test_tied_embeddings_are_one_parameter():
    tied, untied = small(tied=True), small(tied=False)
    assert tied.output.weight is tied.embedding.weight
    count = [sum(p.numel() for p in model.parameters()) for model in (tied, untied)]
    assert count[1] - count[0] == 11 * 16
    assert {"output.weight", "embedding.weight"} <= tied.state_dict().keys()


def test_dropout_works_in_training_alone():
    model, tokens = small(dropout=0.5), torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        assert not torch.equal(model(tokens), model(tokens))
        model.eval()
        assert torch.equal(model(tokens), model(tokens))
    plain = small(dropout=0.0)
    assert torch.equal(plain(tokens), plain(tokens))


def test_blocks_at_first_add_nothing_and_all_parameters_learn():
    torch.manual_seed(0)
    model = GPT(vocabulary=11, context=8, width=16, depth=2, heads=2)
    tokens = torch.randint(0, 11, (4, 9))
    assert torch.equal(model(tokens[:, 1:]), model.output(model.norm(model.embedding(tokens[:, 1:]))))
    biases = model.blocks[0].attention.queries_keys_values.bias.split([32, 16])
    assert biases[0].std() > 1
    assert biases[1].abs().max() == 0
    optimizer = adamw(model.parameters(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        NextToken()(model, tokens).backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_it_starts_near_the_uniform_distribution():
    model = GPT()
    tokens = torch.randint(0, 256, (4, 129))
    per_token = NextToken()(model, tokens).item() / (4 * 128)
    assert per_token == pytest.approx(math.log(256), rel=0.05)


def test_it_has_no_buffers_and_runs_in_bfloat16():
    model = small()
    assert not list(model.buffers())  # nothing that the engine would have to average
    with torch.autocast("cpu", torch.bfloat16):
        assert model(torch.tensor([[1, 2]])).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"width": 18, "heads": 4}, ["width 18", "4 heads", "16"]),
        ({"width": 2, "heads": 2}, ["width 2", "2 heads", "4"]),
        ({"depth": 0}, ["'depth'", "0", "at least 1"]),
        ({"context": -1}, ["'context'", "-1"]),
        ({"width": 16.0}, ["'width'", "16.0", "whole number"]),
        ({"dropout": 1.0}, ["'dropout'", "1.0"]),
    ],
)
def test_bad_sizes_are_refused(changes, words):
    with pytest.raises(RecipeError) as caught:
        small(**changes)
    assert all(word in str(caught.value) for word in words), caught.value


def test_tokens_beyond_the_context_are_refused():
    with pytest.raises(DataError, match="9 tokens .*context of 8"):
        small()(torch.zeros(1, 9, dtype=torch.long))


def test_it_learns():
    model, optimizer = small(width=32), None
    optimizer = adamw(model.parameters(), lr=1e-2, weight_decay=0.0)
    tokens = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8, 9], [9, 7, 5, 3, 1, 8, 6, 4, 2]])
    for _ in range(60):
        optimizer.zero_grad()
        total = NextToken()(model, tokens)
        total.backward()
        optimizer.step()
    assert total.item() / 16 < 0.5


# --- generation -----------------------------------------------------------------------------------------------------


def test_generation_depends_on_the_generator_alone():
    model, prompt = small(dropout=0.5), torch.tensor([1, 2, 3])

    def draw(seed):
        return generate(model, prompt, 20, torch.Generator().manual_seed(seed)).tolist()

    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = draw(0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert draw(0) == first != draw(1)
    assert first[:3] == [1, 2, 3]
    assert len(first) == 23
    assert model.training
    assert model.blocks[0].training


def test_generation_sees_the_last_tokens_of_the_context_and_takes_any_callable():
    def counting(tokens):
        """The likeliest token is the number of tokens seen."""
        counting.seen.append(tokens.shape[1])
        return nn.functional.one_hot(torch.full(tokens.shape, tokens.shape[1]), 50).float()

    counting.seen = []
    assert generate(counting, torch.tensor([7, 7]), 3, temperature=0).tolist() == [7, 7, 2, 3, 4]
    counting.context = 3
    assert generate(counting, torch.tensor([7, 7]), 3, temperature=0).tolist() == [7, 7, 2, 3, 3]
    rows = generate(counting, torch.tensor([[7], [8]]), 2, temperature=0)
    assert rows.tolist() == [[7, 1, 2], [8, 1, 2]]
    assert generate(counting, torch.tensor([], dtype=torch.long), 2, temperature=0).tolist() == [1, 2]
    assert generate(small(), torch.tensor([1] * 30), 0).tolist() == [1] * 30


def test_a_low_temperature_takes_the_likeliest():
    model, prompt = small(), torch.tensor([[1], [2]])
    cold = generate(model, prompt, 6, torch.Generator().manual_seed(0), temperature=1e-4)
    assert torch.equal(cold, generate(model, prompt, 6, temperature=0))


# --- the optimizer --------------------------------------------------------------------------------------------------


def test_only_matrices_decay():
    model = small()
    optimizer = adamw(model.parameters(), lr=0.01, weight_decay=0.3, betas=[0.8, 0.9])
    decays = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {p: 0.3 if p.dim() >= 2 else 0.0 for p in model.parameters()} == decays
    assert all(group["betas"] == (0.8, 0.9) and group["lr"] == 0.01 for group in optimizer.param_groups)
    assert optimizer.defaults["fused"]
    assert len(adamw([nn.Parameter(torch.zeros(2, 2))]).param_groups) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [({"betas": [0.9]}, ["betas", "0.9"]), ({"lr": -1.0}, ["-1.0"]), ({"weight_decay": -0.1}, ["-0.1"])],
)
def test_bad_optimizer_arguments_are_refused(arguments, words):
    with pytest.raises(RecipeError) as caught:
        adamw([nn.Parameter(torch.zeros(2, 2))], **arguments)
    assert all(word in str(caught.value) for word in words), caught.value
    with pytest.raises(RecipeError, match="no parameters"):
        adamw([])
    with pytest.raises(ComponentError, match="'lr'"):
        Component(adamw, {"lrr": 1.0}).build([])


# --- the recipe -----------------------------------------------------------------------------------------------------


def test_the_recipe_is_complete_and_its_parts_fit():
    made, team = recipe.parse(recipe_files.read("gpt"))
    assert recipe.parse(tomllib.loads(recipe.dumps(made, team))) == (made, team)
    assert (made.name, team.workers, made.microbatches) == ("gpt", 2, 8)
    torch.manual_seed(made.seed)
    model = made.model.build()
    optimizer = made.optimizer.build(list(model.parameters()))
    objective = objectives.bind(objectives.from_component(made.objective))
    loaded = data.from_component(made.data)
    cursor = Cursor(len(loaded.train), made.batch, made.microbatches, made.seed)
    batch = load(loaded.train, cursor.microbatch(0, 0), loaded.collate)
    objectives.check_is_sum(objective, model, batch)
    count = objective.counts(batch)["objective"]
    assert count == batch.shape[0] * (batch.shape[1] - 1)
    before = objective.sums(model, batch)["objective"]
    before.backward()
    optimizer.step()
    assert objective.sums(model, batch)["objective"] < before
    assert model.context == batch.shape[1] - 1
    assert made.evaluate_samples <= len(loaded.held_out)
