"""Stores that grow: of every kind; changed, cut, moved or taken for another; with chunks that are not there yet."""

from __future__ import annotations

import os
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from growing_stores import ATTRIBUTE, append, file_of, new_store, restarted, rows_of
from mixtures import assert_identical
from test_reads import counted
from zarr.storage import MemoryStore

from streamgmm import GaussianMixture, open_source
from streamgmm.errors import DataError, ParameterError, SourceError

ROWS, FITTED = 913, 500


def mixture() -> GaussianMixture:
    return GaussianMixture(3, random_state=0)


def of_memory(n_rows: int, first: int = 0) -> zarr.Array[Any]:
    array = zarr.create_array(MemoryStore(), shape=(n_rows, 2), chunks=(40, 2), dtype="float64")
    array[...] = rows_of(first, first + n_rows)
    return array


@pytest.fixture
def path(tmp_path) -> Path:
    """A store that has grown since a fit."""
    return tmp_path / "rows.zarr"


@pytest.fixture
def array(path) -> zarr.Array[Any]:
    return new_store(path, FITTED)


@pytest.fixture
def model(array, path) -> GaussianMixture:
    """Fitted to the first rows of the store, which has grown since."""
    model = mixture().fit(path)
    append(array, ROWS)
    return model


@pytest.fixture
def learned(model, path) -> GaussianMixture:
    """A model that knows all rows of the store."""
    model.update(path, flush=True)
    return model


def sizes(report: Any) -> list[int]:
    return [batch.n_rows for batch in report.batches]


# -- of every kind -------------------------------------------------------------------------------------------------

#: How a store lies on disk, and the rows of its units.
LAYOUTS = {
    "chunks": ({"chunks": (40, 2)}, 40),
    "shards": ({"chunks": (20, 2), "shards": (120, 2)}, 120),
    "columns": ({"chunks": (40, 1)}, 40),
    "format 2": ({"chunks": (40, 2), "zarr_format": 2}, 40),
    "keys with dots": ({"chunks": (40, 2), "chunk_key_encoding": {"name": "default", "separator": "."}}, 40),
    "float32": ({"chunks": (40, 2), "dtype": "float32"}, 40),
    "integers": ({"chunks": (40, 2), "dtype": "int32"}, 40),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_unit_is_a_chunk_or_a_shard_however_it_lies(path, tmp_path, name):
    layout, unit = LAYOUTS[name]
    array = zarr.create_array(str(path), shape=(FITTED, 2), **{"dtype": "float64", **layout})
    array[...] = rows_of(0, FITTED)
    model = mixture().fit(path)
    array.append(rows_of(FITTED, ROWS).astype(array.dtype))
    first, last = unit - FITTED % unit, ROWS % unit
    expected = [first] + [unit] * ((ROWS - FITTED - first) // unit)
    report = model.update(path)
    assert (sizes(report), report.waiting) == (expected, last)
    assert "nothing that follows on them shows that they are written" in report.why
    report = model.update(path, flush=True)
    assert (sizes(report), report.waiting, report.why) == ([last], 0, "")
    before = file_of(model, tmp_path)
    assert model.update(array, flush=True).n_units == 0
    assert (model.n_rows_, file_of(model, tmp_path)) == (ROWS, before)


def test_an_open_array_a_source_and_a_path_are_the_same_store(array, model, path, tmp_path):
    files = set()
    for thing in (array, path, str(path), open_source(path), zarr.open_group(tmp_path)["rows.zarr"]):
        other = restarted(model, tmp_path)
        other.update(thing, flush=True)
        assert other.update(path, flush=True).n_units == 0
        files.add(file_of(other, tmp_path))
    assert len(files) == 1


def test_rows_are_compared_whatever_the_byte_order_of_a_handle(path):
    """The handle that creates an array keeps the order it was given; one that opens it has the machine's own."""
    array = zarr.create_array(str(path), shape=(FITTED, 2), chunks=(40, 2), dtype=">i4")
    array[...] = rows_of(0, FITTED)
    assert array.dtype != zarr.open_array(str(path)).dtype
    model = mixture().fit(path)
    for handle in (array, path):
        array[...] = rows_of(0, FITTED)
        assert model.update(handle, flush=True).n_units == 0


@pytest.mark.parametrize("unit", [80, 100, 30])
def test_block_rows_are_the_unit_where_they_are_given(array, path, unit):
    model = mixture().fit(open_source(path, block_rows=unit))
    append(array, ROWS)
    report = model.update(open_source(path, block_rows=unit), flush=True)
    ends = [FITTED, *(end for end in range(0, ROWS, unit) if end > FITTED), ROWS]
    assert sizes(report) == np.diff(ends).tolist()
    assert model.update(path, flush=True).n_units == 0


def test_stores_in_memory_grow_and_are_not_taken_for_each_other(tmp_path):
    one, other, model = of_memory(FITTED), of_memory(200, 1000), mixture()
    model.fit(one)
    append(one, ROWS)
    assert model.update(one, flush=True).n_rows == ROWS - FITTED
    assert model.update(other, flush=True).n_rows == 200
    model = restarted(model, tmp_path)
    assert model.update(one, flush=True).n_units == model.update(other, flush=True).n_units == 0
    assert model.n_rows_ == ROWS + 200
    assert model.update(of_memory(ROWS), flush=True).n_units == 0  # as in another process, by its rows


def test_a_store_in_memory_has_no_place_that_another_could_take(monkeypatch):
    """Python gives the number of an object that is gone to the next one."""
    monkeypatch.setattr(MemoryStore, "__str__", lambda store: "memory://1")
    one, model = of_memory(FITTED), mixture()
    model.fit(one)
    assert model.update(of_memory(200, 1000), flush=True).n_rows == 200
    assert model.update(of_memory(0), flush=True).n_units == 0
    assert model._online is not None
    assert len(model._online.ledger.stores) == 2


def test_a_handle_sees_what_others_have_appended(path):
    mine = new_store(path, FITTED)
    model = mixture().fit(mine)
    append(zarr.open_array(str(path), mode="r+"), ROWS)
    assert mine.shape[0] == FITTED
    assert model.update(mine, flush=True).n_rows == ROWS - FITTED
    shutil.rmtree(path)
    with pytest.raises(SourceError, match=r"rows\.zarr cannot be opened again .* to see if it has grown"):
        model.update(mine)


def test_a_store_that_took_the_place_of_another_is_refused_with_a_way_out(learned, path):
    """As log files are rotated; the old rows stay known where they went."""
    shutil.copytree(path, path.with_name("old.zarr"))
    way_out = r"If other rows begin here, give their store another path, or learn it as a batch with batch_id=NAME"
    for n_rows in (200, 1000):
        shutil.rmtree(path)
        zarr.create_array(str(path), data=rows_of(1000, 1000 + n_rows), chunks=(40, 2))
        with pytest.raises(DataError, match=way_out):
            learned.update(path)
    assert learned.update(path.with_name("old.zarr"), flush=True).n_units == 0
    assert learned.update(path.rename(path.with_name("new.zarr")), flush=True).n_rows == 1000


def test_rows_with_nan_are_left_out_and_counted(array, model, path):
    array[[503, 700]] = np.nan
    report = model.update(open_source(path, nan_policy="omit"), flush=True)
    assert (report.n_rows, report.n_skipped, report.waiting) == (ROWS - FITTED - 2, 2, 0)
    assert (model.n_rows_, model.n_skipped_) == (ROWS - 2, 2)
    assert model.update(open_source(path, nan_policy="omit"), flush=True).n_units == 0


def test_packed_numbers_are_decoded(path):
    values = rows_of(0, ROWS)
    array = zarr.create_array(str(path), shape=(FITTED, 2), chunks=(40, 2), dtype="int16")
    array.attrs.update({"scale_factor": 0.5, "add_offset": 3.0})
    array[...] = values[:FITTED]
    model = mixture().fit(open_source(path, decode="cf"))
    array.append(values[FITTED:].astype("int16"))
    with pytest.raises(DataError, match=r"rows\.zarr holds packed numbers, not values"):
        model.update(path)
    assert model.update(open_source(path, decode="cf"), flush=True).n_rows == ROWS - FITTED
    unpacked = new_store(path.with_name("unpacked.zarr"), FITTED)
    unpacked[...] = values[:FITTED] * 0.5 + 3.0
    other = mixture().fit(unpacked)
    unpacked.append(values[FITTED:] * 0.5 + 3.0)
    other.update(unpacked, flush=True)
    assert_identical(model, other)


# -- what is not there yet -----------------------------------------------------------------------------------------


def test_what_lies_before_a_chunk_that_is_not_there_is_learned(array, model, path, tmp_path):
    undisturbed = restarted(model, tmp_path)
    os.remove(path / "c/16/0")
    report = model.update(path)
    assert (report.n_rows, report.waiting) == (640 - FITTED, ROWS - 640)
    assert "273 rows wait: chunk 16 (from row 640 on) is not there yet; if all its rows have the fill value" in str(
        report
    )
    assert model.update(path, stop=640).n_units == 0
    for options in ({"stop": 650}, {"stop": ROWS}, {"flush": True}):
        with pytest.raises(DataError, match=r"chunk 16 \(from row 640 on\) is not there, though rows up to \d+ are"):
            model.update(path, **options)
    array[640:680] = rows_of(640, 680)
    model.update(path, flush=True)
    undisturbed.update(path, flush=True)
    assert_identical(model, undisturbed)


def test_one_column_of_a_chunk_is_not_the_chunk(path):
    array = zarr.create_array(str(path), shape=(FITTED, 2), chunks=(40, 1), dtype="float64")
    array[...] = rows_of(0, FITTED)
    os.remove(path / "c/5/1")
    assert mixture().update(path).n_rows == 200


def test_a_chunk_that_is_not_there_is_learned_as_fill_value_only_where_that_is_said(array, model, path):
    os.remove(path / "c/16/0")
    with pytest.raises(SourceError, match="lacks 1 of 23 chunks"):
        model.update(open_source(path), flush=True)
    assert model.update(open_source(path, missing_chunks="fill"), flush=True).n_rows == ROWS - FITTED
    array[640:680] = rows_of(640, 680)
    with pytest.raises(DataError, match="rows 640 to 679 were learned before and have changed since"):
        model.update(path)


def test_where_nothing_has_grown_nothing_is_learned(array, path, tmp_path):
    model = mixture().fit(path)
    model.update(path)
    before = file_of(model, tmp_path)
    for options in ({}, {"flush": True}, {"stop": FITTED}, {"stop": 0}, {"stop": 17, "flush": True}):
        report = model.update(path, **options)
        assert (report.n_units, report.n_rows, report.waiting) == (0, 0, 0)
        assert str(report) == "rows.zarr: nothing new."
    array.resize((ROWS, 2))
    report = model.update(path)
    assert (report.n_units, report.waiting) == (0, ROWS - FITTED)
    assert file_of(model, tmp_path) == before


def test_a_store_without_a_row_yet(path):
    zarr.create_array(str(path), shape=(100, 2), chunks=(40, 2), dtype="float64")
    model = mixture()
    assert model.update(path).waiting == 100
    with pytest.raises(DataError, match=r"chunk 0 \(from row 0 on\) is not there, though rows up to 100 are said"):
        model.update(path, flush=True)
    array = zarr.open_array(str(path), mode="r+")
    array.resize((0, 2))
    for model in (mixture(), mixture().fit(rows_of(0, 300))):
        for options in ({}, {"flush": True}, {"stop": 0}):
            assert str(model.update(path, **options)) == "rows.zarr: nothing new."
    for use in (model.predict, mixture().fit, mixture().partial_fit):
        for source in (path, open_source(path, missing_chunks="wait")):
            with pytest.raises(DataError, match=r"rows\.zarr has 0 rows"):
                use(source)
    append(array, 100)
    assert model.update(path, flush=True).n_rows == 100


def test_a_chunk_of_nothing_but_the_fill_value_is_named_with_the_way_out(array, model, path):
    """zarr does not store it, so it never comes."""
    array[640:680] = 0.0
    assert not (path / "c/16/0").exists()
    way_out = r'zarr did not store it and never will: open_source\(\.\.\., missing_chunks="fill"\) takes it as it reads'
    assert re.search(way_out, str(model.update(path)))
    with pytest.raises(DataError, match=way_out):
        model.update(path, flush=True)
    assert model.update(open_source(path, missing_chunks="fill"), flush=True).n_rows == ROWS - 640
    assert model.update(path, flush=True).n_units == 0


# -- what the writer says ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [640, np.int64(640), ATTRIBUTE])
def test_rows_are_learned_up_to_what_is_said_to_be_written(array, model, path, stop):
    array.attrs[ATTRIBUTE] = 640
    report = model.update(path, stop=stop)
    assert (report.n_rows, report.waiting) == (640 - FITTED, ROWS - 640)
    assert report.why == "no more than 640 rows are said to be written"
    array.attrs[ATTRIBUTE] = 690
    report = model.update(path, stop=ATTRIBUTE)
    assert (report.n_rows, report.waiting) == (40, ROWS - 680)
    assert report.why == "a rest of less than a unit waits for more rows; flush=True learns it now"
    assert model.update(path, stop=ATTRIBUTE, flush=True).n_rows == 10


@pytest.mark.parametrize("said", ["12", None, True, 640.0, [640], -1, ROWS + 1])
def test_what_the_writer_says_must_be_a_number_of_rows(array, model, path, said):
    array.attrs[ATTRIBUTE] = said
    with pytest.raises(DataError, match=r"the attribute 'rows_written' of rows\.zarr is .*has 913 rows: expected 0"):
        model.update(path, stop=ATTRIBUTE)


def test_a_writer_that_says_nothing_is_named(model, path):
    with pytest.raises(DataError, match=r"rows\.zarr has no attribute 'rows_written' that says how many rows"):
        model.update(path, stop=ATTRIBUTE)


@pytest.mark.parametrize(
    ("stop", "error", "words"),
    [
        (1.5, ParameterError, "stop must be a number of rows or the name of an attribute, but it is 1.5"),
        (-1, ParameterError, "stop must be a number of rows or the name of an attribute, but it is -1"),
        (914, DataError, "stop is 914, but rows.zarr has 913 rows: expected 0 to that"),
        (True, ParameterError, "stop must be a number of rows or the name of an attribute, but it is True"),
    ],
)
def test_a_stop_must_be_a_number_of_rows(model, path, stop, error, words):
    with pytest.raises(error, match=words):
        model.update(path, stop=stop)


# -- changed -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ([607], "rows.zarr: rows 600 to 639 were"),
        ([905], "rows.zarr: rows 880 to 912 were"),
        ([1, 41, 90], "rows 0 to 39, rows 40 to 79, rows 80 to 119 were"),
        (range(0, ROWS, 40), "rows 0 to 39, rows 40 to 79, rows 80 to 119 and 20 more were"),
    ],
)
def test_learned_rows_that_changed_are_named(array, learned, path, tmp_path, changed, words):
    """A number for another of as many bytes; the time of the write tells it from what was learned."""
    before = file_of(learned, tmp_path)
    for row in changed:
        array[row, 0] = array[row, 0] + 1.0
    append(array, 1000)
    with pytest.raises(DataError, match=f"{words} learned before and have changed since"):
        learned.update(path, flush=True)
    assert file_of(learned, tmp_path) == before
    array[...] = rows_of(0, 1000)
    assert learned.update(path, flush=True).n_rows == 1000 - ROWS


def test_the_last_learned_rows_are_compared_where_a_store_does_not_say_when_it_was_written():
    array = of_memory(FITTED)
    model = mixture().fit(array)
    array[490] = 1.0
    with pytest.raises(DataError, match="rows 480 to 499 were learned before and have changed since"):
        model.update(array)


def test_a_store_that_was_cut_is_refused(array, learned, path):
    array.resize((800, 2))
    with pytest.raises(DataError, match=r"rows\.zarr has 800 rows, but 913 of it were learned before. It was cut"):
        learned.update(path)
    array.resize((ROWS, 2))  # the rows behind are not there now
    with pytest.raises(DataError, match="rows 800 to 839, rows 840 to 879, rows 880 to 912 were learned before"):
        learned.update(path)
    array[800:] = rows_of(800, ROWS)
    assert learned.update(path, flush=True).n_units == 0


def test_a_learned_chunk_that_is_gone_is_noticed(learned, path):
    os.remove(path / "c/3/0")
    with pytest.raises(DataError, match="rows 120 to 159 were learned before and have changed since"):
        learned.update(path)


# -- moved ---------------------------------------------------------------------------------------------------------


def renamed(path: Path) -> Path:
    return path.rename(path.with_name("renamed.zarr"))


def copied(path: Path) -> Path:
    return shutil.copytree(path, path.with_name("copied.zarr"), copy_function=shutil.copyfile)


def linked(path: Path) -> Path:
    path.with_name("linked.zarr").symlink_to(path)
    return path.with_name("linked.zarr")


def elsewhere(path: Path) -> Path:
    path.with_name("folder").mkdir()
    return path.rename(path.with_name("folder") / path.name)


@pytest.mark.parametrize("move", [renamed, copied, linked, elsewhere])
def test_a_store_that_has_moved_is_recognised(learned, path, tmp_path, move):
    there = move(path)
    report = learned.update(there, flush=True)
    assert (report.n_units, learned.n_rows_) == (0, ROWS)
    append(zarr.open_array(str(there), mode="r+"), 1000)
    learned = restarted(learned, tmp_path)
    assert learned.update(there, flush=True).n_rows == 1000 - ROWS
    assert learned.n_rows_ == 1000


def test_another_store_of_the_same_name_is_another(learned, path, tmp_path):
    other = tmp_path / "folder" / path.name
    zarr.create_array(str(other), data=rows_of(1000, 1200), chunks=(40, 2))
    assert learned.update(other, flush=True).n_rows == 200
    assert learned.update(path, flush=True).n_units == learned.update(other, flush=True).n_units == 0
    assert learned.n_rows_ == ROWS + 200


def test_another_store_at_the_same_place_is_refused(learned, path):
    shutil.rmtree(path)
    zarr.create_array(str(path), data=rows_of(1000, 2000), chunks=(40, 2))
    with pytest.raises(DataError, match="rows 0 to 39, rows 40 to 79, rows 80 to 119 and 21 more were learned before"):
        learned.update(path)


def test_the_model_file_holds_no_path(learned, path, tmp_path):
    data = file_of(learned, tmp_path)
    assert b"rows.zarr" in data
    places = {str(tmp_path), str(tmp_path.resolve()), *tmp_path.parts[-3:]}
    assert not [place for place in places if place.encode() in data]


# -- what is read --------------------------------------------------------------------------------------------------


def reads(thing: zarr.Array[Any], model: GaussianMixture, **options: Any) -> Counter[str]:
    """How often each chunk is read in an update, by its number."""
    before = thing.store.reads()
    model.update(thing, **options)
    return Counter({key.split("/")[1]: n for (key, _), n in (thing.store.reads() - before).items()})


def once(*runs: range) -> Counter[str]:
    return Counter(str(number) for run in runs for number in run)


def test_only_what_is_new_is_read_and_what_was_written_again(array, path):
    """Chunk 12 held the last of the 500 rows, and was written again as the store grew: its rows are compared."""
    model = mixture().fit(path)
    assert not reads(counted(path), model)
    append(array, 700)
    assert reads(counted(path), model) == once(range(12, 13), range(12, 17))
    assert not reads(counted(path), model)
    assert reads(counted(path), model, stop=700) == once(range(17, 17))
    assert reads(counted(path), model, flush=True) == once(range(17, 18))
    assert not reads(counted(path), model, flush=True)
    append(array, ROWS)
    assert reads(counted(path), model, stop=800) == once(range(17, 18), range(17, 20))


def test_rows_that_were_written_again_are_compared_once(array, learned, path):
    array[200:280] = rows_of(200, 280)
    assert reads(counted(path), learned) == once(range(5, 7))
    assert not reads(counted(path), learned)


def test_a_store_that_has_moved_is_compared_once(learned, path):
    """Its first and last rows say who it is; as its chunks have other times, all are compared, unit by unit."""
    there = copied(path)
    assert reads(counted(there), learned, flush=True) == once(range(0, 1), range(22, 23), range(23), range(12, 13))
    assert not reads(counted(there), learned, flush=True)
