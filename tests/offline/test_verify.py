"""`instep.verify`: a sample of a run computed again from its kept checkpoints, and what it finds to be wrong."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from instep import api
from instep.cli import main
from instep.errors import InstepError, NotComparableError, RecordError
from instep.offline.spans import End, RunSpan, drawn
from instep.offline.verifying import verify
from instep.recipe import Recipe, Team
from instep.record import checkpoint, tape
from instep.record.folder import RunFolder
from instep.record.hardware import Hardware
from instep.record.receipt import Verified
from support import workloads
from support.harness import train_here
from support.kinds import quick
from support.regression import regression, squares
from support.resuming import begin, go_on
from support.resuming import recipe as to_resume
from support.sentences import one_sentence
from support.serving import RULES, WORKLOADS, disturbed

Events = list[dict[str, Any]]


def verified(recipe: Recipe, path: Path, share: float = 1.0, seed: int = 0) -> Verified:
    """In this process, as `instep.verify` does in another."""
    torch.set_num_threads(1)
    return verify(recipe, path, list(tape.read(path / "tape.jsonl")), share, seed)


# --------------------------------------------------------------------------------------------------- which are computed


@st.composite
def many_spans(draw: st.DrawFn) -> list[RunSpan]:
    lengths = draw(st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=5), min_size=1, max_size=8))
    spans, step = list[RunSpan](), 0
    for gaps in lengths:
        ends = [step + sum(gaps[: count + 1]) for count in range(len(gaps))]
        spans.append(RunSpan(step, step, step, 0, tuple(End(end, end, end) for end in ends)))
        step = ends[-1]
    return spans


@pytest.mark.pure
@given(spans=many_spans(), share=st.floats(0.001, 1.0), seed=st.integers(0, 1 << 40))
def test_the_parts_that_are_drawn_come_to_the_share_or_to_the_least_that_can_be(
    spans: list[RunSpan], share: float, seed: int
) -> None:
    parts, total = drawn(spans, share, seed), sum(span.steps for span in spans)
    assert parts == drawn(spans, share, seed), "the seed alone decides"
    assert len({part.span for part in parts}) == len(parts) > 0
    assert parts == sorted(parts, key=lambda part: part.span.version)
    assert all(part.end in part.span.ends for part in parts)
    taken, asked = sum(part.steps for part in parts), share * total
    shortest = min(end.step - (before.step if before else span.step)
                   for span in spans for before, end in zip([None, *span.ends], span.ends, strict=False))  # fmt: skip
    assert taken < asked + 1 or len(parts) == 1
    assert share < 1 or taken == total
    assert taken >= shortest


@pytest.mark.pure
def test_every_step_may_be_drawn() -> None:
    spans = [RunSpan(begin, begin, begin, 0, (End(begin + 10, begin + 10, 0),)) for begin in range(0, 200, 10)]
    found = {part.span.version for seed in range(300) for part in drawn(spans, 0.05, seed)}
    assert found == set(range(0, 200, 10))


# ------------------------------------------------------------------------------------------------------------- the same


@pytest.mark.processes
@pytest.mark.parametrize("name", quick(RULES, "synchronous", "asynchronous", "diloco"))
def test_a_run_under_any_rule_with_a_death_is_the_same(name: str) -> None:
    recipe, run = disturbed(name, WORKLOADS[name])
    for share in (1.0, 0.2):
        found = verified(recipe, run.path, share)
        assert (found.verdict, found.problems) == ("same", ()), found
        assert found.steps == found.comparable == recipe.steps
        assert found.digest == run.digest
    assert 0 < found.computed <= recipe.steps
    assert verified(recipe, run.path).computed == recipe.steps
    if RULES[name].gradients and RULES[name].lockstep:
        assert {span.start for span in verified(recipe, run.path).spans} >= {2, 4}, "nothing is under way there"


@pytest.mark.processes
@pytest.mark.parametrize("workload", ["gpt", "convnet"])
def test_a_run_in_lockstep_is_the_same_from_any_of_its_checkpoints(workload: str, tmp_path: Path) -> None:
    recipe = workloads.ALL[workload](checksum_every=2)
    run = train_here(recipe, Team(workers=3, checkpoint_every=3, keep=0), tmp_path / "run")
    whole = verified(recipe, run.path)
    assert [(span.start, span.stop, span.verdict) for span in whole.spans] == [
        (0, 3, "same"),
        (3, 6, "same"),
        (6, 7, "same"),
    ]
    assert [span.digest for span in whole.spans] == [run.digests[version] for version in (3, 6, 7)]
    assert sum(span.proof.checksums for span in whole.spans) > 0
    found = [verified(recipe, run.path, 0.25, seed) for seed in range(6)]
    assert {each.verdict for each in found} == {"same"}
    assert {each.computed for each in found} <= {1, 2}
    assert len({tuple((span.start, span.stop) for span in each.spans) for each in found}) > 1
    assert any(span.stop % 3 for each in found for span in each.spans[:1] if span.stop < 7), "a part ends at checksums"


@pytest.mark.processes
def test_a_run_that_was_prolonged_with_another_rate_and_samples_left_out_is_the_same(tmp_path: Path) -> None:
    recipe, path = to_resume(checksum_every=2), tmp_path / "run"
    begin(path, recipe, Team(workers=2, checkpoint_every=3), 6)
    lower = to_resume(checksum_every=2, schedule=dataclasses.replace(recipe.schedule, scale=0.5))
    go_on(path, lower, Team(workers=3, checkpoint_every=3, keep="thinned"), skip=(1, 5), steps=12)
    changed = dataclasses.replace(lower, changes=_changes(path), schedule=recipe.schedule)
    found = verified(changed, path)
    assert (found.verdict, found.computed, found.problems) == ("same", 12, ())
    assert [span.start for span in found.spans] == sorted({span.start for span in found.spans})
    assert {6, 9} <= {span.start for span in found.spans}


def _changes(path: Path) -> Any:
    from instep.recipe import parse
    from instep.recipe_files import read_saved

    table = read_saved(path / "recipe.toml")
    table.pop("team")
    objects = {"model": "m:m", "objective": "m:o", "data": "m:d", "optimizer": "m:p"}
    return parse({**table, **objects})[0].changes


# ------------------------------------------------------------------------------------------------------------ the wrong


def forged(path: Path, version: int, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> str:
    """Has the checkpoint hold other tensors, in a container as valid as before. The digest of its weights then."""
    folder = RunFolder(path).checkpoints
    saved = checkpoint.load(checkpoint.path_of(folder, version))
    change(saved.model_state, saved.training_state)
    return checkpoint.save(
        folder, version=version, model_state=saved.model_state, training_state=saved.training_state,
        meta=saved.meta, fingerprint=saved.fingerprint, keep=0,
    ).digest  # fmt: skip


def flip(tensor: Tensor) -> None:
    """Changes the last bit of its first number."""
    tensor.view(-1)[:1].view(torch.int32).bitwise_xor_(1)


def in_weights(model: dict[str, Any], training: dict[str, Any]) -> None:
    flip(next(iter(model.values())))


def in_the_optimizer(model: dict[str, Any], training: dict[str, Any]) -> None:
    flip(training["optimizer"]["state"][0]["momentum_buffer"])


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path]:
    recipe = regression(optimizer=lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9), checksum_every=100)
    path = tmp_path_factory.mktemp("sound") / "run"
    train_here(recipe, Team(workers=2, checkpoint_every=2, keep=0), path)
    return recipe, path


@pytest.fixture
def run(sound: tuple[Recipe, Path], tmp_path: Path) -> tuple[Recipe, Path]:
    """A copy, to be changed: checkpoints of versions 2, 4 and 6."""
    shutil.copytree(sound[1], tmp_path / "run")
    return sound[0], tmp_path / "run"


@pytest.mark.processes
def test_a_checkpoint_with_other_weights_in_a_valid_container_is_found(run: tuple[Recipe, Path]) -> None:
    recipe, path = run
    forged(path, 4, in_weights)
    found = verified(recipe, path)
    assert found.verdict == "wrong"
    assert len(found.problems) == 1
    assert "step-00000004 has the digest" in found.problems[0]
    assert [(span.start, span.stop, span.verdict) for span in found.spans] == [(0, 2, "same"), (2, 6, "same")]


@pytest.mark.processes
def test_it_is_found_too_where_the_tape_was_changed_with_it(run: tuple[Recipe, Path]) -> None:
    recipe, path = run
    was = checkpoint.read_manifest(checkpoint.path_of(path / "checkpoints", 4)).digest
    now = forged(path, 4, in_weights)
    (path / "tape.jsonl").write_text((path / "tape.jsonl").read_text().replace(was, now))
    found = verified(recipe, path)
    assert [(span.start, span.stop) for span in found.wrong] == [(2, 4), (4, 6)]
    assert found.wrong[0].why == "the checkpoint of version 4 has other weights here than in the run."


@pytest.mark.processes
def test_it_is_found_too_where_the_manifest_still_tells_the_digest_of_before(run: tuple[Recipe, Path]) -> None:
    recipe, path = run
    place = checkpoint.path_of(path / "checkpoints", 4)
    was = checkpoint.read_manifest(place).digest
    forged(path, 4, in_weights)
    table = {key: value for key, value in json.loads((place / "manifest.json").read_text()).items() if key != "sha256"}
    (place / "manifest.json").write_bytes(checkpoint._manifest_bytes({**table, "digest": was}))
    found = verified(recipe, path)
    assert [(span.start, span.stop) for span in found.wrong] == [(2, 4), (4, 6)]
    assert "is not what is computed here: of its model differs 'bias'" in found.wrong[0].why
    assert "from which it begins, holds weights with the digest" in found.wrong[1].why


@pytest.mark.processes
def test_another_state_of_the_optimizer_is_found(run: tuple[Recipe, Path]) -> None:
    recipe, path = run
    forged(path, 4, in_the_optimizer)
    found = verified(recipe, path)
    assert (found.wrong[0].start, found.wrong[0].stop) == (2, 4)
    assert "of its optimizer differs 'state.0.momentum_buffer'" in found.wrong[0].why


@pytest.mark.processes
def test_a_checkpoint_without_the_optimizers_state_is_found(run: tuple[Recipe, Path]) -> None:
    recipe, path = run
    forged(path, 6, lambda model, training: training.pop("optimizer"))
    found = verified(recipe, path)
    assert [(span.start, span.stop) for span in found.wrong] == [(4, 6)]
    assert "lacks the state of the optimizer" in found.wrong[0].why


@pytest.mark.processes
def test_a_damaged_checkpoint_is_found(run: tuple[Recipe, Path]) -> None:
    recipe, path = run
    file = checkpoint.path_of(path / "checkpoints", 4) / "training.pt"
    file.write_bytes(file.read_bytes()[:-1])
    found = verified(recipe, path)
    assert [(span.start, span.stop) for span in found.wrong] == [(2, 4), (4, 6)]
    assert all("training.pt has" in span.why for span in found.wrong)


@pytest.mark.processes
def test_what_a_wrong_worker_did_is_found_in_the_span_in_which_it_began(tmp_path: Path) -> None:
    def wrong_from(step: float) -> Callable[[nn.Module, tuple[Tensor, Tensor]], Tensor]:
        done = [0]

        def objective(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            loss = squares(model, batch)
            done[0] += loss.requires_grad and torch.is_grad_enabled()
            return loss * (1 + 2**-23) if done[0] > 2 * step else loss

        return objective

    path = tmp_path / "run"
    train_here(regression(objective=wrong_from(3.0)), Team(workers=2, checkpoint_every=2, keep=0), path)
    found = verified(regression(objective=wrong_from(math.inf)), path)
    assert (found.spans[0].stop, found.spans[0].verdict) == (2, "same")
    assert (found.wrong[0].start, found.wrong[0].stop) == (2, 4)


# ----------------------------------------------------------------------------------------------------------- not at all


@pytest.mark.processes
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"libraries": {"torch": "1.0"}}, "not comparable here: the run was made with torch 1.0 (here"),
        ({"processor": "PDP-8"}, "not comparable here: the run was made with a processor PDP-8 (here"),
        ({"data_digest": "0"}, "not comparable here: the data are not those that the run was trained on, whose digest"),
        (
            {"team": {"device": "cuda"}, "hardware": Hardware("", 1, 0, ("Voodoo2",)).table()},
            "not comparable here: the run was made with a GPU Voodoo2 (here",
        ),
        ({"team": {"mixed_processors": True}}, "not comparable here: the run was computed by processors of several"),
    ],
)  # fmt: skip
def test_what_another_machine_computed_is_not_comparable(
    change: dict[str, Any], sentence: str, sound: tuple[Recipe, Path]
) -> None:
    recipe, path = sound
    events = [{**e, **change} if e["kind"] == "run_started" else e for e in tape.read(path / "tape.jsonl")]
    with pytest.raises(NotComparableError) as caught:
        verify(recipe, path, events, 1.0, 0)
    assert caught.value.message.startswith(sentence)
    assert caught.value.exit_status == 3


def refused(path: Path, **more: Any) -> str:
    with pytest.raises(InstepError) as caught:
        api.verify(path, regression(), **more)
    assert one_sentence(caught.value.message)
    return caught.value.message


@pytest.mark.processes
def test_what_cannot_be_verified_is_refused_in_a_sentence(run: tuple[Recipe, Path], tmp_path: Path) -> None:
    recipe, path = run
    assert "no folder" in refused(tmp_path / "nowhere")
    assert "is not the folder of a run" in refused(tmp_path)
    assert refused(path, sample=0.0).startswith("'sample' is '0.0'; write a share above 0 %")
    with RunFolder(path).locked():
        assert refused(path).endswith("is still being written; verify it when its run has ended.")
    shutil.rmtree(path / "checkpoints")
    (path / "checkpoints").mkdir()
    with pytest.raises(RecordError, match="has no kept checkpoint to compare with"):
        verified(recipe, path)


# -------------------------------------------------------------------------------------------------- what a person sees

FILE = """
import torch
from support.regression import numbers, squares

def model():
    return torch.nn.Linear(3, 1)
"""
RECIPE = """
model = "mine:model"
objective = "mine:squares"
data = "mine:numbers"
batch = 8
microbatches = 4
steps = 4
[team]
checkpoint_every = 2
keep = 0
"""


@pytest.mark.slow
@pytest.mark.processes
def test_the_command_verifies_and_tells_the_wrong_span(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(FILE)
    (tmp_path / "my.toml").write_text(RECIPE)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    assert main(["train", "my.toml", "--out", "run"]) == 0
    capsys.readouterr()
    assert main(["verify", "run", "--sample", "100%", "--seed", "7"]) == 0
    printed = capsys.readouterr().out
    assert "seed         7" in printed
    assert "computed     4 of 4 steps again, 100.000%" in printed
    forged(tmp_path / "run", 2, lambda model, training: flip(training["optimizer"]["state"][0]["exp_avg"]))
    assert main(["verify", "run", "--sample", "100%", "--json"]) == 1
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert document["verdict"] == "wrong"
    assert document["spans"][0]["verdict"] == "wrong"
    assert "instep: the run run is not what its recipe gives, between version 0 and version 2: the checkpoint" in err


def receipt(**more: Any) -> Verified:
    fields: dict[str, Any] = {
        "run": "r", "recipe": "c", "fingerprint": "f", "rule": "synchronous", "engine": "lockstep", "seed": 1,
        "sample": 0.01, "steps": 10, "comparable": 10, "digest": "d", "spans": (),
    }  # fmt: skip
    return Verified(**{**fields, **more})


@pytest.mark.pure
def test_the_fields_of_the_document_are_as_documented() -> None:
    documented = (Path(__file__).parents[2] / "docs" / "verify.md").read_text()
    assert all(f"`{key}`" in documented for key in receipt().document())


@pytest.mark.pure
def test_a_receipt_says_how_much_of_the_run_is_comparable_where_not_all_is() -> None:
    assert "comparable" not in str(receipt())
    assert "comparable   4 of 10 steps here; the others" in str(receipt(comparable=4))


@pytest.mark.pure
@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("verify run --sample 0%", "--sample is '0%'; write a share above 0 % and at most 100 %, such as '1%'."),
        ("verify run --sample much", "--sample is 'much'; write a share above 0 % and at most 100 %, such as '1%'."),
        ("verify run --seed 1.5", "--seed is 1.5, of type float; it must be a whole number."),
        ("verify nowhere", "there is no folder nowhere; give the folder of a run, such as runs/NAME."),
        ("verify run --team.workers 2", "--team.workers goes with 'instep train' only."),
    ],
)  # fmt: skip
def test_wrong_command_lines_are_one_sentence(
    line: str, sentence: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(line.split()) in (1, 2)
    assert capsys.readouterr().err == f"instep: {sentence}\n"
