"""Chunks that a store does not hold: seen before the first pass, named with their rows, filled only where asked for."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any
from uuid import uuid4

import dask.array as da
import numpy as np
import pytest
import zarr
from mixtures import assert_identical, blobs, fitted, given_start, mixture
from typer.testing import CliRunner
from zarr.core.buffer import Buffer, default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import LocalStore, MemoryStore, WrapperStore

from streamgmm import GaussianMixture, cli, open_source
from streamgmm.errors import DataError, SourceError

LINES = CliRunner()

#: 25 x 2 chunks, of which the last ones are cut off in both directions
ROWS, CHUNK_ROWS, CHUNK_COLUMNS = 993, 40, 2
PLACES = list(product(range(25), range(2)))
#: in both columns the first, the last and some between; the short form takes these where all chunks are alike
SOME_PLACES = [*PLACES[:2], *PLACES[2:-2:7], *PLACES[-2:]]

#: what max_iter=1 always says
pytestmark = pytest.mark.filterwarnings("ignore:The fit did not converge")


@dataclass(frozen=True)
class Layout:
    """A way to lay chunks out in a store. key: where chunk (i, j) lies, as the specification of zarr says."""

    key: str
    home: str = "folder"
    options: dict[str, Any] = field(default_factory=dict)

    def written(self, tmp_path: Path, rows: np.ndarray, **options: Any) -> zarr.Array[Any]:
        """The rows in a new array, every chunk of which is written."""
        if self.home == "url":
            pytest.importorskip("fsspec")
        store = {
            "folder": tmp_path / f"{uuid4().hex}.zarr",
            "group": tmp_path / f"{uuid4().hex}.zarr",
            "memory": MemoryStore(),
            "url": f"memory://{uuid4().hex}/rows.zarr",
        }[self.home]
        place = str(store) if isinstance(store, Path) else store
        known = {"chunks": (CHUNK_ROWS, CHUNK_COLUMNS), "config": {"write_empty_chunks": True}}
        settings = {**known, **self.options, **options}
        if self.home != "group":
            return zarr.create_array(place, data=rows, **settings)
        group = zarr.open_group(place, mode="w", zarr_format=settings.pop("zarr_format", 3))
        return group.create_array("pixels", data=rows, **settings)

    def chunk(self, array: zarr.Array[Any], place: tuple[int, ...]) -> Chunk:
        prefix = "pixels/" if self.home == "group" else ""
        return Chunk(array, prefix + self.key.format(*place))


@dataclass(frozen=True)
class Chunk:
    """One object of a store."""

    array: zarr.Array[Any]
    key: str

    @contextmanager
    def gone(self) -> Iterator[None]:
        """Deleted, then put back."""
        kept = self._held()
        sync(self.array.store.delete(self.key))
        yield
        sync(self.array.store.set(self.key, kept))

    @contextmanager
    def holding(self, content: bytes) -> Iterator[None]:
        """With other bytes, then the old ones."""
        kept = self._held()
        sync(self.array.store.set(self.key, default_buffer_prototype().buffer.from_bytes(content)))
        yield
        sync(self.array.store.set(self.key, kept))

    def _held(self) -> Buffer:
        kept = sync(self.array.store.get(self.key, default_buffer_prototype()))
        assert kept is not None, f"there is no {self.key}"
        return kept


SHARDED = {"shards": (CHUNK_ROWS, CHUNK_COLUMNS), "chunks": (20, 1)}
LAYOUTS = {
    "v3": Layout("c/{}/{}"),
    "v3, uncompressed": Layout("c/{}/{}", options={"compressors": None}),
    "v3 with dots": Layout("c.{}.{}", options={"chunk_key_encoding": {"name": "default", "separator": "."}}),
    "v3 with keys of v2": Layout("{}.{}", options={"chunk_key_encoding": {"name": "v2", "separator": "."}}),
    "v2 with dots": Layout("{}.{}", options={"zarr_format": 2}),
    "v2 with slashes": Layout(
        "{}/{}", options={"zarr_format": 2, "chunk_key_encoding": {"name": "v2", "separator": "/"}}
    ),
    "sharded": Layout("c/{}/{}", options=SHARDED),
    "in a group": Layout("c/{}/{}", home="group"),
    "v2 in a group": Layout("{}.{}", home="group", options={"zarr_format": 2}),
    "in memory": Layout("c/{}/{}", home="memory"),
    "sharded in memory": Layout("c/{}/{}", home="memory", options=SHARDED),
    "behind a URL": Layout("c/{}/{}", home="url"),
    "sharded behind a URL": Layout("c/{}/{}", home="url", options=SHARDED),
}
every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
PLAIN = LAYOUTS["v3"]


def rows_of(place: tuple[int, ...], size: int = CHUNK_ROWS) -> tuple[int, int]:
    """The first and the last row of a chunk."""
    return place[0] * size, min((place[0] + 1) * size, ROWS) - 1


def refusal(layout: Layout, place: tuple[int, ...]) -> str:
    unit = "shard" if "shards" in layout.options else "chunk"
    first, last = rows_of(place)
    return rf"lacks 1 of 50 {unit}s \({place[0]}/{place[1]}: rows {first} to {last}\)\..*as the fill value 0\.0, "


def way_out(error: pytest.ExceptionInfo[SourceError]) -> dict[str, str]:
    """The arguments of open_source that a message advises."""
    return dict(re.findall(r'(\w+)="(\w+)"', str(error.value)))


def fit(rows: Any, **settings: Any) -> GaussianMixture:
    """One pass from a given start."""
    return mixture("full", max_iter=1, tol=0.0, **given_start("full")).fit(rows, **settings)


# -- every chunk is missed ---------------------------------------------------------------------------------------


@pytest.fixture
def places(layout: Layout, request: pytest.FixtureRequest) -> list[tuple[int, int]]:
    """All chunks of the plainest layout, and of the others in the long form."""
    return PLACES if layout is PLAIN or request.config.getoption("--long") else SOME_PLACES


@every_layout
def test_every_chunk_that_is_deleted_is_named_when_the_store_is_opened(
    layout: Layout, tmp_path: Path, places: list[tuple[int, int]]
) -> None:
    array = layout.written(tmp_path, blobs(ROWS))
    assert open_source(array).n_rows == ROWS
    for place in places:
        with layout.chunk(array, place).gone(), pytest.raises(SourceError, match=refusal(layout, place)):
            open_source(array)
    assert open_source(array).n_rows == ROWS


@every_layout
def test_every_chunk_that_is_emptied_is_named_at_the_latest_when_it_is_read(
    layout: Layout, tmp_path: Path, places: list[tuple[int, int]]
) -> None:
    """zarr reads a shard without a byte as fill values; of an unsharded chunk it does not."""
    array = layout.written(tmp_path, blobs(ROWS))
    for place in places:
        with layout.chunk(array, place).holding(b""):
            if "shards" in layout.options:
                with pytest.raises(SourceError, match=refusal(layout, place)):
                    open_source(array)
                continue
            first, last = rows_of(place)
            source, column = open_source(array), CHUNK_COLUMNS * place[1]
            with pytest.raises(
                SourceError,
                match=rf"rows from row {first}, column {column} \(chunk {place[0]}/{place[1]} of .* damaged",
            ):
                list(source.block(first, last + 1).pieces())


@pytest.mark.parametrize("name", ["v3", "v2 with dots", "in a group", "behind a URL"])
@pytest.mark.parametrize("place", [(0, 0), (24, 1)])
def test_a_fit_stops_at_an_empty_chunk(name: str, place: tuple[int, int], tmp_path: Path) -> None:
    layout, model = LAYOUTS[name], fitted()
    array, before = layout.written(tmp_path, blobs(ROWS)), model.means_
    with layout.chunk(array, place).holding(b""):
        with pytest.raises(SourceError, match=rf"chunk {place[0]}/{place[1]} of "):
            model.fit(array)
        with pytest.raises(SourceError, match=rf"chunk {place[0]}/{place[1]} of "):
            model.predict(array).compute()
    assert model.means_ is before
    assert len(model.predict(array).compute()) == ROWS


def test_many_missing_chunks_are_counted_and_the_first_are_named(tmp_path: Path) -> None:
    array = PLAIN.written(tmp_path, blobs(ROWS))
    for i, j in PLACES[2:]:
        sync(array.store.delete(f"c/{i}/{j}"))
    words = r"lacks 48 of 50 chunks \(1/0, 1/1, 2/0, 2/1, 3/0, \.\.\.: rows 40 to 159, \.\.\.\)"
    with pytest.raises(SourceError, match=words):
        open_source(array)


def test_an_array_that_was_never_written_is_refused(tmp_path: Path) -> None:
    zarr.create_array(str(tmp_path / "r.zarr"), shape=(100, 3), chunks=(10, 3), dtype="f4")
    with pytest.raises(SourceError, match=r"r\.zarr lacks 10 of 10 chunks \(0/0, .*: rows 0 to 49, \.\.\.\)"):
        mixture().fit(tmp_path / "r.zarr")


@pytest.mark.parametrize("use", ["fit", "predict", "predict_proba", "score_samples", "score", "bic", "plan"])
def test_no_method_takes_missing_chunks_for_rows(use: str, tmp_path: Path) -> None:
    array, model = PLAIN.written(tmp_path, blobs(ROWS)), fitted()
    with PLAIN.chunk(array, (3, 0)).gone(), pytest.raises(SourceError, match=refusal(PLAIN, (3, 0))):
        getattr(model, use)(array.store.root)


# -- what is no chunk --------------------------------------------------------------------------------------------


STRAY = [
    "c/3/.DS_Store",
    "c/3/1.partial",
    "c/3/1.0a1b2c.partial",
    "c/3/1/7",
    ".DS_Store",
    "c/03/1",
    "c/3/01",
    "x/c/3/1",
]


@pytest.mark.parametrize("stray", STRAY)
def test_a_stray_file_stands_for_no_chunk(stray: str, tmp_path: Path) -> None:
    array = PLAIN.written(tmp_path, blobs(ROWS))
    root = Path(array.store.root)
    (root / "c/3/1").unlink()
    (root / stray).parent.mkdir(parents=True, exist_ok=True)
    (root / stray).write_bytes(b"x" * 100)
    with pytest.raises(SourceError, match=refusal(PLAIN, (3, 1))):
        open_source(array)


def test_stray_files_beside_all_chunks_do_no_harm(tmp_path: Path) -> None:
    array = PLAIN.written(tmp_path, blobs(ROWS))
    for stray in (".DS_Store", "c/3/.DS_Store", "c/3/1.0a1b2c.partial", "c/99/0", "c/3/7"):
        (Path(array.store.root) / stray).parent.mkdir(exist_ok=True)
        (Path(array.store.root) / stray).write_bytes(b"x")
    assert_identical(fit(array), fit(open_source(blobs(ROWS), block_rows=open_source(array).block_rows)))


def test_chunks_beyond_the_shape_make_up_for_none(tmp_path: Path) -> None:
    array = PLAIN.written(tmp_path, blobs(ROWS))
    description = Path(array.store.root) / "zarr.json"
    description.write_text(description.read_text().replace(f"{ROWS},", "400,"))
    assert open_source(array.store.root).n_rows == 400
    (Path(array.store.root) / "c/9/1").unlink()
    with pytest.raises(SourceError, match=r"lacks 1 of 20 chunks \(9/1: rows 360 to 399\)"):
        open_source(array.store.root)


def test_an_array_beside_it_in_the_group_makes_up_for_no_chunk(tmp_path: Path) -> None:
    layout = LAYOUTS["in a group"]
    array = layout.written(tmp_path, blobs(ROWS))
    group = zarr.open_group(array.store)
    group.create_array("pixels2", data=blobs(ROWS), chunks=(CHUNK_ROWS, CHUNK_COLUMNS))
    with layout.chunk(array, (5, 1)).gone(), pytest.raises(SourceError, match="pixels lacks 1 of 50 chunks"):
        open_source(group, array="pixels")


# -- filled, or left out -----------------------------------------------------------------------------------------


def with_gap(rows: np.ndarray, value: float, first: int = 80, stop: int = 120) -> np.ndarray:
    filled = rows.copy()
    filled[first:stop, :CHUNK_COLUMNS] = value
    return filled


@every_layout
def test_filled_chunks_are_rows_of_the_fill_value(layout: Layout, tmp_path: Path) -> None:
    rows, value = blobs(ROWS), 2.5
    array = layout.written(tmp_path, rows, fill_value=value)
    with layout.chunk(array, (2, 0)).gone():
        with pytest.raises(SourceError, match=f"as the fill value {value}, ") as error:
            fit(array)
        assert way_out(error) == {"missing_chunks": "fill"}
        source = open_source(array, **way_out(error))
        found = fit(source)
        labels = found.predict(source).compute()
    expected = fit(open_source(with_gap(rows, value), block_rows=source.block_rows))
    assert_identical(found, expected)
    np.testing.assert_array_equal(labels, expected.predict(with_gap(rows, value)))


def test_an_emptied_shard_is_filled_and_an_emptied_chunk_is_not(tmp_path: Path) -> None:
    rows, layout = blobs(ROWS), LAYOUTS["sharded"]
    array = layout.written(tmp_path, rows)
    with layout.chunk(array, (2, 0)).holding(b""):
        source = open_source(array, missing_chunks="fill")
        assert_identical(fit(source), fit(open_source(with_gap(rows, 0.0), block_rows=source.block_rows)))
    array = PLAIN.written(tmp_path, rows)
    with PLAIN.chunk(array, (2, 0)).holding(b""), pytest.raises(SourceError, match=r"chunk 2/0 of .* is damaged"):
        fit(open_source(array, missing_chunks="fill"))


@every_layout
def test_chunks_that_are_filled_with_nan_are_rows_to_leave_out(layout: Layout, tmp_path: Path) -> None:
    rows = blobs(ROWS)
    array = layout.written(tmp_path, rows, fill_value=np.nan)
    with layout.chunk(array, (2, 0)).gone():
        with pytest.raises(SourceError, match="as the fill value nan, ") as error:
            open_source(array)
        assert way_out(error) == {"nan_policy": "omit"}
        found = fit(open_source(array, **way_out(error)))
        with pytest.raises(DataError, match=r"contains NaN in row 80, column 0 \((chunk|shard) 2/0 of "):
            fit(open_source(array, missing_chunks="fill"))
    expected = fit(np.delete(rows, np.s_[80:120], axis=0))
    np.testing.assert_allclose(found.means_, expected.means_, rtol=1e-12)
    np.testing.assert_allclose(found.covariances_, expected.covariances_, rtol=1e-11)
    assert (found.n_rows_, found.n_skipped_) == (ROWS - 40, 40)


def test_an_all_zero_chunk_that_zarr_does_not_store_can_be_accepted(tmp_path: Path) -> None:
    rows = with_gap(blobs(ROWS), 0.0)
    array = PLAIN.written(tmp_path, rows, config={"write_empty_chunks": False})
    with pytest.raises(SourceError, match="does not store such chunks by default") as error:
        fit(array)
    source = open_source(array, **way_out(error))
    assert_identical(fit(source), fit(open_source(rows, block_rows=source.block_rows)))


def test_whole_numbers_that_are_not_there_are_their_fill_value(tmp_path: Path) -> None:
    rows = (10 * blobs(ROWS)).astype("i2")
    array = PLAIN.written(tmp_path, rows, fill_value=-7)
    with PLAIN.chunk(array, (2, 0)).gone():
        with pytest.raises(SourceError, match="as the fill value -7, "):
            open_source(array)
        pieces = open_source(array, missing_chunks="fill").block(80, 120).pieces()
        np.testing.assert_array_equal(next(pieces).rows, with_gap(rows, -7)[80:120])


# -- weights -----------------------------------------------------------------------------------------------------


def test_missing_weights_are_named_and_their_way_out_works(tmp_path: Path) -> None:
    rows, weights = blobs(ROWS), np.random.default_rng(1).uniform(0.5, 2, ROWS)
    path = tmp_path / "w.zarr"
    zarr.create_array(str(path), data=weights, chunks=(100,))
    (path / "c/3").unlink()
    words = (
        r"w\.zarr lacks 1 of 10 chunks \(3: rows 300 to 399\).*a dask array, dask\.array\.from_zarr\(PATH\), accepts"
    )
    for use in (fit, fitted().score):
        for given in (path, str(path), zarr.open_array(path, mode="r")):
            with pytest.raises(SourceError, match=words):
                use(rows, sample_weight=given)
    weights[300:400] = 0.0
    found, expected = fit(rows, sample_weight=da.from_zarr(str(path))), fit(rows, sample_weight=weights)
    np.testing.assert_allclose(found.means_, expected.means_, rtol=1e-12)


def test_an_empty_chunk_of_weights_is_named_when_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "w.zarr"
    zarr.create_array(str(path), data=np.ones(ROWS), chunks=(100,), config={"write_empty_chunks": True})
    (path / "c/3").write_bytes(b"")
    with pytest.raises(SourceError, match=r"row 300, column 0 \(chunk 3/0 of w\.zarr\) on could not be read"):
        fit(blobs(ROWS), sample_weight=path)


# -- the command line --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["fit", "predict", "info"])
def test_the_command_line_refuses_and_its_way_out_works(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    array = PLAIN.written(tmp_path, blobs(ROWS))
    (Path(array.store.root) / "c/3/1").unlink()
    fitted().save("m.sgmm")
    store = str(Path(array.store.root).relative_to(tmp_path))
    words = {
        "fit": ["fit", store, "-k", "3", "-o", "n.sgmm"],
        "predict": ["predict", store, "m.sgmm", "-o", "l.zarr"],
        "info": ["info", store],
    }[command]
    refused = LINES.invoke(cli.app, words)
    assert refused.exit_code == 1
    assert "lacks 1 of 50 chunks (3/1: rows 120 to 159)" in refused.output
    advice = re.search(r"(--missing-chunks) (fill)", refused.output)
    assert advice
    assert LINES.invoke(cli.app, [*words, *advice.groups()]).exit_code == 0


# -- stores that list in their own way ---------------------------------------------------------------------------


class Unlisted(WrapperStore[MemoryStore]):
    """A store that says it cannot list."""

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        raise NotImplementedError
        yield prefix


class Silent(WrapperStore[MemoryStore]):
    """A store whose listing is empty, as that of a web server without an index."""

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        for key in ():
            yield key


class Unreachable(Unlisted):
    """A store that was lost after it was opened."""

    async def exists(self, key: str) -> bool:
        raise ConnectionError("no route to host")


@pytest.mark.parametrize("kind", [Unlisted, Silent])
@pytest.mark.parametrize("name", ["in memory", "sharded in memory"])
def test_a_store_that_does_not_list_is_asked_for_each_chunk(kind: type[Unlisted], name: str, tmp_path: Path) -> None:
    layout = LAYOUTS[name]
    kept = layout.written(tmp_path, blobs(ROWS))
    array = zarr.open_array(kind(kept.store), mode="r")
    assert open_source(array).n_rows == ROWS
    for place in (PLACES[0], PLACES[17], PLACES[-1]):
        with layout.chunk(kept, place).gone(), pytest.raises(SourceError, match=refusal(layout, place)):
            open_source(array)


def test_a_store_that_does_not_answer_is_an_error_in_words(tmp_path: Path) -> None:
    array = zarr.open_array(Unreachable(LAYOUTS["in memory"].written(tmp_path, blobs(ROWS)).store), mode="r")
    with pytest.raises(SourceError, match=r"does not say which chunks it holds \(ConnectionError\)\. Check that"):
        open_source(array)


class Long(WrapperStore[MemoryStore]):
    """A store that lists 100,000 chunks, of which it holds none, and leaves one out."""

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        yield "zarr.json"
        for i in range(100_000):
            if i != 77_777:
                yield f"c/{i}/0"


def test_a_long_listing_takes_no_time() -> None:
    store = Long(MemoryStore())
    array = zarr.create_array(store, shape=(1_000_000, 2), chunks=(10, 2), dtype="f8")
    start = time.process_time()
    with pytest.raises(SourceError, match=r"lacks 1 of 100,000 chunks \(77777/0: rows 777770 to 777779\)"):
        open_source(array)
    assert time.process_time() - start < 2  # 0.14 s on an idle core


@pytest.mark.parametrize("name", ["v3", "sharded", "in memory", "behind a URL"])
def test_a_fit_inside_a_running_event_loop(name: str, tmp_path: Path) -> None:
    """As in a notebook, whose cells run inside one."""
    layout = LAYOUTS[name]
    array = layout.written(tmp_path, blobs(ROWS))

    async def cell() -> GaussianMixture:
        with layout.chunk(array, (3, 1)).gone(), pytest.raises(SourceError, match=refusal(layout, (3, 1))):
            fit(array)
        return fit(array)

    assert_identical(asyncio.run(cell()), fit(array))


def test_the_layouts_are_what_they_say(tmp_path: Path) -> None:
    for layout in LAYOUTS.values():
        array = layout.written(tmp_path, blobs(ROWS))
        assert array.nchunks_initialized * (4 if array.shards else 1) >= len(PLACES)
        if isinstance(array.store, LocalStore):
            assert all((Path(array.store.root) / layout.chunk(array, place).key).is_file() for place in PLACES)
