"""Losses over a vocabulary in chunks: the same numbers as with full logits, which never exist."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from instep.errors import ObjectiveError
from instep.models import GPT
from instep.objectives import bind, vocabulary
from instep.objectives.language import Distillation, MaskedTokens, NextToken
from instep.objectives.preference import DPO
from instep.objectives.vocabulary import Predictions, chunk_rows, predict

WORDS = 11


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three rows a chunk."""
    torch.set_num_threads(1)
    monkeypatch.setattr(vocabulary, "LEAST_ROWS", 1)
    monkeypatch.setattr(vocabulary, "CHUNK_ELEMENTS", {"cpu": 3 * WORDS, "cuda": 3 * WORDS})


class Offers(nn.Module):
    """Hidden states and a head; counts how its logits were asked for."""

    def __init__(self, seed: int = 0, bias: bool = True, words: int = WORDS) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(words, 5)
        self.head = nn.Linear(5, words, bias=bias)
        self.asked = {"hidden": 0, "whole": 0}

    def hidden(self, tokens: Tensor) -> Tensor:
        self.asked["hidden"] += 1
        return self.embedding(tokens).cumsum(1).tanh()

    def forward(self, tokens: Tensor) -> Tensor:
        self.asked["whole"] += 1
        hidden: Tensor = self.embedding(tokens).cumsum(1).tanh()
        out: Tensor = self.head(hidden)
        return out


class Hides(Offers):
    """The same model, which gives logits alone."""

    hidden = None  # type: ignore[assignment]


class Scales(Offers):
    """Its logits are more than what its head gives."""

    def forward(self, tokens: Tensor) -> Tensor:
        return 3 * super().forward(tokens)


class Layers(nn.Module):
    """`hidden` is a layer, and no way to hidden states."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.hidden, self.head = nn.Embedding(WORDS, 5), nn.Linear(5, 5), nn.Linear(5, WORDS)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.head(self.hidden(self.embedding(tokens)))
        return out


OBJECTIVES: dict[str, Callable[[], Any]] = {
    "plain": NextToken,
    "smoothed": lambda: NextToken(label_smoothing=0.1),
    "z": lambda: NextToken(z_loss=0.01),
    "all": lambda: NextToken(label_smoothing=0.2, z_loss=0.01, accuracy=True),
    "masked": lambda: MaskedTokens(accuracy=True),
    "forward": lambda: Distillation(Offers(seed=1), temperature=2.0, hard=0.3),
    "reverse": lambda: Distillation(Hides(seed=1), direction="reverse", temperature=0.7),
}


@st.composite
def batches(draw: Any) -> tuple[Tensor, Tensor]:
    rows, length = draw(st.integers(1, 4)), draw(st.integers(1, 7))
    seed = draw(st.integers(0, 2**16))
    generator = torch.Generator().manual_seed(seed)
    inputs, targets = (torch.randint(0, WORDS, (rows, length), generator=generator) for _ in range(2))
    hidden = torch.rand(rows, length, generator=generator) < draw(st.sampled_from([0.0, 0.4, 1.0]))
    return inputs, targets.masked_fill(hidden, -100)


def gradients(objective: Any, model: nn.Module, batch: Any) -> tuple[dict[str, float], dict[str, Tensor]]:
    model.zero_grad()
    sums = bind(objective).sums(model, batch)
    (0.5 * sums["objective"]).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {name: float(value.detach()) for name, value in sums.items()}, found


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@settings(max_examples=25)
@given(batch=batches(), bias=st.booleans())
def test_chunks_give_the_sums_and_gradients_of_full_logits(
    name: str, dtype: torch.dtype, batch: tuple[Tensor, Tensor], bias: bool
) -> None:
    objective = OBJECTIVES[name]()
    offers, hides = Offers(bias=bias).to(dtype), Hides(bias=bias).to(dtype)
    if isinstance(objective, Distillation):
        objective.teacher.to(dtype)
    wanted_sums, wanted = gradients(objective, hides, batch)
    sums, found = gradients(objective, offers, batch)
    in_chunks = bool((batch[1] != -100).sum() > 3)  # where one would not do
    assert bool(offers.asked["hidden"]) == in_chunks
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    assert sums == pytest.approx(wanted_sums, rel=tolerance, abs=tolerance)
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert (found[key] - value).abs().max() <= tolerance * (1 + value.abs().max())


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("scale", [2.0**-14, 1.0, 2.0**12])
def test_chunks_in_float16_have_the_gradients_of_full_logits(name: str, scale: float) -> None:
    objective, batch = (
        OBJECTIVES[name](),
        (torch.arange(24).view(4, 6) % WORDS, torch.arange(24).view(4, 6) * 3 % WORDS),
    )
    found = {}
    for model in (Offers(), Hides()):
        with torch.autocast("cpu", torch.float16):
            sums = bind(objective).sums(model, batch)
        (scale / 24 * sums["objective"]).backward()
        found[type(model)] = {n: p.grad / scale for n, p in model.named_parameters() if p.grad is not None}
    assert found[Offers].keys() == found[Hides].keys()
    for key, value in found[Hides].items():
        largest = float(value.abs().max())
        assert float((found[Offers][key] - value).abs().max()) <= (0.2 if scale < 1 else 0.01) * largest, key


@pytest.mark.parametrize("name", ["plain", "reverse"])
def test_the_loss_scale_holds_up_gradients_of_chunks_that_float16_would_lose(name: str) -> None:
    """It is there when they are computed: those of words that are hardly ever predicted."""
    objective, batch = OBJECTIVES[name](), (torch.arange(24).view(4, 6) % 4, torch.arange(24).view(4, 6) * 3 % 4)
    found = {}
    for scale in (0.0, 2.0**16):
        model = Offers()
        with torch.no_grad():
            model.head.bias[6:] = -19.0  # some 2^-27, where float16 ends at 2^-24
        with torch.autocast("cpu", torch.float16, enabled=scale > 0):
            sums = bind(objective).sums(model, batch)
        ((scale or 1.0) * sums["objective"]).backward()
        found[scale] = model.head.bias.grad[6:] / (scale or 1.0)  # type: ignore[index]
    assert float(found[0.0].abs().min()) > 0
    torch.testing.assert_close(found[2.0**16], found[0.0], rtol=0.05, atol=0.0)


def test_a_scale_that_is_too_large_shows_in_chunks_too() -> None:
    batch = torch.arange(24).view(4, 6) % WORDS, torch.arange(24).view(4, 6) * 3 % WORDS
    for model in (Offers(), Hides()):
        with torch.autocast("cpu", torch.float16):
            sums = bind(NextToken()).sums(model, batch)
        (2.0**24 * sums["objective"]).backward()
        assert not bool(torch.isfinite(model.head.weight.grad).all())  # type: ignore[arg-type]
        assert bool(torch.isfinite(sums["objective"]))


@settings(max_examples=25)
@given(batch=batches(), seed=st.integers(0, 99))
def test_values_by_row_have_the_gradients_of_full_logits(batch: tuple[Tensor, Tensor], seed: int) -> None:
    def log_probabilities(logits: Tensor, targets: Tensor) -> Tensor:
        return -F.cross_entropy(logits, targets, reduction="none")

    offers = Offers().double()
    hidden = offers.hidden(batch[0]).flatten(0, 1)
    targets = batch[1].flatten().clamp(min=0)
    outer = torch.randn(len(targets), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    inputs = [hidden, *offers.head.parameters()]
    chunked = Predictions(hidden=hidden, head=offers.head).each(log_probabilities, targets)
    whole = Predictions(logits=offers.head(hidden)).each(log_probabilities, targets)
    torch.testing.assert_close(chunked, whole, rtol=1e-12, atol=1e-12)
    found = torch.autograd.grad(chunked, inputs, outer, retain_graph=True)
    wanted = torch.autograd.grad(whole, inputs, outer)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


def test_logits_of_more_than_a_chunk_are_never_made(monkeypatch: pytest.MonkeyPatch) -> None:
    most = []
    linear = F.linear

    def spy(*arguments: Any) -> Tensor:
        out = linear(*arguments)
        most.append(len(out))
        return out

    monkeypatch.setattr(F, "linear", spy)
    model = Offers()
    batch = torch.randint(0, WORDS, (4, 9))
    for name in ("all", "forward"):
        gradients(OBJECTIVES[name](), model, batch)
    assert model.asked["whole"] == 1  # where it is looked at whether both ways agree
    assert most
    assert max(most) == 3


def test_evaluation_computes_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary._Projection, "add", lambda *_: pytest.fail("a gradient was computed"))
    batch = torch.randint(0, WORDS, (4, 9))
    with torch.no_grad():
        found = NextToken()(Offers(), batch)
    assert isinstance(found, Tensor)
    torch.testing.assert_close(found, NextToken()(Hides(), batch))


def test_a_frozen_head_gets_no_gradient_and_the_rest_does() -> None:
    model, batch = Offers(), torch.randint(0, WORDS, (4, 9))
    model.head.requires_grad_(False)
    _, found = gradients(NextToken(), model, batch)
    _, wanted = gradients(NextToken(), Hides(), batch)
    assert set(found) == {"embedding.weight"}
    torch.testing.assert_close(found["embedding.weight"], wanted["embedding.weight"])


def test_a_second_backward_is_refused() -> None:
    total = NextToken()(Offers(), torch.randint(0, WORDS, (4, 9)))
    assert isinstance(total, Tensor)
    total.backward(retain_graph=True)
    with pytest.raises(ObjectiveError, match="backward came twice"):
        total.backward()


@pytest.mark.parametrize("objective", [NextToken(), DPO(reference=Offers(seed=1))], ids=["sums", "by row"])
def test_a_second_derivative_is_refused_and_not_computed_in_part(objective: Any) -> None:
    tokens, model = torch.randint(0, WORDS, (4, 9)), Offers()
    batch = {"chosen": tokens, "rejected": tokens.flip(0)} if isinstance(objective, DPO) else tokens
    total = bind(objective).sums(model, batch)["objective"]
    with pytest.raises(ObjectiveError, match=r"no second derivative, which create_graph=True asks for; take a model"):
        torch.autograd.grad(total, list(model.parameters()), create_graph=True)


@pytest.mark.parametrize("where", ["autocast", "weights"])
def test_half_precision_is_as_exact_as_with_full_logits(where: str) -> None:
    """Each way's distance from float64, of the gradients of head and embedding together."""
    batch = torch.randint(0, WORDS, (4, 30), generator=torch.Generator().manual_seed(0))
    _, truth = gradients(NextToken(label_smoothing=0.1), Hides().double(), batch)

    def distance(model: nn.Module) -> float:
        model = model.bfloat16() if where == "weights" else model
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=where == "autocast"):
            _, found = gradients(NextToken(label_smoothing=0.1), model, batch)
        return float(torch.cat([(found[name].double() - truth[name]).flatten() for name in truth]).norm())

    assert distance(Offers()) <= 1.3 * distance(Hides())


def test_a_gpt_offers_its_hidden_states(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    gpt = GPT(vocabulary=WORDS, context=12, width=16, depth=2, heads=2, tied=True).double()
    for p in gpt.parameters():
        nn.init.normal_(p, std=0.3)
    tokens = torch.randint(0, WORDS, (3, 9))
    assert torch.equal(gpt.head(gpt.hidden(tokens)), gpt(tokens))
    _, found = gradients(NextToken(), gpt, tokens)
    monkeypatch.setattr(vocabulary, "CHUNK_ELEMENTS", {"cpu": 1 << 20, "cuda": 1 << 20})
    _, wanted = gradients(NextToken(), gpt, tokens)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-11, atol=1e-12)


def test_chunks_are_chosen_from_the_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert chunk_rows(50_000) == 640
    assert chunk_rows(1000) == 33536
    assert chunk_rows(10_000_000) == 64
    assert chunk_rows(50_000, "cuda") == 1280


@pytest.mark.parametrize(
    ("hidden", "sentence"),
    [
        (
            lambda tokens: torch.zeros(2, 3),
            r"the model gave \[2, 3\] for tokens of shape \[2, 5\]; NextToken needs hidd",
        ),
        (lambda tokens: torch.zeros(2, 5, 4), "hidden states are 4 wide and its head takes 5"),
        (lambda tokens: None, "the model gave NoneType for tokens"),
    ],
)
def test_hidden_states_of_another_shape_are_refused(hidden: Any, sentence: str) -> None:
    model = Offers()
    model.hidden = hidden  # type: ignore[method-assign]
    with pytest.raises(ObjectiveError, match=sentence):
        NextToken()(model, torch.randint(0, WORDS, (2, 6)))


def test_a_model_that_only_half_offers_is_called_as_it_is() -> None:
    model = Offers()
    model.head = None  # type: ignore[assignment]
    model.forward = lambda tokens: torch.zeros(*tokens.shape, WORDS)  # type: ignore[method-assign]
    found = predict(model, torch.zeros(2, 5, dtype=torch.long), torch.arange(10), "it")
    assert found.logits is not None


def test_a_head_that_does_not_make_the_models_logits_is_refused() -> None:
    tokens = torch.zeros(2, 6, dtype=torch.int64)
    with pytest.raises(ObjectiveError, match="not what its 'head' makes of its 'hidden' states") as caught:
        predict(Scales(), tokens, torch.arange(12), "the objective")
    assert "\n" not in caught.value.message


def test_whether_it_does_is_looked_at_once_and_leaves_no_trace() -> None:
    model, tokens = Offers().train(), torch.zeros(2, 6, dtype=torch.int64)
    before = torch.get_rng_state()
    for _ in range(3):
        predict(model, tokens, torch.arange(12), "the objective")
    assert model.asked == {"hidden": 3 + 1, "whole": 1}
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)


def test_a_layer_called_hidden_offers_nothing() -> None:
    model, tokens = Layers(), torch.zeros(2, 6, dtype=torch.int64)
    found = predict(model, tokens, torch.arange(12), "the objective")
    assert found.logits is not None
    assert torch.equal(found.logits, model(tokens).flatten(0, 1))
