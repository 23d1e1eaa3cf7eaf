"""Rows with NaN: left out where asked, as if they had never been there, and counted; refused otherwise."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import dask
import dask.array as da
import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from mixtures import KINDS, assert_identical, blobs, fitted, given_start, mixture
from support import cut_at, cut_places

from streamgmm import GaussianMixture, load, open_source, write_rows
from streamgmm.errors import DataError, ParameterError, SourceError
from streamgmm.executors import SerialExecutor
from streamgmm.kernel import e_step, prepare

N = 10_000

#: what max_iter=2 and tol=0 always say
pytestmark = pytest.mark.filterwarnings("ignore:The fit did not converge")

every_structure = pytest.mark.parametrize("kind", KINDS)


def fit(rows: Any, kind: str = "full", sample_weight: Any = None, **settings: Any) -> GaussianMixture:
    """Two passes from a given start."""
    model = mixture(kind, **{"max_iter": 2, "tol": 0.0, **given_start(kind), **settings})
    return model.fit(rows, sample_weight=sample_weight)


def assert_alike(one: GaussianMixture, other: GaussianMixture, tolerance: float = 1e-12) -> None:
    """Equal to ``tolerance`` of the largest number of each kind of parameter, and of the log-likelihoods."""
    for name in ("weights_", "means_", "covariances_", "lower_bounds_"):
        found, expected = np.asarray(getattr(one, name)), np.asarray(getattr(other, name))
        np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max(), err_msg=name)
    assert one.n_rows_ == other.n_rows_


# -- where rows with NaN are -------------------------------------------------------------------------------------


def scattered(n: int) -> np.ndarray:
    return np.random.default_rng(3).random((n, 3)) < 0.1


def rows_from(start: int, stop: int) -> Callable[[int], np.ndarray]:
    """All features of these rows."""

    def pattern(n: int) -> np.ndarray:
        mask = np.zeros((n, 3), dtype=bool)
        mask[start:stop] = True
        return mask

    return pattern


def one_in_each(*rows: int) -> Callable[[int], np.ndarray]:
    """One feature of each of these rows."""

    def pattern(n: int) -> np.ndarray:
        mask = np.zeros((n, 3), dtype=bool)
        mask[list(rows), np.arange(len(rows)) % 3] = True
        return mask

    return pattern


#: chunks have 1,000 rows, tiles 1,024 in the pilot and 4,096 or 8,192 in the passes
PATTERNS: dict[str, Callable[[int], np.ndarray]] = {
    "one": one_in_each(4321),
    "scattered": scattered,
    "the first rows": rows_from(0, 700),
    "the last rows": rows_from(N - 700, N),
    "the ends of chunks": one_in_each(0, 999, 1000, 1999, 2000, N - 1),
    "whole chunks": rows_from(2000, 5000),
    "whole tiles": rows_from(4096, 8192),
    "all but the first chunk": rows_from(1000, N),
    "all but three rows": rows_from(3, N),
}


def holes(pattern: str, n: int = N) -> tuple[np.ndarray, np.ndarray]:
    """Rows (n, 3) with NaN, and which of them (n,) have none."""
    rows, mask = blobs(n), PATTERNS[pattern](n)
    rows[mask] = np.nan
    return rows, ~mask.any(axis=1)


def unknown(rows: np.ndarray) -> da.Array:
    """A dask array that does not know the sizes of its chunks."""
    known = da.from_array(rows, chunks=(1000, 2))
    return da.Array(known.dask, known.name, ((np.nan,) * 10, known.chunks[1]), meta=known._meta)


def stored(rows: np.ndarray, folder: Path, **options: Any) -> Path:
    path = folder / f"{uuid4().hex}.zarr"
    zarr.create_array(str(path), data=rows, **{"chunks": (1000, *rows.shape[1:]), **options})
    return path


HOMES: dict[str, Callable[[np.ndarray, Path], Any]] = {
    "numpy": lambda rows, folder: open_source(rows, nan_policy="omit", block_rows=1300),
    "numpy, other order": lambda rows, folder: open_source(np.asfortranarray(rows), nan_policy="omit"),
    "zarr": lambda rows, folder: open_source(stored(rows, folder), nan_policy="omit", block_rows=2000),
    "zarr, split columns": lambda rows, folder: open_source(
        stored(rows, folder, chunks=(700, 2)), nan_policy="omit", block_rows=1500
    ),
    "zarr, sharded": lambda rows, folder: open_source(
        stored(rows, folder, chunks=(500, 1), shards=(2000, 3)), nan_policy="omit"
    ),
    "dask": lambda rows, folder: open_source(da.from_array(rows, chunks=(900, 2)), nan_policy="omit"),
    "dask, unknown sizes": lambda rows, folder: open_source(unknown(rows), nan_policy="omit"),
}
every_home = pytest.mark.parametrize("home", HOMES)


# -- as if they had never been there -----------------------------------------------------------------------------


@every_structure
@pytest.mark.parametrize("pattern", PATTERNS)
def test_leaving_rows_out_is_dropping_them(pattern: str, kind: str) -> None:
    rows, kept = holes(pattern)
    settings = {"reg_covar": 5e-3}  # three rows alone have no covariance
    found = fit(open_source(rows, nan_policy="omit", block_rows=3000), kind, **settings)
    assert_alike(found, fit(rows[kept], kind, **settings))
    assert (found.n_rows_, found.n_skipped_) == (kept.sum(), N - kept.sum())


@every_home
@pytest.mark.parametrize("kind", ["full", "tied"])
def test_wherever_the_rows_lie(kind: str, home: str, tmp_path: Path) -> None:
    rows, kept = holes("scattered")
    found = fit(HOMES[home](rows, tmp_path), kind)
    assert_alike(found, fit(rows[kept], kind))
    assert (found.n_rows_, found.n_skipped_) == (kept.sum(), N - kept.sum())


@every_home
@pytest.mark.parametrize("pattern", ["the ends of chunks", "all but the first chunk"])
def test_whatever_the_chunks_hold(pattern: str, home: str, tmp_path: Path) -> None:
    rows, kept = holes(pattern)
    assert_alike(fit(HOMES[home](rows, tmp_path)), fit(rows[kept]))


@every_home
@pytest.mark.parametrize("weighed", ["numpy", "zarr", "dask"])
def test_weights_go_with_the_rows_that_are_left(weighed: str, home: str, tmp_path: Path) -> None:
    (rows, kept), weights = holes("scattered"), np.random.default_rng(5).integers(0, 4, N).astype(float)
    found_in = {
        "numpy": lambda: weights,
        "zarr": lambda: stored(weights, tmp_path, chunks=(640,)),
        "dask": lambda: da.from_array(weights, chunks=770),
    }[weighed]()
    source = HOMES[home](rows, tmp_path)
    found, expected = fit(source, sample_weight=found_in), fit(rows[kept], sample_weight=weights[kept])
    assert_alike(found, expected)
    score = expected.score(rows[kept], sample_weight=weights[kept])
    np.testing.assert_allclose(expected.score(source, sample_weight=found_in), score, rtol=1e-12)


@given(holes=st.lists(st.tuples(st.integers(0, 199), st.integers(0, 2)), max_size=40), chunks=cut_places)
def test_any_holes_in_any_chunks(holes: list[tuple[int, int]], chunks: list[float]) -> None:
    rows = blobs(200)
    for row, column in holes:
        rows[row, column] = np.nan
    kept = ~np.isnan(rows).any(axis=1)
    sizes = tuple(stop - start for start, stop in cut_at(200, chunks))
    expected = fit(rows[kept])
    for source in (da.from_array(rows, chunks=(sizes, 3)), rows):
        assert_alike(fit(open_source(source, nan_policy="omit")), expected)


@pytest.mark.parametrize(
    ("home", "kind"), [*((home, "full") for home in HOMES), *(("numpy", kind) for kind in KINDS[1:])]
)
def test_without_nan_both_policies_have_the_same_bits(home: str, kind: str, tmp_path: Path) -> None:
    rows = blobs(N)
    source = HOMES[home](rows, tmp_path)
    blocks = {} if home.startswith("dask") else {"block_rows": source.block_rows}
    found, expected = fit(source, kind), fit(open_source(source.array, **blocks), kind)
    assert_identical(found, expected)
    assert found.lower_bounds_ == expected.lower_bounds_
    assert (found.n_rows_, found.n_skipped_) == (expected.n_rows_, expected.n_skipped_) == (N, 0)


@every_structure
def test_rows_far_from_zero_keep_their_precision(kind: str) -> None:
    """A row that is left out stands at the middle of the others, not at zero."""
    rows, kept = holes("scattered")
    start = given_start(kind)
    start["means_init"] = start["means_init"] + 1e9
    rows += 1e9
    found = fit(open_source(rows, nan_policy="omit", block_rows=3000), kind, **start)
    expected = fit(rows[kept], kind, **start)
    np.testing.assert_allclose(found.means_ - 1e9, expected.means_ - 1e9, rtol=0, atol=2e-6)
    np.testing.assert_allclose(found.covariances_, expected.covariances_, rtol=1e-6)
    near = fit(rows[kept] - 1e9, kind)
    np.testing.assert_allclose(found.covariances_, near.covariances_, rtol=1e-5)


@pytest.mark.parametrize("home", ["numpy", "zarr", "dask"])
def test_starts_are_found_on_the_rows_that_are_left(home: str, tmp_path: Path) -> None:
    rows, kept = holes("scattered")
    found, expected = mixture().fit(HOMES[home](rows, tmp_path)), mixture().fit(rows[kept])
    assert_alike(found, expected, 1e-9)


@pytest.mark.parametrize("home", ["numpy", "zarr, split columns", "dask", "dask, unknown sizes"])
def test_the_bits_do_not_depend_on_the_scheduler(home: str, tmp_path: Path) -> None:
    source = HOMES[home](holes("scattered")[0], tmp_path)
    fits = []
    for settings in ({"scheduler": "synchronous"}, {"scheduler": "threads", "num_workers": 2}):
        with dask.config.set(**settings):
            fits.append(fit(source))
    assert_identical(*fits)
    assert fits[0].lower_bounds_ == fits[1].lower_bounds_
    assert [(model.n_rows_, model.n_skipped_) for model in fits] == [(7246, 2754)] * 2


@every_home
def test_statistics_count_both_kinds_of_rows(home: str, tmp_path: Path) -> None:
    source = HOMES[home](holes("scattered")[0], tmp_path).counted(SerialExecutor())
    params = fitted()._params()
    scorers = (prepare(params, params.frame()),)
    stats = SerialExecutor().map_reduce(e_step, scorers, source.blocks(), source.graph).values[0]
    assert (stats.n_rows, stats.n_skipped, stats.weight) == (7246, 2754, 7246)


# -- results -----------------------------------------------------------------------------------------------------


@every_home
@pytest.mark.parametrize("pattern", ["scattered", "whole tiles"])
def test_results_mark_the_rows_that_are_left_out(pattern: str, home: str, tmp_path: Path) -> None:
    (rows, kept), model = holes(pattern), fitted()
    source = HOMES[home](rows, tmp_path)
    lazy = home.split(",")[0] != "numpy"
    for method, absent in (("predict", -1), ("predict_proba", np.nan), ("score_samples", np.nan)):
        result = getattr(model, method)(source)
        assert isinstance(result, da.Array) == lazy
        found = result.compute() if lazy else result
        expected = getattr(model, method)(rows[kept])
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found[~kept], np.full_like(found[~kept], absent))
        np.testing.assert_allclose(found[kept], expected, rtol=1e-12)


@pytest.mark.parametrize("method", ["predict", "predict_proba", "score_samples"])
def test_results_are_written_with_their_marks(method: str, tmp_path: Path) -> None:
    (rows, kept), model = holes("scattered"), fitted()
    lazy = getattr(model, method)(HOMES["zarr"](rows, tmp_path))
    written = write_rows(lazy, tmp_path / "out.zarr", chunk_rows=450)[:]
    np.testing.assert_array_equal(written, lazy.compute())
    marked = written == -1 if method == "predict" else np.isnan(written)
    np.testing.assert_array_equal(marked.reshape(N, -1).all(axis=1), ~kept)


@every_home
def test_scores_and_criteria_are_of_the_rows_that_are_left(home: str, tmp_path: Path) -> None:
    (rows, kept), model = holes("scattered"), fitted()
    source = HOMES[home](rows, tmp_path)
    for method in ("score", "bic", "aic"):
        np.testing.assert_allclose(getattr(model, method)(source), getattr(model, method)(rows[kept]), rtol=1e-12)


def test_fit_predict_marks_them_too(tmp_path: Path) -> None:
    rows, kept = holes("scattered")
    labels = mixture().fit_predict(HOMES["zarr"](rows, tmp_path)).compute()
    np.testing.assert_array_equal(labels == -1, ~kept)


# -- said and saved ----------------------------------------------------------------------------------------------


def test_the_counts_are_saved_with_the_model(tmp_path: Path) -> None:
    model = fit(HOMES["zarr"](holes("scattered")[0], tmp_path))
    model.save(tmp_path / "m.sgmm")
    again = load(tmp_path / "m.sgmm")
    assert (again.n_rows_, again.n_skipped_) == (model.n_rows_, model.n_skipped_) == (7246, 2754)
    assert "7,246" in str(again.describe())


def test_the_log_tells_the_share_that_is_left_out(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    with caplog.at_level(logging.INFO, logger="streamgmm"):
        fit(HOMES["zarr"](holes("scattered")[0], tmp_path))
        assert "2,754 of 10,000 rows (27.5%) have NaN and are left out" in caplog.messages
        caplog.clear()
        fit(HOMES["zarr"](blobs(N), tmp_path))
    assert caplog.messages
    assert not any("left out" in line for line in caplog.messages)


# -- refused -----------------------------------------------------------------------------------------------------


@every_home
def test_rows_with_nan_are_refused_unless_said_otherwise(home: str, tmp_path: Path) -> None:
    """The chunk is named where there is one, and the advice of the message is what this file tests."""
    rows, _ = holes("one")
    array = HOMES[home](rows, tmp_path).array
    with pytest.raises(
        DataError, match=r"contains NaN in row \d+, column 0.*open_source\(\.\.\., nan_policy=\"omit\"\)"
    ):
        fit(array)
    assert fit(open_source(array, nan_policy="omit")).n_skipped_ == 1


@every_home
@pytest.mark.parametrize("value", [np.inf, -np.inf])
def test_an_infinity_beside_them_is_refused_still(value: float, home: str, tmp_path: Path) -> None:
    rows, kept = holes("scattered")
    row = int(np.flatnonzero(kept)[1234])
    rows[row, 1] = value
    place = r"row \d+, column 1" if "unknown" in home else f"row {row}, column 1"
    with pytest.raises(DataError, match=f"contains infinity in {place}"):
        fit(HOMES[home](rows, tmp_path))


def test_infinities_that_cancel_to_nan_are_no_nan() -> None:
    rows = blobs(300)
    rows[5], rows[6] = np.inf, -np.inf
    with pytest.raises(DataError, match="contains infinity in row 5, column 0"):
        fit(open_source(rows, nan_policy="omit"))


@every_home
def test_a_feature_that_is_missing_everywhere_leaves_no_row(home: str, tmp_path: Path) -> None:
    rows = blobs(N)
    rows[:, 1] = np.nan
    words = "All 10000 rows of .* have NaN in some feature, so none is left. Drop the feature"
    with pytest.raises(DataError, match=words):
        fit(HOMES[home](rows, tmp_path))


@pytest.mark.parametrize(
    ("left", "words"), [(1, "without the rows that have NaN has 1 row"), (2, "n_components = 3, n_samples = 2")]
)
def test_too_few_rows_that_are_left_are_refused(left: int, words: str) -> None:
    rows = blobs(N)
    rows[left:] = np.nan
    with pytest.raises(DataError, match=words):
        fit(open_source(rows, nan_policy="omit"))


def test_two_rows_that_are_left_are_enough_for_one_component() -> None:
    rows = blobs(N)
    rows[1:-1] = np.nan
    model = GaussianMixture(1, reg_covar=1e-9, random_state=0).fit(open_source(rows, nan_policy="omit"))
    np.testing.assert_allclose(model.means_, [(rows[0] + rows[-1]) / 2], rtol=1e-12)
    assert (model.n_rows_, model.n_skipped_) == (2, N - 2)


def test_weights_of_rows_that_are_left_out_count_for_nothing() -> None:
    rows, kept = holes("scattered")
    source = open_source(rows, nan_policy="omit")
    with pytest.raises(DataError, match="have weight zero"):
        fit(source, sample_weight=np.where(kept, 0.0, 1.0))
    with pytest.raises(DataError, match="have weight zero"):
        fitted().score(source, sample_weight=np.where(kept, 0.0, 1.0))


def test_weights_with_nan_are_no_rows_to_leave_out(tmp_path: Path) -> None:
    (rows, _), weights = holes("scattered"), np.ones(N)
    weights[77] = np.nan
    for home in (weights, stored(weights, tmp_path), da.from_array(weights, chunks=500)):
        with pytest.raises(DataError, match="sample_weight of row 77 is nan"):
            fit(HOMES["zarr"](rows, tmp_path), sample_weight=home)


def test_a_policy_is_said_where_the_rows_are_opened(tmp_path: Path) -> None:
    source = open_source(blobs(), nan_policy="raise")
    with pytest.raises(ParameterError, match="say block_rows and nan_policy where it is opened"):
        open_source(source, nan_policy="omit")
    with pytest.raises(SourceError, match="no zarr array or group"):
        open_source(tmp_path / "nothing.zarr", nan_policy="omit")


# -- the long form -----------------------------------------------------------------------------------------------


@pytest.mark.long
@every_structure
@every_home
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("weighed", [False, True])
def test_every_pattern_everywhere(weighed: bool, pattern: str, home: str, kind: str, tmp_path: Path) -> None:
    (rows, kept), settings = holes(pattern), {"reg_covar": 5e-3}
    weights = np.random.default_rng(5).uniform(0.5, 2.0, N) if weighed else None
    found = fit(HOMES[home](rows, tmp_path), kind, weights, **settings)
    assert_alike(found, fit(rows[kept], kind, None if weights is None else weights[kept], **settings))
    assert found.n_skipped_ == N - kept.sum()
