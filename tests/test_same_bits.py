"""Same rows, same block_rows: the same bits, on whatever scheduler, threads, task size and chunks.

73 blocks or more, three levels of the addition tree, the last block ragged, several tiles to a block.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import dask
import dask.threaded
import numpy as np
import pytest
from conftest import write_zarr

from streamgmm import GaussianMixture, open_source
from streamgmm.covariance import STRUCTURES
from streamgmm.executors import LocalExecutor, SerialExecutor
from streamgmm.kernel import e_step, prepare, tile_rows
from streamgmm.params import MixtureParams
from streamgmm.pilot import SURVEY_ROWS, take_pilot
from streamgmm.protocols import blocks_of
from streamgmm.sources import with_weights

D, K, BLOCK_ROWS = 17, 9, 1_100
N = 72 * BLOCK_ROWS + 337
ARRAYS = ("weights_", "means_", "covariances_", "precisions_", "precisions_cholesky_", "lower_bounds_")
SCHEDULERS = [("synchronous", 1), ("threads", 1), ("threads", 2), ("threads", 4)]


def digest(*arrays: Any) -> str:
    """One hash over the bytes of all arrays."""
    total = hashlib.sha256()
    for array in arrays:
        total.update(np.ascontiguousarray(array).tobytes())
    return total.hexdigest()


def model_digest(rows: Any, structure: str = "full", **hyper: Any) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings = {"max_iter": 3, "tol": 0.0, "random_state": 5, **hyper}
        model = GaussianMixture(K, covariance_type=structure, **settings).fit(rows)
    return digest(*(getattr(model, name) for name in ARRAYS))


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    rng = np.random.default_rng(11)
    return 1e3 + rng.normal(size=(N, D)) + 2.0 * rng.normal(size=(K, D))[rng.integers(K, size=N)]


@pytest.fixture(scope="module")
def store(tmp_path_factory, rows) -> Path:
    return write_zarr(tmp_path_factory.mktemp("bits"), rows, 300)


@pytest.fixture(scope="module")
def narrow_store(tmp_path_factory, rows) -> Path:
    """Three of the columns: our own start takes no time there."""
    return write_zarr(tmp_path_factory.mktemp("bits"), rows[:, :3], 300)


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
    blocks = blocks_of(source)
    assert len(blocks) == 73 > 8 * 8
    assert blocks[-1].stop - blocks[-1].start == 337
    assert len(list(blocks[0].pieces())) == 4
    assert tile_rows(1 + D + D * (D + 1) // 2) * 4 < BLOCK_ROWS
    assert SURVEY_ROWS < BLOCK_ROWS


@pytest.fixture(scope="module")
def reference(store, start) -> str:
    with dask.config.set(scheduler="synchronous"):
        return model_digest(open_source(store, block_rows=BLOCK_ROWS), **start)


@pytest.mark.parametrize(("scheduler", "threads"), SCHEDULERS)
def test_schedulers_and_threads(store, start, reference, scheduler, threads):
    with dask.config.set(scheduler=scheduler, num_workers=threads):
        assert model_digest(open_source(store, block_rows=BLOCK_ROWS), **start) == reference


def test_our_own_start_too(narrow_store):
    found = set()
    for scheduler, threads in (SCHEDULERS[0], SCHEDULERS[3]):
        with dask.config.set(scheduler=scheduler, num_workers=threads):
            found.add(model_digest(open_source(narrow_store, block_rows=BLOCK_ROWS), max_iter=2))
    assert len(found) == 1


def test_another_block_size_gives_other_bits(store, start, reference):
    """The hash can tell: it is the blocks that fix the bits."""
    with dask.config.set(scheduler="synchronous"):
        assert model_digest(open_source(store, block_rows=BLOCK_ROWS + 100), **start) != reference


@pytest.mark.parametrize(("chunk_rows", "shard_rows"), [(BLOCK_ROWS, None), (777, None), (6_000, None), (150, 450)])
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


@pytest.mark.parametrize("structure", ["tied", "diag", "spherical"])
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
    (stats,) = executor.map_reduce(e_step, (prepare(params, frame),), blocks_of(source)).values
    return digest(
        pilot.mean, pilot.covariance, pilot.sample, pilot.sample_weights, stats.moments, stats.common, stats.origin,
        stats.scale, stats.log_likelihood, stats.weight, stats.n_rows,
    )  # fmt: skip


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("structure", ["full", "tied"])
def test_the_size_of_a_task(narrow_store, structure, weighted):
    weights = np.random.default_rng(2).integers(0, 3, size=N) if weighted else None
    source = with_weights(open_source(narrow_store, block_rows=BLOCK_ROWS), weights)
    expected = statistics(SerialExecutor(), source, structure)
    with dask.config.set(num_workers=2):
        for blocks_per_task in (1, 8, 64, 512):
            executor = LocalExecutor(dask.threaded.get, 2, blocks_per_task)
            assert statistics(executor, source, structure) == expected


SCRIPT = """
import sys, numpy, warnings
warnings.simplefilter("ignore")
sys.path.insert(0, sys.argv[1])
import dask
from test_same_bits import BLOCK_ROWS, model_digest, open_source
with dask.config.set(scheduler="threads", num_workers=2):
    print(model_digest(open_source(sys.argv[2], block_rows=BLOCK_ROWS), max_iter=2))
"""


def test_the_environment_s_blas_threads(narrow_store):
    """Whatever number of threads BLAS was started with; our own start and its eigenvalues included."""
    found = {}
    for threads in (None, "1", "2"):
        environment = {name: value for name, value in os.environ.items() if name != "OPENBLAS_NUM_THREADS"}
        environment |= {} if threads is None else {"OPENBLAS_NUM_THREADS": threads}
        command = [sys.executable, "-c", SCRIPT, str(Path(__file__).parent), str(narrow_store)]
        found[threads] = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    assert len(set(found.values())) == 1
    assert len(found[None].strip()) == 64
