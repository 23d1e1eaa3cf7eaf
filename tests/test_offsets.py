"""Where the data lie and in which units they are must not matter: offsets, powers of two, deviations of 1 and 100."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import log_softmax
from sklearn.metrics import adjusted_rand_score

from streamgmm import GaussianMixture
from streamgmm.covariance import STRUCTURES

KINDS = tuple(STRUCTURES)
OFFSETS = [1e3, 1e6, 1.7e9, 1e12]


def three_clusters() -> np.ndarray:
    """3,000 rows of three well separated clusters in three features, deviations near 1."""
    rng = np.random.default_rng(0)
    centres = np.array([[0.0, 0.0, 0.0], [8.0, 1.0, -3.0], [-4.0, 9.0, 5.0]])
    factors = np.eye(3) + 0.3 * rng.standard_normal((3, 3, 3))
    labels = rng.choice(3, size=3000, p=[0.3, 0.25, 0.45])
    return centres[labels] + np.einsum("nij,nj->ni", factors[labels], rng.standard_normal((3000, 3)))


def fitted(rows: np.ndarray, kind: str) -> GaussianMixture:
    return GaussianMixture(3, covariance_type=kind, reg_covar=0.0, random_state=0).fit(rows)


def dense(model: GaussianMixture) -> np.ndarray:
    return STRUCTURES[model.covariance_type](model.covariances_).dense(*model.means_.shape)


def assert_moved(moved: GaussianMixture, model: GaussianMixture, offset: np.ndarray | float) -> None:
    """``moved`` is ``model`` plus ``offset``, to max(1e-9, 10 ulp(offset) / deviation) deviations."""
    covariances = dense(model)
    deviations = np.sqrt(np.diagonal(covariances, axis1=1, axis2=2))
    allowed = np.maximum(1e-9, 10.0 * np.spacing(offset) / deviations)
    assert (np.abs((moved.means_ - offset) - model.means_) <= allowed * deviations).all()
    error = np.abs(dense(moved) - covariances) / (deviations[:, :, None] * deviations[:, None, :])
    assert (error <= np.maximum(allowed[:, :, None], allowed[:, None, :])).all()
    assert (np.abs(moved.weights_ - model.weights_) <= allowed.max()).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("offset", OFFSETS)
def test_an_offset_moves_the_means_and_nothing_else(kind: str, offset: float) -> None:
    rows = three_clusters() + offset
    assert_moved(fitted(rows, kind), fitted(rows - offset, kind), offset)


@pytest.mark.parametrize("kind", KINDS)
def test_float32_rows_far_from_zero(kind: str) -> None:
    """At 1e6 float32 keeps steps of 1/16; what the rows hold after that rounding is what must be learned."""
    rows = (three_clusters() + 1e6).astype(np.float32)
    assert_moved(fitted(rows, kind), fitted(rows.astype(np.float64) - 1e6, kind), 1e6)


@pytest.mark.parametrize("kind", KINDS)
def test_timestamps_beside_fractions(kind: str) -> None:
    """Seconds since 1970 that spread over days, and a fraction between 0 and 1."""
    clusters = three_clusters()
    seconds = np.round(1.7e9 + 86_400.0 * clusters[:, 0])
    rows = np.column_stack([seconds, 1.0 / (1.0 + np.exp(-clusters[:, 1] / 4.0))])
    offset = np.array([1.7e9, 0.0])
    assert_moved(fitted(rows, kind), fitted(rows - offset, kind), offset)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("power", [66, -66])
def test_powers_of_two_change_no_bit(kind: str, power: int) -> None:
    """Components overlap and 15 steps are taken, so that a difference of one rounding would be seen."""
    rng = np.random.default_rng(3)
    rows = three_clusters() + 3.0 * rng.standard_normal((3000, 3))
    signs = np.ones(3) if kind == "spherical" else np.array([1.0, -1.0, 1.0])
    factor = 2.0 ** (power * signs)
    model, scaled = (
        GaussianMixture(3, covariance_type=kind, reg_covar=0.0, random_state=0, max_iter=15, tol=1e-12, solver="em")
        for _ in range(2)
    )
    with pytest.warns(UserWarning, match="did not converge"):
        model.fit(rows)
    with pytest.warns(UserWarning, match="did not converge"):
        scaled.fit(rows * factor)
    np.testing.assert_array_equal(scaled.means_ / factor, model.means_)
    np.testing.assert_array_equal(dense(scaled) / np.outer(factor, factor), dense(model))
    np.testing.assert_array_equal(scaled.weights_, model.weights_)
    shift = np.log(2.0) * power * signs.sum()
    np.testing.assert_allclose(np.add(scaled.lower_bounds_, shift), model.lower_bounds_, rtol=1e-13)


def deviations_of(name: str, d: int) -> np.ndarray:
    """Deviation of each feature: 1, 100, or 1 and 100 in turn."""
    return {"1": np.ones(d), "100": np.full(d, 100.0), "1 and 100": np.where(np.arange(d) % 2, 100.0, 1.0)}[name]


def eight_apart(k: int, d: int, deviations: np.ndarray, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """About n rows of k spherical clusters in directions at random, every two 8 deviations apart, and their labels.

    At 8 deviations one row in about 30,000 lies nearer to each wrong centre. Rows that the true mixture itself cannot
    tell (posterior below 0.999) are left out: no fit could give them back.
    """
    rng = np.random.default_rng([seed, d, k])
    directions = np.linalg.qr(rng.standard_normal((d, d)))[0][:k]
    centres = 8.0 / np.sqrt(2.0) * directions
    labels = rng.integers(k, size=n)
    rows = centres[labels] + rng.standard_normal((n, d))
    joint = rows @ centres.T - 0.5 * (centres**2).sum(axis=1)
    clear = log_softmax(joint, axis=1)[np.arange(n), labels] > np.log(0.999)
    return (rows * deviations)[clear], labels[clear]


def assert_recovers(kind: str, k: int, d: int, scale: str, n_init: int, n: int, seed: int) -> None:
    rows, labels = eight_apart(k, d, deviations_of(scale, d), n, seed)
    model = GaussianMixture(k, covariance_type=kind, n_init=n_init, random_state=seed).fit(rows)
    assert adjusted_rand_score(labels, model.predict(rows)) == 1.0


SCALES = ("1", "100", "1 and 100")
#: One sphere for all features has no meaning where their deviations are 1 and 100 in turn.
OTHERS = [(kind, scale) for kind in ("tied", "diag") for scale in SCALES] + [("spherical", "1"), ("spherical", "100")]


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.long) for seed in (2, 3, 4))])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("d", [24, 40, 80])
def test_three_clusters_are_found_from_our_own_start(d: int, scale: str, seed: int) -> None:
    assert_recovers("full", 3, d, scale, 1, 60 * d, seed)


@pytest.mark.parametrize(
    ("d", "scale"),
    [(24, "1"), *(pytest.param(d, scale, marks=pytest.mark.long) for d, scale in [(40, "100"), (80, "1 and 100")])],
)
def test_eight_clusters_are_found_with_eight_starts(d: int, scale: str) -> None:
    assert_recovers("full", 8, d, scale, 8, 5000, 0)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("d", [24, 40, 80])
@pytest.mark.parametrize(("kind", "scale"), OTHERS)
def test_three_clusters_are_found_in_every_structure(kind: str, scale: str, d: int, seed: int) -> None:
    assert_recovers(kind, 3, d, scale, 1, 5000, seed)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("d", [24, 40, 80])
@pytest.mark.parametrize(("kind", "scale"), [("full", scale) for scale in SCALES] + OTHERS)
def test_eight_clusters_are_found_in_every_structure(kind: str, scale: str, d: int, seed: int) -> None:
    assert_recovers(kind, 8, d, scale, 8, 5000, seed)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("d", [24, 40, 80])
def test_clusters_are_found_where_the_sample_is_a_part(d: int, seed: int) -> None:
    """60,000 rows are more than the start looks at."""
    assert_recovers("full", 3, d, "1", 1, 60_000, seed)
