"""Two small models, one with dropout and one with running means, as files for commands, and a run of theirs alone."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from support.hosts import Recorded
from support.machine_faults import Tape

_MODULE = """\
import torch, torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset
from instep.data import Data

class Images(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.drop = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.1)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.drop(F.relu(self.norm(self.first(x)))).mean((2, 3)))

def images(samples=96):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, 1, 8, 8, generator=generator)
    return TensorDataset(x, torch.randint(0, 4, (samples,), generator=generator))

def pictures():
    return Data(images(), images(32))

def classify(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")

def words(samples=96):
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randint(0, 32, (samples, 12), generator=generator))

def sentences():
    return Data(words(), words(32))

def next_word(model, batch):
    tokens = batch[0]
    logits = model(tokens[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
"""

_RECIPES = {
    "gpt": """
[model]
use = "instep.models:GPT"
args = { vocabulary = 32, context = 12, width = 16, depth = 2, heads = 2, dropout = 0.1 }
[objective]
use = "two_models:next_word"
[data]
use = "two_models:sentences"
[optimizer]
use = "torch.optim:AdamW"
args = { lr = 0.001 }
""",
    "convnet": """
[model]
use = "two_models:Images"
[objective]
use = "two_models:classify"
[data]
use = "two_models:pictures"
[optimizer]
use = "torch.optim:SGD"
args = { lr = 0.01, momentum = 0.9 }
""",
}

_COMMON = """\
batch = 32
microbatches = 16
steps = 1000000
evaluate_every = 20
checksum_every = 50
compile = {compile}
"""

_TEAM = """
[team]
checkpoint_every = {every}
keep_best = false
restarts = 1000000
answer_timeout_s = {answer_s}
lease_s = {lease_s}
"""


def files_of(model: str, *, compiled: bool, every: int, answer_s: float, lease_s: float = 5.0) -> dict[str, str]:
    """The module, and the recipe of a model, my.toml; with steps between checkpoints, and seconds to answer for workers
    and hosts.
    """
    common = _COMMON.format(compile=str(compiled).lower())
    team = _TEAM.format(every=every, answer_s=answer_s, lease_s=lease_s)
    return {"two_models.py": _MODULE, "my.toml": common + _RECIPES[model] + team}


def trains(files: Mapping[str, str], folder: Path, *arguments: str) -> Recorded:
    """The command that trains what these files tell, begun in the folder."""
    for name, text in files.items():
        (folder / name).write_text(text)
    own = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(folder), *sys.path])}
    command = [sys.executable, "-m", "instep", "train", "my.toml", "--out", "run", *arguments]
    return Recorded(command, folder, "command", cwd=folder, env=own)


def undisturbed(files: Mapping[str, str], versions: int, folder: Path) -> dict[int, str]:
    """The digests at checkpoints of a run of so many steps by one worker, to which nothing happens."""
    folder.mkdir()
    command = trains(files, folder, "--workers", "1", "--steps", str(versions))
    assert command.process.wait(3600) == 0, command.err
    tape = Tape(lambda: folder / "run" / "tape.jsonl")
    tape.read()
    return {event["version"]: event["digest"] for event in tape.events if event["kind"] == "checkpointed"}
