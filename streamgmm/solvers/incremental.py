"""Incremental EM (Neal & Hinton 1998; memoised EM, Hughes & Sudderth 2013): the statistics of every block are kept.

A visit of some blocks takes back what they left behind the last time and learns from the rest of the pass's parameters:

    S <- S - S_b(old) + S_b(theta),    theta <- M(S).

No visit lowers the free energy F = sum_b H_b + Q(S; theta), so blocks may come in any order, of any content. It is a
lower bound of the log-likelihood at theta, and what stops the passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from streamgmm.errors import NumericalError
from streamgmm.free_energy import ExpectedLogJoint, expected_log_joint
from streamgmm.history import PassRecord
from streamgmm.kernel import m_step
from streamgmm.params import MixtureParams
from streamgmm.protocols import Caches, Floats, Integers
from streamgmm.solvers.em import FitResult
from streamgmm.stats import SufficientStats
from streamgmm.streams import Purpose, stream

#: M-steps of a pass, at most. A group of blocks shares one, so that the blocks of a large source run side by side.
MOST_STEPS = 40

#: One read of some blocks: the statistics of each of them, in their order.
ReadBlocks = Callable[[MixtureParams, Sequence[int]], Sequence[SufficientStats]]

BlockCaches = Caches[SufficientStats]


def group_size(n_blocks: int) -> int:
    """Blocks that share an M-step: a function of their number alone, for the result depends on it."""
    return -(-n_blocks // MOST_STEPS)


def groups(order: Integers) -> Iterator[list[int]]:
    """The blocks of a pass, group by group; those of a group as they lie in the source."""
    size = group_size(len(order))
    for start in range(0, len(order), size):
        yield sorted(order[start : start + size].tolist())


@dataclass(frozen=True, eq=False)
class Memory:
    """What is known after a visit, beside the caches.

    params: the M-step of ``total``, the sum of the caches.  entropies: (n_blocks,) H_b, nats.  starved: components that
    kept their mean and covariance.
    """

    params: MixtureParams
    total: SufficientStats
    entropies: Floats
    starved: tuple[int, ...] = ()

    @property
    def free_energy(self) -> float:
        """F a row, nats: at most the mean log-likelihood at ``params``."""
        return (float(self.entropies.sum()) + expected_log_joint(self.total, self.params)) / self.total.weight

    def maximised(self, reg_covar: float) -> Memory:
        """After an M-step."""
        moments = self.total.moments.copy()
        moments[:, 0] = np.maximum(moments[:, 0], 0.0)  # what is left of a mass taken back may be rounding below zero
        total = replace(self.total, moments=moments)
        params, report = m_step(total, self.params, reg_covar)
        return Memory(params, total, self.entropies, report.starved)

    def visited(self, read: ReadBlocks, caches: BlockCaches, blocks: Sequence[int], reg_covar: float) -> Memory:
        """After the blocks were learned anew at ``params``, and an M-step. Their caches are replaced.

        Statistics of different visits meet about the present means, so that nothing large cancels.
        """
        params, scale = self.params, self.total.scale
        expected = ExpectedLogJoint.of(params, scale)
        total, entropies = self.total.about(params.means, scale), self.entropies.copy()
        for block, stats in zip(blocks, read(params, blocks), strict=True):
            new = stats.about(params.means, scale)
            total = total - caches[block].about(params.means, scale) + new
            entropies[block] = expected.entropy(new)
            caches[block] = new
        return Memory(params, total, entropies).maximised(reg_covar)

    def refreshed(self, caches: BlockCaches) -> Memory:
        """With the total summed anew, without the rounding of what was taken back."""
        return replace(self, total=total_of(caches, self.params.means, self.total.scale))


def total_of(caches: BlockCaches | Sequence[SufficientStats], origin: Floats, scale: Floats) -> SufficientStats:
    """The sum of the caches, about ``origin`` (k, d)."""
    total = caches[0].about(origin, scale)
    for block in range(1, len(caches)):
        total = total + caches[block].about(origin, scale)
    return total


def memorised(read: ReadBlocks, caches: BlockCaches, params: MixtureParams, reg_covar: float) -> Memory:
    """After the first pass, which fills the caches at one set of parameters, and an M-step.

    With an M-step after each of its groups, components would collapse where rows are sorted.
    """
    entropies = np.empty(len(caches))
    expected: ExpectedLogJoint | None = None
    total: SufficientStats | None = None
    for blocks in groups(np.arange(len(caches))):
        for block, stats in zip(blocks, read(params, blocks), strict=True):
            new = stats.about(params.means, stats.scale)
            expected = expected or ExpectedLogJoint.of(params, new.scale)
            total = new if total is None else total + new
            entropies[block] = expected.entropy(new)
            caches[block] = new
    assert total is not None
    return Memory(params, total, entropies).maximised(reg_covar)


def one_pass(memory: Memory, read: ReadBlocks, caches: BlockCaches, order: Integers, reg_covar: float) -> Memory:
    """After a visit of every block, group by group in the order of ``order``."""
    for blocks in groups(order):
        memory = memory.visited(read, caches, blocks, reg_covar)
    return memory.refreshed(caches)


def incremental(
    read: ReadBlocks,
    starts: Sequence[MixtureParams],
    *,
    make_caches: Callable[[], BlockCaches],
    seed: int,
    tol: float,
    max_iter: int,
    reg_covar: float,
    report: Callable[[PassRecord], None],
) -> FitResult:
    """Incremental EM from every start until F rises by less than ``tol`` a row over a pass, or after ``max_iter``.

    Starts run one after the other, each with caches of its own; the one with the highest F is kept. F never falls, but
    where ``reg_covar`` moves an M-step away from its maximum. One whose covariance degenerates is given up;
    NumericalError is raised only where none is left. lower_bounds of the result: F after each pass, of the parameters
    after it; at most their mean log-likelihood.
    """
    best: FitResult | None = None
    failure: NumericalError | None = None
    n_passes = 0
    for restart, params in enumerate(starts):
        run = _Run(read, make_caches(), params, restart, seed, reg_covar)
        try:
            found = run.result(tol, max_iter, report)
        except NumericalError as error:
            failure = failure or error
            n_passes += 1
        else:
            best = found if best is None or found.lower_bound > best.lower_bound else best
        n_passes += len(run.bounds)
    if best is None:
        raise failure or ValueError("no start was given")
    return replace(best, n_passes=n_passes)


class _Run:
    """One start on its way."""

    def __init__(
        self, read: ReadBlocks, caches: BlockCaches, params: MixtureParams, restart: int, seed: int, reg_covar: float
    ) -> None:
        self.read, self.caches, self.params = read, caches, params
        self.restart, self.seed, self.reg_covar = restart, seed, reg_covar
        self.bounds: list[float] = []

    def result(self, tol: float, max_iter: int, report: Callable[[PassRecord], None]) -> FitResult:
        """The passes, and where they led."""
        memory, converged = None, False
        while len(self.bounds) < max_iter and not converged:
            memory = self._next(memory)
            change = memory.free_energy - (self.bounds[-1] if self.bounds else -np.inf)
            converged = abs(change) < tol
            self.bounds.append(memory.free_energy)
            report(PassRecord(len(self.bounds), self.restart, self.bounds[-1], change, converged, "free energy"))
        n_passes = len(self.bounds)
        if memory is None:
            return FitResult(self.params, (), False, n_passes, ())
        return FitResult(
            memory.params, tuple(self.bounds), converged, n_passes, memory.starved, memory.total, self.caches
        )

    def _next(self, memory: Memory | None) -> Memory:
        if memory is None:
            return memorised(self.read, self.caches, self.params, self.reg_covar)
        order = stream(self.seed, Purpose.BLOCK_ORDER, len(self.bounds)).permutation(len(self.caches))
        return one_pass(memory, self.read, self.caches, order, self.reg_covar)
