"""The model that a fit leaves behind: what it tells, how it is saved, made from numbers, and what it refuses."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from mixtures import KINDS, assert_close, assert_identical, blobs, dense, fitted, given_start, mixture
from safetensors.numpy import load_file, save_file
from sklearn.exceptions import NotFittedError
from sklearn.mixture import GaussianMixture as Reference

from streamgmm import GaussianMixture, files, load
from streamgmm.errors import (
    DataError,
    FileFormatError,
    ParameterError,
)

# -- what a model tells ------------------------------------------------------------------------------------------------


def twins(kind: str) -> tuple[GaussianMixture, Reference]:
    """A model of scikit-learn, and ours with the same parameters."""
    theirs = Reference(3, covariance_type=kind, max_iter=50, tol=1e-2, random_state=0).fit(blobs())
    ours = GaussianMixture.from_parameters(theirs.weights_, theirs.means_, theirs.covariances_, covariance_type=kind)
    return ours, theirs


@pytest.mark.parametrize("kind", KINDS)
def test_scores_and_criteria_equal_scikit_learns(kind: str) -> None:
    ours, theirs = twins(kind)
    rows = blobs(700, seed=3)
    assert ours.score(rows) == pytest.approx(theirs.score(rows), rel=1e-12)
    assert ours.bic(rows) == pytest.approx(theirs.bic(rows), rel=1e-12)
    assert ours.aic(rows) == pytest.approx(theirs.aic(rows), rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_samples_have_the_moments_of_the_mixture(kind: str) -> None:
    """Shares, means and covariances within five standard errors."""
    model, n = twins(kind)[0].set_params(random_state=1), 60_000
    rows, labels = model.sample(n)
    counts = np.bincount(labels, minlength=3)
    assert (np.abs(counts / n - model.weights_) < 5 * np.sqrt(model.weights_ / n)).all()
    for j, covariance in enumerate(dense(model)):
        part, variances = rows[labels == j], np.diagonal(covariance)
        assert (np.abs(part.mean(axis=0) - model.means_[j]) < 5 * np.sqrt(variances / counts[j])).all()
        error = np.sqrt((np.outer(variances, variances) + covariance**2) / counts[j])
        assert (np.abs(np.cov(part.T) - covariance) < 5 * error).all()


def test_samples_follow_random_state() -> None:
    model = fitted()
    np.testing.assert_array_equal(model.sample(10)[0], model.sample(10)[0])
    assert not np.array_equal(model.sample(10)[0], model.set_params(random_state=1).sample(10)[0])
    with pytest.raises(ParameterError, match="n_samples must be a whole number of at least 1, but it is 0"):
        model.sample(0)


@pytest.mark.parametrize("kind", KINDS)
def test_fit_predict_is_fit_then_predict(kind: str) -> None:
    model = mixture(kind)
    labels = model.fit_predict(blobs())
    np.testing.assert_array_equal(labels, fitted(kind).predict(blobs()))
    np.testing.assert_array_equal(labels, model.predict_proba(blobs()).argmax(axis=1))


def test_an_unfitted_model_says_so() -> None:
    for method in ("predict", "predict_proba", "score_samples", "score", "bic", "aic"):
        with pytest.raises(NotFittedError, match="not fitted yet"):
            getattr(mixture(), method)(blobs())


# -- row weights -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_repetitions(kind: str) -> None:
    """In the fit and in its score, from the same start; rows of weight zero might as well be absent."""
    rows, counts = blobs(), np.random.default_rng(8).integers(0, 4, 1200)
    weighted = mixture(kind, **given_start(kind)).fit(rows, sample_weight=counts)
    repeated = mixture(kind, **given_start(kind)).fit(np.repeat(rows, counts, axis=0))
    assert_close(weighted, repeated, 1e-10)
    np.testing.assert_allclose(weighted.lower_bounds_, repeated.lower_bounds_, rtol=1e-12)
    expected = np.average(weighted.score_samples(rows), weights=counts)
    assert weighted.score(rows, sample_weight=counts) == pytest.approx(expected, rel=1e-13)


def test_weights_are_checked() -> None:
    rows = blobs()
    for row, bad in ((3, -1.0), (5, np.nan), (7, np.inf)):
        weights = np.ones(len(rows))
        weights[row] = bad
        with pytest.raises(DataError, match=f"sample_weight of row {row} is {bad}"):
            mixture().fit(rows, sample_weight=weights)
    with pytest.raises(DataError, match=r"sample_weight has shape \(7,\), but .* has 1200 rows"):
        mixture().fit(rows, sample_weight=np.ones(7))
    with pytest.raises(DataError, match="weight zero"):
        mixture().fit(rows, sample_weight=np.zeros(len(rows)))


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_model_comes_back_bit_for_bit(kind: str, tmp_path: Path) -> None:
    model = fitted(kind, tol=1e-4, n_init=2, means_init=given_start(kind)["means_init"])
    model.save(tmp_path / "model.sgmm")
    back = load(tmp_path / "model.sgmm")
    assert_identical(back, model)
    for method in ("predict", "predict_proba", "score_samples"):
        np.testing.assert_array_equal(getattr(back, method)(blobs()), getattr(model, method)(blobs()))
    for name in ("converged_", "n_iter_", "n_passes_", "lower_bound_", "lower_bounds_", "n_features_in_"):
        assert getattr(back, name) == getattr(model, name), name
    assert str(back.get_params()) == str(model.get_params())
    assert os.listdir(tmp_path) == ["model.sgmm"]


def test_feature_names_are_saved(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    model = mixture().fit(pandas.DataFrame(blobs(), columns=["a", "b", "c"]))
    model.save(tmp_path / "model.sgmm")
    assert load(tmp_path / "model.sgmm").feature_names_in_.tolist() == ["a", "b", "c"]


def test_a_file_cut_short_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.sgmm"
    fitted().save(path)
    whole = path.read_bytes()
    for size in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(FileFormatError, match=r"model\.sgmm cannot be read as a streamgmm file"):
            load(path)


def test_a_changed_number_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "model.sgmm"
    fitted().save(path)
    damaged = bytearray(path.read_bytes())
    damaged[-3] ^= 1
    path.write_bytes(bytes(damaged))
    with pytest.raises(FileFormatError, match=r"model\.sgmm is damaged: the contents of \['weights'\] do not match"):
        load(path)


@pytest.mark.parametrize("content", [b"not a model", pickle.dumps({"a": 1}), b"\x93NUMPY" + bytes(200)])
def test_foreign_files_are_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "foreign.bin"
    path.write_bytes(content)
    with pytest.raises(FileFormatError, match=r"foreign\.bin cannot be read as a streamgmm file"):
        load(path)


def rewritten(path: Path, **changes: Any) -> None:
    """Change fields of a model file's header; its arrays stay."""
    arrays = load_file(path)
    start = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    header = json.loads(path.read_bytes()[8:start])["__metadata__"]["streamgmm"]
    changed = {**json.loads(header), **changes}
    save_file(arrays, path, metadata={"streamgmm": json.dumps({**changed, "seal": files._seal(changed)})})


def test_files_of_another_kind_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.sgmm"
    with pytest.raises(FileFormatError, match="There is no file"):
        load(path)
    save_file({"weights": np.ones(3)}, path)
    with pytest.raises(FileFormatError, match="streamgmm did not write it"):
        load(path)
    fitted().save(path)
    rewritten(path, format=99)
    with pytest.raises(FileFormatError, match=r"has format 99.*Install a newer streamgmm"):
        load(path)
    fitted().save(path)
    rewritten(path, kind="ledger")
    with pytest.raises(FileFormatError, match="holds a ledger, but a model or statistics was asked for"):
        load(path)
    fitted().save(path)
    rewritten(path, facts={})
    with pytest.raises(FileFormatError, match="does not describe a mixture"):
        load(path)


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_model(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.sgmm"
    fitted().save(path)
    before = path.read_bytes()

    def full_disk(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, step, full_disk)
        with pytest.raises(OSError, match="No space left"):
            fitted("diag").save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["model.sgmm"]


# -- given mixtures ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"weights": [0.7, 0.7]}, r"weights must be at least zero and sum to 1, but .* they sum to 1\.4"),
        ({"weights": [1.5, -0.5]}, r"the smallest is -0\.5"),
        ({"weights": [1.0]}, r"weights must have the shape \(2,\), but it has \(1,\)"),
        ({"means": [0.0, 1.0]}, r"means must have the shape \(n_components, n_features\)"),
        ({"means": [[0.0, np.inf], [0.0, 0.0]]}, "means must be finite"),
        ({"covariances": np.eye(2)}, r"covariances of a 'full' mixture must have the shape \(2, 2, 2\)"),
        ({"covariances": [np.eye(2), [[1.0, 2.0], [2.0, 1.0]]]}, "covariance matrix of component 1 is not positive"),
        ({"covariances": [np.eye(2), [[1.0, 0.5], [0.0, 1.0]]]}, "covariances must be symmetric"),
        ({"covariances": [np.eye(2), np.full((2, 2), np.nan)]}, "covariances .* must be finite"),
        ({"covariance_type": "round"}, "covariance_type must be one of 'full', 'tied', 'diag', 'spherical'"),
        (
            {"covariance_type": "diag", "covariances": [[1.0, 1.0], [1.0, 0.0]]},
            "component 1 .* feature 1 has variance 0",
        ),
        ({"means": "abc"}, "means"),
    ],
)
def test_a_given_mixture_is_checked(changed: dict[str, Any], message: str) -> None:
    mixture = {"weights": [0.5, 0.5], "means": np.eye(2), "covariances": np.stack([np.eye(2)] * 2), **changed}
    with pytest.raises(ParameterError, match=message):
        GaussianMixture.from_parameters(**mixture)


def test_a_given_mixture_is_ready_for_use() -> None:
    model = GaussianMixture.from_parameters([0.25, 0.75], [[0.0, 0.0], [9.0, 9.0]], np.stack([np.eye(2)] * 2))
    assert model.predict([[0.1, 0.0], [8.0, 9.0]]).tolist() == [0, 1]
    assert (model.converged_, model.n_iter_, model.n_passes_, model.n_features_in_) == (False, 0, 0, 2)


# -- values that are not numbers ---------------------------------------------------------------------------------------

NOT_FINITE = [(np.nan, "NaN"), (np.inf, "infinity"), (-np.inf, "infinity")]


@pytest.mark.parametrize(("value", "word"), NOT_FINITE)
def test_rows_that_are_not_finite_are_named(value: float, word: str) -> None:
    model, rows = fitted(), blobs()
    rows[817, 1] = value
    for call in (mixture().fit, model.predict, model.predict_proba, model.score_samples, model.score):
        with pytest.raises(DataError, match=rf"Input contains {word} in row 817, column 1"):
            call(rows)


@pytest.mark.parametrize(("value", "word"), NOT_FINITE)
def test_the_chunk_of_a_store_is_named_too(value: float, word: str, tmp_path: Path) -> None:
    model, rows = fitted(), blobs()
    rows[817, 2] = value
    array = zarr.create_array(str(tmp_path / "rows.zarr"), shape=rows.shape, dtype="float64", chunks=(100, 2))
    array[...] = rows
    place = rf"Input contains {word} in row 817, column 2 \(chunk 8/1 of rows\.zarr\)"
    for call in (mixture().fit, model.score):
        with pytest.raises(DataError, match=place):
            call(array)
    for call in (model.predict, model.predict_proba, model.score_samples):
        with pytest.raises(DataError, match=place):
            call(array).compute(scheduler="synchronous")


def test_two_infinities_that_cancel_are_found() -> None:
    rows = blobs()
    rows[3, 0], rows[4, 0] = np.inf, -np.inf
    with pytest.raises(DataError, match="infinity in row 3, column 0"):
        mixture().fit(rows)
