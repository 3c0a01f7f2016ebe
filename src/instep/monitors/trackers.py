"""Trackers: monitors that hand a run's numbers to Weights & Biases, MLflow or Trackio. Each needs its extra.

They read events and nothing else, so they follow a run that is going on, or take the tape of one that has ended::

    with instep.WandB(project="gpt") as tracker:
        instep.train(recipe, monitors=[tracker])

Where a run is resumed, or its tape is given again, the tracker's run of the same Instep run goes on. None of the three
can take back what it holds: steps that are done again, after a worker's death, are there twice, by their version.
"""

from __future__ import annotations

import contextlib
import html
import importlib
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

from instep.errors import RecipeError, ResourceError, described, shown
from instep.monitors import Closing
from instep.monitors.made import MadeOf, made_of
from instep.monitors.scalars import scalars
from instep.tables import suggest

_SUMMARY = ("objective_last", "held_out", "bits_per_byte", "wall_s", "items_per_s", "steps", "restarts")
"""Of the result: what is worth a column in a table of runs."""


class Tracker(Closing):
    """What the trackers share: the numbers of an event by name, and that a run outlives its tracker.

    Once the tracker's run has begun, whatever its package raises is warned of once and the run goes on untracked.
    Raises ResourceError where the package is not installed or, at the first event, the tracker's run cannot begin.
    """

    package: str
    title: str

    def __init__(self) -> None:
        try:
            self._module: Any = importlib.import_module(self.package)
        except ImportError:
            raise ResourceError(
                f"{self.title} is not installed; install it with: pip install 'instep[{self.package}]'."
            ) from None
        self._began_s, self._folder = 0.0, Path()
        self._state = "waiting"

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Hands on the numbers of `event`; of kinds without any it hands on nothing."""
        if event["kind"] == "run_started" and self._state == "waiting":
            self._began_s, self._folder = time.time() - float(event["t_s"]), Path(event["folder"])
            try:
                self._begin(event)
            except Exception as error:
                raise ResourceError(f"{self.title} cannot begin a run: {described(error)}") from error
            self._state = "open"
        elif self._state != "open":
            return
        elif found := scalars(event):
            with self._surviving():
                self._log(event["version"], self._began_s + float(event["t_s"]), found)
        if event["kind"] in ("sampled", "run_ended") and self._state == "open":
            with self._surviving():
                self._show(event["version"], made_of(event, self._folder))
        if event["kind"] == "run_ended" and self._state == "open":
            told = {"digest": event["digest"], "interrupted": event["interrupted"]}
            told |= {key: event["result"].get(key) for key in _SUMMARY}
            self._close({key: value for key, value in told.items() if value is not None})

    def close(self) -> None:
        """Ends the tracker's run, as one that failed where the run has not told its end."""
        if self._state == "open":
            self._close(None)
        self._state = "closed"

    def _close(self, told: dict[str, Any] | None) -> None:
        self._state = "closed"
        with self._surviving():
            self._end(told)

    @contextlib.contextmanager
    def _surviving(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._state = "closed"
            warnings.warn(f"the run goes on without {self.title}, which raised {described(error)}", stacklevel=4)

    def _begin(self, event: Mapping[str, Any]) -> None:
        raise NotImplementedError

    def _log(self, version: int, at_s: float, found: dict[str, float]) -> None:
        """`at_s`: seconds since 1970."""
        raise NotImplementedError

    def _show(self, version: int, made: MadeOf) -> None:
        """What the model of this version has made; by default nothing of it is shown."""

    def _end(self, told: dict[str, Any] | None) -> None:
        """`told`: what a run that has ended says of itself."""
        raise NotImplementedError


class _Begun(Tracker):
    """One whose package has an `init`, which takes the `options` and gives the tracker's run."""

    def __init__(self, project: str = "instep", **options: Any) -> None:
        super().__init__()
        self._options = {"project": project, **options}

    def _init(self, **ours: Any) -> Any:
        """Begins the run; of what both say, the user's holds."""
        return self._module.init(**{**ours, **self._options})

    def _log(self, version: int, at_s: float, found: dict[str, float]) -> None:
        self._send(version, found)

    def _show(self, version: int, made: MadeOf) -> None:
        shown: dict[str, Any] = {name: self._module.Image(str(path)) for name, path in made.pictures.items()}
        if made.text is not None:
            shown["sample"] = self._text(made.text)
        if shown:
            self._send(version, shown)

    def _send(self, version: int, found: Mapping[str, Any]) -> None:
        raise NotImplementedError

    def _text(self, text: str) -> Any:
        """As the tracker's package takes it."""
        raise NotImplementedError


class WandB(_Begun):
    """Weights & Biases; `options` are arguments of ``wandb.init``. What W&B calls step is Instep's `version`.

    ``WANDB_MODE=offline`` keeps it on the disk, below ``wandb/``.
    """

    package, title = "wandb", "Weights & Biases"

    def _begin(self, event: Mapping[str, Any]) -> None:
        settings = self._module.Settings(console="off")  # the terminal is the console monitor's
        self._run: Any = self._init(
            id=event["run"], resume="allow", name=_name(event), config=_config(event), settings=settings
        )
        self._run.define_metric("version", hidden=True)
        self._run.define_metric("*", step_metric="version")  # its own step may not go back

    def _send(self, version: int, found: Mapping[str, Any]) -> None:
        self._run.log({"version": version, **found})

    def _text(self, text: str) -> Any:
        return self._module.Html(f"<pre>{html.escape(text)}</pre>", inject=False)

    def _end(self, told: dict[str, Any] | None) -> None:
        self._run.summary.update(told or {})
        self._run.finish(exit_code=int(told is None))


class MLflow(Tracker):
    """MLflow, under `experiment`, where `tracking_uri` or, without it, MLFLOW_TRACKING_URI says."""

    package, title = "mlflow", "MLflow"

    def __init__(self, experiment: str = "instep", tracking_uri: str | None = None) -> None:
        super().__init__()
        self._experiment, self._uri = experiment, tracking_uri

    def _begin(self, event: Mapping[str, Any]) -> None:
        self._client: Any = self._module.MlflowClient(self._uri)
        known = self._client.get_experiment_by_name(self._experiment)
        number = known.experiment_id if known else self._client.create_experiment(self._experiment)
        run = event["run"] or ""  # a simulation has no id
        earlier = self._client.search_runs([number], f"tags.`instep.run` = '{run}'") if run else ()
        if earlier:
            self._id = earlier[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            return
        made = self._client.create_run(number, run_name=_name(event), tags={"instep.run": run})
        self._id = made.info.run_id
        values = [self._module.entities.Param(name, str(value)[:6000]) for name, value in _flat(_config(event))]
        for begin in range(0, len(values), 100):
            self._client.log_batch(self._id, params=values[begin : begin + 100])

    def _log(self, version: int, at_s: float, found: dict[str, float]) -> None:
        metric = self._module.entities.Metric
        taken = [
            metric(re.sub(r"[^\w./ -]", "_", name), value, int(at_s * 1000), version) for name, value in found.items()
        ]
        self._client.log_batch(self._id, metrics=taken)

    def _show(self, version: int, made: MadeOf) -> None:
        for name, path in made.files.items():
            self._client.log_artifact(self._id, str(path), str(PurePosixPath(f"version-{version}", name).parent))
        if made.text is not None:
            self._client.log_text(self._id, made.text, f"version-{version}/sample.txt")

    def _end(self, told: dict[str, Any] | None) -> None:
        for name, value in (told or {}).items():
            self._client.set_tag(self._id, f"instep.{name}", str(value))
        status = "FAILED" if told is None else "KILLED" if told["interrupted"] else "FINISHED"
        self._client.set_terminated(self._id, status)


class Trackio(_Begun):
    """Trackio; `options` are arguments of ``trackio.init``."""

    package, title = "trackio", "Trackio"

    def _begin(self, event: Mapping[str, Any]) -> None:
        name = f"{_name(event)}-{(event['run'] or 'simulated')[:8]}"
        self._run: Any = self._init(name=name, resume="allow", config=_config(event), embed=False)

    def _send(self, version: int, found: Mapping[str, Any]) -> None:
        self._run.log(found, step=version)

    def _text(self, text: str) -> Any:
        return self._module.Markdown(text)

    def _end(self, told: dict[str, Any] | None) -> None:
        self._run.finish()


TRACKERS: dict[str, Callable[[], Tracker]] = {"wandb": WandB, "mlflow": MLflow, "trackio": Trackio}


def tracker(name: str) -> Tracker:
    """The tracker that a flag names. Raises RecipeError for another name, and what its class raises."""
    if name not in TRACKERS:
        raise RecipeError(f"{shown(name)} is no tracker{suggest(name, TRACKERS, 'the trackers are')}")
    return TRACKERS[name]()


def _name(event: Mapping[str, Any]) -> str:
    return PurePath(event["folder"]).name or str(event["recipe"]["name"])


def _config(event: Mapping[str, Any]) -> dict[str, Any]:
    return {key: event[key] for key in ("recipe", "team", "fingerprint", "data_digest", "samples", "parameters")}


def _flat(table: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value
