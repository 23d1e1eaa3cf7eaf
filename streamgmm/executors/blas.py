"""One BLAS thread while blocks run: blocks are the parallelism, and the bits must not depend on the machine."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import scipy.linalg  # noqa: F401  (its BLAS must be loaded before it can be limited)
import threadpoolctl
from threadpoolctl import threadpool_limits

_lock = threading.Lock()
_holders = 0
_limit: threadpool_limits | None = None


@contextmanager
def single_blas_thread() -> Iterator[None]:
    """Limit BLAS to one thread from the first caller's entry to the last caller's exit; then give back what was."""
    global _holders, _limit
    with _lock:
        if _holders == 0:
            _release_control()
            _limit = threadpool_limits(1, user_api="blas")
            _release_control()
        _holders += 1
    try:
        yield
    finally:
        with _lock:
            _holders -= 1
            if _holders == 0 and _limit is not None:
                _release_control()
                _limit.restore_original_limits()
                _limit = None
                _release_control()


def _release_control() -> None:
    """Let this thread set OpenBLAS's number of threads, and the next one too.

    From threadpoolctl 3.8 on the first thread that sets a limit keeps all others from setting one, which then silently
    do nothing; here the first to come and the last to go need not be the same thread.
    """
    clear = getattr(threadpoolctl.OpenBLASController, "clear_controlling_thread", None)
    if clear is not None:
        clear(force=True)
