"""A sample of a run computed again from its kept checkpoints, and compared with them and with its tape.

It needs nothing of who trained: no gradients, no worker's word. What is compared is what a replay compares, see
`instep.offline.tape_replay`, and the files of the checkpoints, weights and optimizer's state.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from instep.data import digest_without
from instep.errors import CheckpointError, NotComparableError, RecordError
from instep.offline.spans import RunSpan, SpanPart, drawn, spans_of
from instep.offline.stretches import ToldEvent
from instep.offline.tape_replay import Playback
from instep.recipe import Recipe
from instep.record import checkpoint
from instep.record.computed_by import libraries, made_otherwise, processor, unrepeatable, untold
from instep.record.digest import digest_of_state
from instep.record.folder import RunFolder
from instep.record.receipt import SpanVerified, Verified
from instep.record.tape import ToldCheckpoints
from instep.reduce.written import FirstWrite
from instep.worker.optimizer_state import difference, on_cpu

if TYPE_CHECKING:
    from instep.team.child import Tell

Events = Sequence[Mapping[str, Any]]

_COMPARED = ("optimizer", "buffers", "weights", "outer", "ema")
"""Of the training state, as far as both have it."""


def verify(
    recipe: Recipe, run: Path, events: Events, share: float, seed: int, tell: Tell = lambda event: None
) -> Verified:
    """Computes this share of the run's steps again. `tell` gets a `verified` event for each span.

    Raises NotComparableError where none of it can be compared here, and RecordError where the tape lacks what it needs.
    """
    began, folder = time.monotonic(), RunFolder(run)
    kept, problems, told = _kept(folder, recipe, events)
    spans = [span for span in spans_of(events, recipe.rule, kept) if span.steps]
    if not spans:
        raise RecordError(f"of the run {run} no step can be computed again: it has made none, or its tape lacks them.")
    why = {number: _not_comparable(span, events) for number, span in enumerate(spans)}
    here = [span for number, span in enumerate(spans) if not why[number]]
    if not here:
        raise NotComparableError(f"not comparable here: {next(iter(why.values()))}.")
    verifying = _Verifying(recipe, events, kept, told)
    found = []
    for part in drawn(here, share, seed):
        found.append(verifying.span(part))
        tell({"kind": "verified", "start": found[-1].start, "stop": found[-1].stop, "why": found[-1].why})
    last = max((place for place, event in enumerate(events) if event["kind"] == "run_started"), default=0)
    ended = next((event for event in events[last:] if event["kind"] == "run_ended"), None)
    return Verified(
        run=told.run, recipe=recipe.name, fingerprint=recipe.fingerprint(), rule=recipe.rule.name,
        engine=events[last]["engine"], seed=seed, sample=share, steps=sum(span.steps for span in spans),
        comparable=sum(span.steps for span in here), digest=ended["digest"] if ended else None, spans=tuple(found),
        problems=tuple(problems), libraries=libraries(), processor=processor(), took_s=time.monotonic() - began,
    )  # fmt: skip


def _kept(folder: RunFolder, recipe: Recipe, events: Events) -> tuple[dict[int, Path], list[str], ToldCheckpoints]:
    """The kept checkpoints by version that are what the tape tells of, and a sentence on each other one. Of what is
    later than the run has come again, after it was taken back, nothing is told.
    """
    told, starts = ToldCheckpoints(), set[int]()
    for event in events:
        told.note(dict(event))
        if event["kind"] == "run_started":
            starts = {version for version in starts if version <= event["version"]} | {event["version"]}
    check, fingerprints = folder.own_check(told), recipe.fingerprints()
    kept, problems = dict[int, Path](), []
    for version, path in checkpoint.by_version(folder.checkpoints).items():
        if version not in told.digests and version not in starts:
            continue
        try:
            manifest = checkpoint.read_manifest(path)
            check(path, manifest)
            expected = fingerprints[sum(change.version < version for change in recipe.changes)]
            checkpoint.check_recipe(path, saved=manifest.fingerprint, current=expected)
            kept[version] = path
        except CheckpointError as error:
            problems.append(error.message)
    if not kept and not problems:
        raise RecordError(f"the run {folder.path} has no kept checkpoint to compare with; restore its checkpoints/.")
    return kept, problems, told


def _not_comparable(span: RunSpan, events: Events) -> str:
    """Why what is computed here need not be what the run computed in this span, as a clause, or ""."""
    starts = [event for event in events[span.place : span.ends[-1].place] if event["kind"] == "run_started"]
    for started in (events[span.started], *starts):
        if unlike := made_otherwise(started):
            return f"the run was made with {unlike}; verify it where these are the same"
        if started["team"].get("device", "cpu") != "cpu" and not torch.cuda.is_available():
            return "the run was computed on a GPU, and here is none that torch can use; take a machine with one"
        if varies := unrepeatable(started):
            return f"the run was computed by {varies}"
    return ""


class _Verifying:
    """One span after another, by one replica."""

    def __init__(self, recipe: Recipe, events: Events, kept: Mapping[int, Path], told: ToldCheckpoints):
        self._recipe, self._events, self._kept, self._told = recipe, events, kept, told
        self._playback: Playback | None = None

    def span(self, part: SpanPart) -> SpanVerified:
        """What it comes to."""
        span, stop = part.span, part.end.version
        try:
            why = changed = self._begin(span)
            why = why or self._go_on(part)
            if why and not changed and (unknown := untold(self._events[span.started])):
                why += f" It was made with {unknown}, and others give other bits."
        except CheckpointError as error:
            why = error.message
        except FirstWrite as wrote:
            why = (
                f"here a forward wrote parameter '{wrote.names[0]}' in {wrote.where}, and the tape does not know of "
                f"it; the model depends on more than the batch, the seed and its own state."
            )
        playback = self._playback
        assert playback is not None, "it was begun"
        digest = digest_of_state(playback.replica.saved_state()) if playback.version == stop else ""
        return SpanVerified(span.version, stop, part.steps, digest, playback.proof, why)

    def _begin(self, span: RunSpan) -> str:
        """Takes the weights that it begins from, which must be those that the tape tells of. What is wrong, or ""."""
        started = dict(self._events[span.started])
        if self._playback is None:
            self._playback = Playback(self._recipe, started)
            self._check_data(started)
        saved = checkpoint.load(self._kept[span.version]) if span.version else None
        digest = started.pop("digest", None) if saved is not None else None
        if saved is not None:
            expected = self._told.digests.get(span.version, digest if started["version"] == span.version else None)
            held = digest_of_state(saved.model_state)
            if held != (expected or saved.digest):
                return (
                    f"the checkpoint {self._kept[span.version]}, from which it begins, holds weights with the digest "
                    f"{held}, and not {expected or saved.digest}."
                )
        self._playback.begin_again(started, saved)
        return self._playback.explained()

    def _check_data(self, started: Mapping[str, Any]) -> None:
        """Raises NotComparableError where the data here are others."""
        assert self._playback is not None
        left_out = {index for change in self._recipe.changes for index in change.skip_samples}
        digest, unread = digest_without(self._playback.replica.data, left_out)
        if digest != started["data_digest"] and not unread:
            raise NotComparableError(
                f"not comparable here: the data are not those that the run was trained on, whose digest is "
                f"{started['data_digest']}, and here it is {digest}; give those."
            )

    def _go_on(self, part: SpanPart) -> str:
        playback, stop = self._playback, part.end.version
        assert playback is not None
        for event in self._events[part.span.place : part.end.place + 1]:
            if event["kind"] == "run_started":
                playback.start(event)
            else:
                playback.take(ToldEvent(event))
            if playback.divergence:
                return playback.explained()
            told = self._told.digests.get(event.get("version", -1))
            inner = event["kind"] == "checkpointed" and event["version"] != stop and event["digest"] == told
            if inner and (why := self._differs(event["version"])):
                return why
        if event["kind"] == "run_ended" and event["digest"] != digest_of_state(playback.replica.saved_state()):
            return f"version {stop}, the last, has other weights here than in the run."
        return self._differs(stop)

    def _differs(self, version: int) -> str:
        """How the kept checkpoint of the present version is not what was computed, if there is one; else ""."""
        playback, path = self._playback, self._kept.get(version)
        if path is None or playback is None:
            return ""
        saved = checkpoint.load(path)
        held = {"model": saved.model_state, **saved.training_state}
        computed = {**playback.training_state(), "model": playback.replica.saved_state()}
        if "optimizer" not in held:  # nothing could go on from it
            return f"the checkpoint {path} lacks the state of the optimizer."
        for part in ("model", *_COMPARED):
            if part in held and part in computed:
                where = difference(on_cpu(held[part]), on_cpu(computed[part]))
                if where is not None:
                    return f"the checkpoint {path} is not what is computed here: of its {part} differs '{where}'."
        return ""
