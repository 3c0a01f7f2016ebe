"""What a program calls: `train`, `replay`, `verify`, `replay_under` and `simulate`. No torch: who computes has it."""

from __future__ import annotations

import dataclasses
import operator
import os
import secrets
import tempfile
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from instep.bounds import room_here
from instep.budget import parse_share
from instep.clock.times import RecordedTimes
from instep.errors import CheckpointError, RecipeError, RecordError, shown
from instep.monitors import Monitor
from instep.offline.cluster import Cluster
from instep.offline.past import Past
from instep.recipe import Recipe, Team, dumps, engine_of
from instep.record import tape
from instep.record.folder import About, RunFolder, check_path, remove
from instep.record.held import identity_of
from instep.record.receipt import Verified
from instep.record.result import Replayed
from instep.record.resuming import changed_rates, check_given, is_simulation, recorded, resumed, saved
from instep.rules import UpdateRule
from instep.run import Run, RunElsewhere
from instep.schedule import Change
from instep.tables import from_table
from instep.team.client import computed, pickled, say, supervised
from instep.team.joining import run_to_join
from instep.team.messages import Request
from instep.team.place import Place, begun_before, launch, place_of
from instep.team.ray_nodes import RayNodes, RayRun, ray_nodes
from instep.team.signals import interrupting
from instep.team.telling import met, telling_the_others
from instep.team_checks import check_team, with_room


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
    team: who trains; by default one worker, under a launcher of several agents one for each, or the saved team with
        `resume`.
    out: the run folder to make, by default ``runs/NAME``, ``runs/NAME-2`` and so on.
    resume: the run folder of a run to continue, exactly, with the same or another team; of several agents the first
        needs it alone. Schedule, watch and the
        optimizer's argument `lr` may be others than so far: they hold from here on, see `Recipe.changes`. Without a
        monitor, which would show it, other rates are warned of.
    monitors: called with every event; none by default, and nothing is printed.
    import_paths: folders to look for the recipe's modules in, before ``sys.path``.
    skip_samples: indices of training samples to leave out from here on, in later resumes too; their batches are then
        smaller.

    A KeyboardInterrupt ends the run after the present step, with a checkpoint, and is then raised again; a second one
    ends it at once. So do SIGTERM, SIGHUP and what schedulers warn with, SIGUSR1, SIGUSR2 and SIGXCPU, where the
    program leaves them alone and calls `train` from its main thread. Raises InstepError: see `instep.errors`.
    """
    with telling_the_others(team.launcher if isinstance(team, Team) else "auto"):
        _check_arguments(recipe, team)
        skipped = _indices(skip_samples)
        watching, folders = monitors_of(monitors), folders_of(import_paths)
        if resume is None and (begun := begun_before(out)) is not None:
            out, resume = None, begun
        if resume is None:
            wanted = _to_begin(recipe, team, skipped)
        elif out is not None:
            raise RecipeError("'out' and 'resume' exclude each other: a resumed run goes on in its own folder.")
        elif (place := place_of(team.launcher if team is not None else "auto")) is not None and place.agent > 0:
            wanted = _to_join(place, RunFolder(Path(resume)), recipe, team)
        else:
            wanted = _to_resume(RunFolder.open(Path(resume)), recipe, team, skipped)
            for why in () if watching else (*wanted.notices, *wanted.changed):  # a monitor sees them
                warnings.warn(why, stacklevel=3)  # of the caller, beyond the decorator
        check_team(wanted.recipe, wanted.team)
    with ray_nodes(wanted.team) as nodes:
        with telling_the_others(wanted.team.launcher):
            folder, request = _request(wanted, out, (*folders, *wanted.import_paths), nodes)
        return _trained(wanted.recipe, folder, request, watching, nodes)


@dataclass(frozen=True)
class _Wanted:
    """What is to be trained, and by whom; `folder` is that of a run that goes on."""

    recipe: Recipe
    team: Team
    folder: RunFolder | None = None
    notices: Sequence[str] = ()
    import_paths: Sequence[str] = ()
    changed: Sequence[str] = ()


def _to_begin(recipe: Recipe | None, team: Team | None, skip_samples: tuple[int, ...]) -> _Wanted:
    if recipe is None:
        raise RecipeError("there is nothing to train: give a recipe, or a run to resume.")
    if skip_samples:
        first = Change(version=0, skip_samples=skip_samples)
        recipe = dataclasses.replace(recipe, changes=(first, *recipe.changes))
    if team is None:
        place = place_of("auto")
        team = Team(workers=place.agents if place is not None else 1)
    return _Wanted(recipe, team)


def _to_resume(folder: RunFolder, recipe: Recipe | None, team: Team | None, skip_samples: tuple[int, ...]) -> _Wanted:
    check_path(folder.path)
    if is_simulation(folder):
        raise CheckpointError(
            f"{folder.path} is the folder of a simulation, which cannot be resumed; train its recipe instead: "
            f"instep train {folder.recipe_path}."
        )
    table, team, paths = saved(folder, recipe, team, f"train(recipe, resume={str(folder.path)!r})")
    recipe, notices = resumed(folder, recipe, table, skip_samples)
    return _Wanted(recipe, team, folder, notices, paths, changed_rates(folder, recipe, table))


def _to_join(place: Place, folder: RunFolder, recipe: Recipe | None, team: Team | None) -> _Wanted:
    """A run that goes on, for an agent that need not find its folder."""
    told = run_to_join(place, team or Team())
    table = {key: value for key, value in told.table.items() if key != "team"}
    check_given(folder, recipe, table, f"train(recipe, resume={str(folder.path)!r})")
    if team is None:
        team = from_table(Team, {**told.table["team"], "interface": ""}, "team")
    return _Wanted(recorded(folder, recipe, table), team, import_paths=told.import_paths)


def _request(
    wanted: _Wanted, out: str | os.PathLike[str] | None, import_paths: tuple[str, ...], nodes: RayNodes | None
) -> tuple[RunFolder, Request]:
    """What the supervisor is asked for, and the folder, which is made for a new run."""
    recipe, team, folder = wanted.recipe, wanted.team, wanted.folder
    place = nodes.place if nodes is not None else place_of(team.launcher)
    if nodes is not None:
        team = dataclasses.replace(team, workers=nodes.workers)
    elif place is None:
        team = with_room(team, room_here(recipe.threads))
    elif (limits := team.limits) is not None:
        there = limits.within(place.agents)  # until it is known what the hosts have room for
        team = dataclasses.replace(team, workers=there)
    sent, recipe_file = pickled(recipe), dumps(recipe, team)
    if place is not None and place.agent > 0:
        folder = RunFolder(Path(tempfile.mkdtemp(prefix="instep-")))
    elif folder is None:
        path = Path(out) if out is not None else RunFolder.claim(recipe.name)
        folder = RunFolder.create(path, recipe_file, About(import_paths=import_paths, launch=launch()))
    return folder, Request(
        recipe=sent,
        recipe_table=recipe.to_table(),
        recipe_file=recipe_file,
        fingerprint=recipe.fingerprint(),
        team=team,
        rule=recipe.rule,
        engine=engine_of(recipe, team),
        folder=folder.path.resolve(),
        resumed=wanted.folder is not None,
        import_paths=import_paths,
        began=time.monotonic(),
        fingerprints=recipe.fingerprints(),
        notices=tuple(wanted.notices),
        place=place,
        environment=nodes.environment if nodes is not None else {},
    )


def _trained(
    recipe: Recipe, folder: RunFolder, request: Request, monitors: list[Monitor], nodes: RayNodes | None
) -> Run:
    place = request.place
    if place is not None and place.agent > 0:
        monitors = [say]
    others = RayRun(nodes, request, recipe) if nodes is not None else None
    with met():
        result = supervised(folder, request, recipe.threads, monitors, others)
    if result["interrupted"]:
        if place is not None and place.agent > 0:
            raise KeyboardInterrupt(f"the run ended after step {result['steps']}, and is saved by agent 0.")
        how = folder.how_to_resume()
        how = how if how.startswith("instep") else f"instep.train(resume={str(folder.path)!r}) or instep train {how}"
        raise KeyboardInterrupt(f"the run ended after step {result['steps']}, and is saved; go on with {how}")
    if place is not None and place.agent > 0:
        return RunElsewhere(place.agent, result, recipe, request.import_paths)
    return Run(folder.path, result, recipe, request.import_paths)


def replay(run: str | os.PathLike[str], recipe: Recipe | None = None) -> Replayed:
    """Computes a run again from its recipe and its tape, in one process, under any rule.

    >>> instep.replay(run.path, recipe).same
    True

    recipe: needed where the saved one holds objects without an address.
    Raises RecordError where the tape is damaged, of another recipe or not whole, and InstepError as the run would.
    """
    past = Past.of(run, recipe, f"replay({str(run)!r}, recipe)")
    found: Replayed = computed(
        "instep.offline.tape_replay:replay", past.recipe, (past.events,), past.import_paths, (),
        if_killed="a replay takes the memory of one worker, under local steps of all: replay it where there is more",
    )  # fmt: skip
    return found


def verify(
    run: str | os.PathLike[str], recipe: Recipe | None = None, *, sample: float = 0.01, seed: int | None = None,
    monitors: Iterable[Monitor] = (),
) -> Verified:  # fmt: skip
    """Computes a share of a run's steps again, from its kept checkpoints, in one process, and compares them.

    >>> receipt = instep.verify(run.path, recipe, sample=1.0)
    >>> receipt.verdict, receipt.computed
    ('same', 3)

    sample: the share, above 0 and at most 1. seed: of the draw, by default another one each time.
    monitors: called with a `verified` event for each span. Raises NotComparableError where none of it can be compared
    here, RecordError for a run without checkpoints, or that is being written, and InstepError as the run would.
    """
    sample = parse_share(str(sample), "'sample'")
    folder = RunFolder.open(Path(run))
    if is_simulation(folder):
        raise RecordError(
            f"{folder.path} is the folder of a simulation, which keeps no checkpoints; replay it instead."
        )
    try:
        with folder.locked():
            pass
    except RecordError as error:
        raise RecordError(f"{folder.path} is still being written; verify it when its run has ended.") from error
    past, seed = Past.of(run, recipe, f"verify({str(run)!r}, recipe)"), secrets.randbits(32) if seed is None else seed
    found: Verified = computed(
        "instep.offline.verifying:verify", past.recipe, (folder.path.resolve(), past.events, sample, seed),
        past.import_paths, monitors_of(monitors),
        if_killed="it takes the memory of one worker, under local steps of all: verify where there is more",
    )  # fmt: skip
    return found


def replay_under(
    run: str | os.PathLike[str],
    rule: UpdateRule,
    recipe: Recipe | None = None,
    *,
    out: str | os.PathLike[str] | None = None,
    monitors: Iterable[Monitor] = (),
) -> dict[str, Any]:
    """The same arrivals under another rule: what would have happened. Returns the fields of ``result.json``.

    Each worker takes, for its contributions in turn, the times that it took a microbatch in the run; messages and
    updates take none. Raises RecordError where the tape lacks a worker's times, and InstepError.
    """
    folder = RunFolder.open(Path(run))
    table, team, paths = saved(folder, recipe, None, f"replay_under({str(run)!r}, rule, recipe)")
    recipe = recorded(folder, recipe, table, replaying=True)
    times = recorded_times(folder, team.workers)
    cluster = Cluster(workers=team.workers, times=times, merge_s=0.0, collective=False)
    changed = dataclasses.replace(recipe, rule=rule)
    return simulate(changed, cluster, out=out, monitors=monitors, import_paths=paths)


def recorded_times(folder: RunFolder, workers: int) -> RecordedTimes:
    """The seconds a microbatch of each worker, as the tape tells them. Raises RecordError."""
    times: dict[int, list[float]] = {}
    for event in tape.read(folder.tape_path):
        if event["kind"] == "computed":
            start, stop = event["microbatches"]
            count = (stop - start) * event.get("local_steps", 1)
            began_s, ended_s = event.get("ahead", (0.0, 0.0))
            seconds = event["to_s"] - event["from_s"] + ended_s - began_s
            if seconds < 0:
                raise RecordError(
                    f"worker {event['worker']} computed for {seconds:g} s, as the tape {folder.tape_path} tells, which "
                    f"cannot be; restore the file."
                )
            times.setdefault(event["worker"], []).append(seconds / max(1, count))
    return RecordedTimes.of(times, workers)


def simulate(
    recipe: Recipe,
    cluster: Cluster,
    *,
    gradients: bool = True,
    out: str | os.PathLike[str] | None = None,
    monitors: Iterable[Monitor] = (),
    import_paths: Sequence[str | os.PathLike[str]] = (),
) -> dict[str, Any]:
    """Runs `recipe` on a virtual clock, with the workers and the network of `cluster`. Returns the result's fields.

    >>> asynchronous = dataclasses.replace(recipe, rule="asynchronous")
    >>> found = instep.simulate(asynchronous, instep.Cluster(workers=4), gradients=False)
    >>> found["steps"]
    3

    gradients: False finds times, bytes, staleness and idle shares alone. out: the run folder to make, none if None.
    Raises InstepError.
    """
    watching, paths = monitors_of(monitors), folders_of(import_paths)
    folder = None
    if out is not None:
        about = About("simulation", tuple(paths))
        folder = RunFolder.create(Path(out), about=about).path.resolve()
        identity = identity_of(folder)
    try:
        found: dict[str, Any] = computed(
            "instep.offline.simulation:simulate", recipe, (cluster, gradients, folder), paths, watching,
            if_killed="a simulation of fewer workers takes less",
        )  # fmt: skip
    except BaseException:
        if folder is not None:  # half a simulation is of no use, and would be in the way of the next
            remove(folder, identity)
        raise
    return found


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
