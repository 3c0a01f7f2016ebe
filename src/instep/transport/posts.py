"""Messages between two processes, through gloo, each awaited before it is sent.

Gloo sends nothing before the receiver has told where it is to lie, and that word waits behind all that the receiver
itself has to send: on a slow link what both begin only once there is something to send stands still in between. So a
receiver tells it long before. Of a message on its way gloo does not say whether it has ended, and a wait that times out
breaks the connection (torch 2.13): a thread waits for them, one after the other, without an end.
"""

from __future__ import annotations

import queue
import threading

from torch._C import _distributed_c10d as c10d


class Post:
    """One message, there or back."""

    def __init__(self, work: c10d.Work):
        self._work, self._ended = work, threading.Event()
        self.error: RuntimeError | None = None
        """Why it was lost, once it has ended."""

    def ended(self, within_s: float = 0.0) -> bool:
        """Whether it has ended, well or not, or does so in this time."""
        return self._ended.wait(within_s) if within_s else self._ended.is_set()

    def wait(self) -> None:
        """Returns when it has ended. For the thread alone."""
        try:
            self._work.wait()
        except RuntimeError as error:
            self.error = error
        self._ended.set()


class Posts:
    """Waits for messages in the order in which they are added."""

    def __init__(self) -> None:
        self._added: queue.SimpleQueue[Post | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def add(self, work: c10d.Work) -> Post:
        """Takes a message that is on its way."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._wait, daemon=True)
            self._thread.start()
        post = Post(work)
        self._added.put(post)
        return post

    def close(self, within_s: float) -> bool:
        """Whether all have ended in this time, as they do where the connections are shut."""
        self._added.put(None)
        if self._thread is not None:
            self._thread.join(within_s)
        return self._thread is None or not self._thread.is_alive()

    def _wait(self) -> None:
        while (post := self._added.get()) is not None:
            post.wait()
