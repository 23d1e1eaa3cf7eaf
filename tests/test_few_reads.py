"""A fit of few reads: what it reads, says, warns of and hands on."""

from __future__ import annotations

import warnings

import dask
import numpy as np
import pytest
from conftest import write_zarr
from mixtures import KINDS, as_given, assert_identical, mixture_of
from test_reads import counted, keys_of

from streamgmm import GaussianMixture, load, open_source
from streamgmm.errors import DegenerateComponentWarning, ParameterError
from streamgmm.synthetic import recipe


def test_rows_are_read_once_where_the_sample_holds_them_all():
    rows, _ = recipe(3, 2, 2_000, 2.0, 15)
    model = GaussianMixture(3, random_state=0).fit(rows)
    assert model.n_passes_ == 1
    assert model.converged_
    (record,) = model.history_
    assert record.iteration == 0
    assert record.inner_steps >= model.n_iter_
    assert model.lower_bound_ == pytest.approx(model.score(rows), abs=1e-8)


@pytest.mark.parametrize("scheduler", ["synchronous", "threads"])
def test_a_read_is_a_read_of_every_chunk(scheduler, tmp_path):
    rows, _ = recipe(3, 2, 20_000, 1.0, 16)
    path = write_zarr(tmp_path, rows, 1_000)
    array = counted(path)
    with dask.config.set(scheduler=scheduler, num_workers=3):
        model = GaussianMixture(3, sample_rows=4_000, n_init=3, random_state=0).fit(
            open_source(array, block_rows=2_000)
        )
    assert 2 < model.n_passes_ < 8
    assert array.store.reads() == {(key, "None"): model.n_passes_ for key in keys_of(path)}


def test_threads_on_the_sample_change_no_bit(monkeypatch):
    rows, _ = recipe(3, 2, 60_000, 2.0, 16)
    model = GaussianMixture(3, sample_rows=40_000, random_state=0).fit(rows)
    monkeypatch.setattr("streamgmm.fitting.THREADED_PRODUCTS", 0)
    with dask.config.set(num_workers=3):
        assert_identical(GaussianMixture(3, sample_rows=40_000, random_state=0).fit(rows), model)


def test_a_start_at_the_optimum_is_not_left_for_that_of_the_sample():
    """A warm start on the same rows: one read verifies it, and walks no farther than all rows tell."""
    rows, _ = recipe(3, 2, 20_000, 2.0, 16)
    model = GaussianMixture(3, sample_rows=4_000, random_state=0, tol=1e-9).fit(rows)
    reads, score = model.n_passes_, model.score(rows)
    model.set_params(warm_start=True, tol=None).fit(rows)
    assert model.n_passes_ == 2 < reads
    assert model.lower_bounds_[0] == pytest.approx(score, abs=1e-12)
    assert model.score(rows) >= score - 1e-12


def test_passes_begin_at_a_start_that_is_given_whole():
    """However much more another mixture would gain on the sample."""
    rows, labels = recipe(3, 2, 20_000, 2.0, 16)
    rough = mixture_of(rows, np.random.default_rng(0).permutation(labels) % 2 + labels // 2, "full")
    model = GaussianMixture(3, sample_rows=4_000, random_state=0, **as_given(rough)).fit(rows)
    first = GaussianMixture.from_parameters(rough.weights, rough.means, rough.covariance.values).score(rows)
    assert model.lower_bounds_[0] == pytest.approx(first, abs=1e-12)
    assert model.converged_
    assert model.score(rows) > first + 0.1


def test_the_history_says_what_each_read_did():
    rows, _ = recipe(3, 2, 20_000, 1.0, 16)
    model = GaussianMixture(3, sample_rows=4_000, n_init=2, random_state=0).fit(rows)
    assert [record.iteration for record in model.history_] == list(range(model.n_iter_ + 1))
    assert model.n_passes_ == model.n_iter_ + 1
    assert [record.log_likelihood for record in model.history_[1:]] == model.lower_bounds_
    last = model.history_[-1]
    tol = 0.1 * 17 / (2 * 20_000)
    assert last.converged
    assert 2.0 * last.predicted_gap <= tol
    assert all(record.rows == 20_000 and record.bytes == rows.nbytes for record in model.history_)
    assert all(record.seconds >= 0 for record in model.history_)
    assert len({record.restart for record in model.history_}) == 1
    assert model.score(rows) >= model.lower_bound_


def test_the_cap_on_reads_warns_with_the_predicted_gap():
    rows, _ = recipe(4, 2, 20_000, 0.8, 17)
    with pytest.warns(UserWarning, match=r"expected to rise by another \d.* nats a row") as caught:
        GaussianMixture(4, sample_rows=1_000, max_iter=1, random_state=0).fit(rows)
    assert any("did not converge in 1 passes" in str(warning.message) for warning in caught)


def test_a_sample_of_fewer_rows_than_components_is_refused():
    rows, _ = recipe(3, 2, 2_000, 2.0, 18)
    with pytest.raises(ParameterError, match="sample_rows=2 is fewer than n_components=3"):
        GaussianMixture(3, sample_rows=2).fit(rows)


@pytest.mark.parametrize(("sample_rows", "words"), [(10, "reads: EM reads"), (300, "accelerated EM reads")])
def test_a_small_sample_only_seeks_the_start(sample_rows, words, caplog):
    """m <= P: EM; m < 30 P: accelerated EM. Both end at an optimum of all rows, and the log says so."""
    rows, _ = recipe(3, 2, 20_000, 2.0, 18)
    with caplog.at_level("INFO", "streamgmm"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = GaussianMixture(3, sample_rows=sample_rows, random_state=0).fit(rows)
    assert f"the sample has {sample_rows} rows for 17 free parameters, too few" in caplog.text
    assert words in caplog.text
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        score = model.score(rows)
        model.set_params(solver="em", tol=1e-12, max_iter=500, warm_start=True).fit(rows)
    assert model.lower_bound_ - score < 1e-4


@pytest.mark.parametrize(
    ("separation", "seed"), [(1.5, 4), pytest.param(1.0, 19, marks=pytest.mark.long)], ids=["apart", "overlapping"]
)
def test_sorted_and_shuffled_rows_end_at_the_same_mixture(separation, seed):
    """The more components overlap, the more reads lead to the last digits."""
    rows, labels = recipe(4, 3, 20_000, separation, seed)
    start = mixture_of(rows, labels, "full")
    given = as_given(start)
    shuffled = rows[np.random.default_rng(0).permutation(len(rows))]
    for tol, apart in ((1e-8, 1e-6), (None, 2 * 0.1 * start.n_parameters / 40_000)):
        scores = [
            GaussianMixture(4, tol=tol, sample_rows=4_000, random_state=0, **given).fit(order).score(rows)
            for order in (rows[np.argsort(rows[:, 0])], shuffled)
        ]
        assert abs(scores[0] - scores[1]) < apart


@pytest.mark.parametrize("kind", KINDS)
def test_a_fit_is_gone_on_from(kind, tmp_path):
    """Batches after it find its mixture in the running statistics, and so does a saved model."""
    rows, _ = recipe(3, 2, 20_000, 2.0, 20)
    model = GaussianMixture(3, covariance_type=kind, sample_rows=3_000, random_state=0).fit(rows)
    model.save(tmp_path / "m.sgmm")
    again = load(tmp_path / "m.sgmm")
    np.testing.assert_array_equal(again.means_, model.means_)
    assert again.effective_rows_ == pytest.approx(20_000)
    before = model.means_.copy()
    model.partial_fit(rows[:100])
    again.partial_fit(rows[:100])
    np.testing.assert_array_equal(again.means_, model.means_)
    assert 0 < np.abs(model.means_ - before).max() < 0.02


def test_a_component_without_rows_is_warned_of():
    rows, _ = recipe(2, 3, 20_000, 2.0, 1)
    model = GaussianMixture(2, random_state=0, sample_rows=3_000, means_init=[[1e4] * 3, [0.0] * 3])
    with pytest.warns(DegenerateComponentWarning, match=r"\[0\] have lost all their rows"):
        model.fit(rows)


@pytest.mark.parametrize("unit", [1e-200, 1e150])
def test_the_unit_of_weights_does_not_matter(unit):
    rows, _ = recipe(2, 3, 20_000, 2.0, 1)
    weights = np.random.default_rng(0).uniform(0.5, 2.0, len(rows))
    settings = {"n_components": 2, "random_state": 0, "sample_rows": 3_000}
    model = GaussianMixture(**settings).fit(rows, sample_weight=weights)
    other = GaussianMixture(**settings).fit(rows, sample_weight=weights * unit)
    assert [r.inner_steps for r in other.history_] == [r.inner_steps for r in model.history_]
    assert other.history_[-1].predicted_gap == pytest.approx(model.history_[-1].predicted_gap, rel=1e-3)
