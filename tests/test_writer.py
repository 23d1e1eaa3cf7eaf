"""Results written to zarr: every row in its place, every chunk or shard by one task, and nothing half done is kept."""

from __future__ import annotations

import os
import pickle
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import numpy as np
import pytest
import zarr
from conftest import write_zarr
from distributed import Client, LocalCluster
from hypothesis import given
from hypothesis import strategies as st
from zarr.storage import LocalStore, MemoryStore

from streamgmm import GaussianMixture, write_rows
from streamgmm.errors import SourceError
from streamgmm.executors import LocalExecutor

N, D, K, CHUNK = 1_003, 3, 4, 100
METHODS = ["predict", "predict_proba", "score_samples"]
SCHEDULERS = ["synchronous", "threads", "processes", "cluster", "processes=False"]
RUNS = 20
#: of six writes in a row, each method writes one to a new path and one into an open array
TURNS = list(zip(METHODS * 2, ["path", "open"] * 3, strict=True))


@dataclass(frozen=True)
class Grid:
    """Rows of a chunk and of a shard of the target."""

    chunk_rows: int
    shard_rows: int | None = None

    @property
    def unit(self) -> int:
        return self.shard_rows or self.chunk_rows

    def array(self, store: Any, shape: tuple[int, ...], dtype: Any = np.int64, fill_value: Any = -9) -> Any:
        """A new array of this grid, open for writing."""
        chunks, shards = ((rows, *shape[1:]) for rows in (self.chunk_rows, self.unit))
        return zarr.create_array(
            store, shape=shape, dtype=dtype, chunks=chunks, shards=shards if self.shard_rows else None,
            fill_value=fill_value,
        )  # fmt: skip


#: none of them lies on the chunks of 100 rows that the results come in
GRIDS = {
    "coprime": Grid(37),
    "larger": Grid(230),
    "smaller": Grid(7),
    "one chunk": Grid(N),
    "larger than all": Grid(3 * N),
    "shards": Grid(11, 77),
    "large shards": Grid(30, 270),
    "one shard": Grid(50, 1_050),
}


def mixture() -> GaussianMixture:
    rng = np.random.default_rng(0)
    weights, means = rng.dirichlet(np.full(K, 5.0)), 2.0 * rng.normal(size=(K, D))
    return GaussianMixture.from_parameters(weights, means, np.ones((K, D)), covariance_type="diag")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = 2.0 * np.random.default_rng(1).normal(size=(N, D))
    return write_zarr(tmp_path_factory.mktemp("rows"), rows, CHUNK)


@pytest.fixture(scope="module")
def expected(store: Path) -> dict[str, np.ndarray]:
    """What each method gives for the same rows in memory."""
    rows = zarr.open_array(store, mode="r")[:]
    return {method: getattr(mixture(), method)(rows) for method in METHODS}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Client]:
    """A client of two processes, in force only where a test says so."""
    options = {"host": "127.0.0.1", "dashboard_address": "127.0.0.1:0", "silence_logs": 50}
    with (
        LocalCluster(n_workers=2, threads_per_worker=2, **options) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client


@contextmanager
def within(scheduler: str, request: pytest.FixtureRequest) -> Iterator[Client | None]:
    """Dask set to a scheduler, or a client of the shared cluster or of threads of this process."""
    if scheduler == "cluster":
        client = request.getfixturevalue("cluster")
        with client.as_current():
            yield client
    elif scheduler == "processes=False":
        with Client(
            processes=False, n_workers=1, threads_per_worker=2, dashboard_address=None, silence_logs=50
        ) as client:
            yield client
    else:
        with dask.config.set(scheduler=scheduler, num_workers=3 if scheduler == "threads" else 2):
            yield None


def counting_rows(sizes: tuple[int, ...], k: int = 0) -> tuple[da.Array, np.ndarray]:
    """Rows of which each value occurs once, in chunks of ``sizes``, and the same in memory."""
    shape = (sum(sizes), k) if k else (sum(sizes),)
    values = np.arange(np.prod(shape)).reshape(shape)
    return da.from_array(values, chunks=(sizes, *shape[1:])), values


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# -- every row in its place ----------------------------------------------------------------------------------------


def write_and_compare(
    store: Path, folder: Path, method: str, grid: Grid, expected: np.ndarray, place: str, run: int
) -> None:
    """Predict and write once, to a new path or an open array, and compare every row."""
    result = getattr(mixture(), method)(store)
    path = folder / f"{method}-{place}-{run}.zarr"
    if place == "path":
        target: Any = write_rows(result, path, chunk_rows=grid.chunk_rows, shard_rows=grid.shard_rows)
        assert target.read_only
        assert left_in(folder) == [path.name]
    else:
        target = write_rows(result, grid.array(str(path), result.shape, result.dtype))
    assert target.chunks[0] == grid.chunk_rows
    assert (target.shards or [None])[0] == grid.shard_rows
    found = zarr.open_array(str(path), mode="r")
    assert found.dtype == expected.dtype
    wrong = ~np.isclose(found[:], expected, rtol=1e-12, atol=1e-12).reshape(N, -1).all(axis=1)
    assert not wrong.sum(), f"{wrong.sum()} of {N} rows are wrong, the first is {wrong.argmax()}"
    (folder / path.name).rename(folder.parent / f"{folder.name}-{path.name}")


def write_often(store: Path, folder: Path, grid: Grid, expected: dict[str, np.ndarray], runs: range) -> None:
    for run in runs:
        method, place = TURNS[run % len(TURNS)]
        write_and_compare(store, folder, method, grid, expected[method], place, run)


@pytest.mark.parametrize("number", range(len(GRIDS)), ids=GRIDS)
@pytest.mark.parametrize(("scheduler", "runs"), [("threads", 3), ("cluster", 2)])
def test_no_row_is_wrong(store, tmp_path, expected, number, scheduler, runs, request):
    """24 runs on threads and 16 on a cluster; every turn comes in both."""
    grid, first = list(GRIDS.values())[number], number * runs
    with within(scheduler, request):
        write_often(store, tmp_path, grid, expected, range(first, first + runs))


@pytest.mark.long
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("scheduler", ["threads", "cluster"])
def test_no_row_is_wrong_in_many_runs(store, tmp_path, expected, grid, scheduler, request):
    """20 runs of each method into each kind of place."""
    with within(scheduler, request):
        write_often(store, tmp_path, grid, expected, range(RUNS * len(TURNS)))


def test_without_a_grid_the_chunks_are_those_of_the_rows(store, tmp_path, expected):
    written = write_rows(mixture().predict_proba(store), tmp_path / "new.zarr")
    assert (written.chunks, written.shards) == ((CHUNK, K), None)
    assert np.isnan(written.fill_value)
    np.testing.assert_allclose(written[:], expected["predict_proba"], rtol=1e-12, atol=1e-12)


def test_columns_in_chunks_of_their_own(tmp_path):
    """Of the rows as well as of the target."""
    rows, values = counting_rows((40, 40, 23), 5)
    target = zarr.create_array(str(tmp_path / "t.zarr"), shape=values.shape, chunks=(17, 2), dtype="i8")
    write_rows(rows.rechunk((40, 3)), target)
    np.testing.assert_array_equal(target[:], values)


def test_an_array_inside_a_group_is_a_target(tmp_path):
    group = zarr.open_group(str(tmp_path / "g.zarr"), mode="w")
    target = group.create_array("labels", shape=(103,), chunks=(17,), dtype="i8")
    rows, values = counting_rows((40, 40, 23))
    write_rows(rows, target)
    np.testing.assert_array_equal(zarr.open_group(str(tmp_path / "g.zarr"), mode="r")["labels"][:], values)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_target_in_memory_is_filled_whatever_the_scheduler(scheduler, request):
    """Processes would fill copies of it."""
    target, (rows, values) = Grid(17).array(MemoryStore(), (103,)), counting_rows((40, 40, 23))
    with within(scheduler, request):
        write_rows(rows, target)
    np.testing.assert_array_equal(target[:], values)


# -- one task a chunk or shard -------------------------------------------------------------------------------------


class WatchedStore(MemoryStore):
    """Notes the key of every chunk that is written or deleted."""

    def __init__(self, store_dict: Any = None, *, read_only: bool = False) -> None:
        super().__init__(store_dict, read_only=read_only)
        self.written: list[str] = []

    async def set(self, key: str, value: Any, byte_range: Any = None) -> None:
        self.written += [key] * key.startswith("c")
        await super().set(key, value, byte_range)

    def set_sync(self, key: str, value: Any) -> None:
        self.written += [key] * key.startswith("c")
        super().set_sync(key, value)

    async def set_if_not_exists(self, key: str, value: Any) -> None:
        self.written += [key] * key.startswith("c")
        await super().set_if_not_exists(key, value)

    async def delete(self, key: str) -> None:
        self.written += [key] * key.startswith("c")
        await super().delete(key)


def shared_log_store(root: Path) -> LocalStore:
    """A store that appends the key of every chunk that is written to a file beside it, from whatever process.

    Its class is made here, so that it travels by value and no worker imports this file.
    """

    class SharedLogStore(LocalStore):
        async def set(self, key: str, value: Any) -> None:
            if key.startswith("c"):
                descriptor = os.open(f"{self.root}.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
                os.write(descriptor, f"{key}\n".encode())
                os.close(descriptor)
            await super().set(key, value)

    return SharedLogStore(root)


def keys(n: int, unit: int, k: int = 0) -> dict[str, int]:
    """The keys of all chunks or shards, each once."""
    return {f"c/{i}" + "/0" * (k > 0): 1 for i in range(-(-n // unit))}


@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any).map(tuple),
    k=st.integers(0, 3),
    chunk_rows=st.integers(1, 60),
    chunks_per_shard=st.none() | st.integers(1, 6),
    scheduler=st.sampled_from(["synchronous", "threads"]),
)
def test_each_chunk_or_shard_is_written_once(sizes, k, chunk_rows, chunks_per_shard, scheduler):
    grid = Grid(chunk_rows, chunks_per_shard and chunk_rows * chunks_per_shard)
    (rows, values), watched, heard = counting_rows(sizes, k), WatchedStore(), []
    target = grid.array(watched, values.shape)
    with dask.config.set(scheduler=scheduler, num_workers=4):
        write_rows(rows, target, written=heard.append)
    assert Counter(watched.written) == keys(len(values), grid.unit, k)
    np.testing.assert_array_equal(target[:], values)
    assert sum(heard) == len(values)
    assert min(heard) > 0


def test_the_watched_store_sees_chunks_that_are_written_twice():
    """The count can fail: where a write ends inside a chunk or shard, that one is written twice."""
    for grid in (Grid(10), Grid(5, 10)):
        watched = WatchedStore()
        target = grid.array(watched, (30,))
        target[:15] = 1
        target[15:] = 2
        assert Counter(watched.written) == {"c/0": 1, "c/1": 2, "c/2": 1}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize(
    "grid", [pytest.param(Grid(37), id="chunks", marks=pytest.mark.long), pytest.param(Grid(11, 77), id="shards")]
)
def test_each_is_written_once_in_whatever_process(tmp_path, grid, scheduler, request):
    """And progress hears of every row."""
    (rows, values), heard = counting_rows((100,) * 10 + (3,)), []
    target = grid.array(shared_log_store(tmp_path / "t.zarr"), values.shape)
    with within(scheduler, request):
        write_rows(rows, target, written=heard.append)
    assert Counter((tmp_path / "t.zarr.log").read_text().split()) == keys(N, grid.unit)
    np.testing.assert_array_equal(target[:], values)
    assert sum(heard) == N
    assert min(heard) > 0


def test_a_new_path_is_written_once_and_then_renamed(tmp_path, monkeypatch):
    noted, plain = [], LocalStore.set

    async def note(self: LocalStore, key: str, value: Any) -> None:
        noted.append((self.root, key))
        await plain(self, key, value)

    monkeypatch.setattr(LocalStore, "set", note)
    rows, values = counting_rows((100,) * 10 + (3,))
    write_rows(rows, tmp_path / "new.zarr", chunk_rows=30, shard_rows=210)
    assert Counter(key for root, key in noted if key.startswith("c")) == keys(N, 210)
    assert all(root != tmp_path / "new.zarr" and root.parent == tmp_path for root, _ in noted)
    np.testing.assert_array_equal(zarr.open_array(tmp_path / "new.zarr", mode="r")[:], values)


def test_chunks_that_hold_only_the_fill_value_of_a_new_array_are_written_too(tmp_path):
    written = write_rows(da.full(103, -1, chunks=40), tmp_path / "new.zarr", chunk_rows=17)
    assert (written.fill_value, written.nchunks_initialized) == (-1, 7)


# -- progress ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("sizes", [(40,), (103,), (0, 103)], ids=["one chunk", "one block", "an empty chunk"])
def test_progress_hears_of_a_single_block(tmp_path, scheduler, sizes, request):
    heard: list[int] = []
    with within(scheduler, request):
        write_rows(counting_rows(sizes)[0], tmp_path / "t.zarr", chunk_rows=40, written=heard.append)
    assert sum(heard) == sum(sizes)
    assert min(heard) > 0


@pytest.mark.parametrize("scheduler", ["synchronous", "threads"])
def test_progress_hears_of_every_task(tmp_path, scheduler, request):
    """The runs of 111 rows come nearest to the chunks of 100."""
    heard: list[int] = []
    with within(scheduler, request):
        write_rows(counting_rows((100,) * 10 + (3,))[0], tmp_path / "t.zarr", chunk_rows=37, written=heard.append)
    assert sorted(heard) == [4] + [111] * 9


def test_progress_comes_while_the_work_runs(tmp_path):
    """Rows are said to be written after they were, and before the last ones are."""
    there, path = [], tmp_path / "t.zarr"
    target = Grid(50).array(str(path), (N,))
    with dask.config.set(scheduler="synchronous"):
        write_rows(
            counting_rows((100,) * 10 + (3,))[0], target, written=lambda rows: there.append((rows, sum(target[:] >= 0)))
        )
    assert [total for _, total in there] == list(np.cumsum([rows for rows, _ in there]))
    assert len(there) == 11


def test_two_writers_at_a_time_hear_of_their_own_rows(tmp_path, monkeypatch):
    both, plain = threading.Barrier(2, timeout=60), LocalExecutor.everywhere

    def together(self: LocalExecutor, checks: Any) -> None:
        plain(self, checks)
        both.wait()

    def write(blocks: int) -> list[int]:
        heard: list[int] = []
        write_rows(counting_rows((10,) * blocks)[0], tmp_path / f"{blocks}.zarr", written=heard.append)
        return heard

    monkeypatch.setattr(LocalExecutor, "everywhere", together)
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(write, [5, 40])) == [[10] * 5, [10] * 40]


def test_what_a_callback_raises_ends_the_writing(tmp_path):
    def stop(rows: int) -> None:
        raise ZeroDivisionError("enough")

    with pytest.raises(ZeroDivisionError, match="enough"):
        write_rows(counting_rows((40, 40, 23))[0], tmp_path / "t.zarr", written=stop)
    assert left_in(tmp_path) == []


# -- what goes wrong on the way ------------------------------------------------------------------------------------


def spoiled(rows: da.Array, chunk: int, before: Callable[[], None] = lambda: None, *, fails: bool = True) -> da.Array:
    """The same rows, of which one chunk cannot be made, or only after ``before`` was called."""

    def spoil(values: np.ndarray, block_id: tuple[int, ...] | None = None) -> np.ndarray:
        if block_id == (chunk,):
            before()
            if fails:
                raise ZeroDivisionError("this chunk cannot be made")
        return values

    return rows.map_blocks(spoil, dtype=rows.dtype, meta=np.empty(0, rows.dtype))


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("stands", [pytest.param(False, marks=pytest.mark.long), True])
def test_a_chunk_that_cannot_be_made_leaves_all_as_it_was(tmp_path, scheduler, stands, request):
    path = tmp_path / "t.zarr"
    if stands:
        zarr.create_array(str(path), data=np.arange(5))
    before = sorted(tmp_path.rglob("*"))
    rows = spoiled(counting_rows((10,) * 10)[0], 6)
    with within(scheduler, request), pytest.raises(ZeroDivisionError, match="this chunk cannot be made"):
        write_rows(rows, path, chunk_rows=3, overwrite=True)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("pool", ["ours", "theirs"])
@pytest.mark.parametrize("target", ["path", "open"])
def test_no_thread_writes_on_after_an_error(tmp_path, monkeypatch, pool, target):
    """The chunk fails while another thread is in the middle of its writes."""
    begun, entered, left, plain = threading.Event(), [], [], LocalStore.set

    async def slow(self: LocalStore, key: str, value: Any) -> None:
        if key.startswith("c"):
            entered.append(key)
            begun.set()
            time.sleep(0.005)
        await plain(self, key, value)
        left.extend([key] * key.startswith("c"))

    rows = spoiled(counting_rows((100, 100))[0], 1, before=lambda: begun.wait(60))
    place = tmp_path / "t.zarr" if target == "path" else Grid(1).array(str(tmp_path / "t.zarr"), (200,))
    monkeypatch.setattr(LocalStore, "set", slow)
    with ThreadPoolExecutor(2) as theirs:
        with (
            dask.config.set({"num_workers": 2} if pool == "ours" else {"pool": theirs}),
            pytest.raises(ZeroDivisionError, match="this chunk cannot be made"),
        ):
            write_rows(rows, place, chunk_rows=1 if target == "path" else None)
        after = len(left)
        assert 0 < after == len(entered)
    assert len(left) == after
    assert left_in(tmp_path) == ([] if target == "path" else ["t.zarr"])


@pytest.mark.parametrize("scheduler", ["cluster", "processes=False"])
def test_no_worker_writes_on_after_an_error(tmp_path, scheduler, request):
    """The chunk fails while another worker writes a thousand files; when all is quiet nothing of them is left."""
    folder = str(tmp_path)

    def until_another_writes() -> None:
        last = time.monotonic() + 60
        while not any(Path(folder).glob(".*/c/*")) and time.monotonic() < last:
            time.sleep(0.002)

    rows = spoiled(counting_rows((1_000, 1_000))[0], 1, before=until_another_writes)
    with within(scheduler, request) as client:
        with pytest.raises(ZeroDivisionError, match="this chunk cannot be made"):
            write_rows(rows, tmp_path / "t.zarr", chunk_rows=1)
        last = time.monotonic() + 60
        while any(client.run(lambda dask_worker: len(dask_worker.active_threads)).values()):
            assert time.monotonic() < last
            time.sleep(0.05)
    assert left_in(tmp_path) == []


class ElsewhereStore(LocalStore):
    """A store whose root is ``elsewhere`` in every other process."""

    def __init__(self, root: Path, elsewhere: Path) -> None:
        super().__init__(root)
        self.elsewhere = elsewhere

    def __reduce__(self) -> tuple[Any, ...]:
        return LocalStore, (self.elsewhere,)


@pytest.mark.parametrize("scheduler", [pytest.param("processes", marks=pytest.mark.long), "cluster"])
@pytest.mark.parametrize("there", ["nothing", "another array"])
def test_a_target_that_workers_do_not_see_is_refused_before_anything_is_made(tmp_path, there, scheduler, request):
    home, elsewhere, made = tmp_path / "home.zarr", tmp_path / "elsewhere.zarr", str(tmp_path / "made")
    target = Grid(17).array(ElsewhereStore(home, elsewhere), (103,))
    if there == "another array":
        Grid(16).array(str(elsewhere), (103,))
    assert pickle.loads(pickle.dumps(target.store)).root == elsewhere

    def make(values: np.ndarray) -> np.ndarray:
        Path(made).touch()
        return values

    rows = counting_rows((40, 40, 23))[0].map_blocks(make, dtype="i8", meta=np.empty(0, "i8"))
    words = "cannot be opened on" if there == "nothing" else "is another array than the one that was opened"
    with within(scheduler, request), pytest.raises(SourceError, match=f"the target .*{words}"):
        write_rows(rows, target)
    assert not Path(made).exists()
    assert target.nchunks_initialized == 0
    assert not (elsewhere / "c").exists()


def test_a_target_that_is_removed_while_the_work_runs_is_not_made_anew(tmp_path):
    """zarr would write the chunks that follow into a folder that no longer holds an array."""
    target = Grid(10).array(str(tmp_path / "t.zarr"), (100,))
    rows = spoiled(counting_rows((10,) * 10)[0], 3, lambda: shutil.rmtree(tmp_path / "t.zarr"), fails=False)
    with dask.config.set(scheduler="synchronous"), pytest.raises(SourceError, match="the target cannot be opened on"):
        write_rows(rows, target)
    assert left_in(tmp_path) == []
