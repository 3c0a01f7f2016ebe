"""The contender Instep: ``python -m benchmarks.by_instep OPTIONS``, the fields of `Options` as JSON.

It is `instep.train` as anyone calls it. As with the command line, this process imports no torch. A checkpoint comes at
the end alone, after the last step that is timed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import instep
from benchmarks.work import MODEL, SAMPLES, SEED, Options
from instep.rules import parse


def main(options: Options) -> None:
    """Trains, and leaves objective and digest."""
    own = options.microbatches // options.workers
    recipe = instep.Recipe(
        model={"use": "instep.models:GPT", "args": MODEL},
        objective={"use": "benchmarks.parts:GatedNextToken", "args": {"address": options.address, "own": own}},
        data="benchmarks.parts:text",
        optimizer="instep.optimizers:adamw",
        batch=SAMPLES * options.microbatches,
        microbatches=options.microbatches,
        steps=options.steps,
        seed=SEED,
        rule=parse(options.rule),
    )
    # The gate counts forwards, as many in each step.
    team = instep.Team(workers=options.workers, balance="off", checkpoint_every=1_000_000)
    run = instep.train(recipe, team=team, out=Path(options.folder, "run"))
    wire_bytes = run.result.get("wire_bytes")
    parameters = run.result["parameters"]
    options.leave(0, objective=run.objective, digest=run.digest, parameters=parameters, wire_bytes=wire_bytes)


if __name__ == "__main__":
    main(Options(**json.loads(sys.argv[1])))
