"""Laws of learning batch by batch: the step schedule, one step as an iteration of EM, weights, chunks, and resuming."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from mixtures import KINDS, UNFINISHED, assert_close, assert_identical, blobs, given_start
from support import Case

from streamgmm import GaussianMixture, load, open_source
from streamgmm.errors import DataError, DataTypeError, NumericalError, ParameterError
from streamgmm.params import MixtureParams
from streamgmm.solvers.stepwise import Running, Schedule
from streamgmm.stats import SufficientStats


def learner(kind: str = "full", **settings: Any) -> GaussianMixture:
    return GaussianMixture(3, covariance_type=kind, **{"random_state": 0, **given_start(kind), **settings})


def running(model: GaussianMixture) -> Running:
    assert model._online is not None
    assert model._online.running is not None
    return model._online.running


def bytes_of(model: GaussianMixture, folder: Path) -> str:
    model.save(folder / "hash.sgmm")
    return hashlib.sha256((folder / "hash.sgmm").read_bytes()).hexdigest()


def reopened(model: GaussianMixture, folder: Path) -> GaussianMixture:
    model.save(folder / "reopened.sgmm")
    return load(folder / "reopened.sgmm")


# -- the schedule --------------------------------------------------------------------------------------------------

AMOUNTS = st.floats(1e-2, 1e12)
SCHEDULES = st.builds(Schedule, st.floats(1.0, 1e6), st.floats(0.51, 1.0), st.sampled_from([0.0, 1e-9, 1e-4, 0.1, 0.9]))


@given(schedule=SCHEDULES, memory=AMOUNTS, first=AMOUNTS, second=AMOUNTS)
def test_two_batches_keep_what_one_of_both_keeps(schedule, memory, first, second):
    memory = min(memory, schedule.longest)
    between = schedule.after(memory, first)
    kept = (1 - schedule.step(memory, first)) * (1 - schedule.step(between, second))
    assert kept == pytest.approx(1 - schedule.step(memory, first + second), rel=1e-6, abs=1e-9)
    assert schedule.after(between, second) == pytest.approx(schedule.after(memory, first + second), rel=1e-9)


@given(schedule=SCHEDULES, memory=AMOUNTS)
def test_the_clock_is_the_inverse_of_the_memory(schedule, memory):
    free = Schedule(schedule.reference, schedule.exponent)
    assert free.memory(free.clock(memory)) == pytest.approx(memory, rel=1e-9)


@given(reference=st.floats(1.0, 1e6), memory=AMOUNTS, weight=AMOUNTS)
def test_with_exponent_one_all_rows_count_alike(reference, memory, weight):
    schedule = Schedule(reference, 1.0)
    assert schedule.step(memory, weight) == pytest.approx(weight / (memory + weight), rel=1e-9)
    assert schedule.after(memory, weight) == pytest.approx(memory + weight, rel=1e-9)


@given(memory=AMOUNTS, weight=AMOUNTS, exponent=st.floats(0.51, 1.0))
def test_few_rows_count_alike_whatever_the_exponent(memory, weight, exponent):
    schedule = Schedule(2 * (memory + weight), exponent)
    assert schedule.step(memory, weight) == pytest.approx(weight / (memory + weight), rel=1e-9)


@given(schedule=SCHEDULES, memory=AMOUNTS, weight=AMOUNTS)
def test_a_step_is_a_share_and_a_tiny_batch_has_a_tiny_one(schedule, memory, weight):
    memory = min(memory, schedule.longest)
    assert 0 < schedule.step(memory, weight) <= 1
    assert schedule.step(memory, 1e-9 * memory) == pytest.approx(1e-9, rel=0.2) or schedule.rate > 0


def test_after_half_a_life_a_row_counts_half():
    model = GaussianMixture(1, forgetting={"half_life": 1000.0}, prior_rows=1e9)
    model.weights_init, model.means_init, model.precisions_init = [1.0], [[0.0]], [[[1.0]]]
    model.partial_fit(np.zeros((1, 1)))
    before = running(model).stats.n_rows
    step = Schedule(1.0, 1.0, model_rate(model)).step(1e9, 1000.0)
    assert before == 1
    assert step == pytest.approx(0.5, abs=1e-5)


def model_rate(model: GaussianMixture) -> float:
    from streamgmm.checks import forgetting_rate

    return forgetting_rate(model.forgetting)


@pytest.mark.parametrize("size", [5, 100])
def test_so_many_effective_rows_are_remembered_as_were_asked_for(size):
    rng = np.random.default_rng(0)
    model = GaussianMixture(1, forgetting={"effective_rows": 400}, random_state=0)
    for _ in range(2400 // size):
        model.partial_fit(rng.normal(size=(size, 1)))
    assert model.effective_rows_ == pytest.approx(400, rel=0.15)  # a batch of a hundred rows forgets in one step


# -- one step ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_the_whole_data_with_step_one_are_one_iteration_of_em(kind, offset):
    start = given_start(kind)
    start["means_init"] = start["means_init"] + offset
    rows = blobs() + offset
    with UNFINISHED:
        em = GaussianMixture(3, covariance_type=kind, solver="em", max_iter=1, **start).fit(rows)
    step = GaussianMixture(3, covariance_type=kind, forgetting=1.0, **start).partial_fit(rows)
    for name in ("weights_", "means_", "covariances_"):
        np.testing.assert_allclose(getattr(step, name), getattr(em, name), rtol=1e-12, atol=1e-12 * (1 + offset))


@pytest.mark.parametrize("size", [2, 16, *(pytest.param(size, marks=pytest.mark.long) for size in (1, 4))])
@pytest.mark.parametrize("settings", [{}, {"step_exponent": 0.6}, {"forgetting": {"half_life": 300}}], ids=str)
def test_the_variance_of_a_gaussian_does_not_shrink_with_the_batch(size, settings):
    """Within three standard errors, of the weights w_i that the schedule gives the rows: sqrt(2 sum w_i^2)."""
    rng = np.random.default_rng(size)
    rows, n_start = 1e6 + 2.0 * rng.standard_normal((800, 1)), 20
    model = GaussianMixture(1, random_state=0, **settings)
    for start in range(0, len(rows), size):
        model.partial_fit(rows[start : start + size])
    first = -(-n_start // size) * size  # the batch in which the start was found ends there
    schedule = Schedule(100 * 2, model.step_exponent, model_rate(model))
    weights, memory = np.full(first, 1.0 / first), float(first)
    for start in range(first, len(rows), size):
        n = len(rows[start : start + size])
        step = schedule.step(memory, n)
        weights, memory = np.concatenate([(1 - step) * weights, np.full(n, step / n)]), schedule.after(memory, n)
    squares = float(weights @ weights)
    assert weights.sum() == pytest.approx(1.0)
    assert model.effective_rows_ == pytest.approx(1 / squares)
    assert model.means_[0, 0] - 1e6 == pytest.approx(weights @ (rows[:, 0] - 1e6), abs=1e-7)
    assert abs(model.covariances_[0, 0, 0] / 4.0 - 1) < 3 * np.sqrt(2 * squares)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_repetitions(kind):
    rows, rng = blobs(300), np.random.default_rng(0)
    weights = rng.integers(1, 4, len(rows))
    weighted, repeated = (learner(kind).partial_fit(rows) for _ in range(2))
    weighted.partial_fit(rows, sample_weight=weights)
    repeated.partial_fit(np.repeat(rows, weights, axis=0))
    assert_close(weighted, repeated, 1e-10)
    assert weighted.effective_rows_ == pytest.approx(repeated.effective_rows_, rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_may_lie_anywhere(kind, tmp_path):
    rows = blobs(700)
    zarr.create_array(tmp_path / "rows.zarr", data=rows, chunks=(90, 3))
    batches = [rows, str(tmp_path / "rows.zarr"), da.from_array(rows, chunks=(130, 3)), np.asfortranarray(rows)]
    models = [learner(kind).partial_fit(blobs(400, seed=1)).partial_fit(batch) for batch in batches]
    for model in models[1:]:
        assert_close(model, models[0], 1e-12)


@given(
    case=st.builds(Case, st.integers(1, 3), st.integers(1, 3), st.integers(4, 60), st.integers(0, 99)), data=st.data()
)
def test_blending_is_the_weighted_mean_of_both_about_any_origin(case, data):
    """Against raw moments, which blend without any change of origin."""
    kind = data.draw(st.sampled_from(KINDS))
    step = data.draw(st.floats(0, 1))
    old, new = (of_rows(case, kind, seed).per_weight() for seed in (1, 2))
    blend, origin = old.blended(new, step), np.zeros(case.d)
    raw = [stats.about(origin, new.scale) for stats in (old, new, blend)]
    np.testing.assert_allclose(
        raw[2].moments, (1 - step) * raw[0].moments + step * raw[1].moments, rtol=1e-9, atol=1e-9
    )
    np.testing.assert_allclose(raw[2].common, (1 - step) * raw[0].common + step * raw[1].common, rtol=1e-9, atol=1e-9)
    assert blend.weight == 1.0


def of_rows(case: Case, kind: str, seed: int) -> SufficientStats:
    mixture = case.mixture(kind)
    rows, _ = mixture.draw(case.n, np.random.default_rng([case.seed, seed]))
    model = GaussianMixture.from_parameters(
        mixture.weights, mixture.means, mixture.covariance.values, covariance_type=kind
    )
    return model.statistics(rows).stats


@pytest.mark.parametrize("kind", KINDS)
def test_pseudo_data_are_what_the_mixture_makes(kind):
    """M of the statistics of a mixture is the mixture, and rows drawn from it have them on average."""
    case = Case(3, 2, 0, 5)
    params = case.mixture(kind)
    pseudo = Running.of_mixture(params, 100.0, (-3.0, 10.0))
    model = GaussianMixture.from_parameters(
        params.weights, params.means, params.covariance.values, covariance_type=kind
    )
    rows, _ = params.draw(200_000, np.random.default_rng(0))
    drawn = model.statistics(rows).stats.per_weight()
    same = pseudo.stats.about(params.means, drawn.scale)
    drawn = drawn.about(params.means, drawn.scale)
    np.testing.assert_allclose(drawn.moments, same.moments, atol=0.02)
    np.testing.assert_allclose(drawn.common, same.common, atol=0.02)
    found = settled(params, pseudo)
    np.testing.assert_allclose(found.means, params.means, rtol=1e-12)
    np.testing.assert_allclose(found.covariance.values, params.covariance.values, rtol=1e-12)


def settled(params: MixtureParams, pseudo: Running) -> MixtureParams:
    from streamgmm.kernel import m_step

    return m_step(pseudo.stats, params, 0.0)[0]


# -- what goes on --------------------------------------------------------------------------------------------------


def test_after_a_fit_its_rows_count_as_what_they_are():
    """Yesterday's model, and a batch of a hundredth of its rows."""
    rows = blobs(20_000)
    model = learner().fit(rows)
    assert model.effective_rows_ == 20_000
    model.partial_fit(rows[:200])
    assert model.report_.step == pytest.approx(200 / 20_200, rel=0.03)
    assert model.n_rows_ == 20_200
    assert model.n_steps_ == 1
    assert "20,200 rows in" in repr(model)
    assert "1 step since" in repr(model)


def test_a_mixture_from_elsewhere_counts_thirty_rows_a_parameter():
    fitted = learner().fit(blobs())
    model = GaussianMixture.from_parameters(fitted.weights_, fitted.means_, fitted.covariances_)
    model.partial_fit(blobs(290, seed=1))
    assert model.report_.step == pytest.approx(290 / (30 * 29 + 290))
    assert model.set_params(prior_rows=5).report_.n_rows == 290


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("settings", [{}, {"average": True}, {"forgetting": {"half_life": 500}}], ids=str)
def test_a_restart_after_every_batch_changes_no_bit(kind, settings, tmp_path):
    """From the first rows that are kept on."""
    straight = GaussianMixture(3, covariance_type=kind, random_state=0, **settings)
    resumed = GaussianMixture(3, covariance_type=kind, random_state=0, **settings)
    for batch in np.array_split(blobs(2400), 15):
        straight.partial_fit(batch)
        resumed = reopened(resumed.partial_fit(batch), tmp_path)
        if hasattr(straight, "weights_"):
            assert_identical(straight, resumed)
    assert bytes_of(straight, tmp_path) == bytes_of(resumed, tmp_path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("settings", [{}, {"average": True}], ids=str)
def test_a_mixture_set_by_hand_goes_on_from_there(kind, settings, tmp_path):
    """As many rows as were remembered stand for it, also in a file; precisions follow, and the counts stay."""
    model = GaussianMixture(3, covariance_type=kind, random_state=0, **settings).fit(blobs())
    model.partial_fit(blobs(100, seed=1))
    memory, published = running(model).memory, model.means_
    model.means_ = model.means_ + 0.5
    loaded = reopened(model, tmp_path)
    np.testing.assert_array_equal(loaded.means_, published + 0.5)
    order = [2, 0, 1]
    moved = model.reordered(order)
    np.testing.assert_array_equal(moved.means_, (published + 0.5)[order])
    assert (running(moved).memory, moved.n_rows_, moved.n_steps_) == (memory, 1300, 1)
    model.covariances_ = 2.0 * np.asarray(model.covariances_)
    model.partial_fit(blobs(1, seed=2))
    assert model.effective_rows_ == pytest.approx(memory + 1, rel=1e-3)
    np.testing.assert_allclose(model.means_, published + 0.5, atol=0.05)
    np.testing.assert_allclose(model.precisions_, 0.5 * loaded.precisions_, rtol=0.05, atol=0.05)
    assert_identical(reopened(model, tmp_path), model)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("weights_", [0.5, 0.5, 0.5], "weights must be at least zero and sum to 1"),
        ("means_", [[np.nan] * 3] * 3, "means must be finite"),
        ("covariances_", -np.ones((3, 3, 3)), "not positive definite"),
        ("means_", np.zeros((3, 2)), "must have the shape"),
    ],
)
def test_what_was_set_by_hand_and_is_no_mixture_is_refused(name, value, words, tmp_path):
    for model in (GaussianMixture(3, random_state=0).fit(blobs()), reopened(learner().fit(blobs()), tmp_path)):
        setattr(model, name, value)
        for use in (lambda: model.partial_fit(blobs()), lambda: model.save(tmp_path / "m"), model.reordered):  # noqa: B023
            with pytest.raises(ParameterError, match=words):
                use([0, 1, 2]) if use == model.reordered else use()


def test_weights_that_are_one_but_for_their_last_digits_can_be_saved(tmp_path):
    """A fit without a pass publishes them as they are."""
    array = zarr.create_array(tmp_path / "rows.zarr", data=blobs(), chunks=(400, 3))
    for off in (5e-7, -5e-7):
        start = {**given_start("full"), "weights_init": np.array([0.2, 0.3, 0.5 + off])}
        model = GaussianMixture(3, max_iter=0, **start).fit(array)
        assert model.weights_.sum() == pytest.approx(1.0, abs=1e-15)
        assert_identical(reopened(model, tmp_path), model)


@pytest.mark.parametrize("how", ["weights", "nan"])
def test_all_rows_that_count_are_kept_however_few_of_a_batch_they_are(how, caplog):
    """A sample of the batch has only a part of them: it is drawn again until they are there."""
    rows, counts = blobs(60_000), np.arange(60_000) % 240 == 0
    if how == "nan":
        rows[~counts] = np.nan
    source = open_source(rows, nan_policy="omit")
    with caplog.at_level("INFO", "streamgmm"):
        model = GaussianMixture(3, random_state=0).partial_fit(source, sample_weight=counts.astype(float))
    assert any("rows drawn for a start count: one more read draws 60,000" in line for line in caplog.messages)
    assert model._online is not None
    np.testing.assert_array_equal(model._online.kept_rows, blobs(60_000)[counts])
    assert hasattr(model.partial_fit(blobs(40, seed=1)), "weights_")


def test_rows_are_kept_while_too_few_of_them_are_distinct(tmp_path):
    """Row by row, as from an instrument that stood still: one needs two distinct rows, and waits for them."""
    model = GaussianMixture(2, random_state=0).partial_fit(np.ones((108, 2)))
    for _ in range(4):
        model = reopened(model.partial_fit([[1.0, 1.0]]), tmp_path)
    model.partial_fit([[1.0, 1.0]])
    assert "kept for a start: 113 rows are there, but fewer than 2 distinct ones" in str(model.report_)
    assert "no mixture yet: 113 rows are kept, but fewer than 2 distinct ones" in repr(model)
    model.partial_fit(blobs(100)[:, :2])
    assert (model.n_rows_, model.report_.started) == (213, True)


def test_a_store_whose_first_rows_are_alike_is_learned(tmp_path):
    array = zarr.create_array(tmp_path / "rows.zarr", data=np.zeros((600, 3)) + 1.0, chunks=(100, 3))
    model = GaussianMixture(3, random_state=0)
    assert model.update(array, flush=True).n_rows == 600
    array.append(blobs(100))
    assert model.update(array, flush=True).n_rows == 100
    assert model.effective_rows_ == 700


def test_rows_are_not_kept_for_ever(monkeypatch):
    monkeypatch.setattr("streamgmm.learning.SMALLEST_SAMPLE", 0)
    monkeypatch.setattr("streamgmm.learning.MORE_KEPT", 2)
    model = GaussianMixture(2, random_state=0).partial_fit(np.ones((219, 2)))
    with pytest.raises(DataError, match="Only 1 distinct rows were found among the 220 sampled"):
        model.partial_fit([[1.0, 1.0]])
    assert (model.n_rows_, model.partial_fit(blobs(100)[:, :2]).n_rows_) == (219, 319)


def test_the_repr_of_a_model_with_rows_and_a_parameter_without_meaning():
    model = GaussianMixture(2).partial_fit(blobs(20)).set_params(n_components=0)
    assert repr(model).endswith("no mixture yet: 20 rows are kept for a start")


def test_rows_are_kept_until_a_start_is_found_and_the_repr_says_so(tmp_path):
    model = GaussianMixture(3, random_state=0)
    for i in range(3):
        model.partial_fit(blobs()[50 * i : 50 * (i + 1)])
        assert f"no mixture yet: {50 * (i + 1)} of 290 rows are kept for a start" in repr(reopened(model, tmp_path))
        assert not model.report_.started
        assert f"kept for a start: {50 * (i + 1)} of 290" in str(model.report_)
    with pytest.raises(ValueError, match="not fitted yet"):
        model.predict(blobs())
    model.partial_fit(blobs()[150:400])
    assert model.report_.started
    assert model.effective_rows_ == 400
    assert model.n_rows_ == 400
    whole = GaussianMixture(3, random_state=0).partial_fit(blobs()[:400])
    assert_close(model, whole, 1e-12)


def test_a_first_batch_beyond_the_sample_is_learned_whole(tmp_path):
    rows = np.concatenate([blobs(30_000), blobs(15_000, seed=1)])
    store = zarr.create_array(tmp_path / "rows.zarr", data=rows[2:], chunks=(4_000, 3))
    model = GaussianMixture(3, random_state=0).partial_fit(rows[:2]).partial_fit(store)
    assert model.effective_rows_ == pytest.approx(len(rows))
    with UNFINISHED:
        em = GaussianMixture(3, solver="em", max_iter=1, **as_start(model)).fit(rows)
    assert em.lower_bound_ == pytest.approx(model.score(rows), abs=1e-9)


def as_start(model: GaussianMixture) -> dict[str, Any]:
    return {"weights_init": model.weights_, "means_init": model.means_, "precisions_init": model.precisions_}


def test_the_average_is_that_of_the_statistics_on_the_way():
    """The later the heavier: those after row r weigh in proportion to r."""
    plain, averaged = learner().fit(blobs()), learner(average=True).fit(blobs())
    rows, sizes = blobs(900, seed=3), [100, 250, 50, 500]
    seen, passed, total = [], 0, 0.0
    for size in sizes:
        batch = rows[passed : passed + size]
        passed += size
        plain.partial_fit(batch), averaged.partial_fit(batch)
        weight = passed**2 - (passed - size) ** 2
        total += weight
        seen.append((weight, running(plain).stats.about(np.zeros(3), np.ones(3))))
    mean = sum(weight / total * stats.moments for weight, stats in seen)
    found = running(averaged).average.stats.about(np.zeros(3), np.ones(3))
    np.testing.assert_allclose(found.moments, mean, rtol=1e-9, atol=1e-9)
    assert_identical_params(running(averaged).params, running(plain).params)
    assert not np.allclose(averaged.means_, plain.means_, rtol=1e-6)


def assert_identical_params(one: MixtureParams, other: MixtureParams) -> None:
    assert (one.means == other.means).all()
    assert (one.covariance.values == other.covariance.values).all()


def test_average_and_forgetting_exclude_each_other():
    with pytest.raises(
        ParameterError, match="average=True is for rows that stay alike, forgetting for rows that change"
    ):
        learner(average=True, forgetting=0.1).partial_fit(blobs())


def test_a_component_without_rows_keeps_its_mean_and_covariance_and_the_report_says_so():
    """Its weight falls, but it is there when its rows come back."""
    model = learner(forgetting={"half_life": 20}).fit(blobs())
    lost = int(model.means_[:, 0].argmax())
    rows = blobs(3000)[model.predict(blobs(3000)) != lost]
    for batch in np.array_split(rows, 30):
        model.partial_fit(batch)
    assert model.weights_[lost] < 0.02
    assert f"components [{lost}] remember fewer than 5 rows and keep mean and covariance" in str(model.report_)
    mean = model.means_[lost].copy()
    model.partial_fit(rows[:50])
    assert (model.means_[lost] == mean).all()
    assert np.isfinite(model.score(blobs()))


# -- bad batches ---------------------------------------------------------------------------------------------------

BAD = {
    "features": (np.zeros((5, 2)), None, DataError, "2 features, but GaussianMixture is expecting 3"),
    "NaN": (
        np.where(np.arange(30).reshape(10, 3) == 13, np.nan, 1.0),
        None,
        DataError,
        "contains NaN in row 4, column 1",
    ),
    "infinity": (np.full((4, 3), np.inf), None, DataError, "contains infinity in row 0, column 0"),
    "empty": (np.empty((0, 3)), None, DataError, r"0 sample\(s\)"),
    "weights": (np.zeros((5, 3)), np.zeros(5), DataError, "weight zero"),
    "negative": (np.zeros((2, 3)), [1.0, -1.0], DataError, "sample_weight of row 1 is -1.0"),
    "many weights": (np.zeros((2, 3)), np.ones(3), DataError, r"shape \(3,\)"),
    "complex": (np.zeros((5, 3), dtype=complex), None, (DataError, DataTypeError), "[Cc]omplex"),
    "words": (np.full((5, 3), "a"), None, (DataError, DataTypeError), "string|numeric"),
    "one axis": (np.zeros(3), None, DataError, "Expected 2D array"),
    "far": (np.full((5, 3), 1e200), None, (DataError, NumericalError), "overflow|finite"),
}


#: What a model without a mixture cannot know: it takes the features that come first, and finds far rows when it starts.
SEEN_LATER = {("new", "features"), ("new", "far"), ("keeping", "far")}


@pytest.mark.parametrize(
    ("state", "name"),
    [(s, n) for s in ("new", "keeping", "fitted", "started") for n in BAD if (s, n) not in SEEN_LATER],
)
def test_a_bad_batch_raises_and_leaves_the_model_as_it_was(state, name, tmp_path):
    rows, weights, errors, words = BAD[name]
    model = GaussianMixture(3, random_state=0)
    if state != "new":
        model.partial_fit(blobs(50)) if state == "keeping" else model.fit(blobs())
    if state == "started":
        model.partial_fit(blobs(300, seed=1))
    before = dict(model.__dict__)
    sealed = None if state == "new" else bytes_of(model, tmp_path)
    with pytest.raises(errors, match=words):
        model.partial_fit(rows, sample_weight=weights)
    assert model.__dict__.keys() == before.keys()
    assert sealed is None or bytes_of(model, tmp_path) == sealed


def test_another_number_of_components_is_another_model():
    model = learner().fit(blobs())
    with pytest.raises(ParameterError, match=r"Learning continues from means of shape \(3, 3\)"):
        model.set_params(n_components=2).partial_fit(blobs())


# -- who is who ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_components_are_matched_and_reordered(kind, tmp_path):
    model = learner(kind, average=True).fit(blobs()).partial_fit(blobs(200, seed=2))
    other = model.reordered([2, 0, 1])
    assert model.match(other).tolist() == [1, 2, 0]
    back = other.reordered(model.match(other))
    assert bytes_of(back, tmp_path) == bytes_of(model, tmp_path)
    batch = blobs(500, seed=3)
    assert_close(other.partial_fit(batch).reordered([1, 2, 0]), model.partial_fit(batch), 1e-10)


def test_a_refit_is_matched_to_the_model_before():
    before = GaussianMixture(3, random_state=0).fit(blobs(3000))
    after = GaussianMixture(3, random_state=1).fit(blobs(3000, seed=1)).reordered([1, 2, 0])
    matched = after.reordered(before.match(after))
    np.testing.assert_allclose(matched.means_, before.means_, atol=0.5)
    with pytest.raises(ParameterError, match=r"means \(3, 3\) and \(2, 3\) cannot be matched"):
        before.match(GaussianMixture(2, random_state=0).fit(blobs()))
    with pytest.raises(ParameterError, match="order must be the whole numbers 0 to 2, each once"):
        before.reordered([0, 0, 1])


def test_updates_keep_the_order_of_components():
    model = GaussianMixture(3, random_state=0).fit(blobs())
    first = GaussianMixture.from_parameters(model.weights_, model.means_, model.covariances_)
    for batch in np.array_split(blobs(5000, seed=5), 20):
        model.partial_fit(batch)
    assert first.match(model).tolist() == [0, 1, 2]
