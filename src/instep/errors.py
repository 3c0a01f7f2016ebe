"""Every error that Instep raises for a user's input or a machine's fault.

::

    InstepError
    ├── RecipeError          a field of a recipe or team breaks a rule
    │   └── ComponentError   a model, data set, objective or optimizer cannot be imported or built
    ├── DataError            the data set is empty, too small, or fails to give a sample
    ├── ObjectiveError       the objective's answer breaks its protocol
    │   └── NonFiniteError   a term of the objective or the gradient is not finite
    ├── CheckpointingError   gradient checkpointing: no plan fits, or a block cannot be recomputed
    │   └── RecomputeError   a recomputed value is not that of the first pass
    ├── RecordError          a run folder, tape or result cannot be made, read or written
    │   ├── CheckpointError  a checkpoint is damaged, or belongs to another recipe
    │   └── NotComparableError  a run was computed by another kind of processor, or other libraries, than are here
    ├── ResourceError        the machine has too little memory or disk, or lacks a device
    └── WorkerError          a worker raised, died or stopped answering

Each message is one sentence that names the value or the worker, the rule and the remedy. ``detail`` holds what may
follow it, such as the traceback of a worker. What others wrote (values, names in files, exceptions) goes into a
sentence through `cut`, `shown` or `described`; control characters are taken out of every sentence.
"""

from __future__ import annotations

import signal

LONGEST = 200
"""Characters of a value, or of what an exception says, that a sentence shows."""


_LONGEST_WORD = 500
"""Characters of a sentence without a space between, such as a path, that are shown."""


def clean(text: str, keep: str = "") -> str:
    """`text` on one line and without control characters, which a terminal would obey, but for those in `keep`."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else " " if c.isspace() else _escape(c) for c in text)


def cut(value: object) -> str:
    """What others wrote, as text for a sentence: cleaned, and no longer than `LONGEST` characters."""
    text = str(value)
    text = clean(text[: 4 * LONGEST].strip() if len(text) > LONGEST else text.strip())
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def shown(value: object) -> str:
    """A value of the user's, for a sentence: its repr, cut."""
    return cut(repr(value))


def described(error: BaseException) -> str:
    """What an exception says, for a sentence: its type and its text, cut."""
    text = cut(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _without_long_words(text: str) -> str:
    """`text` with words cut that no path that a system takes has in it: values of the user's."""
    if len(text) <= _LONGEST_WORD:
        return text
    return " ".join(w if len(w) <= _LONGEST_WORD else f"{w[: LONGEST - 3]}..." for w in text.split(" "))


def _ended_once(text: str) -> str:
    """`text` without the full stop behind a value that was cut."""
    return text.removesuffix(".") if text.endswith("....") else text


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode()


class InstepError(Exception):
    """The root of the tree."""

    def __init__(self, message: str, *, detail: str = "") -> None:
        super().__init__(_ended_once(_without_long_words(clean(message))))
        self.detail = detail

    @property
    def message(self) -> str:
        """The sentence, without detail."""
        return str(self.args[0])

    def __str__(self) -> str:
        return f"{self.message}\n{self.detail}" if self.detail else self.message


class RecipeError(InstepError, ValueError):
    """A field of a recipe or team is unknown, of the wrong type, or breaks a rule."""


class ComponentError(RecipeError):
    """A model, data set, objective or optimizer cannot be imported or built."""


class DataError(InstepError):
    """The data set is empty, too small, or fails to give a sample."""


class ObjectiveError(InstepError):
    """The objective's answer breaks its protocol: a mean instead of a sum, no scalar, no items."""


class NonFiniteError(ObjectiveError):
    """A term of the objective, or the gradient, is not finite."""


class CheckpointingError(InstepError):
    """Gradient checkpointing: no plan fits the budget, or a block cannot be recomputed."""


class RecomputeError(CheckpointingError):
    """An operation that was done again gave another value, or came in another order, than in the first pass."""


class RecordError(InstepError):
    """A run folder, tape or result cannot be made, read or written."""


class CheckpointError(RecordError):
    """A checkpoint is missing or damaged, or belongs to another recipe."""


class NotComparableError(RecordError):
    """A run was computed by another kind of processor, other libraries or from other data than there are here."""

    exit_status = 3


class ResourceError(InstepError):
    """The machine has too little memory or disk, or lacks a device."""


class WorkerError(InstepError):
    """A worker raised, died or stopped answering."""


def no_process(what: str, error: OSError) -> ResourceError:
    """The error where the system refuses to start a process."""
    return ResourceError(
        f"{what} cannot be started: {error.strerror}; take fewer workers, or raise the limits on processes, open files "
        f"or memory."
    )


def signal_name(number: int) -> str:
    """The name of a signal: SIGTERM, or SIGRTMIN+1 for one of those that have none of their own."""
    try:
        return signal.Signals(number).name
    except ValueError:
        if signal.SIGRTMIN < number < signal.SIGRTMAX:
            return f"SIGRTMIN+{number - signal.SIGRTMIN}"
        return f"signal {number}"


def killed_by(status: int) -> str:
    """How a process ended whose exit status is `status`, below 0: "killed by SIGTERM"."""
    name = signal_name(-status)
    return f"killed by {name}" + (", as the kernel does when memory runs out" if name == "SIGKILL" else "")


def told(error: BaseException) -> str:
    """What was raised, and where: see `place`, or else the innermost code of all."""
    return described(error) + (place(error) or place(error, own=False))


def place(error: BaseException, *, own: bool = True) -> str:
    """The file and line of the innermost code where it was raised, in brackets: with `own` of what belongs neither to
    Python, nor to Instep, nor to an installed library; "" where there is none.
    """
    import os
    import sysconfig
    import traceback

    others = (sysconfig.get_path("stdlib") + os.sep, os.path.dirname(__file__) + os.sep, "<")
    frames = list(traceback.extract_tb(error.__traceback__))
    if own:
        frames = [f for f in frames if "site-packages" not in f.filename and not f.filename.startswith(others)]
    return "".join(f" ({frame.filename}, line {frame.lineno})" for frame in frames[-1:])


def by_name(name: str) -> type[InstepError]:
    """The error class called `name`; WorkerError for a name that is not in the tree."""
    found = globals().get(name)
    return found if isinstance(found, type) and issubclass(found, InstepError) else WorkerError


def with_saved(sentence: str, version: int, folder: object) -> str:
    """`sentence`, on why a run stops, with what its folder has saved of it: the weights of `version`; nothing at 0."""
    if not version:
        return sentence
    return f"{sentence.rstrip('.')}; version {version:,} is saved: {folder} can be resumed from it."
