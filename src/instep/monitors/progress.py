"""Where a run stands, how fast it goes, and that as text. No input or output."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

BAR = range(8, 25)
"""Columns that the progress bar may take."""


class Part(NamedTuple):
    """A part of the live line: `short` where there is no room for `long`; the highest ranks are left out first."""

    label: str
    long: str
    short: str
    rank: int


class ProgressDisplay:
    """Where a run stands."""

    def __init__(self) -> None:
        self.done = 0
        self.steps = 0
        self.virtual = False
        """Whether times are those of a virtual clock, which tell nothing of how long a person waits."""
        self.state = "starting"
        self.held_up = ""
        """For whom the team waits, in words; "" where it does not."""
        self.objective: float | None = None
        self.terms: Mapping[str, float | None] = {}
        self.by_turn: dict[str, float | None] = {}
        """The last objective of each that takes turns with others."""
        self.loss_scale: float | None = None
        self.held_out: float | None = None
        self.bits_per_byte: float | None = None
        self.held_out_by_turn: Mapping[str, float | None] = {}
        self.held_out_terms: Mapping[str, float | None] = {}
        self.gathered: Mapping[str, float | None] = {}
        self.held_out_ema: dict[str, float | None] = {}
        """Of averages of the weights, by decay."""
        self.pace = Throughput()

    def see(self, event: Mapping[str, Any]) -> None:
        """Takes in one event."""
        kind = event["kind"]
        if kind == "run_started":
            self.done, self.steps = event["step"], event["steps"]
            self.virtual = event.get("clock") == "virtual"
            self.pace.begin(fresh=not self.done)
        elif kind == "merged":
            steps, self.done, self.state = event["step"] - self.done, event["step"], "training"
            before = dict(self.terms)
            if event["objective"] is not None:  # else the update had no items
                self.objective, self.terms = event["objective"], event.get("terms", {})
                if "turn" in event:  # what is known of the others stays
                    self.by_turn[event["turn"]] = event["objective"]
                    self.terms = before | dict(self.terms)
            self.loss_scale = event.get("loss_scale")
            train_s = event["t_s"] if self.virtual else event.get("train_s")
            self.pace.step(event["t_s"], event["items"], steps, train_s)
        elif kind == "evaluated":
            self.held_out, self.bits_per_byte = event["objective"], event.get("bits_per_byte")
            self.held_out_by_turn = event.get("turns") or {}
            self.held_out_terms = event.get("terms", {})
            self.gathered = event.get("gathered") or {}
            self.held_out_ema = {decay: told.get("objective") for decay, told in (event.get("ema") or {}).items()}
            self.pace.pause(event["t_s"])
        elif kind == "checkpointed" and "step_s" not in event:  # else steps went on
            self.pace.pause(event["t_s"])
        elif kind == "left" and not event.get("resized"):
            self.state = "restarting"
            self.pace.interrupt()

    @property
    def step(self) -> int:
        """The last step that is done, counted from 1; the first from its first update on."""
        return max(self.done, int(self.state == "training"))

    def parts(self) -> list[Part]:
        """What the live line shows, from left to right."""
        if self.held_up:
            return [Part("", f"waiting for {self.held_up}", f"waiting for {self.held_up}", 0)]
        if not self.steps:
            return [Part("", self.state, self.state, 0)]
        steps = f"{self.step:>{len(f'{self.steps:,}')},}/{self.steps:,}"
        parts = [Part("step", steps, steps, 0)]
        if self.state != "training":
            return [*parts, Part("", self.state, self.state, 1)]
        virtual = " (virtual)" if self.virtual else ""
        for name, value in (self.by_turn or {"objective": self.objective}).items():
            parts.append(Part(name, number(value, 3), number(value, 3), 1))
        if self.bits_per_byte is not None:
            bits = number(self.bits_per_byte, 3)
            parts.append(Part("held-out", f"{bits} bits/byte", f"{bits} bpb", 2))
        elif self.held_out is not None:
            for name, value in (self.held_out_by_turn or {"": self.held_out}).items():
                parts.append(Part(f"held-out {name}".rstrip(), number(value, 3), number(value, 3), 2))
        parts += [Part(f"ema {d}", number(v, 3), number(v, 3), 5) for d, v in self.held_out_ema.items()]
        if self.loss_scale is not None:
            parts.append(Part("scale", power_of_two(self.loss_scale), power_of_two(self.loss_scale), 5))
        if self.items_per_s is not None:
            parts.append(Part("", f"{rate(self.items_per_s)} items/s{virtual}", f"{short_rate(self.items_per_s)}/s", 4))
        if self.eta_s is not None:
            parts.append(Part("ETA", clock(self.eta_s), clock(self.eta_s), 3))
        return parts

    def line(self, *, evaluated: bool) -> str:
        """What a plain line shows; the held-out figures only where they are new."""
        parts = [f"step {self.step:>{len(f'{self.steps:,}')},}/{self.steps:,}"]
        objectives = self.by_turn or {"objective": self.objective}
        if self.state == "training":
            parts += [f"{name} {number(value)}" for name, value in objectives.items()]
        if len(self.terms) > 1:
            shown = {"objective", *objectives}
            parts += [f"{name} {number(value)}" for name, value in self.terms.items() if name not in shown]
        if evaluated:
            held_out = self.held_out_by_turn or {"": self.held_out}
            parts += [" ".join(filter(None, ("held-out", name, number(value)))) for name, value in held_out.items()]
            if len(self.held_out_terms) > 1:
                told = self.held_out_terms.items()
                parts += [f"{name} {number(value)}" for name, value in told if name not in held_out]
            if self.bits_per_byte is not None:
                parts.append(f"{number(self.bits_per_byte)} bits/byte")
            parts += [f"{name} {number(value)}" for name, value in self.gathered.items()]
            parts += [f"ema {decay} {number(value)}" for decay, value in self.held_out_ema.items()]
        if self.items_per_s is not None:
            parts.append(f"{rate(self.items_per_s)} items/s{' (virtual)' if self.virtual else ''}")
        if self.eta_s is not None:
            parts.append(f"ETA {clock(self.eta_s)}")
        return "  ".join(parts)

    @property
    def items_per_s(self) -> float | None:
        """Items a second, lately."""
        return self.pace.items_per_s

    @property
    def eta_s(self) -> float | None:
        """Seconds that the remaining steps will take; None on a virtual clock."""
        return None if self.virtual else self.pace.eta_s(self.steps - self.done)


class Throughput:
    """How fast it goes, over the last steps of this session; evaluations, checkpoints and restarts are not counted.

    By the run's own count of the seconds in steps, by which ``items_per_s`` of the result goes too; by the times of
    events where they do not hold it.

    An update may be less than a step, as where contributions merge one by one, or several, as after local steps.
    """

    _STEPS = 50
    _SPAN_S = 30.0

    def __init__(self) -> None:
        self._totals = deque([(0.0, 0, 0)])  # (seconds, items, steps) up to each of the last updates
        self._last_s: float | None = None
        self._trained_s: float | None = None
        self._paused_s = 0.0

    def begin(self, *, fresh: bool) -> None:
        """A session begins; a `fresh` run has trained no second before it."""
        self._trained_s = 0.0 if fresh else None

    def step(self, t_s: float, items: int, steps: int = 1, train_s: float | None = None) -> None:
        """An update of `items`, with which `steps` were done, ended at `t_s`, after `train_s` seconds in steps."""
        now_s, before_s = (t_s, self._last_s) if train_s is None else (train_s, self._trained_s)
        self._trained_s = train_s
        if before_s is not None:
            busy_s, all_items, all_steps = self._totals[-1]
            self._totals.append((busy_s + max(0.0, now_s - before_s), all_items + items, all_steps + steps))
            while len(self._totals) > 2 and self._is_long():
                self._totals.popleft()
        self._last_s = t_s

    def _is_long(self) -> bool:
        """Whether what follows on the first update is enough to go by."""
        span_s, _, steps = self._recent
        return steps > self._STEPS or (len(self._totals) > 3 and span_s > self._SPAN_S)

    @property
    def _recent(self) -> tuple[float, int, int]:
        """Seconds, items and steps."""
        first, last = self._totals[0], self._totals[-1]
        return last[0] - first[0], last[1] - first[1], last[2] - first[2]

    def pause(self, t_s: float) -> None:
        """What kept the workers from training ended at `t_s`."""
        if self._last_s is not None:
            self._paused_s += max(0.0, t_s - self._last_s)
            self._last_s = t_s

    def interrupt(self) -> None:
        """The time until the next step says nothing."""
        self._last_s = self._trained_s = None

    @property
    def items_per_s(self) -> float | None:
        """Items a second, or None before there are two updates."""
        span_s, items, _ = self._recent
        return items / span_s if span_s > 0 else None

    def eta_s(self, steps: int) -> float | None:
        """Seconds that `steps` more will take, with pauses as before; None before there is a pace and at the end."""
        span_s, _, done = self._recent
        busy_s = self._totals[-1][0]
        if steps <= 0 or not done or not busy_s:
            return None
        return steps * span_s / done * (1 + self._paused_s / busy_s)


def fit(parts: Sequence[Part], columns: int) -> tuple[list[tuple[str, str]], int]:
    """The (label, value) pairs that fit into so many columns, two spaces apart, and the columns left for a bar.

    The long forms are used if a bar fits beside them, then the short ones; then the highest ranks are left out.
    """
    kept, short = list(parts), False
    while True:
        texts = [(part.label, part.short if short else part.long) for part in kept]
        spare = columns - sum(len(label) + bool(label) + len(value) + 2 for label, value in texts)
        if (spare >= BAR.start and not short) or (short and spare >= -2) or (short and len(kept) == 1):
            return texts, min(spare, BAR.stop - 1) if spare >= BAR.start else 0
        if short:
            kept.remove(max(kept, key=lambda part: part.rank))
        short = True


def power_of_two(value: float) -> str:
    """A loss scale."""
    return f"2^{round(math.log2(value))}"


def number(value: float | None, decimals: int = 4) -> str:
    """An objective; a tape has null for what is not finite."""
    if value is None or not math.isfinite(value):
        return "not finite"
    usual = value == 0 or 1e-2 <= abs(value) < 1e4
    return f"{value:.{decimals}f}" if usual else f"{value:.{decimals - 1}e}"


def rate(value: float) -> str:
    """Items a second: 0.25, 12.3, 68,267."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.3g}"


def short_rate(value: float) -> str:
    """Items a second: 12.3, 68.3k, 1.2M."""
    if value >= 999_950:
        return f"{value / 1e6:.1f}M"
    return f"{value / 1e3:.1f}k" if value >= 999.5 else rate(value)


def clock(seconds: float) -> str:
    """0:43, 1:02:03 or 2 d 01:02:03."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days} d {hour:02}:{minute:02}:{second:02}"
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"


def duration(seconds: float) -> str:
    """12.3 s, and from a minute on as `clock` does."""
    return f"{seconds:.1f} s" if seconds < 59.95 else clock(seconds)


def nbytes(count: int) -> str:
    """A number of bytes with a decimal unit."""
    value, units = float(count), iter(("B", "kB", "MB", "GB", "TB"))
    unit = next(units)
    while value >= 1000 and unit != "TB":
        value, unit = value / 1000, next(units)
    return f"{value:.3g} {unit}"
