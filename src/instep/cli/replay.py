"""``instep replay``: its flags, and what it does and prints."""

from __future__ import annotations

from pathlib import Path

from cyclopts import App

from instep.cli.flags import Settings, UsageError, refuse
from instep.cli.helping import COMMANDS
from instep.errors import RecordError
from instep.monitors.console import Console
from instep.rules.presets import parse as parse_rule
from instep.team.signals import interrupting

_HELP = """\
The digest is the run's own, whatever the rule: everything that a replay needs is on the tape. Where it is not, the \
first place where the two differ is named."""


def declare(app: App, settings: Settings) -> None:
    """Adds the command to `app`."""

    @app.command(help=f"{COMMANDS['replay']}\n\n{_HELP}")
    def replay(run: Path, /, *, rule: str | None = None, out: Path | None = None) -> None:
        """Replay.

        Parameters
        ----------
        run
            A run folder.
        rule
            Another rule, as for train: the same arrivals under it, on a virtual clock.
        out
            With --rule, the run folder to make; by default none.
        """
        refuse(settings)
        if rule is None and out is not None:
            raise UsageError("--out goes with --rule: a replay of the run itself makes no folder.")
        if rule is None:
            replay_run(run)
        else:
            replay_rule(run, rule, out)


def replay_run(run: Path) -> None:
    """Computes a run again. Raises RecordError where the result is another one, or there is none to compare with."""
    from instep.api import replay

    replayed = replay(run)
    print(f"versions  {replayed.versions:,}")
    print(f"digest    {replayed.digest}")
    if replayed.same:
        print(f"compared  {replayed.proof}")
        print("The run's own digest: the replay is exact.")
        return
    if not replayed.divergence and replayed.recorded is None:
        raise RecordError(
            f"the run {run} never ended, so the tape has no digest to compare with; {replayed.proof} of it are the "
            f"replay's own, up to version {replayed.versions:,}."
        )
    raise RecordError(
        f"the replay of {run} gave another result than the run: "
        + (replayed.divergence or f"the run's digest is {replayed.recorded}.")
    )


def replay_rule(run: Path, rule: str, out: Path | None) -> None:
    """The arrivals of a run under another rule, shown as they go."""
    from instep.api import replay_under

    with interrupting(), Console(path=out) as console:
        replay_under(run, parse_rule(rule), out=out, monitors=(console,))
