"""Ctrl-C while zarr works: heard when it is done, for zarr does not survive it.

Python raises KeyboardInterrupt between any two instructions of the main thread. There zarr waits for the thread that
reads, and takes locks that both share. Raised where a lock is just being taken, it leaves the lock taken: zarr's thread
then waits for ever, and so does whoever reads next in this process.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class _Later:
    """A handler in place of ``handler`` that keeps a signal for later. A second one puts ``handler`` back at once."""

    def __init__(self, handler: Callable[[int, FrameType | None], Any]) -> None:
        self.handler = handler
        self.kept = 0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.kept += 1
        if self.kept > 1:
            self.end()

    def end(self) -> None:
        """Put ``handler`` back, where nobody has set another since, and raise again what was kept."""
        kept, self.kept = self.kept, 0
        in_force: Any = signal.getsignal(signal.SIGINT)
        if in_force is self:
            signal.signal(signal.SIGINT, self.handler)
        for _ in range(kept):
            signal.raise_signal(signal.SIGINT)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C waits for the end of the block; pressed twice it does not, for a store may never answer.

    Changes nothing in other threads, which Python never interrupts, and where SIGINT has no handler.
    """
    later = _put_off()
    try:
        yield
    finally:
        if later is not None:
            later.end()


def _put_off() -> _Later | None:
    """What is in force from now on; None where nothing is to be put off, or something else does."""
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler) or isinstance(handler, _Later):
        return None
    later = _Later(handler)
    try:
        signal.signal(signal.SIGINT, later)
    except ValueError:  # not in the main thread
        return None
    return later
