"""The compiled loops against the tile by tile form of the same E-step, and against exact values."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import KINDS, Case, absolute_terms, assert_identical, assert_same, cases

from streamgmm import GaussianMixture, open_source
from streamgmm.kernel import MOST_REFUSED, TRIED_ROWS, _Room, _Sums, e_step, prepare
from streamgmm.loops import MOST_FUSED, PANEL_ROWS, TOGETHER, Lens, expand, softmax
from streamgmm.params import MixtureParams
from streamgmm.sources import with_weights
from streamgmm.stats import SufficientStats
from streamgmm.tiles import Span

every_structure = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="class", params=[0, MOST_FUSED], ids=["BLAS", "fused"])
def either_way(request: pytest.FixtureRequest) -> Iterator[None]:
    """Products by BLAS, and fused where there are so few components, as on machines of either kind."""
    with patch("streamgmm.loops.MOST_FUSED", request.param):
        yield


def statistics(
    params: MixtureParams,
    rows: np.ndarray,
    weights: np.ndarray | None = None,
    *,
    single: bool = False,
    loops: bool = True,
    nan_policy: str = "raise",
) -> SufficientStats:
    """One block's, with the compiled loops or without."""
    source = open_source(rows, block_rows=len(rows), nan_policy=nan_policy)
    source = source if weights is None else with_weights(source, weights.astype(float))
    scorer = prepare(params, params.frame(), single=single)
    if loops:
        return e_step((scorer,), source.blocks()[0]).values[0]
    with patch("streamgmm.kernel._lenses", lambda scorer: []):
        return e_step((scorer,), source.blocks()[0]).values[0]


def with_holes(case: Case) -> np.ndarray:
    """Rows of which some have NaN, one at least has none."""
    rows = case.rows()
    holes = np.random.default_rng([case.seed, 9]).random(rows.shape) < 0.2
    holes[0] = False
    return np.where(holes, np.nan, rows)


@pytest.mark.usefixtures("either_way")
class TestAgainstTiles:
    """What the loops add up is what NumPy adds up tile by tile, to rounding."""

    @every_structure
    @given(case=cases(), weighted=st.booleans())
    def test_statistics(self, kind: str, case: Case, weighted: bool) -> None:
        params, rows, weights = case.mixture(kind), case.rows(), case.counts() if weighted else None
        one, other = (statistics(params, rows, weights, loops=loops) for loops in (True, False))
        assert_same(one, other, absolute_terms(kind, params, rows, other, weights))

    @every_structure
    @given(case=cases(), weighted=st.booleans())
    def test_rows_with_nan_are_left_out(self, kind: str, case: Case, weighted: bool) -> None:
        params, rows, weights = case.mixture(kind), with_holes(case), case.counts() if weighted else None
        one, other = (statistics(params, rows, weights, loops=loops, nan_policy="omit") for loops in (True, False))
        whole = ~np.isnan(rows).any(axis=1)
        kept = None if weights is None else weights[whole]
        assert_same(one, other, absolute_terms(kind, params, rows[whole], other, kept))
        assert (one.n_rows, one.n_skipped) == (other.n_rows, other.n_skipped) == (whole.sum(), (~whole).sum())

    @every_structure
    @given(case=cases())
    def test_in_single_precision(self, kind: str, case: Case) -> None:
        """Sums of float64 over features and densities of float32: a few of its units of rounding, 1.2e-7."""
        params, rows = case.mixture(kind), case.rows()
        one, other = statistics(params, rows, single=True), statistics(params, rows)
        terms = absolute_terms(kind, params, rows, other)
        assert_same(one, other, terms, 1e-4)
        assert np.abs(one.mass - other.mass).max() <= 1e-3 * len(rows)

    def test_the_loops_are_entered(self) -> None:
        """The laws above compare two things: with the loops replaced by a refusal the other form is taken."""
        case = Case(3, 2, 500, 0)
        params, rows = case.mixture("full"), case.rows()
        with patch("streamgmm.kernel.responsibilities", side_effect=AssertionError("entered")):
            statistics(params, rows)
            with pytest.raises(AssertionError, match="entered"):
                statistics(params, rows, loops=False)


class TestFusedProducts:
    """Where there are few components, products are made and added up in one sweep; BLAS gives the same to rounding."""

    @every_structure
    @given(case=cases(), weighted=st.booleans(), single=st.booleans())
    def test_as_by_blas(self, kind: str, case: Case, weighted: bool, single: bool) -> None:
        params, rows, weights = case.mixture(kind), case.rows(), case.counts() if weighted else None
        one = statistics(params, rows, weights, single=single)
        with patch("streamgmm.loops.MOST_FUSED", 0):
            other = statistics(params, rows, weights, single=single)
        terms = absolute_terms(kind, params, rows, other, weights)
        assert_same(one, other, terms, 1e-4 if single else 1e-12)

    @pytest.mark.parametrize("k", [1, 3, 4, 5, 8, 9, 17, MOST_FUSED, MOST_FUSED + 1])
    @pytest.mark.parametrize("n", [1, 5, 255, 256, 257, 700])
    @pytest.mark.parametrize("kind", ["full", "tied"])
    def test_any_number_of_components_and_rows(self, k: int, n: int, kind: str) -> None:
        case = Case(k, 3, n, 5)
        params, rows = case.mixture(kind), case.rows()
        one, other = (statistics(params, rows, loops=loops) for loops in (True, False))
        assert_same(one, other, absolute_terms(kind, params, rows, other))
        assert lenses(params)[0].fused == (TOGETHER > 0 and k <= MOST_FUSED)

    @pytest.mark.parametrize("k", [7, 17])
    @pytest.mark.parametrize("single", [False, True])
    @every_structure
    def test_all_at_once(self, kind: str, single: bool, k: int) -> None:
        """Several groups, whole panels and a part of one, weights, rows that are left out."""
        case = Case(k, 3, 700, 5)
        params, rows, weights = case.mixture(kind), with_holes(case), case.counts()
        one = statistics(params, rows, weights, single=single, nan_policy="omit")
        other = statistics(params, rows, weights, loops=False, nan_policy="omit")
        whole = ~np.isnan(rows).any(axis=1)
        terms = absolute_terms(kind, params, rows[whole], other, weights[whole])
        assert_same(one, other, terms, 1e-4 if single else 1e-12)

    @pytest.mark.parametrize("single", [False, True])
    @every_structure
    def test_where_calls_begin_makes_no_difference(self, kind: str, single: bool) -> None:
        case = Case(5, 3, 1_000, 5)
        params, rows = case.mixture(kind), case.rows()
        lens, whole, parts = lenses(params, single=single)[0], sums_of(params), sums_of(params)
        lens.learn(rows, None, False, *whole)
        for start in range(0, 1_000, PANEL_ROWS):
            lens.learn(rows[start : start + PANEL_ROWS], None, False, *parts)
        for one, other in zip(whole, parts, strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e200, 1e9])
@pytest.mark.parametrize("omits_nan", [False, True])
@pytest.mark.parametrize("single", [False, True])
@every_structure
def test_a_row_that_needs_care_is_left_to_others(kind, single, omits_nan, bad):
    """Not finite or far: the loops end before its panel, unless a row with NaN is to be left out."""
    case = Case(3, 2, 700, 1)
    params, rows = case.mixture(kind), case.rows()
    rows[600, 1] = bad
    (lens, *_), sums = lenses(params, single=single), sums_of(params)
    learned = lens.learn(rows, None, omits_nan, *sums)
    left_out = omits_nan and np.isnan(bad)
    assert learned == (700 if left_out else 2 * PANEL_ROWS)
    assert sums[-1].tolist()[2:] == ([699.0, 1.0] if left_out else [learned, 0.0])
    expected = sums_of(params)
    lens.learn(np.delete(rows, 600, axis=0) if left_out else rows[:learned], None, False, *expected)
    for one, other in zip(sums, expected, strict=True):
        if one is not None and not left_out:
            np.testing.assert_array_equal(one, other)


def test_an_infinity_beside_nan_is_refused() -> None:
    case = Case(2, 3, 50, 1)
    params, rows = case.mixture("full"), case.rows()
    rows[7] = [np.nan, np.inf, 0.0]
    (lens,), sums = lenses(params), sums_of(params)
    assert lens.learn(rows, None, True, *sums) == 0
    assert not any(part.any() for part in sums if part is not None)


def lenses(params: MixtureParams, *, single: bool = False) -> list[Lens]:
    from streamgmm.kernel import _lenses

    return _lenses(prepare(params, params.frame(), single=single))


def sums_of(params: MixtureParams) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """tally, common and totals, all zero."""
    d = params.means.shape[1]
    common = np.zeros((d, d)) if prepare(params, params.frame()).shared else None
    return lenses(params)[0].tally(), common, np.zeros(4)


@pytest.mark.usefixtures("either_way")
class TestSinglePrecision:
    def test_the_guard_keeps_narrow_components_in_double_precision(self) -> None:
        """A component of a thousandth of the others' deviation: single precision would lose it."""
        rng = np.random.default_rng(0)
        rows = np.concatenate([rng.normal(size=(500, 2)), 1.0 + 1e-3 * rng.normal(size=(500, 2))])
        covariances = np.stack([np.eye(2), 1e-6 * np.eye(2)])
        model = GaussianMixture.from_parameters([0.5, 0.5], [[0.0, 0.0], [1.0, 1.0]], covariances)
        params = MixtureParams(model.weights_, model.means_, Case(2, 2, 1, 0).mixture("full").covariance)
        params = MixtureParams(model.weights_, model.means_, type(params.covariance)(covariances))
        assert not prepare(params, params.frame(), single=True).single
        assert_identical(statistics(params, rows, single=True), statistics(params, rows))

    def test_rows_that_are_far_are_seen_in_double_precision(self) -> None:
        case = Case(3, 2, 500, 2)
        params, rows = case.mixture("full"), case.rows()
        rows[PANEL_ROWS + 3] = 1e4
        assert prepare(params, params.frame(), single=True).single
        first, (double, single) = rows[:PANEL_ROWS], (statistics(params, rows, single=it) for it in (False, True))
        found = single - statistics(params, first, single=True)
        assert_same(found, double - statistics(params, first), absolute_terms("full", params, rows, double), 1e-13)

    @pytest.mark.parametrize("weight", [1e-50, 1e-42, 1e36, 1e40])
    @every_structure
    def test_weights_that_single_precision_cannot_hold(self, kind: str, weight: float) -> None:
        case = Case(3, 2, 500, 2)
        params, rows, weights = case.mixture(kind), case.rows(), np.full(500, weight)
        assert_identical(statistics(params, rows, weights, single=True), statistics(params, rows, weights))

    def test_it_is_given_up_where_it_refuses_too_much(self) -> None:
        """One row in 100 is far: what it refused is seen in double precision, and after 4,096 rows all else too."""
        case = Case(3, 2, 20_000, 2)
        params, rows = case.mixture("full"), case.rows()
        rows[::100] = 1e3
        scorer = prepare(params, params.frame(), single=True)
        assert scorer.single
        seen = _Sums(scorer, _Room())
        block = open_source(rows, block_rows=len(rows)).blocks()[0]
        seen.learn(Span(0, rows, None), block)
        single, double = (part.totals[2] for part in seen.seen)
        assert (single, double) == (0.0, 20_000.0)
        assert TRIED_ROWS < seen.n_refused < TRIED_ROWS + MOST_REFUSED * 20_000 + 2 * PANEL_ROWS

    @every_structure
    def test_rounded_parameters_leave_no_bias(self, kind: str) -> None:
        """Errors of many rows cancel, those of the parameters would not: 1e-7 nats a row, another for each mixture."""
        case = Case(4, 5, 50_000, 7)
        params, rows = case.mixture(kind), case.rows()
        one, other = (statistics(params, rows, single=single) for single in (True, False))
        assert abs(one.log_likelihood - other.log_likelihood) / len(rows) < 5e-8

    def test_a_component_without_weight(self) -> None:
        case = Case(3, 2, 500, 2)
        params, rows = case.mixture("full"), case.rows()
        without = MixtureParams(np.array([0.4, 0.6, 0.0]), params.means, params.covariance)
        one, other = (statistics(without, rows, single=single) for single in (True, False))
        assert one.log_likelihood == pytest.approx(other.log_likelihood, rel=1e-6)
        assert one.mass[2] < 1e-30

    @every_structure
    def test_a_fit_is_the_same_to_single_precision(self, kind: str) -> None:
        case = Case(3, 4, 5_000, 3)
        start = case.start(kind)
        model = {
            dtype: GaussianMixture(
                3,
                covariance_type=kind,
                solver="em",
                max_iter=5,
                tol=1e3,
                weights_init=start.weights,
                means_init=start.means,
                precisions_init=start.covariance.precisions(3, 4),
                compute_dtype=dtype,
            ).fit(case.rows())
            for dtype in ("float64", "float32")
        }
        one, other = model["float64"], model["float32"]
        assert 0 < np.abs(one.means_ - other.means_).max() < 1e-5
        assert one.lower_bound_ == pytest.approx(other.lower_bound_, abs=1e-5)


class TestFunctions:
    def test_softmax_is_exact_to_a_few_units_of_rounding(self) -> None:
        rng = np.random.default_rng(0)
        joint = rng.uniform(-600, 600, size=(7, 1)) + rng.exponential(5.0, size=(7, 20_000)) * rng.normal(size=(7, 1))
        exact = (joint - joint.max(axis=0)).astype(np.longdouble)  # the difference is rounded once
        shares, sums = np.exp(exact), np.exp(exact).sum(axis=0)
        shares /= sums
        density = np.log(sums) + joint.max(axis=0)
        found = softmax(joint)
        normal = shares > 1e-290
        assert (np.abs(joint - shares) / shares)[normal].max() < 2e-15
        assert (np.abs(found - density) / np.maximum(np.abs(density), 1.0)).max() < 5e-16
        assert (joint[~normal] < 1e-289).all()

    def test_a_density_that_is_not_a_number_stays_so(self) -> None:
        joint = np.array([[0.0, np.nan, 1.0], [1.0, 0.0, np.nan], [np.nan, 1.0, 0.0]])
        assert np.isnan(softmax(joint)).all()

    def test_no_rows(self) -> None:
        with pytest.raises(ValueError, match="joint densities"):
            softmax(np.empty((0, 3)))
        assert softmax(np.empty((3, 0))).shape == (0,)
        lens, sums = lenses(Case(2, 2, 1, 0).mixture("full"))[0], sums_of(Case(2, 2, 1, 0).mixture("full"))
        assert lens.learn(np.empty((0, 2)), None, False, *sums) == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"scale": np.ones(3)}, "shift, scale, reach or eta"),
        ({"eta": np.ones((2, 5))}, "outside of 2 features and 2 products"),
        ({"whitener": np.eye(3)}, "the whitener"),
        ({"terms": (np.array([0]), np.array([2]), np.array([0]))}, "Term 0 is outside"),
        ({"eta": np.ones((2, 2))}, "shape of eta"),
        (
            {"terms": (np.zeros(3, int), np.zeros(3, int), np.array([0, 2, 1]))},
            "Term 1 is of product 2, after one of 0",
        ),
        ({"terms": (np.zeros(2, int), np.zeros(2, int), np.array([0, 1]))}, "The terms make 2 products of 3"),
        ({"terms": (np.array([0]), np.array([0, 1]), np.array([0]))}, "the terms"),
    ],
)
def test_a_lens_checks_its_shapes(change, words):
    i, j = np.triu_indices(2)
    given = {
        "shift": np.zeros(2),
        "scale": np.ones(2),
        "terms": (i, j, np.arange(3)),
        "eta": np.ones((2, 6)),
        "whitener": None,
        "reach": np.ones(2),
        "limit": 1e9,
    }
    Lens(**given)
    with pytest.raises(ValueError, match=words):
        Lens(**{**given, **change})


def test_sums_and_rows_are_checked() -> None:
    params = Case(2, 2, 1, 0).mixture("tied")
    (lens,), (tally, common, totals) = lenses(params), sums_of(params)
    for rows, sums in (
        (np.zeros((4, 3)), (tally, common, totals)),
        (np.zeros((4, 2)), (tally[:1].copy(), common, totals)),
        (np.zeros((4, 2)), (tally, np.zeros((3, 3)), totals)),
        (np.zeros((4, 2)), (tally, None, totals)),
        (np.zeros((4, 2)), (tally, common, totals[:3])),
    ):
        with pytest.raises(ValueError, match="does not fit the others"):
            lens.learn(rows, None, False, *sums)
    with pytest.raises(ValueError, match="the products"):
        expand(np.zeros((2, 4)), *(np.zeros(1, dtype=int),) * 3, np.zeros((1, 3)))


def test_threads_do_not_disturb_each_other() -> None:
    """Each call has its own buffers: two at a time give what one after the other gives, bit for bit."""
    case = Case(5, 6, 30_000, 4)
    params, rows = case.mixture("full"), case.rows()
    alone = statistics(params, rows)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: statistics(params, rows), range(16)):
            assert_identical(found, alone)
