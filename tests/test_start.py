"""Starts: what a split preserves and gains, what must not matter, and awkward data for every kind of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from mixtures import KINDS, blobs

from streamgmm.checks import RULES
from streamgmm.covariance import STRUCTURES
from streamgmm.errors import DataError, NumericalError
from streamgmm.executors import SerialExecutor
from streamgmm.kernel import m_step
from streamgmm.params import MixtureParams
from streamgmm.partition import kmeans, quantised
from streamgmm.pilot import Pilot
from streamgmm.sample import Sample
from streamgmm.split import attempt, grown, halves, parts_of, replaced
from streamgmm.start import best_start, find_start
from streamgmm.synthetic import random_mixture, recipe

NAMES = ("auto", "split", "k-means++", "kmeans", "vq", "random_from_data", "samples", "random")
#: Kinds of starts that draw nothing.
WITHOUT_CHANCE = ("split", "vq")
#: Kinds of starts that do not depend on how rows are ordered and repeated. Random responsibilities are one a row.
LAWFUL = tuple(name for name in NAMES if name != "random")


def sample_of(rows: np.ndarray, weights: np.ndarray | None = None, *, isotropic: bool = False) -> Sample:
    """All rows as a sample, in the coordinates that a fit would give them."""
    weights = np.ones(len(rows)) if weights is None else weights
    pilot = Pilot(rows.mean(axis=0), np.atleast_2d(np.cov(rows.T)), len(rows), 0, weights.sum(), rows, weights)
    frame = pilot.frame(isotropic=isotropic)
    return Sample.of(rows, weights, frame, SerialExecutor(), 0, len(rows), complete=True)


def start(name: str, rows: Any, k: int, kind: str = "full", index: int = 0, **settings: Any) -> MixtureParams:
    structure = STRUCTURES[kind]
    sample = rows if isinstance(rows, Sample) else sample_of(rows, isotropic=structure.isotropic)
    return find_start(name, sample, structure, k, settings.get("seed", 1), index, settings.get("reg_covar", 1e-6))


def assert_same(one: MixtureParams, other: MixtureParams, tolerance: float = 0.0) -> None:
    for mine, its in (
        (one.weights, other.weights),
        (one.means, other.means),
        (one.covariance.values, other.covariance.values),
    ):
        np.testing.assert_allclose(mine, its, rtol=tolerance, atol=tolerance)


# -- laws of splitting -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_halves_together_have_the_moments_of_the_whole(seed: int) -> None:
    truth = random_mixture(1, 2 + seed, 1.0, seed)
    means, covariances = halves(truth.means[0], truth.covariances[0])
    apart = means - truth.means[0]
    np.testing.assert_allclose(means.mean(axis=0), truth.means[0], rtol=0, atol=1e-12)
    together = covariances.mean(axis=0) + apart.T @ apart / 2
    np.testing.assert_allclose(together, truth.covariances[0], rtol=0, atol=1e-12)
    assert np.linalg.eigvalsh(covariances).min() > 0


@pytest.mark.parametrize("kind", ["full", "diag", "spherical"])
def test_the_local_gain_is_a_lower_bound_of_the_whole_gain(kind: str) -> None:
    """With every row counted, however small its responsibility."""
    rows, _ = recipe(6, 3, 2000, 1.0, 3)
    sample = sample_of(rows, isotropic=kind == "spherical")
    params = start("split", sample, 4, kind)
    before = sample.read(params).log_likelihood
    gains = []
    for component, part in enumerate(parts_of(sample, params, least=0.0)):
        split = attempt(part, params, component, 1e-6)
        assert split is not None
        whole = sample.read(replaced(params, split)).log_likelihood - before
        assert split.gain <= whole + 1e-8
        gains.append((split.gain, whole))
    assert max(gain for gain, _ in gains) > 10.0, "a bound that is never positive would hold as well"
    assert max(whole - gain for gain, whole in gains) > 1e-3, "and so would the whole gain itself"


def test_rows_of_next_to_no_responsibility_are_left_out_and_say_little() -> None:
    rows, _ = recipe(6, 3, 2000, 1.5, 3)
    sample = sample_of(rows)
    params = start("split", sample, 4)
    some, every = parts_of(sample, params), parts_of(sample, params, least=0.0)
    assert sum(len(part.rows) for part in some) < 0.8 * sum(len(part.rows) for part in every) == 0.8 * 4 * len(rows)
    for component, parts in enumerate(zip(some, every, strict=True)):
        gains = [split.gain for part in parts if (split := attempt(part, params, component, 1e-6)) is not None]
        assert gains == [pytest.approx(gains[1], rel=0.05), gains[1]]


def test_the_component_that_gains_the_most_is_split() -> None:
    """Two blobs far apart, one of which is two: a split of the other would be in vain."""
    rng = np.random.default_rng(4)
    centres = np.repeat([[0.0, 0.0], [100.0, 0.0], [100.0, 8.0]], [1000, 200, 200], axis=0)
    found = start("split", centres + rng.standard_normal(centres.shape), 3)
    np.testing.assert_allclose(found.weights, [5 / 7, 1 / 7, 1 / 7], atol=1e-3)
    np.testing.assert_allclose(np.sort(found.means[:, 1]), [0.0, 0.0, 8.0], atol=0.3)


@pytest.mark.parametrize("kind", KINDS)
def test_splits_find_the_blobs(kind: str) -> None:
    """Of every structure: EM from there ends where the best of many other starts does."""
    sample = sample_of(blobs(), isotropic=kind == "spherical")
    found = best_start(sample, [start("split", sample, 3, kind)], 1e-6)
    others = best_start(sample, [start("k-means++", sample, 3, kind, index=index) for index in range(5)], 1e-6)
    assert found.log_likelihood == pytest.approx(others.log_likelihood, abs=1e-7)


# -- what must not matter ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LAWFUL)
def test_a_weight_is_a_repetition(name: str, kind: str) -> None:
    rows, times = blobs(600), np.random.default_rng(2).integers(1, 4, 600)
    isotropic = STRUCTURES[kind].isotropic
    repeated = sample_of(np.repeat(rows, times, axis=0), isotropic=isotropic)
    weighted = replace(sample_of(rows, times.astype(float), isotropic=isotropic), frame=repeated.frame)
    assert weighted.weights is not None
    assert_same(start(name, weighted, 4, kind), start(name, repeated, 4, kind), 1e-8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LAWFUL)
def test_the_order_of_rows_does_not_matter(name: str, kind: str) -> None:
    rows = blobs(800)
    shuffled = np.random.default_rng(3).permutation(rows)
    assert_same(start(name, rows, 4, kind), start(name, shuffled, 4, kind), 1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_units_of_powers_of_two_do_not_matter(name: str) -> None:
    units = np.array([2.0**-20, 1.0, 2.0**30])
    plain = start(name, blobs(800), 4, reg_covar=0.0)
    scaled = start(name, blobs(800) * units, 4, reg_covar=0.0)
    restored = replace(scaled, means=scaled.means / units, covariance=scaled.covariance.scaled(1.0 / units))
    assert_same(restored, plain)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_the_same_rows_and_seed_have_the_same_start(name: str, kind: str) -> None:
    assert_same(start(name, blobs(500), 3, kind), start(name, blobs(500), 3, kind))


@pytest.mark.parametrize("name", NAMES)
def test_seed_and_index_are_the_only_chance(name: str) -> None:
    """Rows without clusters, where what is drawn decides."""
    rows = np.random.default_rng(5).uniform(size=(600, 3))
    others = [start(name, rows, 6, seed=2), start(name, rows, 6, index=1)]
    same = [np.array_equal(other.means, start(name, rows, 6).means) for other in others]
    assert same == {"auto": [True, False]}.get(name, [name in WITHOUT_CHANCE] * 2)


def test_auto_is_clusters_where_halves_show_nothing() -> None:
    """Where all components have one covariance, and where there are few rows for so many parameters."""
    for rows, kind in ((blobs(), "tied"), (blobs(280), "full")):
        assert_same(start("auto", rows, 3, kind), start("kmeans", rows, 3, kind))
    assert_same(start("auto", blobs(300), 3), start("split", blobs(300), 3))


def test_auto_is_a_split_and_then_clusters() -> None:
    for index, name in enumerate(("split", "k-means++", "k-means++")):
        assert_same(start("auto", blobs(), 3, index=index), start(name, blobs(), 3, index=index))
    assert RULES["init_params"].holds("auto")
    assert all(repr(name) in RULES["init_params"].words for name in NAMES)


def test_far_rows_pull_a_code_less() -> None:
    """Ten of them are a cluster to k-means, which leaves two blobs in one; to the quantiser they are not."""
    rng = np.random.default_rng(5)
    centres = np.repeat([[-5.0, 0.0], [5.0, 0.0], [60.0, 0.0]], [200, 200, 10], axis=0)
    rows, weights = centres + rng.standard_normal(centres.shape), np.ones(410)
    cells = {cut: np.split(cut(rows, weights, 2, rng), [200, 400]) for cut in (quantised, kmeans)}
    assert [set(labels.tolist()) for labels in cells[quantised]] == [{0}, {1}, {1}]
    one, other, far = (set(labels.tolist()) for labels in cells[kmeans])
    assert one == other != far


# -- awkward data ------------------------------------------------------------------------------------------------------


def _with(rows: np.ndarray, change: Any) -> np.ndarray:
    rows = rows.copy()
    change(rows)
    return rows


def _one_far(rows: np.ndarray) -> None:
    rows[17] = 1e8


def _constant(rows: np.ndarray) -> None:
    rows[:, 1] = 7.0


AWKWARD = {
    "k=1": (blobs(300), 1),
    "one feature": (blobs(300)[:, :1], 4),
    "a hundred features": (np.random.default_rng(0).standard_normal((250, 100)), 2),
    "a constant feature": (_with(blobs(300), _constant), 4),
    "one far row": (_with(blobs(300), _one_far), 4),
    "just as many distinct rows": (np.repeat(blobs(5), 60, axis=0), 5),
    "whole numbers": (np.round(blobs(300)), 4),
    "alike": (np.repeat([[0.0, 1.0]], 50, axis=0), 1),
}


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("case", AWKWARD)
@pytest.mark.parametrize("kind", KINDS)
def test_starts_are_mixtures_whatever_the_rows(kind: str, case: str, weighted: bool) -> None:
    rows, k = AWKWARD[case]
    weights = np.random.default_rng(1).uniform(1e-6, 2e-6, len(rows)) if weighted else None
    sample = sample_of(rows, weights, isotropic=kind == "spherical")
    for name in NAMES:
        found = start(name, sample, k, kind, reg_covar=0.0 if weighted else 1e-6)
        found.covariance.root(*found.means.shape)
        assert found.weights.sum() == pytest.approx(1.0)
        assert np.isfinite(found.means).all()
        assert found.n_components == k
        assert_same(found, found.canonical())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [name for name in NAMES if name != "random"])
def test_fewer_distinct_rows_than_components_are_refused(name: str, kind: str) -> None:
    rows = np.repeat(blobs(3), 20, axis=0)
    with pytest.raises(DataError, match=r"Only 3 distinct rows were found among the 60 sampled, but n_components=4"):
        start(name, rows, 4, kind)


def test_nothing_to_split_is_said() -> None:
    with pytest.raises(NumericalError, match="None of the 1 components can be split"):
        grown(sample_of(np.repeat([[0.0, 1.0]], 50, axis=0)), STRUCTURES["full"], 2, 1e-6)


# -- the best of some --------------------------------------------------------------------------------------------------


def test_the_best_start_is_the_best_of_all() -> None:
    rows, _ = recipe(5, 2, 1000, 2.5, 2)
    sample = sample_of(rows)
    starts = [start("samples", sample, 5, index=index) for index in range(3)]
    found = best_start(sample, starts, 1e-6)
    alone = [best_start(sample, [one], 1e-6) for one in starts]
    assert found.index == int(np.argmax([one.log_likelihood for one in alone]))
    assert_same(found.params, alone[found.index].params)
    assert found.n_steps == sum(one.n_steps for one in alone)
    stats = found.result.stats
    assert stats is not None
    assert stats.log_likelihood / stats.weight == found.log_likelihood
    after, _ = m_step(stats, found.params, 1e-6)
    assert_same(after, found.params, 1e-12)


def test_the_best_is_refined_on_all_rows() -> None:
    rows, _ = recipe(3, 2, 12_000, 2.0, 2)
    sample = sample_of(rows)
    found = best_start(sample, [start("split", sample, 3)], 1e-6)
    stats = found.result.stats
    assert stats is not None
    assert stats.n_rows == 12_000
    assert found.n_steps > found.result.n_passes
    again, _ = m_step(sample.read(found.params), found.params, 1e-6)
    assert_same(again, found.params, 1e-3)


def test_a_start_that_degenerates_is_given_up() -> None:
    sample = sample_of(blobs())
    good = start("split", sample, 3)
    bad = replace(good, means=np.full((3, 3), np.nan))
    assert best_start(sample, [bad, good], 1e-6).index == 1
    with pytest.raises(NumericalError, match="cannot be computed"):
        best_start(sample, [bad, bad], 1e-6)
