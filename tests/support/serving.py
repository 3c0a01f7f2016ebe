"""Runs under any rule for tests: in one process in a random order, or with a real team that is disturbed; and slow
checks of what is on their tapes.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import random
import signal
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from instep.errors import RecordError
from instep.offline.replayer import Replayer
from instep.offline.tape_replay import replay
from instep.recipe import Recipe, Team
from instep.record import tape
from instep.record.digest import digest_of_state
from instep.record.folder import RunFolder
from instep.record.result import Replayed
from instep.rules import PRESETS, UpdateRule
from instep.rules import presets as p
from instep.rules.ledger import Action, Drop, Ledger, Merge, Release
from instep.worker.updates import Update
from support import workloads
from support.harness import Client, Outcome, train_here
from support.ledgers import list_pieces
from support.processes import wait_until
from support.reference import reference_digests

RULES: dict[str, UpdateRule] = {
    "synchronous": p.synchronous(),
    "backup_workers": p.backup_workers(1),
    "bounded_staleness": p.bounded_staleness(2),
    "softsync": p.softsync(2),
    "asynchronous": p.asynchronous(),
    "delay_compensated": p.delay_compensated(),
    "local_sgd": p.local_sgd(2),
    "post_local_sgd": p.post_local_sgd(2, after=2),
    "diloco": p.diloco(2),
    "async_diloco": p.async_diloco(2, buffer=4),
}
"""Every preset, small enough for a run of a few steps."""
assert RULES.keys() == PRESETS.keys()

WORKLOADS = dict(zip(RULES, ["gpt", "convnet"] * 5, strict=True))
"""Each preset with one of them."""

# ----------------------------------------------------------------------------------------------------- in one process


@dataclass
class Driven:
    """A run in one process: its replayer, its ledger and its updates."""

    replayer: Replayer
    ledger: Ledger
    updates: list[Update] = field(default_factory=list)
    merges: list[Merge] = field(default_factory=list)

    @property
    def state(self) -> dict[str, Tensor]:
        return self.replayer.merger.replica.saved_state()

    @property
    def digest(self) -> str:
        return digest_of_state(self.state)


def drive(
    recipe: Recipe,
    workers: int,
    seed: int = 0,
    *,
    leaving: float = 0.0,
    before: Callable[[Driven, Merge], None] | None = None,
    after: Callable[[Driven, Merge], None] | None = None,
) -> Driven:
    """Trains with the ledger, the contributors and the merger alone; who finishes next is drawn from `seed`.

    leaving: the probability that instead of that somebody leaves, and comes back later. `before` and `after` are
    called with each update.
    """
    torch.set_num_threads(1)
    replayer = Replayer(recipe, workers, "cpu")
    run = Driven(replayer, Ledger(recipe.rule, replayer.pieces))
    chance = random.Random(seed)
    busy: set[int] = set()

    def obey(actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Release):
                replayer.released(action.worker, action.piece, action.version)
                busy.add(action.worker)
            elif isinstance(action, Drop):
                replayer.dropped(action.contribution.seq)
            elif isinstance(action, Merge):
                if before:
                    before(run, action)
                parts = zip(action.contributions, action.weights, action.staleness, strict=True)
                run.updates.append(replayer.merged(action.version, {c.seq: (w, s) for c, w, s in parts}))
                run.merges.append(action)
                if after:
                    after(run, action)

    def join(worker: int) -> None:
        obey(run.ledger.joined(worker))

    for worker in range(workers):
        join(worker)
    gone: set[int] = set()
    while not run.ledger.finished:
        if gone and chance.random() < 0.3:
            worker = gone.pop()
            join(worker)
        worker = chance.choice(sorted(busy))
        busy.discard(worker)
        if len(run.ledger.active) > 1 and chance.random() < leaving:
            gone.add(worker)
            replayer.left(worker)
            obey(run.ledger.left(worker))
            continue
        seq = run.ledger.next_seq
        replayer.pushed(seq, worker)
        obey(run.ledger.pushed(worker, replayer.waiting[seq]))
    return run


def close(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, rtol: float, atol: float) -> None:
    """Asserts that two state_dicts are equal up to a tolerance; integers exactly."""
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=rtol, atol=atol, msg=lambda text, name=name: name + text)


# ------------------------------------------------------------------------------------------------------- a real team


@functools.cache
def reference(name: str) -> dict[int, str]:
    torch.set_num_threads(1)
    return reference_digests(workloads.ALL[name]())


def serving(workers: int = 2, **fields: Any) -> Team:
    return Team(workers=workers, engine="server", **fields)


def at(kind: str, nth: int, act: Callable[[dict[int, int]], None], **fields: Any) -> Callable[[dict[str, Any]], None]:
    """Calls `act` with the pids of the workers at the nth event of `kind` that has these `fields`."""
    pids: dict[int, int] = {}
    seen: list[bool] = []

    def see(event: dict[str, Any]) -> None:
        if event["kind"] == "joined":
            pids[event["worker"]] = event["pid"]
        if event["kind"] == kind and all(event[key] == value for key, value in fields.items()):
            seen.append(True)
            if len(seen) == nth:
                act(pids)

    return see


def kill(worker: int, number: int = signal.SIGKILL) -> Callable[[dict[int, int]], None]:
    """Sends a signal to a worker."""
    return lambda pids: os.kill(pids[worker], number)


def server_pid(workers: int) -> int:
    """The server's process, which comes after the workers in number; its supervisor is this process."""
    (pid,) = (child.pid for child in multiprocessing.active_children() if child.name == f"worker-{workers}")
    assert pid is not None
    return pid


def killed_altogether(
    recipe: Recipe, team: Team, path: Path, when: Callable[[dict[str, Any]], bool] = lambda event: False
) -> None:
    """Trains in a forked supervisor that is killed by SIGKILL at the first event that `when` is true of, if by nobody
    before.
    """
    ours, theirs = multiprocessing.Pipe()

    def live() -> None:
        def see(event: dict[str, Any]) -> None:
            if when(event):
                theirs.send([child.pid for child in multiprocessing.active_children()])
                os.kill(os.getpid(), signal.SIGKILL)

        train_here(recipe, team, path, client=Client(see))

    supervisor = multiprocessing.get_context("fork").Process(target=live)
    supervisor.start()
    supervisor.join()
    assert supervisor.exitcode == -signal.SIGKILL, "it was to be killed in the middle"
    team_pids = ours.recv() if ours.poll() else []
    wait_until(lambda: not any(alive(pid) for pid in team_pids), 60, "the end of the team with its supervisor")
    wait_until(lambda: unlocked(path), 60, "the end of their threads, which hold the folder's lock")


def unlocked(path: Path) -> bool:
    """Whether nobody trains in the folder."""
    try:
        with RunFolder(path).locked():
            return True
    except RecordError:
        return False


def alive(pid: int) -> bool:
    """Whether the process is there and not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def replayed(recipe: Recipe, run: Path) -> Replayed:
    """The replay of a run, in this process."""
    torch.set_num_threads(1)
    return replay(recipe, tape.read(run / "tape.jsonl"))


_FOLDER = tempfile.TemporaryDirectory(prefix="instep-tests-")


@functools.cache
def disturbed(name: str, workload: str) -> tuple[Recipe, Outcome]:
    """A real run under a preset, once for all tests: 3 workers, slow by command, of which the slowest is killed while
    it computes, and replaced.
    """
    recipe = workloads.ALL[workload](rule=RULES[name], steps=6, evaluate_every=4)
    team = Team(workers=3, slow="0:1.5x,1:3x,2:1.5x", checkpoint_every=2, engine="server")
    rounds = RULES[name].lockstep  # then it surely comes to a second piece, with a state of its optimizer
    client = Client(at("released", 2 if rounds else 1, kill(1), worker=1))
    return recipe, train_here(recipe, team, Path(_FOLDER.name) / f"{name}-{workload}", client=client)


# ------------------------------------------------------------------------------------------------------------ the tape


def check_tape(events: Iterable[Mapping[str, Any]], recipe: Recipe, *, finished: bool = True) -> None:
    """C3 from the tape alone, slowly: every sample is merged once, every contribution merged once or dropped, and
    each worker's events are in order. A start from a checkpoint takes back all that came after it.
    """
    merges: list[tuple[int, list[int]]] = []  # version, pieces
    in_hand: dict[int, tuple[int, int]] = {}  # piece and version, by worker
    waiting: dict[int, tuple[int, int, int]] = {}  # worker, piece and version, by seq
    cut, there, version = 0, set(), 0
    for event in events:
        kind = event["kind"]
        if kind == "run_started":
            assert event["engine"] == "server"
            cut, version = event["cut"], event["version"]
            merges = [(v, pieces) for v, pieces in merges if v <= version]
            assert len(merges) == version, "the checkpoint is of an update that the tape has"
            in_hand, waiting, there = {}, {}, set()
        elif kind == "joined":
            assert event["worker"] not in there
            there.add(event["worker"])
        elif kind == "left":
            there.discard(event["worker"])
            in_hand.pop(event["worker"], None)
        elif kind == "released":
            assert event["worker"] in there
            assert event["worker"] not in in_hand, "it had work"
            assert event["version"] == version, "work starts from the newest weights"
            in_hand[event["worker"]] = (event["piece"], version)
        elif kind == "pushed":
            piece, base = in_hand.pop(event["worker"])
            assert (event["piece"], event["version"]) == (piece, base)
            assert event["seq"] not in waiting
            waiting[event["seq"]] = (event["worker"], piece, base)
        elif kind == "dropped":
            assert event["why"]
            waiting.pop(event["seq"], None)  # one that waited when the run was stopped is dropped when it goes on
        elif kind == "merged":
            version += 1
            assert event["version"] == version
            parts = event["contributions"]
            assert len(parts) == len(event["weights"]) == len(event["staleness"]) > 0
            for part, old in zip(parts, event["staleness"], strict=True):
                assert waiting.pop(part["seq"]) == (part["worker"], part["piece"], part["version"])
                assert old == version - 1 - part["version"]
            merges.append((version, [part["piece"] for part in parts]))
    if not finished:
        return
    assert not waiting, "each was merged or dropped"
    found = [piece for _, pieces in merges for piece in pieces]
    expected = list_pieces(recipe.rule, cut, recipe.microbatches, recipe.steps)
    assert sorted(found) == list(range(len(expected))), "every piece once"
    samples = [(batch, m) for piece in found for batch in expected[piece][0] for m in expected[piece][1]]
    assert sorted(samples) == [(batch, m) for batch in range(recipe.steps) for m in range(recipe.microbatches)]
