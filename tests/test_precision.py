"""Log densities against exact arithmetic: ill-conditioned covariances, rows far out, components far apart.

The bound: 1e-5 + eps cond(Sigma) q, with q the quadratic form of the row and Sigma scaled to unit variances. The error
of a mixture's log density is a mean of those of its components, weighted by the responsibilities, and so is its bound.
The exact values are those of the float64 parameters that the model holds.
"""

from __future__ import annotations

from dataclasses import dataclass

import mpmath
import numpy as np
import pytest

from streamgmm import GaussianMixture, kernel
from streamgmm.covariance import STRUCTURES
from streamgmm.params import MixtureParams

KINDS = tuple(STRUCTURES)
EPS = np.finfo(np.float64).eps
DIGITS = 50


@dataclass(frozen=True)
class Recipe:
    """A random mixture. cond: of every correlation matrix. apart: of the means, in deviations. offset: of them all."""

    kind: str
    k: int
    d: int
    cond: float
    apart: float
    offset: float
    seed: int

    def model(self) -> GaussianMixture:
        """Units of the features span six decades; deviations of the components differ by up to ten times."""
        rng = np.random.default_rng(self.seed)
        unit = 10.0 ** rng.uniform(-3.0, 3.0, self.d)
        deviations = unit * 10.0 ** rng.uniform(-0.5, 0.5, (self.k, self.d))
        dense = np.stack([correlation(rng, self.d, self.cond) * np.outer(s, s) for s in deviations])
        values = {"full": dense, "tied": dense[0], "diag": deviations**2, "spherical": deviations[:, 0] ** 2}
        unit = np.full(self.d, unit[0]) if self.kind == "spherical" else unit
        means = unit * (self.offset + self.apart * rng.standard_normal((self.k, self.d)))
        weights = rng.dirichlet(np.full(self.k, 2.0))
        return GaussianMixture.from_parameters(weights, means, values[self.kind], covariance_type=self.kind)


def correlation(rng: np.random.Generator, d: int, cond: float) -> np.ndarray:
    """A random correlation matrix (d, d) whose condition number is about ``cond``."""
    directions = np.linalg.qr(rng.standard_normal((d, d)))[0]
    matrix = (directions * np.geomspace(1.0, 1.0 / cond, d)) @ directions.T
    inverse = 1.0 / np.sqrt(np.diagonal(matrix))
    matrix = matrix * np.outer(inverse, inverse)
    return 0.5 * (matrix + matrix.T)


def random_recipe(kind: str, cond: float, seed: int) -> Recipe:
    rng = np.random.default_rng([seed, 5])
    offset = rng.choice([0.0, 10.0 ** rng.uniform(0.0, 4.0)])
    return Recipe(kind, int(rng.integers(1, 5)), int(rng.integers(2, 13)), cond, 10 ** rng.uniform(0, 4), offset, seed)


def dense(model: GaussianMixture) -> np.ndarray:
    return STRUCTURES[model.covariance_type](model.covariances_).dense(*model.means_.shape)


def rows_about(model: GaussianMixture, n: int, farthest: float, seed: int) -> np.ndarray:
    """n rows (n, d), 0.001 to ``farthest`` deviations from a component: of its features, or along its own ellipsoid."""
    rng = np.random.default_rng([seed, 7])
    matrices, (k, d) = dense(model), model.means_.shape
    rows = np.empty((n, d))
    for i in range(n):
        j = int(rng.integers(k))
        direction = rng.standard_normal(d)
        direction /= np.linalg.norm(direction)
        root = np.diag(np.sqrt(np.diagonal(matrices[j]))) if i % 2 else np.linalg.cholesky(matrices[j])
        rows[i] = model.means_[j] + 10 ** rng.uniform(-3.0, np.log10(farthest)) * (root @ direction)
    return rows


def exact_and_bounds(model: GaussianMixture, rows: np.ndarray) -> tuple[list[mpmath.mpf], np.ndarray]:
    """Log densities to DIGITS digits, and how far off float64 may be."""
    with mpmath.workdps(DIGITS):
        parts = [exact_component(model, j, rows) for j in range(model.n_components)]
        values, bounds = [], []
        for i in range(len(rows)):
            joint = [part[0][i] for part in parts]
            top = max(joint)
            odds = [mpmath.exp(value - top) for value in joint]
            total = mpmath.fsum(odds)
            values.append(top + mpmath.log(total))
            bounds.append(float(mpmath.fsum(o * part[1][i] for o, part in zip(odds, parts, strict=True)) / total))
        return values, np.array(bounds)


def exact_component(model: GaussianMixture, j: int, rows: np.ndarray) -> tuple[list[mpmath.mpf], np.ndarray]:
    """Log joint densities of one component, and the bound of each."""
    matrix, d = dense(model)[j], rows.shape[1]
    factor = mpmath.cholesky(mpmath.matrix(matrix.tolist()))
    deviations = np.sqrt(np.diagonal(matrix))
    spectrum = np.linalg.eigvalsh(matrix / np.outer(deviations, deviations))
    constant = mpmath.log(mpmath.mpf(model.weights_[j])) - mpmath.mpf(d) / 2 * mpmath.log(2 * mpmath.pi)
    constant -= mpmath.fsum(mpmath.log(factor[i, i]) for i in range(d))
    forms = [
        quadratic_form(factor, [mpmath.mpf(a) - mpmath.mpf(b) for a, b in zip(row, model.means_[j], strict=True)])
        for row in rows
    ]
    bounds = 1e-5 + EPS * spectrum[-1] / spectrum[0] * np.array([float(q) for q in forms])
    return [constant - q / 2 for q in forms], bounds


def quadratic_form(factor: mpmath.matrix, centred: list[mpmath.mpf]) -> mpmath.mpf:
    """|L^-1 centred|^2 by forward substitution."""
    solved: list[mpmath.mpf] = []
    for i, value in enumerate(centred):
        known = mpmath.fsum(factor[i, j] * solved[j] for j in range(i))
        solved.append((value - known) / factor[i, i])
    return mpmath.fsum(value * value for value in solved)


def worst_ratio(model: GaussianMixture, rows: np.ndarray) -> float:
    """The largest error of a log density as a share of its bound."""
    exact, bounds = exact_and_bounds(model, rows)
    found = model.score_samples(rows).tolist()
    errors = [abs(float(mpmath.mpf(value) - truth)) for value, truth in zip(found, exact, strict=True)]
    return float((np.array(errors) / bounds).max())


def params_of(model: GaussianMixture) -> MixtureParams:
    return MixtureParams(model.weights_, model.means_, STRUCTURES[model.covariance_type](model.covariances_))


def scorer_of(model: GaussianMixture) -> kernel.Scorer:
    params = params_of(model)
    return kernel.prepare(params, params.frame())


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("cond", [1.0, 1e3, 1e6, 1e9, 1e12])
@pytest.mark.parametrize("kind", KINDS)
def test_log_densities_keep_the_bound(kind: str, cond: float, seed: int) -> None:
    model = random_recipe(kind, cond, seed).model()
    assert worst_ratio(model, rows_about(model, 8, 1e4, seed)) <= 1.0


@pytest.mark.long
@pytest.mark.parametrize("cond", [1.0, 1e3, 1e6, 1e9, 1e12])
@pytest.mark.parametrize("kind", KINDS)
def test_hundreds_of_log_densities_keep_the_bound(kind: str, cond: float) -> None:
    for seed in range(8, 150):
        model = random_recipe(kind, cond, seed).model()
        assert worst_ratio(model, rows_about(model, 8, 1e4, seed)) <= 1.0, seed


@pytest.mark.parametrize("kind", ["full", "tied"])
def test_rows_at_the_mean_keep_the_bound(kind: str) -> None:
    """Where q is zero nothing but the determinant is left, and it must be right to 1e-5 by itself."""
    models = [Recipe(kind, 1, 2 + seed % 6, 1e12, 1.0, 0.0, seed).model() for seed in range(60)]
    assert max(worst_ratio(model, model.means_) for model in models) <= 1.0


#: Components far apart in their own deviations: what the packed form subtracts is too large, in every structure.
FAR_APART = {
    "full": Recipe("full", 3, 4, 1e4, 3e4, 0.0, 1),
    "tied": Recipe("tied", 3, 4, 1e4, 3e4, 0.0, 1),
    "diag": Recipe("diag", 3, 4, 1.0, 3e6, 0.0, 1),
    "spherical": Recipe("spherical", 3, 4, 1.0, 3e6, 0.0, 1),
}


@pytest.mark.parametrize("kind", KINDS)
def test_without_the_guard_the_bound_breaks(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = FAR_APART[kind].model()
    rows = rows_about(model, 12, 10.0, 1)
    assert len(scorer_of(model).centred) == model.n_components
    assert worst_ratio(model, rows) <= 1.0
    monkeypatch.setattr(kernel, "GUARD_LIMIT", np.inf)
    assert len(scorer_of(model).centred) == 0
    assert worst_ratio(model, rows) > 1.0


def test_one_component_takes_the_centred_form_and_the_others_do_not() -> None:
    """A thin component far from the frame beside two broad ones: both forms write into the same log joints."""
    covariances = np.stack([np.eye(3), 4.0 * np.eye(3), 1e-14 * np.eye(3)])
    means = np.array([[0.0, 0.0, 0.0], [3.0, 0.0, 1.0], [0.5, 0.25, -0.25]])
    model = GaussianMixture.from_parameters([0.5, 0.3, 0.2], means, covariances)
    scorer = scorer_of(model)
    assert scorer.centred.tolist() == [2]
    assert scorer.packed.tolist() == [0, 1]
    assert worst_ratio(model, rows_about(model, 12, 100.0, 2)) <= 1.0


@pytest.mark.parametrize("kind", KINDS)
def test_far_rows_leave_the_packed_form(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Components that are packed, rows 1e4 deviations away: those rows, and only those, take the centred form."""
    far = 1e4 if kind in ("full", "tied") else 1e6  # what is far depends on the condition, which axes do not have
    model = Recipe(kind, 3, 4, 1e6, 1.0, 0.0, 3).model()
    near, away = rows_about(model, 6, 1.0, 3), rows_about(model, 1, 1.0, 4) + far * np.sqrt(dense(model)[0].diagonal())
    seen: list[tuple[int, int]] = []
    centred_form = kernel._centred_log_joint

    def recorded(scorer: kernel.Scorer, k: int, z: np.ndarray) -> np.ndarray:
        seen.append((k, z.shape[1]))
        return centred_form(scorer, k, z)

    assert len(scorer_of(model).packed) == model.n_components
    monkeypatch.setattr(kernel, "_centred_log_joint", recorded)
    rows = np.concatenate([near, away])
    assert worst_ratio(model, rows) <= 1.0
    assert seen == [(j, 1) for j in range(model.n_components)]
