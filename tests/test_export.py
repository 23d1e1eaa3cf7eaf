"""Models to and from scikit-learn: the same mixture, which joblib, skops and ONNX then carry on."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import onnxruntime
import pytest
import skl2onnx
import skops.io
from mixtures import KINDS, UNFINISHED, assert_close, assert_identical, blobs, fitted, given_start, mixture
from sklearn.cluster import KMeans
from sklearn.exceptions import NotFittedError
from sklearn.mixture import BayesianGaussianMixture
from sklearn.mixture import GaussianMixture as Reference

from streamgmm import GaussianMixture, load
from streamgmm.errors import DataTypeError, ParameterError

PUBLISHED = ("weights_", "means_", "covariances_", "precisions_", "precisions_cholesky_")
TOLD = ("converged_", "n_iter_", "lower_bound_", "lower_bounds_", "n_features_in_")


def theirs(kind: str, **settings: Any) -> Reference:
    return Reference(3, covariance_type=kind, **{"random_state": 0, **settings}).fit(blobs())


def named() -> Any:
    """Rows in a table with names."""
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    return pandas.DataFrame(blobs(), columns=["a", "b", "c"])


# -- to scikit-learn ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_exported_model_gives_the_same_results(kind: str) -> None:
    model, rows = fitted(kind), blobs(700, seed=3)
    reference = model.to_sklearn()
    assert type(reference) is Reference
    for name in PUBLISHED:
        np.testing.assert_array_equal(getattr(reference, name), getattr(model, name), err_msg=name)
    for name in TOLD:
        assert getattr(reference, name) == getattr(model, name), name
    np.testing.assert_array_equal(reference.predict(rows), model.predict(rows))
    np.testing.assert_allclose(reference.predict_proba(rows), model.predict_proba(rows), rtol=0, atol=1e-12)
    np.testing.assert_allclose(reference.score_samples(rows), model.score_samples(rows), rtol=1e-12)
    for criterion in ("score", "bic", "aic"):
        assert getattr(reference, criterion)(rows) == pytest.approx(getattr(model, criterion)(rows), rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_the_exported_model_draws_samples_of_the_same_mixture(kind: str) -> None:
    """Shares, and the means of each component, within five standard errors."""
    model, n = fitted(kind), 20_000
    rows, labels = model.to_sklearn().sample(n)
    counts = np.bincount(labels, minlength=3)
    assert (np.abs(counts / n - model.weights_) < 5 * np.sqrt(model.weights_ / n)).all()
    for j in range(3):
        part = rows[labels == j]
        assert (np.abs(part.mean(axis=0) - model.means_[j]) < 5 * part.std(axis=0) / np.sqrt(counts[j])).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_exported_model_has_arrays_of_its_own(kind: str) -> None:
    model = fitted(kind)
    before = {name: getattr(model, name).copy() for name in PUBLISHED}
    reference = model.to_sklearn()
    for name in PUBLISHED:
        getattr(reference, name)[...] = 0.0
        np.testing.assert_array_equal(getattr(model, name), before[name], err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_the_exported_model_can_be_fitted_again(kind: str) -> None:
    """Its hyper-parameters are ours, so from the same start it finds the same mixture."""
    model = mixture(kind, tol=1e-5, max_iter=500, reg_covar=1e-5, **given_start(kind)).fit(blobs())
    again = model.to_sklearn().fit(blobs())
    assert again.n_iter_ == model.n_iter_
    assert_close(again, model, 1e-8)


def test_hyper_parameters_go_along() -> None:
    settings = {"tol": 0.5, "reg_covar": 1e-3, "max_iter": 7, "n_init": 2, "init_params": "random_from_data"}
    settings |= {"random_state": 5, "warm_start": True, "verbose": 0, "verbose_interval": 3}
    exported = mixture("diag", **settings).fit(blobs()).to_sklearn().get_params()
    assert {name: exported[name] for name in settings} == settings
    assert (exported["n_components"], exported["covariance_type"]) == (3, "diag")


def test_what_scikit_learn_has_no_word_for_becomes_its_default() -> None:
    exported = fitted(init_params="auto", tol=None, random_state=np.random.default_rng(0)).to_sklearn().get_params()
    assert (exported["init_params"], exported["tol"], exported["random_state"]) == ("kmeans", 1e-3, None)
    assert "solver" not in exported


def test_hyper_parameters_set_after_the_fit_do_not_touch_the_exported_mixture() -> None:
    model = fitted("full").set_params(n_components=9, covariance_type="diag")
    reference = model.to_sklearn()
    assert (reference.n_components, reference.covariance_type) == (3, "full")
    np.testing.assert_array_equal(reference.predict(blobs()), model.predict(blobs()))


def test_feature_names_go_along() -> None:
    rows = named()
    reference = mixture().fit(rows).to_sklearn()
    assert reference.feature_names_in_.tolist() == ["a", "b", "c"]
    np.testing.assert_array_equal(reference.predict(rows), fitted().predict(blobs()))
    with pytest.raises(ValueError, match="same order as they were in fit"):
        reference.predict(rows[["b", "a", "c"]])
    assert not hasattr(fitted().to_sklearn(), "feature_names_in_")


def test_a_mixture_of_given_parameters_is_exported_too() -> None:
    fit = theirs("full")
    model = GaussianMixture.from_parameters(fit.weights_, fit.means_, fit.covariances_)
    reference = model.to_sklearn()
    np.testing.assert_array_equal(reference.predict(blobs()), fit.predict(blobs()))
    assert (reference.converged_, reference.lower_bound_) == (False, -np.inf)


def test_an_unfitted_model_is_not_exported() -> None:
    with pytest.raises(NotFittedError, match="not fitted yet"):
        mixture().to_sklearn()


# -- files and graphs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_joblib_carries_the_exported_model(kind: str) -> None:
    reference, file = fitted(kind).to_sklearn(), io.BytesIO()
    joblib.dump(reference, file)
    file.seek(0)
    np.testing.assert_array_equal(joblib.load(file).predict_proba(blobs()), reference.predict_proba(blobs()))


@pytest.mark.parametrize("kind", KINDS)
def test_skops_trusts_every_type_in_the_exported_model(kind: str) -> None:
    rows = named()
    reference = mixture(kind, **given_start(kind)).fit(rows).to_sklearn()
    written = skops.io.dumps(reference)
    assert skops.io.get_untrusted_types(data=written) == []
    back = skops.io.loads(written)
    np.testing.assert_array_equal(back.predict_proba(rows), reference.predict_proba(rows))
    assert back.feature_names_in_.tolist() == ["a", "b", "c"]


def run_graph(model: GaussianMixture, rows: np.ndarray) -> list[np.ndarray]:
    """Labels, responsibilities and log densities of an ONNX graph that computes in the dtype of the rows."""
    reference = model.to_sklearn()
    options = {id(reference): {"score_samples": True}}
    graph = skl2onnx.to_onnx(reference, rows[:1], options=options).SerializeToString()
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(graph, settings, providers=["CPUExecutionProvider"])
    (entry,) = session.get_inputs()
    return session.run(["label", "probabilities", "score_samples"], {entry.name: rows})


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 1e-5)])
@pytest.mark.parametrize("kind", KINDS)
def test_an_onnx_graph_gives_the_same_probabilities(kind: str, dtype: str, tolerance: float) -> None:
    """In float32 labels may differ where two components are equally probable to within the tolerance."""
    model, rows = fitted(kind), blobs(700, seed=3).astype(dtype)
    labels, probabilities, densities = run_graph(model, rows)
    expected = model.predict_proba(rows)
    assert probabilities.dtype == dtype
    np.testing.assert_allclose(probabilities, expected, rtol=0, atol=tolerance)
    np.testing.assert_allclose(densities.ravel(), model.score_samples(rows), rtol=tolerance)
    chosen = expected[np.arange(len(rows)), labels.ravel()]
    assert (chosen >= expected.max(axis=1) - 2 * tolerance).all()


# -- from scikit-learn -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back_changes_no_bit(kind: str) -> None:
    model = mixture(kind, tol=1e-4).fit(named())
    back = GaussianMixture.from_sklearn(model.to_sklearn())
    assert_identical(back, model)
    assert back.feature_names_in_.tolist() == model.feature_names_in_.tolist()
    for name in TOLD:
        assert getattr(back, name) == getattr(model, name), name


@pytest.mark.parametrize("kind", KINDS)
def test_the_imported_model_is_the_mixture_of_scikit_learn(kind: str) -> None:
    reference = theirs(kind, tol=1e-5, max_iter=300)
    model = GaussianMixture.from_sklearn(reference)
    np.testing.assert_array_equal(model.weights_, reference.weights_)
    np.testing.assert_array_equal(model.means_, reference.means_)
    lower = np.tril if kind in ("full", "tied") else np.asarray
    np.testing.assert_array_equal(lower(model.covariances_), lower(reference.covariances_))
    np.testing.assert_allclose(model.precisions_, reference.precisions_, rtol=1e-12, atol=1e-14)
    for name in TOLD:
        assert getattr(model, name) == getattr(reference, name), name
    assert model.score(blobs()) == pytest.approx(reference.score(blobs()), rel=1e-13)
    np.testing.assert_array_equal(model.predict(blobs()), reference.predict(blobs()))
    ours, others = model.get_params(), reference.get_params()
    assert {name: ours[name] for name in others} == others


def test_the_imported_model_is_saved_like_any_other(tmp_path: Path) -> None:
    model = GaussianMixture.from_sklearn(Reference(3, random_state=0).fit(named()))
    model.save(tmp_path / "model.sgmm")
    back = load(tmp_path / "model.sgmm")
    assert_identical(back, model)
    assert back.feature_names_in_.tolist() == ["a", "b", "c"]


@pytest.mark.parametrize("kind", ["full", "tied"])
def test_a_float32_fit_is_imported_though_its_matrices_are_not_symmetric(kind: str) -> None:
    """Far from zero single precision leaves differences between the triangles; the lower ones count."""
    reference = theirs(kind)
    skewed = reference.covariances_.astype(np.float32)
    skewed[..., 0, 1] += 1e-4
    reference.covariances_ = skewed
    model = GaussianMixture.from_sklearn(reference)
    np.testing.assert_array_equal(np.tril(model.covariances_), np.tril(skewed))
    np.testing.assert_array_equal(model.covariances_, np.swapaxes(model.covariances_, -1, -2))


@pytest.mark.parametrize("kind", KINDS)
def test_a_warm_start_continues_what_scikit_learn_began(kind: str) -> None:
    """Five passes there and five here are ten passes there."""
    settings = {"tol": 0.0, "reg_covar": 1e-6, **given_start(kind)}
    with UNFINISHED:
        begun = theirs(kind, max_iter=5, warm_start=True, **settings)
    model = GaussianMixture.from_sklearn(begun).set_params(solver="em")
    assert (model.converged_, model.n_iter_) == (False, 5)
    with UNFINISHED:
        model.fit(blobs())
    with UNFINISHED:
        whole = theirs(kind, max_iter=10, **settings)
    assert_close(model, whole, 1e-9)
    np.testing.assert_allclose(model.lower_bounds_, whole.lower_bounds_[5:], rtol=1e-10)


def test_subclasses_on_either_side_are_understood() -> None:
    class Theirs(Reference):
        """A mixture of someone's own."""

    class Ours(GaussianMixture):
        """Another one."""

    reference = Theirs(3, random_state=0).fit(blobs())
    model = Ours.from_sklearn(reference)
    assert type(model) is Ours
    np.testing.assert_array_equal(model.means_, reference.means_)
    assert type(model.to_sklearn()) is Reference


@pytest.mark.parametrize(
    "other",
    [BayesianGaussianMixture(n_components=3), KMeans(3), GaussianMixture(3), "a model", None],
    ids=lambda other: type(other).__name__,
)
def test_other_estimators_are_refused(other: Any) -> None:
    """Fitted, so that nothing but their kind can be the reason."""
    if hasattr(other, "fit"):
        other.set_params(random_state=0).fit(blobs())
    name = type(other).__name__
    with pytest.raises(DataTypeError, match=rf"sklearn\.mixture\.GaussianMixture is expected, but a {name} was given"):
        GaussianMixture.from_sklearn(other)


def test_an_unfitted_model_is_not_imported() -> None:
    with pytest.raises(NotFittedError, match="not fitted yet"):
        GaussianMixture.from_sklearn(Reference(3))


def test_a_model_whose_parameters_were_spoilt_is_refused() -> None:
    reference = theirs("full")
    reference.weights_ = reference.weights_ * 2
    with pytest.raises(ParameterError, match="weights must be at least zero and sum to 1"):
        GaussianMixture.from_sklearn(reference)
