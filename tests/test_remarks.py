"""What a plan remarks on before anything runs, with the numbers and the way out."""

from __future__ import annotations

from dataclasses import replace

import dask.array as da
import numpy as np
import pytest
import zarr
from conftest import write_zarr
from described import THREADS, WORKERS, Described, plan_of

from streamgmm import GaussianMixture, open_source
from streamgmm.sources import with_weights


def test_many_small_chunks_of_a_dask_array_get_a_remark():
    small = Described(n_rows=1_000 * 3_125, n_features=8, grid_rows=3_125, block_rows=3_125, divisible=False)
    (remark,) = plan_of(small, WORKERS).remarks
    assert remark == (
        "Each of the 1,000 chunks of rows.zarr is a task of its own, 100 kB on average, so about 4 s of every pass go "
        "into scheduling. Give the store that the array reads (its chunks share tasks), or rechunk the array to "
        "chunks of about 32 MB."
    )
    assert plan_of(replace(small, divisible=True), WORKERS).remarks == ()
    assert plan_of(replace(small, n_rows=125 * 3_125), WORKERS).remarks == ()  # half a second
    assert len(plan_of(replace(small, n_rows=126 * 3_125), WORKERS).remarks) == 1
    assert plan_of(small, THREADS).remarks == ()


@pytest.mark.parametrize("divisible", [True, False], ids=["store", "dask array"])
def test_large_chunks_get_no_remark(divisible):
    """1,000 tasks of 104 MB: their scheduling is nothing beside their work, and rechunking would make more of them."""
    large = Described(n_rows=10**9, n_features=13, dtype=np.dtype("f8"), block_rows=10**6, divisible=divisible)
    plan = plan_of(large, WORKERS)
    assert plan.n_tasks * WORKERS.task_seconds > 1
    assert plan.remarks == ()


def test_a_store_of_small_chunks_gets_a_remark():
    small = Described(n_rows=20_000 * 781, n_features=16, grid_rows=781, block_rows=781 * 512, stored_chunks=20_000)
    (remark,) = plan_of(small).remarks
    assert remark == (
        "rows.zarr has 20,000 chunks of 50 kB: about 7 s of every pass are zarr's own cost of a chunk. Rechunk it to "
        "chunks of about 32 MB, or use a process cluster, where it is shared."
    )
    (remark,) = plan_of(small, WORKERS).remarks
    assert f"about {7 / WORKERS.n_processes:.2g} s of every pass" in remark
    assert remark.endswith("chunks of about 32 MB.")


@pytest.mark.parametrize(("n_chunks", "rows", "said"), [(1_428, 100, 0), (1_430, 100, 1), (20_000, 21_900, 0)])
def test_chunks_that_cost_little_beside_their_rows_get_no_remark(n_chunks, rows, said):
    """Half a second in all, or what reading them takes: 350 kB a chunk."""
    store = Described(
        n_rows=n_chunks * rows, n_features=4, grid_rows=rows, block_rows=rows * 64, stored_chunks=n_chunks
    )
    assert len(plan_of(store).remarks) == said


def test_chunks_are_counted_in_all_columns_and_in_shards(tmp_path):
    rows = np.ones((100, 5), np.float32)
    array = zarr.create_array(tmp_path / "a.zarr", data=rows, chunks=(10, 2))
    sharded = zarr.create_array(tmp_path / "b.zarr", data=rows, chunks=(10, 5), shards=(50, 5))
    weights = zarr.create_array(tmp_path / "w.zarr", data=np.ones(100), chunks=(25,))
    assert [open_source(store).stored_chunks for store in (array, sharded, rows)] == [30, 10, 0]
    assert with_weights(open_source(array), weights).stored_chunks == 34


def test_an_upstream_graph_gets_a_remark():
    (remark,) = plan_of(Described(divisible=False, upstream_tasks=6)).remarks
    assert remark == (
        "Every read of rows.zarr runs its own graph again, about 7 tasks a chunk. If that is expensive, write it to a "
        "store first (array.to_zarr(PATH)) and fit that."
    )


@pytest.mark.parametrize(
    ("make", "again"),
    [(lambda x: x, False), (lambda x: 2 * x + 1, True), (lambda x: x.rechunk((11, 2)), True)],
    ids=["the store", "arithmetic", "rechunked"],
)  # fmt: skip
def test_what_every_read_runs_again(tmp_path, make, again):
    """A plain read of a store is what a pass is made of; whatever comes on top of it is said."""
    rows = make(da.from_zarr(str(write_zarr(tmp_path, np.ones((64, 2), np.float32), 8))))
    remarks = GaussianMixture(2).plan(rows).remarks
    assert ["runs its own graph again" in remark for remark in remarks] == [True] * again


def test_remarks_are_said_once_before_the_first_pass(caplog):
    rows = da.from_array(np.random.default_rng(0).normal(size=(50, 2)), chunks=(25, 2)) * 2 + 1
    with caplog.at_level("INFO", logger="streamgmm"):
        GaussianMixture(1).fit(rows)
    assert caplog.messages[1].startswith("Every read of the dask array runs its own graph again, about")
    assert sum("runs its own graph" in line for line in caplog.messages) == 1
