"""A fit is a guest: what it finds in dask's configuration, in BLAS and on the cluster, it leaves behind."""

from __future__ import annotations

import copy
import re
import signal
import threading
import warnings
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import numpy as np
import pytest
import threadpoolctl
from clusters import (
    blas_threads,
    held,
    local_cluster,
    readers,
    two_blas_threads,
    wait_until,
    watched_array,
)
from dask.utils import key_split
from distributed import Client
from distributed.diagnostics.plugin import SchedulerPlugin
from sklearn.exceptions import ConvergenceWarning

from streamgmm import GaussianMixture, open_source
from streamgmm.errors import ClusterError, DataError, SchedulerError

ROWS = np.random.default_rng(9).normal(size=(3_700, 4))


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with local_cluster(2) as client:
        client.run(two_blas_threads)
        yield client


def fitted(rows: Any) -> GaussianMixture:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return GaussianMixture(2, solver="em", max_iter=2, tol=0.0, random_state=1).fit(rows)


def in_blocks(folder: Path, rows: np.ndarray) -> Any:
    return open_source(watched_array(folder, rows, 100), block_rows=100)


def with_a_hole() -> np.ndarray:
    rows = ROWS.copy()
    rows[2_345, 1] = np.nan
    return rows


# -- what a fit may come to ----------------------------------------------------------------------------------------


def that_fits(folder: Path) -> None:
    fitted(in_blocks(folder, ROWS))


def of_an_array_that_fits(folder: Path) -> None:
    fitted(da.from_array(ROWS, chunks=(100, 2)))


def with_bad_rows(folder: Path) -> None:
    with pytest.raises(DataError, match="row 2345, column 1"):
        fitted(in_blocks(folder, with_a_hole()))


def of_an_array_with_bad_rows(folder: Path) -> None:
    with pytest.raises(DataError, match="row 2345, column 1"):
        fitted(da.from_array(with_a_hole(), chunks=(100, 2)))


def that_is_given_up(folder: Path) -> None:
    source = in_blocks(folder, ROWS)
    with (
        held(source.array, "c/20/0", 2),
        dask.config.set({"streamgmm.stall-timeout": "1 s"}),
        pytest.raises(ClusterError, match="No task finished"),
    ):
        fitted(source)


def that_is_interrupted(folder: Path) -> None:
    """As with Ctrl-C, in the second read; threads of this process end what they have begun."""
    source = in_blocks(folder, ROWS)

    def interrupt() -> None:
        wait_until(lambda: len(readers(source.array, "c/20/0")) >= 2)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        hold.unlink(missing_ok=True)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    thread = threading.Thread(target=interrupt)
    try:
        with held(source.array, "c/20/0", 2) as hold:
            thread.start()
            with pytest.raises(KeyboardInterrupt, match=r"^$"):
                fitted(source)
        thread.join()
    finally:
        signal.signal(signal.SIGINT, before)


FITS = [
    that_fits,
    of_an_array_that_fits,
    with_bad_rows,
    of_an_array_with_bad_rows,
    that_is_given_up,
    that_is_interrupted,
]


# -- what it leaves ------------------------------------------------------------------------------------------------


def task_names(dask_scheduler: Any) -> set[str]:
    return {str(key) for key in dask_scheduler.tasks}


@pytest.mark.parametrize("fit", FITS)
def test_other_data_on_the_cluster_stay_where_they_are(client, tmp_path, fit):
    """Nor does a task of ours stay behind, though the exception of a fit that failed is still there."""
    with client.as_current():
        persisted = da.ones((400, 4), chunks=(100, 4)).persist()
        scattered = client.scatter(np.arange(9), hash=False)
        wait_until(lambda: all(client.who_has(persisted).values()))
        places, names = client.who_has([*client.futures_of(persisted), scattered]), client.run_on_scheduler(task_names)
        assert len(places) == 5
        fit(tmp_path)
        wait_until(lambda: client.run_on_scheduler(task_names) <= names, 20)
        assert client.who_has([*client.futures_of(persisted), scattered]) == places
        assert persisted.sum().compute() == 1600
        np.testing.assert_array_equal(scattered.result(), np.arange(9))


@pytest.mark.parametrize(
    ("scheduler", "fit"),
    [
        *product([None, "threads", "synchronous"], [that_fits, with_bad_rows, that_is_interrupted]),
        pytest.param("processes", that_fits, marks=pytest.mark.long),
        pytest.param("processes", with_bad_rows, marks=pytest.mark.long),
    ],
)
def test_the_configuration_and_blas_are_as_before(client, tmp_path, scheduler, fit):
    settings = {"num_workers": 2, **({} if scheduler is None else {"scheduler": scheduler})}
    with client.as_current(), dask.config.set(settings), threadpoolctl.threadpool_limits(3, user_api="blas"):
        before, threads, elsewhere = copy.deepcopy(dask.config.config), blas_threads(), client.run(blas_threads)
        assert set(threads) == {3}
        assert all(set(numbers) == {2} for numbers in elsewhere.values())
        fit(tmp_path)
        assert dask.config.config == before
        assert blas_threads() == threads
        # a task that began before the fit was given up ends later
        wait_until(lambda: client.run(blas_threads) == elsewhere, 20)


def test_rows_that_lie_in_the_clusters_memory_are_fitted_there(client):
    with client.as_current():
        persisted = da.from_array(ROWS, chunks=(100, 4)).persist()
        wait_until(lambda: all(client.who_has(persisted).values()))
        names = client.run_on_scheduler(task_names)
        found = fitted(persisted)
        # dask may move a chunk to where it is used, but it is there
        assert all(client.who_has(persisted).values())
        wait_until(lambda: client.run_on_scheduler(task_names) <= names, 20)
    np.testing.assert_array_equal(found.means_, fitted(da.from_array(ROWS, chunks=(100, 4))).means_)
    with dask.config.set(scheduler="threads"), pytest.raises(SchedulerError, match="in the memory of a cluster"):
        fitted(persisted)


class NamesOfTasks(SchedulerPlugin):
    """The names of all tasks that were ever on the scheduler."""

    def __init__(self) -> None:
        self.seen: set[str] = set()

    def transition(self, key: Any, start: str, finish: str, *arguments: Any, **options: Any) -> None:
        self.seen.add(key_split(key))


def test_tasks_have_names_that_can_be_read(client, tmp_path):
    names = NamesOfTasks()
    client.cluster.scheduler.add_plugin(names, name="names-of-tasks")
    try:
        with client.as_current():
            that_fits(tmp_path)
    finally:
        client.cluster.scheduler.remove_plugin("names-of-tasks")
    assert {"estep", "merge"} <= names.seen
    assert all(re.fullmatch("[a-z]+", name) for name in names.seen), names.seen
