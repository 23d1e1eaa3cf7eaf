"""Dask's schedulers on this machine: threads of this process, the calling thread, or a pool of processes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from time import monotonic
from typing import Any

import dask.multiprocessing
import dask.system
import dask.threaded
from dask._task_spec import TaskRef
from dask.callbacks import Callback

from streamgmm.errors import ClusterError, SchedulerError
from streamgmm.executors.graph import reduction
from streamgmm.executors.serial import call_each
from streamgmm.protocols import Block, Capacity, Shared, Value

#: Seconds that a task costs where dask sends it to a process and back.
PROCESS_TASK_SECONDS = 0.003


class LocalExecutor:
    """Runs on a dask ``get`` function in this process: ``dask.get`` or ``threaded_get``."""

    def __init__(self, get: Callable[..., Any], n_threads: int, blocks_per_task: int = 1) -> None:
        self._get = get
        self.capacity = Capacity(n_threads)
        self.blocks_per_task = blocks_per_task

    def sized(self, blocks_per_task: int) -> LocalExecutor:
        """The same with another number of blocks a task."""
        return LocalExecutor(self._get, self.capacity.n_threads, blocks_per_task)

    def everywhere(self, checks: Sequence[Callable[[], None]]) -> None:
        call_each(checks)

    def map_reduce(
        self,
        kernel: Callable[[Shared, Block], Value],
        shared: Shared,
        blocks: Sequence[Block],
        graph: Mapping[Hashable, Any] | None = None,
    ) -> Value:
        _refuse_futures(graph or {})
        work = reduction(kernel, shared, blocks, graph or {}, self.blocks_per_task, guarded=False)
        value: Value = self._get(work.graph, work.root, callbacks=_callbacks())
        return value


def threaded_get(graph: Mapping[Any, Any], key: Any, **options: Any) -> Any:
    """dask's threaded scheduler on threads that have ended when this returns: after an error nothing runs on."""
    with ThreadPoolExecutor(dask_workers(), thread_name_prefix="streamgmm") as pool:
        return dask.threaded.get(graph, key, pool=pool, **options)


def dask_workers() -> int:
    """Threads or processes that dask's scheduler will use: its num_workers, its pool, else the cores it may use."""
    pool = dask.config.get("pool", None)
    said = dask.config.get("num_workers", None)
    workers = (getattr(pool, "_max_workers", None) or dask.system.CPU_COUNT) if said is None else said
    if not isinstance(workers, int) or workers < 1:
        raise SchedulerError(f"dask's num_workers is {workers!r}, but it must be a positive whole number.")
    return workers


@contextmanager
def each_task(finished: Callable[[str], None]) -> Iterator[None]:
    """Call ``finished`` with the name of each task that ends on this machine while this is open."""
    token = _LISTENERS.set((*_LISTENERS.get(), finished))
    try:
        yield
    finally:
        _LISTENERS.reset(token)


#: Who hears of the tasks of this thread's calls. dask's own callbacks are one set for all threads.
_LISTENERS: ContextVar[tuple[Callable[[str], None], ...]] = ContextVar("listeners", default=())


def _callbacks(*more: Callable[[str], None]) -> list[Any]:
    """dask's callbacks in force, and ours."""
    listeners = (*_LISTENERS.get(), *more)

    def finished(key: Any, *_: Any) -> None:
        for listener in listeners:
            listener(str(key[0] if isinstance(key, tuple) else key))

    return [*Callback.active, Callback(posttask=finished)._callback]


class ProcessExecutor:
    """Runs on dask's ``processes`` scheduler, in a pool that lives as long as the fit."""

    def __init__(self, pool: ProcessPoolExecutor, n_processes: int, timeout: float, blocks_per_task: int = 1) -> None:
        self._pool = pool
        self._timeout = timeout
        self.capacity = Capacity(n_processes, n_processes, task_seconds=PROCESS_TASK_SECONDS)
        self.blocks_per_task = blocks_per_task

    def sized(self, blocks_per_task: int) -> ProcessExecutor:
        """The same with another number of blocks a task."""
        return ProcessExecutor(self._pool, self.capacity.n_processes, self._timeout, blocks_per_task)

    def everywhere(self, checks: Sequence[Callable[[], None]]) -> None:
        """Call each check in one of the processes: they see the same files."""
        self._get({"checks": (partial(call_each, checks),)}, "checks")

    def map_reduce(
        self,
        kernel: Callable[[Shared, Block], Value],
        shared: Shared,
        blocks: Sequence[Block],
        graph: Mapping[Hashable, Any] | None = None,
    ) -> Value:
        _refuse_futures(graph or {})
        work = reduction(kernel, shared, blocks, graph or {}, self.blocks_per_task, guarded=True)
        value: Value = self._get(work.graph, work.root)
        return value

    def _get(self, graph: Mapping[Any, Any], key: Any) -> Any:
        options = {"pool": self._pool, "optimize_graph": False, "chunksize": 1}
        with _watched(self._pool, self._timeout) as alive:
            return dask.multiprocessing.get(graph, key, callbacks=_callbacks(alive), **options)


@contextmanager
def process_executor(n_processes: int, timeout: float) -> Iterator[ProcessExecutor]:
    """An executor whose pool of processes ends with the block. They start when the first task comes."""
    with ProcessPoolExecutor(n_processes, mp_context=dask.multiprocessing.get_context()) as pool:
        try:
            yield ProcessExecutor(pool, n_processes, timeout)
        except BaseException:
            _kill(pool)  # what runs beside an error may never end
            raise
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def _watched(pool: ProcessPoolExecutor, timeout: float) -> Iterator[Callable[[str], None]]:
    """Turn a death in the pool into ClusterError, and a silence of ``timeout`` seconds into a death.

    Yields what breaks the silence: to be called with the name of each finished task.
    """
    last, done, stalled = [monotonic()], threading.Event(), threading.Event()

    def watch() -> None:
        while not done.wait(min(1.0, timeout / 4)):
            if monotonic() - last[0] > timeout:
                stalled.set()
                _kill(pool)
                return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield lambda task: last.__setitem__(0, monotonic())
    except BrokenProcessPool as error:
        if stalled.is_set():
            raise ClusterError(
                f"No task finished for {timeout:g} s, so the processes were stopped. Where one task may take longer, "
                "raise dask's streamgmm.stall-timeout; else look for what hangs, such as a store that does not answer."
            ) from error
        raise ClusterError(
            "A process of the pool died. Usually it was out of memory: use fewer processes "
            "(dask.config.set(num_workers=1)) or smaller chunks. In a script, the fit must stand under "
            "if __name__ == '__main__':, for each process imports the script anew."
        ) from error
    finally:
        done.set()
        watcher.join()


def _kill(pool: ProcessPoolExecutor) -> None:
    for process in list((pool._processes or {}).values()):  # there is no public way before Python 3.14
        process.kill()


def _refuse_futures(graph: Mapping[Hashable, Any]) -> None:
    """SchedulerError where the graph needs what lies in a cluster's memory."""
    if any(isinstance(node, TaskRef) for node in graph.values()):
        raise SchedulerError(
            "The dask array holds results in the memory of a cluster, but dask is set to run on this machine, or the "
            "rows beside it are in memory here. Call within that cluster's client and without another scheduler set, "
            "or give an array that is not persisted."
        )
