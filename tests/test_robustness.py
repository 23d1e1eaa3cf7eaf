"""Nothing learned is lost, nothing given is destroyed, and what cannot be right is said: in state, stores and sizes."""

from __future__ import annotations

import warnings
from pathlib import Path

import dask
import dask.array as da
import numpy as np
import pytest
import zarr
from mixtures import assert_identical, blobs, fitted, mixture
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from typer.testing import CliRunner

from streamgmm import GaussianMixture, cli, load, open_source
from streamgmm.errors import (
    DataError,
    DataTypeError,
    NumericalError,
    ParameterError,
    RegularisationWarning,
    SchedulerError,
    SourceError,
)

LINES = CliRunner()


def store(path: Path, rows: np.ndarray, chunk_rows: int = 100, **options: object) -> Path:
    zarr.create_array(str(path), data=rows, chunks=(chunk_rows, rows.shape[1]), **options)
    return path


# -- state ---------------------------------------------------------------------------------------------------


def test_a_first_fit_that_fails_leaves_an_unfitted_model() -> None:
    model = GaussianMixture(2)
    with pytest.raises(DataError, match="contains NaN"):
        model.fit(np.full((50, 2), np.nan))
    with pytest.raises(NotFittedError, match="not fitted"):
        model.predict(blobs())


@pytest.mark.parametrize("given", ["nan", "other features", "k above n"])
def test_a_fit_that_fails_leaves_the_model_as_it_was(given: str) -> None:
    model, rows = fitted(), blobs()
    before = dict(model.__dict__)
    bad = {"nan": np.full((50, 3), np.nan), "other features": np.full((50, 2), np.nan), "k above n": rows[:2]}[given]
    with pytest.raises(DataError, match=r"NaN|n_samples"):
        model.fit(bad)
    assert model.__dict__.keys() == before.keys()
    assert all(model.__dict__[name] is value for name, value in before.items())
    assert model.predict(rows).shape == (len(rows),)


def test_a_warning_turned_error_does_not_lose_the_fit() -> None:
    rows, model = blobs(), GaussianMixture(3, solver="em", max_iter=2, tol=0.0, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(
            ConvergenceWarning, match=r"did not converge in 2 passes: .* changed by .* ends at 0 or less"
        ):
            model.fit(rows)
    assert model.n_iter_ == 2


def test_one_pass_cannot_tell_the_change() -> None:
    with pytest.warns(ConvergenceWarning, match="one pass cannot tell"):
        GaussianMixture(2, solver="em", max_iter=1, random_state=0).fit(blobs())


def test_names_of_an_earlier_fit_do_not_stay(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    rows = blobs()
    model = GaussianMixture(2, random_state=0).fit(pandas.DataFrame(rows, columns=["a", "b", "c"]))
    assert list(model.feature_names_in_) == ["a", "b", "c"]
    assert not hasattr(model.fit(store(tmp_path / "r.zarr", rows)), "feature_names_in_")


@pytest.mark.parametrize("kind", ["tied", "full"])
def test_a_hyper_parameter_set_after_the_fit_does_not_touch_the_mixture(kind: str, tmp_path: Path) -> None:
    rows, model = blobs(), fitted(kind)
    labels = model.predict(rows)
    model.set_params(covariance_type="diag")
    model.save(tmp_path / "m.sgmm")
    again = load(tmp_path / "m.sgmm")
    assert_identical(model, again)
    np.testing.assert_array_equal(again.predict(rows), labels)
    assert again.covariance_type == "diag"
    with pytest.raises(ParameterError, match="warm_start continues from"):
        again.set_params(warm_start=True).fit(rows)


# -- rows ----------------------------------------------------------------------------------------------------


class Table:
    """Stands for what holds dask results without being an array: a data frame, an array with labels."""

    def __dask_graph__(self) -> dict[str, object]:
        return {"rows": None}

    def __array__(self, *args: object, **kwargs: object) -> np.ndarray:
        raise AssertionError("loaded behind the user's back")


@pytest.mark.parametrize("lazy", [Table(), dask.delayed(blobs)(300)], ids=["table", "delayed"])
def test_what_is_lazy_is_not_loaded_behind_the_user_s_back(lazy: object) -> None:
    words = rf"Rows cannot be read from a dask {type(lazy).__name__}.* behind your back.*X\.to_dask_array\(\)"
    with pytest.raises(DataTypeError, match=words):
        GaussianMixture(2).fit(lazy)
    for use in (fitted().predict, fitted().score, mixture().plan):
        with pytest.raises(DataTypeError, match=words):
            use(lazy)


def test_a_single_row_is_refused_everywhere(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="minimum of 2"):
        GaussianMixture().fit(np.ones((1, 2)))
    with pytest.raises(DataError, match="minimum of 2"):
        GaussianMixture().fit(store(tmp_path / "r.zarr", np.ones((1, 2))))


@pytest.mark.parametrize("kind", ["full", "tied", "diag", "spherical"])
def test_constant_rows_are_one_component_of_size_reg_covar(kind: str) -> None:
    with pytest.warns(RegularisationWarning, match="variance of feature"):
        model = GaussianMixture(covariance_type=kind, random_state=0).fit(np.full((50, 3), 7.0))
    np.testing.assert_array_equal(model.means_, np.full((1, 3), 7.0))
    np.testing.assert_allclose(model._params().covariance.dense(1, 3)[0], 1e-6 * np.eye(3))


@pytest.mark.parametrize("kind", ["full", "spherical"])
@pytest.mark.parametrize("size", [1e-150, 1e-160, 1e-200])
def test_rows_whose_squares_vanish_are_refused(kind: str, size: float) -> None:
    with pytest.raises(NumericalError, match="variance of feature 0 of the array underflows"):
        GaussianMixture(2, covariance_type=kind, reg_covar=0.0).fit(blobs() * size)


def test_weights_whose_sum_overflows_are_refused() -> None:
    rows = blobs(100)
    with pytest.raises(DataError, match="sum of sample_weight overflows"):
        GaussianMixture().fit(rows, sample_weight=np.full(100, 1e307))
    with pytest.raises(DataError, match="weight zero"):
        fitted().score(rows, sample_weight=np.zeros(100))


def test_rounding_in_a_symmetric_matrix_is_no_asymmetry() -> None:
    rows = blobs()
    noise = 1e-18 * np.random.default_rng(0).normal(size=(2, 3, 3))
    model = GaussianMixture(2, precisions_init=np.eye(3) + noise, random_state=0).fit(rows)
    assert model.converged_
    skewed = np.stack([np.eye(3)] * 2)
    skewed[1, 0, 2] = 1e-3
    with pytest.raises(ParameterError, match="precisions_init must be symmetric"):
        GaussianMixture(2, precisions_init=skewed).fit(rows)


def test_samples_need_memory_for_rows_only() -> None:
    d = 30
    model = GaussianMixture.from_parameters([0.5, 0.5], np.zeros((2, d)), np.stack([np.eye(d)] * 2))
    rows, labels = model.sample(100_000)
    assert rows.shape == (100_000, d)
    assert abs(labels.mean() - 0.5) < 0.01


@pytest.mark.parametrize("n", [300, 1_200])
def test_a_store_that_is_replaced_after_it_was_opened_is_another_one(n: int, tmp_path: Path) -> None:
    source = open_source(store(tmp_path / "r.zarr", blobs(1_000)))
    labels = fitted().predict(source)
    store(tmp_path / "r.zarr", blobs(n), overwrite=True)
    if n > 1_000:  # rows may have come
        assert len(labels.compute()) == 1_000
        return
    with pytest.raises(SourceError, match=r"another array than the one that was opened: .* shape \(300, 3\)"):
        GaussianMixture(1).fit(source)
    with pytest.raises(SourceError, match="another array"):
        labels.compute()


def test_a_big_endian_array_is_the_same_by_its_handle(tmp_path: Path) -> None:
    rows = (100 * blobs()).astype(">i4")
    array = zarr.create_array(str(tmp_path / "r.zarr"), shape=rows.shape, dtype=rows.dtype, chunks=(100, 3))
    array[...] = rows
    np.testing.assert_allclose(GaussianMixture().fit(array).means_, [rows.mean(axis=0)], rtol=1e-12)


def test_an_infinity_beside_nan_is_refused_all_the_same() -> None:
    rows = blobs(50)
    rows[7] = [np.nan, np.inf, 0.0]
    with pytest.raises(DataError, match="contains infinity in row 7, column 1"):
        GaussianMixture(2).fit(open_source(rows, nan_policy="omit"))


def test_all_rows_left_out_have_no_score() -> None:
    with pytest.raises(DataError, match="weight zero, or NaN and are left out"):
        fitted().score(open_source(np.full((50, 3), np.nan), nan_policy="omit"))


@pytest.mark.parametrize("weight", [10**400, float("1e308")])
def test_weights_beyond_float64_are_refused(weight: float) -> None:
    with pytest.raises(DataError, match=r"sample_weight must be numbers|sum of sample_weight overflows"):
        GaussianMixture().fit(blobs(50), sample_weight=[weight] * 50)


def test_a_half_set_model_still_has_words() -> None:
    model = GaussianMixture(2)
    model.weights_ = [0.5, 0.5]
    assert repr(model) == "GaussianMixture(n_components=2)"


# -- where work runs, where files go -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"scheduler": "nonsense"}, "does not know"), ({"num_workers": "many"}, "num_workers is 'many'")],
)
def test_a_nonsense_scheduler_is_refused(settings: dict[str, str], message: str, tmp_path: Path) -> None:
    source = open_source(store(tmp_path / "r.zarr", blobs()), block_rows=200)
    with da.core.config.set(**settings), pytest.raises(SchedulerError, match=message):
        GaussianMixture(2).fit(source)


def test_credentials_in_a_url_are_not_repeated() -> None:
    with pytest.raises(SourceError, match="There is no zarr array or group") as error:
        open_source("nosuchprotocol://key:secret@host/rows.zarr?token=secret")
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("output", ["r.zarr/zarr.json", "r.zarr/c/0/0", "r.zarr"])
def test_a_model_never_replaces_its_rows(output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = blobs()
    store(tmp_path / "r.zarr", rows)
    result = LINES.invoke(cli.app, ["fit", "r.zarr", "-k", "2", "-o", output, "--overwrite"])
    assert result.exit_code == 1
    np.testing.assert_array_equal(zarr.open_array("r.zarr", mode="r")[:], rows)


def test_labels_never_replace_a_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store(tmp_path / "r.zarr", blobs())
    fitted().save("m.sgmm")
    zarr.open_group("g.zarr", mode="w").create_array("precious", data=np.arange(3.0))
    result = LINES.invoke(cli.app, ["predict", "r.zarr", "m.sgmm", "-o", "g.zarr", "--overwrite"])
    assert result.exit_code == 1
    assert "not a zarr array" in result.output
    np.testing.assert_array_equal(zarr.open_array("g.zarr/precious", mode="r")[:], np.arange(3.0))


@pytest.mark.parametrize("parts", [[da.ones((10, 2))], [da.ones((10, 2)), da.ones((10, 2))], (da.ones(2), da.ones(2))])
def test_a_list_of_dask_arrays_is_not_loaded_either(parts: object) -> None:
    with pytest.raises(DataTypeError, match=r"not loaded into memory behind your back.*concatenate"):
        GaussianMixture(1).fit(parts)


def test_masked_values_are_not_taken_for_what_lies_below_the_mask() -> None:
    rows = np.random.default_rng(0).normal(size=(50, 2))
    with pytest.raises(DataTypeError, match="the array is a masked array, and some of its values are masked"):
        GaussianMixture(1).fit(np.ma.masked_greater(rows, 1.0))
    weights = np.ma.masked_array(np.ones(50), mask=np.arange(50) == 7)
    with pytest.raises(DataTypeError, match="sample_weight is a masked array"):
        GaussianMixture(1).fit(rows, sample_weight=weights)
    GaussianMixture(1).fit(np.ma.masked_array(rows, mask=False), sample_weight=np.ma.masked_array(np.ones(50), False))
