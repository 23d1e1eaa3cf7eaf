"""Mixtures with known truth: they are what they say, and their rows can be made chunk by chunk."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamgmm.errors import ParameterError
from streamgmm.synthetic import SHAPES, Mixture, random_mixture, recipe

SEEDS = st.integers(0, 2**32 - 1)


@given(st.integers(2, 8), st.integers(1, 6), st.floats(0.1, 20.0), SEEDS)
def test_the_nearest_means_are_the_separation_apart(k: int, d: int, separation: float, seed: int) -> None:
    mixture = random_mixture(k, d, separation, seed)
    distances = np.linalg.norm(mixture.means[:, None] - mixture.means, axis=2) + np.diag(np.full(k, np.inf))
    average = np.sqrt(np.trace(mixture.covariances, axis1=1, axis2=2).sum() / (k * d))
    assert average == pytest.approx(1.0, rel=1e-12)
    assert distances.min() == pytest.approx(separation * average, rel=1e-9)


@given(st.integers(1, 8), st.integers(1, 6), SEEDS)
def test_weights_and_covariances_make_a_mixture(k: int, d: int, seed: int) -> None:
    mixture = random_mixture(k, d, 3.0, seed)
    assert mixture.weights.sum() == pytest.approx(1.0, rel=1e-12)
    assert (mixture.weights > 0).all()
    assert (np.linalg.eigvalsh(mixture.covariances) > 0).all()
    np.testing.assert_array_equal(mixture.covariances, mixture.covariances.swapaxes(1, 2))


def test_covariances_are_rotated() -> None:
    covariances = random_mixture(3, 3, 3.0, 0).covariances
    assert (np.abs(covariances[:, [0, 0, 1], [1, 2, 2]]) > 0.02).any(axis=1).all()


def test_rows_have_the_moments_of_their_components() -> None:
    mixture = random_mixture(3, 2, 3.0, 5)
    rows, labels = mixture.rows(200_000, seed=1)
    for j in range(3):
        mine = rows[labels == j]
        error = mixture.deviations[j] / np.sqrt(len(mine))
        assert abs(len(mine) / 200_000 - mixture.weights[j]) < 5 * np.sqrt(0.25 / 200_000)
        assert (np.abs(mine.mean(axis=0) - mixture.means[j]) < 5 * error).all()
        np.testing.assert_allclose(np.cov(mine.T), mixture.covariances[j], atol=0.05)


def test_any_chunk_can_be_made_without_the_others() -> None:
    mixture = random_mixture(4, 3, 4.0, 2)
    chunks = list(mixture.chunks(2_500, 1_000, seed=9))
    assert [len(rows) for rows, _ in chunks] == [1_000, 1_000, 500]
    for i in (2, 0, 1):
        rows, labels = mixture.rows(len(chunks[i][0]), 9, chunk=i)
        np.testing.assert_array_equal(rows, chunks[i][0])
        np.testing.assert_array_equal(labels, chunks[i][1])


def test_chunks_and_seeds_draw_different_rows() -> None:
    mixture = random_mixture(2, 2, 4.0, 0)
    drawn = [mixture.rows(50, seed, chunk)[0] for seed in (0, 1) for chunk in (0, 1)]
    assert len({rows.tobytes() for rows in drawn}) == 4


@given(st.permutations(range(5)), SEEDS)
def test_match_undoes_a_permutation(order: list[int], seed: int) -> None:
    mixture = random_mixture(5, 3, 2.0, seed)
    shuffled = mixture.means[order] + 0.01
    np.testing.assert_array_equal(np.asarray(order)[mixture.match(shuffled)], np.arange(5))


def test_match_gives_no_row_twice() -> None:
    mixture = Mixture([0.5, 0.5], [[0.0], [1.0]], np.ones((2, 1, 1)))
    np.testing.assert_array_equal(mixture.match(np.array([[0.9], [9.0]])), [1, 0])


def test_a_mixture_cannot_be_changed() -> None:
    mixture = random_mixture(2, 2, 4.0, 0)
    with pytest.raises(ValueError, match="read-only"):
        mixture.means[0] = 0.0


@pytest.mark.parametrize(("k", "d", "separation"), [(0, 2, 1.0), (2, 0, 1.0), (2, 2, 0.0)])
def test_a_mixture_without_components_features_or_separation_is_refused(k: int, d: int, separation: float) -> None:
    with pytest.raises(ParameterError, match="at least one component and one feature and a separation above zero"):
        random_mixture(k, d, separation, 0)


def test_shapes_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(ParameterError, match=r"do not belong together: expected \(k,\), \(k, d\) and \(k, d, d\)"):
        Mixture([1.0], np.zeros((1, 2)), np.ones((1, 2)))


# -- the recipe ----------------------------------------------------------------------------------------------------


def test_the_recipe_of_published_figures_draws_what_it_always_drew() -> None:
    rows, labels = recipe(8, 5, 1_000, 1.5, 1)
    first = [[0.099348935604, 1.507205472919], [-0.176336191518, -1.319994898881]]
    np.testing.assert_allclose(rows[:2, :2], first, atol=1e-11)
    assert labels[:12].tolist() == [2, 4, 4, 3, 3, 4, 7, 3, 6, 0, 3, 4]


@pytest.mark.parametrize("shape", SHAPES)
def test_clusters_of_every_shape_have_the_same_moments(shape: str) -> None:
    drawn = SHAPES[shape](np.random.default_rng(0), 400_000, 2)
    np.testing.assert_allclose(drawn.mean(axis=0), 0.0, atol=0.01)
    np.testing.assert_allclose(np.cov(drawn.T), np.eye(2), atol=0.03)


def test_shapes_differ_in_what_moments_do_not_say() -> None:
    drawn = {shape: SHAPES[shape](np.random.default_rng(0), 400_000, 1)[:, 0] for shape in SHAPES}
    assert np.abs(drawn["box"]).max() < np.sqrt(3.0)
    assert (drawn["lognormal"] ** 3).mean() == pytest.approx(1.75, abs=0.05)
    assert (np.abs(drawn["t"]) > 4.0).mean() == pytest.approx(0.00356, rel=0.1)  # 2 P(t_5 > 4 sqrt(5/3))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_recipe_keeps_labels_whatever_the_shape(shape: str) -> None:
    rows, labels = recipe(3, 2, 500, 1.5, 4, shape)
    np.testing.assert_array_equal(labels, recipe(3, 2, 500, 1.5, 4)[1])
    np.testing.assert_allclose(rows.std(axis=0), 1.0, rtol=1e-12)


def test_a_shape_that_the_recipe_does_not_know_is_refused() -> None:
    with pytest.raises(ParameterError, match=r"shape='star' is no shape of clusters\. Choose one of gaussian, t, log"):
        recipe(2, 2, 100, 1.0, 0, "star")
