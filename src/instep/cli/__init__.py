"""The command ``instep``: train, replay, simulate, memory, recipes, digest.

Exit status: 0; 1 for an `InstepError`, one sentence on stderr; 2 for a wrong command line; 130 after Ctrl-C.

Nothing is imported before a command needs it: ``instep --help`` loads neither cyclopts nor torch.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from instep.errors import InstepError

ABOUT = "Trains one PyTorch model with many workers in step: the same result, bit for bit, for any number of them."

COMMANDS = {
    "train": "Train a recipe, or go on with a run.",
    "replay": "Compute a run again from its recipe and tape.",
    "simulate": "Run a recipe on a virtual cluster.",
    "memory": "Show what recomputing activations saves in memory and costs in time.",
    "recipes": "List the built-in recipes.",
    "digest": "Print the digest of a run or checkpoint.",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv`, by default the process's own; gives the exit status."""
    try:
        _run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return 0
    except InstepError as error:
        print(f"instep: {error.message}", file=sys.stderr)
        if error.detail:
            print(error.detail.rstrip(), file=sys.stderr)
        return getattr(error, "exit_status", 1)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader has left; what is still in the buffer must not raise again at shutdown
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _run(argv: list[str]) -> None:
    if argv in ([], ["--help"], ["-h"]):
        print(_help())
        return
    if argv == ["--version"]:
        from importlib.metadata import version

        print(version("instep"))
        return

    from cyclopts import CycloptsError, UnknownOptionError, UnusedCliTokensError

    from instep.cli.commands import app
    from instep.cli.flags import UsageError, split, unknown_flag

    settings, rest = split(argv)
    try:
        command, bound, _ = app(settings).parse_args(rest, exit_on_error=False, print_error=False)
    except UnknownOptionError as error:
        flags = [name for argument in error.argument_collection for name in argument.names]
        raise unknown_flag(error.token.keyword or error.token.value, flags, rest[0]) from None
    except UnusedCliTokensError as error:
        extra = (error.unused_tokens or rest)[0]
        raise UsageError(
            f"{extra!r} is one argument too many; 'instep {rest[0]} --help' lists what there is."
        ) from None
    except CycloptsError as error:
        raise UsageError(" ".join(str(error).split())) from None
    command(*bound.args, **bound.kwargs)


def _help() -> str:
    from instep.cli.helping import table, wrapped

    commands = table(COMMANDS.items(), max(map(len, COMMANDS)))
    more = wrapped("'instep COMMAND --help' tells more about a command, 'instep --version' the version.")
    return f"Usage: instep COMMAND\n\n{wrapped(ABOUT)}\n\nCommands:\n{commands}\n\n{more}"
