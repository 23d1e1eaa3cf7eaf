"""A pass over a store beside what it cannot do without: the same chunks read by a bare loop, and the E-step in memory.

    python benchmarks/reading.py chunks      # 1 GB in 100 and in 20,000 chunks, and in shards
    python benchmarks/reading.py many        # 100,000 chunks: tasks, the graph, and what a pass costs outside its tasks
    python benchmarks/reading.py sizes       # 1, 2, 4 and 8 GB: seconds per GB; writes 15 GB
    python benchmarks/reading.py cluster     # one worker with two threads beside one with one

    python benchmarks/reading.py chunks --gigabytes 0.02      # a short form
    python benchmarks/reading.py sizes --directory /data      # keeps the stores there and uses them again

A bare loop takes each chunk, or each whole shard, with zarr in as many threads as the pass, and drops it. Every store
is read once before it is timed. All that is compared takes turns in one run; each figure is a median over the rounds.
NO stands where a figure is not within what is asked.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import cloudpickle
import dask
import numpy as np
import zarr
from cluster import LOOPBACK, seconds_of
from distributed import Client, LocalCluster
from floor import bare_read, seconds, unit_clusters
from peers import GRID

from streamgmm import open_source
from streamgmm.executors import executor_for, single_blas_thread
from streamgmm.executors.graph import reduction
from streamgmm.kernel import Scorer, e_step, prepare
from streamgmm.params import MixtureParams

D, K, THREADS = 8, 16, 2
ROW_BYTES = 8 * D
#: A pass over the bare loop and the E-step in memory.
LARGEST_RATIO = 1.2
MOST_TASKS, MOST_GRAPH_BYTES, MOST_SECONDS_OUTSIDE = 4_096, 10_000_000, 1.0
#: The largest over the smallest of the seconds per GB of different sizes.
LARGEST_SPREAD = 1.1
#: Two threads of a worker over one, from (8, 16) up.
LEAST_GAIN = 1.5


@dataclass(frozen=True)
class Layout:
    """How rows lie in a store. rows_per_shard: None where chunks lie in files of their own."""

    name: str
    chunk_rows: int
    rows_per_shard: int | None = None

    def write(self, folder: Path, gigabytes: float) -> Path:
        """The store, written a shard or some chunks at a time; one that is there already is used again."""
        path = folder / f"{self.name.replace(' ', '-')}-{gigabytes:g}GB.zarr"
        if path.exists():
            return path
        n = round(gigabytes * 1e9 / ROW_BYTES)
        rows, _ = unit_clusters(D, K, 64)
        unfinished = path.with_suffix(".part")
        shards = None if self.rows_per_shard is None else (self.rows_per_shard, D)
        array = zarr.create_array(
            unfinished, shape=(n, D), chunks=(self.chunk_rows, D), shards=shards, dtype="float64", overwrite=True
        )
        unit = self.rows_per_shard or self.chunk_rows
        step = max(1, len(rows) // unit) * unit
        for start in range(0, n, step):
            array[start : start + step] = rows[np.arange(start, min(start + step, n)) % len(rows)]
        unfinished.rename(path)
        return path


def layouts(gigabytes: float) -> list[Layout]:
    """100 chunks, 20,000 chunks, and 20 shards of 50 chunks each, for 1 GB; as large chunks for other sizes."""
    n = round(1e9 / ROW_BYTES)
    shard = n // 20 // 50 * 50
    found = [Layout("100 chunks", n // 100), Layout("20,000 chunks", n // 20_000), Layout("shards", shard // 50, shard)]
    return [layout for layout in found if (layout.rows_per_shard or layout.chunk_rows) * ROW_BYTES < gigabytes * 1e9]


def bare_loop(path: Path, layout: Layout) -> float:
    return bare_read(path, THREADS, layout.rows_per_shard or layout.chunk_rows)


def model() -> tuple[Scorer, ...]:
    _, params = unit_clusters(D, K, 1)
    return (prepare(params, params.frame()),)


def in_turn(timed: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Median seconds by what is timed; each is done once before."""
    for call in timed.values():
        call()
    found: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(rounds):
        for name, call in timed.items():
            found[name].append(call())
    return {name: median(values) for name, values in found.items()}


def verdict(within: bool) -> str:
    return "yes" if within else "NO"


# -- chunks and shards -------------------------------------------------------------------------------------------------


def chunks(folder: Path, gigabytes: float, rounds: int) -> None:
    scorers = model()
    print(f"{gigabytes:g} GB, (d, k) = ({D}, {K}), {THREADS} threads, zarr's default compression")
    print(f"{'':>14} {'pass':>8} {'bare loop':>9} {'E-step':>8} {'ratio':>7} met")
    for layout in layouts(gigabytes):
        path = layout.write(folder, gigabytes)
        rows = zarr.open_array(path, mode="r")[:]
        found = in_turn(
            {
                "pass": partial(seconds_of, "threads", e_step, scorers, str(path), THREADS),
                "bare": partial(bare_loop, path, layout),
                "E-step": partial(seconds_of, "threads", e_step, scorers, rows, THREADS),
            },
            rounds,
        )
        ratio = found["pass"] / (found["bare"] + found["E-step"])
        shown = f"{found['pass']:8.2f} {found['bare']:9.2f} {found['E-step']:8.2f} {ratio:7.2f}"
        print(f"{layout.name:>14} {shown} {verdict(ratio <= LARGEST_RATIO)}", flush=True)


# -- very many chunks --------------------------------------------------------------------------------------------------


def count_blocks(shared: Any, block: Any) -> np.ndarray:
    """A pass that reads nothing: all that it costs is outside of its tasks."""
    return np.ones(1, dtype=int)


def many(folder: Path, n_chunks: int, rounds: int) -> None:
    path = folder / f"{n_chunks}-chunks.zarr"
    zarr.create_array(path, shape=(n_chunks * 100, D), chunks=(100, D), dtype="float64", overwrite=True)
    source, scorers = open_source(path, missing_chunks="fill"), model()
    with dask.config.set(scheduler="threads", num_workers=THREADS), executor_for(source) as executor:
        outside = median(
            seconds(lambda: executor.map_reduce(count_blocks, scorers, source.blocks(), source.graph))
            for _ in range(rounds)
        )
    work = reduction(e_step, scorers, source.blocks(), source.graph, 1, guarded=True)
    graph, tasks = len(cloudpickle.dumps(work.graph)), len(work.runs)
    print(f"{n_chunks:,} chunks: {tasks:,} tasks {verdict(tasks <= MOST_TASKS)}", end=", ")
    print(f"graph {graph / 1e6:.2f} MB {verdict(graph < MOST_GRAPH_BYTES)}", end=", ")
    print(f"{outside:.3f} s outside of the tasks {verdict(outside <= MOST_SECONDS_OUTSIDE)}")


# -- sizes -------------------------------------------------------------------------------------------------------------


def sizes(folder: Path, gigabytes: list[float], rounds: int) -> None:
    """All sizes take turns, for it is they that are compared."""
    scorers, layout = model(), layouts(1.0)[0]
    print(f"(d, k) = ({D}, {K}), {THREADS} threads, chunks of 10 MB")
    print(f"{'GB':>5} {'pass':>8} {'bare loop':>9} {'s per GB':>9}")
    timed: dict[str, Callable[[], float]] = {}
    for size in gigabytes:
        path = layout.write(folder, size)
        timed[f"pass {size}"] = partial(seconds_of, "threads", e_step, scorers, str(path), THREADS)
        timed[f"bare {size}"] = partial(bare_loop, path, layout)
    found, per_gigabyte = in_turn(timed, rounds), []
    for size in gigabytes:
        passed, bare = found[f"pass {size}"], found[f"bare {size}"]
        per_gigabyte.append((passed - bare) / size)
        print(f"{size:5g} {passed:8.2f} {bare:9.2f} {per_gigabyte[-1]:9.3f}", flush=True)
    spread = max(per_gigabyte) / min(per_gigabyte)
    print(f"largest over smallest {spread:.3f} {verdict(spread <= LARGEST_SPREAD)}")


# -- a worker with two threads -----------------------------------------------------------------------------------------


def timed_e_step(scorers: tuple[Scorer, ...], block: Any) -> np.ndarray:
    """Seconds inside the E-step, the rows read before."""
    from streamgmm.sources.memory import MemoryBlock

    rows = np.concatenate([piece.rows for piece in block.pieces()])
    return np.array([seconds(lambda: e_step(scorers, MemoryBlock(rows, 0)))])


def timed_products(scorers: tuple[Scorer, ...], block: Any) -> np.ndarray:
    """Seconds of the two matrix products alone, for as many rows."""
    from floor import products

    (scorer,) = scorers
    return np.array([products(block.stop - block.start, scorer.n_moments, scorer.n_components, 512, 1)])


@contextmanager
def worker(threads: int) -> Iterator[Client]:
    options = {"n_workers": 1, "threads_per_worker": threads, "processes": True, **LOOPBACK}
    with LocalCluster(**options) as cluster, Client(cluster) as client:
        client.run(_find_benchmarks, str(Path(__file__).parent))
        yield client


def _find_benchmarks(folder: str) -> None:
    import sys

    if folder not in sys.path:
        sys.path.insert(0, folder)


def work_per_second(client: Client, kernel: Any, scorers: tuple[Scorer, ...], path: Path) -> tuple[float, float]:
    """Seconds of work inside the tasks per second of the pass, and the seconds of the pass."""
    source = open_source(str(path))
    with client.as_current(), single_blas_thread(), executor_for(source) as executor:
        began = time.perf_counter()
        inside = executor.map_reduce(kernel, scorers, source.blocks(), source.graph)
        passed = time.perf_counter() - began
    return float(inside[0]) / passed, passed


def on_a_cluster(folder: Path, gigabytes: float, rounds: int) -> None:
    print(f"{gigabytes:g} GB uncompressed; two threads of a worker over one")
    print(f"{'d':>3} {'k':>3} {'work per second':>16} {'pass':>6} {'bare products':>14} met")
    with worker(1) as one, worker(2) as two:
        for d, k in GRID:
            rows, params = unit_clusters(d, k, gigabytes * 1e9 / 2**20)
            path = folder / f"{d}x{k}.zarr"
            zarr.create_array(path, data=rows, chunks=(8 * 2**20 // (8 * d), d), compressors=None, overwrite=True)
            gain, faster, bare = gains(one, two, params, path, rounds)
            met = verdict(gain >= LEAST_GAIN or d * k < D * K)
            print(f"{d:3d} {k:3d} {gain:16.2f} {faster:6.2f} {bare:14.2f} {met}", flush=True)


def gains(one: Client, two: Client, params: MixtureParams, path: Path, rounds: int) -> tuple[float, float, float]:
    """Two threads over one: the work inside the tasks per second, the time of a pass, and the same of bare products."""
    scorers = (prepare(params, params.frame()),)
    found: dict[Any, list[tuple[float, float]]] = {}
    for turn in range(rounds + 1):
        for kernel in (timed_e_step, timed_products):
            for client in (one, two):
                value = work_per_second(client, kernel, scorers, path)
                if turn:  # the first one has imports, and reads from the disk
                    found.setdefault((kernel, client), []).append(value)
    medians = {key: [median(column) for column in zip(*values, strict=True)] for key, values in found.items()}
    (rate_1, pass_1), (rate_2, pass_2) = medians[timed_e_step, one], medians[timed_e_step, two]
    return rate_2 / rate_1, pass_1 / pass_2, medians[timed_products, one][1] / medians[timed_products, two][1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["chunks", "many", "sizes", "cluster"])
    parser.add_argument("--gigabytes", type=float, nargs="+")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", type=Path, help="where stores are kept; by default a temporary one")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.directory or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if arguments.what == "chunks":
            chunks(folder, *(arguments.gigabytes or [1.0]), arguments.rounds)
        elif arguments.what == "many":
            many(folder, 100_000, arguments.rounds)
        elif arguments.what == "sizes":
            sizes(folder, arguments.gigabytes or [1.0, 2.0, 4.0, 8.0], arguments.rounds)
        else:
            on_a_cluster(folder, *(arguments.gigabytes or [0.25]), arguments.rounds)


if __name__ == "__main__":
    main()
