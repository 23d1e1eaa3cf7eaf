"""Results a row: lazy for a store, with its row chunks; in memory for rows in memory; always the same numbers."""

from __future__ import annotations

from typing import Any

import dask
import dask.array as da
import numpy as np
import pytest
import zarr
from conftest import write_zarr
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
