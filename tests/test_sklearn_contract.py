"""scikit-learn's contract: its own checks, and what they leave out of clones, names, weights and layouts."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
import sklearn
from mixtures import KINDS, assert_close, assert_identical, blobs, fitted, given_start, mixture
from sklearn.base import clone
from sklearn.exceptions import UnsetMetadataPassedError
from sklearn.mixture import GaussianMixture as Reference
from sklearn.model_selection import GridSearchCV, KFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils import get_tags
from sklearn.utils.estimator_checks import parametrize_with_checks

from streamgmm import GaussianMixture
from streamgmm.errors import DataError, DataTypeError, ParameterError

ROW_RESULTS = ("predict", "predict_proba", "score_samples")

CHECKED = [GaussianMixture(), *(GaussianMixture(2, covariance_type=kind, random_state=0) for kind in KINDS)]


@parametrize_with_checks(CHECKED)
def test_scikit_learns_own_checks(estimator: GaussianMixture, check: Callable[[GaussianMixture], None]) -> None:
    check(estimator)


# -- what a model is ---------------------------------------------------------------------------------------------------


def test_tags() -> None:
    tags = get_tags(GaussianMixture())
    assert (tags.estimator_type, tags.requires_fit, tags.non_deterministic) == ("density_estimator", True, False)
    assert (tags.target_tags.required, tags.input_tags.sparse, tags.input_tags.allow_nan) == (False, False, False)
    assert (tags.input_tags.two_d_array, tags.transformer_tags, tags.classifier_tags) == (True, None, None)


def test_there_is_no_output_to_set() -> None:
    """A mixture transforms nothing; responsibilities are asked for by name."""
    for name in ("set_output", "transform", "fit_transform", "get_feature_names_out"):
        assert not hasattr(GaussianMixture(), name), name


def test_every_parameter_and_attribute_of_scikit_learn_is_there() -> None:
    assert set(Reference().get_params()) <= set(GaussianMixture().get_params())
    reference, model = Reference(3, random_state=0).fit(blobs()), fitted()
    assert {name for name in vars(reference) if name.endswith("_")} <= set(vars(model))
    public = {name for name in dir(reference) if not name.startswith("_")}
    assert public - set(dir(model)) == set()


NONSENSE: dict[str, Any] = {
    "n_components": -1,
    "covariance_type": None,
    "tol": "small",
    "reg_covar": [1],
    "max_iter": object(),
    "means_init": {"a": 1},
    "random_state": "dice",
    "warm_start": 7,
    "verbose": None,
}


def test_the_constructor_stores_what_it_is_given_and_fit_refuses_it() -> None:
    model = GaussianMixture(**NONSENSE)
    assert {name: getattr(model, name) for name in NONSENSE} == NONSENSE
    assert all(getattr(model, name) is value for name, value in NONSENSE.items())
    for name, value in NONSENSE.items():
        with pytest.raises(ParameterError, match=name):
            GaussianMixture().set_params(**{name: value}).fit(blobs())


def test_an_unknown_parameter_is_named() -> None:
    with pytest.raises(ValueError, match="Invalid parameter 'components' for estimator GaussianMixture"):
        GaussianMixture().set_params(components=3)
    with pytest.raises(TypeError, match="unexpected keyword argument 'components'"):
        GaussianMixture(components=3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_clone_has_the_parameters_and_nothing_learned(kind: str) -> None:
    model = mixture(kind, **given_start(kind), tol=1e-2, verbose=0).fit(blobs())
    twin = clone(model)
    assert not [name for name in vars(twin) if name.endswith("_")]
    for name, value in model.get_params().items():
        np.testing.assert_array_equal(getattr(twin, name), value, err_msg=name)
    assert twin.means_init is not model.means_init
    assert_identical(twin.fit(blobs()), model)


def test_fit_gives_back_the_model() -> None:
    model = mixture()
    assert model.fit(blobs()) is model


# -- pickles -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_pickled_model_gives_the_same_bits(kind: str) -> None:
    model = fitted(kind)
    back = pickle.loads(pickle.dumps(model))
    assert_identical(back, model)
    assert str(back.get_params()) == str(model.get_params())
    for method in ROW_RESULTS:
        np.testing.assert_array_equal(getattr(back, method)(blobs()), getattr(model, method)(blobs()))
    np.testing.assert_array_equal(back.sample(5)[0], model.sample(5)[0])


READ_ELSEWHERE = """
import sys, joblib, numpy as np
models, rows = joblib.load(sys.argv[1]), np.load(sys.argv[2])
np.savez(sys.argv[3], **{f"{k}_{m}": getattr(model, m)(rows) for k, model in models.items() for m in sys.argv[4:]})
"""


def test_another_process_reads_the_same_bits_from_joblib(tmp_path: Path) -> None:
    models, rows = {kind: fitted(kind) for kind in KINDS}, blobs(700, seed=3)
    joblib.dump(models, tmp_path / "models.joblib")
    np.save(tmp_path / "rows.npy", rows)
    paths = [str(tmp_path / name) for name in ("models.joblib", "rows.npy", "results.npz")]
    subprocess.run([sys.executable, "-c", READ_ELSEWHERE, *paths, *ROW_RESULTS], check=True, env=dict(os.environ))
    with np.load(tmp_path / "results.npz") as results:
        for kind, model in models.items():
            for method in ROW_RESULTS:
                np.testing.assert_array_equal(results[f"{kind}_{method}"], getattr(model, method)(rows))


# -- names of features -------------------------------------------------------------------------------------------------


def table(names: list[Any] | None = None) -> Any:
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    return pandas.DataFrame(blobs(), columns=["a", "b", "c"] if names is None else names)


def test_names_of_a_table_are_kept_and_change_no_bit() -> None:
    model = mixture().fit(table())
    assert model.feature_names_in_.tolist() == ["a", "b", "c"]
    assert_identical(model, fitted())
    for method in ROW_RESULTS:
        np.testing.assert_array_equal(getattr(model, method)(table()), getattr(fitted(), method)(blobs()))


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (["b", "a", "c"], "Feature names must be in the same order as they were in fit"),
        (["a", "b", "z"], r"The feature names should match those that were passed during fit.\n.*unseen.*\n- z"),
    ],
)
def test_other_names_are_refused_in_scikit_learns_words(names: list[str], sentence: str) -> None:
    model, other = mixture().fit(table()), table()[["a", "b", "c"]].set_axis(names, axis=1)
    for method in (*ROW_RESULTS, "score", "bic", "aic"):
        with pytest.raises(DataError, match=sentence):
            getattr(model, method)(other)


def test_a_missing_column_is_named() -> None:
    with pytest.raises(DataError, match=r"seen at fit time, yet now missing:\n- b"):
        mixture().fit(table()).predict(table()[["a", "c"]])


def test_names_on_one_side_only_are_warned_of() -> None:
    with pytest.warns(UserWarning, match="X does not have valid feature names, but GaussianMixture was fitted with"):
        mixture().fit(table()).predict(blobs())
    with pytest.warns(UserWarning, match="X has feature names, but GaussianMixture was fitted without"):
        fitted().predict(table())


def test_columns_without_words_are_no_names() -> None:
    assert not hasattr(mixture().fit(table([0, 1, 2])), "feature_names_in_")
    with pytest.raises(DataTypeError, match="Feature names are only supported if all input features have string names"):
        mixture().fit(table(["a", 1, 2]))


def test_a_fit_without_names_forgets_those_of_the_fit_before() -> None:
    model = mixture().fit(table())
    assert not hasattr(model.fit(blobs()), "feature_names_in_")


# -- weights -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_weights_zero_remove_rows_however_far_they_are(kind: str) -> None:
    """From a given start; a start of our own is drawn among the rows that count, by their numbers."""
    rows = blobs()
    with_far = np.concatenate([1e6 * np.ones((40, 3)), rows, -1e6 * np.ones((40, 3))])
    weights = np.concatenate([np.zeros(40), np.ones(len(rows)), np.zeros(40)])
    model = mixture(kind, **given_start(kind)).fit(with_far, sample_weight=weights)
    alone = mixture(kind, **given_start(kind)).fit(rows)
    assert model.n_iter_ == alone.n_iter_
    assert_close(model, alone, 1e-9)


def row_weights() -> np.ndarray:
    return np.random.default_rng(8).integers(0, 4, len(blobs())).astype(float)


def asking(**settings: Any) -> GaussianMixture:
    """A mixture that asks for the weights of rows wherever metadata are handed round."""
    return mixture(**settings).set_fit_request(sample_weight=True).set_score_request(sample_weight=True)


def test_weights_are_routed_through_a_pipeline() -> None:
    weights = row_weights()
    with sklearn.config_context(enable_metadata_routing=True):
        scaler = StandardScaler().set_fit_request(sample_weight=False)
        pipeline = make_pipeline(scaler, asking()).fit(blobs(), sample_weight=weights)
        score = pipeline.score(blobs(), sample_weight=weights)
    scaled = StandardScaler().fit_transform(blobs())
    alone = mixture().fit(scaled, sample_weight=weights)
    assert_identical(pipeline[-1], alone)
    assert score == alone.score(scaled, sample_weight=weights) != alone.score(scaled)
    assert not np.array_equal(alone.means_, mixture().fit(scaled).means_)


def test_weights_are_routed_through_a_search() -> None:
    """Each fold is fitted and scored with the weights of its own rows."""
    rows, weights, folds = blobs(), row_weights(), KFold(2)
    with sklearn.config_context(enable_metadata_routing=True):
        search = GridSearchCV(asking(), {"n_components": [2, 3]}, cv=folds, refit=False)
        search.fit(rows, sample_weight=weights)
    for fold, (train, test) in enumerate(folds.split(rows)):
        model = mixture().fit(rows[train], sample_weight=weights[train])
        expected = model.score(rows[test], sample_weight=weights[test])
        assert search.cv_results_[f"split{fold}_test_score"][1] == expected


def test_weights_that_nobody_asked_for_are_refused() -> None:
    with sklearn.config_context(enable_metadata_routing=True):
        pipeline = make_pipeline(StandardScaler(), mixture())
        with pytest.raises(UnsetMetadataPassedError, match="sample_weight"):
            pipeline.fit(blobs(), sample_weight=row_weights())


def test_the_number_of_components_is_found_by_a_search() -> None:
    def by_bic(model: GaussianMixture, X: Any, y: Any = None) -> float:
        return -model.bic(X)

    search = GridSearchCV(mixture(n_init=3), {"n_components": [1, 2, 3, 4, 5]}, scoring=by_bic, cv=2).fit(blobs())
    assert search.best_params_ == {"n_components": 3}
    assert search.predict(blobs()).max() == 2


def test_cross_validation_scores_the_rows_left_out() -> None:
    rows, folds = blobs(), KFold(3)
    scores = cross_val_score(mixture(), rows, cv=folds)
    expected = [mixture().fit(rows[train]).score(rows[test]) for train, test in folds.split(rows)]
    assert scores.tolist() == expected


# -- what goes in stays as it was --------------------------------------------------------------------------------------


def read_only(rows: np.ndarray, folder: Path) -> np.ndarray:
    rows.flags.writeable = False
    return rows


def memory_map(rows: np.ndarray, folder: Path) -> np.ndarray:
    np.save(folder / "rows.npy", rows)
    return np.load(folder / "rows.npy", mmap_mode="r")


LAYOUTS: dict[str, Callable[[np.ndarray, Path], Any]] = {
    "read-only": read_only,
    "Fortran": lambda rows, folder: np.asfortranarray(rows),
    "every second row": lambda rows, folder: np.repeat(rows, 2, axis=0)[::2],
    "backwards": lambda rows, folder: rows[::-1].copy()[::-1],
    "some columns": lambda rows, folder: np.concatenate([rows, rows], axis=1)[:, :3],
    "memory map": memory_map,
    "list": lambda rows, folder: rows.tolist(),
    "bytes the other way round": lambda rows, folder: rows.astype(">f8"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_of_the_rows_changes_no_bit(layout: str, tmp_path: Path) -> None:
    rows = LAYOUTS[layout](blobs(), tmp_path)
    model, plain = mixture().fit(rows), fitted()
    assert_identical(model, plain)
    assert model.lower_bounds_ == plain.lower_bounds_
    for method in ROW_RESULTS:
        np.testing.assert_array_equal(getattr(model, method)(rows), getattr(plain, method)(blobs()))
    assert model.score(rows) == plain.score(blobs())


@pytest.mark.parametrize("layout", ["Fortran", "every second row", "read-only", "list"])
def test_the_layout_of_the_weights_changes_no_bit(layout: str, tmp_path: Path) -> None:
    weights = LAYOUTS[layout](row_weights(), tmp_path)
    model = mixture().fit(blobs(), sample_weight=weights)
    assert_identical(model, mixture().fit(blobs(), sample_weight=row_weights()))


def test_a_fit_changes_neither_rows_nor_weights_nor_given_starts() -> None:
    rows, weights, start = blobs(), row_weights(), given_start("full")
    before = joblib.hash((rows, weights, start))
    model = mixture(**start).fit(rows, sample_weight=weights)
    model.score(rows, sample_weight=weights)
    assert joblib.hash((rows, weights, start)) == before


def test_using_a_model_does_not_change_it() -> None:
    model = fitted()
    before = joblib.hash(vars(model))
    for method in (*ROW_RESULTS, "score", "bic", "aic"):
        getattr(model, method)(blobs())
    model.sample(3)
    model.describe()
    model.to_sklearn()
    repr(model)
    assert joblib.hash(vars(model)) == before


def test_what_a_model_gives_out_is_not_what_it_keeps() -> None:
    """Results may be written over: they are nobody else's."""
    model, rows = fitted(), blobs()
    for method in ROW_RESULTS:
        first = getattr(model, method)(rows)
        kept = first.copy()
        first[...] = -1
        np.testing.assert_array_equal(getattr(model, method)(rows), kept)
