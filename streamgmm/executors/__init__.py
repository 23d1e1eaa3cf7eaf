"""How work runs: map_reduce with one fixed addition tree, on whatever scheduler dask has in force."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import dask
import dask.base
import dask.local
import dask.multiprocessing
import dask.threaded
from dask.utils import parse_timedelta
from distributed import Client, get_worker

from streamgmm.errors import SchedulerError
from streamgmm.executors.blas import single_blas_thread
from streamgmm.executors.distributed import DistributedExecutor
from streamgmm.executors.local import LocalExecutor, dask_workers, each_task, process_executor, threaded_get
from streamgmm.executors.serial import FAN_IN, SerialExecutor
from streamgmm.protocols import Executor, Source

__all__ = [
    "FAN_IN",
    "LocalExecutor",
    "SerialExecutor",
    "each_task",
    "executor_for",
    "memory_scheduler",
    "single_blas_thread",
    "threaded_get",
]

#: How long to wait for the next finished task, where dask's configuration does not say.
STALL_TIMEOUT = "10 minutes"


@contextmanager
def executor_for(source: Source) -> Iterator[Executor]:
    """The executor of the scheduler that dask has in force: a client's cluster, processes, threads, or this thread.

    Rows that other processes cannot reach stay in this one, whatever the scheduler, and so does work that is itself
    a task of a cluster. SchedulerError where dask is set to a scheduler that cannot be used.
    """
    get = _scheduler() if source.travels else memory_scheduler()
    if get is _refused:
        raise SchedulerError(
            "The dask client is asynchronous, but a fit waits for its passes. Make one with "
            "Client(address, asynchronous=False), or run the fit in a thread of its own."
        )
    client = getattr(get, "__self__", None)
    if isinstance(client, Client):
        yield DistributedExecutor(client, _stall_timeout())
    elif (
        not source.uncounted
        and len(source.blocks()) < 2
        and get in (None, dask.local.get_sync, dask.threaded.get, dask.multiprocessing.get)
    ):
        yield LocalExecutor(dask.local.get_sync, 1) if source.graph else SerialExecutor()
    elif get is dask.multiprocessing.get:
        with process_executor(dask_workers(), _stall_timeout()) as executor:
            yield executor
    elif get is dask.local.get_sync:
        yield LocalExecutor(get, 1)
    elif get is None or get is dask.threaded.get:
        yield LocalExecutor(threaded_get, dask_workers())
    else:
        name = f"{getattr(get, '__module__', '')}.{getattr(get, '__qualname__', get)}"
        raise SchedulerError(
            f"dask is set to run on {name}. streamgmm runs on a distributed client and on the 'processes', 'threads' "
            "and 'synchronous' schedulers. Wrap the call in: with dask.config.set(scheduler='threads')."
        )


def memory_scheduler() -> Callable[..., Any]:
    """dask's get function for rows in memory: synchronous where that is in force, else threads of this process."""
    synchronous = _scheduler() is dask.local.get_sync
    return dask.local.get_sync if synchronous else dask.threaded.get


def _scheduler() -> Callable[..., Any] | None:
    """The get function that dask is set to, or None; SchedulerError where dask does not know what it is set to."""
    if _inside_task():  # before dask is asked: it would make a client of the task's own
        return dask.local.get_sync
    try:
        get: Callable[..., Any] | None = dask.base.get_scheduler()
    except ValueError as error:
        raise SchedulerError(f"dask is set to a scheduler that it does not know: {error}") from error
    except RuntimeError as error:
        if "asynchronous" in str(error):
            return _refused
        raise SchedulerError(f"dask's scheduler cannot be used: {error}") from error
    return get


def _refused(*_: Any, **__: Any) -> None:
    """Stands for an asynchronous client, which only rows that travel would need."""


def _inside_task() -> bool:
    """Whether this is a task that a worker of a cluster runs."""
    try:
        get_worker()
    except ValueError:
        return False
    return True


def _stall_timeout() -> float:
    """Seconds to wait for the next finished task: dask's streamgmm.stall-timeout."""
    said = dask.config.get("streamgmm.stall-timeout", STALL_TIMEOUT)
    try:
        seconds = float(parse_timedelta(said))
    except (AttributeError, TypeError, ValueError, KeyError) as error:
        raise SchedulerError(
            f"dask's streamgmm.stall-timeout is {said!r}, but a time such as '10 minutes' is expected."
        ) from error
    if not seconds > 0:
        raise SchedulerError(f"dask's streamgmm.stall-timeout is {said!r}, but it must be more than nothing.")
    return seconds
