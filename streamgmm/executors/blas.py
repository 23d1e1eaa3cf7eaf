"""One BLAS thread while blocks run: blocks are the parallelism, and the bits must not depend on the machine."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import scipy.linalg  # noqa: F401  (its BLAS must be loaded before it can be limited)
import threadpoolctl
from threadpoolctl import ThreadpoolController

_lock = threading.Lock()
_holders = 0
_limit: Any = None


@contextmanager
def single_blas_thread() -> Iterator[None]:
    """Limit BLAS to one thread from the first caller's entry to the last caller's exit; then give back what was."""
    global _holders, _limit
    with _lock:
        if _holders == 0:
            _release_control()
            _limit = _controller().limit(limits=1, user_api="blas")
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


@cache
def _controller() -> ThreadpoolController:
    """The BLAS libraries of this process, looked for once: finding them takes 2 ms, and both of ours are loaded."""
    return ThreadpoolController()


def _release_control() -> None:
    """Let this thread set OpenBLAS's number of threads, and the next one too.

    From threadpoolctl 3.8 on the first thread that sets a limit keeps all others from setting one, which then silently
    do nothing; here the first to come and the last to go need not be the same thread.
    """
    clear = getattr(threadpoolctl.OpenBLASController, "clear_controlling_thread", None)
    if clear is not None:
        clear(force=True)
