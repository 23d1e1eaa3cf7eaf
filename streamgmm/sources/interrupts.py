"""Ctrl-C while zarr works: heard when it is done, for zarr does not survive it.

Python raises KeyboardInterrupt between any two instructions of the main thread. There zarr waits for the thread that
reads, and takes locks that both share. Raised where a lock is just being taken, it leaves the lock taken: zarr's thread
then waits for ever, and so does whoever reads next in this process.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

Handler = Callable[[int, FrameType | None], Any]


class _Later:
    """A handler that keeps the first signal for later, and gives a second one to ``handler`` at once."""

    def __init__(self, handler: Handler) -> None:
        self.handler = handler
        self.kept: tuple[int, FrameType | None] | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.kept is None:
            self.kept = (number, frame)
        else:
            self.kept = None
            self.handler(number, frame)

    def now(self) -> None:
        """What was kept for later."""
        if self.kept is not None:
            self.handler(*self.kept)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C waits for the end of the block; a second one does not, for a store may never answer.

    Changes nothing in other threads, which Python never interrupts, and where SIGINT has no handler.
    """
    handler = signal.getsignal(signal.SIGINT)
    elsewhere = threading.current_thread() is not threading.main_thread()
    if elsewhere or not callable(handler) or isinstance(handler, _Later):
        yield
        return
    later = _Later(handler)
    signal.signal(signal.SIGINT, later)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        later.now()
