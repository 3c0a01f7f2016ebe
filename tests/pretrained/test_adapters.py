"""Adapters: alone trained and saved, on the base that they were trained on, and merged to what they give."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from instep.data.cursor import load
from instep.errors import CheckpointError, ComponentError
from instep.objectives.language import NextToken
from instep.pretrained import hf, lora, run_model
from instep.pretrained.adapters import BASE_DIGEST, merged
from instep.recipe import Recipe, Team
from instep.record import checkpoint
from instep.record.digest import digest_of_state
from instep.record.folder import RunFolder
from instep.rules.presets import parse as parse_rule
from instep.worker.replica import Replica
from support.harness import stopping_at, train_here
from support.kinds import quick
from support.serving import replayed

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from support.base_models import base_folder, recipe_on  # noqa: E402

TOKENS = torch.arange(12)[None] % 7


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_folder(tmp_path_factory.mktemp("base") / "llama")


def trained(model: Any) -> Any:
    """With adapters that do something."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(len(name)))
    return model.eval()


def saved_state(run: Path) -> dict[str, Tensor]:
    path, _ = RunFolder(run).newest_checkpoint()
    assert path is not None
    return checkpoint.load(path).model_state


@pytest.mark.processes
@pytest.mark.parametrize("name", quick(["lora", "sft"], "lora"))
def test_one_digest_for_any_team_and_after_a_resume(name: str, base: Path, tmp_path: Path) -> None:
    recipe = recipe_on(name, base, steps="4")
    whole = [train_here(recipe, Team(workers=w, loaders=w % 2), tmp_path / str(w)) for w in (1, 2)]
    assert whole[0].digest == whole[1].digest
    stopped = train_here(recipe, Team(workers=3), tmp_path / "stopped", client=stopping_at(2))
    assert stopped.result["interrupted"]
    again = train_here(recipe, Team(workers=2), tmp_path / "stopped", resume=True)
    assert again.digest == whole[0].digest
    if name == "lora":
        state = saved_state(again.path)
        assert all("lora_" in key for key in state if key != BASE_DIGEST)
        assert bytes(state[BASE_DIGEST].tolist()).hex() == digest_of_state(hf(base).state_dict())


@pytest.mark.processes
def test_a_base_that_changed_is_a_sentence_at_the_resume(base: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(base, tmp_path / "own"))
    recipe = recipe_on("lora", own, steps="2")
    train_here(recipe, Team(), tmp_path / "run", client=stopping_at(1))
    state = saved_state(tmp_path / "run")
    other = base_folder(tmp_path / "other", tie_word_embeddings=False)
    shutil.copy(other / "model.safetensors", own / "model.safetensors")
    shutil.copy(other / "config.json", own / "config.json")
    sentence = (
        r"the adapters were trained on other weights than .*own holds now on \S+: those had the digest .*"
        r"start a new run"
    )
    with pytest.raises(CheckpointError, match=sentence):
        train_here(recipe, Team(), tmp_path / "run", resume=True)
    with pytest.raises(CheckpointError, match=sentence):
        run_model(tmp_path / "run")
    lora(base).load_state_dict(state)
    (own / "config.json").unlink()
    with pytest.raises(ComponentError, match=r"own has no config.json, so no model of transformers is there"):
        train_here(recipe, Team(), tmp_path / "run", resume=True)


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize("rule", ["asynchronous", "diloco:5"])
@pytest.mark.parametrize("name", ["lora", "sft"])
def test_a_run_that_is_not_in_step_replays(name: str, rule: str, base: Path, tmp_path: Path) -> None:
    recipe = recipe_on(name, base, rule=rule)
    assert recipe.rule.name == parse_rule(rule).name
    train_here(recipe, Team(workers=2), tmp_path / "run")
    found = replayed(recipe, tmp_path / "run")
    assert found.same, found.divergence


# ------------------------------------------------------------------------------------------------------------- targets


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"targets": ["q_proj", "q_prj"]}, r"the target 'q_prj' matches no module .* are .*q_proj.*model.args.targets"),
        ({"targets": "proj"}, r"the target 'proj' matches no module"),
        ({"targets": []}, r"'targets' of the adapters is empty; name modules, or 'all-linear'"),
        ({"targets": ["embed_tokens"]}, r"'.*embed_tokens' is tied to 'lm_head.weight', so that its adapter would be"),
        ({"targets": ["lm_head"]}, r"'.*lm_head' is tied to"),
        ({"targets": ["norm"]}, r"peft cannot put adapters on the targets \['norm'\] of .*choose others"),
        ({"rank": 0}, r"'rank' of the adapters is 0; it must be at least 1"),
        ({"dropout": 1.0}, r"'dropout' of the adapters is 1.0; it must be from 0 to below 1"),
    ],
)
def test_targets_that_cannot_be_are_one_sentence(base: Path, given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ComponentError, match=sentence):
        lora(base, **given)


def test_targets_are_names_or_their_ends(base: Path) -> None:
    model = lora(base, targets=["q_proj", "model.layers.0.mlp.up_proj"], rank=2)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(names) == 2 * (2 + 1)
    assert all(".q_proj." in name or "layers.0.mlp.up_proj" in name for name in names)
    assert len([name for name, p in lora(base).named_parameters() if p.requires_grad]) == 2 * 2 * 7


def test_adapters_of_conv_layers_work_too(tmp_path: Path) -> None:
    model: Any = trained(lora(base_folder(tmp_path / "gpt2", "gpt2")))
    before = model(TOKENS).logits
    assert torch.allclose(merged(model).eval()(TOKENS).logits, before, atol=1e-4)


def test_without_the_package_its_extra_is_named(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ComponentError, match=r"pip install 'instep\[lora\]'"):
        lora(base)


# ------------------------------------------------------------------------------------------------------------- merging


def test_merged_weights_give_what_the_adapters_gave_up_to_a_rounding(base: Path) -> None:
    model = trained(lora(base))
    before = model(TOKENS).logits
    whole: Any = merged(model).eval()
    assert type(whole).__name__ == "LlamaForCausalLM"
    assert set(whole.state_dict()) == set(hf(base).state_dict())
    after = whole(TOKENS).logits
    assert torch.allclose(after, before, atol=1e-4)
    assert not torch.allclose(after, hf(base).eval()(TOKENS).logits, atol=1e-2)  # type: ignore[operator]


def test_a_narrow_base_is_merged_in_float32_and_rounded_once(base: Path) -> None:
    wide, narrow = trained(lora(base)), trained(lora(base, dtype="bfloat16"))
    assert {p.dtype for name, p in narrow.named_parameters() if "lora_" in name} == {torch.float32}
    with torch.no_grad():  # the base of both is what bfloat16 holds
        for name, parameter in wide.named_parameters():
            if "lora_" not in name:
                parameter.copy_(parameter.bfloat16().float())
            else:
                narrow.get_parameter(name).copy_(parameter)
    exact, rounded = merged(wide), merged(narrow)
    for name, parameter in rounded.named_parameters():
        assert torch.equal(parameter, exact.get_parameter(name).bfloat16()), name
    assert {b.dtype for b in rounded.buffers()} == {torch.float32}


# --------------------------------------------------------------------------------------------------------- plain loops


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("name", ["lora", "sft"])
def test_fifty_steps_are_those_of_a_loop_by_hand(name: str, base: Path, tmp_path: Path) -> None:
    """With transformers and peft alone: a batch is all of the data, so that the order is no matter."""
    recipe = recipe_on(
        name, base, data__args__held_out="0.67", batch="16", steps="50", schedule__kind="constant",
        schedule__warmup_steps="0", clip_norm="none", optimizer__args__lr="5e-3",
    )  # fmt: skip
    run = train_here(recipe, Team(workers=2), tmp_path / "run")
    assert run.result["objective_last"] < run.result["objective_first"] - 0.1
    replica = Replica(recipe, "cpu")  # whose model has the weights that the run began with
    model = by_hand(name, base, replica)
    inputs, targets = load(replica.data.train, range(16), replica.data.collate)
    rates = recipe.optimizer.args  # type: ignore[union-attr]
    parameters = [p for p in model.parameters() if p.requires_grad]
    decays = [[p for p in parameters if (p.dim() >= 2) == matrices] for matrices in (True, False)]
    optimizer = torch.optim.AdamW(
        [{"params": group} for group in decays if group], lr=rates["lr"], betas=rates["betas"], weight_decay=0.0
    )
    model.train()
    for _ in range(50):
        logits = model(inputs.clamp(min=0), use_cache=False).logits
        F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100).backward()
        optimizer.step()
        optimizer.zero_grad()
    found = saved_state(run.path)
    for key, value in model.state_dict().items():
        if key in found:
            assert torch.allclose(found[key], value, atol=2e-4, rtol=1e-3), key
    trained_keys = set(found) - {BASE_DIGEST}
    assert trained_keys <= set(model.state_dict())


def by_hand(name: str, base: Path, replica: Replica) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(base, local_files_only=True)
    if name == "sft":
        return model
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16.0, target_modules="all-linear")
    adapted = peft.get_peft_model(model, config)
    assert not adapted.base_model.model.training, "though its root says so: a loop must call train()"
    assert adapted.training
    state = replica.module.state_dict()
    adapted.load_state_dict({key: value for key, value in state.items() if key != BASE_DIGEST}, strict=False)
    return adapted


# ---------------------------------------------------------------------------------------------------------- preferences


@pytest.mark.processes
@pytest.mark.slow
def test_preferences_are_learned_on_such_a_model(base: Path, tmp_path: Path) -> None:
    """The reference is the same folder, frozen."""
    where = {"model__use": "instep.pretrained:lora", "objective__args__reference__use": "instep.pretrained:hf"}
    for part in ("model", "objective__args__reference"):
        where[f"{part}__args"] = f'{{ folder = "{base}" }}'
    recipe = recipe_on("dpo", base, data__args__samples="64", data__args__held_out="8", **where)
    runs = [train_here(recipe, Team(workers=w), tmp_path / str(w)) for w in (1, 3)]
    assert runs[0].digest == runs[1].digest
    first = runs[0].result["objective_first"]
    assert abs(first - 0.6931) < 1e-3, "adapters begin as the reference: log 2"


def test_the_objective_reads_an_adapted_model_s_vocabulary(base: Path) -> None:
    with pytest.raises(Exception, match="input token 300 is outside the model's vocabulary of 256"):
        NextToken()(lora(base), torch.tensor([[1, 300, 2]]))


def test_a_recipe_s_model_is_the_pretrained_one(base: Path) -> None:
    recipe: Recipe = recipe_on("sft", base)
    assert digest_of_state(Replica(recipe, "cpu").module.state_dict()) == digest_of_state(hf(base).state_dict())
