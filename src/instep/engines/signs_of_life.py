"""What a worker in lockstep shows of itself."""

from __future__ import annotations

from typing import Protocol


class SignsOfLife(Protocol):
    """How a worker shows that it lives and gets on."""

    def advance(self) -> None:
        """A piece of work is finished."""

    def waiting(self, flag: bool) -> None:
        """Whether the worker waits for others."""

    def stop_wanted(self) -> bool:
        """Whether the run was asked to end after the present step."""

    def regroup_wanted(self) -> bool:
        """Whether the workers are to go on in another group after the present step."""

    def fewer_wanted(self) -> bool:
        """Whether some of them are not to be in that."""

    def save_wanted(self) -> bool:
        """Whether, by the clock, a checkpoint is due after the present step."""
