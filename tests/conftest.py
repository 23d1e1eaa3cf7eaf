"""What all tests share: the long form, the profiles of hypothesis, and the data that several tests use."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, Phase, settings
from sklearn.datasets import load_iris

ANYWAY = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]

#: without the phase that explains a failure, which takes minutes where an example is a whole fit
PHASES = [Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink]

settings.register_profile(
    "ci",
    deadline=None,
    derandomize=True,
    max_examples=15,
    database=None,
    phases=PHASES,
    suppress_health_check=ANYWAY,
)
settings.register_profile("long", deadline=None, max_examples=500, phases=PHASES, suppress_health_check=ANYWAY)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="run the long forms of slow tests, and 500 examples a law")


def pytest_configure(config: pytest.Config) -> None:
    settings.load_profile("long" if config.getoption("--long") else "ci")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--long"):
        return
    skip = pytest.mark.skip(reason="long form: run pytest --long")
    for item in items:
        if item.get_closest_marker("long"):
            item.add_marker(skip)


@pytest.fixture(scope="session")
def iris() -> np.ndarray:
    """Fisher's iris, (150, 4), read-only."""
    rows = np.array(load_iris().data, dtype=np.float64)
    rows.flags.writeable = False
    return rows


@pytest.fixture
def heeding_ctrl_c() -> Iterator[None]:
    """Python's own handler of SIGINT. A shell's background jobs ignore that signal, and so does what they start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def write_zarr(
    folder: Path, rows: np.ndarray, chunk_rows: int, shard_rows: int | None = None, *, name: str = "rows.zarr"
) -> Path:
    """Write rows (n, d) to a new zarr array in ``folder``, all columns in one chunk; returns its path."""
    path = Path(folder) / name
    shards = None if shard_rows is None else (shard_rows, rows.shape[1])
    array = zarr.create_array(
        str(path), shape=rows.shape, dtype=rows.dtype, chunks=(chunk_rows, rows.shape[1]), shards=shards
    )
    array[...] = rows
    return path
