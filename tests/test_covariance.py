"""What every covariance structure keeps: one conformance class, run for each entry of the registry."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import mixture
from support import Case, cases, responsibilities, stats_of

from streamgmm.covariance import STRUCTURES, AbstractCovariance
from streamgmm.errors import NumericalError

K, D = 3, 4
SHAPES = [(1, 1), (1, 4), (3, 1), (3, 4), (5, 2)]


def of(kind: str, k: int = K, d: int = D, seed: int = 0) -> AbstractCovariance:
    return Case(k, d, 1, seed).mixture(kind).covariance


def broken(kind: str, component: int, value: float) -> np.ndarray:
    """Values in which feature 2 of one component (or of the shared matrix) has this variance."""
    values = np.array(of(kind).values)
    place = {"full": (component, 2, 2), "tied": (2, 2), "diag": (component, 2), "spherical": (component,)}[kind]
    values[place] = value
    return values


NAMES = {
    "full": "covariance matrix of component {}",
    "tied": "shared covariance matrix",
    "diag": "covariance of component {}",
    "spherical": "variance of component {}",
}
PRECISION_NAMES = {
    "full": "precision matrix of component {}",
    "tied": "shared precision matrix",
    "diag": "precision of component {}",
    "spherical": "precision of component {}",
}


def test_the_registry_is_scikit_learns() -> None:
    assert set(STRUCTURES) == {"full", "tied", "diag", "spherical"}
    assert all(structure.kind == kind for kind, structure in STRUCTURES.items())


@pytest.mark.parametrize("kind", STRUCTURES)
class TestConformance:
    @pytest.mark.parametrize(("k", "d"), SHAPES)
    def test_shapes(self, kind: str, k: int, d: int) -> None:
        covariance = of(kind, k, d)
        assert covariance.values.shape == covariance.shape(k, d)
        assert covariance.precisions(k, d).shape == covariance.shape(k, d)
        assert covariance.precisions_cholesky(k, d).shape == covariance.shape(k, d)
        assert covariance.dense(k, d).shape == (k, d, d)
        assert covariance.root(k, d).log_det.shape == (k,)
        assert covariance.root(k, d).precision_diagonal.shape == (k, d)
        natural = covariance.natural_quadratic(covariance.root(k, d))
        assert natural.shape == (k, covariance.quadratic.size(d))

    @pytest.mark.parametrize(("k", "d"), SHAPES)
    def test_free_parameters_are_scikit_learns(self, kind: str, k: int, d: int) -> None:
        params = Case(k, d, 1, 0).mixture(kind)
        peer = mixture.GaussianMixture(k, covariance_type=kind)
        peer.means_ = params.means
        assert params.n_parameters == peer._n_parameters()
        assert params.covariance.n_parameters(k, d) == peer._n_parameters() - k * d - (k - 1)

    @given(exponents=st.lists(st.integers(-200, 200), min_size=D, max_size=D))
    def test_scaling_by_powers_of_two_is_exact(self, kind: str, exponents: list[int]) -> None:
        covariance = of(kind)
        if covariance.isotropic:
            exponents = exponents[:1] * D
        scale = np.exp2(np.array(exponents, dtype=float))
        scaled = covariance.scaled(scale)
        np.testing.assert_array_equal(scaled.scaled(1.0 / scale).values, covariance.values)
        dense = covariance.dense(K, D) * scale[:, None] * scale
        np.testing.assert_array_equal(scaled.dense(K, D), dense)

    @given(seed=st.integers(0, 2**32))
    def test_precisions_invert_covariances_and_come_back(self, kind: str, seed: int) -> None:
        covariance = of(kind, seed=seed)
        precisions = covariance.precisions(K, D)
        as_matrices = type(covariance)(precisions).dense(K, D)
        np.testing.assert_allclose(as_matrices @ covariance.dense(K, D), np.eye(D) + np.zeros((K, 1, 1)), atol=1e-12)
        back = type(covariance).from_precisions(precisions)
        np.testing.assert_allclose(back.values, covariance.values, rtol=1e-12, atol=1e-12 * covariance.values.max())

    @given(seed=st.integers(0, 2**32))
    def test_the_factor_is_scikit_learns(self, kind: str, seed: int) -> None:
        covariance = of(kind, seed=seed)
        peer = mixture._gaussian_mixture._compute_precision_cholesky(covariance.values, kind)
        np.testing.assert_allclose(covariance.precisions_cholesky(K, D), peer, rtol=1e-12, atol=1e-12)

    @given(seed=st.integers(0, 2**32))
    def test_the_root_whitens(self, kind: str, seed: int) -> None:
        covariance = of(kind, seed=seed)
        root, dense = covariance.root(K, D), covariance.dense(K, D)
        for j in range(K):
            factor = root.whiten(j, np.eye(D))
            np.testing.assert_allclose(factor @ dense[j] @ factor.T, np.eye(D), atol=1e-12)
            np.testing.assert_allclose(root.precision_diagonal[j], (factor**2).sum(axis=0), rtol=1e-12)
        np.testing.assert_allclose(root.log_det, -0.5 * np.linalg.slogdet(dense)[1], rtol=1e-12, atol=1e-12)
        offsets = np.random.default_rng(seed).standard_normal((K, D))
        times = np.linalg.solve(dense, offsets[:, :, None])[:, :, 0]
        np.testing.assert_allclose(root.precision_times(offsets), times, rtol=1e-11, atol=1e-11)

    @given(seed=st.integers(0, 2**32))
    def test_natural_parameters_give_the_quadratic_form(self, kind: str, seed: int) -> None:
        covariance = of(kind, seed=seed)
        root = covariance.root(K, D)
        z = np.random.default_rng(seed).standard_normal(D)
        products = covariance.quadratic.bilinear(z, z)
        own = covariance.natural_quadratic(root) @ products
        common = np.array([-0.5 * (root.whiten(j, z[:, None]) ** 2).sum() for j in range(K)])
        np.testing.assert_allclose(own if products.size else common, common, rtol=1e-11)
        assert (products.size == 0) == covariance.shared

    @given(case=cases(n=(20, 60)), reg_covar=st.sampled_from([0.0, 0.5]))
    def test_the_update_is_the_mean_of_centred_squares(self, kind: str, case: Case, reg_covar: float) -> None:
        params, rows = case.mixture(kind), case.rows()
        stats = stats_of(params, rows)
        covariance = params.covariance.scaled(stats.scale)
        alive = np.ones(case.k, dtype=bool)
        updated = covariance.updated(stats, alive, reg_covar * stats.scale**2).scaled(1.0 / stats.scale)
        resp = responsibilities(params, rows)
        mass = resp.sum(axis=0)
        centred = rows[:, None, :] - (resp.T @ rows / mass[:, None])
        scatter = np.einsum("nk,nki,nkj->kij", resp, centred, centred)
        # the tied mean weighs components by their mass, which from_dense does not know
        own = scatter.sum(axis=0)[None] / mass.sum() if updated.shared else scatter / mass[:, None, None]
        expected = type(updated).from_dense(own + reg_covar * np.eye(case.d)).values
        np.testing.assert_allclose(updated.values, expected, rtol=1e-9, atol=1e-9)

    def test_a_component_without_rows_keeps_its_covariance(self, kind: str) -> None:
        case = Case(K, D, 40, 1)
        params, rows = case.mixture(kind), case.rows()
        stats = stats_of(params, rows)
        before = params.covariance.scaled(stats.scale)
        alive = np.array([True, False, True])
        if before.shared:
            # no covariance of its own to keep, but what is left of its moments must not be divided by no mass
            stats.moments[1] = [1e-300, *np.full(D, 1e-290)]
            after = before.updated(stats, alive, np.zeros(D))
            stats.moments[1] = 0.0
            np.testing.assert_array_equal(after.values, before.updated(stats, alive, np.zeros(D)).values)
            return
        after = before.updated(stats, alive, np.zeros(D))
        np.testing.assert_array_equal(after.values[1], before.values[1])
        assert (after.values[[0, 2]] != before.values[[0, 2]]).any()

    def test_dense_matrices_of_the_structure_come_back(self, kind: str) -> None:
        covariance = of(kind)
        dense = covariance.dense(K, D)
        np.testing.assert_array_equal(dense, np.swapaxes(dense, 1, 2))
        np.testing.assert_allclose(type(covariance).from_dense(dense).values, covariance.values, rtol=1e-15)

    def test_values_are_copied_and_frozen(self, kind: str) -> None:
        values = np.array(of(kind).values)
        covariance = STRUCTURES[kind](values)
        values[...] = -1.0
        assert (np.diagonal(covariance.dense(K, D), axis1=1, axis2=2) > 0).all()
        with pytest.raises(ValueError, match="read-only"):
            covariance.values[...] = 0.0

    @pytest.mark.parametrize("bad", [1, 2])
    def test_the_failing_component_is_named(self, kind: str, bad: int) -> None:
        values = broken(kind, bad, -0.25)
        name, precision_name = NAMES[kind].format(bad), PRECISION_NAMES[kind].format(bad)
        with pytest.raises(NumericalError, match=rf"The {name} is not positive definite.*variance -0\.25.*reg_covar"):
            STRUCTURES[kind](values).root(K, D)
        with pytest.raises(NumericalError, match=rf"The {precision_name} is not positive definite"):
            STRUCTURES[kind].from_precisions(values)

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_what_is_not_finite_is_named(self, kind: str, value: float) -> None:
        values = broken(kind, 1, value)
        with pytest.raises(NumericalError, match=rf"The {NAMES[kind].format(1)} is not finite.*power of ten"):
            STRUCTURES[kind](values).root(K, D)


def test_a_repeated_feature_is_named() -> None:
    values = np.array(of("full").values)
    values[2, 3], values[2, :, 3] = values[2, 1], values[2, :, 1]
    values[2, 3, 3] = values[2, 1, 1] * (1 - 1e-9)
    with pytest.raises(NumericalError, match=r"covariance matrix of component 2 .*stops at feature 3 \(variance"):
        STRUCTURES["full"](values).root(K, D)
