"""What the plan says before anything runs. Numbers are primes, so that a factor that is missing cannot hide."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from conftest import write_zarr
from hypothesis import given
from hypothesis import strategies as st

from streamgmm import GaussianMixture
from streamgmm.errors import MemoryPlanError
from streamgmm.plan import Plan, machine_bytes, make_plan

MIB = 2**20
FLOAT32 = np.dtype("f4")


@dataclass(frozen=True)
class Described:
    """A source that holds nothing but its numbers."""

    n_rows: int = 100_003
    n_features: int = 13
    dtype: Any = FLOAT32
    grid_rows: int = 211
    block_rows: int = 211 * 7
    in_memory: bool = False
    name: str = "rows.zarr"

    def block(self, start: int, stop: int) -> Any:
        raise AssertionError("a plan reads nothing")


def plan_of(source: Described, **numbers: Any) -> Plan:
    sizes = {"n_threads": 3, "fan_in": 8, "workspace_bytes": 1_000_003, "value_bytes": 10_007, "sample_bytes": 500_009}
    return make_plan(source, **{**sizes, **numbers})


def test_the_numbers_of_a_pass():
    plan = plan_of(Described())
    assert (plan.n_rows, plan.n_features, plan.block_rows, plan.n_threads) == (100_003, 13, 1_477, 3)
    assert plan.read_bytes == 100_003 * 13 * 4
    assert plan.n_blocks == 68  # 67 whole ones and a rest
    assert (plan.blocks_per_task, plan.n_tasks) == (1, 68)


def test_the_peak_in_numbers():
    """Libraries, threads x (three copies of a chunk and work space), values on three levels of the tree, sample."""
    chunk = 3 * 211 * 13 * 4
    values = 10_007 * (3 * 2 * 3 + 8 + 1)
    assert plan_of(Described()).peak_bytes == 250 * MIB + 3 * (chunk + 1_000_003) + values + 500_009


@pytest.mark.parametrize(("block_rows", "n_blocks", "levels"), [(100_003, 1, 1), (12_501, 8, 1), (12_500, 9, 2)])
def test_values_are_held_on_every_level_of_the_tree(block_rows, n_blocks, levels):
    plan = plan_of(Described(block_rows=block_rows))
    other = plan_of(Described(block_rows=block_rows), value_bytes=10_007 + 1)
    assert plan.n_blocks == n_blocks
    assert other.peak_bytes - plan.peak_bytes == 3 * 2 * levels + 8 + 1


def test_rows_in_memory_take_nothing_more():
    peak = plan_of(Described(in_memory=True, grid_rows=1)).peak_bytes
    assert peak == 250 * MIB + 3 * 1_000_003 + 10_007 * (3 * 2 * 3 + 8 + 1) + 500_009


def test_a_chunk_that_is_larger_than_the_array_counts_as_the_array():
    small, whole = Described(n_rows=101, grid_rows=10**9), Described(n_rows=101, grid_rows=101)
    assert plan_of(small).peak_bytes == plan_of(whole).peak_bytes


@pytest.mark.parametrize("dtype", ["u1", "f2", "f4", "f8"])
def test_chunks_count_in_their_own_dtype(dtype):
    itemsize = np.dtype(dtype).itemsize
    larger = plan_of(Described(dtype=np.dtype(dtype), grid_rows=212)).peak_bytes
    assert larger - plan_of(Described(dtype=np.dtype(dtype))).peak_bytes == 3 * 3 * 13 * itemsize


def test_a_plan_that_does_not_fit_is_refused_with_its_numbers():
    peak = plan_of(Described()).peak_bytes
    assert plan_of(Described(), limit_bytes=peak).peak_bytes == peak
    with pytest.raises(MemoryPlanError, match=r"needs 266 MB at its peak, but 266 MB are there") as refused:
        plan_of(Described(), limit_bytes=peak - 1)
    for words in (
        "rows.zarr",
        "3 threads x (32.9 kB for a chunk of 211 rows + 1 MB of work space)",
        "libraries 262 MB",
        "statistics 270 kB",
        "sample 500 kB",
        "num_workers=1",
        "lower n_components",
    ):
        assert words in str(refused.value)
    assert isinstance(refused.value, MemoryError)


def test_the_machine_s_memory_is_the_limit():
    huge = Described(n_rows=10**12, n_features=1_000, grid_rows=10**9, block_rows=10**9)
    with pytest.raises(MemoryPlanError, match="rechunk the store to fewer rows a chunk"):
        plan_of(huge)
    assert 2**28 < machine_bytes() < 2**50


def test_a_fit_is_refused_before_anything_is_read(tmp_path, monkeypatch):
    path = write_zarr(tmp_path, np.full((64, 2), np.nan), 8)
    monkeypatch.setattr("streamgmm.plan.machine_bytes", lambda: 100 * MIB)
    with pytest.raises(MemoryPlanError, match="but 105 MB are there"):
        GaussianMixture().fit(path)


POWERS = [8**i for i in range(12)]


@given(
    n_blocks=st.integers(1, 10**7),
    block_rows=st.integers(1, 10**6),
    d=st.integers(1, 500),
    n_threads=st.integers(1, 256),
)
def test_tasks_are_aligned_runs_and_neither_too_many_nor_too_few(n_blocks, block_rows, d, n_threads):
    source = Described(n_rows=n_blocks * block_rows, n_features=d, grid_rows=1, block_rows=block_rows)
    plan = plan_of(source, n_threads=n_threads, limit_bytes=2**80)
    span = plan.blocks_per_task
    assert span in POWERS
    assert plan.n_blocks == n_blocks
    assert plan.n_tasks == -(-n_blocks // span) <= 4096
    needed = -(-n_blocks // (span // 8 or 1)) > 4096
    assert span == 1 or needed or plan.n_tasks >= 4 * n_threads
    large_enough = span * block_rows * d * 8 >= 32 * MIB
    assert large_enough or n_blocks // (8 * span) < 4 * n_threads
    assert span == 1 or needed or span // 8 * block_rows * d * 8 < 32 * MIB


def test_tasks_in_numbers():
    small = Described(n_rows=1_000 * 2_048, n_features=8, grid_rows=2_048, block_rows=2_048)  # 128 kiB a block
    assert plan_of(small, n_threads=1).blocks_per_task == 64
    assert plan_of(small, n_threads=2).n_tasks == 16
    assert plan_of(small, n_threads=16).blocks_per_task == 8
    assert plan_of(replace(small, block_rows=2_048 * 256), n_threads=1).blocks_per_task == 1


def test_the_plan_in_words():
    words = str(plan_of(Described()))
    assert words == (
        "rows.zarr: 100,003 rows x 13 features, 5.2 MB a pass in 68 blocks of 1,477 rows, 68 tasks on 3 threads; "
        "peak memory at most 266 MB"
    )


def test_one_is_singular():
    words = str(plan_of(Described(n_rows=211), n_threads=1))
    assert "in 1 block of 1,477 rows, 1 task on 1 thread;" in words


@pytest.mark.parametrize(
    ("n_bytes", "words"),
    [(4, "0.004 kB"), (999_500, "1 MB"), (999_499, "999 kB"), (1_500_000, "1.5 MB"), (999_700_000, "1 GB"),
     (8_000_000_000, "8 GB"), (2_346_000_000_000, "2.35 TB")],
)  # fmt: skip
def test_sizes_are_written_without_exponents(n_bytes, words):
    plan = replace(plan_of(Described()), read_bytes=n_bytes)
    assert f", {words} a pass" in str(plan)


def test_the_plan_is_said_before_the_first_pass(caplog, capsys):
    rows = np.random.default_rng(0).normal(size=(50, 2))
    with caplog.at_level("INFO", logger="streamgmm"):
        GaussianMixture(1, verbose=1).fit(rows)
    assert caplog.messages[0].startswith("the array: 50 rows x 2 features, 0.8 kB a pass in 1 block of 131,072 rows")
    assert capsys.readouterr().out.splitlines()[0] == caplog.messages[0]
