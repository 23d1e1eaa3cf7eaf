"""Rows in dask arrays: row chunks are blocks, and the result is that of the same rows in memory."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import dask
import dask.array as da
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mixtures import KINDS, assert_close, assert_identical, blobs, given_start, mixture

from streamgmm import GaussianMixture, open_source
from streamgmm.errors import DataError, DataTypeError, ParameterError, SchedulerError
from streamgmm.sources import with_weights

every_structure = pytest.mark.parametrize("kind", KINDS)
everywhere = pytest.mark.parametrize("scheduler", ["synchronous", "threads"])

#: what max_iter=4 and tol=0 always say
pytestmark = pytest.mark.filterwarnings("ignore:The fit did not converge")


def fit(rows: Any, kind: str = "full", **settings: Any) -> GaussianMixture:
    """Four passes from a given start."""
    return mixture(kind, **{"max_iter": 4, "tol": 0.0, **given_start(kind), **settings}).fit(rows)


def chunked(rows: np.ndarray, sizes: Sequence[int] | int = 100, columns: int = 3) -> da.Array:
    """A dask array of these row chunks, whose chunks are tasks."""
    return da.from_array(rows, chunks=(sizes if isinstance(sizes, int) else tuple(sizes), columns)).map_blocks(np.array)


def forgotten(array: da.Array) -> da.Array:
    """The same array, without the sizes of its row chunks."""
    unknown = (np.nan,) * array.numblocks[0]
    return da.Array(array.dask, array.name, (unknown, *array.chunks[1:]), meta=array._meta)


def masked(array: da.Array) -> da.Array:
    """The same rows, picked by a mask of which dask does not know that it drops none."""
    return array[array[:, 0] > -1e9]


def altered(array: da.Array, chunk: int, change: Any) -> da.Array:
    """The array, in which ``change`` was done to one of its row chunks, against what its metadata say."""

    def block(rows: np.ndarray, block_id: tuple[int, ...]) -> Any:
        return change(rows) if block_id[0] == chunk else rows

    return array.map_blocks(block, meta=np.empty((0,) * array.ndim))


def parts_of(n: int, places: Sequence[float]) -> list[int]:
    """Sizes of the runs of n rows cut at fractions; a place that comes twice makes an empty one."""
    ends = [0, *sorted(round(place * n) for place in places), n]
    return list(np.diff(ends))


# -- the same result -----------------------------------------------------------------------------------------


@everywhere
@every_structure
def test_a_fit_has_the_bits_of_the_same_blocks_in_memory(kind: str, scheduler: str) -> None:
    rows = blobs(73 * 29 - 12)
    array = chunked(rows, 29)
    assert array.numblocks[0] == 73
    with dask.config.set(scheduler=scheduler, num_workers=2):
        expected, found = fit(open_source(rows, block_rows=29), kind), fit(array, kind)
    assert_identical(found, expected)
    assert found.lower_bounds_ == expected.lower_bounds_
    assert found.n_passes_ == expected.n_passes_ == 5


def test_other_chunks_have_other_bits() -> None:
    """The comparison can tell: it is the chunks that fix the bits."""
    rows = blobs()
    assert fit(chunked(rows, 29)).lower_bounds_ != fit(chunked(rows, 31)).lower_bounds_


def test_our_own_start_has_these_bits_too() -> None:
    rows = blobs()
    expected = mixture().fit(open_source(rows, block_rows=100))
    assert_identical(mixture().fit(chunked(rows)), expected)
    assert_identical(mixture().fit(forgotten(chunked(rows))), expected)


@every_structure
@given(places=st.lists(st.floats(0, 1, width=32), max_size=12), columns=st.integers(1, 3), known=st.booleans())
@settings(max_examples=8)
def test_any_chunks_equal_the_rows_in_memory(kind: str, places: list[float], columns: int, known: bool) -> None:
    rows = blobs(600)
    array = chunked(rows, parts_of(600, places), columns)
    with dask.config.set(scheduler="synchronous"):
        assert_close(fit(array if known else forgotten(array), kind), fit(rows, kind), 1e-12)


@pytest.mark.parametrize("columns", [1, 2, (2, 1)])
def test_columns_in_several_chunks_have_the_same_bits(columns: Any) -> None:
    rows = blobs()
    assert_identical(fit(chunked(rows, 100, columns)), fit(chunked(rows)))


@everywhere
def test_a_single_chunk(scheduler: str) -> None:
    rows = blobs()
    array = chunked(rows, 1200)
    with dask.config.set(scheduler=scheduler):
        expected = fit(open_source(rows, block_rows=1200))
        assert_identical(fit(array), expected)
        assert_identical(fit(forgotten(array)), expected)
        assert_identical(fit(array + array.sum(axis=0) * 0), expected)


@pytest.mark.parametrize("dtype", ["f4", "i2", "u1", ">f8"])
def test_other_real_types_equal_their_float64_copy(dtype: str) -> None:
    rows = np.abs(blobs()).astype(dtype)
    found, expected = (
        GaussianMixture(1, reg_covar=1e-9, random_state=0).fit(chunked(x)) for x in (rows, rows.astype("f8"))
    )
    assert_identical(found, expected)
    assert_close(found, GaussianMixture(1, reg_covar=1e-9, random_state=0).fit(rows), 1e-12)


def test_a_chunk_of_another_real_type_than_declared_is_read_as_it_is() -> None:
    rows = blobs().astype("f4").astype("f8")
    assert_identical(fit(altered(chunked(rows), 3, lambda part: part.astype("f4"))), fit(chunked(rows)))


# -- sizes that nobody knows -----------------------------------------------------------------------------------


@pytest.mark.parametrize("forget", [forgotten, masked])
def test_unknown_chunk_sizes_cost_one_read_and_a_line(forget: Any, caplog: pytest.LogCaptureFixture) -> None:
    array = chunked(blobs(), (100, 1, 999, 100))
    with caplog.at_level(logging.INFO, "streamgmm"):
        known = fit(array)
        assert "chunk sizes" not in caplog.text
        unknown = fit(forget(array))
    assert_identical(unknown, known)
    assert (known.n_passes_, unknown.n_passes_) == (5, 6)
    assert caplog.text.count("does not know its chunk sizes: one more read counts its rows") == 1


def test_a_mask_drops_the_rows_that_it_drops() -> None:
    rows = blobs()
    array = chunked(rows)
    assert_close(fit(array[array[:, 0] > 0.5]), fit(rows[rows[:, 0] > 0.5]), 1e-12)


def test_some_sizes_known_and_some_not() -> None:
    rows = blobs()
    array = da.concatenate([chunked(rows[:500]), masked(chunked(rows[500:]))])
    assert not np.isnan(array.chunks[0][0])
    assert_identical(fit(array), fit(chunked(rows)))


@pytest.mark.parametrize(
    "sizes",
    [(0, 100, 500, 600), (100, 0, 500, 600), (100, 0, 0, 0, 500, 600), (100, 500, 600, 0), (0, 0, 100, 0, 500, 600, 0)],
)
@pytest.mark.parametrize("forget", [lambda array: array, forgotten, masked], ids=["known", "unknown", "mask"])
def test_chunks_without_rows_leave_no_trace(sizes: tuple[int, ...], forget: Any) -> None:
    rows = blobs()
    found, expected = fit(forget(chunked(rows, sizes))), fit(chunked(rows, (100, 500, 600)))
    assert_identical(found, expected)
    assert found.lower_bounds_ == expected.lower_bounds_


@pytest.mark.parametrize("forget", [forgotten, masked])
def test_unknown_sizes_without_a_row_are_refused(forget: Any) -> None:
    array = chunked(blobs())
    with pytest.raises(DataError, match=r"dask array has 0 rows"):
        fit(forget(array)[forget(array)[:, 0] > 1e9])


def test_rows_that_do_not_come_again_are_noticed() -> None:
    """Sizes are counted once; a graph that makes other rows the next time cannot be fitted."""
    calls: list[int] = []

    def fickle(rows: np.ndarray, block_id: tuple[int, ...]) -> np.ndarray:
        calls.append(block_id[0])
        return rows[len(calls) // 13 :]  # twelve chunks

    array = forgotten(chunked(blobs()).map_blocks(fickle, meta=np.empty((0, 0))))
    with dask.config.set(scheduler="synchronous"), pytest.raises(DataError, match=r"came as \(99, 3\).* says 100 rows"):
        fit(array)


# -- what cannot be rows -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda x: x[:, 0], DataError, r"1 dimension\(s\) \(1200,\), but rows need two"),
        (lambda x: x[:, :, None], DataError, r"3 dimension\(s\) \(1200, 3, 1\), but rows need two"),
        (lambda x: x[:0], DataError, r"0 rows \(shape=\(0, 3\)\)"),
        (lambda x: x[:1], DataError, "1 row, but a minimum of 2"),
        (lambda x: x[:2], DataError, "n_components = 3, n_samples = 2"),
        (lambda x: x[:, :0], DataError, r"0 feature\(s\)"),
        (lambda x: x[:, x[0] < 1e9], DataError, "does not know how many features it has.*compute_chunk_sizes"),
        (lambda x: x + 0j, DataTypeError, "values of type complex128"),
        (lambda x: x.astype(object), DataTypeError, "values of type object"),
        (lambda x: x.astype("U3"), DataTypeError, "values of type <U3"),
        (lambda x: x.astype(np.longdouble), DataTypeError, "at most 64 bits"),
        (lambda x: da.ma.masked_greater(x, 1.0), DataTypeError, r"Chunk \d+ of the dask array is a masked array"),
        (lambda x: altered(x, 7, lambda rows: rows + 0j), DataTypeError, "Chunk 7 of the dask array came as complex"),
        (lambda x: altered(x, 7, lambda rows: rows.astype(object)), DataTypeError, "Chunk 7 .* came as object"),
    ],
)
@pytest.mark.parametrize("forget", [lambda array: array, forgotten], ids=["known", "unknown"])
def test_what_cannot_be_rows_is_refused(change: Any, error: type[Exception], words: str, forget: Any) -> None:
    array = change(chunked(blobs()))
    if array.ndim == 2 and 0 not in array.shape:
        array = forget(array)
    with pytest.raises(error, match=words):
        fit(array)


def test_masked_arrays_that_mask_nothing_are_rows() -> None:
    array = chunked(blobs())
    assert_identical(fit(da.ma.masked_greater(array, 1e9)), fit(array))


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: rows[:-1],
        lambda rows: np.concatenate([rows, rows]),
        lambda rows: rows[:, :-1],
        lambda rows: rows[:0],
        lambda rows: rows[:, 0],
        lambda rows: rows[:, :, None],
        lambda rows: rows[0, 0],
    ],
    ids=["fewer rows", "more rows", "fewer columns", "no rows", "1-D", "3-D", "a number"],
)
@pytest.mark.parametrize("columns", [3, 2])
def test_a_chunk_of_another_shape_than_declared_is_named(change: Any, columns: int) -> None:
    array = altered(chunked(blobs(), 100, columns), 4, change)
    if columns == 2:  # the second column chunk stays as it is
        array = da.concatenate([array[:, :2], chunked(blobs(), 100, 2)[:, 2:]], axis=1)
    for scheduler in ("synchronous", "threads"):
        with dask.config.set(scheduler=scheduler), pytest.raises(DataError, match=r"[Cc]hunk 4 of the dask array"):
            fit(array)
        with dask.config.set(scheduler=scheduler), pytest.raises(DataError, match=r"[Cc]hunk 4 of the dask array"):
            fit(blobs()).predict(array).compute()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_value_that_is_not_finite_is_named_with_its_row_and_chunk(value: float) -> None:
    rows = blobs()
    rows[757, 2] = value
    model, words = fit(blobs()), "NaN" if np.isnan(value) else "infinity"
    array = chunked(rows, (0, 300, 400, 0, 500))
    here, inside = r"row 757, column 2 \(chunk 4 of the", r"row 57, column 2 \(chunk 4 of the .*counted from its first"
    with pytest.raises(DataError, match=f"{words} in {here}"):
        fit(array)
    with pytest.raises(DataError, match=f"{words} in {here}"):
        fit(forgotten(array))  # they were counted
    for use in (model.score, model.bic, lambda x: model.predict(x).compute(), lambda x: model.predict_proba(x).sum().compute()):  # fmt: skip  # noqa: E501
        with pytest.raises(DataError, match=f"{words} in {here}"):
            use(array)
        with pytest.raises(DataError, match=f"{words} in {inside}"):
            use(forgotten(array))


def test_block_rows_cannot_be_set() -> None:
    with pytest.raises(ParameterError, match="blocks of a dask array are its row chunks, so block_rows cannot be set"):
        open_source(chunked(blobs()), block_rows=100)


@pytest.mark.parametrize("options", [{"array": "x"}, {"storage_options": {"key": "k"}}])
def test_options_of_stores_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ParameterError, match="array, storage_options, missing_chunks and decode describe"):
        open_source(chunked(blobs()), **options)


def test_other_features_than_fitted_are_refused() -> None:
    model = fit(chunked(blobs()))
    with pytest.raises(DataError, match="the dask array has 2 features, but GaussianMixture is expecting 3"):
        model.predict(chunked(blobs())[:, :2])


def test_delayed_rows_are_refused() -> None:
    rows = dask.delayed(np.array)(blobs())
    for use in (fit, open_source, mixture().plan):
        with pytest.raises(DataTypeError, match=r"Rows cannot be read from a dask Delayed.*Give one dask array"):
            use(rows)


def test_data_frames_of_dask_are_refused_with_the_way_out() -> None:
    pandas = pytest.importorskip("pandas")
    frames = pytest.importorskip("dask.dataframe", reason="dask.dataframe needs pyarrow", exc_type=ImportError)
    frame = frames.from_pandas(pandas.DataFrame(blobs(), columns=["a", "b", "c"]), npartitions=3)
    with pytest.raises(DataTypeError, match=r"Rows cannot be read from a dask DataFrame.*X\.to_dask_array\(\)"):
        fit(frame)
    assert_close(fit(frame.to_dask_array()), fit(blobs()), 1e-12)


def test_a_scheduler_of_another_kind_is_refused() -> None:
    def odd(graph: Any, keys: Any, **options: Any) -> None:
        raise AssertionError("nothing may run here")

    with dask.config.set(scheduler=odd), pytest.raises(SchedulerError, match=r"dask is set to run on .*odd"):
        fit(chunked(blobs()))


# -- the estimator ---------------------------------------------------------------------------------------------


def test_y_is_ignored_and_there_are_no_names_of_features() -> None:
    pandas = pytest.importorskip("pandas")
    rows = blobs()
    model = mixture().fit(pandas.DataFrame(rows, columns=["a", "b", "c"]))
    assert list(model.feature_names_in_) == ["a", "b", "c"]
    model.fit(chunked(rows), "nothing that could be of use")
    assert not hasattr(model, "feature_names_in_")
    assert model.n_features_in_ == 3


def test_a_fit_that_fails_leaves_the_model_as_it_was() -> None:
    model = fit(chunked(blobs()))
    before = dict(model.__dict__)
    with pytest.raises(DataError, match="came as"):
        model.fit(altered(chunked(blobs()[:, :2], 100, 2), 4, lambda rows: rows[:-1]))
    assert model.__dict__ == before


def test_opening_and_planning_run_nothing() -> None:
    def never(rows: np.ndarray) -> np.ndarray:
        raise AssertionError("asked for")

    array = chunked(blobs()).map_blocks(never, meta=np.empty((0, 0)))
    source = with_weights(open_source(array), np.ones(1200))
    plan = mixture().plan(array)
    assert (source.n_rows, source.block_rows, len(source.blocks())) == (1200, 100, 12)
    assert (plan.n_blocks, plan.n_tasks, plan.block_rows) == (12, 12, 100)
    assert "the dask array" in str(plan)


# -- predictions -----------------------------------------------------------------------------------------------

RESULTS = ("predict", "predict_proba", "score_samples")


def nothing_runs(graph: Any, keys: Any, **options: Any) -> None:
    raise AssertionError("a lazy result was computed")


@pytest.mark.parametrize("name", RESULTS)
@pytest.mark.parametrize("columns", [3, 2])
@pytest.mark.parametrize("sizes", [(300, 0, 1, 799, 100), (1200,)])
def test_predictions_are_lazy_and_keep_the_row_chunks(name: str, sizes: tuple[int, ...], columns: int) -> None:
    rows, model = blobs(), fit(blobs())
    array = chunked(rows, sizes, columns)
    with dask.config.set(scheduler=nothing_runs):
        known, unknown = getattr(model, name)(array), getattr(model, name)(forgotten(array))
    expected = getattr(model, name)(rows)
    assert known.chunks[0] == sizes
    assert len(unknown.chunks[0]) == len(sizes)
    assert np.isnan(unknown.chunks[0]).all()
    for found in (known, unknown):
        assert found.dtype == expected.dtype
        np.testing.assert_allclose(found.compute(), expected, rtol=1e-12, atol=1e-12)
        assert [len(found.blocks[i].compute()) for i in range(len(sizes))] == list(sizes)


@pytest.mark.parametrize("name", RESULTS)
def test_a_lazy_result_stands_for_itself(name: str) -> None:
    """Two results of two models have two names, and each is part of what dask makes of it."""
    rows = blobs()
    array = chunked(rows)
    one, other = fit(array), fit(array, max_iter=1)
    first, second = getattr(one, name)(array), getattr(other, name)(array)
    assert first.name != second.name
    found = dask.compute(first, second, (first != second).any())
    np.testing.assert_allclose(found[0], getattr(one, name)(rows), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(found[1], getattr(other, name)(rows), rtol=1e-12, atol=1e-12)
    assert found[2]


@pytest.mark.parametrize("forget", [lambda array: array, forgotten, masked], ids=["known", "unknown", "mask"])
@pytest.mark.parametrize("sizes", [(300, 0, 1, 799, 100), (1200,)])
@everywhere
def test_scores_equal_those_of_the_rows_in_memory(sizes: tuple[int, ...], forget: Any, scheduler: str) -> None:
    rows, model = blobs(), fit(blobs())
    array = forget(chunked(rows, sizes))
    with dask.config.set(scheduler=scheduler):
        for name in ("score", "bic", "aic"):
            assert getattr(model, name)(array) == pytest.approx(getattr(model, name)(rows), rel=1e-12)


def test_fit_predict_is_lazy() -> None:
    array = chunked(blobs())
    labels = mixture().fit_predict(array)
    assert labels.chunks == ((100,) * 12,)
    np.testing.assert_array_equal(labels.compute(), mixture().fit(array).predict(blobs()))
