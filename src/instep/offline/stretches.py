"""What of a run must be computed again to know one of its versions: from which checkpoint, by which events. No torch.

In lockstep any checkpoint will do, where all since was in lockstep. A server's run is taken up where a session of it
began, or at its start: what its workers had in hand at other checkpoints came from weights that no checkpoint holds.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from instep.errors import RecordError, shown
from instep.record import tape
from instep.record.folder import RunFolder

Event = Mapping[str, Any]

_OF_LOCKSTEP = ("run_started", "merged", "checksummed", "checkpointed")


class ToldEvent(dict[str, Any]):
    """An event of the tape, which says what it lacks."""

    def __missing__(self, field: str) -> Any:
        raise self.refers_to(field)

    def refers_to(self, what: object) -> RecordError:
        """The error where it refers to what is unknown."""
        return RecordError(
            f"the tape cannot be replayed: its event {self['kind']!r} at {self['t_s']} s refers to {what!r}, which no "
            f"earlier event tells of; a part of the tape is missing."
        )


@dataclass(frozen=True)
class Stretch:
    """From version `start`, of this checkpoint or else of the run's beginning, to `stop`, by these events of the tape.

    The first of them is a start of the run; it says with which recipe and of how many steps.
    """

    start: int
    stop: int
    checkpoint: Path | None
    events: tuple[Event, ...]

    @property
    def updates(self) -> int:
        """How many are computed."""
        return self.stop - self.start


def stretch_to(folder: RunFolder, events: Sequence[Event], stop: int, most: int | None = None) -> Stretch:
    """The shortest to version `stop`, from version `most` at most, which is `stop` if None.

    events: of the run's tape, as `that_count` gives them. Raises RecordError where the run has no such version.
    """
    _check(folder, events, stop)
    most = stop if most is None else most
    starts = [place for place, event in enumerate(events) if event["kind"] == "run_started"]
    told = tape.ToldCheckpoints()
    for event in events:
        told.note(event)
    if _started(events, stop)["engine"] == "lockstep":
        found = _kept(folder, told, lambda version: version <= most)
        start = _version_of(found)
        several = tuple(_in_lockstep(events, start, stop))
        if all(event["engine"] == "lockstep" for event in several if event["kind"] == "run_started"):
            return Stretch(start, stop, found, several)
    last = max(place for place in starts if events[place]["version"] < stop or not events[place]["version"])
    begins = _beginnings(events, [place for place in starts if place <= last])
    found = _kept(folder, told, lambda version: version <= most and version in begins)
    start = _version_of(found)
    return Stretch(start, stop, found, tuple(_served(events[begins[start] :], stop)))


def last_version(events: Iterable[Event]) -> int:
    """The last version that the tape tells of."""
    last = 0
    for event in events:
        if event["kind"] in ("run_started", "merged"):
            last = event["version"]
    return last


def that_count(events: Iterable[Event], known: Collection[str]) -> Iterator[Event]:
    """The events without starts of an unknown recipe that made no update: of a change that was given up.

    known: the fingerprints of the run's recipe, see `Recipe.fingerprints`. Raises RecordError where a start is of
    another recipe and made updates, or is the last.
    """
    held: list[Event] = []
    for event in events:
        if event["kind"] == "run_started":
            held = []
        if event["kind"] == "run_started" and event["fingerprint"] not in known:
            held = [event]
        elif held and event["kind"] != "merged":
            held.append(event)
        elif held:
            break
        else:
            yield event
    if held:
        raise RecordError(
            "the tape is of another recipe than the one given; replay it with the recipe in its run folder."
        )


def in_place(events: Iterable[Event]) -> list[Event]:
    """The events with each checkpoint right after the update that made its version.

    Of one that was written in the background the tape tells once it is whole, updates later; or never, where the run
    was killed before that, and went on from it. Under a server the place counts: it has what workers have in hand.
    """
    kept: list[Event] = []
    minutes: float = 0  # of the present session's team
    for event in events:
        if event["kind"] == "checkpointed" and "step_s" in event:
            place = _made_at(kept, event["version"])
            kept.insert(len(kept) if place is None else place, event)
            continue
        if event["kind"] == "run_started":
            if minutes and event["version"] and event["engine"] != "lockstep" and event.get("digest"):
                _tell_saved(kept, event)
            minutes = event.get("team", {}).get("checkpoint_minutes", 0)
        kept.append(event)
    return kept


def _tell_saved(kept: list[Event], start: Event) -> None:
    """Has the events tell of the checkpoint that a session begins from, if none of the last one does."""
    version = start["version"]
    place = _made_at(kept, version)
    if place is None or ("checkpointed", version) in ((each["kind"], each.get("version")) for each in kept[place:]):
        return
    kept.insert(place, {"t_s": start["t_s"], "kind": "checkpointed", "version": version, "digest": start["digest"]})


def _made_at(events: Sequence[Event], version: int) -> int | None:
    """The place after the update that made it, in the last session."""
    for place in range(len(events) - 1, -1, -1):
        if events[place]["kind"] == "merged" and events[place]["version"] == version:
            return place + 1
        if events[place]["kind"] == "run_started":
            return None
    return None


def not_refuted(events: Iterable[Event]) -> list[Event]:
    """The events without what an audit has found to be uncertain: the run knows, and has computed it again."""
    kept: list[Event] = []
    for event in events:
        if event["kind"] == "refuted":
            since = event["since"]
            starts = [place for place, e in enumerate(kept) if e["kind"] == "run_started" and e["version"] <= since]
            begun = starts[-1]  # sessions that began later did so from what is uncertain
            kept[begun:] = [e for e in kept[begun:] if e["kind"] not in _OF_LOCKSTEP or e["version"] <= since]
        kept.append(event)
    return kept


def _check(folder: RunFolder, events: Sequence[Event], stop: Any) -> None:
    if not events:
        raise RecordError(f"the tape of {folder.path} holds no start of a run; there is nothing to compute again.")
    if type(stop) is not int or stop < 0:
        raise RecordError(f"the version {shown(stop)} is none; give a whole number from 0, of updates.")
    last = last_version(events)
    if stop <= last:
        return
    ended = any(event["kind"] == "run_ended" and event["version"] == last for event in events[-50:])
    if ended:
        why = f"the run {folder.path} ended at version {last:,}"
    else:
        why = f"the tape of {folder.path} tells of no update after version {last:,}, for the run has not ended"
    raise RecordError(f"{why}, so it has no version {stop:,}; give one from 0 to {last:,}.")


def _started(events: Sequence[Event], version: int) -> Event:
    """The start of the session that made this version."""
    starts = [event for event in events if event["kind"] == "run_started"]
    return next((event for event in reversed(starts) if event["version"] < version), starts[-1])


def _kept(folder: RunFolder, told: tape.ToldCheckpoints, among: Callable[[int], bool]) -> Path | None:
    return folder.newest_checkpoint(told, among)[0]


def _version_of(path: Path | None) -> int:
    return 0 if path is None else int(path.name.rpartition("-")[2])


def _in_lockstep(events: Sequence[Event], start: int, stop: int) -> Iterator[Event]:
    """Of what counts in the end, the session that goes on from `start`, as if it began there, and all up to `stop`."""
    kept: list[Event] = []
    for event in events:
        if event["kind"] == "run_started":
            at = event["version"]
            again = ("run_started",)
            kept = [e for e in kept if e["version"] < at or (e["version"] == at and e["kind"] not in again)]
        if event["kind"] in _OF_LOCKSTEP:
            kept.append(event)
    sessions = [event for event in kept if event["kind"] == "run_started" and event["version"] <= start]
    first = {name: value for name, value in sessions[-1].items() if name != "digest"}
    yield {**first, "version": start}
    for event in kept:
        begins = event["kind"] == "run_started"
        if start < event["version"] and (event["version"] < stop or (event["version"] == stop and not begins)):
            yield event


def _beginnings(events: Sequence[Event], starts: Sequence[int]) -> dict[int, int]:
    """By version, the place of a session's start that no later one went back behind; with the run's own, as 0."""
    found: dict[int, int] = {}
    lowest: int | None = None
    for place in reversed(starts):
        version = events[place]["version"]
        if lowest is None or version <= lowest:
            found.setdefault(version, place)
            lowest = version
    return {**found, 0: found.get(0, starts[0])}


def _served(events: Iterable[Event], stop: int) -> Iterator[Event]:
    """Up to the last update that made version `stop`, without what a later session went back behind."""
    several: list[Event] = []
    for event in events:
        if event["kind"] == "run_started":
            begins = ("checkpointed", event["version"])
            saved = [place for place, e in enumerate(several) if (e["kind"], e.get("version")) == begins]
            del several[saved[-1] + 1 if saved else len(several) :]
        several.append(event)
    merges = [place for place, e in enumerate(several) if e["kind"] == "merged" and e["version"] == stop]
    for event in several[: merges[-1] + 1 if merges else 1]:
        if event["kind"] not in ("computed", "evaluated"):
            yield event
