"""EM in few reads: where it ends, and what it does where the sample misleads."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from mixtures import mixture_of
from samples import REG, mean_log_likelihood, moved, part, whole

from streamgmm.kernel import m_step
from streamgmm.params import MixtureParams
from streamgmm.sample import Sample
from streamgmm.solvers.anderson import anderson
from streamgmm.solvers.em import em
from streamgmm.solvers.gain import Gain, exact_gain
from streamgmm.solvers.surrogate import MOST_STEPS, Progress, surrogate_em
from streamgmm.synthetic import recipe


def every_read(
    full: Sample, sample: Sample, start: MixtureParams, *, tol: float, max_iter: int, reg_covar: float = REG
) -> tuple[Progress, list[Progress]]:
    """Where the fit ends, and where it stands after every read."""
    seen = [Progress.at(start, sample)]
    while len(seen) <= max_iter and not seen[-1].converged:
        seen.append(surrogate_em(full.read, sample, seen[-1], tol=tol, max_iter=len(seen), reg_covar=reg_covar))
    return seen[-1], seen[1:]


# -- where it ends ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    [pytest.param("full", marks=pytest.mark.long), "tied", "diag", pytest.param("spherical", marks=pytest.mark.long)],
)
def test_it_ends_at_the_optimum_of_all_rows(kind):
    """From the optimum of a sixth of the rows; as EM does from where it ended, and no read makes it worse."""
    rows, labels = recipe(4, 3, 12_000, 1.0, 10)
    full, sample = whole(rows), part(rows[::6], 12_000)
    start = anderson(sample.read, mixture_of(rows, labels, kind), tol=1e-10, max_iter=800, reg_covar=REG).params
    end, seen = every_read(full, sample, start, tol=1e-9, max_iter=60)
    assert end.converged
    optimum = anderson(full.read, end.published, tol=1e-13, max_iter=2_000, reg_covar=REG)
    assert max(optimum.lower_bounds) - mean_log_likelihood(full, end.published) < 1e-8
    verified = [progress.best.log_likelihood for progress in seen]
    assert verified == sorted(verified)
    for progress in seen:
        assert mean_log_likelihood(full, progress.published) >= progress.best.log_likelihood - 1e-13


@pytest.mark.parametrize("reg_covar", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("solver", ["reads", "anderson"])
def test_regularised_fits_end_where_em_s_steps_lead_nowhere(solver, reg_covar):
    """Of variances near one. There the likelihood itself can fall from step to step, and still the fits end."""
    rows, labels = recipe(3, 2, 12_000, 1.0, 10)
    full, sample, start = whole(rows), part(rows[::6], 12_000), mixture_of(rows, labels, "full")
    if solver == "anderson":
        found = anderson(full.read, start, tol=1e-10, max_iter=200, reg_covar=reg_covar)
        end, reads, converged = found.params, found.n_passes, found.converged
    else:
        last, seen = every_read(full, sample, start, tol=1e-9, max_iter=60, reg_covar=reg_covar)
        end, reads, converged = last.published, len(seen), last.converged
    assert converged
    assert reads < 50
    step, _ = m_step(full.read(end), end, reg_covar)
    np.testing.assert_allclose(step.means, end.means, rtol=0, atol=1e-4)
    np.testing.assert_allclose(step.covariance.values, end.covariance.values, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["full", "diag"])
def test_four_reads_are_nearer_than_em_and_anderson(kind):
    rows, labels = recipe(5, 3, 40_000, 1.0, 11)
    full, sample = whole(rows), part(rows[::5], 40_000)
    start = anderson(sample.read, mixture_of(rows, labels, kind), tol=1e-10, max_iter=800, reg_covar=REG).params
    few = surrogate_em(full.read, sample, Progress.at(start, sample), tol=0.0, max_iter=3, reg_covar=REG)
    others = [
        anderson(full.read, start, tol=0.0, max_iter=3, reg_covar=REG).params,
        em(
            lambda models: tuple(map(full.read, models)), [start], tol=0.0, max_iter=3, reg_covar=REG,
            report=lambda record: None,
        ).params,
    ]  # fmt: skip
    optimum = max(anderson(full.read, few.published, tol=1e-12, max_iter=2_000, reg_covar=REG).lower_bounds)
    gap, *gaps = (optimum - mean_log_likelihood(full, params) for params in (few.published, *others))
    assert gap < 0.5 * min(gaps)
    assert gap < 0.2 * start.n_parameters / (2 * 40_000)


@pytest.mark.long
def test_the_order_of_rows_does_not_matter_to_the_last_digits():
    """Sorted rows and shuffled ones, so that their samples differ, from one start, which is no optimum of either."""
    shuffled, labels = recipe(4, 3, 20_000, 1.0, 19)
    start = mixture_of(shuffled, labels, "full")
    chosen = np.sort(np.random.default_rng(0).choice(20_000, 4_000, replace=False))
    full, found = whole(shuffled), []
    for rows in (shuffled, shuffled[np.argsort(shuffled[:, 0], kind="stable")]):
        sample = part(rows[chosen], 20_000)
        end = surrogate_em(whole(rows).read, sample, Progress.at(start, sample), tol=1e-8, max_iter=50, reg_covar=REG)
        assert end.converged
        found.append(mean_log_likelihood(full, end.published))
    assert found[0] == pytest.approx(found[1], abs=1e-6)


# -- where the sample misleads ---------------------------------------------------------------------------------------


def no_worse_than_em(rows: np.ndarray, sample: Sample, start: MixtureParams, reads: int) -> list[Progress]:
    """The passes of a fit that ends no worse than EM from the same start with as many reads, one of them spent more."""
    full = whole(rows)
    end, seen = every_read(full, sample, start, tol=0.0, max_iter=reads + 1)
    plain = em(
        lambda models: tuple(map(full.read, models)), [start], tol=0.0, max_iter=reads, reg_covar=REG,
        report=lambda record: None,
    ).params  # fmt: skip
    assert mean_log_likelihood(full, end.published) >= mean_log_likelihood(full, plain) - 1e-12
    return seen


def test_a_sample_without_a_rare_sharp_component():
    """It is found in the rows all the same, and the first gap says that the sample lacked it."""
    rng = np.random.default_rng(12)
    rows, labels = recipe(2, 2, 20_000, 2.0, 12)
    sharp = 0.01 * rng.standard_normal((200, 2)) + [3.0, -3.0]
    everything = np.concatenate([rows, sharp])
    sample = part(rows[:4_000], len(everything))
    start = mixture_of(
        np.concatenate([rows[:4_000], rows[:40]]), np.concatenate([labels[:4_000], np.full(40, 2)]), "full"
    )
    start = anderson(sample.read, start, tol=1e-10, max_iter=800, reg_covar=REG).params
    seen = no_worse_than_em(everything, sample, start, 8)
    assert seen[-1].first_gap > 0


@pytest.mark.parametrize("reads", [3, 8])
@pytest.mark.parametrize("seed", [13, *(pytest.param(seed, marks=pytest.mark.long) for seed in (14, 15))])
def test_a_sample_of_other_rows_is_taken_back(seed, reads):
    """A sample that has nothing to do with the rows: reads are rejected, and the likelihood still rises."""
    rows, labels = recipe(3, 2, 10_000, 1.0, seed)
    others, _ = recipe(3, 2, 2_000, 3.0, 112 - seed)
    seen = no_worse_than_em(rows, part(others, 10_000), mixture_of(rows, labels, "full"), reads)
    assert all(progress.record.inner_steps <= MOST_STEPS for progress in seen)
    verified = [progress.best.log_likelihood for progress in seen]
    assert verified == sorted(verified)


def test_a_plateau():
    """More components than the rows have: the likelihood is flat, and is never lowered."""
    rng = np.random.default_rng(14)
    rows = rng.standard_normal((10_000, 2))
    labels = rng.integers(4, size=10_000)
    sample = part(rows[:2_000], 10_000)
    start = mixture_of(rows + 0.1 * labels[:, None], labels, "full")
    no_worse_than_em(rows, sample, start, 6)


def test_no_fit_ends_with_a_read_that_is_taken_back():
    """Nor does what is published fall with it: of what is to be published after the same read the surer is kept."""
    rows, labels = recipe(3, 2, 8_000, 1.0, 5)
    full, sample, rng = whole(rows), part(rows[:2_000], 8_000), np.random.default_rng(0)
    theta = moved(mixture_of(rows, labels, "full"), rng, 0.1)
    once = Progress.at(theta, sample).after(full.read(theta), sample, 0.0, REG)
    worse, step = moved(theta, rng, 1.0), once.best.em_step(REG)
    bold = replace(once, next=worse, certain=False, caution=0.01, promise=Gain(0.0, 0.0, 0.0, 0, error=1e9))
    for published, kept in ((step, True), (theta, False)):
        again = replace(bold, published=published).after(full.read(worse), sample, 1e3, REG)
        assert again.rejected
        assert not again.converged
        assert again.best is once.best
        assert 0.0 < exact_gain(again.best, again.next, REG) < exact_gain(again.best, step, REG)
        assert again.published is (published if kept else again.next)
