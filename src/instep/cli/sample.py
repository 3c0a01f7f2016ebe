"""``instep sample``: its flags, and what it prints."""

from __future__ import annotations

from pathlib import Path

from cyclopts import App

from instep.cli.flags import Settings, refuse, whole_number
from instep.cli.helping import COMMANDS
from instep.cli.report import number_of

_HELP = """\
Prints the prompt and what the model, with the newest weights, writes after it: a look at what it has learned, token \
by token and without a cache. This is not a chat product: nothing is filtered, and nobody vouches for what it says. A \
model that was trained on chats takes the prompt for what a user says first."""


def declare(app: App, settings: Settings) -> None:
    """Adds the command to `app`."""

    @app.command(help=f"{COMMANDS['sample']}\n\n{_HELP}")
    def sample(
        run: Path,
        /,
        *,
        prompt: str,
        tokens: str = "200",
        temperature: str = "0.8",
        seed: str = "0",
        ema: str | None = None,
    ) -> None:
        """Sample.

        Parameters
        ----------
        run
            A run folder.
        prompt
            The text to go on with.
        tokens
            How many to write at most.
        temperature
            0 takes the likeliest token each time; the higher, the more is left to chance.
        seed
            Of the drawing: the same seed writes the same text.
        ema
            The decay of the average of the weights that is to write, in place of these: one of the recipe's `ema`.
        """
        refuse(settings)
        count, place = whole_number(tokens, "--tokens"), whole_number(seed, "--seed")
        heat = number_of(temperature, "--temperature", "from 0, such as 0.8")
        decay = None if ema is None else number_of(ema, "--ema", "a decay such as 0.999")
        from instep.pretrained.saving import sampled

        print(sampled(run, prompt, tokens=count, temperature=heat, seed=place, ema=decay))
