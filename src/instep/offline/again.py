"""A part of a run computed again, see `instep.offline.stretches`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from instep.errors import RecordError
from instep.offline.stretches import Stretch, ToldEvent
from instep.offline.tape_replay import Playback, known_writes
from instep.recipe import Recipe
from instep.record import checkpoint
from instep.record.files import synced_file
from instep.record.weights import write_weights

if TYPE_CHECKING:
    from instep.team.child import Tell

Observe = Callable[[Playback, int], None]
"""Sees the playback at a version: that it begins with, and then after each update."""


def played(recipe: Recipe, stretch: Stretch, observe: Observe = lambda playback, version: None) -> Playback:
    """The playback at the end of `stretch`; where it differs from the tape on its way, its `divergence` says so.

    Raises RecordError where the tape is of another recipe or lacks what it needs, CheckpointError, and InstepError as
    the run would.
    """
    first, *others = stretch.events
    begin = None if stretch.checkpoint is None else checkpoint.load(stretch.checkpoint)
    with known_writes():
        playback = Playback(recipe, first, begin, lambda version: observe(playback, version))
        playback.start(first)
        observe(playback, stretch.start)
        for event in map(ToldEvent, others):
            if event["kind"] == "run_started":
                playback.start(event)
            else:
                playback.take(event)
        playback.reach(stretch.stop)
    return playback


def save_weights_at(recipe: Recipe, stretch: Stretch, into: Path, ema: float | None, tell: Tell) -> None:
    """Writes the weights of version `stretch.stop`, as a checkpoint would, or with `ema` their average of this decay,
    into a .safetensors file.

    Raises RecordError where what is computed is not what the tape tells of.
    """
    playback = played(recipe, stretch, lambda _, version: tell({"kind": "computed_again", "version": version}))
    if playback.divergence:
        raise RecordError(
            f"version {stretch.stop:,} of the run cannot be computed here: from version {stretch.start:,} on the run "
            f"comes to something else than its tape tells: {playback.divergence}"
        )
    with synced_file(into) as file:
        write_weights(file, playback.replica.saved_state(ema))
