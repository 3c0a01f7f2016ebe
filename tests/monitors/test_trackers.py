"""The trackers: what Weights & Biases, MLflow and Trackio hold is what the tape says, read from their own files."""

from __future__ import annotations

import json
import math
import shutil
import sqlite3
import struct
import sys
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import instep
from instep.artifacts.digits import write_png
from instep.errors import RecipeError, ResourceError
from instep.monitors.scalars import scalars
from instep.monitors.trackers import Tracker, tracker
from support.events import DIGEST, a_run, ended, evaluated, merged, started
from support.processes import INSTEP, Started, wait_until, write_project

pytestmark = pytest.mark.processes  # W&B writes from one of its own

Found = dict[str, list[tuple[int, float]]]
"""By the name of a number: (version, value) in the order of their arrival."""

RUN = "ab" * 16


def the_run(*, died: bool = False) -> Iterator[dict[str, Any]]:
    """A run with what a tracker reads of it."""
    for event in a_run(died=died):
        if event["kind"] == "run_started":
            event |= {"run": RUN, "folder": "/somewhere/gpt-2", "fingerprint": "f", "data_digest": "d"}
        elif event["kind"] == "merged":
            event |= {"lr": 0.5, "terms": {"a b": 1.5, "pull(x)": 2.5}}
        yield event


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path | None:
    """A store of MLflow's without a run: to make its tables takes seconds. None where it is not installed."""
    try:
        from mlflow import MlflowClient

        path = tmp_path_factory.mktemp("mlflow") / "empty.db"
        MlflowClient(f"sqlite:///{path}").search_experiments()
    except ImportError:
        return None
    return path


@pytest.fixture(autouse=True)
def _locally(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All three write below `tmp_path`, and tell nobody of it."""
    monkeypatch.chdir(tmp_path)
    slow = request.node.get_closest_marker("slow")  # as all that imports MLflow is
    if slow and (empty := request.getfixturevalue("empty_store")) is not None:
        shutil.copy(empty, tmp_path / "mlflow.db")
    for name, value in {
        "WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false",
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db", "MLFLOW_DISABLE_TELEMETRY": "true",
        "TRACKIO_DIR": str(tmp_path / "trackio"), "DO_NOT_TRACK": "true",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    for name, module in list(sys.modules.items()):  # it reads the variable when it is imported
        if name.startswith("trackio") and hasattr(module, "TRACKIO_DIR"):
            monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")


def records(path: Path) -> Iterator[Any]:
    """Those of an offline file of W&B's: a log in blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    raw, at, record = path.read_bytes(), 7, b""
    while at + 7 <= len(raw):
        _, length, kind = struct.unpack_from("<IHB", raw, at)
        if kind == 0 or at % 32768 > 32768 - 7:  # the rest of a block is empty
            at += 32768 - at % 32768
            continue
        record += raw[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield wandb_internal_pb2.Record.FromString(record)
            record = b""


def of_wandb(folder: Path) -> tuple[Found, dict[str, Any], list[str]]:
    """The numbers, the config, and the ids of its runs."""
    found: Found = defaultdict(list)
    config: dict[str, Any] = {}
    runs = []
    for path in sorted(folder.rglob("offline-run-*/*.wandb"), key=lambda each: each.stat().st_mtime):
        # `finish` may return before its other process has written the file.
        wait_until(lambda path=path: any(each.HasField("exit") for each in records(path)), 60, f"the end of {path}")
        for told in records(path):
            if told.HasField("run"):
                runs.append(told.run.run_id)
                config |= {item.key: json.loads(item.value_json) for item in told.run.config.update}
            elif told.HasField("history"):
                row = {each.key or ".".join(each.nested_key): json.loads(each.value_json) for each in told.history.item}
                for name, value in row.items():
                    if name != "version" and not name.startswith("_"):
                        found[name].append((row["version"], value))
    return found, config, runs


def of_mlflow(folder: Path) -> tuple[Found, dict[str, Any], list[str]]:
    from mlflow import MlflowClient

    client = MlflowClient()
    known = client.get_experiment_by_name("instep")
    assert known is not None
    runs = client.search_runs([known.experiment_id])
    found = {
        name: [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, name)]
        for run in runs
        for name in run.data.metrics
    }
    return found, {**runs[0].data.params, **runs[0].data.tags}, [run.data.tags["instep.run"] for run in runs]


def of_trackio(folder: Path) -> tuple[Found, dict[str, Any], list[str]]:
    found: Found = defaultdict(list)
    (path,) = (folder / "trackio").glob("*.db")
    with sqlite3.connect(path) as base:
        for step, metrics in base.execute("select step, metrics from metrics order by id"):
            for name, value in json.loads(metrics).items():
                found[name].append((step, value))
        configs = base.execute("select run_name, config from configs").fetchall()
    return found, json.loads(configs[-1][1]), [name for name, _ in configs]


class Kind:
    def __init__(self, make: Callable[[], Tracker], read: Callable[[Path], tuple[Found, dict[str, Any], list[str]]]):
        self.make, self.read = make, read


KINDS = {
    "wandb": Kind(lambda: instep.WandB(dir=tempfile.mkdtemp(dir=Path.cwd())), of_wandb),
    "mlflow": Kind(instep.MLflow, of_mlflow),
    "trackio": Kind(instep.Trackio, of_trackio),
}


@pytest.fixture(params=["wandb", "trackio", pytest.param("mlflow", marks=pytest.mark.slow)])
def kind(request: pytest.FixtureRequest) -> Kind:
    for package in {"mlflow": ("mlflow", "sqlalchemy")}.get(request.param, (request.param,)):
        pytest.importorskip(package)
    return KINDS[request.param]


def of_events(events: Iterator[dict[str, Any]]) -> Found:
    """Those of an independent reading."""
    found: Found = defaultdict(list)
    for event in events:
        version = event.get("version", 0)
        if event["kind"] == "merged":
            found["objective/train"].append((version, event["objective"]))
            found["optimizer/learning_rate"].append((version, 0.5))
            found["terms/a b"].append((version, 1.5))
            found["terms/pull(x)"].append((version, 2.5))
        elif event["kind"] == "evaluated":
            found["objective/held_out"].append((version, event["objective"]))
            found["objective/bits_per_byte"].append((version, event["bits_per_byte"]))
    return found


def named_for(kind: Kind, found: Found) -> Found:
    """MLflow refuses brackets in names."""
    return {n.replace("(", "_").replace(")", "_"): v for n, v in found.items()} if kind.read is of_mlflow else found


@pytest.mark.parametrize("died", [False, True])
def test_a_tracker_holds_the_numbers_of_every_step_by_version(kind: Kind, died: bool, tmp_path: Path) -> None:
    with kind.make() as tracker:
        for event in the_run(died=died):
            tracker(event)
    found, config, runs = kind.read(tmp_path)
    expected = named_for(kind, of_events(the_run(died=died)))
    found = {name: points for name, points in found.items() if not name.startswith("sample")}  # a text
    if kind.read is of_mlflow:  # gives them by step
        expected = {name: sorted(points) for name, points in expected.items()}
        found = {name: sorted(points) for name, points in found.items()}
    assert found == expected
    assert len(runs) == 1, "the team's restart is in the same run"
    assert "32" in json.dumps(config), "the recipe's batch"


def test_a_run_that_is_resumed_goes_on_in_the_trackers_run(kind: Kind, tmp_path: Path) -> None:
    for first, last in ((1, 2), (3, 4)):
        with kind.make() as tracker:
            for event in the_run():
                if event.get("version", 0) in range(first, last + 1) or event["kind"] == "run_started":
                    tracker(event)
    found, _, runs = kind.read(tmp_path)
    assert sorted(version for version, _ in found["objective/train"]) == [1, 2, 3, 4]
    assert len(set(runs)) == 1


@pytest.mark.slow
def test_mlflow_says_how_a_run_ended() -> None:
    pytest.importorskip("sqlalchemy")
    from mlflow import MlflowClient

    def status() -> tuple[str, str | None]:
        (run,) = MlflowClient().search_runs(["1"])
        return run.info.status, run.data.tags.get("instep.digest")

    with instep.MLflow() as tracker:
        tracker(next(event for event in the_run() if event["kind"] == "run_started"))
        assert status() == ("RUNNING", None)
    assert status() == ("FAILED", None), "it has told no end"
    with instep.MLflow() as tracker:
        for event in the_run():
            tracker(event)
    assert status() == ("FINISHED", DIGEST)
    with instep.MLflow() as tracker:
        for event in the_run():
            tracker({**event, "interrupted": True})
    assert status() == ("KILLED", DIGEST)


def test_a_run_goes_on_without_a_tracker_that_raises_and_says_so_once(
    kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = kind.make()
    tracker(next(event for event in the_run() if event["kind"] == "run_started"))

    def fail(*_: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(tracker, "_log", fail)
    with pytest.warns(UserWarning, match=rf"the run goes on without {tracker.title}, which raised ConnectionError: no"):
        tracker(merged(3.0, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tracker(merged(4.0, 2))
        tracker.close()
    if kind.read is of_wandb:  # else the next one in this process would go on with it
        tracker._run.finish()  # type: ignore[attr-defined]


@pytest.mark.slow
def test_a_tracker_that_cannot_begin_is_a_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("sqlalchemy")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path}/mlruns")  # refused by MLflow 3.17
    with pytest.raises(
        ResourceError, match="MLflow cannot begin a run: MlflowException: The filesystem tracking backend"
    ):
        instep.MLflow()(next(event for event in the_run() if event["kind"] == "run_started"))


@pytest.mark.parametrize(
    ("package", "title"), [("wandb", "Weights & Biases"), ("mlflow", "MLflow"), ("trackio", "Trackio")]
)
def test_without_the_package_it_is_a_sentence(package: str, title: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    told = rf"{title} is not installed; install it with: pip install 'instep\[{package}\]'"
    with pytest.raises(ResourceError, match=told):
        tracker(package)


def test_another_name_is_refused_with_a_suggestion() -> None:
    with pytest.raises(RecipeError, match="'wanbd' is no tracker; did you mean 'wandb'"):
        tracker("wanbd")
    with pytest.raises(RecipeError, match="'x' is no tracker; the trackers are wandb, mlflow, trackio"):
        tracker("x")


def test_numbers_that_are_not_finite_are_left_out() -> None:
    event = merged(1.0, 1, objective=math.nan, lr=math.inf, grad_norm=2.0, staleness=[0, 3])
    assert scalars(event) == {"optimizer/gradient_norm": 2.0, "rule/staleness": 3}
    assert scalars(evaluated(1.0, 1, gathered={"f1": 0.5, "auc": math.nan})) == {
        "objective/held_out": 3.25, "held_out/f1": 0.5
    }  # fmt: skip
    assert scalars(started()) == {}


@pytest.mark.slow
def test_a_flag_hands_a_run_to_all_three(tmp_path: Path) -> None:
    for package in ("wandb", "mlflow", "sqlalchemy", "trackio"):
        pytest.importorskip(package)
    command = [*INSTEP, "train", "my.toml", "--steps", "7", "--track", "wandb,mlflow,trackio", "--out", "run"]
    run = Started(command, write_project(tmp_path))
    assert run.ends(120) == 0, run.err
    for kind in KINDS.values():
        found, _, _ = kind.read(tmp_path)
        assert sorted(version for version, _ in found["objective/train"]) == list(range(1, 8))
    assert "Traceback" not in run.err


def made(folder: Path) -> list[dict[str, Any]]:
    """A run that shows a picture, a text and a figure on its way and at its end."""
    run = folder / "run"
    for name in ("artifacts-at/2/samples.png", "artifacts/samples.png"):
        (run / name).parent.mkdir(parents=True)
        write_png(run / name, torch.zeros(3, 5, dtype=torch.uint8))
    start = next(event for event in the_run() if event["kind"] == "run_started") | {"folder": str(run)}
    sampled = {
        "t_s": 3.0, "kind": "sampled", "version": 2, "sample": "def <f>", "took_s": 0.1,
        "files": ["artifacts-at/2/samples.png", "gone"], "figures": {"recognised": 0.5, "note": "x"},
    }  # fmt: skip
    artifacts = {"files": ["artifacts/samples.png"], "figures": {}}
    return [start, sampled, merged(4.0, 3), ended(5.0, 3, sample="at the end", artifacts=artifacts)]


def test_what_a_run_makes_is_shown_by_version(kind: Kind, tmp_path: Path) -> None:
    with kind.make() as tracker, warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for event in made(tmp_path):
            tracker(event)
    found, _, _ = kind.read(tmp_path)
    assert found["artifacts/recognised"] == [(2, 0.5)], dict(found)
    if kind.read is of_mlflow:
        from mlflow import MlflowClient

        client = MlflowClient()
        (run,) = client.search_runs(["1"])
        listed = [each.path for at in (2, 3) for each in client.list_artifacts(run.info.run_id, f"version-{at}")]
        assert listed == [f"version-{at}/{name}" for at in (2, 3) for name in ("sample.txt", "samples.png")]
    else:
        versions = {name.partition("._")[0]: [version for version, _ in points] for name, points in found.items()}
        assert versions["samples.png"] == versions["sample"] == [2, 3]
        assert "image" in str(found.get("samples.png._type", found.get("samples.png")))
