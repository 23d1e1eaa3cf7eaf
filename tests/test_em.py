"""solver="em" and the model it leaves behind: scikit-learn's rules of stopping and starting, and what is told when."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from mixtures import KINDS, UNFINISHED, as_given, assert_close, assert_identical, blobs, fitted, given_start, mixture
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture as Reference

from streamgmm import GaussianMixture, open_source
from streamgmm.covariance import STRUCTURES
from streamgmm.errors import (
    DegenerateComponentWarning,
    NumericalError,
    ParameterError,
    RegularisationWarning,
)
from streamgmm.executors import SerialExecutor
from streamgmm.kernel import e_step, prepare
from streamgmm.params import MixtureParams
from streamgmm.pilot import take_pilot
from streamgmm.protocols import Piece
from streamgmm.sample import Sample
from streamgmm.solvers.em import em
from streamgmm.start import find_start
from streamgmm.stats import SufficientStats
from streamgmm.streams import draw_seed


@dataclass(frozen=True)
class CountedBlock:
    """Rows of an array; every opening is noted."""

    array: np.ndarray
    start: int
    stop: int
    openings: list[int]

    needs = ()
    omits_nan = False

    @property
    def n_features(self) -> int:
        return int(self.array.shape[1])

    def opened(self, values: Any) -> Any:
        return self

    def pieces(self) -> Iterator[Piece]:
        self.openings.append(self.start)
        yield Piece(self.array[self.start : self.stop], None)

    def locate(self, row: int, column: int) -> str:
        return f"row {row}, column {column}"


@dataclass(frozen=True)
class CountedSource:
    """Rows of an array in blocks of 400."""

    array: np.ndarray
    openings: list[int] = field(default_factory=list)
    name: str = "the counted rows"
    grid_rows: int = 1
    block_rows: int = 400
    in_memory: bool = True
    travels: bool = False
    uncounted: tuple[()] = ()
    divisible: bool = True
    upstream_tasks: float = 0.0
    stored_chunks: int = 0
    weight_bytes: int = 0
    graph: dict[str, Any] = field(default_factory=dict)
    checks: tuple[()] = ()

    @property
    def n_rows(self) -> int:
        return len(self.array)

    @property
    def n_features(self) -> int:
        return int(self.array.shape[1])

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.array.dtype

    def counted(self, executor: Any) -> CountedSource:
        return self

    def chunks(self) -> list[CountedBlock]:
        return self.blocks()

    def blocks(self) -> list[CountedBlock]:
        return [self.block(start, min(start + 400, self.n_rows)) for start in range(0, self.n_rows, 400)]

    def block(self, start: int, stop: int) -> CountedBlock:
        return CountedBlock(self.array, start, stop, self.openings)


# -- when EM stops -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tol", [1e-2, 1e-3, 1e-6])
def test_it_stops_where_scikit_learn_stops(kind: str, tol: float) -> None:
    ours = mixture(kind, tol=tol, max_iter=500, **given_start(kind)).fit(blobs())
    theirs = Reference(3, covariance_type=kind, tol=tol, max_iter=500, **given_start(kind)).fit(blobs())
    assert (ours.n_iter_, ours.converged_) == (theirs.n_iter_, True)
    assert ours.n_passes_ == ours.n_iter_ + 1
    assert ours.lower_bound_ == pytest.approx(theirs.lower_bound_, rel=1e-12)
    assert_close(ours, theirs, 1e-9)


def test_the_default_tol_is_scikit_learns() -> None:
    assert fitted(**given_start("full")).n_iter_ == Reference(3, **given_start("full")).fit(blobs()).n_iter_


def test_max_iter_ends_the_fit_with_a_warning() -> None:
    with pytest.warns(ConvergenceWarning, match=r"did not converge in 4 passes.*Raise max_iter above 4"):
        model = fitted(max_iter=4, tol=0.0, **given_start("full"))
    assert (model.converged_, model.n_iter_, len(model.lower_bounds_)) == (False, 4, 4)


def test_lower_bounds_are_those_of_the_parameters_that_enter() -> None:
    with UNFINISHED:
        model = fitted(max_iter=5, tol=0.0, **given_start("full"))
    with UNFINISHED:
        before = fitted(max_iter=4, tol=0.0, **given_start("full"))
    assert before.score(blobs()) == pytest.approx(model.lower_bound_, rel=1e-13)
    assert (np.diff(model.lower_bounds_) > 0).all()


def test_no_passes_publish_the_start() -> None:
    start = given_start("full")
    model = fitted(max_iter=0, **start)
    np.testing.assert_array_equal(model.weights_, start["weights_init"])
    np.testing.assert_array_equal(model.means_, start["means_init"])
    np.testing.assert_allclose(model.precisions_, start["precisions_init"], rtol=1e-14)
    assert (model.n_iter_, model.n_passes_, model.lower_bounds_, model.lower_bound_) == (0, 1, [], -np.inf)


# -- where EM starts ---------------------------------------------------------------------------------------------------


def starts_of(rows: np.ndarray, kind: str, n: int, random_state: int) -> list[MixtureParams]:
    """The first n starts that a fit with this random_state searches."""
    source = open_source(rows)
    pilot, seed = take_pilot(source, SerialExecutor(), np.arange(len(rows))), draw_seed(random_state)
    frame = pilot.frame(isotropic=STRUCTURES[kind].isotropic)
    weights, n_rows = pilot.sample_weights, pilot.n_rows
    sample = Sample.of(pilot.sample, weights, frame, SerialExecutor(), seed, n_rows, complete=True)
    return [find_start("auto", sample, STRUCTURES[kind], 3, seed, index, 1e-6) for index in range(n)]


def flat(n: int = 900) -> np.ndarray:
    """Rows without clusters, where every start leads somewhere else."""
    return np.random.default_rng(5).uniform(size=(n, 3))


def test_restarts_share_each_read_and_the_best_is_kept() -> None:
    source = CountedSource(flat())
    shared = mixture(n_init=4, tol=1e-4, max_iter=300).fit(source)
    singles = [
        mixture(tol=1e-4, max_iter=300, **as_given(start)).fit(flat()) for start in starts_of(flat(), "full", 4, 0)
    ]
    bounds = [single.lower_bound_ for single in singles]
    best = singles[int(np.argmax(bounds))]
    assert max(bounds) - min(bounds) > 1e-3, "the starts must lead to different optima"
    assert shared.lower_bound_ == pytest.approx(max(bounds), rel=1e-9)
    assert shared.n_iter_ == best.n_iter_
    assert_close(shared, best, 1e-7)
    assert shared.n_passes_ == max(single.n_iter_ for single in singles) + 1
    assert sorted(source.openings) == sorted([0, 400, 800] * shared.n_passes_)


@pytest.mark.parametrize("kind", KINDS)
def test_a_warm_start_continues(kind: str) -> None:
    model = mixture(kind, tol=0.0, max_iter=15, warm_start=True, **given_start(kind))
    with UNFINISHED:
        model.fit(blobs())
    first = model.lower_bounds_
    with UNFINISHED:
        model.fit(blobs())
    with UNFINISHED:
        whole = fitted(kind, tol=0.0, max_iter=30, **given_start(kind))
    assert_close(model, whole, 1e-10)
    np.testing.assert_allclose(first + model.lower_bounds_, whole.lower_bounds_, rtol=1e-10)


def test_without_warm_start_a_second_fit_starts_anew() -> None:
    model = fitted(tol=1e-2)
    assert_identical(model.fit(blobs()), fitted(tol=1e-2))


def test_a_warm_start_refuses_another_shape() -> None:
    model = fitted(warm_start=True)
    model.set_params(n_components=2)
    with pytest.raises(ParameterError, match="warm_start continues from means of shape"):
        model.fit(blobs())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "names", [["weights_init"], ["means_init"], ["precisions_init"], ["weights_init", "means_init"]], ids=" ".join
)
def test_what_is_given_replaces_that_part_of_the_start(kind: str, names: list[str]) -> None:
    own = fitted(kind, max_iter=0)
    chosen = {name: given_start(kind)[name] for name in names}
    model = fitted(kind, max_iter=0, **chosen)
    for name in ("weights_init", "means_init", "precisions_init"):
        published = name.replace("init", "")
        expected = chosen[name] if name in chosen else getattr(own, published)
        np.testing.assert_allclose(getattr(model, published), expected, rtol=1e-12)


def test_all_three_given_make_the_seed_irrelevant() -> None:
    one, other = (fitted(random_state=state, **given_start("full")) for state in (0, 99))
    assert_identical(one, other)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"weights_init": [0.5, 0.5]}, r"weights_init must have the shape \(3,\), but it has \(2,\)"),
        ({"weights_init": [0.5, 0.5, 0.5]}, "weights_init must be at least zero and sum to 1"),
        ({"means_init": np.zeros((3, 2))}, r"means_init must have the shape \(3, 3\)"),
        ({"means_init": np.full((3, 3), np.nan)}, "means_init must be finite"),
        ({"precisions_init": np.stack([-np.eye(3)] * 3)}, "precisions_init must be positive definite.*component 0"),
        ({"precisions_init": np.triu(np.ones((3, 3, 3)))}, "precisions_init must be symmetric"),
    ],
)
def test_given_parameters_are_checked(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        fitted(**{**given_start("full"), **changed})


# -- what degenerates --------------------------------------------------------------------------------------------------


def collapsing_start(rows: np.ndarray, kind: str) -> dict[str, Any]:
    """A broad component, and component 1 so thin about the first row that it gets no other."""
    matrices = np.stack([np.eye(3), 1e12 * np.eye(3)])
    precisions = {"full": matrices, "diag": matrices.diagonal(axis1=1, axis2=2), "spherical": np.array([1.0, 1e12])}
    return {
        "weights_init": [0.5, 0.5],
        "means_init": np.stack([rows.mean(axis=0), rows[0]]),
        "precisions_init": precisions[kind],
    }


@pytest.mark.parametrize("kind", ["full", "diag", "spherical"])
def test_a_component_that_collapses_is_named(kind: str) -> None:
    start = collapsing_start(blobs(), kind)
    model = GaussianMixture(2, covariance_type=kind, solver="em", reg_covar=0.0, **start)
    with pytest.raises(NumericalError, match=r"component 1 is not positive definite.*Raise reg_covar"):
        model.fit(blobs())


@pytest.mark.parametrize("kind", ["full", "diag", "spherical"])
@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_a_component_that_shrinks_onto_repeated_rows_is_named(kind: str, offset: float) -> None:
    """200 equal rows pull a broad component in; what rounding leaves of its covariance must not pass for one."""
    rows = np.concatenate([blobs(), np.tile([[0.3, 0.7, -1.1]], (200, 1))]) + offset
    start = collapsing_start(rows[::-1], kind)
    start["precisions_init"] = np.minimum(start["precisions_init"], 100.0)
    model = GaussianMixture(2, covariance_type=kind, solver="em", reg_covar=0.0, max_iter=500, **start)
    with pytest.raises(NumericalError, match="component 1 is not positive definite"):
        model.fit(rows)


def test_a_shared_covariance_that_collapses_is_named() -> None:
    rows = blobs()
    rows[:, 2] = rows[:, 0]
    with pytest.raises(NumericalError, match=r"shared covariance matrix is not positive definite.*feature 2"):
        mixture("tied", reg_covar=0.0, **given_start("tied")).fit(rows)


def read_of(rows: np.ndarray) -> Any:
    """One E-step of several models over rows in memory, as a solver sees it."""
    source = open_source(rows)
    frame = take_pilot(source, SerialExecutor(), np.arange(0)).frame(isotropic=False)

    def read(models: tuple[MixtureParams, ...]) -> tuple[SufficientStats, ...]:
        scorers = tuple(prepare(model, frame) for model in models)
        return SerialExecutor().map_reduce(e_step, scorers, source.blocks()).values

    return read


def solved(rows: np.ndarray, starts: Sequence[MixtureParams]) -> Any:
    return em(read_of(rows), starts, tol=1e-6, max_iter=200, reg_covar=0.0, report=lambda record: None)


def as_params(start: dict[str, Any]) -> MixtureParams:
    covariance = STRUCTURES["full"].from_precisions(np.asarray(start["precisions_init"]))
    return MixtureParams(np.asarray(start["weights_init"]), np.asarray(start["means_init"]), covariance)


def test_a_restart_that_collapses_does_not_stop_the_others() -> None:
    rows = blobs()
    bad = as_params(collapsing_start(rows, "full"))
    good = MixtureParams(bad.weights, rows[:2], STRUCTURES["full"](np.stack([np.cov(rows.T)] * 2)))
    alone, beside = solved(rows, [good]), solved(rows, [bad, good])
    np.testing.assert_array_equal(beside.params.means, alone.params.means)
    assert (beside.converged, beside.lower_bounds, beside.n_passes) == (True, alone.lower_bounds, alone.n_passes)
    with pytest.raises(NumericalError, match="component 1 is not positive definite"):
        solved(rows, [bad, bad])


@pytest.mark.parametrize("kind", KINDS)
def test_a_component_without_rows_keeps_its_mean_and_is_named(kind: str) -> None:
    start = given_start(kind)
    lost = [1e4, 1e4, 1e4]
    start["means_init"][1] = lost
    with pytest.warns(DegenerateComponentWarning, match=r"Components \[1\] have lost all their rows"):
        model = mixture(kind, **start).fit(blobs())
    np.testing.assert_array_equal(model.means_[1], lost)
    assert model.weights_[1] < 1e-12
    assert model.weights_.sum() == pytest.approx(1.0)
    if kind != "tied":
        np.testing.assert_allclose(model.precisions_[1], start["precisions_init"][1], rtol=1e-12)
    assert 1 not in model.predict(blobs())
    assert np.isfinite(model.score_samples(blobs())).all()


def test_a_large_reg_covar_is_named_with_the_feature() -> None:
    rows = blobs() * [1.0, 1e-3, 1.0]
    with pytest.warns(RegularisationWarning, match=r"reg_covar=1e-06 is more than 1 % of the variance of feature 1"):
        mixture().fit(rows)


def test_reg_covar_is_added_in_the_units_of_the_data() -> None:
    rows = 1e-3 * blobs()
    start = {**given_start("full"), "means_init": 1e-3 * given_start("full")["means_init"]}
    start["precisions_init"] = 1e6 * start["precisions_init"]
    with pytest.warns(RegularisationWarning, match="shapes the result"), UNFINISHED:
        ours = mixture(reg_covar=1e-7, max_iter=10, tol=0.0, **start).fit(rows)
    with UNFINISHED:
        theirs = Reference(3, reg_covar=1e-7, max_iter=10, tol=0.0, **start).fit(rows)
    np.testing.assert_allclose(ours.covariances_, theirs.covariances_, rtol=1e-9, atol=1e-15)
