"""A finished run, as the program that trained it sees it. No torch until weights are asked for."""

from __future__ import annotations

import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from instep.components import importable
from instep.errors import CheckpointError, RecordError, ResourceError
from instep.recipe import Recipe
from instep.record.folder import RunFolder

if TYPE_CHECKING:
    from pandas import DataFrame
    from torch import Tensor, nn

    from instep.record.checkpoint import Loaded


@dataclass(frozen=True)
class Run:
    """A finished run. `result` is the content of its result.json."""

    path: Path
    result: dict[str, Any]
    recipe: Recipe
    import_paths: tuple[str, ...] = ()
    """Folders that the recipe's modules were looked for in."""
    agent: int = 0
    """Which of the run's agents this is: the first, 0, has the folder, whatever the launcher has started elsewhere."""

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

    def updates(self) -> list[dict[str, Any]]:
        """A row for each update that counts, by rising version: what `instep export --to csv` writes.

        Raises RecordError where the folder or its tape is gone.
        """
        from instep.report.export import updates

        return updates(self.path)

    def curves(self) -> DataFrame:
        """The `updates` as a data frame of pandas, with `version` as its index. Raises ResourceError without pandas."""
        try:
            from pandas import DataFrame
        except ImportError:
            raise ResourceError(
                "a data frame needs pandas: pip install pandas; run.updates() gives the same rows without."
            ) from None
        return DataFrame(self.updates()).set_index("version")

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        from instep.report.notebook import shown_run

        try:
            rows, place = self.updates(), str(self.path)
        except RecordError:  # moved since, or another agent's
            rows, place = [], ""
        return shown_run(self.result, rows, place)

    def state_dict(self, *, best: bool = False, ema: float | None = None) -> dict[str, Tensor]:
        """The final weights, from the last checkpoint; with `best`, those with the best held-out objective; with `ema`,
        their average of this decay, of `Recipe.ema`, or the best one.

        Raises CheckpointError if that checkpoint is missing, damaged or not theirs, and RecordError where it has no
        such average.
        """
        saved = self._saved(ema, best=best)
        return saved.model_state if ema is None else dict(self._averaged(saved, ema).state_dict())

    def _saved(self, ema: float | None, *, best: bool) -> Loaded:
        from instep.ema import name_of
        from instep.record import best as kept
        from instep.record import checkpoint

        folder = RunFolder(self.path).checkpoints
        if best:
            found = kept.read(folder, "" if ema is None else name_of(ema))
            if found is None:
                of = "" if ema is None else f" of an average of the decay {ema}"
                raise CheckpointError(
                    f"{self.path} has no best checkpoint{of}: nothing was evaluated, or team.keep_best was off."
                )
            return checkpoint.load(checkpoint.path_of(folder, found.version))
        path, _ = RunFolder(self.path).newest_checkpoint()
        if path is None:
            raise CheckpointError(f"{self.path} has no sound checkpoint.")
        saved = checkpoint.load(path)
        if saved.digest != self.digest:
            raise CheckpointError(
                f"the newest sound checkpoint of {self.path}, {path.name}, does not hold the weights that this run "
                f"ended with: its own was damaged, or the run has gone on since; load the checkpoint you want by path."
            )
        return saved

    def model(self, *, best: bool = False, ema: float | None = None) -> nn.Module:
        """The recipe's model with the final weights, or those with the best held-out objective, on the CPU; with `ema`,
        with their average of this decay, or the best one, as `state_dict` has it.

        It is as the recipe builds it, most often in training mode: call its `eval()` before you use it.

        >>> run.model()(torch.ones(1, 3)).shape
        torch.Size([1, 1])
        """
        saved = self._saved(ema, best=best)
        return self._model(saved.model_state) if ema is None else self._averaged(saved, ema)

    def at(self, version: int, *, ema: float | None = None) -> nn.Module:
        """The recipe's model with the weights of any version of the run, on the CPU, as `model` gives the last ones.

        >>> run.at(2)(torch.ones(1, 3)).shape
        torch.Size([1, 1])

        It is computed again, by a process of its own, from the nearest kept checkpoint before (under rules that no
        lockstep keeps, before which the run was resumed), or from the run's start; what the tape tells of the updates
        on the way is compared, which are objectives, gradients' items and the checksums of tensors. Where the run was
        made with other libraries or on another kind of processor, or by what need not repeat, it warns that bits may
        differ.

        version: updates that the weights have had, from 0. ema: as in `model`. Raises RecordError where the run has no
        such version or average, or what is computed is not what the tape tells of, CheckpointError, and InstepError as
        the run would.
        """
        from instep.offline.past import Past
        from instep.record.computed_by import made_otherwise, unrepeatable
        from instep.team.client import computed

        if ema is not None and ema not in self.recipe.ema:
            raise RecordError(
                f"the run {self.path} has no average of the decay {ema}: its recipe.ema is {list(self.recipe.ema)}; "
                f"give one of those, or leave it out."
            )
        past = Past.of(self.path, self.recipe, f"Run.at({version!r})")
        stretch = past.to(version)
        starts = [event for event in stretch.events if event["kind"] == "run_started"]
        unlike = next(filter(None, (made_otherwise(start) or unrepeatable(start) for start in starts)), "")
        if unlike:
            warnings.warn(
                f"{self.path} was made with {unlike}: the bits of version {version:,} may differ; its checksums are "
                f"compared where the tape has any.",
                stacklevel=2,
            )
        with tempfile.TemporaryDirectory(prefix="instep-at-", ignore_cleanup_errors=True) as place:
            file = Path(place) / "model.safetensors"
            computed(
                "instep.offline.again:save_weights_at", past.recipe, (stretch, file, ema), past.import_paths, (),
                if_killed="it takes the memory of one worker, under local steps of all: try it where there is more",
            )  # fmt: skip
            return self._model(_loaded(file))

    def _model(self, state: dict[str, Tensor]) -> nn.Module:
        from instep.worker.model import build_model

        with importable(self.import_paths):
            model = build_model(self.recipe.model)
        model.load_state_dict(state)
        return model

    def _averaged(self, saved: Loaded, ema: float) -> nn.Module:
        from instep.record.averages import give_average

        model = self._model(saved.model_state)
        give_average(model, saved, ema)
        return model


def _loaded(file: Path) -> dict[str, Tensor]:
    """Weights in memory of their own: the file will be gone."""
    import safetensors.torch

    return safetensors.torch.load(file.read_bytes())


class RunElsewhere(Run):
    """A finished run as an agent sees it that does not have its folder."""

    def __init__(self, agent: int, result: dict[str, Any], recipe: Recipe, import_paths: tuple[str, ...]):
        values = {"agent": agent, "result": result, "recipe": recipe, "import_paths": import_paths}
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @property
    def path(self) -> Path:
        raise RecordError(
            f"agent 0 has the run folder, and this is agent {self.agent}; ask for its path, weights and model where "
            f"run.agent is 0."
        )

    def __repr__(self) -> str:
        return f"Run(agent={self.agent}, result={self.result!r}, recipe={self.recipe!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RunElsewhere) and vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]  # as a Run, which holds tables
