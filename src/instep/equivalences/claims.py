"""Which equivalences there are, and the recipe that they are tried on. No torch."""

from __future__ import annotations

from dataclasses import replace

from instep.recipe import Recipe
from instep.rules.presets import synchronous
from instep.watch import Watch

STEPS = 4
"""Of training, that teams compute."""

SAVED = 2
"""The version that a resume goes on from."""

BUDGETS = ("40%", "60%", "80%", "95%")
"""Of the activations' bytes, the first for which there is a plan."""

CLAIMS = {
    "recipe": "Instep takes the recipe",
    "data": "samples read twice, and in another order, are alike",
    "workers": "any number of workers gives one digest",
    "full batch": "the gradient is that of the whole batch in one process",
    "optimizer": "the optimizer, saved and loaded, makes the same next step",
    "resume": "a run that is saved and resumed goes on exactly",
    "memory": "recomputing activations changes no bit",
    "staleness 0": "a bound of staleness 0 on a server is synchronous",
    "replay": "an asynchronous run, replayed from its tape, is the same",
    "processes": "a team that loses a worker, is ended and resumed, gives the same bits",
}
"""The equivalences, in their order, and what each says."""

REFUSED = "Instep refuses the recipe"


def short(recipe: Recipe, steps: int = STEPS) -> Recipe:
    """The recipe for a check: as it stands, but for its length and for what only looks."""
    skipping = Watch(bad_batch=recipe.watch.bad_batch, bad_batches=recipe.watch.bad_batches)
    return replace(
        recipe, steps=steps, rule=synchronous(), watch=skipping, changes=(), evaluate_every=0, evaluate_samples=1,
        checksum_every=1, sample_length=0, sample_prompt="", artifacts=None, artifacts_every=0,
    )  # fmt: skip
