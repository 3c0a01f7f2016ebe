"""Buffers that are not running means: the modes of `Recipe.buffers`, alike on every engine and for any team."""

from __future__ import annotations

import dataclasses
import functools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import instep
from instep.cli.flags import merge
from instep.data.cursor import Cursor
from instep.errors import RecipeError
from instep.offline.cluster import Cluster
from instep.offline.simulation import simulate
from instep.randomness import key, seed_all
from instep.recipe import Recipe, Team, dumps, parse
from instep.recipe_files import read
from instep.record import checkpoint
from instep.record.folder import RunFolder
from instep.reduce.buffers import Buffers
from instep.rules import UpdateRule
from instep.watch import Watch
from support.harness import Outcome, train_here
from support.reference import reference_digests
from support.serving import replayed

pytestmark = pytest.mark.processes

EXACT = 1 << 60
"""Odd numbers near it are no float64."""

MODES = {
    "counts.seen": "sum",
    "counts.*": "sum:0.9",
    "queue.*": "last",
    "largest*": "max",
    "whole.added": "sum",
    "whole.latest": "last",
    "noise": "frozen",
    "average*": "mean",
}


def samples(count: int = 69) -> TensorDataset:
    """The epoch's last batch leaves some of 8 microbatches without samples."""
    inputs = torch.randn(count, 8, generator=torch.Generator().manual_seed(3))
    return TensorDataset(inputs, inputs[:, :4].argmax(1))


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def recipe(model: Any, **changes: Any) -> Recipe:
    fields: dict[str, Any] = {"batch": 32, "microbatches": 8, "steps": 5, "data": samples, "optimizer": sgd}
    return Recipe(**{"model": model, "objective": loss, **fields, **changes})


class Stateful(nn.Module):
    """Buffers of every mode and many types, most of which feed back into the output."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 6), nn.Linear(6, 4)
        self.counts, self.queue, self.whole = nn.Module(), nn.Module(), nn.Module()
        self.counts.register_buffer("seen", torch.tensor(2.0**25, dtype=torch.float64))
        self.counts.register_buffer("size", torch.ones(4))
        self.counts.register_buffer("short", torch.ones(4, dtype=torch.bfloat16), persistent=False)
        self.counts.register_buffer("total", torch.ones(4, 6, dtype=torch.float64))
        self.queue.register_buffer("keys", F.normalize(torch.randn(16, 4), dim=1))
        self.queue.register_buffer("at", torch.zeros((), dtype=torch.int64))
        self.register_buffer("largest", torch.full((6,), -9.0))
        self.register_buffer("largest64", torch.full((6,), -9.0, dtype=torch.float64))
        self.whole.register_buffer("added", torch.tensor(EXACT))
        self.whole.register_buffer("latest", torch.tensor([True, False]))
        self.whole.register_buffer("down", torch.tensor(1000, dtype=torch.int32))
        self.register_buffer("noise", torch.zeros(3))
        self.register_buffer("average64", torch.full((), 1 / 3, dtype=torch.float64))
        self.register_buffer("late", torch.zeros(2))
        self.register_buffer("table", torch.polar(torch.ones(3), torch.arange(3.0)))

    def forward(self, x: Tensor) -> Tensor:
        z = self.first(x).tanh() + self.counts.total.sum(0).float() / 1000
        out: Tensor = self.second(z + self.largest / 10) + self.queue.keys.sum() + self.noise.sum()
        if self.training:
            with torch.no_grad():
                self._note(z, out)
        return out

    def _note(self, z: Tensor, out: Tensor) -> None:
        hot = F.one_hot(out.argmax(1), 4).float()
        self.counts.seen += len(z)
        self.counts.size.mul_(0.9).add_(hot.sum(0), alpha=0.1)
        self.counts.short = self.counts.short * 0.9 + hot.sum(0).bfloat16()
        self.counts.total.mul_(0.9).add_((hot.T @ z).double(), alpha=0.1)
        self.queue.keys[(int(self.queue.at) + torch.arange(len(z))) % 16] = F.normalize(out, dim=1)
        self.queue.at.add_(len(z)).remainder_(16)
        self.largest = torch.maximum(self.largest, z.amax(0))
        self.largest64.copy_(torch.maximum(self.largest64, z.amax(0).double() / 3))
        self.whole.added += len(z)
        self.whole.latest[0] = bool(out.sum() > 0)
        self.whole.down -= len(z)
        self.noise += z[0, :3]
        self.average64 += z.double().mean() / 3
        if self.whole.down < 980 and bool(z[0, 0] > 0):  # in some pieces only, and not in the first steps
            self.late += z[0, :2]


@functools.cache
def known() -> dict[int, str]:
    torch.set_num_threads(1)
    return reference_digests(recipe(Stateful, buffers=MODES))


def runs_of(recipe: Recipe, path: Path, teams: list[tuple[Any, int]]) -> list[Outcome]:
    return [
        train_here(recipe, Team(workers=w, engine=engine, checkpoint_every=1, keep=0), path / f"{engine}{w}")
        for engine, w in teams
    ]


# --------------------------------------------------------------------------------------------------------------- bits


def test_every_mode_is_that_of_the_reference_for_any_team_and_engine(tmp_path: Path) -> None:
    made = recipe(Stateful, buffers=MODES)
    for run in runs_of(made, tmp_path, [("lockstep", 1), ("lockstep", 2), ("lockstep", 3), ("server", 3)]):
        assert run.digests == known(), run.path
        assert replayed(made, run.path).same
    RunFolder.create(tmp_path / "virtual")
    assert simulate(made, Cluster(workers=2), True, tmp_path / "virtual", print)["digest"] == known()[5]
    assert replayed(made, tmp_path / "virtual").same


class Unsaid(nn.Linear):
    """Buffers without a mode: a counter in float64, a pointer that goes round, a sum that only some pieces change, and
    not at first, and a constant rotary table."""

    def __init__(self) -> None:
        super().__init__(8, 4)
        self.register_buffer("seen", torch.tensor(2.0**25, dtype=torch.float64))
        self.register_buffer("at", torch.zeros((), dtype=torch.int64))
        self.register_buffer("late", torch.zeros(2))
        self.register_buffer("turns", torch.polar(torch.ones(3), torch.arange(3.0)), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen += 1
            self.at.add_(3).remainder_(7)
            if self.seen > 2**25 + 2 and bool(x[0, 0] > 0):
                self.late += x[0, :2]
        out: Tensor = super().forward(x + self.late.sum())
        return out


def test_buffers_without_a_mode_are_those_of_the_reference_for_any_team_and_engine(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    made = recipe(Unsaid, data=lambda: samples(37))
    expected = reference_digests(made)
    for run in runs_of(made, tmp_path, [("lockstep", 1), ("lockstep", 3), ("server", 2), ("server", 3)]):
        assert run.digests == expected, run.path
    assert float(state_in(RunFolder.open(run.path))["seen"]) == 2**25 + 5


def test_a_resume_by_another_team_goes_on_with_every_mode(tmp_path: Path) -> None:
    made = recipe(Stateful, buffers=MODES)
    (run,) = runs_of(made, tmp_path, [("lockstep", 3)])
    for version in (3, 4, 5):
        shutil.rmtree(run.path / "checkpoints" / f"step-{version:08d}")
    assert train_here(made, Team(workers=2, engine="server"), run.path, resume=True).digest == known()[5]


@pytest.mark.parametrize("rule", ["asynchronous", "local_sgd:2", "async_diloco:2,buffer=2"])
def test_every_mode_can_be_replayed_under_any_rule(rule: str, tmp_path: Path) -> None:
    made = recipe(Stateful, buffers=MODES, rule=UpdateRule.from_text(rule), steps=6)
    (run,) = runs_of(made, tmp_path, [("auto", 2)])
    assert replayed(made, run.path).same


class Counters(nn.Module):
    """Counts of the data alone, so that under every rule in lockstep they are the same."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 4)
        self.register_buffer("seen", torch.tensor(2.0**53 - 200, dtype=torch.float64))
        self.register_buffer("number", torch.tensor(EXACT + 1))
        self.register_buffer("mass", torch.zeros(8, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen += len(x)
            self.number += len(x)
            self.mass.mul_(0.9).add_(x.detach().double().square().sum(0))
        out: Tensor = self.head(x)
        return out


COUNTED = {"seen": "sum", "number": "sum", "mass": "sum:0.9"}


@pytest.mark.parametrize("rule", ["synchronous", "local_sgd:2", "diloco:3", "bounded_staleness:1", "asynchronous"])
def test_counters_of_64_bits_are_exact_under_every_rule(rule: str, tmp_path: Path) -> None:
    made = recipe(Counters, buffers=COUNTED, rule=UpdateRule.from_text(rule), steps=6)
    state = simulated_state(made, 3, tmp_path)
    seen = sum(Cursor(samples=69, batch=32, microbatches=8, seed=0).size(step) for step in range(6))
    assert int(state["seen"]) == 2**53 - 200 + seen
    assert int(state["number"]) == EXACT + 1 + seen
    if rule in ("synchronous", "local_sgd:2", "diloco:3"):
        mass, cursor = torch.zeros(8, dtype=torch.float64), Cursor(samples=69, batch=32, microbatches=8, seed=0)
        for step in range(6):
            mass = 0.9 * mass + samples().tensors[0][cursor.indices(step)].double().square().sum(0)
        torch.testing.assert_close(state["mass"], mass, rtol=1e-12, atol=0)


def test_a_local_step_that_is_left_out_leaves_exponential_sums_as_they_are(tmp_path: Path) -> None:
    cursor = Cursor(samples=64, batch=32, microbatches=8, seed=0)
    inputs, labels = samples(64).tensors
    labels[cursor.indices(3)] = -100

    @instep.objective(counts=lambda batch: (batch[1] != -100).sum())
    def labelled(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")

    made = recipe(
        Counters, objective=labelled, data=TensorDataset(inputs, labels), buffers=COUNTED, steps=4,
        rule=UpdateRule.from_text("local_sgd:2"), watch=Watch(bad_batch="skip"),
    )  # fmt: skip
    mass = torch.zeros(8, dtype=torch.float64)
    for step in range(3):
        mass = 0.9 * mass + inputs[cursor.indices(step)].double().square().sum(0)
    assert all(bool((labels[cursor.indices(step)] != -100).any()) for step in range(3))
    torch.testing.assert_close(simulated_state(made, 1, tmp_path)["mass"], mass, rtol=1e-12, atol=0)


def simulated_state(made: Recipe, workers: int, path: Path) -> dict[str, Tensor]:
    folder = RunFolder.create(path / "run")
    simulate(made, Cluster(workers=workers), True, folder.path, lambda event: None)
    return state_in(folder)


def state_in(folder: RunFolder) -> dict[str, Tensor]:
    newest, _ = checkpoint.newest_sound(folder.checkpoints)
    assert newest is not None
    return dict(checkpoint.load(newest).model_state)


# --------------------------------------------------------------------------------------------- what a plain loop does


class Codebook(nn.Module):
    """A VQ-VAE whose codebook are exponential sums over exponential counts (van den Oord et al., 2017, appendix A)."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(8, 4), nn.Linear(4, 8)
        self.register_buffer("size", torch.ones(6))
        self.register_buffer("total", torch.randn(6, 4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.encode(x)
        codes = self.total / self.size[:, None]
        chosen = torch.cdist(z, codes).argmin(1)
        if self.training:
            with torch.no_grad():
                hot = F.one_hot(chosen, 6).float()
                self.size.mul_(0.99).add_(hot.sum(0), alpha=0.01)
                self.total.mul_(0.99).add_(hot.T @ z, alpha=0.01)
        q = codes[chosen]
        return self.decode(z + (q - z).detach()), (z - q.detach()).square().sum()


def reconstruction(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    y, commitment = model(batch[0])
    return (y - batch[0]).square().sum() + commitment


class Queue(nn.Module):
    """A queue of keys, as contrastive learning with a momentum encoder keeps it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 4)
        self.register_buffer("keys", F.normalize(torch.randn(16, 4), dim=1))
        self.register_buffer("at", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        q = F.normalize(self.embed(x), dim=1)
        out = q @ self.keys.clone().T
        if self.training:
            with torch.no_grad():
                self.keys[(int(self.at) + torch.arange(len(q))) % 16] = q
                self.at.add_(len(q)).remainder_(16)
        return out


def contrast(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return torch.logsumexp(model(batch[0]), 1).sum()


def plain_loop(made: Recipe) -> dict[str, Tensor]:
    torch.set_num_threads(1)
    seed_all(key(made.seed, "model"))
    model, objective, data = made.model.build(), made.objective.load(), made.data.build()
    optimizer = made.optimizer.build(list(model.parameters()))
    cursor = Cursor(samples=len(data), batch=made.batch, microbatches=made.microbatches, seed=made.seed)
    for step in range(made.steps):
        batch = [tensor[cursor.indices(step)] for tensor in data.tensors]
        optimizer.zero_grad()
        (objective(model, batch) / len(batch[0])).backward()
        optimizer.step()
    return dict(model.state_dict())


def test_a_codebook_of_exponential_sums_is_that_of_a_plain_loop(tmp_path: Path) -> None:
    made = recipe(Codebook, objective=reconstruction, buffers={"size": "sum:0.99", "total": "sum:0.99"}, steps=10)
    expected = plain_loop(made)
    runs = runs_of(made, tmp_path, [("lockstep", 1), ("lockstep", 2), ("server", 3)])
    assert len({run.digest for run in runs}) == 1
    for name, value in state_in(RunFolder.open(runs[0].path)).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-6)


def test_a_queue_takes_the_last_keys_and_its_pointer_keeps_step(tmp_path: Path) -> None:
    made = recipe(Queue, objective=contrast, buffers={"keys": "last", "at": "last"}, data=lambda: samples(64))
    runs = runs_of(made, tmp_path, [("lockstep", 1), ("lockstep", 3)])
    assert len({run.digest for run in runs}) == 1
    state = state_in(RunFolder.open(runs[0].path))
    torch.testing.assert_close(state["keys"].norm(dim=1), torch.ones(16))
    assert int(state["at"]) == 5 * 4 % 16, "a step brings the keys of one microbatch"


# ----------------------------------------------------------------------------------------------------------- warnings


class Doubtful(nn.Module):
    """Beside what needs no word: a normalisation layer, a constant, and a counter that each piece leaves alike."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.BatchNorm1d(8), nn.Linear(8, 4)
        self.register_buffer("sizes", torch.zeros(4))
        self.register_buffer("sums", torch.zeros(4))
        self.register_buffer("constant", torch.ones(4))
        self.register_buffer("forwards", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(x))
        if self.training:
            self.sizes += out.detach().sum(0)
            self.sums += out.detach().square().sum(0)
            self.forwards += 1
        return out


def warnings_of(run: Outcome) -> list[str]:
    return [event["why"] for event in run.events if event["kind"] == "warned"]


def test_a_buffer_that_differs_from_piece_to_piece_is_warned_of_once(tmp_path: Path) -> None:
    teams: list[tuple[Any, int]] = [("lockstep", 1), ("lockstep", 8), ("server", 2)]
    made = recipe(Doubtful, steps=2, data=lambda: samples(64))
    for run in runs_of(made, tmp_path, teams):
        (why,) = warnings_of(run)
        assert why.startswith("buffer 'sizes' ends differently from piece to piece of a batch and takes the mean")
        assert "and so does 'sums'" in why
        assert "recipe.buffers" in why
    told: list[Any] = []
    simulate(
        dataclasses.replace(made, rule=UpdateRule.from_text("local_sgd:2")), Cluster(workers=8), True, None, told.append
    )
    assert [event["why"] for event in told if event["kind"] == "warned"] == warnings_of(run)
    (quiet,) = runs_of(dataclasses.replace(made, buffers={"s*": "mean"}), tmp_path / "quiet", [("lockstep", 2)])
    assert not warnings_of(quiet)


def test_a_complex_buffer_may_be_constant_or_frozen_and_is_refused_where_it_changes() -> None:
    class Turning(nn.Linear):
        def __init__(self) -> None:
            super().__init__(8, 4)
            self.register_buffer("turn", torch.ones(4, dtype=torch.complex64))

    model = Turning()
    for patterns in ({}, {"turn": "frozen"}):
        buffers = Buffers(model, patterns)
        buffers.leave(filled=True)
        model.turn *= 1j
        if patterns:
            buffers.leave(filled=True)
            assert model.turn.tolist() == [1] * 4
        else:
            with pytest.raises(RecipeError, match=r"^buffer 'turn' is complex and was changed in training, .*frozen"):
                buffers.leave(filled=True)
            model.turn.fill_(1)


def test_frozen_buffers_that_forwards_change_are_set_back_and_not_computed_for_many_workers_at_once() -> None:
    made = recipe(
        Doubtful, buffers={"*": "frozen"}, data=lambda: samples(64), rule=UpdateRule.from_text("asynchronous")
    )
    with pytest.raises(RecipeError, match="at once: training changes its buffers"):
        simulate(made, Cluster(workers=2, batched=True), True, None, lambda event: None)


# ------------------------------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize(
    ("buffers", "sentence"),
    [
        ({"sizes": "summ"}, "'recipe.buffers' has 'summ' for 'sizes', which is no mode; did you mean 'sum'?"),
        ({"sizes": 3}, "'recipe.buffers' has 3 for 'sizes', which is no mode; modes are 'mean', 'max', 'last',"),
        ({"sizes": "mean:1"}, "'recipe.buffers' has 'mean:1' for 'sizes', which is no mode; did you mean 'mean'?"),
        ({"sizes": "sum:x"}, "'recipe.buffers' has 'sum:x' for 'sizes'; the factor on the value of before is a number"),
        ({"sizes": "sum:1.5"}, "'recipe.buffers' has 'sum:1.5' for 'sizes'; the factor"),
        ({"sizes": "sum:nan"}, "'recipe.buffers' has 'sum:nan' for 'sizes'; the factor"),
        ("sum", "'recipe.buffers' is 'sum'; it must be a dict."),
        ({"size": "sum"}, "'recipe.buffers' has 'size', and no buffer of the model has such a name; did you mean 'siz"),
        ({"q.*": "last"}, "'recipe.buffers' has 'q.*', and no buffer of the model has such a name; its buffers are"),
        (
            {"norm.*": "mean"},
            "'recipe.buffers' has 'mean' for 'norm.*', which buffer 'norm.num_batches_tracked' cannot take, for it "
            "holds whole numbers; put one for 'norm.num_batches_tracked' before it, such as 'max' or 'last'.",
        ),
        (
            {"norm.num*": "sum:0.5"},
            "'recipe.buffers' has 'sum:0.5' for 'norm.num*', which buffer 'norm.num_batches_tra",
        ),
    ],
)
def test_wrong_modes_and_patterns_are_sentences(buffers: Any, sentence: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Buffers(Doubtful(), recipe(Doubtful, buffers=buffers).buffers)
    assert caught.value.message.startswith(sentence)


def test_the_first_pattern_that_matches_decides_and_its_place_is_in_the_fingerprint(tmp_path: Path) -> None:
    one = recipe(Doubtful, buffers={"sizes": "last", "s*": "frozen"}, steps=1)
    other = recipe(Doubtful, buffers={"s*": "frozen", "sizes": "last"}, steps=1)
    assert one.fingerprint() != other.fingerprint()
    assert recipe(Doubtful).fingerprint() == recipe(Doubtful, buffers={}).fingerprint()
    states = [
        state_in(RunFolder.open(run.path))
        for made in (one, other)
        for run in runs_of(made, tmp_path / made.fingerprint(), [("auto", 1)])
    ]
    assert [bool(state["sizes"].any()) for state in states] == [True, False]
    assert not states[0]["sums"].any()


def test_modes_from_a_file_and_from_flags(tmp_path: Path) -> None:
    path = tmp_path / "my.toml"
    path.write_text(
        'model = "m:M"\nobjective = "m:f"\ndata = "m:d"\nbuffers."codebook.*" = "sum:0.99"\nbuffers.a.b = "max"\n'
    )
    assert dict(parse(read(path))[0].buffers) == {"codebook.*": "sum:0.99", "a.b": "max"}
    flags = [("recipe.buffers.a.b.c", "last"), ("recipe.buffers.codebook.*", "sum:.5"), ("recipe.buffers.*", "frozen")]
    made, team = parse(merge(read(path), flags))
    expected = {"a.b.c": "last", "codebook.*": "sum:0.5", "*": "frozen", "a.b": "max"}
    assert list(made.buffers.items()) == list(expected.items()), "flags win over the file, the first of them first"
    path.write_text(dumps(made, team))
    assert list(parse(read(path))[0].buffers.items()) == list(expected.items())
