"""Sources that hold nothing but their numbers, places where blocks run, and the plans of passes over them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from streamgmm.plan import Plan, make_plan
from streamgmm.protocols import Capacity

FLOAT32 = np.dtype("f4")
THREADS = Capacity(3)
WORKERS = Capacity(6, 2, 3, 503_000_000, task_seconds=0.004)


@dataclass(frozen=True)
class Described:
    """A source that holds nothing but its numbers."""

    n_rows: int = 100_003
    n_features: int = 13
    dtype: Any = FLOAT32
    grid_rows: int = 211
    block_rows: int = 211 * 7
    in_memory: bool = False
    divisible: bool = True
    upstream_tasks: float = 0.0
    stored_chunks: int = 0
    weight_bytes: int = 0
    name: str = "rows.zarr"

    def blocks(self) -> range:
        return range(0, self.n_rows, self.block_rows)

    def block(self, start: int, stop: int) -> Any:
        raise AssertionError("a plan reads nothing")


def plan_of(source: Described, capacity: Capacity = THREADS, **numbers: Any) -> Plan:
    sizes = {"fan_in": 8, "workspace_bytes": 1_000_003, "value_bytes": 10_007, "sample_bytes": 500_009}
    return make_plan(source, capacity, **{**sizes, **numbers})
