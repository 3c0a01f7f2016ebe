"""The built-in recipes: each trains on real data, reaches its figure, and gives one digest for any team."""

from __future__ import annotations

import functools
import json
import re
import struct
import sys
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from instep.artifacts.digits import grid, told_apart, write_png
from instep.cli.flags import merge
from instep.data.cursor import load
from instep.data.preferences import Shuffled, shuffled_text
from instep.data.text import Windows
from instep.errors import ComponentError, DataError, RecipeError, RecordError
from instep.models import GPT, generate
from instep.models.flow import FlowNet, integrate
from instep.models.start import seeded
from instep.models.vae import VAENet
from instep.objectives.language import NextToken
from instep.packed import PackedTokens
from instep.pretrained import run_model
from instep.recipe import Recipe, Team, parse
from instep.recipe_files import names_of_recipes, read
from support.harness import Outcome, train_here
from support.kinds import quick

NEEDS = {
    "flow": "sklearn",
    "gan": "sklearn",
    "vae": "sklearn",
    "hf": "transformers",
    "lora": "peft",
    "sft": "transformers",
}


SAVED = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
"""Files of a model of transformers and its tokenizer."""


def recipe(name: str, **settings: str) -> Recipe:
    """A built-in recipe with fields set as on the command line: ``data__args__held_out`` for data.args.held_out."""
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    dotted = [(f"recipe.{key.replace('__', '.')}", value) for key, value in settings.items()]
    return parse(merge(read(name), dotted))[0]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of recipe gpt, short."""
    path = tmp_path_factory.mktemp("teacher") / "gpt"
    train_here(recipe("gpt", steps="3", sample_length="0", evaluate_samples="8"), Team(), path)
    return path


def short(name: str, teacher: Path) -> Recipe:
    settings = {"steps": "6", "evaluate_every": "3", "evaluate_samples": "16", "sample_length": "0"}
    if name == "distil":
        settings["objective__args__teacher__args__run"] = str(teacher)
    if name == "dpo":
        settings |= {"data__args__samples": "200", "data__args__held_out": "40"}
    return recipe(name, **settings)


def test_the_recipes_are_these() -> None:
    assert names_of_recipes() == ["distil", "dpo", "flow", "gan", "gpt", "hf", "lora", "muon", "sft", "vae"]


@pytest.mark.processes
@pytest.mark.parametrize("name", quick(["flow", "gan", "vae", "dpo", "distil", "hf", "lora", "sft", "muon"], "vae"))
def test_a_recipe_gives_one_digest_and_leaves_its_artifacts(name: str, teacher: Path, tmp_path: Path) -> None:
    """Two of them on the model that recipe hf leaves."""
    if name in ("lora", "sft"):
        train_here(short("hf", teacher), Team(), tmp_path / "hf")
        settings = {"steps": "4", "evaluate_samples": "8", "sample_length": "0"}
        made = recipe(name, model__args__folder=str(tmp_path / "hf" / "artifacts" / "hf"), **settings)
    else:
        made = short(name, teacher)
    runs = [train_here(made, Team(workers=w), tmp_path / str(w)) for w in (1, 3)]
    assert runs[0].digest == runs[1].digest
    assert not [event for run in runs for event in run.events if event["kind"] == "warned"]
    assert runs[0].result["artifacts"] == runs[1].result["artifacts"], "figures do not know the team either"
    expected = {
        "flow": ["artifacts/samples.png"],
        "gan": ["artifacts/samples.png"],
        "vae": ["artifacts/reconstructions.png", "artifacts/samples.png"],
        "dpo": ["artifacts/pairs.txt"],
        "hf": [f"artifacts/hf/{file}" for file in SAVED],
        "sft": [f"artifacts/hf/{file}" for file in ["chat_template.jinja", *SAVED]],
    }
    if name in ("distil", "lora", "muon"):
        assert runs[0].result["artifacts"] is None
    else:
        assert runs[0].result["artifacts"]["files"] == expected[name]
        for file in expected[name]:
            assert (runs[0].path / file).stat().st_size > 50
            if file.endswith(("png", "txt")):
                assert (runs[0].path / file).read_bytes() == (runs[1].path / file).read_bytes()


FIGURES: dict[str, Any] = {
    "flow": lambda run: (
        figures(run)["recognised"] > 0.95
        and figures(run)["told apart"] < 0.7
        and figures(run)["nearest"] > 0.9 * figures(run)["nearest, held-out"]
    ),
    "gan": lambda run: (
        figures(run)["recognised"] > 0.95
        and figures(run)["told apart"] < 0.75
        and figures(run)["nearest"] > 0.9 * figures(run)["nearest, held-out"]
    ),
    "vae": lambda run: (
        figures(run)["error"] < 0.25 * figures(run)["error of the mean"] and figures(run)["recognised"] > 0.9
    ),
}


def figures(run: Outcome) -> Mapping[str, Any]:
    found: Mapping[str, Any] = run.result["artifacts"]["figures"]
    return found


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize("name", FIGURES)
def test_a_recipe_reaches_its_figure(name: str, tmp_path: Path) -> None:
    run = train_here(recipe(name), Team(workers=2), tmp_path / "run")
    assert FIGURES[name](run), json.dumps(run.result, indent=1)


# ------------------------------------------------------------------------------------------------------------ pictures


def read_png(path: Path) -> Tensor:
    """[H, W] uint8 of a grey PNG without filters, by its definition."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at, found = 8, {}
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        kind, content = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        assert struct.unpack(">I", data[at + 8 + length : at + 12 + length])[0] == zlib.crc32(kind + content)
        found[kind] = content
        at += 12 + length
    width, height, depth, colour = struct.unpack(">IIBB", found[b"IHDR"][:10])
    assert (depth, colour) == (8, 0)
    lines = torch.frombuffer(bytearray(zlib.decompress(found[b"IDAT"])), dtype=torch.uint8).view(height, width + 1)
    assert not lines[:, 0].any()
    return lines[:, 1:]


def test_a_png_reads_back_as_it_was(tmp_path: Path) -> None:
    pixels = torch.randint(0, 256, (7, 11), dtype=torch.uint8)
    write_png(tmp_path / "a.png", pixels)
    assert torch.equal(read_png(tmp_path / "a.png"), pixels)
    image = pytest.importorskip("PIL.Image")
    with image.open(tmp_path / "a.png") as opened:
        assert opened.size == (11, 7)
        assert opened.tobytes() == pixels.numpy().tobytes()


def test_a_grid_lays_pictures_in_rows() -> None:
    pictures = torch.stack([torch.full((2, 3), value) for value in (0.0, 1.0, 2.0, -1.0, 0.5)])
    found = grid(pictures, 3, gap=1, zoom=2)
    assert found.shape == (2 * (2 * 3 + 1), 2 * (3 * 4 + 1))
    centres = [int(found[2 * (1 + 3 * row), 2 * (1 + 4 * column)]) for row in range(2) for column in range(3)]
    assert centres == [0, 255, 255, 0, 128, 128]


@pytest.mark.parametrize("shape", [(3,), (2, 3, 4, 4), (0, 4, 4)])
def test_a_grid_of_other_shapes_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(RecordError, match="cannot be made of pictures of shape"):
        grid(torch.zeros(shape), 2)
    with pytest.raises(RecordError, match="a grey picture is"):
        write_png(Path("x.png"), torch.zeros(2, 2))


def test_like_and_unlike_are_told_apart_as_they_should() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 400, 4, generator=generator)
    assert 0.42 < told_apart(a, b) < 0.58
    assert told_apart(a, b + 20) == 1.0
    assert told_apart(a, a.clone()) < 0.05, "copies: the nearest of each is its twin"


# -------------------------------------------------------------------------------------------------------------- models


def test_the_flow_is_followed_to_second_order() -> None:
    """dx/dt = x has the solution e^t x; Heun's error falls with the square of the step."""
    start = torch.ones(1, 1, dtype=torch.float64)
    errors = [abs(float(integrate(lambda x, t: x, start, steps)) - torch.e) for steps in (10, 20)]
    assert errors[1] < errors[0] / 3.5


def test_a_flow_net_starts_at_zero_and_knows_time_and_class() -> None:
    net = FlowNet(width=16, depth=2)
    x, t, labels = torch.randn(4, 1, 8, 8), torch.rand(4), torch.arange(4)
    assert torch.equal(net(x, t, labels), torch.zeros_like(x))
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    assert not torch.allclose(net(x, t, labels), net(x, 1 - t, labels))
    assert not torch.allclose(net(x, t, labels), net(x, t, labels + 1))


def test_a_vae_draws_in_training_alone() -> None:
    net = VAENet(width=16, latents=3)
    x = torch.rand(5, 1, 8, 8)
    found, mean, log_variance = net(x)
    assert (found.shape, mean.shape, log_variance.shape) == ((5, 1, 8, 8), (5, 3), (5, 3))
    assert not torch.equal(net(x)[0], found)
    net.eval()
    assert torch.equal(net(x)[0], net.decode(mean))


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: FlowNet(width=0), "'width' is 0"),
        (lambda: FlowNet(width=7), "must be even"),
        (lambda: VAENet(latents=0), "'latents' is 0"),
    ],
)
def test_numbers_that_fit_no_model_are_refused(build: Any, sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        build()


def test_seeded_models_are_the_same_and_leave_the_random_state() -> None:
    build = functools.partial(GPT, vocabulary=8, context=4, width=8, depth=1, heads=2)
    before = torch.get_rng_state()
    first, again, other = seeded(build), seeded(build), seeded(build, 1)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.embedding.weight, other.embedding.weight)  # type: ignore[arg-type, union-attr]


@pytest.mark.processes
def test_an_exported_model_loads_as_transformers_does(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    run = train_here(
        recipe("hf", steps="2", sample_prompt="def ", sample_length="5", evaluate_samples="8"), Team(), tmp_path / "run"
    )
    loaded = transformers.AutoModelForCausalLM.from_pretrained(run.path / "artifacts" / "hf", local_files_only=True)
    assert loaded.config.use_cache
    trained = run_model(run.path).eval()
    tokens = torch.randint(256, (2, 20))
    assert torch.equal(loaded(tokens).logits, trained(tokens).logits)
    assert len(run.result["sample"].encode()) >= 5, "text is drawn from a model with .logits too"
    assert generate(trained, tokens, 3, temperature=0).shape == (2, 23)


def test_a_family_that_transformers_does_not_know_is_refused() -> None:
    pytest.importorskip("transformers")
    from instep.models.hf import causal

    with pytest.raises(ComponentError, match="cannot build a causal model 'lama'"):
        causal("lama")
    with pytest.raises(ComponentError, match=r"'hidden_size': 'wide'.*'hidden_size' expected int.*check 'model.args'"):
        causal(hidden_size="wide")
    with pytest.raises(
        ComponentError, match=r"hidden size \(30\) is not a multiple .* heads \(4\); check 'model.args'"
    ):
        causal(hidden_size=30, num_attention_heads=4)


@pytest.mark.parametrize("cache", [False, True])
def test_a_model_of_transformers_keeps_packed_documents_apart_whatever_its_cache(cache: bool) -> None:
    pytest.importorskip("transformers")
    from instep.models.hf import causal

    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    model = causal(**sizes, num_attention_heads=2, num_key_value_heads=2, use_cache=cache)
    tokens = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    packed = PackedTokens(tokens, tokens, torch.tensor([[1] * 3 + [2] * 5]), torch.tensor([[*range(3), *range(5)]]))
    total = NextToken()(model, packed)
    alone = [NextToken()(model, (part, part)) for part in (tokens[:, :3], tokens[:, 3:])]
    torch.testing.assert_close(total, alone[0] + alone[1])


def test_what_is_not_installed_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    from instep.data import digits
    from instep.models.hf import causal

    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ComponentError, match=r"pip install 'instep\[digits\]'"):
        digits.digits()
    with pytest.raises(ComponentError, match=r"pip install 'instep\[hf\]'"):
        causal()


# ---------------------------------------------------------------------------------------------------------------- data


def test_the_digits_are_all_there_once() -> None:
    sklearn = pytest.importorskip("sklearn.datasets")
    from instep.data.digits import digits

    data = digits()
    assert (len(data.train), len(data.held_out or ())) == (1617, 180)
    everything = torch.cat([data.train.tensors[0], data.held_out.tensors[0]])  # type: ignore[attr-defined, union-attr]
    pictures = torch.tensor(sklearn.load_digits(return_X_y=True)[0] / 16, dtype=torch.float32)
    assert sorted(everything.flatten(1).tolist()) == sorted(pictures.tolist())
    x, label = data.train[0]
    assert (x.shape, label.dtype) == ((1, 8, 8), torch.int64)
    signed = digits("signed", labels=False)
    assert torch.equal(signed.train[0], 2 * x - 1)
    assert isinstance(load(signed.train, [0, 1]), Tensor)
    with pytest.raises(DataError, match="'scale' is 'other'"):
        digits("other")  # type: ignore[arg-type]


def test_a_pair_has_one_prompt_and_the_same_bytes_in_another_order() -> None:
    data = shuffled_text(prompt=16, continuation=32, samples=50, held_out=10)
    assert len(data.held_out or ()) <= 10
    for index in range(len(data.train)):
        pair = data.train[index]
        (chosen, targets), (rejected, others) = pair["chosen"], pair["rejected"]
        assert torch.equal(chosen[:16], rejected[:16])
        assert (targets[:15] == -100).all()
        assert (targets[15:] >= 0).all()
        assert len(targets) == 47
        assert sorted(targets[15:].tolist()) == sorted(others[15:].tolist())
        assert not torch.equal(targets, others)
        assert torch.equal(targets[15:-1], chosen[16:])
    again = shuffled_text(prompt=16, continuation=32, samples=50, held_out=10)
    assert torch.equal(again.train[3]["rejected"][1], data.train[3]["rejected"][1])


def test_windows_that_shuffling_does_not_change_are_left_out() -> None:
    assert len(Shuffled(Windows(b"a" * 100, 9), 4, 100)) == 0
    with pytest.raises(RecipeError, match="a 'prompt' of 10 bytes does not fit"):
        Shuffled(Windows(b"a b" * 100, 9), 10, 100)
    with pytest.raises(RecipeError, match="0 'samples' are no pairs"):
        Shuffled(Windows(b"a b" * 100, 9), 4, 0)


# ---------------------------------------------------------------------------------------------------- an earlier run


@pytest.mark.processes
def test_a_model_is_taken_from_an_earlier_run(teacher: Path) -> None:
    digest = json.loads((teacher / "result.json").read_text())["digest"]
    model = run_model(teacher, digest=digest)
    assert isinstance(model, GPT)
    with pytest.raises(ComponentError, match=r"have the digest .*, and 00 are asked for"):
        run_model(teacher, digest="00")


@pytest.mark.processes
def test_an_earlier_run_that_is_not_there_is_a_sentence(tmp_path: Path, teacher: Path) -> None:
    with pytest.raises(ComponentError, match=r"no earlier run was named .*--recipe.objective.args.teacher.args.run"):
        train_here(recipe("distil", steps="2"), Team(workers=2), tmp_path / "a")
    with pytest.raises(ComponentError, match="no model can be taken from an earlier run: there is no folder /nowhere"):
        run_model("/nowhere")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "recipe.toml").write_text((teacher / "recipe.toml").read_text())
    with pytest.raises(ComponentError, match="has no sound checkpoint to take a model from"):
        run_model(tmp_path / "empty")


# ----------------------------------------------------------------------------------------------------------- artifacts


def bad_artifacts(model: nn.Module, data: Any, folder: Path) -> None:
    (folder / "begun.txt").write_text("x")
    raise RuntimeError("the ink is out")


def changing_artifacts(model: nn.Module, data: Any, folder: Path) -> dict[str, float]:
    assert not model.training
    assert not torch.is_grad_enabled()
    with torch.no_grad():
        next(model.parameters()).zero_()
    return {"one": 1.0}


@pytest.mark.processes
@pytest.mark.parametrize("engine", ["lockstep", "server"])
def test_artifacts_that_fail_or_meddle_do_not_harm_the_run(engine: Any, tmp_path: Path) -> None:
    from support import workloads

    plain = train_here(workloads.convnet(), Team(), tmp_path / "plain")
    team = Team(workers=2, engine=engine)
    failing = train_here(workloads.convnet(artifacts=bad_artifacts), team, tmp_path / "failing")
    meddling = train_here(workloads.convnet(artifacts=changing_artifacts), team, tmp_path / "meddling")
    assert plain.digest == failing.digest == meddling.digest
    assert plain.result["artifacts"] is None
    assert failing.result["artifacts"] == {"files": ["artifacts/begun.txt"], "figures": {}}
    (warned,) = (event["why"] for event in failing.events if event["kind"] == "warned")
    assert re.fullmatch(
        r"the artifacts could not be written: RuntimeError: the ink is out \(.*test_built_in_recipes\.py, line \d+\)",
        warned,
    )
    assert meddling.result["artifacts"] == {"files": [], "figures": {"one": 1.0}}
