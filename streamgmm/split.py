"""A mixture that grows by splitting: one component becomes two, where that gains the most.

A component N(mu, Sigma) of weight w splits along its principal axis a (as long as the deviation) into halves of weight
w / 2 at mu + u a and mu - u a with covariance Sigma - u^2 a a^T: weight, mean and covariance of the two together are
those of the one (Zhang et al. 2003). A few EM steps on the two follow, with all others as they are. With r_i the
responsibility of the parent for row i, and w1 + w2 = 1,

    gain = sum_i r_i (log(w1 N1(x_i) + w2 N2(x_i)) - log N(x_i))

is a lower bound of what the log-likelihood of the mixture gains, for log(1 + r (q - 1)) >= r log q. Only rows with some
responsibility are touched, so to try all components costs little more than EM on two.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from streamgmm.covariance import AbstractCovariance
from streamgmm.errors import NumericalError
from streamgmm.kernel import e_step, m_step, prepare, scored_tiles
from streamgmm.params import MixtureParams
from streamgmm.partition import principal_axis
from streamgmm.protocols import Floats, Integers
from streamgmm.sample import Sample, SampleBlock
from streamgmm.stats import Frame, SufficientStats

#: u: how far the halves go, in deviations.
OFFSET = 0.5
#: EM steps on the two children alone, and on all components once two of them are new.
PARTIAL_STEPS = 6
STEPS_BETWEEN = 6
#: Rows of less responsibility say nothing of a component.
LEAST_RESPONSIBILITY = 1e-3


@dataclass(frozen=True, eq=False)
class Part:
    """What a component sees: rows (m, d), and their weights (m,) times its responsibilities."""

    rows: Floats
    weights: Floats
    frame: Frame

    def read(self, params: MixtureParams) -> SufficientStats:
        block = SampleBlock(self.rows, self.weights)
        (stats,) = e_step((prepare(params, self.frame),), block).values
        return stats

    def moments(self) -> tuple[Floats, Floats]:
        """Mean (d,) and covariance (d, d), in z."""
        z = (self.rows - self.frame.shift) * self.frame.scale
        mean = np.average(z, axis=0, weights=self.weights)
        centred = z - mean
        return mean, (centred.T * self.weights) @ centred / self.weights.sum()


@dataclass(frozen=True, eq=False)
class Split:
    """A component in two. children: a mixture of them alone.  gain: nats that all rows together gain at least."""

    component: int
    children: MixtureParams
    gain: float


def grown(sample: Sample, structure: type[AbstractCovariance], k: int, reg_covar: float) -> MixtureParams:
    """A mixture of k components, grown from one. NumericalError where that degenerates or nothing can be split."""
    params = one_component(sample, structure, reg_covar)
    while params.n_components < k:
        splits = [trial for trial in trials(sample, params, reg_covar) if trial is not None]
        if not splits:
            raise NumericalError(f"None of the {params.n_components} components can be split.")
        params = replaced(params, max(splits, key=lambda split: split.gain))
        for _ in range(STEPS_BETWEEN):
            params, _ = m_step(sample.read(params), params, reg_covar)
    params.covariance.root(*params.means.shape)
    return params


def one_component(sample: Sample, structure: type[AbstractCovariance], reg_covar: float) -> MixtureParams:
    """The moments of all rows."""
    mean, covariance = Part(sample.rows, sample.row_weights, sample.frame).moments()
    covariance = covariance + np.diag(reg_covar * sample.frame.scale**2)
    return in_units(np.ones(1), mean[None], covariance[None], structure, sample.frame)


def halves(mean: Floats, covariance: Floats) -> tuple[Floats, Floats]:
    """Means (2, d) and covariances (2, d, d) of equal halves along the principal axis."""
    way = OFFSET * principal_axis(covariance)
    rest = covariance - np.outer(way, way)
    return np.stack([mean - way, mean + way]), np.stack([rest, rest])


def trials(sample: Sample, params: MixtureParams, reg_covar: float) -> list[Split | None]:
    """Each component in two; None where that degenerates."""
    parts = parts_of(sample, params)
    return [attempt(part, params, j, reg_covar) for j, part in enumerate(parts)]


def parts_of(sample: Sample, params: MixtureParams, least: float = LEAST_RESPONSIBILITY) -> list[Part]:
    """The rows of which each component has more than ``least``."""
    found: list[list[tuple[Integers, Floats]]] = [[] for _ in range(params.n_components)]
    block = SampleBlock(sample.rows, sample.weights)
    for tile, resp, _ in scored_tiles(prepare(params, sample.frame), block):
        for share, mine in zip(resp, found, strict=True):
            rows = np.flatnonzero(share > least)
            mass = share[rows] if tile.weights is None else share[rows] * tile.weights[rows]
            mine.append((rows + tile.row, mass))
    return [
        Part(sample.rows[np.concatenate([i for i, _ in mine])], np.concatenate([r for _, r in mine]), sample.frame)
        for mine in found
    ]


def attempt(part: Part, params: MixtureParams, component: int, reg_covar: float) -> Split | None:
    """One component in two, after some EM steps on them; None where they degenerate."""
    if not part.weights.sum() > 0:
        return None
    structure = type(params.covariance)
    mean, covariance = part.moments()
    if not np.trace(covariance) > 0:
        return None
    floor = np.diag(reg_covar * part.frame.scale**2)
    try:
        parent = _alone(params, component)
        if structure.shared:
            parent = in_units(np.ones(1), mean[None], (covariance + floor)[None], structure, part.frame)
        means, covariances = halves(mean, covariance)
        children = in_units(np.full(2, 0.5), means, covariances + floor, structure, part.frame)
        for _ in range(PARTIAL_STEPS):
            children, _ = m_step(part.read(children), children, reg_covar)
        gain = part.read(children).log_likelihood - part.read(parent).log_likelihood
        split = Split(component, children, gain)
        together = replaced(params, split)
        together.covariance.root(*together.means.shape)
    except NumericalError:
        return None
    return split if np.isfinite(gain) else None


def _alone(params: MixtureParams, component: int) -> MixtureParams:
    """A mixture of that component only."""
    alone = params.reordered(np.array([component]))
    return MixtureParams(np.ones(1), alone.means, alone.covariance)


def replaced(params: MixtureParams, split: Split) -> MixtureParams:
    """The mixture with two children in the place of their parent."""
    j, children = split.component, split.children
    weights = _with_two(params.weights, j, params.weights[j] * children.weights)
    means = _with_two(params.means, j, children.means)
    covariance = params.covariance
    if not covariance.shared:
        covariance = type(covariance)(_with_two(covariance.values, j, children.covariance.values))
    return MixtureParams(weights, means, covariance)


def _with_two(values: Floats, j: int, two: Floats) -> Floats:
    return np.concatenate([values[:j], two, values[j + 1 :]])


def in_units(
    weights: Floats, means: Floats, covariances: Floats, structure: type[AbstractCovariance], frame: Frame
) -> MixtureParams:
    """From means (k, d) and covariances (k, d, d) in z to the data's units."""
    covariance = structure.from_dense(covariances, weights).scaled(1.0 / frame.scale)
    return MixtureParams(weights, frame.shift + means / frame.scale, covariance)
