"""The user's graph: run once a chunk and pass, never on the client, and one chunk at a time in a thread."""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import dask
import dask.array as da
import dask.base
import numpy as np
import pytest
import zarr
from conftest import write_zarr
from dask.callbacks import Callback
from dask.utils import key_split
from distributed import Client, LocalCluster
from hypothesis import given
from hypothesis import strategies as st
from mixtures import assert_close, assert_identical, blobs, given_start, mixture
from test_reads import counted, keys_of

from streamgmm import GaussianMixture, open_source
from streamgmm.errors import SchedulerError
from streamgmm.executors import LocalExecutor

PASSES = 3

pytestmark = pytest.mark.filterwarnings("ignore:The fit did not converge")
everywhere = pytest.mark.parametrize(
    "scheduler", ["synchronous", "threads", pytest.param("processes", marks=pytest.mark.long)]
)


def fit(rows: Any, **settings: Any) -> GaussianMixture:
    """A fit of exactly PASSES passes after the pilot."""
    return mixture(**{"max_iter": PASSES, "tol": 0.0, **given_start("full"), **settings}).fit(rows)


def chunked(rows: np.ndarray, chunks: Any = (100, 3)) -> da.Array:
    """A dask array whose chunks are tasks."""
    return da.from_array(rows, chunks=chunks).map_blocks(np.array)


def forgotten(array: da.Array) -> da.Array:
    """The same array, without the sizes of its row chunks."""
    unknown = (np.nan,) * array.numblocks[0]
    return da.Array(array.dask, array.name, (unknown, *array.chunks[1:]), meta=array._meta)


# -- a random graph --------------------------------------------------------------------------------------------


def neighbours(rows: np.ndarray) -> np.ndarray:
    """The sum of the rows before and after; nothing for the first and the last."""
    out = rows.copy()
    out[1:-1] = rows[:-2] + rows[2:]
    return out


def overlapped(x: Any) -> Any:
    if isinstance(x, da.Array):
        return x.map_overlap(neighbours, depth={0: 1, 1: 0}, boundary={0: 0}, dtype=x.dtype)
    return neighbours(np.pad(x, ((1, 1), (0, 0))))[1:-1]


def rechunked(x: Any, rows: int, columns: int) -> Any:
    return x.rechunk((rows, columns)) if isinstance(x, da.Array) else x


def joined(x: Any, axis: int) -> Any:
    join = da.concatenate if isinstance(x, da.Array) else np.concatenate
    return join([x, x + 1]) if axis == 0 else join([x[:, 1:], x[:, :1]], axis=1)


def mapped(x: Any) -> Any:
    return x.map_blocks(np.negative) if isinstance(x, da.Array) else -x


whole = st.integers(1, 40)
OPERATIONS: st.SearchStrategy[Callable[[Any], Any]] = st.one_of(
    st.builds(lambda r, c: lambda x: rechunked(x, r, c), whole, st.integers(1, 3)),
    st.builds(lambda a, s: lambda x: x[min(a, len(x) - 1) :: s], st.integers(0, 20), st.sampled_from([1, 2, 3])),
    st.builds(lambda a: lambda x: x[: max(1, len(x) - a)], st.integers(0, 20)),
    st.builds(lambda axis: lambda x: joined(x, axis), st.integers(0, 1)),
    st.just(mapped),
    st.just(overlapped),
    st.just(lambda x: x[::-1]),
    st.just(lambda x: x - x.sum(axis=0)),
    st.just(lambda x: x + x[:1]),
    st.just(lambda x: x[np.arange(len(x))[::-1] // 2]),
    st.just(lambda x: x * x[:, :1]),
)


class Gathered:
    """Rows of blocks, which add by standing one after the other."""

    def __init__(self, rows: np.ndarray) -> None:
        self.rows = rows

    def __add__(self, other: Gathered) -> Gathered:
        return Gathered(np.concatenate([self.rows, other.rows]))


def gather(shared: None, block: Any) -> Gathered:
    return Gathered(np.concatenate([piece.rows for piece in block.pieces()]))


def gathered(source: Any, get: Any = dask.get) -> np.ndarray:
    return LocalExecutor(get, 1).map_reduce(gather, None, source.blocks(), source.graph).rows


class Sown:
    """A dask array of whole numbers whose chunks count how often they are made."""

    def __init__(self, n_rows: int, chunk_rows: int) -> None:
        self.rows = np.random.default_rng(n_rows).integers(-3, 4, size=(n_rows, 3)).astype(float)
        self.made: Counter[int] = Counter()
        chunks = da.core.normalize_chunks((chunk_rows, 3), self.rows.shape)
        self.array = da.map_blocks(self._make, chunks=chunks, meta=np.empty((0, 0)), dtype=float)

    def _make(self, block_info: Any) -> np.ndarray:
        start, stop = block_info[None]["array-location"][0]
        self.made[start] += 1
        return self.rows[start:stop].copy()

    def __dask_tokenize__(self) -> int:
        return id(self)


@given(
    sizes=st.tuples(st.integers(2, 60), whole),
    operations=st.lists(OPERATIONS, min_size=1, max_size=4),
    mask=st.booleans(),
    fuse=st.sampled_from([None, False]),
)
def test_any_graph_gives_its_rows_and_runs_each_node_once(
    sizes: tuple[int, int], operations: list[Callable[[Any], Any]], mask: bool, fuse: bool | None
) -> None:
    sown = Sown(*sizes)
    array, expected = sown.array, sown.rows
    for operation in operations:
        array, expected = operation(array), operation(expected)
    if mask and len(expected[expected[:, 0] > -1]):
        array, expected = array[array[:, 0] > -1], expected[expected[:, 0] > -1]
    with dask.config.set({"optimization.fuse.active": fuse}):
        source = open_source(array)
    sown.made.clear()
    np.testing.assert_array_equal(array.compute(scheduler="synchronous"), expected)
    once = dict.fromkeys(sown.made, 1)  # not those chunks of which no row is left
    sown.made.clear()
    if source.uncounted:
        source = source.counted(LocalExecutor(dask.get, 1))
        assert sown.made == once
    for _ in range(2):
        sown.made.clear()
        np.testing.assert_array_equal(gathered(source), expected)
        assert sown.made.items() <= once.items()  # chunks that are known to be empty are left out
    part = source.block(len(expected) // 3, len(expected) // 3 + max(1, len(expected) // 2))
    one = LocalExecutor(dask.get, 1).map_reduce(gather, None, [part], source.graph).rows
    np.testing.assert_array_equal(one, expected[part.start : part.stop])


# -- which tasks run -------------------------------------------------------------------------------------------


def tasks_of(array: Any, **settings: Any) -> Counter[str]:
    """How many tasks of which name a fit runs."""
    names: Counter[str] = Counter()

    def ran(key: Any, *_: Any) -> None:
        names[key_split(key)] += 1

    with dask.config.set(scheduler="synchronous"), Callback(posttask=ran):
        fit(array, **settings)
    return names


OURS = {"parameters", "surveyblock", "estep", "merge"}


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x,
        lambda x: (x + 1) * 2,
        lambda x: x.map_blocks(np.negative).astype("f4"),
        lambda x: x.rechunk((100, 2)) + 0.5,
        lambda x: x[x[:, 0] > -1e9],
        lambda x: x[::-1],
        lambda x: x.rechunk((200, 3)),
    ],
    ids=["plain", "arithmetic", "map_blocks", "columns", "mask", "backwards", "coarser"],
)
def test_chunks_that_share_nothing_are_made_inside_our_tasks(make: Callable[[da.Array], da.Array]) -> None:
    array = make(chunked(blobs()))
    n, unknown, names = array.numblocks[0], np.isnan(array.shape[0]), tasks_of(array)
    assert names["surveyblock"] == n
    assert names["estep"] == n * PASSES
    assert names["countblock"] == n * unknown
    assert names["parameters"] == 1 + PASSES + unknown
    assert names["merge"] == names["parameters"] * (3 if n > 8 else 1)
    assert names.keys() <= OURS | {"countblock"}
    assert not open_source(array).graph


def test_every_chunk_is_a_task_of_its_own() -> None:
    """However many there are: what chunks share would else lie in memory for all chunks of a task."""
    assert tasks_of(chunked(blobs(), (12, 3)))["estep"] == 100 * PASSES


def test_a_store_is_one_node_that_all_chunks_share(tmp_path: Path) -> None:
    array = da.from_zarr(write_zarr(tmp_path, blobs(), 100))
    source = open_source(array)
    assert len(source.graph) == 1
    names = tasks_of(array)
    assert names["estep"] == 12 * PASSES
    assert sum(count for name, count in names.items() if name not in OURS) == 0


def test_what_chunks_share_runs_once_a_pass() -> None:
    sums, made = [], Counter()

    def make(rows: np.ndarray, block_id: tuple[int, ...]) -> np.ndarray:
        made[block_id[0]] += 1
        return rows

    def total(rows: np.ndarray, axis: Any, keepdims: bool) -> np.ndarray:
        sums.append(len(rows))
        return rows.sum(axis=axis, keepdims=keepdims)

    array = chunked(blobs()).map_blocks(make, meta=np.empty((0, 0)))
    centre = da.reduction(array, np.sum, total, axis=0, dtype=float, meta=np.empty((0,))) / 1200
    with dask.config.set(scheduler="synchronous"):
        centre.compute()
        once = len(sums)
        sums.clear()
        made.clear()
        model = fit(array - centre)
    assert once > 0
    assert len(sums) == once * (PASSES + 1)
    assert made == dict.fromkeys(range(12), PASSES + 1)
    assert_close(model, fit(blobs() - blobs().mean(axis=0)), 1e-11)


# -- one chunk at a time ---------------------------------------------------------------------------------------


class Crowd:
    """Makes chunks, and raises where one that this thread made before is still alive."""

    def __init__(self) -> None:
        self.alive: Counter[int] = Counter()
        self.most, self.made = 0, 0
        self.lock = threading.Lock()

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        made, thread = rows.copy(), threading.get_ident()
        with self.lock:
            self.alive[thread] += 1
            self.made += 1
            self.most = max(self.most, sum(self.alive.values()))
        weakref.finalize(made, self._gone, thread)
        if self.alive[thread] > 1:
            raise AssertionError(f"{self.alive[thread]} chunks are alive in one thread")
        return made

    def _gone(self, thread: int) -> None:
        self.alive[thread] -= 1

    def __dask_tokenize__(self) -> int:
        return id(self)


@pytest.mark.parametrize(("scheduler", "threads"), [("synchronous", 1), ("threads", 1), ("threads", 2)])
@pytest.mark.parametrize("known", [True, False])
def test_a_thread_holds_one_chunk(scheduler: str, threads: int, known: bool) -> None:
    crowd = Crowd()
    array = da.from_array(blobs(4000), chunks=(50, 3)).map_blocks(crowd, meta=np.empty((0, 0)))
    with dask.config.set(scheduler=scheduler, num_workers=threads):
        model = fit(array if known else forgotten(array))
        model.score(array)
    assert crowd.made == 80 * (model.n_passes_ + 1)
    assert crowd.most <= threads
    assert not any(crowd.alive.values())


def test_two_chunks_in_a_thread_are_seen() -> None:
    """The guard can tell: a graph that asks for two at once trips over it."""
    array = da.from_array(blobs(), chunks=(100, 3)).map_blocks(Crowd(), meta=np.empty((0, 0)))
    with dask.config.set(scheduler="synchronous"), pytest.raises(AssertionError, match="2 chunks are alive in one"):
        fit(array.rechunk((200, 3)))


# -- how often the user's graph runs ---------------------------------------------------------------------------


class Noted:
    """Rows, or a function on chunks of rows, that appends a line to a file for every call, in whatever process."""

    def __init__(self, rows: np.ndarray, log: Path) -> None:
        self.rows, self.log = rows, log
        self.shape, self.dtype, self.ndim = rows.shape, rows.dtype, rows.ndim

    def _note(self, line: str) -> None:
        descriptor = os.open(self.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(descriptor, f"{line}\n".encode())
        finally:
            os.close(descriptor)

    def __getitem__(self, index: Any) -> np.ndarray:
        self._note(" ".join(str(part.start) for part in index))
        return self.rows[index]

    def __call__(self, rows: np.ndarray, block_id: tuple[int, ...]) -> np.ndarray:
        self._note(" ".join(map(str, block_id)))
        return rows

    def calls(self) -> Counter[str]:
        return Counter(self.log.read_text().splitlines())


@pytest.mark.parametrize("columns", [3, 2])
@pytest.mark.parametrize("known", [True, False])
@everywhere
def test_a_pass_asks_for_each_chunk_of_an_array_once(tmp_path: Path, columns: int, known: bool, scheduler: str) -> None:
    noted = Noted(blobs(), tmp_path / "log")
    array = da.from_array(noted, chunks=(100, columns), name="noted", meta=np.empty((0, 0)))
    with dask.config.set(scheduler=scheduler, num_workers=2):
        model = fit(array if known else forgotten(array))
    assert model.n_passes_ == PASSES + 2 - known
    assert noted.calls() == {
        f"{row} {column}": model.n_passes_ for row in range(0, 1200, 100) for column in range(0, 3, columns)
    }


@pytest.mark.parametrize("known", [True, False])
@everywhere
def test_a_pass_runs_each_link_of_a_chain_once(tmp_path: Path, known: bool, scheduler: str) -> None:
    first, second = Noted(blobs(), tmp_path / "first"), Noted(blobs(), tmp_path / "second")
    array = da.from_array(blobs(), chunks=(100, 3))
    for noted in (first, second):
        array = (array + 1).map_blocks(noted, name=noted.log.name, meta=np.empty((0, 0)))
    with dask.config.set(scheduler=scheduler, num_workers=2):
        model = fit(array if known else forgotten(array))
    for noted in (first, second):
        assert noted.calls() == {f"{i} 0": model.n_passes_ for i in range(12)}


@pytest.mark.parametrize("change", [lambda x: x, lambda x: x[x[:, 0] > -1e9]], ids=["plain", "mask"])
@everywhere
def test_a_pass_reads_each_chunk_of_a_store_once(tmp_path: Path, change: Any, scheduler: str) -> None:
    path = write_zarr(tmp_path, blobs(), 50)
    store = counted(path)
    array = change(da.from_zarr(store, chunks=(100, 3), name="counted-store"))
    with dask.config.set(scheduler=scheduler, num_workers=2):
        model = fit(array)
    assert store.store.reads() == {(key, "None"): model.n_passes_ for key in keys_of(path)}


def test_every_scheduler_asks_for_each_chunk_once(tmp_path: Path) -> None:
    """One fit in processes stands for the long form above: a chain on column chunks whose rows nobody has counted."""
    noted, chain = Noted(blobs(), tmp_path / "rows"), Noted(blobs(), tmp_path / "chain")
    array = da.from_array(noted, chunks=(300, 2), name="noted", meta=np.empty((0, 0)))
    array = forgotten((array + 0).map_blocks(chain, name="chain", meta=np.empty((0, 0))))
    with dask.config.set(scheduler="processes", num_workers=2):
        model = fit(array)
    assert sum(noted.calls().values()) == sum(chain.calls().values()) == 8 * model.n_passes_ == 8 * (PASSES + 2)
    assert set(noted.calls().values()) == set(chain.calls().values()) == {model.n_passes_}


def test_a_pass_asks_for_no_chunk_that_was_cut_away(tmp_path: Path) -> None:
    noted = Noted(blobs(), tmp_path / "log")
    array = da.from_array(noted, chunks=(100, 3), name="noted", meta=np.empty((0, 0)))
    fit((array * 1)[200:900] + 0 * array[:100].sum(axis=0))
    assert noted.calls() == {f"{row} 0": PASSES + 1 for row in (0, *range(200, 900, 100))}


def test_scores_ask_for_each_chunk_once(tmp_path: Path) -> None:
    noted, model = Noted(blobs(), tmp_path / "log"), fit(blobs())
    array = da.from_array(noted, chunks=(100, 3), name="noted", meta=np.empty((0, 0)))
    for i, use in enumerate([model.score, model.bic, lambda x: model.predict(x).compute()], start=1):
        use(array if i != 1 else forgotten(array))
        assert set(noted.calls().values()) == {i}


# -- nothing runs on the client --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make", [lambda x: x, forgotten, lambda x: x[x[:, 0] > -1e9], lambda x: x - x.mean(axis=0), lambda x: x[::-1][:900]]
)
@pytest.mark.parametrize("scheduler", ["synchronous", "threads"])
def test_nothing_is_computed_but_in_our_passes(
    make: Callable[[da.Array], da.Array], scheduler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = [False]

    def watched(rows: np.ndarray) -> np.ndarray:
        assert inside[0], "a chunk was made outside of a pass"
        return rows

    def pass_of(*args: Any, **kwargs: Any) -> Any:
        inside[0] = True
        try:
            return map_reduce(*args, **kwargs)
        finally:
            inside[0] = False

    def forbidden(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("computed or persisted behind the user's back")

    map_reduce = LocalExecutor.map_reduce
    array = make(chunked(blobs()).map_blocks(watched, meta=np.empty((0, 0))))
    monkeypatch.setattr(LocalExecutor, "map_reduce", pass_of)
    for place in (dask, dask.base, da.core):
        for name in ("compute", "persist"):
            if hasattr(place, name):
                monkeypatch.setattr(place, name, forbidden)
    for name in ("compute", "persist", "compute_chunk_sizes", "__array__"):
        monkeypatch.setattr(da.Array, name, forbidden)
    with dask.config.set(scheduler=scheduler):
        model = mixture(max_iter=2, tol=0.0).fit(array)
        assert np.isfinite(model.score(array))
        model.predict(array)


def remarks(array: Any, caplog: pytest.LogCaptureFixture) -> list[str]:
    """The lines of a fit that speak of the user's own graph."""
    caplog.clear()
    with caplog.at_level(logging.INFO, "streamgmm"):
        fit(array, max_iter=1)
    return [line for line in caplog.messages if "runs its own graph again" in line]


@pytest.mark.parametrize(
    ("change", "tasks"),
    [
        (lambda x: x + 1, 2),
        (lambda x: (x + 1).map_blocks(np.abs), 3),
        (lambda x: x - x.mean(axis=0), None),
        (lambda x: x.rechunk((240, 3)), None),
    ],
)
def test_one_line_says_that_each_read_runs_a_graph(
    tmp_path: Path, change: Any, tasks: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    for array in (da.from_zarr(write_zarr(tmp_path, blobs(), 100)), chunked(blobs())):
        (line,) = remarks(change(array), caplog)
        assert "write it to a store first" in line
        assert tasks is None or f"about {tasks} tasks a chunk" in line


def test_no_line_where_a_read_is_a_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    split = zarr.create_array(tmp_path / "split.zarr", data=blobs(), chunks=(100, 2))
    plain = da.from_zarr(write_zarr(tmp_path, blobs(), 100))
    for rows in (plain, da.from_zarr(split), da.from_array(blobs(), chunks=(100, 3)), chunked(blobs()), blobs()):
        assert remarks(rows, caplog) == []


# -- a cluster -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    """A cluster of threads, which nobody uses who does not name it."""
    with (
        LocalCluster(
            n_workers=1, threads_per_worker=2, processes=False, dashboard_address="127.0.0.1:0", silence_logs=50
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client


@pytest.mark.parametrize("change", [lambda x: x, lambda x: x - x.mean(axis=0), lambda x: x[x[:, 0] > -1e9]])
def test_persisted_rows_are_used_where_they_lie(client: Client, change: Any) -> None:
    array = chunked(blobs())
    expected = fit(change(array))
    (persisted,) = dask.persist(array, scheduler=client)
    with client.as_current():
        model = fit(change(persisted))
        labels = model.predict(persisted).compute()
    assert_identical(model, expected)
    np.testing.assert_array_equal(labels, expected.predict(blobs()))


@pytest.mark.parametrize("scheduler", ["synchronous", "threads", "processes"])
@pytest.mark.parametrize("change", [lambda x: x, lambda x: x + 1, lambda x: x[x[:, 0] > -1e9]])
def test_persisted_rows_are_refused_elsewhere(client: Client, change: Any, scheduler: str) -> None:
    (persisted,) = dask.persist(chunked(blobs()), scheduler=client)
    with (
        dask.config.set(scheduler=scheduler, num_workers=1),
        pytest.raises(SchedulerError, match="holds results in the memory of a cluster, but dask is set to run on this"),
    ):
        fit(change(persisted))


def test_a_client_can_be_given_as_the_scheduler(client: Client) -> None:
    """One that is not dask's default client; another one is not asked."""
    with dask.config.set(scheduler=client):
        assert_identical(fit(chunked(blobs())), fit(chunked(blobs())))


def test_a_cluster_asks_for_each_chunk_once_and_keeps_nothing(client: Client, tmp_path: Path) -> None:
    noted = Noted(blobs(), tmp_path / "log")
    array = da.from_array(noted, chunks=(100, 3), name="noted", meta=np.empty((0, 0)))
    with client.as_current():
        model = fit(forgotten(array))
    assert noted.calls() == {f"{row} 0": model.n_passes_ for row in range(0, 1200, 100)}
    deadline = monotonic() + 30
    while client.futures and monotonic() < deadline:  # they are released in the client's own time
        sleep(0.01)
    assert not client.futures


@pytest.mark.parametrize(
    "change", [lambda x: x, lambda x: x + 1, lambda x: x - x.mean(axis=0), lambda x: x[x[:, 0] > -1e9]]
)
def test_a_store_that_was_written_anew_is_read_anew(client: Client, tmp_path: Path, change: Any) -> None:
    """dask names a store by its path: results of the old one, still in the cluster's memory, have the same names."""
    rows = blobs()
    path = write_zarr(tmp_path, rows, 100)
    array = da.from_zarr(path)
    with client.as_current():
        held = dask.persist(array, change(array), change(array).sum(axis=0))
        assert_close(fit(change(array)), fit(change(da.from_array(rows, chunks=(100, 3)))), 1e-11)
        zarr.open_array(path)[...] = 2.0 * rows
        again = da.from_zarr(path)
        assert again.name == array.name
        found = fit(change(again))
    assert_close(found, fit(change(da.from_array(2.0 * rows, chunks=(100, 3)))), 1e-11)
    del held
