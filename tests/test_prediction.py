"""Results a row: lazy for stores and dask arrays, with their row chunks; in memory for rows in memory; always alike."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import numpy as np
import pytest
import zarr
from conftest import write_zarr
from distributed import Client, LocalCluster
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import logsumexp
from scipy.stats import multivariate_normal
from test_reads import counted, keys_of

from streamgmm import GaussianMixture, open_source
from streamgmm.errors import DataError

D, K, N = 3, 4, 1_003
METHODS = ["predict", "predict_proba", "score_samples"]
STRUCTURES = ["full", "tied", "diag", "spherical"]
#: what gives lazy results
LAZY = ["path", "zarr", "dask", "dask of zarr"]


def mixture(structure: str = "full") -> GaussianMixture:
    rng = np.random.default_rng(0)
    roots = rng.normal(size=(K, D, D))
    full = roots @ roots.transpose(0, 2, 1) + np.eye(D)
    covariances = {
        "full": full,
        "tied": full[0],
        "diag": np.diagonal(full, axis1=1, axis2=2),
        "spherical": full[:, 0, 0],
    }
    return GaussianMixture.from_parameters(
        [0.1, 0.2, 0.3, 0.4], 3.0 * rng.normal(size=(K, D)), covariances[structure], covariance_type=structure
    )


def dense_covariances(model: GaussianMixture) -> np.ndarray:
    values, kind = model.covariances_, model.covariance_type
    if kind == "tied":
        return np.stack([values] * K)
    return values if kind == "full" else np.stack([np.eye(D) * v for v in values])


def by_scipy(model: GaussianMixture, rows: np.ndarray) -> dict[str, np.ndarray]:
    """The three results from scipy's densities, one component at a time."""
    joint = np.stack(
        [
            np.log(weight) + multivariate_normal(mean, covariance).logpdf(rows).reshape(len(rows))
            for weight, mean, covariance in zip(model.weights_, model.means_, dense_covariances(model), strict=True)
        ],
        axis=1,
    )
    density = logsumexp(joint, axis=1)
    return {
        "predict": joint.argmax(axis=1),
        "predict_proba": np.exp(joint - density[:, None]),
        "score_samples": density,
    }


def given_as(kind: str, folder: Path, rows: np.ndarray, chunk_rows: int) -> Any:
    """The rows as one of the LAZY kinds."""
    if kind == "dask":
        return da.from_array(rows, chunks=(chunk_rows, D))
    path = write_zarr(folder, rows, chunk_rows)
    if kind == "path":
        return path
    array = zarr.open_array(path, mode="r")
    return array if kind == "zarr" else da.from_zarr(array)


def results_of(model: GaussianMixture, rows: Any) -> list[Any]:
    return [getattr(model, method)(rows) for method in METHODS]


def close(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    return 4.0 * np.random.default_rng(1).normal(size=(N, D))


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("method", METHODS)
class TestResults:
    def test_equal_scipy(self, rows, structure, method):
        model = mixture(structure)
        found = getattr(model, method)(rows)
        assert isinstance(found, np.ndarray)
        close(found, by_scipy(model, rows)[method])

    def test_a_store_equals_memory(self, tmp_path, rows, structure, method):
        model = mixture(structure)
        found = getattr(model, method)(write_zarr(tmp_path, rows, 100)).compute()
        expected = getattr(model, method)(rows)
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        close(found, expected)

    def test_many_blocks_equal_small_pieces(self, structure, method):
        """Large arrays run block by block on threads; the same rows a few at a time give the same numbers."""
        model, rows = mixture(structure), 4.0 * np.random.default_rng(2).normal(size=(200_003, D))
        assert open_source(rows).block_rows < len(rows) / 2
        found = getattr(model, method)(rows)
        pieces = [getattr(model, method)(rows[start : start + 9_973]) for start in range(0, len(rows), 9_973)]
        close(found, np.concatenate(pieces))
        with dask.config.set(scheduler="synchronous"):
            assert np.array_equal(getattr(model, method)(rows), found)

    @pytest.mark.parametrize("size", [1, 3, 100])
    def test_rows_a_few_at_a_time(self, rows, structure, method, size):
        model, rows = mixture(structure), rows[:200]
        pieces = [getattr(model, method)(rows[start : start + size]) for start in range(0, len(rows), size)]
        close(np.concatenate(pieces), getattr(model, method)(rows))

    @pytest.mark.parametrize("block_rows", [1, 3, 100])
    def test_rows_in_blocks_of_any_size(self, rows, structure, method, block_rows):
        model, rows = mixture(structure), rows[:200]
        found = getattr(model, method)(open_source(rows, block_rows=block_rows))
        close(found, getattr(model, method)(rows))


@pytest.mark.parametrize("method", METHODS)
class TestLaziness:
    def test_nothing_is_read_before_it_is_computed(self, tmp_path, rows, method):
        path = write_zarr(tmp_path, rows, 100)
        array = counted(path)
        result = getattr(mixture(), method)(array)
        assert isinstance(result, da.Array)
        part = result[250:260]
        assert not array.store.reads()
        part.compute()
        assert array.store.reads() == {("c/2/0", "None"): 1}
        result.compute()
        assert sum(array.store.reads().values()) == 1 + len(keys_of(path))

    @pytest.mark.parametrize(
        ("chunk_rows", "shard_rows"), [(100, None), (7, None), (N, None), (2 * N, None), (50, 200)]
    )
    def test_chunks_are_those_of_the_store(self, tmp_path, rows, method, chunk_rows, shard_rows):
        path = write_zarr(tmp_path, rows, chunk_rows, shard_rows)
        result = getattr(mixture(), method)(path)
        unit = min(shard_rows or chunk_rows, N)
        assert result.chunks[0] == tuple([unit] * (N // unit) + [N % unit] * (N % unit > 0))
        assert result.chunks[1:] == (((K,),) if method == "predict_proba" else ())
        assert result.dtype == (np.int64 if method == "predict" else np.float64)

    def test_block_rows_do_not_change_the_chunks(self, tmp_path, rows, method):
        path = write_zarr(tmp_path, rows, 100)
        result = getattr(mixture(), method)(open_source(path, block_rows=300))
        assert result.chunks[0] == (100,) * 10 + (3,)

    def test_columns_split_over_chunks(self, tmp_path, rows, method):
        array = zarr.create_array(tmp_path / "split.zarr", shape=rows.shape, chunks=(100, 2), dtype="f8")
        array[...] = rows
        found = getattr(mixture(), method)(array)
        close(found.compute(), getattr(mixture(), method)(rows))

    @pytest.mark.parametrize("scheduler", ["synchronous", "threads"])
    def test_the_scheduler_changes_no_bit(self, tmp_path, rows, method, scheduler):
        result = getattr(mixture(), method)(write_zarr(tmp_path, rows, 100))
        with dask.config.set(scheduler=scheduler, num_workers=3):
            assert np.array_equal(result.compute(), result.compute(scheduler="synchronous"))

    def test_later_changes_of_the_model_do_not_reach_the_result(self, tmp_path, rows, method):
        model, path = mixture(), write_zarr(tmp_path, rows, 100)
        result, expected = getattr(model, method)(path), getattr(model, method)(rows)
        model.means_ += 1.0
        model.weights_[:] = 0.25
        close(result.compute(), expected)

    def test_a_store_that_changed_gives_its_new_rows(self, tmp_path, rows, method):
        """Names are new on every call: dask never takes an old result for a new one."""
        model, path = mixture(), write_zarr(tmp_path, rows, 100)
        first = getattr(model, method)(path)
        before = first.compute()
        zarr.open_array(path, mode="r+")[...] = rows[::-1]
        second = getattr(model, method)(path)
        assert first.name != second.name
        close(da.stack([first, second]).compute()[1], before[::-1])

    def test_rows_that_are_not_finite_are_named_when_they_are_reached(self, tmp_path, rows, method):
        spoiled = rows.copy()
        spoiled[777, 1] = np.nan
        result = getattr(mixture(), method)(write_zarr(tmp_path, spoiled, 100))
        assert np.isfinite(result[:700].compute()).all()
        with pytest.raises(DataError, match=r"NaN in row 777, column 1 \(chunk 7/0 of rows.zarr\)"):
            result.compute()

    def test_another_number_of_features_is_refused(self, tmp_path, rows, method):
        path = write_zarr(tmp_path, rows[:, :2], 100)
        with pytest.raises(DataError, match=r"rows\.zarr has 2 features, but GaussianMixture is expecting 3"):
            getattr(mixture(), method)(path)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_score_is_the_mean_of_score_samples(tmp_path, rows, structure):
    model, path = mixture(structure), write_zarr(tmp_path, rows, 100)
    samples = by_scipy(model, rows)["score_samples"]
    assert model.score(rows) == pytest.approx(samples.mean(), rel=1e-12)
    assert model.score(open_source(path, block_rows=100)) == pytest.approx(samples.mean(), rel=1e-12)
    weights = np.arange(N) % 3
    assert model.score(path, sample_weight=weights) == pytest.approx(np.average(samples, weights=weights), rel=1e-12)


@given(st.integers(1, 40), st.integers(1, 17), st.sampled_from(METHODS))
def test_any_rows_in_any_blocks(n, block_rows, method):
    rows = 4.0 * np.random.default_rng(n).normal(size=(n, D))
    model = mixture()
    found: Any = getattr(model, method)(open_source(rows, block_rows=block_rows))
    close(found, by_scipy(model, rows)[method])


def test_all_results_of_one_read(tmp_path, rows):
    """Rows are read once for each result asked for; a chunk is never read for a row of another one."""
    path = write_zarr(tmp_path, rows, 100)
    array = counted(path)
    model = mixture()
    da.compute(*(getattr(model, method)(array) for method in METHODS))
    assert array.store.reads() == {(key, "None"): len(METHODS) for key in keys_of(path)}


# -- lazy, whatever the rows come from -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LAZY)
def test_asking_computes_nothing(tmp_path, rows, kind):
    """A scheduler that counts hears of nothing before the results are computed, and then of one graph."""
    computed = []

    def get(graph: Any, keys: Any, **options: Any) -> Any:
        computed.append(keys)
        return dask.get(graph, keys, **options)

    with dask.config.set(scheduler=get):
        results = results_of(mixture(), given_as(kind, tmp_path, rows, 100))
        more = [result[17:950:3].mean() for result in results]
        assert all(isinstance(result, da.Array) for result in results)
        assert not computed
        found = da.compute(*results, *more)
        assert len(computed) == 1
    for result, mean, expected in zip(found[:3], found[3:], results_of(mixture(), rows), strict=True):
        close(result, expected)
        close(mean, expected[17:950:3].mean())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["path", "dask"])
@pytest.mark.parametrize(("chunk_rows", "n"), [(1, 200), (3, 400), (100, 4_001), (100_000, 200_003)])
def test_chunks_of_any_size_equal_memory(tmp_path, method, kind, chunk_rows, n):
    """Row by row; the values of labels too."""
    model, rows = mixture(), 4.0 * np.random.default_rng(5).normal(size=(n, D))
    result = getattr(model, method)(given_as(kind, tmp_path, rows, chunk_rows))
    assert result.numblocks[0] == -(-n // chunk_rows)
    found, expected = result.compute(), getattr(model, method)(rows)
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    close(found, expected)
    if method == "predict":
        assert len(set(expected)) == K


@given(
    sizes=st.lists(st.integers(0, 30), min_size=1, max_size=9).filter(any).map(tuple),
    columns=st.sampled_from([(3,), (1, 2), (2, 1), (1, 1, 1)]),
    method=st.sampled_from(METHODS),
)
def test_a_dask_array_in_any_chunks(sizes, columns, method):
    """Uneven and empty ones, and columns of their own; the result keeps the row chunks."""
    rows = 4.0 * np.random.default_rng(sum(sizes)).normal(size=(sum(sizes), D))
    result = getattr(mixture(), method)(da.from_array(rows, chunks=(sizes, columns)))
    assert result.chunks == (sizes, (K,))[: result.ndim]
    close(result.compute(), getattr(mixture(), method)(rows))


@pytest.mark.parametrize("method", METHODS)
def test_a_slice_makes_only_the_chunks_that_it_needs(rows, method):
    made: list[int] = []

    def make(values: np.ndarray, block_id: tuple[int, ...]) -> np.ndarray:
        made.append(block_id[0])
        return values * 1.0

    array = da.from_array(rows, chunks=(100, D)).map_blocks(make, dtype=rows.dtype, meta=np.empty((0, 0)))
    result = getattr(mixture(), method)(array)
    assert not made
    expected = getattr(mixture(), method)(rows)
    close(result[250:310].compute(), expected[250:310])
    assert sorted(made) == [2, 3]
    close(result[-1].compute(), expected[-1])
    assert sorted(made) == [2, 3, 10]
    made.clear()
    close(result.compute(), expected)
    assert sorted(made) == list(range(11))


def test_what_several_chunks_are_made_from_is_made_once(rows):
    made: Counter[str] = Counter()

    def note(values: np.ndarray) -> np.ndarray:
        made["upstream"] += 1
        return values * 1.0

    whole = da.from_array(rows, chunks=(N, D)).map_blocks(note, dtype=rows.dtype, meta=np.empty((0, 0)))
    close(mixture().predict_proba(whole.rechunk((100, D))).compute(), mixture().predict_proba(rows))
    assert made["upstream"] == 1


@pytest.fixture(scope="module")
def cluster() -> Iterator[Client]:
    """A client of two processes, in force only where a test says so."""
    options = {"host": "127.0.0.1", "dashboard_address": "127.0.0.1:0", "silence_logs": 50}
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, **options) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client


@pytest.mark.parametrize("scheduler", ["synchronous", "threads", "processes"])
def test_results_on_any_scheduler(tmp_path, rows, scheduler):
    """The same bits from the store and from the dask array, all in one graph."""
    path = write_zarr(tmp_path, rows, 100)
    results = [*results_of(mixture(), path), *results_of(mixture(), da.from_array(rows, chunks=(100, D)))]
    expected = da.compute(*results, scheduler="synchronous")
    with dask.config.set(scheduler=scheduler, num_workers=2):
        found = da.compute(*results)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_results_on_a_cluster(tmp_path, rows, cluster):
    path = write_zarr(tmp_path, rows, 100)
    results = [*results_of(mixture(), path), *results_of(mixture(), da.from_array(rows, chunks=(100, D)))]
    expected = da.compute(*results, scheduler="synchronous")
    for one, other in zip(cluster.gather(cluster.compute(results)), expected, strict=True):
        np.testing.assert_array_equal(one, other)
    with cluster.as_current():
        kept = cluster.persist(mixture().predict(path))
        np.testing.assert_array_equal(kept.compute(), expected[0])
        close(mixture().score_samples(cluster.persist(da.from_array(rows, chunks=(100, D)))).compute(), expected[2])


def test_results_on_threads_of_a_client(tmp_path, rows):
    results = results_of(mixture(), write_zarr(tmp_path, rows, 100))
    expected = da.compute(*results, scheduler="synchronous")
    options = {"n_workers": 1, "threads_per_worker": 2, "dashboard_address": None, "silence_logs": 50}
    with Client(processes=False, **options):
        for one, other in zip(da.compute(*results), expected, strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("method", METHODS)
def test_unknown_chunk_sizes_stay_unknown(rows, method):
    """Until they are computed: the rows are those that are left, in their order."""
    array = da.from_array(rows, chunks=(100, D))
    some = array[array[:, 0] > 1.0]
    result = getattr(mixture(), method)(some)
    assert np.isnan(result.shape[0])
    assert result.shape[1:] == (K,) * (method == "predict_proba")
    expected = getattr(mixture(), method)(rows[rows[:, 0] > 1.0])
    close(result.compute(), expected)
    counted_result = result.compute_chunk_sizes()
    assert counted_result.shape == expected.shape
    close(counted_result[5:9].compute(), expected[5:9])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", LAZY)
def test_a_pickled_result_is_the_same_result(tmp_path, rows, method, kind):
    result = getattr(mixture(), method)(given_as(kind, tmp_path, rows, 100))
    again = pickle.loads(pickle.dumps(result))
    assert (again.name, again.chunks, again.dtype) == (result.name, result.chunks, result.dtype)
    np.testing.assert_array_equal(again.compute(), result.compute())


@pytest.mark.parametrize("kind", LAZY)
def test_results_are_dask_arrays_like_any_other(tmp_path, rows, kind):
    """They are sliced, joined, reduced and rechunked, with the rows they come from and with each other."""
    given, model = given_as(kind, tmp_path, rows, 100), mixture()
    labels, proba, density = results_of(model, given)
    in_labels, in_proba, in_density = results_of(model, rows)
    lazy_rows = given if isinstance(given, da.Array) else da.from_zarr(str(tmp_path / "rows.zarr"))
    found = da.compute(
        proba.argmax(axis=1) == labels,
        proba.sum(axis=1),
        -(proba * da.log(proba + 1e-300)).sum(axis=1).rechunk(77),
        density[labels == 2],
        lazy_rows[density < -20.0],
        da.stack([labels * 1.0, density], axis=1)[::-7],
        da.bincount(labels, minlength=K),
        (proba.T @ lazy_rows),
    )
    expected = [
        np.ones(N, bool),
        np.ones(N),
        -(in_proba * np.log(in_proba + 1e-300)).sum(axis=1),
        in_density[in_labels == 2],
        rows[in_density < -20.0],
        np.stack([in_labels * 1.0, in_density], axis=1)[::-7],
        np.bincount(in_labels, minlength=K),
        in_proba.T @ rows,
    ]
    assert 0 < len(expected[3]) < N
    assert 0 < len(expected[4]) < N
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_rows_of_a_dask_array_that_are_not_finite_are_named_when_they_are_reached(rows, method):
    spoiled = rows.copy()
    spoiled[777, 1] = np.inf
    result = getattr(mixture(), method)(da.from_array(spoiled, chunks=(100, D)))
    assert np.isfinite(result[:700].compute()).all()
    with pytest.raises(DataError, match=r"row 777, column 1 \(chunk 7 of the dask array\)"):
        result.compute()


@pytest.mark.parametrize("method", METHODS)
def test_a_dask_array_with_another_number_of_features_is_refused(rows, method):
    with pytest.raises(DataError, match=r"the dask array has 2 features, but GaussianMixture is expecting 3"):
        getattr(mixture(), method)(da.from_array(rows[:, :2], chunks=(100, 2)))


def test_score_of_a_dask_array(rows):
    """Of known and unknown chunk sizes."""
    array = da.from_array(rows, chunks=(100, D))
    samples = by_scipy(mixture(), rows)["score_samples"]
    assert mixture().score(array) == pytest.approx(samples.mean(), rel=1e-12)
    left = rows[:, 0] > 1.0
    assert mixture().score(array[array[:, 0] > 1.0]) == pytest.approx(samples[left].mean(), rel=1e-12)
