"""The command ``instep`` and its exit status.

It is 0; 1 for an `InstepError`, one sentence on stderr; 2 for a wrong command line; 3 for a run that cannot be
compared here; 130 after Ctrl-C; 141 where nobody reads on, as in ``instep tape RUN | head``.

Nothing is imported before a command needs it: ``instep --help`` loads neither cyclopts nor torch.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import signal
import sys
from collections.abc import Sequence

from instep.cli.helping import ABOUT, COMMANDS, table, wrapped
from instep.errors import LONGEST, InstepError, RecordError, clean, cut, shown

_COMPUTING = (
    "train", "replay", "verify", "simulate", "memory", "check", "diff", "compare", "plan", "sample", "tokenize",
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv`, by default the process's own; gives the exit status."""
    _open_standard_files()
    try:
        words = list(sys.argv[1:] if argv is None else argv)
        with _telling(words):
            _run(words)
        sys.stdout.flush()
        return 0
    except InstepError as error:
        _complain(error.message, clean(error.detail.rstrip(), keep="\n\t"))
        return getattr(error, "exit_status", 1)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader has left
        _leave_the_rest()
        return 128 + signal.SIGPIPE  # what a shell says of `cat` then
    except OSError as error:
        where = "the system refuses something" if error.filename is None else f"{cut(error.filename)} cannot be used"
        if error.filename is None and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF):
            where = "the output cannot be written"
        _leave_the_rest()
        _complain(f"{where}: {error.strerror or error}; check the file, its disk and the limits of the system.")
        return 1


def _open_standard_files() -> None:
    """Where one of the three is closed: else the next file that is opened would take its number, and its output."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115


def _complain(sentence: str, detail: str = "") -> None:
    with contextlib.suppress(OSError):  # nobody listens
        print(f"instep: {sentence}", file=sys.stderr)
        if detail:
            print(detail, file=sys.stderr)


def _leave_the_rest() -> None:
    """What is still to be written must not raise again at shutdown."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _telling(argv: list[str]) -> contextlib.AbstractContextManager[None]:
    """Where a launcher has started several agents of a run, what ends one ends all."""
    if argv[:1] != ["train"]:
        return contextlib.nullcontext()
    from instep.team.telling import telling_the_others

    alone = "--team.launcher=local" in argv or ("--team.launcher", "local") in itertools.pairwise(argv)
    return telling_the_others("local" if alone else "auto")


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
            f"{shown(extra)} is one argument too many; 'instep {rest[0]} --help' lists what there is."
        ) from None
    except CycloptsError as error:
        raise UsageError(_without_long(" ".join(str(error).split()), rest)) from None
    if rest[0] in _COMPUTING:
        _check_working_folder()
    command(*bound.args, **bound.kwargs)


def _without_long(sentence: str, tokens: Sequence[str]) -> str:
    """`sentence` with what it repeats of a long command line cut."""
    for token in tokens:
        sentence = sentence.replace(token, cut(token)) if len(token) > LONGEST else sentence
    return sentence


def _check_working_folder() -> None:
    """Raises RecordError where it is gone: neither torch nor paths beside it would work."""
    try:
        os.getcwd()
    except OSError as error:
        raise RecordError(
            f"the working folder is not there any more ({error.strerror}); change to one that is, with cd."
        ) from None


def _help() -> str:
    commands = table(COMMANDS.items(), max(map(len, COMMANDS)))
    more = wrapped("'instep COMMAND --help' tells more about a command, 'instep --version' the version.")
    return f"Usage: instep COMMAND\n\n{wrapped(ABOUT)}\n\nCommands:\n{commands}\n\n{more}"
