"""What is read: each pass reads each chunk exactly once, counted on disk, in whatever thread or process reads it."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pytest
import zarr
from conftest import write_zarr
from zarr.abc.store import ByteRequest
from zarr.storage import LocalStore

from streamgmm import GaussianMixture, open_source

PASSES = 3


class CountingStore(LocalStore):
    """A local store that appends a line to a file beside it for every chunk that is asked for.

    The file is opened for appending each time, so that copies of the store in other processes count too.
    """

    @property
    def log(self) -> Path:
        return self.root.with_name(self.root.name + ".log")

    def _count(self, key: str, byte_range: ByteRequest | None) -> None:
        if key.startswith("c/") or "/c/" in key:
            descriptor = os.open(self.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            try:
                os.write(descriptor, f"{key} {byte_range}\n".encode())
            finally:
                os.close(descriptor)

    async def get(self, key: str, prototype: Any = None, byte_range: ByteRequest | None = None) -> Any:
        self._count(key, byte_range)
        return await super().get(key, prototype, byte_range)

    def get_sync(self, key: str, *, prototype: Any = None, byte_range: ByteRequest | None = None) -> Any:
        self._count(key, byte_range)
        return super().get_sync(key, prototype=prototype, byte_range=byte_range)

    def reads(self) -> Counter[tuple[str, str]]:
        """How often each part of each chunk was read so far; a whole chunk has the part "None"."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return Counter(tuple(line.split(" ", 1)) for line in lines)  # type: ignore[misc]


def counted(path: Path) -> zarr.Array[Any]:
    """The array at ``path``, whose reads are counted from here on."""
    return zarr.open_array(CountingStore(path, read_only=True), mode="r")


def keys_of(path: Path) -> set[str]:
    """The keys of the chunks that lie on disk."""
    return {str(file.relative_to(path)) for file in (path / "c").rglob("*") if file.is_file()}


def fit(rows: Any, **hyper: Any) -> GaussianMixture:
    """A fit of exactly PASSES passes after the pilot."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return GaussianMixture(3, max_iter=PASSES, tol=0.0, solver="em", random_state=0, **hyper).fit(rows)


@pytest.fixture
def rows() -> np.ndarray:
    rng = np.random.default_rng(3)
    return rng.normal(size=(1_003, 4)) + 4.0 * rng.integers(3, size=(1_003, 1))


@pytest.mark.parametrize("scheduler", ["synchronous", "threads"])
@pytest.mark.parametrize(("chunk_rows", "block_rows"), [(50, 50), (50, 200), (17, 34), (1_003, 1_003), (59, 59 * 17)])
def test_a_pass_reads_each_chunk_once(tmp_path, rows, chunk_rows, block_rows, scheduler):
    path = write_zarr(tmp_path, rows, chunk_rows)
    array = counted(path)
    with dask.config.set(scheduler=scheduler, num_workers=3):
        model = fit(open_source(array, block_rows=block_rows), n_init=2)
    assert model.n_passes_ == PASSES + 1
    assert array.store.reads() == {(key, "None"): model.n_passes_ for key in keys_of(path)}
    assert len(keys_of(path)) == -(-len(rows) // chunk_rows)


@pytest.mark.parametrize("block_rows", [120, 360])
def test_a_pass_reads_each_shard_once(tmp_path, rows, block_rows):
    """Whole shards come in one read. The ragged last one comes as its index and its chunks, each once a pass."""
    path = write_zarr(tmp_path, rows, 30, 120)
    array = counted(path)
    model = fit(open_source(array, block_rows=block_rows))
    last = f"c/{(len(rows) - 1) // 120}/0"
    reads = array.store.reads()
    whole = {key for key, part in reads if part == "None"}
    assert whole == keys_of(path) - {last}
    assert len(keys_of(path)) == 9
    assert set(reads.values()) == {model.n_passes_}
    assert sum(key == last for key, _ in reads) == 1 + 2  # the index, and 43 rows in chunks of 30


def test_the_default_block_is_a_whole_number_of_shards(tmp_path, rows):
    path = write_zarr(tmp_path, rows[:960], 30, 120)
    array = counted(path)
    model = fit(array)
    assert array.store.reads() == {(key, "None"): model.n_passes_ for key in keys_of(path)}


def test_columns_split_over_chunks_are_read_once(tmp_path, rows):
    path = tmp_path / "split.zarr"
    array = zarr.create_array(path, shape=rows.shape, chunks=(100, 3), dtype="float64")
    array[...] = rows
    array = counted(path)
    model = fit(open_source(array, block_rows=300))
    assert len(keys_of(path)) == 11 * 2
    assert array.store.reads() == {(key, "None"): model.n_passes_ for key in keys_of(path)}


def test_blocks_that_cut_chunks_read_them_more_than_once(tmp_path, rows):
    """The count can fail: where a block is no multiple of a chunk, the chunks that it cuts are read twice a pass."""
    array = counted(write_zarr(tmp_path, rows, 50))
    model = fit(open_source(array, block_rows=75))
    assert set(array.store.reads().values()) == {model.n_passes_, 2 * model.n_passes_}


def test_opening_and_planning_read_nothing(tmp_path, rows):
    array = counted(write_zarr(tmp_path, rows, 50))
    source = open_source(array)
    assert (source.n_rows, source.n_features, source.block_rows % 50) == (1_003, 4, 0)
    assert not array.store.reads()


def test_given_starts_and_score_read_once_too(tmp_path, rows):
    path = write_zarr(tmp_path, rows, 50)
    model = fit(rows)
    array = counted(path)
    model.score(array)
    assert array.store.reads() == {(key, "None"): 1 for key in keys_of(path)}
    fit(open_source(array, block_rows=100), weights_init=model.weights_, means_init=model.means_,
        precisions_init=model.precisions_)  # fmt: skip
    assert array.store.reads() == {(key, "None"): 1 + PASSES + 1 for key in keys_of(path)}
