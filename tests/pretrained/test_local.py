"""Models of transformers from a folder: the weights that are there, all of them, of this model, and nothing else."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from torch import Tensor, nn

from instep.components import Component
from instep.errors import ComponentError, DataError, ObjectiveError, RecordError
from instep.models.hf import save
from instep.objectives.language import NextToken
from instep.pretrained import hf
from instep.recipe import Recipe
from instep.worker.model import build_for_training
from instep.worker.replica import Replica

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

from support.base_models import base_folder, recipe_on  # noqa: E402

TOKENS = torch.arange(12)[None] % 7


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_folder(tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture
def own(base: Path, tmp_path: Path) -> Path:
    """A copy, to be spoiled."""
    return Path(shutil.copytree(base, tmp_path / "own"))


def logits(model: Any) -> Tensor:
    found: Tensor = model.eval()(TOKENS).logits
    return found


def of_transformers(folder: Path, **options: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, **options)


def test_shards_and_tied_weights_load_as_transformers_loads_them(base: Path, tmp_path: Path) -> None:
    whole = of_transformers(base)
    whole.save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    for folder in (base, tmp_path / "shards"):
        found: Any = hf(folder)
        assert torch.equal(logits(found), logits(whole))
        assert found.lm_head.weight is found.model.embed_tokens.weight
        assert not found.config.use_cache
    other = base_folder(tmp_path / "gpt2", "gpt2")
    assert torch.equal(logits(hf(other)), logits(of_transformers(other)))


def test_nothing_is_asked_of_a_network(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> NoReturn:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    hf(base)
    with pytest.raises(ComponentError, match="there is no folder meta-llama/Llama-3.2-1B"):
        hf("meta-llama/Llama-3.2-1B")


def test_weights_have_the_type_that_the_recipe_says(tmp_path: Path) -> None:
    """transformers alone gives that of the file; and only weights become narrow, not what positions come from."""
    narrow = base_folder(tmp_path / "narrow", dtype="bfloat16")
    assert of_transformers(narrow).dtype == torch.bfloat16
    assert {p.dtype for p in hf(narrow).parameters()} == {torch.float32}
    found = hf(narrow, dtype="bfloat16")
    assert {p.dtype for p in found.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in found.buffers()} == {torch.float32}
    with pytest.raises(ComponentError, match="'dtype' is 'float8'; did you mean 'float"):
        hf(narrow, dtype="float8")


def test_a_model_that_reads_back_otherwise_is_not_saved(base: Path, tmp_path: Path) -> None:
    """Such as one that was made narrow as a whole, with the table that positions are computed from."""
    model: Any = hf(base).eval()
    save(model, tmp_path / "wide")
    with pytest.raises(
        RecordError, match=r"the model read back from .*narrow gives other logits than the one that was"
    ):
        save(model.to(torch.bfloat16), tmp_path / "narrow")


def test_settings_of_sampling_that_transformers_refuses_to_save_are_made_whole(base: Path, tmp_path: Path) -> None:
    """Models come with a temperature and without `do_sample`, and load; `save_pretrained` then raises."""
    model: Any = of_transformers(base)
    model.generation_config.temperature = 0.6
    with pytest.raises(ValueError, match="temperature"):
        model.save_pretrained(tmp_path / "theirs")
    save(model, tmp_path / "own")
    assert of_transformers(tmp_path / "own").generation_config.temperature == 0.6


def changed_config(**fields: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        table = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**table, **fields}))

    return change


def without_a_norm(folder: Path) -> None:
    state = safetensors.load_file(folder / "model.safetensors")
    safetensors.save_file(
        {name: value for name, value in state.items() if name != "model.norm.weight"}, folder / "model.safetensors"
    )


def of_gpt2(folder: Path) -> None:
    other = base_folder(folder.parent / "other", "gpt2")
    shutil.copy(other / "model.safetensors", folder / "model.safetensors")


def cut_short(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-100])


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def a_shard_gone(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def an_adapter(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")


def an_adapter_too(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (of_gpt2, r"the weights in .*own/model.safetensors are not those of the LlamaForCausalLM that .*config.json"),
        (
            changed_config(intermediate_size=48),
            r"own/model.safetensors are not .*shape \[16, 32\] there, and \[16, 48\]",
        ),
        (changed_config(num_hidden_layers=1), r"own/model.safetensors .*'model.layers.1.*others\) is of no such model"),
        (without_a_norm, r"own/model.safetensors .*: 'model.norm.weight' is missing; give a folder whose weights"),
        (cut_short, r"own/model.safetensors is not a sound safetensors file: .*; use another one"),
        (a_shard_gone, r"the weights .*own/model-00001-of-00002.safetensors cannot be read: No such file"),
        (pickled, r"has no model.safetensors; it has pytorch_model.bin, a pickle, which could run code"),
        (an_adapter, r"own holds an adapter and not the weights of its model"),
        (an_adapter_too, r"own holds an adapter beside its weights, and transformers would put it on them"),
        (changed_config(quantization_config={"quant_method": "fp8"}), r"the weights in .*own are quantised"),
        (changed_config(model_type="lama"), r"transformers cannot load a causal model from .*own .*config.json"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_weights_that_are_not_the_model_s_are_one_sentence(own: Path, spoil: Any, sentence: str) -> None:
    spoil(own)
    with pytest.raises(ComponentError, match=sentence) as caught:
        hf(own)
    assert "\n" not in caught.value.message


def test_what_transformers_itself_does_with_a_missing_weight(own: Path) -> None:
    """It makes one up, and goes on."""
    without_a_norm(own)
    made = of_transformers(own)
    assert made.model.norm.weight.shape == (16,)


def test_code_that_a_configuration_names_is_not_asked_for(own: Path) -> None:
    """transformers would download a kernel that does the attention, where it can."""
    expected = logits(hf(own))
    changed_config(attn_implementation="somebody/kernel", experts_implementation="somebody/kernel")(own)
    assert torch.equal(logits(hf(own)), expected)
    with pytest.raises(ComponentError, match="'attention' is 'somebody/kernel', code that would be downloaded; give"):
        hf(own, attention="somebody/kernel")
    found: Any = hf(own, attention="eager")
    assert found.config._attn_implementation == "eager"


def test_a_folder_that_is_none_is_one_sentence(tmp_path: Path, base: Path) -> None:
    with pytest.raises(ComponentError, match=r"no folder was named .*--recipe.model.args.folder runs/hf/artifacts/hf"):
        hf()
    with pytest.raises(ComponentError, match=r"has no config.json, so no model of transformers is there"):
        hf(tmp_path)
    shutil.copytree(base, tmp_path / "run" / "artifacts" / "hf")
    with pytest.raises(ComponentError, match=r"it is a run, whose model is in .*run/artifacts/hf"):
        hf(tmp_path / "run")


# -------------------------------------------------------------------------------------------------------------- losses


def test_losses_of_transformers_are_refused_with_the_remedy(base: Path) -> None:
    model = build_for_training(Component(hf, {"folder": base}), torch.device("cpu"))
    assert torch.isfinite(model(TOKENS, labels=None).logits).all()
    with pytest.raises(ObjectiveError, match=r"LlamaForCausalLM was given 'labels'.*language:NextToken"):
        model(TOKENS, labels=TOKENS)
    inside = build_for_training(Component(Around, {"folder": base}), torch.device("cpu"))
    with pytest.raises(ObjectiveError, match="LlamaForCausalLM was given 'labels'"):
        inside(TOKENS)


class Around(nn.Module):
    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.inner = hf(folder)

    def forward(self, tokens: Tensor) -> Any:
        return self.inner(tokens, labels=tokens).loss


def test_a_mean_of_transformers_is_none_of_the_batch(base: Path) -> None:
    """Why they are refused: the mean of two microbatches' means is not that of their tokens; the sums add up."""
    model: Any = hf(base).eval()
    rows = torch.arange(18).view(2, 9) % 7
    labels = rows.clone()
    labels[1, 3:] = -100
    whole = model(rows, labels=labels).loss
    parts = torch.stack([model(rows[i : i + 1], labels=labels[i : i + 1]).loss for i in range(2)])
    assert abs(float((parts.mean() - whole).detach())) > 1e-3
    targets = labels[:, 1:]
    sums = [NextToken()(model, (rows[i : i + 1, :-1], targets[i : i + 1])) for i in range(2)]
    counts = [NextToken().counts((rows[i : i + 1, :-1], targets[i : i + 1])) for i in range(2)]
    assert torch.allclose(sum(sums) / sum(counts), whole)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------------- tokenizers


def test_data_of_another_tokenizer_than_the_model_s_are_refused(own: Path) -> None:
    path = own / "tokenizer.json"
    table = json.loads(path.read_text())
    table["model"]["vocab"]["new"] = 256
    path.write_text(json.dumps(table))
    bytes_of_text: Any = {"use": "instep.data.text:stdlib_text", "args": {"context": 8}}
    recipe = Recipe(model=Component(hf, {"folder": own}), objective=NextToken(), data=bytes_of_text, batch=8)
    with pytest.raises(DataError, match=r"the data's tokens are of another tokenizer \(digest bytes\) than the one in"):
        Replica(recipe, "cpu")
    path.unlink()
    Replica(recipe, "cpu")


def test_a_token_above_the_vocabulary_is_one_sentence(tmp_path: Path) -> None:
    folder = base_folder(tmp_path / "few", words=64)
    replica = Replica(recipe_on("sft", folder), "cpu")
    with pytest.raises(ObjectiveError, match=r"input token 1\d\d is outside the model's vocabulary of 64 \(0 to 63\)"):
        replica.learn_terms(0)
