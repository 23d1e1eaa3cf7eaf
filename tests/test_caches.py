"""The statistics of blocks that a fit keeps: in memory or in a file, with the same bits, and never many at a time."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mixtures import KINDS, blobs

from streamgmm import GaussianMixture, caches, files, open_source
from streamgmm.covariance import STRUCTURES
from streamgmm.errors import FileFormatError, MemoryPlanError
from streamgmm.solving import SOLVERS


def fit(rows: np.ndarray, **settings: Any) -> GaussianMixture:
    """In blocks of 60 rows."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = GaussianMixture(3, solver="incremental", random_state=0, **settings)
        return model.fit(open_source(rows, block_rows=60))


def test_caches_in_a_file_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in KINDS:
        with monkeypatch.context() as patch:
            in_memory = fit(blobs(), covariance_type=kind, max_iter=4, tol=0.0)
            patch.setattr(caches, "MOST_BYTES_IN_MEMORY", 0)
            assert isinstance(caches.make_caches(20, STRUCTURES[kind], 3, 3), caches.FileCaches)
            in_file = fit(blobs(), covariance_type=kind, max_iter=4, tol=0.0)
        np.testing.assert_array_equal(in_memory.covariances_, in_file.covariances_)
        assert in_memory.lower_bounds_ == in_file.lower_bounds_


def test_a_full_disk_is_an_error_before_anything_is_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caches, "MOST_BYTES_IN_MEMORY", 0)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1_000})())
    with pytest.raises(FileFormatError, match=r"statistics of 20 blocks take 7,520 bytes.*1,000 are free.*TMPDIR"):
        fit(blobs())


def test_a_disk_that_fills_up_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(caches, "MOST_BYTES_IN_MEMORY", 0)
    monkeypatch.setattr(files.os, "pwrite", full)
    with pytest.raises(FileFormatError, match=r"no room for it .*No space left"):
        fit(blobs())


def test_records_are_kept_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.tempfile, "tempdir", str(tmp_path))
    records = files.RecordFile(3, 4)
    for number in (2, 0, 1):
        records[number] = np.full(4, float(number))
    records[0] = np.arange(4.0)
    assert [records[number].tolist() for number in range(3)] == [[0, 1, 2, 3], [1] * 4, [2] * 4]
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(IndexError, match="record 3 of 3"):
        _ = records[3]
    with pytest.raises(ValueError, match="a record of 16 bytes among those of 32"):
        records[0] = np.zeros(2)


# -- memory --------------------------------------------------------------------------------------------------------

FIT = """
import logging, re, sys, warnings
import numpy as np
import dask
from streamgmm import GaussianMixture, open_source
k, d, n_blocks, block_rows, passes = 64, 32, int(sys.argv[1]), 25, int(sys.argv[2])
warnings.simplefilter("ignore")
lines = []
handler = logging.Handler()
handler.emit = lambda record: lines.append(record.getMessage())
log = logging.getLogger("streamgmm")
log.addHandler(handler)
log.setLevel(logging.INFO)
rng = np.random.default_rng(0)
rows = rng.standard_normal((n_blocks * block_rows, d))
means = 0.5 * rng.standard_normal((k, d))
start = {"weights_init": np.full(k, 1 / k), "means_init": means, "precisions_init": np.stack([np.eye(d)] * k)}
with dask.config.set(scheduler="threads", num_workers=2):
    model = GaussianMixture(k, solver="incremental", max_iter=passes, tol=0.0, random_state=0, reg_covar=1e-3, **start)
    model.fit(open_source(rows, block_rows=block_rows))
planned = re.search(r"peak memory at most (.*) MB", lines[0])[1]
status = open("/proc/self/status").read()
print(model.n_iter_, int(status.split("VmHWM:")[1].split()[0]) * 1024, float(planned) * 1e6)
"""


def peak_of(n_blocks: int, passes: int) -> tuple[float, float]:
    """(peak, planned) bytes of a fresh process that fits 64 components in 32 features, 0.3 MB of caches a block."""
    command = [sys.executable, "-c", FIT, str(n_blocks), str(passes)]
    done = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    n_iter, peak, planned = map(float, done.split())
    assert n_iter == passes
    return peak - 8 * 32 * 25 * n_blocks, planned  # the rows, which are in memory, are not what is asked for


def test_caches_in_a_file_take_no_memory() -> None:
    """Short form: 250 blocks have 75 MB of caches; 250 more may take a fifth of what they add."""
    (small, planned_small), (large, planned_large) = peak_of(250, 2), peak_of(500, 2)
    assert caches.caches_bytes(250, STRUCTURES["full"], 64, 32) > caches.MOST_BYTES_IN_MEMORY
    assert large - small < 15e6
    assert small < planned_small
    assert large < planned_large < 700e6


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_the_peak_with_4000_blocks() -> None:
    assert caches.caches_bytes(4_000, STRUCTURES["full"], 64, 32) > 1.1e9
    peak, planned = peak_of(4_000, 3)
    assert peak < min(planned, 700e6)


def test_the_plan_counts_what_is_kept() -> None:
    def peak(solver: str, n_init: int = 1, block_rows: int = 20_000) -> int:
        model = GaussianMixture(8, solver=solver, n_init=n_init)
        return model.plan(open_source(np.zeros((400_000, 4)), block_rows=block_rows)).peak_bytes

    one = caches.caches_bytes(1, STRUCTURES["full"], 8, 4)
    assert one == 8 * (8 * 15 + 8 * 4 + 4 + 5)
    assert peak("incremental") - peak("em") == (20 + 2 + caches.COPIES) * one
    assert peak("incremental", block_rows=1_000) - peak("em", block_rows=1_000) == (400 + 20 + caches.COPIES) * one
    twice = peak("incremental", n_init=5) - peak("incremental")
    assert twice == 20 * one
    assert SOLVERS["incremental"].keeps_blocks


def test_more_than_memory_holds_is_in_a_file() -> None:
    made = [caches.make_caches(n, STRUCTURES["full"], 64, 32) for n in (200, 300)]
    assert [type(room).__name__ for room in made] == ["list", "FileCaches"]
    assert caches.held_bytes(300, 8, STRUCTURES["full"], 64, 32, 1) < caches.MOST_BYTES_IN_MEMORY


def test_a_plan_that_does_not_fit_names_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamgmm.plan.machine_bytes", lambda: 10**8)
    with pytest.raises(MemoryPlanError, match=r"sample .* statistics kept of the blocks"):
        fit(blobs())
