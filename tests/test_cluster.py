"""Workers that die, hang or are not there: the same bits where others can go on, else an error in words and in time.

Processes are killed with SIGKILL, in the middle of a pass: a store holds the read of one chunk until that is done.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

import dask
import dask.multiprocessing
import numpy as np
import pytest
import zarr
from clusters import (
    HereOnlyStore,
    Numbered,
    Tree,
    WatchedStore,
    die,
    held,
    kernel_that_dies,
    kernel_that_hangs,
    kernel_that_meets,
    leaf,
    local_cluster,
    noted,
    readers,
    wait_until,
    watched_array,
)
from distributed import Client
from sklearn.exceptions import ConvergenceWarning

import streamgmm.executors.distributed
from streamgmm import GaussianMixture, open_source
from streamgmm.errors import ClusterError, SchedulerError, SourceError
from streamgmm.executors import executor_for
from streamgmm.executors.local import ProcessExecutor, process_executor

N = 73 * 100 + 37
FIT = {"n_components": 3, "solver": "em", "max_iter": 3, "tol": 0.0, "random_state": 7}

#: the chunk that is held, and in which read of it: the pilot's is the first, that of the second pass the third
HELD, TIMES = "c/40/0", 3


def new_array(folder: Path, kind: type[WatchedStore] = WatchedStore) -> zarr.Array[Any]:
    rng = np.random.default_rng(6)
    return watched_array(folder, rng.normal(size=(N, 4)) + 3.0 * rng.integers(3, size=(N, 1)), 100, kind)


def fitted(array: zarr.Array[Any]) -> GaussianMixture:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return GaussianMixture(**FIT).fit(open_source(array, block_rows=100))


def bits(model: GaussianMixture) -> list[bytes]:
    return [
        np.asarray(getattr(model, name)).tobytes() for name in ("weights_", "means_", "covariances_", "lower_bounds_")
    ]


@pytest.fixture
def array(tmp_path) -> zarr.Array[Any]:
    return new_array(tmp_path)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> list[bytes]:
    with dask.config.set(scheduler="synchronous"):
        return bits(fitted(new_array(tmp_path_factory.mktemp("undisturbed"))))


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with local_cluster(2) as client:
        yield client


@contextmanager
def meanwhile(action: Callable[[], None]) -> Iterator[None]:
    """Run the action in a thread beside; what it raises comes out at the end."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(action)
        yield
        future.result(timeout=60)


@contextmanager
def gives_up(sentence: str, timeout: float = 2.0) -> Iterator[None]:
    """ClusterError with these words, not long after the deadline that dask's configuration sets."""
    began = monotonic()
    with (
        dask.config.set({"streamgmm.stall-timeout": f"{timeout} s"}),
        pytest.raises(ClusterError, match=sentence),
    ):
        yield
    assert monotonic() - began < timeout + 20


def reading(array: zarr.Array[Any], times: int = TIMES) -> int:
    """The process that holds, once it does."""
    return wait_until(lambda: readers(array, HELD)[times - 1 : times])[0]


def kill(*processes: int) -> None:
    for process in processes:
        os.kill(process, signal.SIGKILL)


# -- workers that die ----------------------------------------------------------------------------------------------


def with_parameters(dask_scheduler: Any) -> set[str]:
    """Addresses of the workers that hold the parameters of the pass."""
    tasks = dask_scheduler.tasks.values()
    return {worker.address for task in tasks if "parameters-" in str(task.key) for worker in task.who_has}


def the_reader(client: Client, processes: dict[str, int], reader: int) -> set[int]:
    return {reader}


def the_other(client: Client, processes: dict[str, int], reader: int) -> set[int]:
    """It holds results that wait to be merged."""
    return set(processes.values()) - {reader}


def those_with_parameters(client: Client, processes: dict[str, int], reader: int) -> set[int]:
    return {processes[address] for address in client.run_on_scheduler(with_parameters)}


def all_of_them(client: Client, processes: dict[str, int], reader: int) -> set[int]:
    """Nannies start new ones; parameters and results are lost."""
    assert those_with_parameters(client, processes, reader)
    return set(processes.values())


@pytest.mark.parametrize(
    "victims",
    [
        the_reader,
        all_of_them,
        pytest.param(the_other, marks=pytest.mark.long),
        pytest.param(those_with_parameters, marks=pytest.mark.long),
    ],
)
def test_a_worker_killed_in_mid_pass_changes_no_bit(client, array, undisturbed, victims):
    killed: set[int] = set()

    def act() -> None:
        reader = reading(array)
        killed.update(victims(client, client.run(os.getpid), reader))
        kill(*killed)
        hold.unlink()

    with client.as_current(), held(array, HELD, TIMES) as hold, meanwhile(act):
        model = fitted(array)
    assert killed
    assert bits(model) == undisturbed
    assert len(readers(array, HELD)) == model.n_passes_ + (victims is not the_other)
    assert not killed & set(wait_until(partial(client.run, os.getpid)).values())


def kill_each_reader(array: zarr.Array[Any], stop: threading.Event, killed: list[int]) -> None:
    while not stop.wait(0.02):
        for process in readers(array, HELD)[len(killed) :]:
            kill(process)
            killed.append(process)


def fitted_until(array: zarr.Array[Any], stop: threading.Event) -> None:
    try:
        fitted(array)
    finally:
        stop.set()


def assert_task_that_no_worker_survives(client: Client, array: zarr.Array[Any], deaths: int) -> None:
    stop, killed = threading.Event(), []
    sentence = rf"{deaths} workers died one after the other .* the rows [\d,]+ to [\d,]+, .* limit is \d+ MB"
    with (
        client.as_current(),
        held(array, HELD, 1),
        meanwhile(partial(kill_each_reader, array, stop, killed)),
        pytest.raises(ClusterError, match=sentence),
    ):
        fitted_until(array, stop)
    assert len(set(killed)) == deaths


def test_a_task_that_no_worker_survives_is_named_by_its_rows(client, array, monkeypatch, undisturbed):
    monkeypatch.setattr(client.cluster.scheduler, "allowed_failures", 1)
    assert_task_that_no_worker_survives(client, array, 2)
    with client.as_current():
        assert bits(fitted(array)) == undisturbed


@pytest.mark.long
def test_a_task_that_no_worker_survives_under_dasks_own_settings(client, array):
    assert_task_that_no_worker_survives(client, array, 4)


def test_a_worker_that_dies_during_the_checks_does_no_harm(client, tmp_path):
    with client.as_current(), executor_for(open_source(new_array(tmp_path), block_rows=100)) as executor:
        executor.everywhere([partial(die, tmp_path / "victim")])
        assert (tmp_path / "victim").exists()
        assert executor.map_reduce(leaf, "x", [Numbered(0), Numbered(1)]) == Tree(("x0", "x1"))


# -- nobody answers ------------------------------------------------------------------------------------------------


def test_a_task_that_never_ends_is_given_up(client, array, undisturbed):
    with client.as_current():
        wait_until(lambda: len(client.nthreads()) == 2)
        with held(array, HELD, TIMES), gives_up(r"No task finished for 2 s: \d+ of \d+ tasks .* workers: 2 running"):
            fitted(array)
        assert len(readers(array, HELD)) == TIMES
        assert bits(fitted(array)) == undisturbed


def test_a_cluster_without_workers_is_given_up_before_the_first_pass(array):
    with local_cluster(0) as client, client.as_current(), gives_up("no worker", 1.0):
        fitted(array)
    assert not noted(array.store.root.with_name("reads"))


@contextmanager
def separate_cluster(folder: Path) -> Iterator[tuple[Client, subprocess.Popen[bytes], subprocess.Popen[bytes]]]:
    """A client of a scheduler in a process of its own, that process, and that of a worker that nobody starts again."""
    file, tests = folder / "scheduler.json", str(Path(__file__).parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([tests, os.environ.get("PYTHONPATH", "")])}
    start = partial(subprocess.Popen, env=environment, stderr=subprocess.DEVNULL)
    common = ["--scheduler-file", str(file), "--host", "127.0.0.1", "--no-dashboard"]
    python = [sys.executable, "-m"]
    with (
        start([*python, "distributed.cli.dask_scheduler", "--port", "0", *common]) as scheduler,
        start([*python, "distributed.cli.dask_worker", "--no-nanny", "--nthreads", "1", *common]) as worker,
    ):
        try:
            wait_until(lambda: file.exists() and file.read_text())
            with Client(scheduler_file=str(file), set_as_default=False) as client:
                client.wait_for_workers(1, timeout=60)
                client.run(__import__, "streamgmm.pilot")
                yield client, scheduler, worker
        finally:
            scheduler.kill()
            worker.kill()


def test_the_last_worker_killed_in_mid_pass_is_an_error(array, tmp_path):
    with separate_cluster(tmp_path) as (client, _, worker), client.as_current():

        def act() -> None:
            assert reading(array) == worker.pid
            worker.kill()

        with held(array, HELD, TIMES), meanwhile(act), gives_up(r"No task finished for 2 s: .* workers: none"):
            fitted(array)
        with gives_up("no worker"):
            fitted(array)


def test_a_scheduler_killed_in_mid_pass_is_an_error(array, tmp_path):
    with separate_cluster(tmp_path) as (client, scheduler, _), client.as_current():

        def act() -> None:
            reading(array)
            scheduler.kill()

        with held(array, HELD, TIMES), meanwhile(act), gives_up("The cluster at tcp://.* does not answer"):
            fitted(array)
        with gives_up("The cluster at .* does not answer"):
            fitted(array)


# -- a pool of processes -------------------------------------------------------------------------------------------


@pytest.fixture
def no_process_left() -> Iterator[None]:
    before = set(multiprocessing.active_children())
    yield
    assert set(multiprocessing.active_children()) <= before


def test_a_process_of_the_pool_that_dies_is_an_error(no_process_left):
    with (
        pytest.raises(ClusterError, match=r"A process of the pool died.*memory"),
        process_executor(2, 60.0) as executor,
    ):
        executor.map_reduce(kernel_that_dies, None, [Numbered(i) for i in range(9)])


def test_a_process_of_the_pool_that_hangs_is_killed(no_process_left, tmp_path):
    began = monotonic()
    with ProcessPoolExecutor(2, mp_context=dask.multiprocessing.get_context()) as pool:
        ProcessExecutor(pool, 2, 60.0).map_reduce(kernel_that_meets, tmp_path, [Numbered(0), Numbered(1)])
        with pytest.raises(ClusterError, match=r"No task finished for 1\.5 s.*stall-timeout"):
            ProcessExecutor(pool, 2, 1.5).map_reduce(kernel_that_hangs, tmp_path, [Numbered(i) for i in range(9)])
    assert monotonic() - began < 60
    assert len(noted(tmp_path / "hangs")) == 1


def test_an_error_beside_a_process_that_hangs_comes_out_at_once(no_process_left, tmp_path):
    """Nobody waits for what still runs in the pool: it has no deadline any more."""
    (tmp_path / "raise").touch()
    over, rescued = threading.Event(), threading.Event()

    def rescue() -> None:
        """Whoever waits for the process for good is freed, and too late."""
        hanging = int(wait_until(lambda: noted(tmp_path / "hangs"))[0])
        if not over.wait(15.0):
            rescued.set()
            kill(hanging)

    with meanwhile(rescue):
        with pytest.raises(SourceError, match="block 7 is bad"), process_executor(2, 60.0) as executor:
            executor.map_reduce(kernel_that_hangs, tmp_path, [Numbered(i) for i in range(9)])
        over.set()
    assert not rescued.is_set()


@pytest.mark.long
def test_a_fit_whose_process_dies_or_hangs_is_an_error(no_process_left, array):
    with dask.config.set(scheduler="processes", num_workers=2):
        with (
            held(array, HELD, TIMES),
            meanwhile(lambda: kill(reading(array))),
            pytest.raises(ClusterError, match="A process of the pool died"),
        ):
            fitted(array)
        again = 2 * TIMES
        with held(array, HELD, again), gives_up("No task finished for 10", 10.0):
            fitted(array)
        assert len(readers(array, HELD)) == again


# -- before the first pass -----------------------------------------------------------------------------------------


def assert_refused_unread(array: zarr.Array[Any]) -> None:
    with pytest.raises(SourceError, match=r"rows\.zarr|nowhere") as caught:
        fitted(array)
    assert "cannot be opened on" in str(caught.value)
    assert not noted(array.store.root.with_name("reads"))


def test_a_store_that_workers_do_not_see_is_noticed_before_a_chunk_is_read(client, tmp_path, undisturbed):
    array = new_array(tmp_path, HereOnlyStore)
    with client.as_current():
        assert_refused_unread(array)
    assert bits(fitted(array)) == undisturbed


def test_a_store_that_one_worker_does_not_see_is_noticed_too(client, tmp_path):
    array = new_array(tmp_path, HereOnlyStore)
    wait_until(lambda: len(client.nthreads()) == 2)
    for blind in client.run(os.getpid).values():
        (tmp_path / "blind").write_text(f"{blind}\n")
        with client.as_current():
            assert_refused_unread(array)


def test_a_store_that_the_processes_of_a_pool_do_not_see_is_noticed_too(no_process_left, tmp_path):
    with dask.config.set(scheduler="processes", num_workers=1):
        assert_refused_unread(new_array(tmp_path, HereOnlyStore))


def test_another_version_on_the_workers_is_refused(client, array, monkeypatch):
    found = streamgmm.executors.distributed.version("streamgmm")
    monkeypatch.setattr(streamgmm.executors.distributed, "version", lambda name: "0.0.0")
    with client.as_current(), pytest.raises(SchedulerError, match=f"has streamgmm {found}, but here it is 0.0.0"):
        fitted(array)
    assert not noted(array.store.root.with_name("reads"))
