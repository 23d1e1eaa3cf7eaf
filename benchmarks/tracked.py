"""What is followed from version to version, in the form that asv (airspeed velocity) runs: time_* and peakmem_*.

Each class has the sizes that are followed; a test runs every body once with the first of them.
"""

from __future__ import annotations

import tempfile
from typing import Any

import numpy as np
import zarr
from floor import unit_clusters
from peer_worker import unit_covariances
from peers import GRID

from streamgmm import GaussianMixture, open_source
from streamgmm.covariance import STRUCTURES
from streamgmm.executors import SerialExecutor, single_blas_thread
from streamgmm.kernel import e_step, m_step, prepare
from streamgmm.params import MixtureParams
from streamgmm.pilot import take_pilot


class Store:
    """Rows in a store that goes with the benchmark."""

    def setup(self, shape: tuple[int, int], *_: Any) -> None:
        rows, _ = unit_clusters(*shape, 4)
        self.folder = tempfile.TemporaryDirectory()
        self.path = f"{self.folder.name}/rows.zarr"
        zarr.create_array(self.path, data=rows, chunks=(len(rows) // 8, shape[0]))

    def teardown(self, *_: Any) -> None:
        self.folder.cleanup()


class Steps:
    """The two steps of EM on rows in memory, with one thread."""

    params = (GRID, list(STRUCTURES), ["float64", "float32"])
    param_names = ("shape", "structure", "dtype")

    def setup(self, shape: tuple[int, int], structure: str, dtype: str) -> None:
        rows, near = unit_clusters(*shape, 4)
        covariance = STRUCTURES[structure](unit_covariances(shape[1], shape[0], structure))
        self.mixture = MixtureParams(near.weights, near.means, covariance)
        self.scorers = (prepare(self.mixture, self.mixture.frame(), single=dtype == "float32"),)
        self.source = open_source(rows)
        self.stats = self._read()

    def _read(self) -> Any:
        with single_blas_thread():
            return SerialExecutor().map_reduce(e_step, self.scorers, self.source.blocks(), self.source.graph).values[0]

    def time_e_step(self, *_: Any) -> None:
        self._read()

    def time_m_step(self, *_: Any) -> None:
        m_step(self.stats, self.mixture, 1e-6)

    def time_prepare(self, *_: Any) -> None:
        prepare(self.mixture, self.mixture.frame())


class Reads(Store):
    """What reads a store without a fit."""

    params = (GRID,)
    param_names = ("shape",)

    def time_pilot(self, *_: Any) -> None:
        source = open_source(self.path)
        take_pilot(source, SerialExecutor(), np.arange(0, source.n_rows, 100))

    def time_plan(self, shape: tuple[int, int]) -> None:
        GaussianMixture(shape[1]).plan(self.path)


class Fits(Store):
    """From a store to a mixture, and from a mixture to labels."""

    params = ([(2, 2), (4, 4)], ["auto", "em", "incremental"])
    param_names = ("shape", "solver")

    def setup(self, shape: tuple[int, int], *rest: Any) -> None:
        super().setup(shape, *rest)
        self.mixture = GaussianMixture(shape[1], random_state=0, tol=0.1, sample_rows=5_000).fit(self.path)

    def _fit(self, shape: tuple[int, int], solver: str) -> None:
        GaussianMixture(shape[1], solver=solver, random_state=0, tol=0.1, sample_rows=5_000).fit(self.path)

    time_fit = peakmem_fit = _fit

    def time_predict(self, *_: Any) -> None:
        self.mixture.predict(self.path).compute()

    peakmem_predict = time_predict
