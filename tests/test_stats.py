"""SufficientStats: what they are by definition, and what they refuse."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from support import KINDS, Case, absolute_terms, assert_same, cases, densities, responsibilities, stats_of

from streamgmm.covariance import STRUCTURES
from streamgmm.errors import DataError
from streamgmm.params import MixtureParams
from streamgmm.quadratic import unpack
from streamgmm.stats import Frame

CASE = Case(k=3, d=2, n=40, seed=11)


@pytest.mark.parametrize("kind", KINDS)
@given(case=cases())
def test_statistics_are_the_sums_of_their_definition(kind: str, case: Case) -> None:
    params, rows, weights = case.mixture(kind), case.rows(), case.counts().astype(float)
    stats = stats_of(params, rows, weights)
    resp = responsibilities(params, rows) * weights[:, None]
    z = (rows[:, None, :] - stats.origin) * stats.scale
    outer = np.einsum("nk,nki,nkj->kij", resp, z, z)
    terms = absolute_terms(kind, params, rows, stats, weights)
    i, j = np.triu_indices(case.d)
    second = {
        "full": outer[:, i, j],
        "tied": np.empty((case.k, 0)),
        "diag": np.diagonal(outer, axis1=1, axis2=2),
        "spherical": np.trace(outer, axis1=1, axis2=2)[:, None],
    }[kind]
    first = np.einsum("nk,nki->ki", resp, z)
    moments = np.concatenate([resp.sum(axis=0)[:, None], first, second], axis=1)
    # densities by an explicit inverse are good to about 1e-12 themselves
    assert (np.abs(stats.moments - moments) <= 1e-11 * terms.moments).all()
    if kind == "tied":
        assert np.allclose(unpack(stats.common, case.d), outer.sum(axis=0), rtol=1e-11, atol=1e-11 * terms.common.max())
    log_density = np.logaddexp.reduce(densities(params, rows)[0], axis=1)
    assert abs(stats.log_likelihood - weights @ log_density) <= 1e-11 * terms.log_likelihood
    assert stats.weight == weights.sum()
    assert (stats.n_rows, stats.n_skipped) == (case.n, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_views_cut_the_moments_in_three(kind: str) -> None:
    stats = stats_of(CASE.mixture(kind), CASE.rows())
    d, k = CASE.d, CASE.k
    assert stats.mass.shape == (k,)
    assert stats.first.shape == (k, d)
    assert stats.second.shape == (k, STRUCTURES[kind].quadratic.size(d))
    assert stats.mass.sum() == pytest.approx(CASE.n, rel=1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_other_coordinates_are_refused(kind: str) -> None:
    params, rows = CASE.mixture(kind), CASE.rows()
    here = stats_of(params, rows)
    moved = here.about(here.origin + 1.0, here.scale)
    wider = here.about(here.origin, here.scale * 2.0)
    for other in (moved, wider):
        with pytest.raises(DataError, match=r"different coordinates and do not add.*\.about\(origin, scale\)"):
            here + other
    assert (moved.about(here.origin, here.scale) + here).n_rows == 2 * CASE.n


def test_other_structures_and_sizes_are_refused() -> None:
    rows = CASE.rows()
    full, diag = (stats_of(CASE.mixture(kind), rows) for kind in ("full", "diag"))
    with pytest.raises(DataError, match=r"3 components of Outer features \(6 moments\) and 3 of Squares \(5"):
        full + diag
    params = CASE.mixture("diag")
    fewer = MixtureParams(np.full(2, 0.5), params.means[:2], type(params.covariance)(params.covariance.values[:2]))
    with pytest.raises(DataError, match=r"3 components of Squares features \(5 moments\) and 2 of Squares"):
        diag + stats_of(fewer, rows)
    with pytest.raises(TypeError, match="unsupported operand"):
        full + 1


@pytest.mark.parametrize("kind", KINDS)
def test_addition_and_change_of_origin_leave_their_arguments_alone(kind: str) -> None:
    stats = stats_of(CASE.mixture(kind), CASE.rows())
    before = (stats.moments.copy(), stats.common.copy(), stats.origin.copy())
    _ = (stats + stats, 3.0 * stats, stats.about(stats.origin - 1.0, stats.scale * 4.0))
    for kept, now in zip(before, (stats.moments, stats.common, stats.origin), strict=True):
        np.testing.assert_array_equal(kept, now)


@pytest.mark.parametrize("kind", KINDS)
def test_the_frame_is_only_a_way_to_compute(kind: str) -> None:
    params, rows = CASE.mixture(kind), CASE.rows()
    here = stats_of(params, rows)
    there = stats_of(params, rows, frame=Frame(np.full(CASE.d, 0.75), np.full(CASE.d, 0.25)))
    moved = there.about(here.origin, here.scale)
    terms = absolute_terms(kind, params, rows, here, detour=np.abs(here.origin - there.origin))
    assert_same(here, moved, terms)
