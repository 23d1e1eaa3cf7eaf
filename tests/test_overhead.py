"""What scheduling costs: few tasks where chunks are small, small graphs, and the parameters in them once."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import dask
import dask.array as da
import distributed.protocol.pickle
import numpy as np
import pytest
import zarr
from clusters import local_cluster
from distributed import Client

from streamgmm import GaussianMixture, open_source
from streamgmm.covariance import STRUCTURES
from streamgmm.executors import executor_for
from streamgmm.executors.distributed import CLUSTER_TASK_SECONDS
from streamgmm.executors.graph import reduction
from streamgmm.kernel import Scorer, e_step, prepare
from streamgmm.params import MixtureParams
from streamgmm.sources import with_weights

K, D, TASKS = 64, 60, 4_000
MOST_BYTES = 10_000_000


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with local_cluster(2) as client:
        yield client


@pytest.fixture(scope="module")
def scorers() -> tuple[Scorer, ...]:
    """What a pass sends: a mixture of 64 full covariances in 60 features, made ready for rows."""
    rng = np.random.default_rng(3)
    factors = rng.normal(size=(K, D, D))
    covariance = STRUCTURES["full"].from_dense(factors @ factors.transpose(0, 2, 1) / D + np.eye(D))
    params = MixtureParams(rng.dirichlet(np.ones(K)), rng.normal(size=(K, D)), covariance)
    return (prepare(params, params.frame()),)


@pytest.fixture(scope="module")
def many_chunks(tmp_path_factory: pytest.TempPathFactory) -> zarr.Array[Any]:
    """A store of 4,000 chunks of which nothing is ever written or read."""
    path = tmp_path_factory.mktemp("overhead") / "rows.zarr"
    return zarr.create_array(path, shape=(TASKS * 50, D), chunks=(50, D), dtype="float32", fill_value=0)


def opened(array: zarr.Array[Any], kind: str) -> Any:
    """A source of as many blocks as the store has chunks."""
    if kind == "dask":
        return open_source(da.from_zarr(array))
    source = open_source(array, block_rows=50, missing_chunks="fill")
    return with_weights(source, da.ones(array.shape[0], chunks=50)) if kind == "weighted" else source


# -- few tasks ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_chunks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,000 chunks of 100 kB."""
    path = tmp_path_factory.mktemp("overhead") / "small.zarr"
    array = zarr.create_array(path, shape=(1_250_000, 20), chunks=(1_250, 20), dtype="float32", compressors=None)
    array[...] = np.random.default_rng(0).normal(size=(1_250, 20)).astype("float32")[np.arange(1_250_000) % 1_250]
    sizes = [file.stat().st_size for file in (path / "c").rglob("*") if file.is_file()]
    assert (len(sizes), set(sizes)) == (1_000, {100_000})
    return path


def finished(client: Client, prefix: str) -> int:
    """Tasks of that name that the cluster has finished so far."""

    def count(dask_scheduler: Any) -> int:
        found = dask_scheduler.task_prefixes.get(prefix)
        return 0 if found is None else found.state_counts["memory"]

    return client.run_on_scheduler(count)


def test_small_chunks_of_a_store_share_tasks(client, small_chunks):
    """Counted on the scheduler: a pass is a handful of tasks, and half a second of scheduling has room for 100."""
    start = {"weights_init": [0.5, 0.5], "means_init": np.eye(2, 20), "precisions_init": np.ones((2, 20))}
    model = GaussianMixture(2, covariance_type="diag", solver="em", max_iter=2, tol=0.0, **start)
    with client.as_current():
        plan = model.plan(small_chunks)
        assert (plan.n_processes, plan.remarks) == (2, ())
        assert plan.n_tasks * CLUSTER_TASK_SECONDS < 0.1
        before = {name: finished(client, name) for name in ("estep", "surveyblock", "merge")}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.fit(small_chunks)
    ran = {name: finished(client, name) - count for name, count in before.items()}
    assert ran["estep"] == 2 * plan.n_tasks
    assert ran["surveyblock"] == plan.n_tasks
    assert 3 <= ran["merge"] <= 3 * plan.n_tasks


def test_blocks_as_small_as_chunks_share_tasks_too(client, small_chunks):
    """block_rows= fixes the last bits, never the number of tasks: four for each thread are enough."""
    with client.as_current():
        plan = GaussianMixture(2).plan(open_source(small_chunks, block_rows=1_250))
    assert plan.n_blocks == 1_000
    assert 4 * plan.n_threads <= plan.n_tasks < 32 * plan.n_threads


def test_a_dask_array_of_small_chunks_says_what_it_costs_and_the_way_out(client, small_chunks):
    """One task a chunk. The way out is real: neither the store nor the array in larger chunks gets a remark for it."""
    array = da.from_zarr(str(small_chunks))
    model = GaussianMixture(2)
    with client.as_current():
        plan = model.plan(array)
        assert plan.n_tasks == 1_000
        (remark,) = plan.remarks
        seconds = f"{1_000 * CLUSTER_TASK_SECONDS:.2g}"
        for words in ("1,000 chunks", "100 kB", f"about {seconds} s of every pass", "Give the store", "rechunk the"):
            assert words in remark
        assert not any("scheduling" in remark for remark in model.plan(array.rechunk((400_000, 20))).remarks)


# -- small graphs ------------------------------------------------------------------------------------------------------

KINDS = ("zarr", "dask", "weighted")


@pytest.mark.parametrize("kind", KINDS)
def test_the_graph_of_a_pass_is_small(many_chunks, scorers, kind):
    """4,000 tasks, 64 components, 60 features: under 10 MB, of which the parameters are 2.8 MB."""
    source = opened(many_chunks, kind)
    work = reduction(e_step, scorers, source.blocks(), source.graph, 1, guarded=True)
    assert len(work.runs) == TASKS
    parameters = len(cloudpickle.dumps(scorers))
    assert parameters > 2_000_000
    assert parameters < len(cloudpickle.dumps(work.graph)) < MOST_BYTES
    assert parameters < len(distributed.protocol.pickle.dumps(work.graph)) < MOST_BYTES


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_blocks", [1, 1_000])
def test_the_parameters_are_in_a_graph_once(many_chunks, scorers, kind, n_blocks):
    source = opened(many_chunks, kind)
    sizes = [
        len(
            cloudpickle.dumps(
                reduction(e_step, shared, source.blocks()[:n_blocks], source.graph, 1, guarded=True).graph
            )
        )
        for shared in (None, scorers)
    ]
    assert sizes[1] - sizes[0] == pytest.approx(len(cloudpickle.dumps(scorers)), rel=0.1)  # twice would be twice


@pytest.mark.parametrize("kind", KINDS)
def test_a_task_is_small_where_it_travels_alone(many_chunks, scorers, kind):
    """The scheduler sends tasks to workers one by one: what many share in the graph is in each of them."""
    source = opened(many_chunks, kind)
    work = reduction(e_step, scorers, source.blocks(), source.graph, 1, guarded=True)
    assert max(len(cloudpickle.dumps(work.graph[key])) for key in list(work.runs)[::500]) < 5_000


def test_a_task_of_many_blocks_is_small_too(many_chunks, scorers):
    source = opened(many_chunks, "zarr")
    work = reduction(e_step, scorers, source.blocks(), source.graph, 512, guarded=True)
    assert len(work.runs) == 8
    assert max(len(cloudpickle.dumps(work.graph[key])) for key in work.runs) < 512 * 100


def pass_of(client: Client, source: Any, scorers: tuple[Scorer, ...], n_blocks: int) -> list[int]:
    """A pass that reads nothing: counts blocks, and the parameters that came with each."""

    def counted(scorers: tuple[Scorer, ...], block: Any) -> np.ndarray:
        return np.array([1, len(scorers), scorers[0].n_components])

    with client.as_current(), executor_for(source) as executor:
        return executor.map_reduce(counted, scorers, source.blocks()[:n_blocks], source.graph).tolist()


@pytest.mark.parametrize("kind", ["zarr", "dask"])
@pytest.mark.parametrize("n_blocks", [100, pytest.param(TASKS, marks=pytest.mark.long)])
def test_a_pass_on_a_cluster_is_not_called_large(client, many_chunks, scorers, kind, n_blocks):
    """Warnings are errors: dask's about a large graph, above 10 MB, does not come."""
    found = pass_of(client, opened(many_chunks, kind), scorers, n_blocks)
    assert found == [n_blocks, n_blocks, n_blocks * K]


def test_dask_would_call_a_large_graph_large(client, many_chunks, scorers):
    """The test above can fail, and a graph hardly exceeds its parameters."""
    source = opened(many_chunks, "zarr")
    with (
        dask.config.set({"distributed.admin.large-graph-warning-threshold": "2MB"}),
        pytest.warns(UserWarning, match="Sending large graph of size"),
    ):
        pass_of(client, source, scorers, 10)
    with dask.config.set({"distributed.admin.large-graph-warning-threshold": "4MB"}):
        assert pass_of(client, source, scorers, 10) == [10, 10, 10 * K]
