"""How work runs: every executor equals the serial one, which equals the tree as it is written down here."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import dask
import dask.multiprocessing
import dask.threaded
import numpy as np
import pytest
from clusters import (
    Numbered,
    Tree,
    blas_threads,
    find_nothing,
    leaf,
    local_cluster,
    note,
    note_process,
    noted,
    of_values,
    pair,
    two_blas_threads,
    wait_until,
)
from dask._task_spec import DataNode, Task, TaskRef
from distributed import Client
from hypothesis import given
from hypothesis import strategies as st

from streamgmm.errors import DataError, SourceError
from streamgmm.executors import LocalExecutor, SerialExecutor, threaded_get
from streamgmm.executors.distributed import DistributedExecutor
from streamgmm.executors.local import ProcessExecutor
from streamgmm.executors.serial import span_of

SIZES = (1, 7, 8, 9, 64, 65, 73, 513)
TASK_SIZES = (1, 8, 64, 512)

#: the first block, one in the middle and the last one, each with one error or two; in the long form with all of them
ERRORS = (DataError, SourceError, ZeroDivisionError, MemoryError, TimeoutError)
SHORT = {(0, DataError), (41, SourceError), (72, ZeroDivisionError), (41, MemoryError), (0, TimeoutError)}
BAD = [
    pytest.param(bad, error, marks=() if (bad, error) in SHORT else pytest.mark.long)
    for bad in (0, 41, 72)
    for error in ERRORS
]


def numbered(n: int) -> list[Numbered]:
    return [Numbered(i) for i in range(n)]


def expected_tree(leaves: list[Any]) -> Tree:
    """Groups of eight neighbours, added from the left, until one is left."""
    level = [Tree(value) for value in leaves]
    while len(level) > 1:
        above = []
        for i in range(0, len(level), 8):
            total, *rest = level[i : i + 8]
            for value in rest:
                total = total + value
            above.append(total)
        level = above
    return level[0]


def named(n: int, shared: str = "x") -> Tree:
    return expected_tree([f"{shared}{i}" for i in range(n)])


# -- every executor ------------------------------------------------------------------------------------------------


class ExecutorContract:
    """What every executor promises. Kernels here travel: what they saw comes back as a value, or is in a file."""

    #: how many blocks, and how many of them a task has
    sizes = SIZES
    task_sizes = TASK_SIZES

    @pytest.fixture
    def executor(self) -> Any:
        raise NotImplementedError

    def test_adds_by_the_fixed_tree_whatever_the_size_of_a_task(self, executor):
        for n in self.sizes:
            for blocks_per_task in self.task_sizes:
                sized = executor.sized(blocks_per_task)
                assert sized.capacity == executor.capacity
                assert sized.map_reduce(leaf, "y", numbered(n)) == named(n, "y"), (n, blocks_per_task)

    def test_equals_itself_when_run_again(self, executor):
        """Nothing of the call before is taken for a result of this one, though all but the shared value is the same."""
        for shared in ("a", "b", "a"):
            assert executor.map_reduce(leaf, shared, numbered(9)) == named(9, shared)

    @pytest.mark.parametrize(("bad", "error"), BAD)
    def test_an_error_of_the_kernel_keeps_its_type_and_its_words(self, executor, error, bad):
        def kernel(shared: None, block: Numbered) -> Tree:
            if block.start == bad:
                raise error(f"block {bad} is bad")
            return Tree(block.start)

        with pytest.raises(error, match=f"^block {bad} is bad$"):
            executor.sized(8).map_reduce(kernel, None, numbered(73))
        assert executor.map_reduce(leaf, "x", numbered(9)) == named(9)

    def test_shared_values_are_not_looked_into(self, executor):
        """dask would take tuples and keys inside them for tasks."""

        def kernel(shared: Any, block: Numbered) -> Tree:
            mapping, keys, array = shared
            return Tree((mapping == {"a": (len, "abc")}, keys == ["estep", ("estep", 0)], array.tolist()))

        shared = ({"a": (len, "abc")}, ["estep", ("estep", 0)], np.arange(3))
        assert executor.map_reduce(kernel, shared, numbered(9)) == expected_tree([(True, True, [0, 1, 2])] * 9)

    def test_every_block_runs_once(self, executor, tmp_path):
        def kernel(shared: Path, block: Numbered) -> Tree:
            note(shared, str(block.start))
            return Tree(0)

        executor.sized(8).map_reduce(kernel, tmp_path / "seen", numbered(73))
        assert sorted(int(line) for line in noted(tmp_path / "seen")) == list(range(73))

    def test_a_check_is_called_where_blocks_run(self, executor, tmp_path):
        """At least in one of the processes, which stands for the others of its machine."""

        def kernel(shared: None, block: Numbered) -> Tree:
            return Tree({os.getpid()})

        executor.everywhere([partial(note_process, tmp_path / "one"), partial(note_process, tmp_path / "other")])
        checked = set(noted(tmp_path / "one"))
        assert checked == set(noted(tmp_path / "other"))
        assert checked & {str(process) for process in processes_of(executor.map_reduce(kernel, None, numbered(65)))}

    def test_what_a_check_raises_comes_out_as_it_is(self, executor):
        with pytest.raises(SourceError, match=r"^nothing is here$"):
            executor.everywhere([find_nothing])
        assert executor.map_reduce(leaf, "x", numbered(9)) == named(9)


def processes_of(tree: Tree) -> set[int]:
    parts, found = [tree.shape], set()
    while parts:
        part = parts.pop()
        if isinstance(part, tuple):
            parts.extend(part)
        else:
            found |= part
    return found


class SameProcess:
    """What an executor of this process promises beside."""

    def test_shared_values_are_not_copied(self, executor):
        shared, seen = [np.arange(3)], []

        def kernel(shared: Any, block: Numbered) -> Tree:
            seen.append(shared)
            return Tree(block.start)

        executor.map_reduce(kernel, shared, numbered(9))
        assert len(seen) == 9
        assert all(value is shared for value in seen)


#: what values may look like to dask, and what they are made of
VALUES = [1.5, None, ("a", 0), ["a", ("b", 1)], {"a": (len, "abc")}, "a"]


def graph_of_values() -> dict[Any, Any]:
    """Each value as a node of its own, then a node that is made from two of them."""
    nodes: dict[Any, Any] = {("v", i): DataNode(("v", i), value) for i, value in enumerate(VALUES)}
    return {**nodes, "both": Task("both", pair, TaskRef(("v", 0)), TaskRef(("v", 5)))}


def value_of(key: Any) -> Any:
    return (VALUES[0], VALUES[5]) if key == "both" else VALUES[key[1]]


KEYS = [("v", 0), ("v", 1), ("v", 2), ("v", 3), ("v", 4), ("v", 5), "both"]


class WithGraph:
    """What an executor promises for blocks that are made from values of a dask graph."""

    @pytest.mark.parametrize("blocks_per_task", [1, 8, 64])
    def test_the_values_of_its_needs_arrive_at_each_block_in_their_order(self, executor, blocks_per_task):
        """None, one, several, the same one twice: whatever the blocks that share a task need."""
        rng = np.random.default_rng(8)
        needs = [tuple(KEYS[j] for j in rng.integers(len(KEYS), size=rng.integers(4))) for _ in range(73)]
        assert {len(keys) for keys in needs} == {0, 1, 2, 3}
        blocks = [Numbered(i, keys) for i, keys in enumerate(needs)]
        found = executor.sized(blocks_per_task).map_reduce(of_values, None, blocks, graph_of_values())
        assert found == expected_tree([(i, tuple(map(value_of, keys))) for i, keys in enumerate(needs)])

    def test_a_shared_node_runs_once_a_call(self, executor, tmp_path):
        def made() -> int:
            note(tmp_path / "made", "once")
            return 7

        blocks = [Numbered(i, ("made",)) for i in range(9)]
        for calls in (1, 2):
            found = executor.map_reduce(of_values, None, blocks, {"made": Task("made", made)})
            assert found == expected_tree([(i, (7,)) for i in range(9)])
            assert len(noted(tmp_path / "made")) == calls

    def test_an_error_of_a_shared_node_keeps_its_type_and_its_words(self, executor):
        def made() -> int:
            raise ZeroDivisionError("the node is bad")

        with pytest.raises(ZeroDivisionError, match=r"^the node is bad$"):
            executor.map_reduce(of_values, None, [Numbered(0, ("made",)), Numbered(1)], {"made": Task("made", made)})


class OtherProcesses:
    """What an executor of other processes promises beside."""

    sizes = (1, 9, 73)
    task_sizes = (1, 8)

    def test_blocks_run_elsewhere_and_on_one_blas_thread(self, executor):
        """Those processes have two each when nothing of ours runs: see two_blas_threads."""

        def kernel(shared: None, block: Numbered) -> Tree:
            return Tree((os.getpid(), *blas_threads()))

        found = executor.map_reduce(kernel, None, [Numbered(0)]).shape
        assert found[0] != os.getpid()
        assert set(found[1:]) == {1}

    @pytest.mark.long
    def test_adds_by_the_fixed_tree_of_many_blocks(self, executor):
        for n in SIZES:
            for blocks_per_task in TASK_SIZES:
                assert executor.sized(blocks_per_task).map_reduce(leaf, "y", numbered(n)) == named(n, "y")


class TestSerial(SameProcess, ExecutorContract):
    @pytest.fixture
    def executor(self):
        return SerialExecutor()


class TestSynchronous(SameProcess, WithGraph, ExecutorContract):
    @pytest.fixture
    def executor(self):
        return LocalExecutor(dask.get, 1)


class TestThreads(SameProcess, WithGraph, ExecutorContract):
    n_threads = 1

    @pytest.fixture
    def executor(self):
        with dask.config.set(num_workers=self.n_threads):
            yield LocalExecutor(threaded_get, self.n_threads)


class TestTwoThreads(TestThreads):
    n_threads = 2


class TestFourThreads(TestThreads):
    n_threads = 4


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPoolExecutor]:
    context = dask.multiprocessing.get_context()
    with ProcessPoolExecutor(2, mp_context=context, initializer=two_blas_threads) as pool:
        yield pool


class TestProcesses(OtherProcesses, WithGraph, ExecutorContract):
    @pytest.fixture
    def executor(self, pool):
        return ProcessExecutor(pool, 2, 60.0)


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with local_cluster(2) as client:
        client.run(two_blas_threads)
        yield client


class TestCluster(OtherProcesses, WithGraph, ExecutorContract):
    @pytest.fixture
    def executor(self, client):
        return DistributedExecutor(client, 60.0)

    def test_a_check_is_called_on_every_worker(self, client, executor, tmp_path):
        executor.everywhere([partial(note_process, tmp_path / "seen")])
        assert sorted(map(int, noted(tmp_path / "seen"))) == sorted(client.run(os.getpid).values())

    def test_blas_has_its_threads_again_after_a_task(self, client, executor):
        executor.map_reduce(leaf, "x", numbered(9))
        assert set(map(tuple, client.run(blas_threads).values())) == {(2,) * len(blas_threads())}


@pytest.fixture(scope="module")
def threads_client() -> Iterator[Client]:
    with local_cluster(2, 2, processes=False) as client:
        yield client


class TestClusterOfThreads(WithGraph, ExecutorContract):
    sizes = (1, 9, 73)
    task_sizes = (1, 8)

    @pytest.fixture
    def executor(self, threads_client):
        return DistributedExecutor(threads_client, 60.0)


@given(st.integers(1, 600), st.sampled_from([1, 8, 64, 512, 4096]))
def test_trees_of_any_size_are_the_same(n, blocks_per_task):
    assert SerialExecutor().map_reduce(leaf, "x", numbered(n)) == named(n)
    assert LocalExecutor(dask.get, 1, blocks_per_task).map_reduce(leaf, "x", numbered(n)) == named(n)


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
        found = LocalExecutor(threaded_get, 2).map_reduce(kernel, None, numbered(2))
    assert found == Tree((0, 1))


@pytest.mark.parametrize("where", ["pool", "client", "threads_client"])
def test_blocks_run_at_the_same_time_elsewhere(request, tmp_path, where):
    """Two blocks that wait for each other's file finish only if both run at once."""

    def kernel(shared: Path, block: Numbered) -> Tree:
        note(shared / str(block.start), "here")
        wait_until((shared / str(1 - block.start)).exists)
        return Tree(block.start)

    place = request.getfixturevalue(where)
    executor = ProcessExecutor(place, 2, 60.0) if where == "pool" else DistributedExecutor(place, 60.0)
    assert executor.map_reduce(kernel, tmp_path, numbered(2)) == Tree((0, 1))
