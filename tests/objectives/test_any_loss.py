"""`objectives.check`: a loss of any library is right or wrong under DDP and accumulation as plain loops find it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from instep import objectives
from instep.errors import ObjectiveError

torch.manual_seed(0)
TARGETS = torch.tensor([0, 1, -100, -100, -100, 2, 3, 1])
BATCH = (torch.randn(8, 3), TARGETS)
WHOLE_TARGETS = (BATCH[0], TARGETS.clamp(min=0))


def linear() -> nn.Module:
    torch.manual_seed(1)
    return nn.Linear(3, 4)


def tokens_model() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        attn_implementation="eager",
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)  # type: ignore[no-any-return]


def token_batch() -> dict[str, Tensor]:
    ids = torch.arange(48).reshape(8, 6) % 15 + 1
    labels = ids.clone()
    for row in range(8):
        labels[row, 2 + row % 4 :] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def hugging_face(model: nn.Module, batch: dict[str, Tensor]) -> Any:
    """As a loop with transformers' own loss: a mean over the targets of the piece."""
    return model(**batch)


def by_sequence(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """As TRL's preference losses: log-likelihoods summed within a sequence, a mean over sequences."""
    logits = model(input_ids=batch["input_ids"]).logits[:, :-1]
    targets = batch["labels"][:, 1:]
    picked = -F.cross_entropy(logits.transpose(1, 2), targets.clamp(min=0), reduction="none")
    return -F.logsigmoid(0.1 * (picked * (targets >= 0)).sum(1)).mean()


def contrastive(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    features = F.normalize(model(batch[0]), dim=1)
    return F.cross_entropy(features @ features.T / 0.1, torch.arange(len(features)))


def soft_dice(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """As segmentation's: a quotient of sums over the batch."""
    found, wanted = model(batch[0]).sigmoid(), F.one_hot(batch[1], 4)
    return 1 - 2 * (found * wanted).sum() / (found.sum() + wanted.sum())


Loss = Callable[[nn.Module, Any], Any]


def by_torchmetrics(name: str) -> Loss:
    """As loops that train on a metric: it gets all predictions of the piece at once."""

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        functional = pytest.importorskip("torchmetrics.functional")
        found: Tensor = getattr(functional, name)(model(batch[0])[:, 0], batch[1].to(batch[0].dtype))
        return found

    return loss


CASES: dict[str, tuple[Loss, Callable[[], nn.Module], Any, str, str]] = {
    "mean of squares": (
        lambda m, b: (m(b[0]) ** 2).mean(), linear, BATCH, "equal pieces", "a mean over samples, so"
    ),
    "cross entropy with ignored targets": (
        lambda m, b: F.cross_entropy(m(b[0]), b[1]), linear, BATCH, "wrong", "a mean over items, such as tokens"
    ),
    "cross entropy with class weights": (
        lambda m, b: F.cross_entropy(m(b[0]), b[1], weight=torch.tensor([1.0, 2.0, 4.0, 8.0]).to(b[0])), linear,
        WHOLE_TARGETS, "wrong", "a mean over items",
    ),
    "cross entropy summed": (
        lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="sum"), linear, WHOLE_TARGETS, "wrong", "it is a sum, and"
    ),
    "contrastive": (contrastive, linear, BATCH, "wrong", "see each other"),
    "soft dice": (soft_dice, linear, WHOLE_TARGETS, "wrong", "see each other"),
    "transformers": (hugging_face, tokens_model, token_batch(), "wrong", "a mean over items"),
    "preference by sequence": (by_sequence, tokens_model, token_batch(), "equal pieces", "a smaller last piece"),
    "mean squared error of torchmetrics": (
        by_torchmetrics("mean_squared_error"), linear, WHOLE_TARGETS, "equal pieces", "a mean over samples, so"
    ),
    "explained variance of torchmetrics": (
        by_torchmetrics("explained_variance"), linear, WHOLE_TARGETS, "wrong", "see each other"
    ),
    "sums of Instep": (
        lambda m, b: {"ce": F.cross_entropy(m(b[0]), b[1], reduction="sum")}, linear, BATCH, "right", ""
    ),
}  # fmt: skip


def plain(loss: Loss, model: nn.Module, batch: Any, pieces: list[list[int]], *, average: bool) -> float:
    """How far a loop is off, by plain autograd in float64."""
    model = copy.deepcopy(model).double().eval()

    def part(places: list[int]) -> Any:
        def take(value: Tensor) -> Tensor:
            return (value.double() if value.is_floating_point() else value)[places]

        return {k: take(v) for k, v in batch.items()} if isinstance(batch, dict) else tuple(map(take, batch))

    def gradient(places: list[int]) -> Tensor:
        model.zero_grad()
        answer = loss(model, part(places))
        if not isinstance(answer, Tensor):
            answer = answer["ce"] if isinstance(answer, dict) and "ce" in answer else answer.loss
        value = answer
        value.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    whole = gradient(list(range(8)))
    total = sum((gradient(places) for places in pieces), start=torch.zeros_like(whole))
    return float((total / (len(pieces) if average else 1) - whole).norm() / whole.norm())


@pytest.mark.parametrize("name", CASES)
def test_a_loss_is_judged_as_plain_loops_find_it(name: str) -> None:
    loss, model_of, batch, verdict, cause = CASES[name]
    found = objectives.check(loss, model_of(), batch)
    assert found.exact
    assert (found.verdict, found.samples) == (verdict, 8), str(found)
    assert cause in found.cause
    average = name != "sums of Instep"
    expected = {
        ("accumulation", (4, 4)): [[0, 1, 2, 3], [4, 5, 6, 7]],
        ("DDP", (4, 4)): [[0, 2, 4, 6], [1, 3, 5, 7]],
        ("DDP", (2, 2, 2, 2)): [[0, 4], [1, 5], [2, 6], [3, 7]],
        ("accumulation", (6, 2)): [[0, 1, 2, 3, 4, 5], [6, 7]],
    }
    for cut in found.cuts:
        pieces = expected.pop((cut.loop, cut.pieces), None)
        if pieces is not None:
            off = plain(loss, model_of(), batch, pieces, average=average)
            assert cut.off == pytest.approx(off, rel=1e-6, abs=1e-12)
    assert not expected


def test_padding_that_is_not_masked_is_found() -> None:
    def leaky(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        logits = model(input_ids=batch["input_ids"]).logits
        return logits.square().mean((1, 2)).mean()

    found = objectives.check(leaky, tokens_model(), token_batch())
    assert found.verdict == "wrong"
    assert "padding changes it" in found.cause
    assert next(cut for cut in found.cuts if cut.loop == "more padding").off > 0.01


def test_what_a_model_computes_in_float32_is_computed_in_float64() -> None:
    seen = []

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        out = model(batch[0]).float()
        seen.extend([out.to(torch.float32), out.softmax(1, dtype=torch.float32), torch.ones(1, dtype=torch.float)])
        return out.square().mean()

    assert objectives.check(loss, nn.Linear(3, 4), BATCH).exact
    assert {each.dtype for each in seen} == {torch.float64}


def test_the_check_leaves_the_model_and_the_random_state_as_they_were() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)).train()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    objectives.check(lambda m, b: m(b[0]).square().mean(), model, BATCH)
    assert model.training
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_its_text_says_how_far_each_loop_is_off() -> None:
    loss, model_of, batch, _, _ = CASES["cross entropy with ignored targets"]
    text = str(objectives.check(loss, model_of(), batch))
    assert text.startswith("wrong: it is a mean over items")
    assert "8 samples, gradients of 2 tensors, in float64" in text
    assert "\nDDP           2 of 4" in text


@pytest.mark.parametrize(
    ("loss", "batch", "sentence"),
    [
        (lambda m, b: m(b[0]).mean(), (torch.randn(3, 3),), "the batch has 3 samples, .* it needs four or more"),
        (lambda m, b: m(b[0]), BATCH, "which is no scalar tensor; give a function that returns one"),
        (lambda m, b: b[0].sum().requires_grad_(), BATCH, "does not depend on a parameter that is trained"),
        (lambda m, b, calls=[]: calls.append(1) or m(b[0]).mean() * len(calls), BATCH, "it keeps state"),
    ],
)
def test_what_cannot_be_checked_is_a_sentence(loss: Any, batch: Any, sentence: str) -> None:
    with pytest.raises(ObjectiveError, match=sentence):
        objectives.check(loss, linear(), batch)
