"""How work runs: every executor equals the serial one, which equals the tree as it is written down here."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import dask
import dask.threaded
import numpy as np
import pytest
from conftest import write_zarr
from hypothesis import given
from hypothesis import strategies as st

from streamgmm import GaussianMixture
from streamgmm.errors import DataError, SchedulerError
from streamgmm.executors import LocalExecutor, SerialExecutor, pick_executor
from streamgmm.executors.serial import span_of
from streamgmm.protocols import Piece

SIZES = [1, 7, 8, 9, 64, 65, 73, 513]


@dataclass(frozen=True)
class Tree:
    """Adds by writing down what was added to what: neither commutative nor associative."""

    shape: Any

    def __add__(self, other: Tree) -> Tree:
        return Tree((self.shape, other.shape))


@dataclass(frozen=True)
class Numbered:
    """A block that holds nothing but its number."""

    start: int

    @property
    def stop(self) -> int:
        return self.start + 1

    n_features = 1

    def pieces(self) -> Iterator[Piece]:
        yield Piece(np.array([[float(self.start)]]), None)

    def locate(self, row: int, column: int) -> str:
        return f"row {row}"


def leaf(shared: str, block: Numbered) -> Tree:
    return Tree(f"{shared}{block.start}")


def expected_tree(n: int, shared: str = "x") -> Tree:
    """Groups of eight neighbours, added from the left, until one is left."""
    level = [Tree(f"{shared}{i}") for i in range(n)]
    while len(level) > 1:
        above = []
        for i in range(0, len(level), 8):
            total, *rest = level[i : i + 8]
            for value in rest:
                total = total + value
            above.append(total)
        level = above
    return level[0]


class ExecutorContract:
    """What every executor promises."""

    def executor(self) -> Any:
        raise NotImplementedError

    @pytest.mark.parametrize("n", SIZES)
    def test_adds_by_the_fixed_tree(self, n):
        assert self.executor().map_reduce(leaf, "x", [Numbered(i) for i in range(n)]) == expected_tree(n)

    @pytest.mark.parametrize("blocks_per_task", [1, 8, 64, 512])
    @pytest.mark.parametrize("n", SIZES)
    def test_the_size_of_a_task_changes_nothing(self, n, blocks_per_task):
        executor = self.executor().sized(blocks_per_task)
        assert executor.n_threads == self.executor().n_threads
        assert executor.map_reduce(leaf, "y", [Numbered(i) for i in range(n)]) == expected_tree(n, "y")

    def test_equals_itself_when_run_again(self):
        executor, blocks = self.executor(), [Numbered(i) for i in range(73)]
        assert executor.map_reduce(leaf, "a", blocks) == expected_tree(73, "a")
        assert executor.map_reduce(leaf, "b", blocks) == expected_tree(73, "b")

    @pytest.mark.parametrize("error", [DataError, ZeroDivisionError, MemoryError])
    @pytest.mark.parametrize("bad", [0, 41, 72])
    def test_an_error_of_the_kernel_keeps_its_type(self, error, bad):
        def kernel(shared: None, block: Numbered) -> Tree:
            if block.start == bad:
                raise error(f"block {bad} is bad")
            return Tree(block.start)

        executor = self.executor()
        with pytest.raises(error, match=f"block {bad} is bad"):
            executor.map_reduce(kernel, None, [Numbered(i) for i in range(73)])
        assert executor.map_reduce(leaf, "x", [Numbered(i) for i in range(9)]) == expected_tree(9)

    def test_shared_values_reach_the_kernel_as_they_are(self):
        """Neither looked into nor copied: dask would take tuples and keys inside them for tasks."""
        shared = ({"a": (len, "abc")}, ["estep", ("estep", 0)], np.arange(3))
        seen: list[Any] = []

        def kernel(shared: Any, block: Numbered) -> Tree:
            seen.append(shared)
            return Tree(block.start)

        self.executor().map_reduce(kernel, shared, [Numbered(i) for i in range(9)])
        assert len(seen) == 9
        assert all(value is shared for value in seen)

    def test_every_block_runs_once(self):
        seen: list[int] = []

        def kernel(shared: None, block: Numbered) -> Tree:
            seen.append(block.start)
            return Tree(0)

        self.executor().sized(8).map_reduce(kernel, None, [Numbered(i) for i in range(73)])
        assert sorted(seen) == list(range(73))


class TestSerial(ExecutorContract):
    def executor(self):
        return SerialExecutor()


class TestSynchronous(ExecutorContract):
    def executor(self):
        return LocalExecutor(dask.get, 1)


class TestThreads(ExecutorContract):
    n_threads = 1

    @pytest.fixture(autouse=True)
    def _workers(self):
        with dask.config.set(num_workers=self.n_threads):
            yield

    def executor(self):
        return LocalExecutor(dask.threaded.get, self.n_threads)


class TestTwoThreads(TestThreads):
    n_threads = 2


class TestFourThreads(TestThreads):
    n_threads = 4


@given(st.integers(1, 600), st.sampled_from([1, 8, 64, 512, 4096]))
def test_trees_of_any_size_are_the_same(n, blocks_per_task):
    blocks = [Numbered(i) for i in range(n)]
    assert SerialExecutor().map_reduce(leaf, "x", blocks) == expected_tree(n)
    assert LocalExecutor(dask.get, 1, blocks_per_task).map_reduce(leaf, "x", blocks) == expected_tree(n)


@given(st.integers(1, 10**6))
def test_span_is_the_smallest_power_of_eight_that_covers(n):
    span = span_of(n)
    assert span >= n > span // 8 or (n, span) == (1, 1)
    assert span in {8**i for i in range(8)}


def test_blocks_run_at_the_same_time_on_threads():
    """Two blocks that wait for each other finish only if both run at once."""
    meeting = threading.Barrier(2, timeout=60)

    def kernel(shared: None, block: Numbered) -> Tree:
        meeting.wait()
        return Tree(block.start)

    with dask.config.set(num_workers=2):
        found = LocalExecutor(dask.threaded.get, 2).map_reduce(kernel, None, [Numbered(0), Numbered(1)])
    assert found == Tree((0, 1))


# -- which executor ----------------------------------------------------------------------------------------------


def custom_get(graph: Any, keys: Any, **options: Any) -> Any:
    raise AssertionError("this scheduler must not run")


@pytest.mark.parametrize("scheduler", ["processes", "multiprocessing", custom_get])
def test_an_unusable_scheduler_is_refused_for_a_store(scheduler):
    with dask.config.set(scheduler=scheduler), pytest.raises(SchedulerError, match="'threads' and 'synchronous'"):
        pick_executor(9, in_memory=False)


def test_the_refusal_names_the_scheduler():
    with dask.config.set(scheduler="processes"), pytest.raises(SchedulerError, match="multiprocessing"):
        pick_executor(9, in_memory=False)


def test_a_fit_of_a_store_refuses_processes(tmp_path):
    path = write_zarr(tmp_path, np.random.default_rng(0).normal(size=(600_000, 8)), 100_000)
    with dask.config.set(scheduler="processes"), pytest.raises(SchedulerError, match="scheduler='threads'"):
        GaussianMixture().fit(path)


@pytest.mark.parametrize("scheduler", ["processes", custom_get])
def test_rows_in_memory_run_on_threads_whatever_the_scheduler(scheduler):
    with dask.config.set(scheduler=scheduler, num_workers=3):
        executor = pick_executor(9, in_memory=True)
    assert isinstance(executor, LocalExecutor)
    assert executor.n_threads == 3
    rows = np.random.default_rng(0).normal(size=(600_000, 2))
    with dask.config.set(scheduler=scheduler, num_workers=2):
        model = GaussianMixture(1).fit(rows)
        labels = model.predict(rows)
    assert model.means_ == pytest.approx(rows.mean(axis=0)[None], abs=1e-12)
    assert labels.shape == (600_000,)


@pytest.mark.parametrize(
    ("settings", "threads"),
    [
        ({"scheduler": "synchronous", "num_workers": 5}, 1),
        ({"scheduler": "threads", "num_workers": 5}, 5),
        ({"scheduler": "single-threaded"}, 1),
        ({"num_workers": 3}, 3),
    ],
)
def test_the_scheduler_in_force_is_used(settings, threads):
    with dask.config.set(**settings):
        assert pick_executor(9, in_memory=False).n_threads == threads


def test_one_block_runs_in_the_calling_thread():
    assert isinstance(pick_executor(1, in_memory=False), SerialExecutor)


def test_the_pool_that_dask_was_given_is_used():
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(3) as pool, dask.config.set(pool=pool):
        assert pick_executor(9, in_memory=False).n_threads == 3
