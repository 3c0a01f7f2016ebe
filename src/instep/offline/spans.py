"""Which parts of a run can be computed again by themselves, and which of them a sample takes: pure, from its tape.

A span begins where all is known that the steps after it depend on: at the run's first weights, at a kept checkpoint
that the team started from, in lockstep at any kept checkpoint, and at others where no contribution was under way and
workers keep nothing of their own. It may end wherever the tape tells what the weights were.
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from instep.randomness import key
from instep.record.tape import take_back
from instep.rules import UpdateRule

Events = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class End:
    """Where a span may end: after the event at `place`. step: global batches done by then."""

    version: int
    step: int
    place: int


@dataclass(frozen=True)
class RunSpan:
    """From the weights of `version` on. place: its first event. started: the place of the start that it is in.

    ends: by rising version.
    """

    version: int
    step: int
    place: int
    started: int
    ends: tuple[End, ...]

    @property
    def steps(self) -> int:
        """Of the whole span."""
        return self.ends[-1].step - self.step

    def steps_to(self, end: End) -> int:
        """Of its part up to there."""
        return end.step - self.step


@dataclass(frozen=True)
class SpanPart:
    """Of a span, what is computed again: up to one of its ends."""

    span: RunSpan
    end: End

    @property
    def steps(self) -> int:
        """How many."""
        return self.span.steps_to(self.end)


class _History:
    """What of a tape holds: a start takes back what was done after the version that it goes on from."""

    def __init__(self, rule: UpdateRule, kept: Collection[int]):
        self._kept = kept
        self._alone = rule.gradients  # workers keep nothing from one contribution to the next
        self._started = self._step = 0
        self._serving = False
        self._in_hand: set[int] = set()
        self._waiting: set[int] = set()
        self.starts: dict[int, tuple[int, int, int]] = {}  # by version: step, place, start that it is in
        self.ends: dict[int, End] = {}

    def take(self, place: int, event: Mapping[str, Any]) -> None:
        """One event, in order."""
        kind = event["kind"]
        if kind == "run_started":
            self._start(place, event)
        elif kind == "released":
            self._in_hand.add(event["worker"])
        elif kind == "pushed" and self._serving:
            self._in_hand.discard(event["worker"])
            self._waiting.add(event["seq"])
        elif kind == "left":
            self._in_hand.discard(event["worker"])
        elif kind == "dropped":
            self._waiting.discard(event["seq"])
        elif kind == "merged":
            self._step = event["step"]
            if self._serving:
                self._waiting -= {each["seq"] for each in event["contributions"]}
                self._end(place, event)
        elif kind in ("checkpointed", "checksummed", "run_ended"):
            self._end(place, event)
            if kind == "checkpointed" and event["version"] in self._kept and self._quiet:
                self.starts[event["version"]] = (self._step_of(event), place + 1, self._started)

    @property
    def _quiet(self) -> bool:
        return not self._serving or (self._alone and not self._in_hand and not self._waiting)

    def _step_of(self, event: Mapping[str, Any]) -> int:
        return int(self._step if self._serving else event["version"])

    def _end(self, place: int, event: Mapping[str, Any]) -> None:
        self.ends[event["version"]] = End(event["version"], self._step_of(event), place)

    def _start(self, place: int, event: Mapping[str, Any]) -> None:
        version = event["version"]
        for known in (self.starts, self.ends):
            take_back(known, version)
        self._started, self._step = place, event["step"]
        self._serving = event["engine"] != "lockstep"
        self._in_hand, self._waiting = set(), set()
        if not self._serving and version:
            self.ends.setdefault(version, End(version, self._step, place))
        if version == 0 or version in self._kept:
            self.starts[version] = (self._step, place + 1, place)


def spans_of(events: Events, rule: UpdateRule, kept: Collection[int]) -> list[RunSpan]:
    """The spans of a run, by rising version; together they are all of it. kept: versions of its sound checkpoints."""
    history = _History(rule, kept)
    for place, event in enumerate(events):
        history.take(place, event)
    versions = sorted(history.starts)
    spans = []
    for version, following in zip(versions, [*versions[1:], math.inf], strict=True):
        step, place, started = history.starts[version]
        ends = [end for end in history.ends.values() if version < end.version <= following and end.place >= place]
        if ends:
            spans.append(RunSpan(version, step, place, started, tuple(sorted(ends, key=lambda end: end.version))))
    return spans


def drawn(spans: Sequence[RunSpan], share: float, seed: int) -> list[SpanPart]:
    """Parts of `spans` that come to about this share of their steps, never to none, by rising version.

    Steps are drawn one after another, each as likely. Of its span is taken what leads to the step and to the next end
    after it, or where that is more than is left as much as is, from the span's beginning.
    """
    left = math.ceil(share * sum(span.steps for span in spans) - 1e-9)
    chance, taken = random.Random(key(seed, "verify")), dict[int, SpanPart]()
    open_spans = list(range(len(spans)))
    while open_spans and left > 0:
        (number,) = chance.choices(open_spans, [spans[each].steps or 1 for each in open_spans])
        open_spans.remove(number)
        span = spans[number]
        step = span.step + chance.randrange(max(1, span.steps))
        wanted = next(end for end in span.ends if end.step > step or end is span.ends[-1])
        fitting = [end for end in span.ends if end.step <= wanted.step and span.steps_to(end) <= left]
        if fitting or not taken:
            taken[number] = SpanPart(span, fitting[-1] if fitting else span.ends[0])
            left -= taken[number].steps
    for number, part in taken.items():  # what is left still goes to what follows on these
        further = [end for end in part.span.ends if 0 <= end.step - part.end.step <= max(0, left)]
        taken[number] = SpanPart(part.span, further[-1])
        left -= taken[number].steps - part.steps
    return [taken[number] for number in sorted(taken)]
