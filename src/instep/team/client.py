"""`train`: the client's side of a run. It imports no torch, computes nothing and prints nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import operator
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from instep.components import importable
from instep.descendants import MARK, Stopped, end_marked
from instep.differences import without_address
from instep.errors import (
    CheckpointError,
    ComponentError,
    InstepError,
    RecipeError,
    WorkerError,
    described,
    killed_by,
    no_process,
    shown,
)
from instep.recipe import (
    Recipe,
    Team,
    check_team,
    dumps,
    engine_of,
    read_saved,
)
from instep.record import tape
from instep.record.files import disk_error
from instep.record.folder import About, RunFolder, check_path, remove
from instep.record.held import identity_of
from instep.record.resuming import resumed
from instep.schedule import Change
from instep.tables import from_table
from instep.team.channel import Channel
from instep.team.messages import (
    Cancelled,
    Failed,
    Finished,
    PlainEvents,
    Request,
    StopRun,
    SupervisorToClient,
)
from instep.team.pickling import Pickled, dump
from instep.team.signals import Stop, blocked, deaf, interrupting

if TYPE_CHECKING:
    from torch import Tensor, nn

LOOK_S = 0.5
"""Seconds without news after which a client looks whether the process that it started is stopped."""

ENDING_S = 15.0
"""Seconds that such a process has to end, with all its own, once it was told to."""

Monitor = Callable[[dict[str, Any]], None]
"""Called with every event of the tape, in order, in the process that called `train`."""


@dataclass(frozen=True)
class Run:
    """A finished run. `result` is the content of its result.json."""

    path: Path
    result: dict[str, Any]
    recipe: Recipe
    import_paths: tuple[str, ...] = ()
    """Folders that the recipe's modules were looked for in."""

    @property
    def digest(self) -> str:
        """SHA-256 of the final weights."""
        return str(self.result["digest"])

    @property
    def objective(self) -> float:
        """The objective of the last step, on its training batch."""
        return float(self.result["objective_last"])

    @property
    def held_out(self) -> float | None:
        """The objective on the held-out data; None if there are none."""
        value = self.result["held_out"]
        return None if value is None else float(value)

    def state_dict(self, *, best: bool = False) -> dict[str, Tensor]:
        """The final weights, from the last checkpoint; with `best`, those with the best held-out objective.

        Raises CheckpointError if that checkpoint is missing, damaged or not theirs.
        """
        from instep.record import best as kept
        from instep.record import checkpoint

        folder = RunFolder(self.path).checkpoints
        if best:
            found = kept.read(folder)
            if found is None:
                raise CheckpointError(
                    f"{self.path} has no best checkpoint: nothing was evaluated, or team.keep_best was off."
                )
            return checkpoint.load(checkpoint.path_of(folder, found.version)).model_state
        path, _ = RunFolder(self.path).newest_checkpoint()
        if path is None:
            raise CheckpointError(f"{self.path} has no sound checkpoint.")
        saved = checkpoint.load(path)
        if saved.digest != self.digest:
            raise CheckpointError(
                f"the newest sound checkpoint of {self.path}, {path.name}, does not hold the weights that this run "
                f"ended with: its own was damaged, or the run has gone on since; load the checkpoint you want by path."
            )
        return saved.model_state

    def model(self, *, best: bool = False) -> nn.Module:
        """The recipe's model with the final weights, or those with the best held-out objective, on the CPU.

        It is as the recipe builds it, most often in training mode: call its `eval()` before you use it.

        >>> run.model()(torch.ones(1, 3)).shape
        torch.Size([1, 1])
        """
        from instep.worker.model import build_model

        with importable(self.import_paths):
            model = build_model(self.recipe.model)
        model.load_state_dict(self.state_dict(best=best))
        return model


@interrupting()
def train(
    recipe: Recipe | None = None,
    *,
    team: Team | None = None,
    out: str | os.PathLike[str] | None = None,
    resume: str | os.PathLike[str] | None = None,
    monitors: Iterable[Monitor] = (),
    import_paths: Sequence[str | os.PathLike[str]] = (),
    skip_samples: Sequence[int] = (),
) -> Run:
    """Trains `recipe` with `team` and returns the finished run.

    >>> run = instep.train(recipe, team=team)
    >>> run.path.name, run.result["steps"], len(run.digest)
    ('custom', 3, 64)

    recipe: what is trained; with `resume` it may be left out if the saved one can be read back.
    team: who trains; by default one worker, or the saved team with `resume`.
    out: the run folder to make, by default ``runs/NAME``, ``runs/NAME-2`` and so on.
    resume: the run folder of a run to continue, exactly, with the same or another team. Schedule, watch and the
        optimizer's argument `lr` may be others than so far: they hold from here on, see `Recipe.changes`.
    monitors: called with every event; none by default, and nothing is printed.
    import_paths: folders to look for the recipe's modules in, before ``sys.path``.
    skip_samples: indices of training samples to leave out from here on, in later resumes too; their batches are then
        smaller.

    A KeyboardInterrupt ends the run after the present step, with a checkpoint, and is then raised again; a second one
    ends it at once. So do SIGTERM, SIGHUP and what schedulers warn with, SIGUSR1, SIGUSR2 and SIGXCPU, where the
    program leaves them alone and calls `train` from its main thread. Raises InstepError: see `instep.errors`.
    """
    _check_arguments(recipe, team)
    skipped = _indices(skip_samples)
    watching, folders = monitors_of(monitors), folders_of(import_paths)
    notices: list[str] = []
    if resume is not None:
        if out is not None:
            raise RecipeError("'out' and 'resume' exclude each other: a resumed run goes on in its own folder.")
        folder = RunFolder.open(Path(resume))
        check_path(folder.path)
        if _is_simulation(folder):
            raise CheckpointError(
                f"{folder.path} is the folder of a simulation, which cannot be resumed; train its recipe instead: "
                f"instep train {folder.recipe_path}."
            )
        table, team, saved_paths = saved(folder, recipe, team, f"train(recipe, resume={str(folder.path)!r})")
        recipe, notices = resumed(folder, recipe, table, skipped)
        folders += saved_paths
    else:
        if recipe is None:
            raise RecipeError("there is nothing to train: give a recipe, or a run to resume.")
        team = team or Team()
        if skipped:
            first = Change(version=0, skip_samples=skipped)
            recipe = dataclasses.replace(recipe, changes=(first, *recipe.changes))
    check_team(recipe, team)
    sent = pickled(recipe)
    recipe_file = dumps(recipe, team)
    if resume is None:
        path = Path(out) if out is not None else RunFolder.claim(recipe.name)
        folder = RunFolder.create(path, recipe_file, About(import_paths=tuple(folders)))
    identity = identity_of(folder.path)
    request = Request(
        recipe=sent,
        recipe_table=recipe.to_table(),
        recipe_file=recipe_file,
        fingerprint=recipe.fingerprint(),
        team=team,
        rule=recipe.rule,
        engine=engine_of(recipe, team),
        folder=folder.path.resolve(),
        resumed=resume is not None,
        import_paths=tuple(folders),
        began=time.monotonic(),
        fingerprints=recipe.fingerprints(),
        notices=tuple(notices),
    )
    try:
        client = _Client(folder, resume is not None)
    except OSError as error:
        if resume is None:
            remove(folder.path, identity)
        raise no_process("the supervisor of the run", error) from error
    try:
        client.start(recipe.threads, [*folders, *sys.path], sent)
        with interrupting() as stop, stop.noting():
            result = client.serve(request, watching, stop)
    except BaseException:
        with deaf():
            client.close()  # first, or a worker would still write there
            if resume is None and not client.trained:
                remove(folder.path, identity)  # nothing was trained: the name is free again
        raise
    client.close()
    if result["interrupted"]:
        how = folder.how_to_resume()
        how = how if how.startswith("instep") else f"instep.train(resume={str(folder.path)!r}) or instep train {how}"
        raise KeyboardInterrupt(f"the run ended after step {result['steps']}, and is saved; go on with {how}")
    return Run(folder.path, result, recipe, tuple(folders))


def _indices(given: Any) -> tuple[int, ...]:
    """The indices of `skip_samples`. Raises RecipeError."""
    try:
        listed = () if isinstance(given, str | bytes | Mapping) else tuple(given)
        if (given and not listed) or any(isinstance(index, bool) for index in listed):
            raise TypeError
        return tuple(map(operator.index, listed))
    except TypeError:
        raise RecipeError(
            f"'skip_samples' is {shown(given)}; it must be a list of indices of samples, such as [17, 204]."
        ) from None


def _check_arguments(recipe: Any, team: Any) -> None:
    for name, given, kind in (("recipe", recipe, Recipe), ("team", team, Team)):
        if given is not None and not isinstance(given, kind):
            raise RecipeError(
                f"'{name}' is {shown(given)}; it must be an instep.{kind.__name__}: names and files of recipes are for "
                f"the command, instep train."
            )


def monitors_of(given: Any) -> list[Monitor]:
    """The monitors, if they can be called. Raises RecipeError."""
    monitors: list[Any] = list(given) if isinstance(given, Iterable) else [None]
    if any(isinstance(monitor, type) or not callable(monitor) for monitor in monitors):
        raise RecipeError(
            f"'monitors' is {shown(given)}; it must be a list of functions of an event: [instep.Console()]."
        )
    return monitors


def folders_of(import_paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> list[str]:
    """The folders `import_paths`, or the one folder, as they can be used from anywhere."""
    several = [import_paths] if isinstance(import_paths, (str, os.PathLike)) else import_paths
    try:
        return [os.path.abspath(path) for path in several]
    except FileNotFoundError:
        raise RecipeError(
            "'import_paths' cannot be found from the working folder, which is not there any more; change to one that "
            "is, with os.chdir, or give absolute paths."
        ) from None


class _Client:
    """The supervisor's process, as its client sees it."""

    def __init__(self, folder: RunFolder, resumed: bool):
        self.trained, self._resumed, self._folder = False, resumed, folder
        self._mark = uuid.uuid4().hex
        self._log = folder.logs / "supervisor.log"
        self._process: subprocess.Popen[bytes] | None = None
        open_standard_files()
        self._channel, self._theirs = Channel.pair()
        self._events: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()  # None: there are no more
        self._final: Finished | Failed | Cancelled | None = None
        self._receiver = threading.Thread(target=self._receive, name="instep-client", daemon=True)

    def start(self, threads: int, path: list[str], sent: Pickled) -> None:
        """Starts the supervisor. `path` becomes its ``sys.path``; it has the memory of `sent`."""
        try:
            with self._opened_log() as log:
                self._process = start_process(
                    "instep.team.agent", self._theirs.fileno(), path, threads, log, self._mark, sent
                )
        except OSError as error:
            raise no_process("the supervisor of the run", error) from error
        self._theirs.close()

    def _opened_log(self) -> IO[bytes]:
        try:
            self._log.parent.mkdir(exist_ok=True)
            return self._log.open("ab")
        except OSError as error:
            raise disk_error(f"the log {self._log} cannot be written", error) from error

    def serve(self, request: Request, monitors: list[Monitor], stop: Stop) -> dict[str, Any]:
        """Hands events to the monitors until the run ends. Returns the result. Raises InstepError."""
        with contextlib.suppress(OSError):  # it could not start: `_ending` says so
            self._channel.send(request)
        self._receiver.start()
        assert self._process is not None, "it was started"
        stopped = Stopped(self._process.pid, request.team.answer_timeout_s)
        asked = pressed = False
        failed: Exception | None = None
        watching = list(monitors)
        while True:
            try:
                if (stop.wanted or pressed or failed is not None) and not asked:
                    asked = True
                    with contextlib.suppress(OSError):  # it may be ending already
                        self._channel.send(StopRun())
                event = self._events.get(timeout=LOOK_S)
                if event is None:
                    break
                for place, monitor in enumerate(watching):
                    try:
                        monitor(event)
                    except Exception as error:  # as Ctrl-C; the others still see the end
                        watching[place] = _deaf_monitor
                        failed = failed or error
            except queue.Empty:
                why = stopped.look()
                if why:
                    self._process.kill()
                    raise WorkerError(f"the supervisor of the run {why}; {self._remedy()}.") from None
            except KeyboardInterrupt:
                if pressed or stop.terminated:
                    raise
                pressed = True
        interrupted = pressed or stop.wanted
        try:
            result = self._ending()
        except KeyboardInterrupt:
            if failed is not None and not interrupted:
                raise failed from None
            raise
        if failed is not None and not interrupted:
            if result["interrupted"]:
                failed.add_note(f"The run ended after the step that it was at, and is saved: {request.folder}.")
            raise failed
        return result

    def _ending(self) -> dict[str, Any]:
        match self._final:
            case Finished(result):
                return dict(result)
            case Failed():
                raise self._final.error()
            case Cancelled():
                raise KeyboardInterrupt
        assert self._process is not None, "it was started"
        status = self._wait()
        if status > 0:
            raise WorkerError(
                f"the supervisor of the run could not start (exit status {status}); its log follows.",
                detail=self._tail(),
            )
        how = f"was {killed_by(status)}" if status else "ended early"
        raise WorkerError(
            f"the supervisor of the run (pid {self._process.pid}) {how}, and its workers with it; {self._remedy()}.",
            detail=self._tail(),
        )

    def _remedy(self) -> str:
        """What to do after the supervisor was killed. `train` removes the folder of a run that has trained nothing."""
        if self.trained or self._resumed:
            return f"go on with {self._folder.how_to_resume()}"
        return "nothing was trained, and no folder is left of it: start the run again"

    def _wait(self) -> int:
        """The supervisor's exit status; it is killed if it does not end by itself."""
        if self._process is None:
            return 0
        return ended(self._process, self._mark)

    def _tail(self) -> str:
        return self._log.read_text(errors="replace")[-2000:] if self._log.exists() else ""

    def _receive(self) -> None:
        """Reads in a thread of its own, so that an interrupt never tears a message."""
        try:
            while True:
                message: SupervisorToClient = self._channel.recv()
                if isinstance(message, PlainEvents):
                    for event in message.events:
                        self.trained |= event["kind"] == "merged"
                        self._events.put(event)
                else:
                    self._final = message
        except (EOFError, OSError):
            pass
        finally:
            self._events.put(None)

    def close(self) -> None:
        """Ends the supervisor if it still runs; it ends its workers."""
        self._channel.hang_up()
        self._theirs.close()
        self._wait()
        if self._receiver.is_alive():
            self._receiver.join()
        self._channel.close()


def _deaf_monitor(event: dict[str, Any]) -> None:
    """In the place of a monitor that has raised."""


def open_standard_files() -> None:
    """Where a program has closed one of the three: else what is opened next would take its place in other processes."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)


def start_process(
    module: str, descriptor: int, path: list[str], threads: int, log: IO[bytes], mark: str, sent: Pickled
) -> subprocess.Popen[bytes]:
    """Starts ``main(descriptor)`` of `module` in a new process, which prints to `log`; `path` is its sys.path.
    It has the memory of `sent`.

    What a terminal or a scheduler sends to all is for the client: the process starts with these signals blocked.
    """
    usable = [entry for entry in path if isinstance(entry, str)]  # Python itself passes over the others
    with blocked():
        return subprocess.Popen(
            [
                sys.executable,
                "-c",
                f"import sys; sys.path[:] = {usable!r}; from {module} import main; main({descriptor})",
            ],
            cwd=_working_folder(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=[descriptor, sent.descriptor],
            env={**_environment(threads), MARK: mark},
        )


def ended(process: subprocess.Popen[bytes], mark: str) -> int:
    """The exit status of a process of `start_process` that has been told to end, killed if it does not; what it could
    not end itself is killed too.
    """
    try:
        status = process.wait(ENDING_S)
    except subprocess.TimeoutExpired:
        process.kill()
        status = process.wait()
    if status:
        end_marked(mark)
    return status


def _working_folder() -> str | None:
    """Where to start a process: here, or elsewhere if this folder is gone, for torch could not be loaded."""
    try:
        os.getcwd()
    except OSError:
        return "/"
    return None


def _environment(threads: int) -> dict[str, str]:
    """The supervisor's environment: what must be set before Python, numpy and torch start."""
    caches = {}
    try:
        tempfile.gettempdir()
    except FileNotFoundError:
        if not os.access(os.environ.get("TORCHINDUCTOR_CACHE_DIR", ""), os.W_OK):
            # Torch makes this folder as it is imported, and only runs that compile write there: one that is there.
            caches = {"TORCHINDUCTOR_CACHE_DIR": "/proc/self"}
    return {
        **os.environ,
        **caches,
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OPENBLAS_NUM_THREADS": "1",  # numpy's; its threads would have to survive the fork
        "PYTHONHASHSEED": "0",  # the order of a set must not change a batch
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # deterministic matrix products on a GPU
        "TORCHINDUCTOR_COMPILE_THREADS": "1",  # no helper processes that could outlive a worker
    }


def saved(
    folder: RunFolder, recipe: Recipe | None, team: Team | None, call: str
) -> tuple[dict[str, Any], Team, list[str]]:
    """The table of the run's recipe, the team to go on with, and where the run found its modules.

    call: of `instep`, with the recipe, for who has to give it. Raises RecipeError and CheckpointError.
    """
    table = read_saved(folder.recipe_path)
    nameless = without_address(table)
    if recipe is None and nameless is not None:
        raise RecipeError(
            f"the recipe of {folder.path} holds {nameless}, an object that only the program that made it has; give "
            f"that recipe too: instep.{call}."
        )
    saved_team = from_table(Team, table.pop("team", {}), "team")
    about = folder.about()
    paths = about.import_paths if about is not None else _started(folder).get("import_paths", [])
    return table, team or saved_team, list(paths)


def _is_simulation(folder: RunFolder) -> bool:
    about = folder.about()
    return (about is not None and about.kind == "simulation") or _started(folder).get("engine") == "virtual"


def _started(folder: RunFolder) -> dict[str, Any]:
    """The first event of the run's tape, which tells of its start; empty where there is no tape."""
    return next(iter(tape.read(folder.tape_path)), {}) if folder.tape_path.exists() else {}


def pickled(recipe: Recipe, *more: Any) -> Pickled:
    """(recipe, *more), or the recipe alone, for other processes. Raises ComponentError and ResourceError."""
    try:
        return dump((recipe, *more) if more else recipe)
    except InstepError:
        raise
    except Exception:
        for key in ("model", "objective", "data", "optimizer", "artifacts"):
            try:
                dump(getattr(recipe, key))
            except InstepError:
                raise
            except Exception as error:
                raise ComponentError(
                    f"the {key} {getattr(recipe, key).describe()} cannot be sent to workers ({described(error)}); "
                    f"give a callable that builds it there."
                ) from error
        raise
