"""How work runs: map_reduce with one fixed addition tree, on whatever scheduler dask has in force."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import dask
import dask.base
import dask.local
import dask.system
import dask.threaded

from streamgmm.errors import SchedulerError
from streamgmm.executors.blas import single_blas_thread
from streamgmm.executors.local import LocalExecutor
from streamgmm.executors.serial import FAN_IN, SerialExecutor

__all__ = ["FAN_IN", "LocalExecutor", "SerialExecutor", "memory_scheduler", "pick_executor", "single_blas_thread"]


def pick_executor(n_blocks: int, *, in_memory: bool) -> LocalExecutor | SerialExecutor:
    """The executor for the scheduler that dask has in force; serial where there is one block.

    Rows in memory stay in this process: they run on threads whatever the scheduler. SchedulerError where dask is set
    to a scheduler that cannot be used.
    """
    if n_blocks < 2:
        return SerialExecutor()
    get = memory_scheduler() if in_memory else _scheduler() or dask.threaded.get
    if get is dask.local.get_sync:
        return LocalExecutor(get, 1)
    if get is dask.threaded.get:
        return LocalExecutor(get, _dask_threads())
    name = f"{getattr(get, '__module__', '')}.{getattr(get, '__qualname__', get)}"
    raise SchedulerError(
        f"dask is set to run on {name}, but rows of a store are read on the 'threads' and 'synchronous' schedulers. "
        "Wrap the call in: with dask.config.set(scheduler='threads')."
    )


def memory_scheduler() -> Callable[..., Any]:
    """dask's get function for rows in memory: synchronous where that is in force, else threads of this process."""
    synchronous = _scheduler() is dask.local.get_sync
    return dask.local.get_sync if synchronous else dask.threaded.get


def _scheduler() -> Callable[..., Any] | None:
    """The get function that dask is set to, or None; SchedulerError where dask does not know what it is set to."""
    try:
        get: Callable[..., Any] | None = dask.base.get_scheduler()
    except ValueError as error:
        raise SchedulerError(f"dask is set to a scheduler that it does not know: {error}") from error
    return get


def _dask_threads() -> int:
    """Threads that dask's threaded scheduler will use: its num_workers, its pool, else the cores it may use."""
    pool = dask.config.get("pool", None)
    threads = dask.config.get("num_workers", None) or getattr(pool, "_max_workers", None) or dask.system.CPU_COUNT
    if not isinstance(threads, int) or threads < 1:
        raise SchedulerError(f"dask's num_workers is {threads!r}, but it must be a positive whole number.")
    return threads
