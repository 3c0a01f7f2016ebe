"""What a test does while a run goes on in its main thread."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def meanwhile(act: Callable[[], None], then: Callable[[], object]) -> Iterator[None]:
    """Calls `act` in a thread and then, whatever becomes of it, `then`. Raises at its end what `act` has raised."""
    raised: list[BaseException] = []

    def call() -> None:
        try:
            act()
        except BaseException as error:
            raised.append(error)
        finally:
            then()

    thread = threading.Thread(target=call)
    thread.start()
    try:
        yield
    finally:
        thread.join()
    if raised:
        raise raised[0]
