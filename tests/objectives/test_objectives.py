"""Objectives: what they may answer, and that a sum over items is one."""

from __future__ import annotations

import copy
import functools
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

from instep.components import Component
from instep.errors import ComponentError, ObjectiveError
from instep.objectives import bind, check_is_sum, from_component, learn_terms, objective
from instep.objectives.language import NextToken
from instep.randomness import seed_all

IGNORED = -100


def squares(model, batch):
    return model(batch).pow(2).sum()


@objective(counts=lambda batch: batch.numel())
def counted(model, batch):
    return model(batch).sum()


def weighted_counts(batch, ignore=0):
    return int((batch != ignore).sum())


@objective(counts=weighted_counts)
def weighted(model, batch, weight=1.0, ignore=0):
    return weight * model(batch).sum()


class Bigrams(nn.Module):
    """The least of language models: logits [B, T, V] that depend on the token alone."""

    def __init__(self, vocabulary=7):
        super().__init__()
        self.table = nn.Embedding(vocabulary, vocabulary)
        self.seen = []

    def forward(self, tokens):
        self.seen.append(tokens)
        return self.table(tokens)


def linear():
    torch.manual_seed(0)
    return nn.Linear(3, 2)


# --- the decorator and components -----------------------------------------------------------------------------------


def test_decorator_returns_the_function_itself():
    def f(model, batch):
        return batch.sum()

    count = len
    assert objective(f) is f
    assert not hasattr(f, "counts")
    assert objective(counts=count)(f) is f
    assert f.counts is count
    assert (Component(counted).address or "").endswith(":counted")


def test_component_of_a_class_is_built():
    assert from_component(Component("instep.objectives.language:NextToken", {"ignore_index": 0})) == NextToken(0)
    assert from_component(Component(NextToken)) == NextToken()


def test_component_of_a_function_keeps_its_counts_and_shares_arguments():
    batch = torch.tensor([[1.0, 2.0, 5.0]])
    f = from_component(Component(weighted, {"weight": 3.0, "ignore": 5}))
    assert isinstance(f, functools.partial)
    assert bind(f).counts(batch) == {"objective": 2}
    model = linear()
    assert torch.equal(bind(f).sums(model, batch)["objective"], 3 * model(batch).sum())
    assert from_component(Component(squares)) is squares
    assert bind(functools.partial(squares)).counts(batch) == {"objective": 1}


@pytest.mark.parametrize(
    ("component", "words"),
    [
        (Component(weighted, {"wieght": 2.0}), ["weighted", "wieght", "weight"]),
        (Component("math:pi"), ["math:pi", "float", "cannot be called"]),
        (Component(NextToken, {"ignore": 1}), ["NextToken", "ignore"]),
        (Component("instep.objectives.language:NextTokn"), ["NextToken"]),
    ],
)
def test_component_that_is_no_objective_is_refused(component, words):
    with pytest.raises(ComponentError) as caught:
        from_component(component)
    assert all(word in str(caught.value) for word in words)


# --- what an objective may answer -----------------------------------------------------------------------------------


def with_counts(answer):
    @objective(counts=lambda batch: answer)
    def f(model, batch):
        return model(batch).sum()

    return bind(f)


@pytest.mark.parametrize("answer", [5, torch.tensor(5), np.int64(5), torch.tensor(5, dtype=torch.uint8)])
def test_counts_are_whole_numbers(answer):
    found = with_counts(answer).counts(None)
    assert found == {"objective": 5}
    assert type(found["objective"]) is int
    assert with_counts({"a": answer, "b": 0}).counts(None) == {"a": 5, "b": 0}


@pytest.mark.parametrize(
    "answer", [-1, 2.0, True, None, "3", torch.tensor(2.0), torch.tensor([2]), torch.tensor(True), torch.tensor(-1)]
)
def test_other_counts_are_refused(answer):
    with pytest.raises(ObjectiveError, match="whole number"):
        with_counts(answer).counts(None)
    with pytest.raises(ObjectiveError, match="term 'b'"):
        with_counts({"a": 1, "b": answer}).counts(None)


@pytest.mark.parametrize(
    "batch",
    [torch.zeros(4, 3), (torch.tensor(1.0), torch.zeros(4), torch.zeros(9)), {"x": [torch.zeros(4, 1)], "n": 3}],
)
def test_samples_are_counted_without_counts(batch):
    assert bind(squares).counts(batch) == {"objective": 4}


def test_sequences_are_the_samples_of_a_packed_sequence():
    packed = pack_sequence([torch.zeros(5, 2), torch.zeros(3, 2), torch.zeros(1, 2)])
    assert bind(lambda m, b: m(b)).counts(packed) == {"objective": 3}
    assert bind(lambda m, b: m(b)).counts({"x": packed, "y": torch.zeros(7)}) == {"objective": 3}


@pytest.mark.parametrize("batch", [["a", "b"], torch.tensor(1.0), 3, {}])
def test_a_batch_without_samples_to_count_is_refused(batch):
    with pytest.raises(ObjectiveError, match="counts"):
        bind(squares).counts(batch)


def test_sums_are_scalars_with_gradients():
    model, batch = linear(), torch.ones(4, 3)
    sums = bind(squares).sums(model, batch)
    assert list(sums) == ["objective"]
    assert sums["objective"].requires_grad
    with torch.no_grad():
        assert not bind(squares).sums(model, batch)["objective"].requires_grad


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda y: y.pow(2), ["'objective'", "[4, 2]", "scalar"]),
        (lambda y: y.sum().reshape(1), ["[1]"]),
        (lambda y: y.sum().item(), ["tensor"]),
        (lambda y: None, ["tensor"]),
        (lambda y: y.sum().detach(), ["gradient", "detach"]),
        (lambda y: {"a": y.sum(), "b": y.sum().detach()}, ["'b'", "gradient"]),
        (lambda y: {"a": y.sum(), "b": 0.0}, ["'b'", "tensor"]),
        (lambda y: {1: y.sum()}, ["names"]),
        (lambda y: {}, ["no sums"]),
        (lambda y: (y.sum(), y.sum()), ["tensor", "tuple"]),
    ],
)
def test_other_sums_are_refused(answer, words):
    with pytest.raises(ObjectiveError) as caught:
        bind(lambda model, batch: answer(model(batch))).sums(linear(), torch.ones(4, 3))
    assert all(word in str(caught.value) for word in words), caught.value


def test_non_finite_sums_are_left_to_the_engine():
    assert bind(lambda m, b: m(b).sum() / 0).sums(linear(), torch.ones(1, 3))["objective"].isinf()


def two_terms(model, batch):
    y = model(batch)
    return {"square": y.pow(2).sum(), "absolute": y.abs().sum()}


def test_terms_are_learnt_from_one_forward():
    model, batch = linear(), torch.ones(4, 3)
    bound = learn_terms(bind(two_terms), model, batch)
    assert bound.terms == ("square", "absolute")
    assert bound.counts(batch) == {"square": 4, "absolute": 4}
    assert learn_terms(bind(squares), model, batch).terms == ("objective",)


def test_sums_and_counts_must_have_the_same_names():
    model, batch = linear(), torch.ones(4, 3)
    f = objective(counts=lambda batch: {"square": 1, "absolut": 1})(lambda m, b: two_terms(m, b))
    with pytest.raises(ObjectiveError, match="'absolut'.*'absolute'"):
        learn_terms(bind(f), model, batch)
    fickle = learn_terms(bind(lambda m, b: two_terms(m, b) if len(b) > 1 else {"square": m(b).sum()}), model, batch)
    with pytest.raises(ObjectiveError, match="'square'.*'absolute'"):
        fickle.sums(model, batch[:1])


# --- a mean is caught -----------------------------------------------------------------------------------------------


def supervised(reduction):
    return lambda model, batch: F.mse_loss(model(batch[0]), batch[1], reduction=reduction)


def test_a_mean_is_caught_and_a_sum_is_not():
    batch = (torch.randn(4, 3), torch.randn(4, 2))
    check_is_sum(bind(supervised("sum")), linear(), batch)
    with pytest.raises(ObjectiveError) as caught:
        check_is_sum(bind(supervised("mean")), linear(), batch)
    value = F.mse_loss(linear()(batch[0]), batch[1]).item()
    assert all(word in str(caught.value) for word in ("'objective'", "mean", f"{value:.6g}", "reduction='sum'"))


def test_the_term_that_is_a_mean_is_named():
    def terms(model, batch):
        return {"fine": model(batch).pow(2).sum(), "wrong": model(batch).pow(2).mean()}

    batch = torch.randn(4, 3)
    for bound in (bind(terms), learn_terms(bind(terms), linear(), batch)):
        with pytest.raises(ObjectiveError, match="'wrong'"):
            check_is_sum(bound, linear(), batch)


def test_a_mean_of_tokens_is_caught():
    class Mean(NextToken):
        def __call__(self, model, batch):
            return super().__call__(model, batch) / self.counts(batch)

    tokens = torch.randint(0, 7, (2, 5))
    check_is_sum(bind(NextToken()), Bigrams(), tokens)
    with pytest.raises(ObjectiveError, match="mean"):
        check_is_sum(bind(Mean()), Bigrams(), tokens)


def noisy_sum(model, batch):
    return (model(batch) + 1e-3 * torch.randn(len(batch), 2)).pow(2).sum()


@pytest.mark.parametrize(
    ("f", "batch"),
    [
        (lambda m, b: 0 * m(b).sum(), torch.ones(4, 3)),  # a sum that is 0
        (lambda m, b: m(b).sum() / 0, torch.ones(4, 3)),  # the engine's to find
        (noisy_sum, torch.ones(4, 3)),
        (lambda m, b: m(b[0]).mean(), (torch.ones(4, 3), ["a", "b", "c", "d"])),  # cannot be doubled
        (lambda m, b: m(b[0]).mean(), (torch.ones(4, 3), torch.ones(5))),
        (lambda m, b: m(b[0]).mean(), (torch.ones(4, 3), 4)),
        (lambda m, b: m(b.view(4, 3)).mean(), torch.ones(4, 3)),  # takes no batch but this
    ],
)
def test_what_may_be_a_sum_is_let_pass(f, batch):
    check_is_sum(bind(f), linear(), batch)


def test_a_mean_is_caught_through_its_random_numbers():
    with pytest.raises(ObjectiveError, match="mean"):
        check_is_sum(bind(lambda m, b: m(b).mean() * torch.rand(())), linear(), torch.ones(4, 3))


def test_a_sum_that_by_chance_stays_is_let_pass():
    def by_chance(model, batch):
        first_draw = torch.initial_seed() == 0
        return {"chance": model(batch).mean() if first_draw else model(batch).sum(), "never": model(batch).sum()}

    def and_a_mean(model, batch):
        return {**by_chance(model, batch), "always": model(batch).mean()}

    check_is_sum(bind(by_chance), linear(), torch.ones(4, 3))
    with pytest.raises(ObjectiveError, match="'always'"):
        check_is_sum(bind(and_a_mean), linear(), torch.ones(4, 3))


def test_counts_that_do_not_double_prove_nothing():
    f = objective(counts=lambda batch: 1)(lambda m, b: m(b).mean())
    check_is_sum(bind(f), linear(), torch.ones(4, 3))


class Odd(nn.Module):
    """Modules in mixed modes, with buffers that forward changes, even in eval mode, and dropout."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)
        self.frozen = nn.BatchNorm1d(3).eval()
        self.drop = nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(3), persistent=False)

    def forward(self, x):
        self.calls += 1
        self.last = x[0].clone()
        return self.drop(self.frozen(self.norm(self.layer(x))))


@pytest.mark.parametrize("look", [check_is_sum, learn_terms])
def test_looking_leaves_no_trace(look):
    model = Odd()
    buffers = dict(model.named_buffers())
    values, modes = copy.deepcopy(buffers), [m.training for m in model.modules()]

    def f(m, b):
        return m(b).sum() + torch.rand(()) + random.random() + np.random.rand()

    batch = torch.randn(4, 3)
    seed_all(1)
    expected = torch.rand(3), random.random(), np.random.rand()
    seed_all(1)
    look(bind(f), model, batch)
    assert torch.equal(torch.rand(3), expected[0])
    assert (random.random(), np.random.rand()) == expected[1:]
    assert [m.training for m in model.modules()] == modes
    assert all(buffer is buffers[name] for name, buffer in model.named_buffers())
    assert all(torch.equal(buffer, values[name]) for name, buffer in model.named_buffers())
    assert all(p.grad is None for p in model.parameters())


def test_the_check_runs_in_eval_mode_with_all_its_submodules():
    seen = []

    def f(model, batch):
        seen.append([m.training for m in model.modules()])
        return model(batch).sum()

    check_is_sum(bind(f), Odd(), torch.randn(4, 3))
    assert seen
    assert not any(any(modes) for modes in seen)


# --- next token -----------------------------------------------------------------------------------------------------


@st.composite
def padded_tokens(draw, vocabulary=7):
    """Rows of tokens of uneven length, padded at the end with -100, [B, T + 1]."""
    width = draw(st.integers(2, 6))
    lengths = draw(st.lists(st.integers(1, width), min_size=1, max_size=9))
    rows = [draw(st.lists(st.integers(0, vocabulary - 1), min_size=n, max_size=n)) for n in lengths]
    return torch.tensor([row + [IGNORED] * (width - len(row)) for row in rows])


@st.composite
def pieces(draw, batch: Tensor):
    """`batch` cut at random places, into pieces that are not empty."""
    cuts = sorted(draw(st.sets(st.integers(1, len(batch) - 1)))) if len(batch) > 1 else []
    return torch.tensor_split(batch, cuts)


@given(st.data())
def test_counts_add_up_over_any_split(data):
    batch = data.draw(padded_tokens())
    count = bind(NextToken()).counts(batch)["objective"]
    assert count == sum(int(token != IGNORED) for row in batch[:, 1:] for token in row)
    assert count == sum(bind(NextToken()).counts(piece)["objective"] for piece in data.draw(pieces(batch)))


@settings(deadline=None)
@given(st.data())
def test_gradient_of_uneven_microbatches_is_that_of_the_whole_batch(data):
    batch = data.draw(padded_tokens())
    bound = bind(NextToken())
    count = bound.counts(batch)["objective"]
    if count == 0:
        return
    torch.manual_seed(0)
    model = Bigrams().double()
    logits = model(batch[:, :-1].clamp(min=0))
    F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), ignore_index=IGNORED).backward()
    whole = model.table.weight.grad
    assert whole is not None
    model.table.weight.grad = None
    for piece in data.draw(pieces(batch)):
        (bound.sums(model, piece)["objective"] / count).backward()
    torch.testing.assert_close(model.table.weight.grad, whole, rtol=1e-9, atol=1e-9)


def test_a_pair_is_the_same_as_one_tensor():
    tokens, model = torch.randint(0, 7, (3, 6)), Bigrams()
    pair = (tokens[:, :-1], tokens[:, 1:])
    assert torch.equal(NextToken()(model, tokens), NextToken()(model, pair))
    assert torch.equal(NextToken()(model, tokens), NextToken()(model, list(pair)))
    assert NextToken().counts(tokens) == NextToken().counts(pair) == 15


def test_padding_is_fed_as_token_0():
    model = Bigrams()
    NextToken()(model, torch.tensor([[3, 4, -100, -100]]))
    assert model.seen[-1].tolist() == [[3, 4, 0]]
    NextToken(ignore_index=2)(model, torch.tensor([[3, 2, 4, 2, 2]]))  # the first 2 is a token of the text
    assert model.seen[-1].tolist() == [[3, 2, 4, 0]]
    assert NextToken(ignore_index=2).counts(torch.tensor([[3, 2, 4, 2, 2]])) == 1


def test_another_ignore_index_is_left_out_of_the_sum():
    tokens, model = torch.tensor([[3, 2, 4, 2, 2]]), Bigrams()
    expected = F.cross_entropy(model(torch.tensor([[2]]))[0], torch.tensor([4]), reduction="sum")
    torch.testing.assert_close(NextToken(ignore_index=2)(model, tokens), expected)


def test_only_padding_sums_to_zero_with_a_gradient():
    model, batch = Bigrams(), torch.tensor([[3, -100, -100]])
    total = bind(NextToken()).sums(model, batch)["objective"]
    total.backward()
    assert total.item() == 0
    assert bind(NextToken()).counts(batch) == {"objective": 0}


def test_half_precision_logits_are_summed_in_float32():
    tokens, model = torch.randint(0, 7, (3, 6)), Bigrams().bfloat16()
    total = NextToken()(model, tokens)
    expected = F.cross_entropy(model(tokens[:, :-1]).float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
    assert total.dtype == torch.float32
    assert torch.equal(total, expected)


def test_logits_may_be_an_attribute_of_the_answer():
    class Answer:
        def __init__(self, logits):
            self.logits = logits

    class Wrapped(Bigrams):
        def forward(self, tokens):
            return Answer(super().forward(tokens))

    tokens, model = torch.randint(0, 7, (3, 6)), Wrapped()
    plain = Bigrams()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(NextToken()(model, tokens), NextToken()(plain, tokens))


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        (torch.tensor([[1, 2, 9]]), ["9", "vocabulary of 7"]),
        (torch.tensor([[1, 2, -5]]), ["-5", "vocabulary of 7"]),
        ((torch.tensor([[1, 2]]), torch.tensor([[2, 7]])), ["target token 7", "vocabulary of 7"]),
        (torch.tensor([1, 2]), ["shape [2]"]),
        (torch.tensor([[1], [2]]), ["shape [2, 1]"]),
        (torch.tensor([[0.5, 1.0]]), ["float32"]),
        ((torch.tensor([[1, 2]]), torch.tensor([[1]])), ["tuple"]),
        ({"tokens": torch.tensor([[1, 2]])}, ["dict"]),
    ],
)
def test_next_token_refuses_what_it_cannot_read(batch, words):
    with pytest.raises(ObjectiveError) as caught:
        NextToken()(Bigrams(), batch)
    assert all(word in str(caught.value) for word in words), caught.value


def test_input_outside_a_known_vocabulary_is_named_before_the_model_fails():
    model = Bigrams()
    model.vocabulary = 7
    with pytest.raises(ObjectiveError, match="input token 9 .*vocabulary of 7"):
        NextToken()(model, torch.tensor([[1, 9, 2]]))


def test_logits_of_another_shape_are_refused():
    with pytest.raises(ObjectiveError, match=r"\[7, 3, 2\].*\[2, 3, vocabulary\]"):
        NextToken()(lambda tokens: torch.zeros(7, 3, 2), torch.zeros(2, 4, dtype=torch.long))
