"""Row weights from wherever they come: aligned by row number, whatever their chunks, and refused with their row."""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import numpy as np
import pytest
import zarr
from conftest import write_zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from mixtures import KINDS, assert_close, assert_identical, blobs, given_start, mixture

from streamgmm import GaussianMixture, open_source
from streamgmm.errors import DataError, DataTypeError, StreamGMMError

N = 1200
ROWS = blobs(N)
#: whole numbers, of which some are zero
WEIGHTS = np.random.default_rng(7).integers(0, 4, N).astype(float)
#: weights that no sum of a few of them makes round
UNEVEN = np.random.default_rng(8).uniform(0.0, 3.0, N) * (WEIGHTS > 0)

pytestmark = pytest.mark.filterwarnings("ignore:The fit did not converge")


def fit(rows: Any, weights: Any, kind: str = "full", **settings: Any) -> GaussianMixture:
    """Four passes from a given start."""
    settings = {"max_iter": 4, "tol": 0.0, **given_start(kind), **settings}
    return mixture(kind, **settings).fit(rows, sample_weight=weights)


def forgotten(array: da.Array) -> da.Array:
    """The same array, without the sizes of its row chunks."""
    unknown = (np.nan,) * array.numblocks[0]
    return da.Array(array.dask, array.name, (unknown, *array.chunks[1:]), meta=array._meta)


def lazy(values: np.ndarray, size: Any) -> da.Array:
    """A dask array in row chunks of these sizes, whose chunks are tasks."""
    return da.from_array(values, chunks=(size, *values.shape[1:])).map_blocks(np.array)


def column(folder: Path, weights: np.ndarray, size: int) -> Path:
    path = folder / f"weights-{size}.zarr"
    if not path.exists():
        # zeros too: a chunk that is not stored would be told
        config = {"write_empty_chunks": True}
        zarr.create_array(path, data=weights, chunks=(size, *weights.shape[1:]), config=config)
    return path


def beside(folder: Path, weights: np.ndarray) -> zarr.Group:
    """A group that holds rows and their weights."""
    path = folder / "group.zarr"
    if not path.exists():
        group = zarr.open_group(path, mode="w")
        group.create_array("rows", data=ROWS, chunks=(50, 3))
        group.create_array("weights", data=weights, chunks=(130,))
    return zarr.open_group(path, mode="r")


#: blocks of a hundred rows, from everywhere
SOURCES: dict[str, Callable[[Path], Any]] = {
    "memory": lambda folder: open_source(ROWS, block_rows=100),
    "zarr": lambda folder: open_source(write_zarr(folder, ROWS, 50), block_rows=100),
    "group": lambda folder: open_source(beside(folder, UNEVEN), array="rows", block_rows=100),
    "dask": lambda folder: lazy(ROWS, 100),
    "dask, unknown": lambda folder: forgotten(lazy(ROWS, 100)),
    "dask, a mask": lambda folder: lazy(ROWS, 100)[lazy(ROWS, 100)[:, 0] > -1e9],
}

#: the same weights (n,), from everywhere
HOMES: dict[str, Callable[[Path, np.ndarray], Any]] = {
    "numpy": lambda folder, weights: weights,
    "list": lambda folder, weights: weights.tolist(),
    "zarr": lambda folder, weights: zarr.open_array(column(folder, weights, 100), mode="r"),
    "path": lambda folder, weights: column(folder, weights, 77),
    "words": lambda folder, weights: str(column(folder, weights, 5_000)),
    "dask": lambda folder, weights: lazy(weights, 100),
    "dask, other chunks": lambda folder, weights: lazy(weights, (1, 0, 98, 333, len(weights) - 432)),
    "dask, one chunk": lambda folder, weights: lazy(weights, len(weights)),
    "dask, unknown": lambda folder, weights: forgotten(lazy(weights, (250, 0, len(weights) - 250))),
    "dask, a mask": lambda folder, weights: lazy(weights, 170)[lazy(np.ones(len(weights), bool), 170)],
    "dask, of zarr": lambda folder, weights: da.from_zarr(column(folder, weights, 90)),
}

every_source = pytest.mark.parametrize("source", SOURCES)
every_home = pytest.mark.parametrize("home", HOMES)
every_structure = pytest.mark.parametrize("kind", KINDS)


# -- the same result -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def expected() -> GaussianMixture:
    return fit(open_source(ROWS, block_rows=100), UNEVEN)


@every_home
@every_source
def test_weights_from_anywhere_give_the_same_bits(
    tmp_path: Path, source: str, home: str, expected: GaussianMixture
) -> None:
    found = fit(SOURCES[source](tmp_path), HOMES[home](tmp_path, UNEVEN))
    assert_identical(found, expected)
    assert found.lower_bounds_ == expected.lower_bounds_


def test_weights_count(expected: GaussianMixture) -> None:
    """The comparison can tell."""
    moved = np.roll(UNEVEN, 1)
    assert fit(open_source(ROWS, block_rows=100), moved).lower_bounds_ != expected.lower_bounds_


@pytest.mark.parametrize("source", ["memory", "group", "dask"])
def test_weights_beside_the_rows_in_a_group(tmp_path: Path, source: str, expected: GaussianMixture) -> None:
    rows = SOURCES[source](tmp_path)
    assert_identical(fit(rows, beside(tmp_path, UNEVEN)["weights"]), expected)
    assert_identical(fit(rows, tmp_path / "group.zarr" / "weights") if source == "group" else expected, expected)


@pytest.mark.parametrize("home", ["zarr", "dask, other chunks", "dask, unknown"])
@every_structure
def test_every_structure(tmp_path: Path, kind: str, home: str) -> None:
    assert_close(fit(lazy(ROWS, 130), HOMES[home](tmp_path, UNEVEN), kind), fit(ROWS, UNEVEN, kind), 1e-12)


sizes = st.lists(st.floats(0, 1, width=32), max_size=8)


@given(rows=sizes, weights=sizes, known=st.tuples(st.booleans(), st.booleans()))
@settings(max_examples=15)
def test_any_two_ways_of_cutting(rows: list[float], weights: list[float], known: tuple[bool, bool]) -> None:
    """Chunks of rows and of weights need have nothing in common, and may be empty."""

    def cut(values: np.ndarray, places: list[float], known: bool) -> da.Array:
        array = lazy(values, tuple(np.diff([0, *sorted(round(place * N) for place in places), N])))
        return array if known else forgotten(array)

    with dask.config.set(scheduler="synchronous"):
        found = fit(cut(ROWS, rows, known[0]), cut(UNEVEN, weights, known[1]))
    assert_close(found, fit(ROWS, UNEVEN), 1e-12)


@pytest.mark.parametrize("home", ["numpy", "zarr", "dask, other chunks"])
@pytest.mark.parametrize("source", ["memory", "zarr", "dask"])
def test_whole_weights_are_repetitions(tmp_path: Path, source: str, home: str) -> None:
    repeated = np.repeat(ROWS, WEIGHTS.astype(int), axis=0)
    found = fit(SOURCES[source](tmp_path), HOMES[home](tmp_path, WEIGHTS))
    assert_close(found, fit(repeated, None), 1e-12)
    assert found.lower_bounds_ == pytest.approx(fit(repeated, None).lower_bounds_, rel=1e-12)


@pytest.mark.parametrize("dtype", ["f4", "u1", "i8", "?"])
@pytest.mark.parametrize("home", ["numpy", "zarr", "dask"])
def test_weights_of_any_real_type(tmp_path: Path, home: str, dtype: str) -> None:
    weights = WEIGHTS.astype(dtype)
    assert_identical(fit(lazy(ROWS, 100), HOMES[home](tmp_path, weights)), fit(lazy(ROWS, 100), weights.astype("f8")))


@every_home
@pytest.mark.parametrize("source", ["memory", "dask, unknown"])
def test_scores_are_weighted(tmp_path: Path, source: str, home: str, expected: GaussianMixture) -> None:
    found = expected.score(SOURCES[source](tmp_path), sample_weight=HOMES[home](tmp_path, UNEVEN))
    assert found == pytest.approx(np.average(expected.score_samples(ROWS), weights=UNEVEN), rel=1e-12)


def test_one_array_may_hold_rows_and_weights(expected: GaussianMixture) -> None:
    """Both come out of the same chunks, which are made anew for each."""
    both = lazy(np.column_stack([ROWS, UNEVEN]), 100)
    assert_identical(fit(both[:, :3], both[:, 3]), expected)
    kept = both[both[:, 3] > 0]
    assert_close(fit(kept[:, :3], kept[:, 3]), expected, 1e-12)


def test_rows_whose_chunks_share_nodes() -> None:
    centred = lazy(ROWS, 100) - lazy(ROWS, 100).mean(axis=0)
    assert_close(fit(centred, lazy(UNEVEN, 70)), fit(ROWS - ROWS.mean(axis=0), UNEVEN), 1e-11)


# -- how often weights are read --------------------------------------------------------------------------------


class Noted:
    """Values that append a line to a file for every part that is asked for."""

    def __init__(self, values: np.ndarray, log: Path) -> None:
        self.values, self.log = values, log
        self.shape, self.dtype, self.ndim = values.shape, values.dtype, values.ndim

    def __getitem__(self, index: Any) -> np.ndarray:
        descriptor = os.open(self.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(descriptor, f"{index[0].start}\n".encode())
        finally:
            os.close(descriptor)
        return self.values[index]

    def calls(self) -> Counter[str]:
        return Counter(self.log.read_text().splitlines())


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("size", [70, 450, N])
@pytest.mark.parametrize("source", ["memory", "zarr", "dask", "dask, unknown"])
def test_a_pass_makes_each_chunk_of_weights_once(tmp_path: Path, source: str, size: int, known: bool) -> None:
    noted = Noted(UNEVEN, tmp_path / "log")
    weights = da.from_array(noted, chunks=size, name="noted", meta=np.empty(0))
    with dask.config.set(scheduler="threads", num_workers=2):
        fit(SOURCES[source](tmp_path), weights if known else forgotten(weights))
    assert noted.calls() == {str(row): 5 + (not known) for row in range(0, N, size)}


def test_a_score_makes_each_chunk_of_weights_once(tmp_path: Path) -> None:
    noted = Noted(UNEVEN, tmp_path / "log")
    fit(ROWS, None).score(lazy(ROWS, 100), sample_weight=da.from_array(noted, chunks=70, name="n", meta=np.empty(0)))
    assert set(noted.calls().values()) == {1}


def test_counting_weights_is_no_read_of_the_rows(caplog: pytest.LogCaptureFixture) -> None:
    noted_rows = lazy(ROWS, 100)
    with caplog.at_level(logging.INFO, "streamgmm"):
        model = fit(noted_rows, forgotten(lazy(UNEVEN, 100)))
    assert model.n_passes_ == 5
    assert "the dask array does not know its chunk sizes" not in caplog.text


# -- weights without meaning -----------------------------------------------------------------------------------

#: a home of every kind
some_homes = pytest.mark.parametrize("home", ["numpy", "list", "zarr", "dask, other chunks", "dask, unknown"])


@pytest.mark.parametrize("bad", [-1.0, np.nan, np.inf])
@some_homes
@pytest.mark.parametrize("source", ["memory", "dask, unknown"])
def test_a_weight_without_meaning_is_named_with_its_row(tmp_path: Path, source: str, home: str, bad: float) -> None:
    weights = UNEVEN.copy()
    weights[[757, 1100]] = bad
    rows, weights = SOURCES[source](tmp_path), HOMES[home](tmp_path, weights)
    with dask.config.set(scheduler="synchronous"):
        for use in (fit, fit(ROWS, None).score):
            with pytest.raises(DataError, match=rf"sample_weight of row (757|1100) is {bad}"):
                use(rows, sample_weight=weights) if use is not fit else fit(rows, weights)


@pytest.mark.parametrize("n", [N - 1, N + 1, 500])
@some_homes
@pytest.mark.parametrize("source", ["memory", "dask", "dask, unknown"])
def test_another_number_of_weights_is_refused(tmp_path: Path, source: str, home: str, n: int) -> None:
    weights = HOMES[home](tmp_path, np.ones(n))
    with pytest.raises(DataError, match=rf"sample_weight has shape \({n},\), but .* has {N} rows"):
        fit(SOURCES[source](tmp_path), weights)


@pytest.mark.parametrize("home", ["numpy", "list", "zarr", "path", "dask"])
@pytest.mark.parametrize("source", ["memory", "dask"])
def test_weights_in_a_table_are_refused(tmp_path: Path, source: str, home: str) -> None:
    with pytest.raises(DataError, match=r"has shape \(1200, 1\), but one .* expected: \(n,\)"):
        fit(SOURCES[source](tmp_path), HOMES[home](tmp_path, UNEVEN[:, None]))


@pytest.mark.parametrize(
    "change", [lambda w: w.astype(object), lambda w: w + 0j, lambda w: w.astype("U3")], ids=["object", "complex", "str"]
)
def test_dask_weights_that_are_no_real_numbers_are_refused(change: Any) -> None:
    with pytest.raises(DataTypeError, match="sample_weight holds values of type"):
        fit(lazy(ROWS, 100), change(lazy(UNEVEN, 100)))


@pytest.mark.parametrize("weights", [["heavy"] * N, UNEVEN + 1j, np.array([None] * N), [[1.0], [2.0, 3.0]], 3j])
def test_weights_in_memory_that_are_no_real_numbers_are_refused(weights: Any) -> None:
    with pytest.raises(StreamGMMError, match="sample_weight"):
        fit(ROWS, weights)


def test_complex_weights_in_a_store_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataTypeError, match=r"weights-100\.zarr holds values of type complex128"):
        fit(ROWS, column(tmp_path, UNEVEN + 0j, 100))


def test_a_weight_chunk_of_another_shape_than_declared_is_named() -> None:
    changes: list[Callable[[np.ndarray], Any]] = [lambda w: w[:-1], lambda w: w[:, None], lambda w: w[0]]
    for change in changes:
        weights = lazy(UNEVEN, 400).map_blocks(change, meta=np.empty(0))
        with pytest.raises(DataError, match=r"Chunk \d of sample_weight"):
            fit(ROWS, weights)


def test_masked_weights_are_refused() -> None:
    with pytest.raises(DataTypeError, match=r"Chunk \d+ of .* is a masked array"):
        fit(ROWS, da.ma.masked_less(lazy(UNEVEN, 100), 0.5))


def test_other_lazy_things_are_refused() -> None:
    with pytest.raises(DataTypeError, match="sample_weight is a dask Delayed"):
        fit(ROWS, dask.delayed(np.array)(UNEVEN))


@some_homes
@pytest.mark.parametrize("source", ["memory", "dask"])
def test_weights_whose_sum_overflows_are_refused(tmp_path: Path, source: str, home: str) -> None:
    rows, weights = SOURCES[source](tmp_path), HOMES[home](tmp_path, np.full(N, 1e307))
    with pytest.raises(DataError, match="sum of sample_weight overflows"):
        fit(rows, weights)
    with pytest.raises(DataError, match="sum of sample_weight overflows"):
        fit(ROWS, None).score(rows, sample_weight=weights)


@some_homes
@pytest.mark.parametrize("source", ["memory", "dask", "dask, unknown"])
def test_weights_that_are_all_zero_are_refused(tmp_path: Path, source: str, home: str) -> None:
    rows, weights = SOURCES[source](tmp_path), HOMES[home](tmp_path, np.zeros(N))
    with pytest.raises(DataError, match=r"rows of .* have weight zero"):
        fit(rows, weights)
    with pytest.raises(DataError, match=r"rows of .* have weight zero"):
        fit(ROWS, None).score(rows, sample_weight=weights)


@pytest.mark.filterwarnings("ignore:reg_covar=0.001 is more than 1 % of the variance")
@pytest.mark.parametrize("counted", [1, 5, pytest.param(40, marks=pytest.mark.long), 4_000])
@pytest.mark.parametrize("home", ["words", "dask, other chunks"])
def test_many_rows_of_weight_zero_leave_a_start_or_a_sentence(tmp_path: Path, home: str, counted: int) -> None:
    """The sample of rows is drawn before weights are read: where few of them count, a second read draws more."""
    rng = np.random.default_rng(counted)
    rows, weights = np.tile(ROWS, (50, 1)) + rng.normal(size=(50 * N, 3)), np.zeros(50 * N)
    weights[rng.choice(50 * N, counted, replace=False)] = 1.0
    model, said = mixture(max_iter=3, tol=0.0, reg_covar=1e-3), ""
    try:
        model.fit(rows, sample_weight=HOMES[home](tmp_path, weights))
    except DataError as error:
        said = str(error)
    assert bool(said) == (counted < 3)
    if said:
        assert re.search("sampled|weight", said)
    else:
        assert np.isfinite(model.lower_bounds_).all()
        assert (rows[weights > 0].min(axis=0) <= model.means_.min(axis=0) + 1e-9).all()
        assert (rows[weights > 0].max(axis=0) >= model.means_.max(axis=0) - 1e-9).all()
