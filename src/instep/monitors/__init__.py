"""What shows a run while it trains."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from types import TracebackType
from typing import Any, Protocol, Self, runtime_checkable

Monitor = Callable[[dict[str, Any]], None]
"""Called with every event of the tape, in order, in the process that called `instep.train`."""


@runtime_checkable
class ShowsWaits(Protocol):
    """A monitor that shows for whom the others wait as well, which is on no tape."""

    def held_up(self, who: str, doing: str, seconds: float) -> None:
        """Somebody waits for `who`, who has been `doing` that for so long; "": nobody waits any more."""


class Closing(ABC):
    """A monitor that is closed at the end of a ``with``."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @abstractmethod
    def close(self) -> None:
        """Ends it; what follows is not shown."""
