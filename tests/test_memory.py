"""Peak memory of fresh processes: it does not grow with the rows, and stays under what the plan said."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from conftest import write_zarr

from streamgmm import open_source
from streamgmm.covariance import STRUCTURES
from streamgmm.draw import Draw
from streamgmm.executors import single_blas_thread
from streamgmm.kernel import e_step, prepare, tile_rows, workspace_bytes
from streamgmm.params import MixtureParams
from streamgmm.pilot import survey_block
from streamgmm.prediction import LABELS, score_block, total_block
from streamgmm.protocols import Piece
from streamgmm.sources.memory import MemoryBlock
from streamgmm.sources.weighted import WeightedBlock
from streamgmm.stats import Frame

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "memory.py"


def peaks_of(folder: Path, *gigabytes: float) -> list[tuple[float, float]]:
    """(peak, planned) in MB for data of each size, as benchmarks/memory.py prints them."""
    sizes = [str(size) for size in gigabytes]
    command = [sys.executable, str(SCRIPT), "--directory", str(folder), "--gigabytes", *sizes]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    lines = re.findall(r"GB +([\d.]+) MB +([\d.]+) MB", printed)
    assert len(lines) == len(sizes)
    return [(float(peak), float(planned)) for peak, planned in lines]


ONE_PASS = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import memory
memory.PASSES = 1
memory.measure = lambda path, threads: memory.fit_and_measure(str(path), threads)
memory.compare(Path(sys.argv[2]), [float(sys.argv[3])], 2)
"""


def peak_of_one_pass(folder: Path, gigabytes: float) -> tuple[float, float]:
    """(peak, planned) in MB of a fresh process that measures itself; the store is written by this one."""
    runpy.run_path(str(SCRIPT))["store_of"](folder, gigabytes)
    common = [str(SCRIPT.parent), str(folder), str(gigabytes)]
    printed = subprocess.run([sys.executable, "-c", ONE_PASS, *common], check=True, capture_output=True, text=True)
    ((peak, planned),) = re.findall(r"GB +([\d.]+) MB +([\d.]+) MB", printed.stdout)
    return float(peak), float(planned)


def test_the_peak_does_not_grow_with_the_data(tmp_path):
    """Short form: 160 MB more of data may take a tenth of that; 120 MB give both threads all that they ever hold."""
    (small, planned_small), (large, planned_large) = (peak_of_one_pass(tmp_path, size) for size in (0.12, 0.28))
    assert large - small < 16
    assert small < planned_small
    assert large < planned_large == planned_small < 450


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_the_peak_at_1_gb_and_at_8_gb(tmp_path):
    (small, planned_small), (large, planned_large) = peaks_of(tmp_path, 1.0, 8.0)
    assert abs(large / small - 1.0) < 0.05
    assert max(small, large) < 450
    assert small < planned_small
    assert large < planned_large


def small_workers(folder: Path, gigabytes: float, *options: str) -> None:
    """Two workers of 400 MB under dask's own thresholds, as benchmarks/cluster.py reports them: zarr, then dask."""
    command = [sys.executable, str(SCRIPT.with_name("cluster.py")), "memory", "--gigabytes", str(gigabytes), *options]
    done = subprocess.run([*command, "--directory", str(folder)], check=True, capture_output=True, text=True)
    line = r"^ +(zarr|dask) +4 +[\d.]+ +(\d+) MB (\d+) MB +(\d+) MB +(\d+) +(\d+) +(\d+)$"
    found = re.findall(line, done.stdout, flags=re.MULTILINE)
    assert [name for name, *_ in found] == ["zarr", "dask"]
    for _, *figures in found:
        first, second, planned, spilled, pauses, restarts = map(int, figures)
        assert 100 < max(first, second) < min(planned, 0.7 * 400)
        assert (spilled, pauses, restarts) == (0, 0, 0)


def test_small_workers_do_not_spill_pause_or_restart(tmp_path):
    """Short form: few chunks, and a start that is found on few rows, which is the work of no worker."""
    small_workers(tmp_path, 0.048, "--sample-rows", "4000")


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_small_workers_fit_4_gb(tmp_path):
    small_workers(tmp_path, 4.0)


WIDE_ANSWER = """
import sys, warnings
import dask, numpy
from streamgmm import GaussianMixture
warnings.simplefilter("ignore")
with dask.config.set(scheduler="threads", num_workers=2):
    means = numpy.random.default_rng(0).uniform(0, 255, size=(64, 2))
    start = {"weights_init": [1 / 64] * 64, "means_init": means, "precisions_init": [[0.01, 0.01]] * 64}
    model = GaussianMixture(64, covariance_type="diag", solver="em", max_iter=1, **start).fit(sys.argv[1])
    model.score(sys.argv[1])
    result = model.predict_proba(sys.argv[1])
    result[:10].compute()
    shape = result.shape
status = open("/proc/self/status").read()
print(shape[0] * shape[1] * 8, int(status.split("VmHWM:")[1].split()[0]) * 1024)
"""


def test_nothing_of_n_rows_times_k_is_held(tmp_path):
    """A million rows of one byte and 64 components: responsibilities would take 512 MB."""
    path = tmp_path / "rows.zarr"
    array = zarr.create_array(path, shape=(1_000_000, 2), chunks=(20_000, 2), dtype="u1")
    rng = np.random.default_rng(0)
    for start in range(0, 1_000_000, 20_000):
        array[start : start + 20_000] = rng.integers(0, 256, size=(20_000, 2), dtype=np.uint8)
    command = [sys.executable, "-c", WIDE_ANSWER, str(path)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    answer, peak = map(int, printed.split())
    assert answer == 512_000_000
    assert peak < 350e6


def allocated(call: Callable[[], Any], before: Callable[[], Any] | None = None) -> int:
    """Bytes that a call allocates at most, after another one or ``before``, so that caches are filled."""
    with single_blas_thread():
        (before or call)()
        tracemalloc.start()
        try:
            call()
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()


def kernel_peak(structure: str, k: int, d: int, n_models: int, *, far: bool, n: int | None) -> tuple[int, int]:
    """(bytes that one call of e_step allocated at most, bytes that the plan allows it), for n rows or a few tiles.

    Far rows take a slow form tile by tile: one whole tile shows what it takes.
    """
    kind = STRUCTURES[structure]
    rng = np.random.default_rng(0)
    n = n or min(9_000, (1 if far else 3) * tile_rows(1 + d + kind.quadratic.size(d)) + 100)
    rows = rng.normal(size=(n, d)) + (1e9 if far else 0.0)
    covariance = kind.from_dense(np.stack([np.eye(d)] * k))
    models = tuple(MixtureParams(np.full(k, 1 / k), rng.normal(size=(k, d)), covariance) for _ in range(n_models))
    scorers = tuple(prepare(model, Frame(np.zeros(d), np.ones(d))) for model in models)
    source = open_source(rows, block_rows=n)
    used = allocated(lambda: e_step(scorers, source.block(0, n)), lambda: e_step(scorers, source.block(0, 100)))
    return used, workspace_bytes(kind, k, d, n_models)


@pytest.mark.parametrize("far", [False, True], ids=["near", "far rows"])
@pytest.mark.parametrize("n_models", [1, 3])
@pytest.mark.parametrize(("k", "d"), [(2, 1), (8, 2), (16, 8), (3, 20), (32, 16), (16, 64)])
@pytest.mark.parametrize("structure", list(STRUCTURES))
@pytest.mark.parametrize("n", [None, pytest.param(9_000, marks=pytest.mark.long)], ids=["tiles", "9000"])
def test_the_plan_s_work_space_covers_the_kernel(structure, k, d, n_models, far, n):
    used, planned = kernel_peak(structure, k, d, n_models, far=far, n=n)
    assert used < planned + 100_000


def test_a_block_that_is_larger_than_the_tiles_takes_no_more(tmp_path):
    """What is allocated while a block is read is one chunk at a time, however many chunks the block spans."""

    def peak(n_chunks: int) -> int:
        rows = np.random.default_rng(0).normal(size=(n_chunks * 20_000, 4))
        source = open_source(write_zarr(tmp_path, rows, 20_000, name=f"{n_chunks}.zarr"), block_rows=len(rows))
        params = MixtureParams(np.ones(1), np.zeros((1, 4)), STRUCTURES["full"](np.eye(4)[None]))
        scorers = (prepare(params, Frame(np.zeros(4), np.ones(4))),)
        return allocated(lambda: e_step(scorers, source.block(0, len(rows))))

    assert peak(20) < peak(4) + 20_000 * 4 * 8


class JealousBlock(MemoryBlock):
    """A block in ten pieces that cannot be read while the piece before is alive."""

    def pieces(self) -> Iterator[Piece]:
        before: weakref.ref[Any] = weakref.ref(np.empty(0))
        size = len(self.rows) // 10
        for start in range(0, len(self.rows), size):
            assert before() is None
            rows = self.rows[start : start + size].copy()
            before = weakref.ref(rows)
            yield Piece(rows, None)
            del rows


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("name", ["e_step", "survey", "score", "total"])
@pytest.mark.parametrize("n", [1_000, 16 * 4096 * 10], ids=["copied", "views"])
def test_a_piece_is_gone_before_the_next_one_is_read(name, weighted, n):
    """Pieces so small that rows are copied into a span, and whole spans that are views of them."""
    rows = np.random.default_rng(0).normal(size=(n, 3))
    params = MixtureParams(np.ones(1), np.zeros((1, 3)), STRUCTURES["full"](np.eye(3)[None]))
    scorer = prepare(params, Frame(np.zeros(3), np.ones(3)))
    block: Any = JealousBlock(rows, 0)
    if weighted:
        block = WeightedBlock(block, MemoryBlock(np.ones(n), 0))
    calls = {
        "e_step": lambda: e_step((scorer,), block),
        "survey": lambda: survey_block((np.arange(0, n, 7), Draw.of(0, n, n // 7)), block),
        "score": lambda: score_block(scorer, LABELS, block),
        "total": lambda: total_block(scorer, block),
    }
    calls[name]()
