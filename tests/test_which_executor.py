"""Which executor is taken: that of the scheduler that dask has in force, as far as the rows can go there."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import dask
import dask.array as da
import numpy as np
import pytest
import zarr
from clusters import local_cluster
from conftest import write_zarr
from distributed import Client, LocalCluster

from streamgmm import GaussianMixture, open_source
from streamgmm.errors import SchedulerError
from streamgmm.executors import LocalExecutor, SerialExecutor, executor_for, threaded_get
from streamgmm.executors.distributed import DistributedExecutor
from streamgmm.executors.local import ProcessExecutor
from streamgmm.sources import with_weights

ROWS = np.random.default_rng(3).normal(size=(900, 2))
FIT = {"n_components": 2, "max_iter": 2, "tol": 1e9, "random_state": 4}


def custom_get(graph: Any, keys: Any, **options: Any) -> Any:
    raise AssertionError("this scheduler must not run")


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> str:
    return str(write_zarr(tmp_path_factory.mktemp("rows"), ROWS, 100))


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with local_cluster(2, 1, processes=False) as client:
        yield client


@pytest.fixture
def ambient(client) -> Iterator[Client]:
    """A client in force as users have it: nothing but ``with Client(...)`` around the call."""
    with Client(client.scheduler.address) as ambient:
        yield ambient


def in_zarr(path: str) -> Any:
    return open_source(path, block_rows=100)


def in_dask(path: str) -> Any:
    return open_source(da.from_array(ROWS, chunks=(100, 2)))


def in_memory(path: str) -> Any:
    return open_source(ROWS, block_rows=100)


def in_memory_store(path: str) -> Any:
    return open_source(zarr.array(ROWS, chunks=(100, 2), store=zarr.storage.MemoryStore()), block_rows=100)


def weighted_from_a_memory_store(path: str) -> Any:
    """The rows could travel, but their weights cannot."""
    return with_weights(in_zarr(path), zarr.array(np.ones(900), chunks=(100,), store=zarr.storage.MemoryStore()))


def weighted_from_memory(path: str) -> Any:
    return with_weights(in_zarr(path), np.ones(900))


TRAVEL = [in_zarr, in_dask, weighted_from_memory]
STAY = [in_memory, in_memory_store, weighted_from_a_memory_store]


def means(rows: Any) -> np.ndarray:
    return GaussianMixture(**FIT).fit(rows).means_


# -- without a client ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "kind", "threads"),
    [
        ({"scheduler": "synchronous", "num_workers": 5}, LocalExecutor, 1),
        ({"scheduler": "single-threaded"}, LocalExecutor, 1),
        ({"scheduler": "threads", "num_workers": 5}, LocalExecutor, 5),
        ({"num_workers": 3}, LocalExecutor, 3),
        ({"scheduler": "processes", "num_workers": 3}, ProcessExecutor, 3),
        ({"scheduler": "multiprocessing", "num_workers": 2}, ProcessExecutor, 2),
    ],
)
@pytest.mark.parametrize("source", [in_zarr, in_dask])
def test_the_scheduler_in_force_is_used(path, source, settings, kind, threads):
    with dask.config.set(settings), executor_for(source(path)) as executor:
        assert isinstance(executor, kind)
        assert executor.capacity.n_threads == threads
        assert executor.capacity.n_processes == (threads if kind is ProcessExecutor else 0)


def test_one_block_runs_in_the_calling_thread(path):
    with executor_for(open_source(path, block_rows=900)) as executor:
        assert isinstance(executor, SerialExecutor)
    one = open_source(da.from_array(ROWS, chunks=(900, 2)))
    with dask.config.set(scheduler="processes"), executor_for(one) as executor:
        assert executor.capacity == SerialExecutor.capacity
        assert executor.capacity.n_threads == 1


def test_the_pool_that_dask_was_given_is_used(path):
    with ThreadPoolExecutor(3) as pool, dask.config.set(pool=pool), executor_for(in_zarr(path)) as executor:
        assert executor.capacity.n_threads == 3


@pytest.mark.parametrize("source", STAY)
@pytest.mark.parametrize("scheduler", ["processes", custom_get, "threads"])
def test_rows_that_cannot_travel_stay_on_threads(path, source, scheduler):
    with dask.config.set(scheduler=scheduler, num_workers=3), executor_for(source(path)) as executor:
        assert isinstance(executor, LocalExecutor)
        assert executor.capacity == LocalExecutor(threaded_get, 3).capacity


@pytest.mark.parametrize("source", STAY)
def test_rows_that_cannot_travel_run_one_by_one_where_dask_says_so(path, source):
    with dask.config.set(scheduler="synchronous", num_workers=3), executor_for(source(path)) as executor:
        assert executor.capacity.n_threads == 1


def test_rows_in_memory_are_fitted_and_predicted_whatever_the_scheduler():
    rows = np.random.default_rng(0).normal(size=(600_000, 2))
    for scheduler in ("processes", custom_get):
        with dask.config.set(scheduler=scheduler, num_workers=2):
            model = GaussianMixture(1).fit(rows)
            assert model.predict(rows).shape == (600_000,)
        assert model.means_ == pytest.approx(rows.mean(axis=0)[None], abs=1e-12)


# -- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", TRAVEL)
def test_a_scheduler_that_nobody_knows_is_refused(path, source):
    opened = source(path)
    with (
        dask.config.set(scheduler=custom_get),
        pytest.raises(SchedulerError, match=r"custom_get.*'processes', 'threads' and 'synchronous'"),
        executor_for(opened),
    ):
        pass


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"scheduler": "thread"}, "does not know"),
        ({"scheduler": 7}, "does not know: .*7"),
        ({"scheduler": "distributed"}, "no Client active"),
        ({"scheduler": "threads", "num_workers": -1}, "num_workers is -1"),
        ({"scheduler": "threads", "num_workers": 2.5}, "num_workers is 2.5"),
        ({"scheduler": "processes", "num_workers": "four"}, "num_workers is 'four'"),
        ({"scheduler": "processes", "streamgmm.stall-timeout": "soon"}, "stall-timeout is 'soon'"),
        ({"scheduler": "processes", "streamgmm.stall-timeout": "0 s"}, "stall-timeout is '0 s'.*more than nothing"),
        ({"scheduler": "processes", "streamgmm.stall-timeout": -3}, "stall-timeout is -3"),
        ({"scheduler": "processes", "streamgmm.stall-timeout": "nan"}, "stall-timeout is 'nan'"),
        ({"scheduler": "processes", "streamgmm.stall-timeout": [1]}, "stall-timeout is "),
    ],
)
def test_settings_without_meaning_are_refused(path, settings, sentence):
    with dask.config.set(settings), pytest.raises(SchedulerError, match=sentence):
        means(in_zarr(path))


@pytest.mark.parametrize("said", ["soon", "0 s", -1])
def test_a_deadline_without_meaning_is_refused_on_a_cluster(path, ambient, said):
    with dask.config.set({"streamgmm.stall-timeout": said}), pytest.raises(SchedulerError, match="stall-timeout"):
        means(in_zarr(path))


def test_an_asynchronous_client_is_refused_for_stores_only(path):
    async def attempt() -> np.ndarray:
        where = LocalCluster(
            n_workers=1, processes=False, asynchronous=True, dashboard_address="127.0.0.1:0", silence_logs=50
        )
        async with where as cluster, Client(cluster, asynchronous=True):
            for source in (in_zarr, in_dask):
                with pytest.raises(SchedulerError, match=r"asynchronous.*Client\(address, asynchronous=False\)"):
                    means(source(path))
            with dask.config.set(scheduler="threads"):
                np.testing.assert_array_equal(means(in_zarr(path)), means(in_memory(path)))
            return means(in_memory(path))

    found = asyncio.run(attempt())
    np.testing.assert_array_equal(found, means(in_memory(path)))


# -- with a client -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", TRAVEL)
def test_the_client_in_force_is_used(path, source, ambient):
    with executor_for(source(path)) as executor:
        assert isinstance(executor, DistributedExecutor)
        assert executor.capacity.n_threads == 2


def test_one_block_goes_to_the_cluster_too(path, ambient):
    """The client's machine may not see the store's rows as fast, or not have the memory."""
    with executor_for(open_source(path, block_rows=900)) as executor:
        assert isinstance(executor, DistributedExecutor)


@pytest.mark.parametrize("scheduler", ["threads", "synchronous", "processes"])
def test_a_scheduler_that_is_named_wins_over_the_client(path, ambient, scheduler):
    with dask.config.set(scheduler=scheduler), executor_for(in_zarr(path)) as executor:
        assert isinstance(executor, ProcessExecutor if scheduler == "processes" else LocalExecutor)


def test_the_cluster_can_be_named(path, ambient):
    with dask.config.set(scheduler="distributed"), executor_for(in_zarr(path)) as executor:
        assert isinstance(executor, DistributedExecutor)


@pytest.mark.parametrize("source", STAY)
def test_rows_that_cannot_travel_stay_here_whatever_the_client(path, source, ambient):
    with dask.config.set(num_workers=3), executor_for(source(path)) as executor:
        assert isinstance(executor, LocalExecutor)
        assert executor.capacity.n_threads == 3


def test_no_task_reaches_the_cluster_for_rows_that_cannot_travel(path, ambient):
    before = ambient.run_on_scheduler(transitions)
    for source in STAY:
        means(source(path))
    assert ambient.run_on_scheduler(transitions) == before
    means(in_zarr(path))
    assert ambient.run_on_scheduler(transitions) > before


def transitions(dask_scheduler: Any) -> int:
    """Changes of state of all tasks so far."""
    return dask_scheduler.transition_counter


@pytest.mark.parametrize("named", [lambda client: client, lambda client: client.get], ids=["client", "get"])
def test_a_client_that_is_named_need_not_be_the_default_one(path, client, named):
    expected = means(in_zarr(path))
    with dask.config.set(scheduler=named(client)), executor_for(in_zarr(path)) as executor:
        assert isinstance(executor, DistributedExecutor)
        np.testing.assert_array_equal(means(in_zarr(path)), expected)


def test_all_workers_of_a_cluster_count():
    """Clients of some versions tell of five workers only, unless they are asked for all."""
    with local_cluster(7, 2, processes=False) as client:
        assert DistributedExecutor(client, 60.0).capacity.n_threads == 14


# -- inside a task -------------------------------------------------------------------------------------------------


def fit_inside(kind: str, path: str) -> tuple[str, int, np.ndarray]:
    """Name and threads of the executor, and the means."""
    source = {source.__name__: source for source in (*TRAVEL, *STAY)}[kind](path)
    with executor_for(source) as executor:
        found = type(executor).__name__, executor.capacity.n_threads
    return *found, means(source)


@pytest.mark.parametrize("source", [in_zarr, in_dask, in_memory, in_memory_store])
def test_inside_a_task_a_fit_runs_on_its_own_thread(path, source):
    """On a worker of one thread anything else would wait for itself. Nor does it make a client for its process."""
    expected = means(source(path))
    with local_cluster(1, 1, processes=False) as client:
        before = client.run_on_scheduler(transitions)
        kind, threads, found = client.submit(fit_inside, source.__name__, path, pure=False).result(timeout=60)
        # of the task that fits: released, waiting, processing, memory
        assert client.run_on_scheduler(transitions) <= before + 5
        with pytest.raises(ValueError, match="No clients found"):
            Client.current()
    assert kind == "LocalExecutor"
    assert threads == 1
    np.testing.assert_array_equal(found, expected)
