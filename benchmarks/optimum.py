"""Where EM on all rows ends when it is continued from a model: what the gaps of other benchmarks are measured from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from streamgmm import GaussianMixture
from streamgmm.covariance import STRUCTURES
from streamgmm.executors import SerialExecutor, single_blas_thread
from streamgmm.params import MixtureParams
from streamgmm.protocols import Executor
from streamgmm.sample import Sample
from streamgmm.solvers.anderson import QUIET, Accelerated

#: That of GaussianMixture, and so what EM's fixed points are those of.
REG_COVAR = 1e-6
#: Passes after which EM is taken to have no end.
MOST_PASSES = 20_000


@dataclass(frozen=True)
class Continued:
    """start, end: log-likelihood a row (nats) of a model and of where EM goes on to from there.  passes: it took."""

    start: float
    end: float
    passes: int

    @property
    def gap(self) -> float:
        return self.end - self.start


def params_of(model: GaussianMixture) -> MixtureParams:
    return MixtureParams(model.weights_, model.means_, STRUCTURES[model.covariance_type](model.covariances_))


def in_memory(rows: np.ndarray, executor: Executor | None = None) -> Sample:
    """All rows, whose passes run in this thread unless an executor is given."""
    params = MixtureParams(np.ones(1), rows.mean(axis=0)[None], STRUCTURES["full"](np.cov(rows.T)[None]))
    executor = SerialExecutor() if executor is None else executor
    return Sample(rows, None, params.frame(), executor, len(rows), complete=True)


def log_likelihood(rows: Sample, params: MixtureParams) -> float:
    """Nats a row."""
    with single_blas_thread():
        stats = rows.read(params)
    return stats.log_likelihood / stats.weight


def continued(rows: Sample, start: MixtureParams, tol: float = 1e-10) -> Continued:
    """Anderson-accelerated EM on all rows until two passes in a row gain less than ``tol``.

    Where reg_covar matters, EM's own step can lose likelihood; then it ends as well, at the best that was found.
    """
    with single_blas_thread():
        state = Accelerated.at(start).learned(rows.read, tol, REG_COVAR)
        while state.quiet < QUIET:
            plain = state.next is state.step
            state = state.learned(rows.read, tol, REG_COVAR)
            if state.rejected and plain:
                break
            if len(state.bounds) == MOST_PASSES:
                raise RuntimeError(f"EM did not stand still in {MOST_PASSES} passes")
    return Continued(state.bounds[0], state.bound, len(state.bounds))


def optimum(model: GaussianMixture, rows: np.ndarray) -> float:
    """The log-likelihood a row, nats, at which EM continued from the model stands still."""
    return continued(in_memory(rows), params_of(model)).end
