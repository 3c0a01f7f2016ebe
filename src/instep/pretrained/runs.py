"""Models from the folder of an earlier run: teachers, references, and what training goes on from."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from instep.components import importable
from instep.errors import ComponentError, RecordError
from instep.recipe import Recipe, parse
from instep.recipe_files import read_saved
from instep.record import checkpoint
from instep.record.averages import give_average
from instep.record.digest import digest_of_state
from instep.record.folder import RunFolder
from instep.sources import note_loaded


@dataclass(frozen=True)
class Trained:
    """What a run has trained: its newest weights. import_paths: where its modules were looked for."""

    folder: RunFolder
    recipe: Recipe
    model: nn.Module
    import_paths: tuple[str, ...]

    @classmethod
    def of(cls, run: str | os.PathLike[str], digest: str | None = None, ema: float | None = None) -> Trained:
        """See `run_model`."""
        try:
            folder = RunFolder.open(Path(run))
        except RecordError as error:
            raise ComponentError(f"no model can be taken from an earlier run: {error.message}") from None
        path, problems = folder.newest_checkpoint()
        if path is None:
            raise ComponentError(
                f"the run {folder.path} has no sound checkpoint to take a model from; train it first, or give another "
                f"one.",
                detail="\n".join(problems),
            )
        saved = checkpoint.load(path)
        if digest is not None and saved.digest != digest:
            raise ComponentError(
                f"the newest weights of {folder.path} have the digest {saved.digest}, and {digest} are asked for; give "
                f"the run that has them, or leave the digest out."
            )
        recipe, _ = parse(read_saved(folder.recipe_path))
        about = folder.about()
        paths = () if about is None else about.import_paths
        with importable(paths):
            model = recipe.model.build()
        if not isinstance(model, nn.Module):
            raise ComponentError(f"the model of {folder.path} is a {type(model).__name__}, not a torch.nn.Module.")
        model.load_state_dict(saved.model_state)
        if ema is None:
            note_loaded(f"model of the run {os.fspath(run)}", saved.digest)
        else:
            give_average(model, saved, ema)
            note_loaded(f"average {ema} of the run {os.fspath(run)}", digest_of_state(model.state_dict()))
        return cls(folder, recipe, model, paths)


def run_model(run: str | os.PathLike[str] = "", digest: str | None = None, ema: float | None = None) -> nn.Module:
    """The model of the run in the folder `run`, with the weights of its newest sound checkpoint, on the CPU.

    digest: of the weights that it must have. A recipe names the folder, not the weights: give it where the result must
    not change when that run goes on. ema: the decay of the average of the weights to take in their place, of the run's
    `Recipe.ema`. Raises ComponentError where there is no such run, or it has other weights, RecordError where it has no
    such average, and CheckpointError where its checkpoints are damaged.
    """
    if not os.fspath(run):
        raise ComponentError(
            "no earlier run was named to take a model from; train one with 'instep train gpt' and give its folder, as "
            "in: --recipe.objective.args.teacher.args.run runs/gpt."
        )
    return Trained.of(run, digest, ema).model
