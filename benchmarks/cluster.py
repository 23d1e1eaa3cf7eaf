"""What a cluster costs and gains, side by side in one run: memory of small workers, speed, scheduling.

python benchmarks/cluster.py memory      # 4 GB in chunks of 8 MB on 2 workers of 400 MB, from zarr and from dask
python benchmarks/cluster.py speed       # threads, a cluster in this process, workers of their own: ratios
python benchmarks/cluster.py overhead    # 1,000 chunks of 100 kB: what scheduling costs a pass

python benchmarks/cluster.py memory --gigabytes 0.4 --sample-rows 4000    # a short form
python benchmarks/cluster.py speed --directory /data     # keeps the store there and uses it again
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import numpy as np
import zarr
from distributed import Client, LocalCluster

from streamgmm import GaussianMixture, open_source
from streamgmm.executors import executor_for, single_blas_thread
from streamgmm.kernel import e_step, prepare
from streamgmm.params import MixtureParams
from streamgmm.protocols import Block

D, K, CHUNK_BYTES = 16, 32, 8_000_000
LOOPBACK = {"host": "127.0.0.1", "dashboard_address": "127.0.0.1:0"}


def store_of(directory: Path, gigabytes: float, chunk_bytes: int = CHUNK_BYTES) -> Path:
    """A store of float64 rows from K clusters, written chunk by chunk."""
    path = directory / f"rows-{gigabytes:g}GB-{chunk_bytes}.zarr"
    if path.exists():
        return path
    n_rows, chunk_rows = round(gigabytes * 1e9 / (8 * D)), chunk_bytes // (8 * D)
    unfinished = path.with_suffix(".part")
    array = zarr.create_array(unfinished, shape=(n_rows, D), chunks=(chunk_rows, D), dtype="float64", overwrite=True)
    for start in range(0, n_rows, chunk_rows):
        rng = np.random.default_rng([1, start])
        rows = rng.standard_normal((min(chunk_rows, n_rows - start), D))
        rows += means()[rng.integers(K, size=len(rows))]
        array[start : start + len(rows)] = rows
    unfinished.rename(path)
    return path


def means() -> np.ndarray:
    return np.random.default_rng(0).normal(scale=3.0, size=(K, D))


# -- memory ------------------------------------------------------------------------------------------------------------


def peak_bytes() -> int:
    """The most that this process ever had resident, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def spilled_bytes(dask_worker: Any) -> int:
    """Bytes that this worker wrote to disk since it started."""
    metrics = getattr(dask_worker.data, "cumulative_metrics", {})
    return int(sum(value for key, value in metrics.items() if key[0] == "disk-write" and key[-1] == "bytes"))


def fit_in_small_workers(rows: Any, limit: str, sample_rows: int | None) -> dict[str, Any]:
    """One fit on a fresh cluster of two workers with dask's own thresholds; what happened there."""
    hyper = {"solver": "em", "max_iter": 3, "tol": 0.0, "random_state": 0, "sample_rows": sample_rows}
    small = {"n_workers": 2, "threads_per_worker": 1, "memory_limit": limit, **LOOPBACK}
    with LocalCluster(**small) as cluster, Client(cluster) as c:
        before = {worker["nanny"]: worker["pid"] for worker in workers_of(c)}
        start = time.perf_counter()
        model = GaussianMixture(16, **hyper)
        planned = model.plan(rows).worker_peak_bytes
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # three passes do not converge, and need not
            model.fit(rows)
        seconds = time.perf_counter() - start
        changes = [event for events in c.get_events().values() for _, event in events if "action" in event]
        return {
            "passes": model.n_passes_,
            "seconds": seconds,
            "planned": planned,
            "peaks": list(c.run(peak_bytes).values()),
            "spilled": sum(c.run(spilled_bytes).values()),
            "pauses": sum(event.get("status") == "paused" for event in changes),
            "restarts": sum(before.get(worker["nanny"]) != worker["pid"] for worker in workers_of(c)),
        }


def workers_of(client: Client) -> list[dict[str, Any]]:
    """What the scheduler knows of each worker, with its process id."""
    pids = client.run(lambda dask_worker: __import__("os").getpid())
    return [{**worker, "pid": pids[address]} for address, worker in client.scheduler_info()["workers"].items()]


def memory(directory: Path, gigabytes: float, limit: str, sample_rows: int | None) -> None:
    path = store_of(directory, gigabytes)
    print(f"{gigabytes:g} GB in chunks of 8 MB, d = {D}, k = 16, 2 workers of {limit} with dask's own thresholds")
    names = (
        f"{'passes':>6}  {'seconds':>7}  {'peaks':>16}  {'planned':>8}  {'spilled':>7}  {'pauses':>6}  {'restarts':>8}"
    )
    print(f"{'rows from':>10}  {names}")
    for name, rows in (("zarr", str(path)), ("dask", da.from_zarr(path))):
        found = fit_in_small_workers(rows, limit, sample_rows)
        peaks, planned = " ".join(f"{peak / 1e6:.0f} MB" for peak in found["peaks"]), found["planned"] / 1e6
        print(
            f"{name:>10}  {found['passes']:6d}  {found['seconds']:7.1f}  {peaks:>16}  {planned:5.0f} MB  "
            f"{found['spilled']:7d}  {found['pauses']:6d}  {found['restarts']:8d}",
            flush=True,
        )


# -- speed -------------------------------------------------------------------------------------------------------------


def read_only(shared: None, block: Block) -> int:
    """A bare read: every chunk of the block is read and decoded, and nothing is done with it."""
    return sum(len(piece.rows) for piece in block.pieces())


@contextmanager
def places() -> Iterator[dict[str, Any]]:
    """Where a pass can run, by name, each as dask's ``scheduler`` setting; all of them alive at once."""
    with ExitStack() as stack:
        found: dict[str, Any] = {"threads": "threads"}
        for name, options in (
            ("in process", {"processes": False, "n_workers": 1, "threads_per_worker": 2, "dashboard_address": None}),
            ("2 workers", {"n_workers": 2, "threads_per_worker": 1, **LOOPBACK}),
            ("1 worker", {"n_workers": 1, "threads_per_worker": 1, **LOOPBACK}),
        ):
            cluster = stack.enter_context(LocalCluster(**options))
            found[name] = stack.enter_context(Client(cluster, set_as_default=False))
        yield found


def seconds_of(scheduler: Any, kernel: Callable[..., Any], shared: Any, rows: Any, threads: int = 2) -> float:
    """One pass of a kernel over all rows."""
    source, where = open_source(rows), dask.config.set(scheduler=scheduler, num_workers=threads)
    with where, single_blas_thread(), executor_for(source) as executor:
        start = time.perf_counter()
        executor.map_reduce(kernel, shared, source.blocks(), source.graph)
        return time.perf_counter() - start


def speed(directory: Path, gigabytes: float, repeats: int) -> None:
    path = str(store_of(directory, gigabytes))
    covariances = GaussianMixture.from_parameters(np.full(K, 1 / K), means(), np.stack([np.eye(D)] * K))._params()
    params = MixtureParams(covariances.weights, covariances.means, covariances.covariance)
    kernels = {"E-step": (e_step, (prepare(params, params.frame()),)), "bare read": (read_only, None)}
    print(f"{gigabytes:g} GB from zarr, (d, k) = ({D}, {K}), median seconds of {repeats} passes, in turn")
    with places() as found:
        for name in found:
            seconds_of(found[name], read_only, None, path)  # the page cache is warm, the workers have their imports
        for name, (kernel, shared) in kernels.items():
            times: dict[str, list[float]] = {place: [] for place in found}
            for _ in range(repeats):
                for place, scheduler in found.items():
                    times[place].append(seconds_of(scheduler, kernel, shared, path))
            medians = {place: statistics.median(values) for place, values in times.items()}
            two = {place: value for place, value in medians.items() if place != "1 worker"}
            print(f"{name:>9}: " + ", ".join(f"{place} {value:.2f} s" for place, value in medians.items()))
            print(
                f"{'':9}  slowest over fastest of the first three {max(two.values()) / min(two.values()):.2f}; "
                f"two workers over one {medians['1 worker'] / medians['2 workers']:.2f}",
                flush=True,
            )


# -- scheduling --------------------------------------------------------------------------------------------------------


def nothing(shared: None, block: Block) -> int:
    """A kernel that does not even read: what is left is scheduling."""
    return 1


def overhead(directory: Path, repeats: int) -> None:
    path = store_of(directory, 0.1, 100_000)
    print("1,000 chunks of 100 kB, 2 workers: median seconds a pass of a kernel that does nothing")
    with LocalCluster(n_workers=2, threads_per_worker=1, **LOOPBACK) as cluster, Client(cluster):
        for name, rows in (("zarr", str(path)), ("dask", da.from_zarr(path))):
            source = open_source(rows)
            with executor_for(source) as executor:
                times = []
                for _ in range(repeats):
                    start = time.perf_counter()
                    executor.map_reduce(nothing, None, source.blocks(), source.graph)
                    times.append(time.perf_counter() - start)
            plan = GaussianMixture(2).plan(rows)
            print(f"{name:>5}: {statistics.median(times):.3f} s, {plan.n_tasks:,} tasks", flush=True)
            for remark in plan.remarks:
                print(f"       the plan says: {remark}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("memory", "speed", "overhead"))
    parser.add_argument("--gigabytes", type=float, default=4.0, help="size of the data")
    parser.add_argument("--limit", default="400MB", help="memory of each worker")
    parser.add_argument("--sample-rows", type=int, help="rows that the start is found on; the default is that of a fit")
    parser.add_argument("--repeats", type=int, default=3, help="passes that the median is taken of")
    parser.add_argument("--directory", type=Path, help="where the store is kept; a temporary place by default")
    arguments = parser.parse_args()
    with ExitStack() as stack:
        directory = arguments.directory or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        directory.mkdir(parents=True, exist_ok=True)
        if arguments.what == "memory":
            memory(directory, arguments.gigabytes, arguments.limit, arguments.sample_rows)
        elif arguments.what == "speed":
            speed(directory, arguments.gigabytes, arguments.repeats)
        else:
            overhead(directory, arguments.repeats)


if __name__ == "__main__":
    main()
