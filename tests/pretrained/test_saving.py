"""What a run has trained, for transformers and for a reader."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from instep.cli import main
from instep.errors import ComponentError, DataError, RecordError
from instep.pretrained import run_model
from instep.pretrained.saving import export_hf, sampled
from instep.recipe import Recipe, Team
from support.harness import Outcome, train_here

transformers = pytest.importorskip("transformers")

from support.base_models import base_folder, recipe_on  # noqa: E402

TOKENS = torch.arange(24).view(2, 12) % 7


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_folder(tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture(scope="module")
def adapted(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """A run of recipe lora whose adapters do something."""
    pytest.importorskip("peft")
    fields = {"optimizer__args__lr": "0.1", "schedule__warmup_steps": "0", "ema": "[0.5]"}
    recipe = recipe_on("lora", base, steps="3", **fields)
    return train_here(recipe, Team(), tmp_path_factory.mktemp("lora") / "run")


@pytest.fixture(scope="module")
def tuned(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return train_here(recipe_on("sft", base, steps="2"), Team(), tmp_path_factory.mktemp("sft") / "run")


def other() -> Recipe:
    """A recipe of another kind."""
    names = {name: f"golden.models:{name}" for name in ("data", "loss", "Net")}
    return Recipe(model=names["Net"], objective=names["loss"], data=names["data"], batch=16, microbatches=4, steps=1)


def loaded(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()


@pytest.mark.processes
def test_an_export_gives_the_logits_of_the_run_to_the_bit(tuned: Outcome, tmp_path: Path) -> None:
    files = export_hf(tuned.path, tmp_path / "out")
    assert files == [
        "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    ]  # fmt: skip
    model: Any = run_model(tuned.path).eval()
    assert torch.equal(loaded(tmp_path / "out")(TOKENS).logits, model(TOKENS).logits)
    assert (tmp_path / "out").stat().st_mode & 0o777 == (tmp_path).stat().st_mode & 0o777 | 0o055
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "nothing is left beside it"
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out", local_files_only=True)
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "a"}], tokenize=False, add_generation_prompt=True
    )
    assert asked == "<|user|>\na\n<|assistant|>\n"


@pytest.mark.processes
def test_adapters_are_merged_on_export(adapted: Outcome, base: Path, tmp_path: Path) -> None:
    export_hf(adapted.path, tmp_path / "out")
    whole, trained = loaded(tmp_path / "out"), run_model(adapted.path).eval()
    assert type(whole).__name__ == "LlamaForCausalLM"
    found, before = whole(TOKENS).logits, loaded(base)(TOKENS).logits
    expected = trained(TOKENS).logits  # type: ignore[operator]
    assert torch.allclose(found, expected, atol=1e-4)
    assert not torch.allclose(found, before, atol=1e-2)
    assert not (tmp_path / "out" / "adapter_config.json").exists()


@pytest.mark.processes
def test_an_average_of_adapters_is_merged_on_export(adapted: Outcome, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(adapted.path), "--to", "hf", "--ema", "0.5"]) == 0
    folder = adapted.path.with_name("run-hf-ema-0.5")
    assert capsys.readouterr().out == f"{folder}\n"
    found, average = loaded(folder)(TOKENS).logits, run_model(adapted.path, ema=0.5).eval()
    expected = average(TOKENS).logits  # type: ignore[operator]
    assert torch.allclose(found, expected, atol=1e-4)
    weights = run_model(adapted.path).eval()(TOKENS).logits  # type: ignore[operator]
    assert not torch.allclose(found, weights, atol=1e-2)


@pytest.mark.processes
def test_the_command_exports_beside_the_run_and_nothing_twice(
    tuned: Outcome, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(tuned.path), "--to", "hf"]) == 0
    folder = tuned.path.with_name("run-hf")
    assert capsys.readouterr().out == f"{folder}\n"
    assert loaded(folder).config.vocab_size == 256
    assert main(["export", str(tuned.path), "--to", "hf"]) == 1
    assert f"{folder} is there already; choose another folder with --out" in capsys.readouterr().err


@pytest.mark.processes
def test_what_cannot_be_exported_is_one_sentence(tuned: Outcome, tmp_path: Path) -> None:
    train_here(other(), Team(), tmp_path / "net")
    with pytest.raises(ComponentError, match=r"is a Net, and only causal models of transformers are exported to hf"):
        export_hf(tmp_path / "net", tmp_path / "out")
    with pytest.raises(ComponentError, match="no model can be taken from an earlier run: there is no folder"):
        export_hf(tmp_path / "none", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.processes
def test_merged_weights_that_are_not_what_was_trained_are_refused(
    adapted: Outcome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from instep.pretrained import saving

    def unmerged(model: Any) -> Any:
        return model.unload()

    monkeypatch.setattr(saving, "merged", unmerged)
    with pytest.raises(RecordError, match=r"the merged weights of .* give other logits than its adapters, by up to"):
        export_hf(adapted.path, tmp_path / "out")


# -------------------------------------------------------------------------------------------------------------- samples


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """A run of a GPT on text."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "a.txt").write_text("to be or not to be, that is the question. " * 40)
    words: Any = {"use": "instep.data.text:text_files", "args": {"pattern": str(folder / "a.txt"), "context": 16}}
    net: Any = {
        "use": "instep.models:GPT",
        "args": {"vocabulary": 256, "context": 16, "width": 8, "depth": 1, "heads": 2},
    }
    recipe = Recipe(model=net, objective="instep.objectives.language:NextToken", data=words, batch=8, steps=2)
    return train_here(recipe, Team(), folder / "run")


@pytest.mark.processes
def test_a_sample_is_a_function_of_its_seed(texts: Outcome, capsys: pytest.CaptureFixture[str]) -> None:
    first, again, other = (sampled(texts.path, "to be", tokens=30, seed=seed) for seed in (1, 1, 2))
    assert first == again != other
    assert first.startswith("to be")
    cold = [sampled(texts.path, "to be", tokens=9, temperature=0, seed=seed) for seed in (1, 2)]
    assert cold[0] == cold[1]
    words = ["sample", str(texts.path), "--prompt", "to be", "--tokens", "30", "--seed", "1"]
    assert main(words) == 0
    assert capsys.readouterr().out == f"{first}\n"


@pytest.mark.processes
def test_a_model_of_chats_takes_the_prompt_for_a_question(tuned: Outcome, adapted: Outcome) -> None:
    for run in (tuned, adapted):
        assert sampled(run.path, "what?", tokens=3).startswith("<|user|>\nwhat?\n<|assistant|>\n")


@pytest.mark.processes
def test_a_sample_ends_where_the_tokenizer_s_end_comes(tuned: Outcome, monkeypatch: pytest.MonkeyPatch) -> None:
    from instep.data.chats import ChatForm
    from instep.pretrained import saving

    def written(model: Any, tokens: torch.Tensor, *_: Any) -> torch.Tensor:
        return torch.cat((tokens, torch.tensor([[65, 66, 7, 67]])), dim=1)

    monkeypatch.setattr(saving, "generate", written)
    assert sampled(tuned.path, "what?").endswith("\nAB\x07C")
    monkeypatch.setattr(ChatForm, "end", property(lambda _: 7))
    assert sampled(tuned.path, "what?").endswith("\nAB")


@pytest.mark.processes
def test_what_cannot_be_sampled_is_one_sentence(
    texts: Outcome, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_here(other(), Team(), tmp_path / "net")
    with pytest.raises(DataError, match=r"have no codec between text and tokens, so its model cannot be prompted"):
        sampled(tmp_path / "net", "a")
    with pytest.raises(RecordError, match="a sample of 0 tokens at temperature 0.8 with seed 0 cannot be drawn"):
        sampled(texts.path, "a", tokens=0)
    assert main(["sample", str(texts.path), "--prompt", "a", "--temperature", "hot"]) == 2
    assert "--temperature is 'hot'; it must be a number, from 0" in capsys.readouterr().err
    assert main(["sample", "--help"]) == 0
    assert "This is not a chat product" in " ".join(capsys.readouterr().out.split())


def test_what_a_run_keeps_is_the_base_folder_s_name(adapted: Outcome, base: Path) -> None:
    """Found again at a resume, as the recipe has it."""
    text = (adapted.path / "recipe.toml").read_text()
    assert f'folder = "{base}"' in text
    assert json.loads((adapted.path / "result.json").read_text())["digest"] == adapted.digest
