"""Whether a team can train a recipe, and with how many workers."""

from __future__ import annotations

from dataclasses import replace

from instep.errors import RecipeError
from instep.recipe import Recipe, Team, engine_of
from instep.rules import UpdateRule


def check_team(recipe: Recipe, team: Team) -> None:
    """Raises RecipeError where `team` cannot train `recipe`, with any number of workers that it may have."""
    limits = team.limits
    for count in (team.workers,) if limits is None else (limits.most, limits.least):
        check_workers(recipe.rule, recipe.microbatches, replace(team, workers=count))
    if limits is not None and (team.device == "cuda" or team.when_lost == "wait"):
        gpus, hosts = "'team.device' 'cuda' has a GPU for each worker", "'team.when_lost' 'wait' waits for all hosts"
        why = gpus if team.device == "cuda" else hosts
        raise RecipeError(f"'team.bounds' has the number of workers follow what is there, and {why}; leave one out.")
    if team.audit and engine_of(recipe, team) != "lockstep":
        raise RecipeError(
            f"'team.audit' is for workers in lockstep, without a server, and the rule is '{recipe.rule.name}'; leave "
            f"it out, and verify the run afterwards (instep verify)."
        )
    if team.audit and (team.mixed_processors or not team.deterministic):
        why = "'team.mixed_processors'" if team.mixed_processors else "'team.deterministic' false"
        raise RecipeError(
            f"'team.audit' compares bits, and with {why} sound workers may come to others; leave one of the two out."
        )
    if team.engine == "lockstep" and not recipe.rule.synchronous:
        raise RecipeError(
            f"team.engine 'lockstep' takes synchronous rules alone, and the rule is '{recipe.rule.name}'; set "
            f"team.engine to 'auto'."
        )


def with_room(team: Team, room: int) -> Team:
    """The team with as many workers as there is room for on this machine, where it has bounds. Raises RecipeError where
    that is too little.
    """
    if (limits := team.limits) is None:
        return team
    if room < limits.least:
        raise RecipeError(
            f"'team.bounds' is '{team.bounds}', and this machine has room for {room}, one worker for each processor "
            f"and its threads; lower the least, or give a number of workers."
        )
    return replace(team, workers=limits.within(room))


def check_workers(rule: UpdateRule, microbatches: int, team: Team) -> None:
    """Raises RecipeError where this team cannot have so many workers under the rule, or so few."""
    rule.check_workers(team.workers)
    if team.slow:
        from instep.clock.slow import parse_slow, slowness

        slowness(parse_slow(team.slow), team.workers)
    if team.audit and team.workers == 1:
        raise RecipeError(
            "'team.audit' has workers compute microbatches of each other's again, and there is 1 worker; take at least "
            "2, or leave it out and verify the run afterwards (instep verify)."
        )
    if rule.lockstep and team.workers > microbatches:
        raise RecipeError(
            f"{team.workers} workers are more than the {microbatches} microbatches of a step, which are never "
            f"split; take at most {microbatches} workers, or raise recipe.microbatches."
        )
