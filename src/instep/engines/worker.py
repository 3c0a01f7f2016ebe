"""A worker's process: builds its replica, trains in lockstep, reports to the supervisor, saves if it is worker 0."""

from __future__ import annotations

import math
import os
import socket
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import cloudpickle

from instep.data import digest as digest_of_data
from instep.engines.lockstep import Evaluation, Lockstep, Progress
from instep.engines.pulse import PulseBoard, WorkerPulse
from instep.engines.replica import Replica
from instep.errors import CheckpointError, InstepError
from instep.models import generate
from instep.randomness import key, seed_all
from instep.recipe import Recipe, Team
from instep.record import checkpoint
from instep.record.digest import digest_of_state
from instep.record.folder import RunFolder
from instep.reduce.shared import Region

HOLD_S = 0.1
"""Seconds that a worker holds its events of a step, to send them together: each message wakes two processes."""


@dataclass(frozen=True)
class Assignment:
    """What the supervisor gives to the workers of one start of the team.

    `recipe` is pickled, so that only workers run the user's code. `began` is the run's start on the monotonic clock.
    """

    recipe: bytes
    team: Team
    folder: Path
    fingerprint: str
    resume_from: Path | None
    began: float


def main(assignment: Assignment, worker: int, pipe: Connection, board: PulseBoard, descriptor: int) -> None:
    """The whole life of a worker, in a forked process."""
    pulse = WorkerPulse(board, worker, os.getppid())
    pulse.start()
    _redirect_output(RunFolder(assignment.folder).logs / f"worker-{worker}.log")
    session = _Session(assignment, worker, pipe, pulse)
    try:
        session.run(descriptor)
    except InstepError as error:
        session.send_events()
        pipe.send(("failed", type(error).__name__, error.message, error.detail))
    except BaseException as error:
        session.send_events()
        where = f" while {session.replica.doing}" if session.replica else ""
        text = str(error).strip().splitlines()
        what = f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
        pipe.send(("failed", "WorkerError", f"worker {worker} raised {what}{where}.", _own_part(error)))
    sys.stdout.flush()
    sys.stderr.flush()


class _Session:
    """One worker between one start of the team and its end."""

    def __init__(self, assignment: Assignment, worker: int, pipe: Connection, pulse: WorkerPulse):
        self._assignment, self._worker, self._pipe, self._pulse = assignment, worker, pipe, pulse
        self.replica: Replica | None = None
        self._data: dict[str, Any] | None = None
        self._events: list[dict[str, Any]] = []
        self._sent_s = 0.0

    def run(self, descriptor: int) -> None:
        assignment = self._assignment
        self._emit("joined", worker=self._worker, pid=os.getpid(), host=socket.gethostname())
        recipe: Recipe = cloudpickle.loads(assignment.recipe)
        self._recipe = recipe
        self.replica = replica = Replica(recipe, assignment.team.device)
        progress = self._resumed(replica)
        engine = Lockstep(replica, self._worker, assignment.team.workers, self._pulse, self._emit, self._clock)
        self._engine = engine
        memory = engine.prepare(progress.version)
        self._pipe.send(("ready", self._facts(engine, progress), memory))
        self._pulse.waiting(True)
        agreed: Mapping[str, Region] = self._pipe.recv()
        self._pulse.waiting(False)
        engine.join(descriptor, agreed)
        interrupted = engine.run(progress, self._after_step, recipe.steps)
        if progress.version == recipe.steps:
            self._evaluate(progress)  # after the last checkpoint: nothing that was learnt can be lost by it
        text = self._sample() if self._worker == 0 and not interrupted else None
        digest = digest_of_state(replica.module.state_dict())
        self.send_events()
        self._pipe.send(("ended", asdict(progress), digest, interrupted, text))

    def _resumed(self, replica: Replica) -> Progress:
        path = self._assignment.resume_from
        if path is None:
            return Progress()
        replica.doing = f"loading {path}"
        saved = checkpoint.load(path)
        checkpoint.check_recipe(path, saved=saved.fingerprint, current=self._assignment.fingerprint)
        if saved.meta["data"] != self._data_facts():
            raise CheckpointError(
                f"the data are not those that {path} was trained on: {self._data_facts()['samples']} samples here and "
                f"{saved.meta['data']['samples']} there, or other content; give back those, or start a new run."
            )
        replica.load(saved.model_state, saved.training_state)
        return Progress(**{**saved.meta["progress"], "version": saved.version})

    def _facts(self, engine: Lockstep, progress: Progress) -> dict[str, Any]:
        """What all workers must agree on before they start."""
        replica = engine.replica
        return {
            "version": progress.version,
            "weights": digest_of_state(replica.module.state_dict()),
            "data": self._data_facts()["digest"],
            "samples": self._data_facts()["samples"],
            "parameters": sum(parameter.numel() for parameter in replica.parameters),
            "terms": engine.terms,
        }

    def _data_facts(self) -> dict[str, Any]:
        assert self.replica is not None
        if self._data is None:
            data = self.replica.data
            self._data = {"digest": digest_of_data(data), "samples": len(data.train)}
        return self._data

    def _after_step(self, progress: Progress, last: bool) -> None:
        recipe, team, version = self._recipe, self._assignment.team, progress.version
        if version < recipe.steps and recipe.evaluate_every and version % recipe.evaluate_every == 0:
            self._evaluate(progress)
        if self._clock() - self._sent_s >= HOLD_S:
            self.send_events()
        if last or version % team.checkpoint_every == 0:
            self._checkpoint(progress)

    def _evaluate(self, progress: Progress) -> None:
        found = self._engine.evaluate(progress.version)
        if found is None:
            return
        progress.held_out = {"version": progress.version, **asdict(found), **self._bits_per_byte(found)}
        self._emit("evaluated", **progress.held_out)

    def _bits_per_byte(self, found: Evaluation) -> dict[str, float]:
        assert self.replica is not None
        codec = self.replica.data.codec
        if codec is None or len(found.terms) != 1:
            return {}
        return {"bits_per_byte": found.objective / math.log(2) / codec.bytes_per_token}

    def _checkpoint(self, progress: Progress) -> None:
        replica = self.replica
        assert replica is not None
        replica.doing = f"saving version {progress.version}"
        state = replica.module.state_dict()
        self.send_events()  # a checkpoint never holds steps that the tape lacks
        self._pipe.send(("digest", progress.version, digest_of_state(state)))
        if self._worker:
            return
        saved = checkpoint.save(
            RunFolder(self._assignment.folder).checkpoints,
            version=progress.version,
            model_state=state,
            training_state=replica.training_state(),
            meta={"progress": asdict(progress), "data": self._data_facts()},
            fingerprint=self._assignment.fingerprint,
            keep=self._assignment.team.keep,
        )
        self._pulse.advance()
        self._emit(
            "checkpointed", version=progress.version, path=saved.path.name, bytes=saved.bytes, digest=saved.digest
        )

    def _sample(self) -> str | None:
        """For text, what the model goes on to write after the recipe's prompt."""
        import torch

        recipe, replica = self._recipe, self.replica
        assert replica is not None
        codec = replica.data.codec
        if codec is None or not recipe.sample_length:
            return None
        replica.doing = "writing the sample"
        seed_all(key(recipe.seed, "sample"))
        prompt = torch.tensor([codec.encode(recipe.sample_prompt or "\n")], device=replica.device)
        try:
            with replica.autocast():
                tokens = generate(replica.module, prompt, recipe.sample_length)
            return codec.decode(tokens[0].tolist())
        except Exception as error:  # the run is done; what only shows it must not end it
            self._emit("warned", why=f"no sample could be written: {type(error).__name__}: {error}")
            return None

    def _emit(self, kind: str, **fields: Any) -> None:
        """Notes an event of the worker. Those of every step are sent with others, see `HOLD_S`."""
        self._events.append({"t_s": self._clock(), "clock": "wall", "kind": kind, **fields})
        if kind not in ("computed", "pushed", "merged"):
            self.send_events()

    def send_events(self) -> None:
        """Sends the events that were held."""
        if self._events:
            self._pipe.send(("events", self._events))
            self._events = []
        self._sent_s = self._clock()

    def _clock(self) -> float:
        return round(time.monotonic() - self._assignment.began, 6)


def _redirect_output(path: Path) -> None:
    """Sends what the user's code prints, at any level, to the worker's log."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)


def _own_part(error: BaseException) -> str:
    """The traceback without this module's own frames at its top."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    return "".join(traceback.format_exception(type(error), error, trace))
