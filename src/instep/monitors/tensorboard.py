"""TensorBoard as a tracker: a monitor that writes a run's events as TensorBoard's. Needs the extra ``tensorboard``.

It reads events and nothing else, so it follows a run that is going on, or takes the tape of one that has ended::

    instep.train(recipe, monitors=[instep.TensorBoard("runs/gpt/tensorboard")])

    from instep.record import tape

    with instep.TensorBoard("runs/gpt/tensorboard") as tracker:
        for event in tape.read("runs/gpt/tape.jsonl"):
            tracker(event)
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from instep.errors import ResourceError
from instep.monitors import Closing
from instep.monitors.made import MadeOf, made_of, picture_size
from instep.monitors.scalars import scalars
from instep.record.files import disk_error

_NEEDED = "TensorBoard is not installed; install it with: pip install 'instep[tensorboard]'."

_FILES = itertools.count()


class TensorBoard(Closing):
    """Writes scalars by version into `folder`: objective, terms, learning rate, gradient norm, staleness, held-out.

    After a restart or a resume TensorBoard is told to forget what came after the version that the run goes on from.
    Every event is in the file at once. If the disk fails while a run is going on, the run goes on untracked.

    Raises ResourceError where TensorBoard is not installed or, at the first event, the folder cannot be written to.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.plugins.text.summary_v2 import text_pb
            from tensorboard.summary.writer.record_writer import RecordWriter
        except ImportError:
            raise ResourceError(_NEEDED) from None
        self._events, self._summaries, self._record_writer = event_pb2, summary_pb2, RecordWriter
        self._text: Any = text_pb
        self._folder = Path(folder)
        self._file: BinaryIO | None = None
        self._began_s: float | None = None
        self._broken = False
        self._run = Path()

    def _open(self) -> None:
        """Opens the file at the first event: the run folder, where it may lie, is not there before."""
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}.{next(_FILES)}"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._file = open(self._folder / name, "xb")  # noqa: SIM115  # `close` closes it
        except OSError as error:
            raise disk_error(f"TensorBoard's folder {self._folder} cannot be written to", error) from error
        self._records: Any = self._record_writer(self._file)
        self._write(self._events.Event(wall_time=time.time(), file_version="brain.Event:2"))

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Writes what `event` holds; kinds that it does not know are passed over."""
        if self._file is None and not self._broken:
            self._open()
        kind, t_s = event["kind"], float(event["t_s"])
        if self._began_s is None or kind == "run_started":
            self._began_s = time.time() - t_s
        if kind == "run_started":
            self._run = Path(event.get("folder", ""))
        if kind == "run_started" and event["resumed"]:
            log = self._events.SessionLog(status=self._events.SessionLog.START)
            # What has this step or a later one is forgotten.
            self._add(t_s, event["version"] + 1, session_log=log)
        elif kind in ("merged", "evaluated", "sampled", "run_ended"):
            values = [
                self._summaries.Summary.Value(tag=tag, simple_value=value) for tag, value in scalars(event).items()
            ]
            if kind in ("sampled", "run_ended"):
                values += self._made(made_of(event, self._run))
            if values:
                self._add(t_s, event["version"], summary=self._summaries.Summary(value=values))

    def _made(self, made: MadeOf) -> list[Any]:
        """Its pictures, and its text."""
        value, image = self._summaries.Summary.Value, self._summaries.Summary.Image
        found = []
        for name, path in made.pictures.items():
            with contextlib.suppress(OSError):  # it may be gone by now
                width, height = picture_size(path)
                shown = image(width=width, height=height, encoded_image_string=path.read_bytes())
                found.append(value(tag=name, image=shown))
        return found + (list(self._text("sample", made.text).value) if made.text is not None else [])

    def _add(self, t_s: float, version: int, **content: Any) -> None:
        assert self._began_s is not None
        self._write(self._events.Event(wall_time=self._began_s + t_s, step=version, **content))

    def _write(self, event: Any) -> None:
        if self._broken:
            return
        assert self._file is not None
        try:
            self._records.write(event.SerializeToString())
            self._file.flush()
        except OSError:
            self._broken = True

    def close(self) -> None:
        """Closes the file; what follows is not tracked."""
        self._broken = True
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
