"""What a model and its recipe make to be looked at: artifacts and, for text, a sample; at a run's end or during it."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from instep.data import Codec
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
    """sample: a text, None where none was asked for, or could be written. files: relative to the run folder. problems:
    sentences on what could not be done.
    """

    sample: str | None = None
    files: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


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
    with replica.averaged():
        return _made(replica, replica.module, replica.written.kept, run, run.artifacts)


def make_aside(replica: Replica, run: RunFolder, version: int, within_s: float) -> ArtifactsMade:
    """The same during a run, of the weights of `version`, with no trace in it: whatever they do, they do to copies.

    On a CPU they may take so many seconds, or are given up.
    """
    folder = run.artifacts_at(version)
    shutil.rmtree(folder, ignore_errors=True)  # of a version that is reached again
    if replica.device.type == "cpu":
        try:
            found: ArtifactsMade = in_a_copy(lambda: _made_in_a_copy(replica, run, folder), within_s)
            return found
        except CopyLost as lost:
            return ArtifactsMade(problems=[f"the artifacts of version {version} could not be written: {lost.why}."])
    with kept_random_state():  # a GPU is not for a copy of this process
        try:
            with replica.averaged():
                module = copy.deepcopy(replica.module)
            return _made(replica, module, partial(_put_back, module, replica.written.names), run, folder)
        except Exception as error:  # a model that cannot be copied, or that the GPU has no room for twice
            why = f"the artifacts of version {version} could not be written: {told(error)}"
            return ArtifactsMade(problems=[why])


def _made_in_a_copy(replica: Replica, run: RunFolder, folder: Path) -> ArtifactsMade:
    """In a copy of the process, whose weights may lie in memory that is shared with others: they get their own."""
    module = replica.module
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data = tensor.data.clone()
    with replica.averaged():
        return _made(replica, module, partial(_put_back, module, replica.written.names), run, folder)


@contextmanager
def _put_back(module: nn.Module, names: Collection[str]) -> Iterator[None]:
    before = {name: each.data.clone() for name, each in module.named_parameters() if name in names}
    try:
        yield
    finally:
        for name, each in module.named_parameters():
            if name in before:
                each.data.copy_(before[name])


def _made(replica: Replica, module: nn.Module, kept: Kept, run: RunFolder, folder: Path) -> ArtifactsMade:
    found = ArtifactsMade()
    _sample(found, replica, module, kept)
    _artifacts(found, replica, module, kept, run, folder)
    return found


def _artifacts(
    found: ArtifactsMade, replica: Replica, module: nn.Module, kept: Kept, run: RunFolder, folder: Path
) -> None:
    recipe = replica.recipe
    if recipe.artifacts is None:
        return
    replica.doing = "writing the artifacts"
    seed_all(key(recipe.seed, "artifacts"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with kept_module_state(module, training=False), kept(), torch.no_grad():
            figures = dict(recipe.artifacts.build(module, replica.data, folder) or {})
        json_text(figures)
        found.figures = figures
    except Exception as error:
        found.problems.append(f"the artifacts could not be written: {told(error)}")
    found.files = sorted(path.relative_to(run.path).as_posix() for path in folder.rglob("*") if path.is_file())


def _sample(found: ArtifactsMade, replica: Replica, module: nn.Module, kept: Kept) -> None:
    """For text, what the model goes on to write after the recipe's prompt."""
    recipe, codec = replica.recipe, _text_of(replica)
    if codec is None:
        return
    replica.doing = "writing the sample"
    seed_all(key(recipe.seed, "sample"))
    prompt = torch.tensor([codec.encode(recipe.sample_prompt or "\n")], device=replica.device)
    try:
        with kept(), replica.autocast():
            tokens = generate(module, prompt, recipe.sample_length)
        found.sample = codec.decode(tokens[0].tolist())
    except Exception as error:
        found.problems.append(f"no sample could be written: {told(error)}")
