"""A dask cluster. Nothing is scattered, persisted or changed there, and every wait has a deadline."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress
from importlib.metadata import version
from time import monotonic, sleep
from typing import Any, cast

import distributed
from distributed.comm.core import CommClosedError
from distributed.scheduler import KilledWorker, NoWorkerError
from distributed.utils import key_split_group

from streamgmm.errors import ClusterError, SchedulerError, StreamGMMError
from streamgmm.executors.graph import Reduction, reduction
from streamgmm.executors.serial import call_each
from streamgmm.protocols import Block, Capacity, Shared, Value

#: Seconds of scheduling that a task costs: measured, 2 to 4 ms with two workers on one machine.
CLUSTER_TASK_SECONDS = 0.003

#: Seconds between two looks at the scheduler while nothing has come back.
POLL_SECONDS = 2.0

#: How long an error waits for tasks beside it to end, in seconds.
QUIET_SECONDS = 30.0

#: What a cluster says when it is no longer there.
GONE = (
    CommClosedError,
    getattr(distributed.client, "ClosedClientError", CommClosedError),  # not in the oldest versions
    TimeoutError,
    OSError,
    NoWorkerError,
)


class DistributedExecutor:
    """Runs on the workers of a client's cluster.

    timeout: seconds without a finished task after which a pass is given up with ClusterError.
    """

    def __init__(
        self, client: distributed.Client, timeout: float, capacity: Capacity | None = None, blocks_per_task: int = 1
    ) -> None:
        self._client = client
        self._timeout = timeout
        self.capacity = capacity or self._capacity()
        self.blocks_per_task = blocks_per_task

    def sized(self, blocks_per_task: int) -> DistributedExecutor:
        """The same with another number of blocks a task."""
        return DistributedExecutor(self._client, self._timeout, self.capacity, blocks_per_task)

    def everywhere(self, checks: Sequence[Callable[[], None]]) -> None:
        """Call each check on every worker. Raises what a check raised, ClusterError where a worker does not answer."""
        with self._in_words():
            answers = self._client.run(_answer, tuple(checks), on_error="return", callback_timeout=self._timeout)
        ours = version("streamgmm")
        for address, answer in answers.items():
            if isinstance(answer, (CancelledError, *GONE)) and not isinstance(answer, StreamGMMError):
                continue  # this worker has died meanwhile, and does no harm
            if isinstance(answer, BaseException):
                raise answer
            if answer != ours:
                raise SchedulerError(
                    f"The worker at {address} has streamgmm {answer}, but here it is {ours}. Install the same "
                    "version everywhere."
                )

    def map_reduce(
        self,
        kernel: Callable[[Shared, Block], Value],
        shared: Shared,
        blocks: Sequence[Block],
        graph: Mapping[Hashable, Any] | None = None,
    ) -> Value:
        work = reduction(kernel, shared, blocks, graph or {}, self.blocks_per_task, guarded=True)
        with self._in_words():
            future = self._client.get(work.graph, work.root, sync=False)
        try:
            with self._in_words():
                self._wait(future, work)
                error = future.exception(timeout=self._timeout) if future.status == "error" else None
                value: Any = None if error else future.result(timeout=self._timeout)
        finally:
            future.release()  # the cluster forgets the pass, finished or not, even while an exception is kept
        if error:
            self._until_quiet(work)
            raise self._explained(error, work)
        return cast("Value", value)

    def _until_quiet(self, work: Reduction) -> None:
        """Returns when no worker has a task of the pass, so that nothing is written any more, or in a while."""
        groups, last = {key_split_group(key) for key in work.runs}, monotonic() + min(QUIET_SECONDS, self._timeout)
        within: dict[str, Any] = {"callback_timeout": self._timeout}
        with suppress(CancelledError, *GONE):
            while monotonic() < last and (
                self._client.run_on_scheduler(_known, groups, **within)
                or any(self._client.run(_busy, groups, on_error="ignore", **within).values())
            ):
                sleep(0.05)

    def _wait(self, future: distributed.Future[Any], work: Reduction) -> None:
        """Returns when the future is done. ClusterError where no task of the pass finishes for too long."""
        groups = tuple({key_split_group(key) for key in work.graph})
        seen, since = -1, monotonic()
        while True:
            try:
                future.exception(timeout=min(POLL_SECONDS, self._timeout))  # asks this client, whichever is the default
                return
            except TimeoutError:
                finished, workers = self._client.run_on_scheduler(_progress, groups, callback_timeout=self._timeout)
            if finished != seen:
                seen, since = finished, monotonic()
            elif monotonic() - since > self._timeout:
                raise ClusterError(
                    f"No task finished for {self._timeout:g} s: {finished} of {len(work.graph)} tasks of the pass are "
                    f"done, workers: {workers or 'none'}. Bring workers back, or look at what holds them up; where one "
                    "task may take longer, raise dask's streamgmm.stall-timeout."
                )

    def _explained(self, error: BaseException, work: Reduction) -> BaseException:
        """What a task raised, as it is; for tasks that no worker survived, a sentence."""
        if not isinstance(error, KilledWorker):
            return error
        run = work.runs.get(error.task)
        known = run is not None and run[-1].stop >= 0  # it is not for dask arrays of unknown chunk sizes
        rows = f"the rows {run[0].start:,} to {run[-1].stop:,}" if run and known else f"the task {error.task}"
        limit = self.capacity.limit_bytes
        return ClusterError(
            f"{error.allowed_failures + 1} workers died one after the other while they had to work on {rows}, the last "
            f"one at {error.last_worker.address}. Usually they were out of memory"
            f"{f' (their limit is {limit / 1e6:.0f} MB)' if limit else ''}: give workers more memory or fewer threads, "
            "or use smaller chunks."
        )

    def _capacity(self) -> Capacity:
        """What the cluster has now; waits for a first worker, with a task that an adaptive cluster can see."""
        with self._in_words():
            self._client.submit(_answer, (), pure=False).result(timeout=self._timeout)
            threads = self._client.nthreads()
            workers = self._client.scheduler_info()["workers"].values()  # of some, in some versions; all are alike
        if all(address.startswith("inproc://") for address in threads):
            return Capacity(sum(threads.values()), task_seconds=CLUSTER_TASK_SECONDS)
        limits = [worker["memory_limit"] for worker in workers if worker["memory_limit"]]
        resident = [worker.get("metrics", {}).get("memory", 0) for worker in workers]
        return Capacity(
            n_threads=sum(threads.values()),
            n_processes=len(threads),
            threads_per_process=max(threads.values(), default=1),
            limit_bytes=min(limits, default=None),
            resident_bytes=max(resident, default=0),
            task_seconds=CLUSTER_TASK_SECONDS,
        )

    @contextmanager
    def _in_words(self) -> Iterator[None]:
        try:
            yield
        except (CancelledError, *GONE) as error:
            if isinstance(error, CancelledError) and "scheduler-connection-lost" not in str(error):
                raise ClusterError(
                    f"The pass was cancelled on the cluster at {self._address()} ({error}). It was restarted or "
                    "closed, or results that the dask array holds are lost or belong to another cluster. Fit again."
                ) from error
            raise ClusterError(
                f"The cluster at {self._address()} does not answer or has no worker left "
                f"({type(error).__name__}: {error}). How long to wait for it is set by dask's streamgmm.stall-timeout, "
                f"now {self._timeout:g} s. Look whether its scheduler and workers are alive."
            ) from error

    def _address(self) -> str:
        scheduler = self._client.scheduler
        return str(getattr(scheduler, "address", "an unknown address"))


def _answer(checks: Sequence[Callable[[], None]]) -> str:
    """On a worker: call the checks, and say which version works there."""
    call_each(checks)
    return version("streamgmm")


def _known(groups: set[str], dask_scheduler: Any = None) -> bool:
    """On the scheduler: whether it still knows tasks of these groups."""
    return any(name in dask_scheduler.task_groups for name in groups)


def _busy(groups: set[str], dask_worker: Any = None) -> bool:
    """On a worker: whether it has tasks of these groups, of which one may be running although it was cancelled."""
    return any(key_split_group(key) in groups for key in list(dask_worker.state.tasks))


def _progress(groups: Sequence[str], dask_scheduler: Any = None) -> tuple[int, str]:
    """On the scheduler: tasks of these groups that are done, and how many workers are in which state."""
    states = [dask_scheduler.task_groups[name].states for name in groups if name in dask_scheduler.task_groups]
    done = sum(state[name] for state in states for name in ("memory", "released", "forgotten", "erred"))
    status = [worker.status.name for worker in dask_scheduler.workers.values()]
    return done, ", ".join(f"{status.count(name)} {name}" for name in sorted(set(status)))
