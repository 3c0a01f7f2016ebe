"""`instep plan`: the whole of it, as a function. No torch: who computes has it."""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Iterable, Sequence

from instep.api import folders_of, monitors_of
from instep.errors import RecipeError, shown
from instep.monitors import Monitor
from instep.monitors.progress import duration
from instep.planning.asked import Computation, PlanAsked
from instep.planning.checkpoints import interval_s, lost_share
from instep.planning.described import Description
from instep.planning.found import By, Checkpoints, Planned, PlanWork, Way, choose, pareto
from instep.planning.ways import usual_rules, usual_workers
from instep.recipe import Recipe
from instep.rules.presets import text_of
from instep.rules.rule import UpdateRule
from instep.tables import to_table
from instep.team.client import computed

SHARE = 0.25
"""Of the work of trying all ways."""

SEEDS = 3


def plan(
    recipe: Recipe,
    cluster: Description,
    *,
    target: float,
    by: By = "time",
    rules: Sequence[UpdateRule] = (),
    workers: Sequence[int] = (),
    seeds: Sequence[int] = (),
    budget: float = SHARE,
    given: Sequence[str] = (),
    monitors: Iterable[Monitor] = (),
    import_paths: Sequence[str | os.PathLike[str]] = (),
) -> Planned:
    """Finds which rule and how many workers of `cluster` bring `recipe` to a held-out objective of `target` first, or
    with the fewest bytes.

    rules, workers: that are considered; () for the usual ones. seeds: the first one decides who is computed further,
    the others tell how far chance goes; () for the recipe's own and the two after it. budget: the work, as a share of
    that of trying all. given: what names the recipe in the command, its name or file and flags; () for its name alone.
    Raises InstepError.
    """
    if not math.isfinite(target):
        raise RecipeError(f"'target' is {target}; it must be a finite number, the held-out objective to reach.")
    counts = list(workers) or usual_workers(cluster, recipe.microbatches)
    for count in counts:
        if not 1 <= count <= cluster.workers:
            raise RecipeError(
                f"'workers' has {shown(count)} and the cluster has {cluster.workers}; it must be from 1 to that."
            )
    named = {text_of(rule): rule for rule in (rules or usual_rules(recipe))}
    seeds = tuple(seeds) or tuple(range(recipe.seed, recipe.seed + SEEDS))
    found: Computation = computed(
        "instep.planning.computing:compute", recipe, (PlanAsked(cluster, named, counts, target, by, seeds, budget),),
        folders_of(import_paths), monitors_of(monitors),
        if_killed="a plan holds a model of each rule that is still in the race: consider fewer rules",
    )  # fmt: skip
    finalists = [found.ways[place] for place in found.finalists]
    pick, undecided = choose(finalists, by)
    rivals = [found.ways[place] for place in found.rivals]
    undecided = (*undecided, *(way for way in rivals if way not in undecided and way is not pick))
    checkpoints = None if pick is None else checkpoints_for(recipe, cluster, pick, found.checkpoint_s)
    return Planned(
        recipe=recipe.name, fingerprint=recipe.fingerprint(), cluster=to_table(cluster), target=target, by=by,
        seeds=seeds, ways=tuple(found.ways), pick=pick, undecided=undecided, pareto=pareto(found.ways, by),
        checkpoints=checkpoints, command="" if pick is None else command(given or [recipe.name], pick, checkpoints),
        work=PlanWork(found.all, found.allowed, found.spent, found.timed, round(found.cpu_s, 3)),
    )  # fmt: skip


def checkpoints_for(recipe: Recipe, cluster: Description, way: Way, checkpoint_s: float) -> Checkpoints:
    """How often a checkpoint pays under `way`."""
    assert way.seconds_all is not None, "it was timed"
    failing = cluster.failing
    if failing is None:
        return Checkpoints(None, None, checkpoint_s, None, "The cluster has no failures, so no interval follows.")
    mean_s = failing.mean_time_between_s
    every_s = interval_s(checkpoint_s, mean_s)
    step_s = way.seconds_all / recipe.steps
    steps = max(1, min(recipe.steps, round(every_s / step_s)))
    share = lost_share(steps * step_s, checkpoint_s, mean_s)
    why = (
        f"A checkpoint takes {checkpoint_s:.2g} s, and the machine that has the run folder, whose failure takes "
        f"the run back to the last one, fails every {duration(mean_s)}: one every {steps:,} global batches, "
        f"{duration(steps * step_s)}, costs the least, {100 * share:.2g} % of the time."
    )
    return Checkpoints(steps, steps * step_s, checkpoint_s, mean_s, why)


def command(given: Sequence[str], way: Way, checkpoints: Checkpoints | None) -> str:
    """What starts the run."""
    words = ["instep", "train", *given, "--rule", way.rule, "--workers", str(way.workers)]
    if checkpoints is not None and checkpoints.every_steps is not None:
        words += ["--team.checkpoint_every", str(checkpoints.every_steps)]
    return shlex.join(words)
