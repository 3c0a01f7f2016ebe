"""What a model and its recipe make to be looked at: artifacts and, for text, a sample; at a run's end or during it.

They are made of the weights, and of each average of these (`Recipe.ema`) in a folder of its own.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from instep.data import Codec
from instep.ema import name_of
from instep.errors import told
from instep.models import generate
from instep.randomness import key, seed_all
from instep.record.files import json_text
from instep.record.folder import RunFolder
from instep.restore import kept_module_state, kept_random_state
from instep.worker.replica import Replica
from instep.worker.trial import CopyLost, in_a_copy


@dataclass
class ArtifactsMade:
    """sample: a text, None where none was asked for, or could be written. files: relative to the run folder. figures:
    by name; those of an average as "NAME.ema.0.999". problems: sentences on what could not be done.
    """

    sample: str | None = None
    files: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def with_averages(self, found: Mapping[str, ArtifactsMade]) -> ArtifactsMade:
        """Itself, with what was made of each average before it, by decay; the files are its own already."""
        for decay, each in found.items():
            self.figures |= {f"{name}.ema.{decay}": value for name, value in each.figures.items()}
            self.problems += each.problems
        return self


Kept = Callable[[], AbstractContextManager[Any]]
"""Around forwards: puts back what they write into parameters."""


def makes_any(replica: Replica) -> bool:
    """Whether the recipe asks for anything to be made."""
    return replica.recipe.artifacts is not None or _text_of(replica) is not None


def _text_of(replica: Replica) -> Codec | None:
    """The codec of a text that is to be sampled."""
    return replica.data.codec if replica.recipe.sample_length else None


def make(replica: Replica, run: RunFolder) -> ArtifactsMade:
    """What the replica's model and the recipe leave at the end.

    What they raise is a problem, and no more: what only shows a run must not end it.
    """
    averages = _of_averages(replica, run, run.artifacts, "")
    with replica.averaged():
        found = _made(replica, replica.module, replica.written.kept, run, run.artifacts)
    return found.with_averages(averages)


def make_aside(replica: Replica, run: RunFolder, version: int, within_s: float) -> ArtifactsMade:
    """The same during a run, of the weights of `version`, with no trace in it: whatever they do, they do to copies.

    On a CPU they may take so many seconds, those of the weights and of each average as many, or are given up.
    """
    folder, of = run.artifacts_at(version), f" of version {version}"
    shutil.rmtree(folder, ignore_errors=True)  # of a version that is reached again
    each_s = within_s / (1 + len(replica.recipe.ema))
    averages = _of_averages(replica, run, folder, of, each_s)
    return _aside(replica, run, folder, of, each_s).with_averages(averages)


def _of_averages(
    replica: Replica, run: RunFolder, folder: Path, of: str, each_s: float | None = None
) -> dict[str, ArtifactsMade]:
    """What each average of the weights makes, by decay: before the weights, whose artifacts may change the model."""
    decays = [(decay, name_of(decay)) for decay in replica.recipe.ema] if makes_any(replica) else []
    return {
        name: _aside(replica, run, folder / f"ema-{name}", f" of the average {name}{of}", each_s, decay)
        for decay, name in decays
    }


def _aside(
    replica: Replica, run: RunFolder, folder: Path, of: str, within_s: float | None, decay: float | None = None
) -> ArtifactsMade:
    """Made by a copy, of the weights or the average of this `decay`; `of`: what these are, for a message."""
    if replica.device.type == "cpu":
        try:
            found: ArtifactsMade = in_a_copy(lambda: _made_in_a_copy(replica, run, folder, decay), within_s)
            return found
        except CopyLost as lost:
            return ArtifactsMade(problems=[f"the artifacts{of} could not be written: {lost.why}."])
    with kept_random_state():  # a GPU is not for a copy of this process
        try:
            with replica.averaged(decay):
                module = copy.deepcopy(replica.module)
            return _made(replica, module, partial(_put_back, module, replica.written.names), run, folder, decay)
        except Exception as error:  # a model that cannot be copied, or that the GPU has no room for twice
            return ArtifactsMade(problems=[f"the artifacts{of} could not be written: {told(error)}"])


def _made_in_a_copy(replica: Replica, run: RunFolder, folder: Path, decay: float | None) -> ArtifactsMade:
    """In a copy of the process, whose weights may lie in memory that is shared with others: they get their own."""
    module = replica.module
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data = tensor.data.clone()
    with replica.averaged(decay):
        return _made(replica, module, partial(_put_back, module, replica.written.names), run, folder, decay)


@contextmanager
def _put_back(module: nn.Module, names: Collection[str]) -> Iterator[None]:
    before = {name: each.data.clone() for name, each in module.named_parameters() if name in names}
    try:
        yield
    finally:
        for name, each in module.named_parameters():
            if name in before:
                each.data.copy_(before[name])


def _made(
    replica: Replica, module: nn.Module, kept: Kept, run: RunFolder, folder: Path, decay: float | None = None
) -> ArtifactsMade:
    found, of = ArtifactsMade(), "" if decay is None else f" of the average {name_of(decay)}"
    try:
        _sample(found, replica, module, kept)
        if decay is not None and found.sample is not None:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "sample.txt").write_text(found.sample)
    except Exception as error:
        found.problems.append(f"no sample{of} could be written: {told(error)}")
    try:
        _artifacts(found, replica, module, kept, folder)
    except Exception as error:
        found.problems.append(f"the artifacts{of} could not be written: {told(error)}")
    if replica.recipe.artifacts is not None or replica.recipe.ema:
        found.files = sorted(path.relative_to(run.path).as_posix() for path in folder.rglob("*") if path.is_file())
    return found


def _artifacts(found: ArtifactsMade, replica: Replica, module: nn.Module, kept: Kept, folder: Path) -> None:
    recipe = replica.recipe
    if recipe.artifacts is None:
        return
    replica.doing = "writing the artifacts"
    seed_all(key(recipe.seed, "artifacts"))
    folder.mkdir(parents=True, exist_ok=True)
    with kept_module_state(module, training=False), kept(), torch.no_grad():
        figures = dict(recipe.artifacts.build(module, replica.data, folder) or {})
    json_text(figures)
    found.figures = figures


def _sample(found: ArtifactsMade, replica: Replica, module: nn.Module, kept: Kept) -> None:
    """For text, what the model goes on to write after the recipe's prompt."""
    recipe, codec = replica.recipe, _text_of(replica)
    if codec is None:
        return
    replica.doing = "writing the sample"
    seed_all(key(recipe.seed, "sample"))
    prompt = torch.tensor([codec.encode(recipe.sample_prompt or "\n")], device=replica.device)
    with kept(), replica.autocast():
        tokens = generate(module, prompt, recipe.sample_length)
    found.sample = codec.decode(tokens[0].tolist())
