"""Objectives by family: what they refuse, and what their definition in tests/support/tasks.py does not cover."""

from __future__ import annotations

import dataclasses
import math
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from instep.components import Component
from instep.data import Data
from instep.errors import ComponentError, ObjectiveError, RecipeError
from instep.objectives import Warmup, bind, check_protocol, from_component, learn_terms
from instep.objectives.autoencoder import VAE, reparametrised
from instep.objectives.contrastive import CLIP
from instep.objectives.diffusion import Diffusion, FlowMatching
from instep.objectives.language import Distillation, MaskedTokens, NextToken, mask_tokens
from instep.objectives.preference import DPO, sequence_log_probabilities
from instep.recipe import Recipe, Team
from support import tasks
from support.harness import train_here
from support.tasks import PADDING, TASKS, WORDS, Reader

TOKENS = torch.tensor([[1, 2, 3, 4], [5, 6, PADDING, PADDING]])


def batch_of(name: str, count: int = 6) -> Any:
    data = TASKS[name].data(count, 8, 0, torch.float32)
    collate = data.collate or torch.utils.data.default_collate
    torch.manual_seed(0)
    return collate([data.train[index] for index in range(count)])


# ---------------------------------------------------------------------------------------------------------------- all


@pytest.mark.parametrize("name", TASKS)
def test_every_objective_is_a_sum_and_repeats(name: str) -> None:
    torch.manual_seed(0)
    model = TASKS[name].model()
    made = TASKS[name].objective()
    bound = learn_terms(bind(made), model, batch_of(name))
    check_protocol(bound, model, batch_of(name))
    assert math.isfinite(bound.whole(dict.fromkeys(bound.terms or (), 1.0), 10**9))


@pytest.mark.parametrize("name", TASKS)
def test_half_precision_is_summed_in_float32(name: str) -> None:
    model = TASKS[name].model()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sums = bind(TASKS[name].objective()).sums(model, batch_of(name))
    assert all(value.dtype == torch.float32 for value in sums.values())


@pytest.mark.processes
def test_a_step_whose_targets_are_all_ignored_stops_the_run(tmp_path: Any) -> None:
    recipe = Recipe(
        model=Reader,
        objective=NextToken,
        data=lambda: Data(torch.full((8, 5), PADDING)),
        batch=8,
        microbatches=4,
        steps=2,
    )
    with pytest.raises(ObjectiveError, match="step 1 has no items to learn from: the objective counts 0 for term"):
        train_here(recipe, Team(workers=2), tmp_path / "run")


# ----------------------------------------------------------------------------------------------------------- language


def test_accuracy_and_cross_entropy_are_the_metrics_of_next_token() -> None:
    model, logits = Reader(0), None
    sums = NextToken(label_smoothing=0.1, accuracy=True)(model, TOKENS)
    assert isinstance(sums, dict)
    logits = model(TOKENS[:, :-1].clamp(min=0))
    flat, targets = logits.flatten(0, 1), TOKENS[:, 1:].flatten()
    expected = F.cross_entropy(flat, targets, ignore_index=PADDING, reduction="sum")
    torch.testing.assert_close(sums["cross_entropy"], expected)
    assert sums["accuracy"] == (flat.argmax(1) == targets).sum()
    smooth = F.cross_entropy(flat, targets, ignore_index=PADDING, reduction="sum", label_smoothing=0.1)
    torch.testing.assert_close(sums["objective"], smooth)
    assert isinstance(NextToken()(model, TOKENS), Tensor), "one bare term where nothing else is asked for"


def test_masks_are_as_in_the_paper_and_keyed_by_the_generator() -> None:
    tokens = torch.randint(1, WORDS, (400, 50), generator=torch.Generator().manual_seed(0))
    tokens[:, 40:] = PADDING
    torch.manual_seed(1)
    inputs, targets = mask_tokens(tokens, mask=0, vocabulary=WORDS)
    torch.manual_seed(1)
    again = mask_tokens(tokens, mask=0, vocabulary=WORDS)
    assert torch.equal(inputs, again[0])
    chosen = targets != PADDING
    assert torch.equal(targets[chosen], tokens[chosen])
    assert torch.equal(inputs[~chosen], tokens[~chosen])
    assert not chosen[:, 40:].any()
    assert chosen[:, :40].float().mean() == pytest.approx(0.15, abs=0.01)
    assert (inputs[chosen] == 0).float().mean() == pytest.approx(0.8, abs=0.03)
    assert (inputs[chosen] == tokens[chosen]).float().mean() == pytest.approx(0.1 + 0.1 / WORDS, abs=0.02)


def test_a_share_of_tokens_to_hide_that_is_none_is_refused() -> None:
    with pytest.raises(ObjectiveError, match="'share' is 15; it is a share of the tokens, from 0 to 1"):
        mask_tokens(TOKENS, mask=0, vocabulary=WORDS, share=15)


def test_forward_and_reverse_divergence_of_one_s_own_teacher_are_0() -> None:
    model = Reader(7)
    for direction in ("forward", "reverse"):
        sums = Distillation(model, direction=direction)(model, TOKENS)  # type: ignore[arg-type]
        assert float(sums["objective"].detach()) == pytest.approx(0, abs=1e-5)
        assert float(sums["cross_entropy"]) > 1


@pytest.mark.parametrize("temperature", [1.0, 10.0])
def test_words_without_probability_have_none_at_any_temperature(temperature: float) -> None:
    """However the teacher is given: the divergence is over the two words that it leaves possible."""
    model, inputs, targets = Reader(0), TOKENS[:1, :-1], TOKENS[:1, 1:]
    p = torch.zeros(1, 3, WORDS)
    p[..., 3], p[..., 5] = 0.9, 0.1
    wanted = 0.0
    for row in model.double()(inputs)[0]:
        q = tasks.softmax(row[None], temperature)[0]
        left = torch.tensor([0.9, 0.1], dtype=torch.float64) ** (1 / temperature)
        left /= left.sum()
        wanted += temperature**2 * float((left * (left / q[[3, 5]]).log()).detach().sum())
    found = Distillation(temperature=temperature)(model.float(), (inputs, targets, p))["objective"]
    assert float(found.detach()) == pytest.approx(wanted, rel=1e-5)
    teacher = Calls(lambda tokens: p.log())
    assert Distillation(teacher, temperature=temperature)(model, TOKENS[:1])["objective"] == found
    found.backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
    reverse = Distillation(direction="reverse", temperature=temperature)(model, (inputs, targets, p))["objective"]
    assert bool(reverse.isfinite())


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_words_that_teacher_and_model_both_rule_out_count_nothing(direction: Any) -> None:
    """As those that make up a round vocabulary: the divergence is over the others."""
    inputs, targets = TOKENS[:, :-1] % (WORDS - 2), TOKENS[:, 1:] % (WORDS - 2)
    ruled_out = torch.tensor([WORDS - 2, WORDS - 1])
    teacher, model = Reader(1), Reader(0)
    answers = [
        [Calls(lambda x, m=m: m(x)[..., :-2]) for m in (teacher, model)],
        [Calls(lambda x, m=m: m(x).index_fill(-1, ruled_out, -math.inf)) for m in (teacher, model)],
    ]
    found = []
    for asked, answer in answers:
        value = Distillation(asked, direction=direction)(answer, (inputs, targets))["objective"]
        model.zero_grad()
        value.backward()
        found.append([value.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(*found, strict=True))


def test_a_teacher_is_a_frozen_copy_and_can_be_built_from_a_recipe_file() -> None:
    source = Reader(7).train()
    teacher = Distillation(source).teacher
    assert all(p.requires_grad for p in source.parameters())
    assert not any(p.requires_grad for p in teacher.parameters())
    assert source.training
    assert not teacher.training
    args = {"teacher": {"use": "support.tasks:Reader", "args": {"seed": 7}}, "temperature": 2.0}
    made: Any = from_component(Component("instep.objectives.language:Distillation", args))
    assert torch.equal(made.teacher.head.weight, source.head.weight)
    with pytest.raises(ComponentError, match="Distillation's teacher is a str"):
        Distillation("teacher")


@pytest.mark.parametrize(
    ("objective", "batch", "sentence"),
    [
        (NextToken(z_loss=0.1), torch.tensor([[1, 2, WORDS]]), f"target token {WORDS} is outside .* of {WORDS}"),
        (NextToken(), torch.tensor([[WORDS, 1, 2]]), f"input token {WORDS} is outside"),
        (MaskedTokens(), torch.tensor([[1, 2, 3]]), r"MaskedTokens was given one tensor, .*pair \(inputs, targets\)"),
        (MaskedTokens(), (torch.tensor([[1]]), torch.tensor([[-7]])), "target token -7 is outside"),
        (Distillation(Reader(words=8)), TOKENS, f"the teacher knows 8 tokens and the model {WORDS}; distil from"),
        (Distillation(), TOKENS, "has no teacher, and the batch is no triple"),
    ],
)
def test_language_objectives_refuse_what_they_cannot_read(objective: Any, batch: Any, sentence: str) -> None:
    with pytest.raises(ObjectiveError, match=sentence):
        objective(Reader(), batch)


def test_inputs_outside_a_vocabulary_that_the_model_does_not_tell_are_a_sentence() -> None:
    model = Calls(Reader())
    with pytest.raises(
        ObjectiveError, match=r"failed to look something up .* for input tokens from 1 to 99 in texts of"
    ):
        NextToken()(model, torch.tensor([[1, 99, 2]]))
    model.config = types.SimpleNamespace(vocab_size=WORDS)  # type: ignore[assignment]
    with pytest.raises(ObjectiveError, match=f"input token 99 is outside the model's vocabulary of {WORDS}"):
        NextToken()(model, torch.tensor([[1, 99, 2]]))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda p: 2 * p, "the teacher's probabilities sum to 2; they must be at least 0 and sum to 1"),
        (lambda p: p - 1, "probabilities are as low as -0.9"),
        (lambda p: p * float("nan"), "probabilities sum to nan"),
        (lambda p: p[..., :8] / p[..., :8].sum(-1, keepdim=True), f"the teacher knows 8 tokens and the model {WORDS}"),
        (lambda p: p[:, :1], r"probabilities are \[2, 1, 32\]; give them as \[2, 3, vocabulary\]"),
        (lambda p: None, "probabilities are NoneType"),
    ],
)
def test_probabilities_that_are_none_are_refused(change: Any, sentence: str) -> None:
    given = change(torch.rand(2, 3, WORDS).softmax(-1))
    with pytest.raises(ObjectiveError, match=sentence):
        Distillation()(Reader(), (TOKENS[:, :-1], TOKENS[:, 1:], given))


@pytest.mark.parametrize(
    "make",
    [
        lambda: NextToken(label_smoothing=1.0),
        lambda: NextToken(z_loss=-1.0),
        lambda: Distillation(temperature=0.0),
        lambda: Distillation(direction="both"),  # type: ignore[arg-type]
        lambda: Distillation(hard=2.0),
        lambda: DPO(beta=0.0),
        lambda: DPO(label_smoothing=0.5),
        lambda: Diffusion("x"),  # type: ignore[arg-type]
        lambda: Diffusion(weighting="snr"),  # type: ignore[arg-type]
        lambda: Diffusion(weighting="truncated_snr"),
        lambda: Diffusion(steps=0),
        lambda: Diffusion(gamma=math.nan),
        lambda: FlowMatching("cosine"),  # type: ignore[arg-type]
        lambda: VAE("poisson"),  # type: ignore[arg-type]
        lambda: VAE(kl_weight=-1.0),
        lambda: VAE(warmup_steps=-1),
        lambda: CLIP(math.inf),
    ],
)
def test_fields_out_of_range_are_refused(make: Any) -> None:
    with pytest.raises(ObjectiveError, match=r"it is|it must|take|cannot be"):
        make()


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (
            lambda: NextToken(label_smoothing="a"),
            "'NextToken.label_smoothing' is 'a', of type str; it must be a number.",
        ),
        (lambda: NextToken("pad"), "'NextToken.ignore_index' is 'pad', of type str; it must be a whole number."),
        (lambda: MaskedTokens(accuracy=1), "'MaskedTokens.accuracy' is 1, of type int; it must be true or false."),
        (lambda: Distillation(temperature=[2]), "'Distillation.temperature' is [2], of type list"),
        (lambda: DPO("0.1"), "'DPO.beta' is '0.1', of type str; it must be a number."),
        (lambda: Diffusion(steps=10.5), "'Diffusion.steps' is 10.5, of type float; it must be a whole number."),
        (lambda: VAE(kl_weight="1"), "'VAE.kl_weight' is '1', of type str; it must be a number."),
        (lambda: CLIP(None), "'CLIP.log_scale' is None"),
        (lambda: Warmup(1.0, 2.5), "'Warmup.steps' is 2.5, of type float; it must be a whole number."),
    ],
)
def test_fields_of_the_wrong_type_are_refused(make: Any, sentence: str) -> None:
    with pytest.raises(RecipeError) as caught:
        make()
    assert sentence in str(caught.value)
    assert Distillation(temperature=2).temperature == 2.0, "a whole number is a number"


# --------------------------------------------------------------------------------------------------------- preference


def test_given_and_computed_references_agree() -> None:
    reference, batch = Reader(7), batch_of("dpo")
    with torch.no_grad():
        given = {f"{side}_reference": sequence_log_probabilities(reference, batch[side]) for side in tuple(batch)}
    one, other = DPO(reference=reference)(Reader(0), batch), DPO()(Reader(0), {**batch, **given})
    for name, value in one.items():
        torch.testing.assert_close(value, other[name])


def test_a_model_that_is_its_own_reference_has_log_2() -> None:
    sums = DPO(reference=Reader(0))(Reader(0), batch_of("dpo"))
    assert float(sums["objective"].detach()) == pytest.approx(6 * math.log(2), rel=1e-6)
    assert float(sums["margin"]) == 0
    assert float(sums["accuracy"]) == 0


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda b: {"chosen": b["chosen"]}, "DPO needs 'rejected' and the batch has 'chosen'"),
        (lambda b: b["chosen"], "DPO needs 'chosen' and the batch is a Tensor"),
        (lambda b: {**b, "rejected": b["rejected"][:2]}, "6 chosen texts and 2 rejected"),
        (lambda b: {**b, "rejected": torch.full((6, 4), PADDING)}, "pair 0 of the batch has no token to judge in its"),
        (lambda b: {**b, "chosen": b["chosen"] + 40}, "token .* is outside the model's vocabulary"),
    ],
)
def test_dpo_refuses_other_batches(change: Any, sentence: str) -> None:
    with pytest.raises(ObjectiveError, match=sentence):
        DPO(reference=Reader())(Reader(), change(batch_of("dpo")))


def test_dpo_refuses_other_references() -> None:
    with pytest.raises(ObjectiveError, match=f"the reference knows 40 tokens and the model {WORDS}; take a reference"):
        DPO(reference=Reader(words=40))(Reader(), batch_of("dpo"))
    batch = batch_of("dpo, given")
    nan = torch.tensor([math.nan] * 6)
    for given, words in (
        (torch.ones(6), "is 1; give"), (nan, "is nan; give"), (torch.zeros(4), r"is \[4\]; give"),
        (None, "is NoneType"),
    ):  # fmt: skip
        with pytest.raises(ObjectiveError, match=f"'rejected_reference' of the batch {words}"):
            DPO()(Reader(), {**batch, "rejected_reference": given})


# ---------------------------------------------------------------------------------------------------------- diffusion


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("steps", [10, 1000])
def test_schedules_go_from_samples_to_noise(schedule: Any, steps: int) -> None:
    signal = Diffusion(schedule=schedule, steps=steps).signal()
    assert (signal.diff() < 0).all()
    assert 0 < signal[-1] < 0.01
    assert signal[0] > (0.999 if steps == 1000 else 0.8)


def test_times_and_noise_are_keyed_by_the_generator() -> None:
    model, x = tasks.Denoiser(), torch.randn(6, 2, 3)
    for objective in (Diffusion(), FlowMatching()):
        values = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            values.append(objective(model, x))
        assert torch.equal(values[0], values[1])
        assert not torch.equal(values[0], values[2])


@pytest.mark.parametrize("objective", [Diffusion(), FlowMatching()])
def test_samples_and_answers_of_the_wrong_kind_are_refused(objective: Any) -> None:
    x = torch.randn(4, 6)
    with pytest.raises(ObjectiveError, match=r"the model gave \[4, 3\] for samples of shape \[4, 6\]"):
        objective(lambda x, t: x[:, :3], x)
    for wrong, words in ((x.long(), "int64"), (x[:, 0], r"shape \[4\]"), ("x", "str")):
        with pytest.raises(ObjectiveError, match=f"was given .*{words}.* for samples"):
            objective.counts(wrong)


# -------------------------------------------------------------------------------------------------------- autoencoder


class Encoder(nn.Module):
    """Gives what it is told to."""

    def __init__(self, latents: int = 4, variances: int = 4, values: int = 6):
        super().__init__()
        self.widths = (values, latents, variances)
        self.layer = nn.Linear(6, sum(self.widths))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.layer(x).split(self.widths, dim=1)


def test_vae_counts_values_and_samples_and_warms_up() -> None:
    objective = VAE(kl_weight=0.5, warmup_steps=4)
    bound = learn_terms(bind(objective), Encoder(), torch.rand(5, 6))
    assert bound.counts(torch.rand(5, 6)) == {"reconstruction": 30, "kl": 5}
    assert [bound.weights(step)["kl"] for step in (0, 2, 4, 9)] == [0, 0.25, 0.5, 0.5]


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (Encoder(values=5), r"reconstruction has shape \[3, 5\] and its input \[3, 6\]; make the decoder's head"),
        (Encoder(variances=3), r"mean has shape \[3, 4\] and its log variance \[3, 3\].*twice as wide as the latents"),
        (lambda x: x, "the model gave a Tensor; VAE needs a triple"),
        (lambda x: (x, x), "the model gave a tuple; VAE needs a triple"),
    ],
)
def test_a_vae_head_of_the_wrong_width_is_refused(model: Any, sentence: str) -> None:
    with pytest.raises(ObjectiveError, match=sentence):
        VAE()(model, torch.rand(3, 6))


def test_bernoulli_samples_are_from_0_to_1() -> None:
    with pytest.raises(ObjectiveError, match="the samples are from 0 to 2; under likelihood 'bernoulli'"):
        VAE("bernoulli")(Encoder(), torch.arange(3.0).repeat(2, 2))


def test_latents_have_the_posterior_s_moments_and_gradients() -> None:
    mean, log_variance = (torch.full((20_000,), value, requires_grad=True) for value in (2.0, math.log(0.25)))
    z = reparametrised(mean, log_variance)
    assert float(z.detach().mean()) == pytest.approx(2.0, abs=0.02)
    assert float(z.detach().std()) == pytest.approx(0.5, abs=0.02)
    z.sum().backward()
    assert mean.grad is not None
    assert log_variance.grad is not None


# -------------------------------------------------------------------------------------------------------- contrastive


class Calls(nn.Module):
    """Gives what a function does."""

    def __init__(self, f: Any):
        super().__init__()
        self.f = f

    def forward(self, *arguments: Tensor) -> Any:
        return self.f(*arguments)


def test_clip_alone_sees_its_batch_as_a_whole_one() -> None:
    torch.manual_seed(0)
    model, batch = tasks.TwoTowers().eval(), batch_of("clip")
    found = bind(CLIP()).sums(model, batch)["objective"] / 6
    wanted = tasks.global_contrast(model.double(), [(0, [side.double() for side in batch])], 0)
    assert float(found.detach()) == pytest.approx(float(wanted.detach()), rel=1e-6)


def test_a_scale_of_its_own_is_taken_where_the_model_gives_none() -> None:
    towers = tasks.TwoTowers()

    two = Calls(lambda first, second: towers(first, second)[:2])
    values = [float(bind(CLIP(log_scale=s)).sums(two, batch_of("clip"))["objective"].detach()) for s in (0.0, 3.0)]
    assert values[0] != values[1]


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (lambda a, b: a, "the model gave a Tensor for 6 pairs"),
        (lambda a, b: (a, b[:, :2]), r"the model gave \[6, 5\], \[6, 2\] for 6 pairs"),
        (lambda a, b: (a, b, torch.ones(3)), r"log scale has shape \[3\]; it must be a scalar"),
    ],
)
def test_clip_refuses_other_answers(model: Any, sentence: str) -> None:
    with pytest.raises(ObjectiveError, match=sentence):
        bind(CLIP()).sums(Calls(model), batch_of("clip"))
    with pytest.raises(ObjectiveError, match="CLIP cannot read a batch of type Tensor"):
        bind(CLIP()).sums(Calls(model), torch.ones(3))


def test_every_objective_is_data() -> None:
    """So that a recipe can hold and compare it."""
    for name, task in TASKS.items():
        made = task.objective()
        assert dataclasses.is_dataclass(made), name
        with pytest.raises(dataclasses.FrozenInstanceError):
            made.metrics = ()
