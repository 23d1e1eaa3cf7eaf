"""Clusters, and what other processes import: blocks of nothing but a number, and a store that is watched and held.

Nothing here is slow to import, as a file of tests is: each process of a pool or a cluster pays for it.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import dask
import numpy as np
import threadpoolctl
import zarr
from distributed import Client, LocalCluster
from zarr.storage import LocalStore

from streamgmm.errors import SourceError
from streamgmm.protocols import Piece


@contextmanager
def local_cluster(n_workers: int, threads: int = 1, *, processes: bool = True, **options: Any) -> Iterator[Client]:
    """A client of a new cluster on this machine, in force only where a test says ``with client.as_current()``."""
    where = {"host": "127.0.0.1"} if processes else {}
    with (
        # else the cluster gives a worker up that it misses 15 s after a death, though that was the second one
        dask.config.set({"distributed.deploy.lost-worker-timeout": "1 hour"}),
        LocalCluster(
            n_workers=n_workers,
            threads_per_worker=threads,
            processes=processes,
            dashboard_address="127.0.0.1:0",
            silence_logs=50,
            **where,
            **options,
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        client.run(import_module, "streamgmm.pilot")  # no deadline of a test is spent on imports
        client.run(import_module, __name__)
        yield client


def wait_until(reached: Callable[[], Any], seconds: float = 60.0) -> Any:
    """What ``reached`` returns once that is true; AssertionError where it takes too long."""
    deadline = time.monotonic() + seconds
    while not (found := reached()):
        assert time.monotonic() < deadline, f"still waiting for {reached} after {seconds:g} s"
        time.sleep(0.02)
    return found


def note(path: Path, line: str) -> None:
    """Append a line, whole whoever else writes."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, f"{line}\n".encode())
    finally:
        os.close(descriptor)


def noted(path: Path) -> list[str]:
    with suppress(FileNotFoundError):  # it may go between two looks
        return path.read_text().splitlines()
    return []


def blas_threads() -> list[int]:
    """How many threads each BLAS of this process would take."""
    import scipy.linalg  # noqa: F401

    return [pool["num_threads"] for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"]


def two_blas_threads() -> None:
    """So that a change is seen, whatever this machine and its environment have."""
    blas_threads()
    threadpoolctl.threadpool_limits(2, user_api="blas")


# -- blocks of nothing ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tree:
    """Adds by writing down what was added to what: neither commutative nor associative."""

    shape: Any

    def __add__(self, other: Tree) -> Tree:
        return Tree((self.shape, other.shape))


@dataclass(frozen=True)
class Numbered:
    """A block that holds nothing but its number, and the values of its needs once it is opened."""

    start: int
    needs: Sequence[Hashable] = ()
    values: tuple[Any, ...] = ()

    n_features = 1

    @property
    def stop(self) -> int:
        return self.start + 1

    def opened(self, values: Sequence[Any]) -> Numbered:
        return replace(self, values=tuple(values))

    def pieces(self) -> Iterator[Piece]:
        yield Piece(np.array([[float(self.start)]]), None)

    def locate(self, row: int, column: int) -> str:
        return f"row {row}"


def leaf(shared: Any, block: Numbered) -> Tree:
    return Tree(f"{shared}{block.start}")


def of_values(shared: None, block: Numbered) -> Tree:
    return Tree((block.start, block.values))


def pair(one: Any, other: Any) -> tuple[Any, Any]:
    return one, other


def note_process(path: Path) -> None:
    note(path, str(os.getpid()))


def find_nothing() -> None:
    raise SourceError("nothing is here")


# -- what goes wrong in a process ----------------------------------------------------------------------------------


def die(victim: Path) -> None:
    """The first worker that comes here dies."""
    try:
        victim.touch(exist_ok=False)
    except FileExistsError:
        return
    os._exit(1)


def kernel_that_dies(shared: None, block: Numbered) -> Tree:
    if block.start == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return Tree(block.start)


def kernel_that_hangs(shared: Path, block: Numbered) -> Tree:
    """Block 5 waits for ever; block 7 raises once it does, where it is asked to."""
    if block.start == 5:
        note(shared / "hangs", str(os.getpid()))
        threading.Event().wait()
    if block.start == 7 and (shared / "raise").exists():
        wait_until((shared / "hangs").exists)
        raise SourceError("block 7 is bad")
    return Tree(block.start)


def kernel_that_meets(shared: Path, block: Numbered) -> Tree:
    """Ends once two processes have imported what they need."""
    note(shared / "met", str(os.getpid()))
    wait_until(lambda: len(set(noted(shared / "met"))) == 2)
    return Tree(block.start)


# -- a store -------------------------------------------------------------------------------------------------------


class WatchedStore(LocalStore):
    """Notes "KEY PROCESS" of each chunk read in the file ``reads`` beside it.

    Where a file ``hold`` says "KEY TIMES", that read of that chunk and later ones wait as long as the file is there.
    """

    async def get(self, key: str, *arguments: Any, **options: Any) -> Any:
        if key.startswith("c/"):
            reads, hold = self.root.with_name("reads"), self.root.with_name("hold")
            note(reads, f"{key} {os.getpid()}")
            times = sum(line.split()[0] == key for line in noted(reads))
            while (held := noted(hold)) and held[0].split()[0] == key and times >= int(held[0].split()[1]):
                await asyncio.sleep(0.02)
        return await super().get(key, *arguments, **options)


class HereOnlyStore(WatchedStore):
    """A store that is not there in other processes: in those that a file ``blind`` names, or in all of them."""

    def __reduce__(self) -> Any:
        return seen_elsewhere, (self.root,)


def seen_elsewhere(root: Path) -> WatchedStore:
    blind = noted(root.with_name("blind"))
    hidden = not blind or str(os.getpid()) in blind
    return WatchedStore(root.with_name("nowhere") if hidden else root, read_only=True)


def watched_array(
    folder: Path, rows: np.ndarray, chunk_rows: int, kind: type[WatchedStore] = WatchedStore
) -> zarr.Array[Any]:
    """Rows (n, d) in a store that is watched, open for reading."""
    root = Path(folder) / "rows.zarr"
    array = zarr.create_array(LocalStore(root), shape=rows.shape, dtype=rows.dtype, chunks=(chunk_rows, rows.shape[1]))
    array[...] = rows
    return zarr.open_array(kind(root, read_only=True), mode="r")


def readers(array: zarr.Array[Any], key: str) -> list[int]:
    """The processes that read the chunk, in order."""
    lines = [line.split() for line in noted(array.store.root.with_name("reads"))]
    return [int(process) for found, process in lines if found == key]


@contextmanager
def held(array: zarr.Array[Any], key: str, times: int) -> Iterator[Path]:
    """Hold the read of this chunk the so-manieth time, and each after it, while this is open."""
    path = array.store.root.with_name("hold")
    temporary = path.with_name("hold.new")
    temporary.write_text(f"{key} {times}\n")
    temporary.replace(path)
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)
