"""Models from the folder of an earlier run: teachers, references, and what training goes on from."""

from __future__ import annotations

import os
from pathlib import Path

from torch import nn

from instep.errors import ComponentError, RecordError
from instep.recipe import parse
from instep.recipe_files import read_saved
from instep.record import checkpoint
from instep.record.folder import RunFolder


def run_model(run: str | os.PathLike[str] = "", digest: str | None = None) -> nn.Module:
    """The model of the run in the folder `run`, with the weights of its newest sound checkpoint, on the CPU.

    digest: of the weights that it must have. A recipe names the folder, not the weights: give it where the result must
    not change when that run goes on. Raises ComponentError where there is no such run, or it has other weights, and
    CheckpointError where its checkpoints are damaged.
    """
    if not os.fspath(run):
        raise ComponentError(
            "no earlier run was named to take a model from; train one with 'instep train gpt' and give its folder, as "
            "in: --recipe.objective.args.teacher.args.run runs/gpt."
        )
    try:
        folder = RunFolder.open(Path(run))
    except RecordError as error:
        raise ComponentError(f"no model can be taken from an earlier run: {error.message}") from None
    path, problems = folder.newest_checkpoint()
    if path is None:
        raise ComponentError(
            f"the run {folder.path} has no sound checkpoint to take a model from; train it first, or give another one.",
            detail="\n".join(problems),
        )
    saved = checkpoint.load(path)
    if digest is not None and saved.digest != digest:
        raise ComponentError(
            f"the newest weights of {folder.path} have the digest {saved.digest}, and {digest} are asked for; give the "
            f"run that has them, or leave the digest out."
        )
    recipe, _ = parse(read_saved(folder.recipe_path))
    model = recipe.model.build()
    if not isinstance(model, nn.Module):
        raise ComponentError(f"the model of {folder.path} is a {type(model).__name__}, not a torch.nn.Module.")
    model.load_state_dict(saved.model_state)
    return model
