"""What a person sees of a run: monitors, which are called with each event of the tape (see `instep.record.tape`)."""

from __future__ import annotations

import atexit
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self, TextIO

from instep.budget import as_size
from instep.differences import without_address
from instep.monitors import Closing
from instep.monitors.phrases import bound, idle, unreadable, versions
from instep.monitors.progress import ProgressDisplay, clock, duration, fit, nbytes, number, rate
from instep.monitors.terminal import is_live
from instep.rules.presets import text_of
from instep.rules.rule import UpdateRule
from instep.schedule import what_changed
from instep.tables import as_saved, from_table

_LABEL = 12
"""Columns that a label takes in the header and in the table at the end."""

_INDENT = "    "

ODD = 0.1
"""The share of a sample that may be unreadable: a model that has not learnt yet writes any bytes."""


class Console(Closing):
    """Shows a run: one live line on a terminal; elsewhere a plain line every `every_s` seconds and at evaluations.

    file: where to, by default ``sys.stdout``. If it fails, as a pipe without a reader does, the run goes on unseen.
    path: the run folder, to be named at the beginning and at the end.
    brief: of one of several runs, its name: a line at the beginning and one at the end.

    Used as a context manager it takes the live line away at the end of the block, however that ends.
    """

    def __init__(
        self, file: TextIO | None = None, *, path: Path | str | None = None, every_s: float = 5.0, brief: str = ""
    ) -> None:
        file = (sys.stdout or open(os.devnull, "w")) if file is None else file  # noqa: SIM115
        self._screen: _Plain | _Terminal = _Terminal(file) if is_live(file) else _Plain(file, every_s)
        self._path = path
        self._brief = brief
        self._progress = ProgressDisplay()
        self._started = False
        self._rule: UpdateRule | None = None
        self._recipe: Mapping[str, Any] = {}
        self._losses = 0  # each of which costs a restart: of the team, or of the worker alone
        self._resized: Mapping[str, Any] | None = None  # what somebody has asked for, until the team starts anew
        self._broken = False

    def __enter__(self) -> Self:
        self._guard(lambda: self._screen.update(self._progress, {"kind": "joined"}))
        return self

    def close(self) -> None:
        """Takes the live line away."""
        self._guard(self._screen.stop)

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Shows `event`. Kinds that it does not know are passed over; ``failed`` is left to who catches the error."""
        self._progress.see(event)
        if event["kind"] == "resized":
            self._resized = event
        show = {
            "run_started": self._begin,
            "left": self._left,
            "stood_in": self._stood_in,
            "warned": self._warned,
            "planned": self._planned,
            "regrouped": self._regrouped,
            "run_ended": self._end,
        }.get(event["kind"])
        if show is not None:
            self._guard(lambda: show(event))
        if event["kind"] in ("run_started", "joined", "merged", "evaluated"):
            self._guard(lambda: self._screen.update(self._progress, event))

    def held_up(self, who: str, doing: str, seconds: float) -> None:
        """Has the live line, where there is one, tell for whom the team waits, as `instep.monitors.ShowsWaits` says."""
        told = f"{who}: {doing}, for {f'{seconds:.0f} s' if seconds < 60 else clock(seconds)}"
        self._progress.held_up = self._screen.clean(told) if who else ""
        self._guard(lambda: self._screen.update(self._progress, {"kind": "held_up"}))

    def _guard(self, show: Callable[[], None]) -> None:
        if self._broken:
            return
        try:
            show()
        except OSError:
            self._broken = True
        except ValueError:
            self._broken = self._screen.file.closed
            if not self._broken:
                raise

    def _regrouped(self, event: Mapping[str, Any]) -> None:
        """The workers that go on in another group may be those that somebody has asked for."""
        asked = self._resized
        if asked is not None and len(event["workers"]) == asked["workers"]:
            self._resized = None
            self._say_resized(asked, asked["workers"], event["version"])

    def _say_resized(self, asked: Mapping[str, Any], workers: int, step: int) -> None:
        numbers = f"{workers} workers instead of {asked['before']}"
        self._screen.say(f"{numbers} after step {step:,}, as {asked['by_whom']} asked", "yellow")

    def _begin(self, event: Mapping[str, Any]) -> None:
        recipe, team = event["recipe"], event["team"]
        self._recipe = recipe
        asked, self._resized = self._resized, None
        if self._started and asked is not None:
            self._say_resized(asked, team["workers"], event["step"])
            return
        if self._started:
            left = max(0, team["restarts"] - self._losses)
            at = f"restarted after step {event['step']:,}"
            self._screen.say(f"{at}; restarts left: {left} of {team['restarts']}", "yellow")
            return
        self._started = True
        row = self._screen.row
        resumed = f", resumed after step {event['step']:,}" if event["resumed"] else ""
        if self._brief:
            self._screen.say(f"{self._brief}, {event['steps']:,} steps{resumed}")
            return
        row("recipe", f"{recipe['name']}, {event['steps']:,} steps{resumed}")
        rule = recipe["rule"]
        if "quorum" in rule:  # a tape of another's may hold its name alone
            self._rule = from_table(UpdateRule, as_saved(UpdateRule, rule), "rule")
        row("rule", f"{text_of(self._rule) if self._rule else rule['name']}, by the {event['engine']} engine")
        row("parameters", f"{event['parameters']:,}")
        for place, trains in enumerate(event.get("optimizers", ())):
            row(f"optimizer.{place}", trains)
        row("samples", f"{event['samples']:,}, {recipe['batch']:,} a step")
        row("workers", f"{team['workers']} on {team['device']}, for {recipe['microbatches']} microbatches a step")
        if "whole_update" in event:
            row("update", event["whole_update"])
        if "hosts" in event:
            row("hosts", ", ".join(f"{host['name']} with {host['workers']}" for host in event["hosts"]))
        changed = what_changed(recipe, event["version"])
        if changed:
            row("changed", f"from step {event['step'] + 1:,} on: {changed}")
        if self._path is not None:
            row("run folder", str(self._path))
        self._screen.gap()

    def _left(self, event: Mapping[str, Any]) -> None:
        worker, why = event["worker"], str(event["why"])
        if event.get("resized"):
            return
        self._losses += 1
        self._screen.say(why if f"worker {worker}" in why else f"worker {worker}: {why}", "red")

    def _stood_in(self, event: Mapping[str, Any]) -> None:
        part = f"worker {event['by_worker']} does the part of worker {event['worker']}"
        self._screen.say(f"{part} from step {event['version'] + 1:,} on, until another process can", "yellow")

    def _warned(self, event: Mapping[str, Any]) -> None:
        self._screen.say(f"warning: {event['why']}", "yellow")

    def _planned(self, event: Mapping[str, Any]) -> None:
        """A gradient checkpointing plan, and what it took when it was tried."""
        measured = event["measured_bytes"]
        took = f", measured {as_size(measured)}" if measured is not None else ""
        work = "nothing recomputed: all of it fits"
        if event["checkpointed"]:
            work = (
                f"{100 * event['extra_flops']:.1f} % more FLOPs in {event['checkpointed']} of {event['blocks']} blocks"
            )
        whole = as_size(event["nothing_recomputed_bytes"])
        self._screen.row(
            "memory", f"{as_size(event['predicted_bytes'])} predicted{took}, of {whole} a microbatch; {work}"
        )
        self._screen.gap()

    def _costs(self, result: Mapping[str, Any]) -> None:
        """What the rule gained and cost."""
        row = self._screen.row
        dropped = result["dropped"]
        row("versions", f"{result['versions']:,}" + (f", {dropped:,} contributions dropped" if dropped else ""))
        stalest, delayed = result["staleness_max"], result.get("delayed_max", 0)
        lead, stale = (self._rule.max_lead, self._rule.max_staleness) if self._rule else (None, None)
        row("staleness", f"mean {result['staleness_mean']:.2f}, at most {versions(stalest)}{bound(stale)}")
        if delayed > stalest:
            row("delayed", f"at most {versions(delayed)}, where a piece was given out again")
        row("lead", f"at most {result['lead_max']:,} round{'' if result['lead_max'] == 1 else 's'}{bound(lead)}")
        row("sent", nbytes(result["bytes_sent"]))
        row("idle", idle(result["idle_share"]))

    def _metrics(self, result: Mapping[str, Any]) -> None:
        """What else was found on held-out data: terms, if there are several, metrics, and of averages of weights."""
        terms = result.get("held_out_terms") or {}
        gathered = result.get("gathered") or {}
        for name, value in {**(terms if len(terms) > 1 else {}), **gathered}.items():
            self._screen.row(f"  {name}", number(value))
        for decay, told in (result.get("ema") or {}).items():
            self._screen.row(f"  ema {decay}", number(told["held_out"]))

    def _end(self, event: Mapping[str, Any]) -> None:
        result, screen = event["result"], self._screen
        screen.stop()
        if self._brief:
            held_out = result.get("held_out")
            learned = f"held-out {number(held_out)}, " if held_out is not None else ""
            screen.say(f"{_INDENT}{learned}{duration(result['wall_s'])}, {nbytes(result['bytes_sent'])} sent")
            return
        screen.gap()
        interrupted = event.get("interrupted", False)
        steps = f"{result['steps']:,}"
        screen.row("steps", f"{steps} of {self._progress.steps:,}, interrupted" if interrupted else steps)
        first, last = result.get("objective_first"), result.get("objective_last")
        for name, value in self._progress.by_turn.items():
            screen.row(name, number(value))
        if not self._progress.by_turn and (first is not None or last is not None):
            screen.row("objective", f"{number(first)} {screen.sign('→', '->')} {number(last)}")
        virtual = " (virtual)" if self._progress.virtual else ""
        for label, key, form in (
            ("held-out", "held_out", number),
            ("bits/byte", "bits_per_byte", number),
            ("items/s", "items_per_s", rate),
            ("time", "wall_s", duration),
            ("restarts", "restarts", str),
        ):
            if result.get(key) is not None:
                screen.row(label, form(result[key]) + (virtual if key in ("items_per_s", "wall_s") else ""))
            if key == "held_out":
                self._metrics(result)
        if result.get("skipped"):
            screen.row("left out", f"{result['skipped']:,} updates")
        if result.get("bad_batches"):
            screen.row("bad batches", f"{result['bad_batches']:,} left out")
        if result.get("overflows"):
            screen.row("overflows", f"{result['overflows']:,} steps left out, and the loss scale lowered")
        if result.get("stopped"):
            screen.row("stopped", result["stopped"])
        if result["rule"] != "synchronous" or result.get("engine") == "virtual":
            self._costs(result)
        artifacts = result.get("artifacts") or {"figures": {}, "files": []}
        for name, value in artifacts["figures"].items():
            screen.row(name, number(value) if isinstance(value, float) else str(value))
        for path in artifacts["files"]:
            screen.row("wrote", path)
        if result.get("sample"):
            odd = unreadable(result["sample"])
            screen.row("sample", "" if odd <= ODD else f"no text yet: {100 * odd:.0f} % of it cannot be read")
            if odd <= ODD:
                screen.sample(result["sample"])
        screen.gap()
        if interrupted and self._path is not None:
            how = f"instep train --resume {shlex.quote(str(self._path))}"
            nameless = without_address(self._recipe) is not None
            screen.row("go on with", f"instep.train(recipe, resume={str(self._path)!r})" if nameless else how)
        if event["digest"] is not None:  # a simulation without gradients has none
            screen.row("digest", event["digest"])
        if self._path is not None:
            screen.row("run folder", str(self._path))


class _Screen:
    """What the two ways of showing have in common."""

    def __init__(self, file: TextIO) -> None:
        self.file = file
        self._encoding = getattr(file, "encoding", None) or "utf-8"
        self._gap = False

    def say(self, text: str, style: str = "") -> None:
        """One line, or several."""
        self._gap = not text
        self._print(self.clean(text), style)

    def gap(self) -> None:
        """An empty line, unless the last one is empty."""
        if not self._gap:
            self.say("")

    def _print(self, text: str, style: str) -> None:
        raise NotImplementedError

    def sign(self, nice: str, plain: str) -> str:
        """`nice` where the file can show it."""
        return nice if self.clean(nice) == nice else plain

    def clean(self, text: str) -> str:
        """`text` without control characters, other than line ends, and without what the file cannot encode."""
        shown = "".join(c if c.isprintable() or c == "\n" else _escape(c) for c in text.expandtabs(4))
        return shown.encode(self._encoding, "backslashreplace").decode(self._encoding)


class _Plain(_Screen):
    """Plain lines, for pipes, files, notebooks and dumb terminals."""

    def __init__(self, file: TextIO, every_s: float) -> None:
        super().__init__(file)
        self._every_s = every_s
        self._shown_s = -math.inf

    def _print(self, text: str, style: str) -> None:
        print(text, file=self.file, flush=True)

    def row(self, label: str, value: str) -> None:
        self.say(f"{_column(label)}{value}".rstrip())

    def sample(self, text: str) -> None:
        self.say("\n".join(f"{_INDENT}{line}".rstrip() for line in self.clean(text).split("\n")))

    def update(self, progress: ProgressDisplay, event: Mapping[str, Any]) -> None:
        evaluated = event["kind"] == "evaluated"
        if not evaluated and event["kind"] != "merged":
            return
        now_s = time.monotonic() if progress.virtual else event["t_s"]
        if evaluated or now_s - self._shown_s >= self._every_s:
            self._shown_s = now_s
            self.say(progress.line(evaluated=evaluated))

    def stop(self) -> None:
        pass


class _Terminal(_Screen):
    """One live line at the bottom; all else scrolls above it."""

    _REFRESH_S = 0.1

    def __init__(self, file: TextIO) -> None:
        super().__init__(file)
        from rich.console import Console as RichConsole
        from rich.live import Live

        self._console = RichConsole(file=file, highlight=False, markup=False, emoji=False)
        self._progress = ProgressDisplay()
        self._live = Live(
            console=self._console, get_renderable=self._line, auto_refresh=False, transient=True, redirect_stderr=False
        )
        self._shown_s = -math.inf

    def _print(self, text: str, style: str) -> None:
        from rich.text import Text

        self._console.print(Text(text, style))

    def row(self, label: str, value: str) -> None:
        from rich.text import Text

        self._gap = False
        text = Text.assemble((_column(label), "dim"), self.clean(value))
        self._console.print(text, soft_wrap=True)  # the terminal wraps it, so that a copied path or digest stays whole

    def sample(self, text: str) -> None:
        from rich.text import Text

        for line in Text(self.clean(text)).wrap(self._console, max(20, self._console.width - len(_INDENT))):
            self._console.print(Text(_INDENT).append_text(line), soft_wrap=True)

    def update(self, progress: ProgressDisplay, event: Mapping[str, Any]) -> None:
        self._progress = progress
        if not self._live.is_started:
            self._live.start()
            atexit.register(self.stop)  # brings the cursor back where nobody calls close
        if event["kind"] != "merged" or time.monotonic() - self._shown_s >= self._REFRESH_S:
            self._live.refresh()
            self._shown_s = time.monotonic()

    def stop(self) -> None:
        self._live.stop()
        atexit.unregister(self.stop)

    def _line(self) -> Any:
        from rich.text import Text

        texts, bar = fit(self._progress.parts(), self._console.width - 1)  # some terminals wrap a line that is full
        line = Text(no_wrap=True, overflow="crop")
        for index, (label, value) in enumerate(texts):
            line.append("  " if index else "").append(f"{label} " if label else "", "dim").append(value)
            if index == 0 and bar and self._progress.steps:
                done = bar * self._progress.done // self._progress.steps
                line.append("  ").append(self.sign("━", "#") * done, "cyan")
                line.append(self.sign("─", "-") * (bar - done), "dim")
        line.truncate(self._console.width - 1)
        return line


def _column(label: str) -> str:
    return f"{label:<{_LABEL - 1}} "


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode()
