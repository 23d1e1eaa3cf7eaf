"""Same rows, same block_rows: the same bits, on whatever scheduler, threads, task size and chunks.

73 blocks or more, three levels of the addition tree, the last block ragged, several tiles to a block.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import dask.threaded
import numpy as np
import pytest
import zarr
from clusters import local_cluster
from conftest import write_zarr

from streamgmm import GaussianMixture, open_source
from streamgmm.covariance import STRUCTURES
from streamgmm.executors import LocalExecutor, SerialExecutor
from streamgmm.kernel import e_step, prepare, tile_rows
from streamgmm.params import MixtureParams
from streamgmm.pilot import survey_rows, take_pilot
from streamgmm.sources import with_weights

D, K, BLOCK_ROWS = 17, 5, 1_200
N = 72 * BLOCK_ROWS + 337
#: Most tests take passes of textbook EM, whose bits are those of the passes; these settings make a fit of few reads.
FEW_READS: dict[str, Any] = {"solver": "auto", "sample_rows": 5_000, "max_iter": 3}
ARRAYS = ("weights_", "means_", "covariances_", "precisions_", "precisions_cholesky_", "lower_bounds_")
SCHEDULERS = [("synchronous", 1), ("threads", 1), ("threads", 2), ("threads", 4)]
CLUSTERS = [(1, 1, True), (2, 1, True), (1, 2, True), (1, 2, False)]
PLACES = [*SCHEDULERS, ("processes", 2), *CLUSTERS]
#: where the short form of a test with many fits does not go
LONG_PLACES = [("threads", 1), ("threads", 4), ("processes", 2), (1, 1, True), (1, 2, True)]
CHUNKS = (300, 400, 600)


def digest(*arrays: Any) -> str:
    """One hash over the bytes of all arrays."""
    total = hashlib.sha256()
    for array in arrays:
        total.update(np.ascontiguousarray(array).tobytes())
    return total.hexdigest()


def fitted(rows: Any, structure: str = "full", sample_weight: Any = None, **hyper: Any) -> GaussianMixture:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings = {"n_components": K, "solver": "em", "max_iter": 3, "tol": 0.0, "random_state": 5, **hyper}
        return GaussianMixture(covariance_type=structure, **settings).fit(rows, sample_weight=sample_weight)


def digest_of(model: GaussianMixture) -> str:
    return digest(*(getattr(model, name) for name in ARRAYS))


def model_digest(rows: Any, structure: str = "full", **hyper: Any) -> str:
    return digest_of(fitted(rows, structure, **hyper))


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    rng = np.random.default_rng(11)
    return 1e3 + rng.normal(size=(N, D)) + 2.0 * rng.normal(size=(K, D))[rng.integers(K, size=N)]


@pytest.fixture(scope="module")
def stores(tmp_path_factory, rows) -> list[Path]:
    """The same rows in chunks of a quarter, a third and a half of a block, each with a ragged end."""
    folder = tmp_path_factory.mktemp("bits")
    return [write_zarr(folder, rows, size, name=f"{size}.zarr") for size in CHUNKS]


@pytest.fixture(scope="module")
def store(stores) -> Path:
    return stores[1]


@pytest.fixture(scope="module")
def narrow_store(tmp_path_factory, rows) -> Path:
    """Three of the columns: our own start takes no time there."""
    return write_zarr(tmp_path_factory.mktemp("bits"), rows[:, :3], 600)


Where = Callable[[], AbstractContextManager[Any]]


@contextmanager
def opened_place(place: Sequence[Any]) -> Iterator[Where]:
    """A place where work can run, to be entered: a scheduler and its threads, or workers, threads and processes."""
    if isinstance(place[0], str):
        yield partial(dask.config.set, scheduler=place[0], num_workers=place[1])
    else:
        with local_cluster(place[0], place[1], processes=place[2]) as client:
            yield client.as_current


@pytest.fixture(scope="module", params=range(len(PLACES)), ids=["-".join(map(str, place)) for place in PLACES])
def where(request) -> Iterator[tuple[Where, int]]:
    """A place and its number; a cluster starts once for all tests."""
    with opened_place(PLACES[request.param]) as enter:
        yield enter, request.param


def start_of(rows: np.ndarray, structure: str = "full") -> dict[str, Any]:
    """A given start, so that a fit is passes and nothing else."""
    d = rows.shape[1]
    means = rows[np.random.default_rng(12).choice(N, K, replace=False)]
    precisions = STRUCTURES[structure].from_dense(np.stack([np.eye(d) / 4] * K)).values
    return {"weights_init": np.full(K, 1 / K), "means_init": means, "precisions_init": precisions}


@pytest.fixture(scope="module")
def start(rows) -> dict[str, Any]:
    return start_of(rows)


def test_the_case_is_no_toy(store):
    source = open_source(store, block_rows=BLOCK_ROWS)
    blocks = source.blocks()
    assert len(blocks) == 73 > 8 * 8
    assert blocks[-1].stop - blocks[-1].start == 337
    assert len(list(blocks[0].pieces())) == 3
    assert tile_rows(1 + D + D * (D + 1) // 2) * 4 < BLOCK_ROWS
    assert survey_rows(D) < BLOCK_ROWS


@pytest.fixture(scope="module")
def reference(store, start) -> str:
    with dask.config.set(scheduler="synchronous"):
        return model_digest(open_source(store, block_rows=BLOCK_ROWS), **start)


def test_schedulers_processes_and_clusters(where, stores, start, reference):
    """One hash wherever blocks run, from stores that are chunked in different ways."""
    enter, number = where
    with enter():
        assert model_digest(open_source(stores[number % 3], block_rows=BLOCK_ROWS), **start) == reference


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> list[Any]:
    """The same weights in memory, in a store and in a dask array, cut neither like rows nor like blocks."""
    values = np.random.default_rng(2).uniform(0.5, 2.0, size=N)
    path = tmp_path_factory.mktemp("bits") / "weights.zarr"
    zarr.create_array(path, shape=values.shape, dtype=values.dtype, chunks=(7_777,))[...] = values
    return [values, path, da.from_array(values, chunks=10_001)]


@pytest.fixture(scope="module")
def own_start_reference(narrow_store, weights) -> tuple[str, float, float]:
    """A model of few reads, from our own start with weights, its score and its bic."""
    with dask.config.set(scheduler="synchronous"):
        source = open_source(narrow_store, block_rows=BLOCK_ROWS)
        model = fitted(source, sample_weight=weights[0], **FEW_READS)
        assert model.n_passes_ == 4
        return digest_of(model), model.score(source, sample_weight=weights[0]), model.bic(source)


def test_our_own_start_weights_dask_arrays_and_scores(request, where, narrow_store, weights, own_start_reference):
    """Wherever rows and weights come from: blocks of a dask array are its chunks, however columns are cut."""
    enter, number = where
    if PLACES[number] in LONG_PLACES and not request.config.getoption("--long"):
        pytest.skip("long form: run pytest --long")
    weights = weights[number % 3]
    rows = da.from_zarr(str(narrow_store), chunks=(BLOCK_ROWS, (3, 2)[number % 2]))
    with enter():
        model = fitted(rows, sample_weight=weights, **FEW_READS)
        assert (digest_of(model), model.score(rows, sample_weight=weights), model.bic(rows)) == own_start_reference


def parameters(model: GaussianMixture, rows: np.ndarray) -> tuple[np.ndarray, ...]:
    """Weights, means in deviations of the data, and covariances in their variances."""
    scale = rows.std(axis=0)
    return model.weights_, (model.means_ - rows.mean(axis=0)) / scale, model.covariances_ / np.outer(scale, scale)


def assert_close(model: GaussianMixture, other: GaussianMixture, rows: np.ndarray) -> None:
    """Equal to 1e-12 of the largest of each."""
    for found, expected in zip(parameters(model, rows), parameters(other, rows), strict=True):
        assert np.abs(found - expected).max() <= 1e-12 * np.abs(expected).max()


@pytest.fixture(scope="module")
def expected(store, start) -> GaussianMixture:
    with dask.config.set(scheduler="threads", num_workers=2):
        return fitted(open_source(store, block_rows=BLOCK_ROWS), **start)


@pytest.mark.parametrize("chunks", [1_000, (30_000, 1, 0, 40_000, N - 70_001), -1], ids=["1000", "ragged", "one"])
def test_dask_arrays_of_other_chunks_give_the_same_to_rounding(rows, start, expected, chunks):
    with dask.config.set(scheduler="threads", num_workers=2):
        model = fitted(da.from_array(rows, chunks=(chunks, 5)), **start)
    assert digest_of(model) != digest_of(expected)
    assert_close(model, expected, rows)


@pytest.mark.long
def test_default_blocks_give_the_same_to_rounding(rows, stores, start, expected):
    with dask.config.set(scheduler="threads", num_workers=2):
        for source in (stores[0], rows):
            assert_close(fitted(source, **start), expected, rows)


def test_another_block_size_gives_other_bits(store, start, reference):
    """The hash can tell: it is the blocks that fix the bits."""
    with dask.config.set(scheduler="synchronous"):
        assert model_digest(open_source(store, block_rows=BLOCK_ROWS + 100), **start) != reference


@pytest.mark.parametrize(("chunk_rows", "shard_rows"), [(BLOCK_ROWS, None), (777, None), (300, 900)])
def test_chunks_and_shards(tmp_path, rows, start, reference, chunk_rows, shard_rows):
    """Tiles are counted from the first row of a block, however the block is cut into pieces."""
    path = write_zarr(tmp_path, rows, chunk_rows, shard_rows)
    with dask.config.set(scheduler="threads", num_workers=2):
        assert model_digest(open_source(path, block_rows=BLOCK_ROWS), **start) == reference


@pytest.mark.parametrize("order", ["C", "F"])
def test_rows_in_memory(rows, start, reference, order):
    rows = np.asarray(rows, order=order)
    with dask.config.set(scheduler="threads", num_workers=2):
        assert model_digest(open_source(rows, block_rows=BLOCK_ROWS), **start) == reference


@pytest.mark.parametrize(
    "structure", ["tied", *(pytest.param(kind, marks=pytest.mark.long) for kind in ("diag", "spherical"))]
)
def test_other_structures(tmp_path, rows, structure):
    found = set()
    for chunk_rows, (scheduler, threads) in zip((300, 777, 6_000), SCHEDULERS[::-1], strict=False):
        path = write_zarr(tmp_path, rows[:, :3], chunk_rows, name=f"{chunk_rows}.zarr")
        with dask.config.set(scheduler=scheduler, num_workers=threads):
            source = open_source(path, block_rows=BLOCK_ROWS)
            found.add(model_digest(source, structure, **start_of(rows[:, :3], structure)))
    assert len(found) == 1


def statistics(executor: Any, source: Any, structure: str) -> str:
    """The pilot and one pass at parameters near it, as one hash."""
    pilot = take_pilot(source, executor, np.arange(0, source.n_rows, 97))
    isotropic = STRUCTURES[structure].isotropic
    covariance = STRUCTURES[structure].from_dense(np.stack([pilot.covariance] * K))
    params = MixtureParams(np.full(K, 1 / K), pilot.sample[:K], covariance)
    frame = pilot.frame(isotropic=isotropic)
    (stats,) = executor.map_reduce(e_step, (prepare(params, frame),), source.blocks()).values
    return digest(
        pilot.mean, pilot.covariance, pilot.sample, pilot.sample_weights, stats.moments, stats.common, stats.origin,
        stats.scale, stats.log_likelihood, stats.weight, stats.n_rows,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("structure", "weighted"), [("full", True), pytest.param("tied", False, marks=pytest.mark.long)]
)
def test_the_size_of_a_task(narrow_store, structure, weighted):
    weights = np.random.default_rng(2).integers(0, 3, size=N) if weighted else None
    source = with_weights(open_source(narrow_store, block_rows=BLOCK_ROWS), weights)
    expected = statistics(SerialExecutor(), source, structure)
    with dask.config.set(num_workers=2):
        for blocks_per_task in (1, 8, 64, 512):
            executor = LocalExecutor(dask.threaded.get, 2, blocks_per_task)
            assert statistics(executor, source, structure) == expected


SCRIPT = """
import json, sys, warnings
warnings.simplefilter("ignore")
sys.path.insert(0, sys.argv[1])
from threadpoolctl import threadpool_info
from streamgmm.executors import executor_for
from test_same_bits import model_digest, open_source, opened_place

def blas_threads(shared, block):
    return tuple(library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas")

if __name__ == "__main__":
    source, hyper = open_source(sys.argv[2], block_rows=int(sys.argv[3])), json.loads(sys.argv[4])
    said = {"hashes": [], "inside": []}
    for place in json.loads(sys.argv[5]):
        with opened_place(place) as enter, enter():
            said["hashes"].append(model_digest(source, **hyper))
            if place[0] == "threads":  # those are limited by whoever calls, not by the executor
                continue
            with executor_for(source) as executor:
                said["inside"] += executor.map_reduce(blas_threads, None, source.blocks()[:3])
            if place[0] != "processes":
                said["outside"] = enter.__self__.submit(blas_threads, None, None).result()
    print(json.dumps(said))
"""


def in_environments(
    store: Path, block_rows: int, places: dict[str | None, Sequence[Any]], **hyper: Any
) -> dict[str | None, dict[str, Any]]:
    """What fresh processes say that fit in places, where they start a cluster, by OPENBLAS_NUM_THREADS."""
    started = {}
    for threads, wanted in places.items():
        numbers = [str(block_rows), json.dumps(hyper), json.dumps(wanted)]
        command = [sys.executable, "-c", SCRIPT, str(Path(__file__).parent), str(store), *numbers]
        environment = {name: value for name, value in os.environ.items() if name != "OPENBLAS_NUM_THREADS"}
        environment |= {} if threads is None else {"OPENBLAS_NUM_THREADS": threads}
        started[threads] = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    said = {threads: process.communicate()[0] for threads, process in started.items()}
    assert [process.returncode for process in started.values()] == [0, 0, 0]
    return {threads: json.loads(words) for threads, words in said.items()}


def assert_one_thread_inside(said: dict[str | None, dict[str, Any]]) -> None:
    """BLAS has one thread in tasks of workers and pools, though the environment reached them."""
    assert {threads for found in said.values() for threads in found["inside"]} == {1}
    assert max(said["2"]["outside"]) == min(2, len(os.sched_getaffinity(0)))


def test_the_environment_s_blas_threads(narrow_store):
    """Whatever number of threads BLAS was started with; our own start and its eigenvalues included."""
    threads, cluster = ("threads", 2), (1, 2, True)
    places = {None: [threads], "1": [threads], "2": [threads, cluster]}
    said = in_environments(narrow_store, BLOCK_ROWS, places, max_iter=2)
    hashes = [digest for found in said.values() for digest in found["hashes"]]
    assert (len(hashes), len(set(hashes)), len(hashes[0])) == (4, 1, 64)
    assert_one_thread_inside(said)


# -- millions of rows ----------------------------------------------------------------------------------------------

LONG_ROWS, LONG_BLOCK_ROWS, LONG_CHUNKS = 72 * 120_000 + 33_337, 120_000, (10_000, 20_000, 40_000)


@pytest.fixture(scope="module")
def long_stores(tmp_path_factory) -> list[Path]:
    """8.67 million rows of two features in 73 blocks: the last one is ragged, and so is its last chunk."""
    folder, rng = tmp_path_factory.mktemp("long"), np.random.default_rng(4)
    rows = rng.normal(size=(LONG_ROWS, 2)) + 3.0 * rng.integers(3, size=(LONG_ROWS, 1))
    return [write_zarr(folder, rows.astype(np.float32), size, name=f"{size}.zarr") for size in LONG_CHUNKS]


@pytest.fixture(scope="module")
def long_reference(long_stores) -> str:
    source = open_source(long_stores[0], block_rows=LONG_BLOCK_ROWS)
    assert len(source.blocks()) == 73
    with dask.config.set(scheduler="synchronous"):
        return model_digest(source, n_components=3)


@pytest.mark.long
def test_millions_of_rows_wherever_they_are_and_however_they_are_chunked(where, long_stores, long_reference):
    enter, _ = where
    with enter():
        for store in long_stores:
            assert model_digest(open_source(store, block_rows=LONG_BLOCK_ROWS), n_components=3) == long_reference


@pytest.mark.long
def test_millions_of_rows_whatever_the_environment_s_blas_threads(long_stores, long_reference):
    places = {threads: [*PLACES[3:5], (2, 1, True)] for threads in (None, "1", "2")}
    said = in_environments(long_stores[2], LONG_BLOCK_ROWS, places, n_components=3)
    assert {digest for found in said.values() for digest in found["hashes"]} == {long_reference}
    assert_one_thread_inside(said)


@pytest.mark.long
def test_millions_of_rows_without_block_rows(long_stores):
    """Several default blocks, which differ with the chunks; and the same from dask arrays of several chunks."""
    rows = zarr.open_array(long_stores[0])[...].astype(np.float64)
    start = {
        "n_components": 3, "weights_init": np.full(3, 1 / 3), "means_init": rows[:3],
        "precisions_init": np.stack([np.eye(2)] * 3),
    }  # fmt: skip
    expected = fitted(open_source(long_stores[0], block_rows=LONG_BLOCK_ROWS), **start)
    assert len({open_source(store).block_rows for store in long_stores}) == 2
    for store in long_stores:
        assert 4 <= len(open_source(store).blocks()) <= 5
        assert_close(fitted(store, **start), expected, rows)
    for chunk_rows in (50_000, 333_333):
        array = da.from_zarr(str(long_stores[0]), chunks=(chunk_rows, 2))
        assert_close(fitted(array, **start), expected, rows)
