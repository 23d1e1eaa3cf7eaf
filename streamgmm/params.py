"""The parameters of a Gaussian mixture, as one frozen value."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from streamgmm.covariance import AbstractCovariance
from streamgmm.linalg import frozen, power_of_two
from streamgmm.protocols import Floats, Integers
from streamgmm.stats import Frame

#: Weights are put in order in units of one over this, a number that makes no common fraction a tie of two units.
COARSE_WEIGHTS = 1e6 * np.pi


@dataclass(frozen=True, eq=False)
class MixtureParams:
    """weights (k,), means (k, d) and covariances of a mixture, in the data's units."""

    weights: Floats
    means: Floats
    covariance: AbstractCovariance

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", frozen(self.weights))
        object.__setattr__(self, "means", frozen(self.means))

    @property
    def n_components(self) -> int:
        return self.means.shape[0]

    @property
    def n_features(self) -> int:
        return self.means.shape[1]

    @property
    def n_parameters(self) -> int:
        """Free parameters: covariances, means, and weights that sum to one."""
        k, d = self.means.shape
        return self.covariance.n_parameters(k, d) + k * d + k - 1

    def canonical(self) -> MixtureParams:
        """Components by falling weight, then by mean: the order in which a start that we choose is kept."""
        return self.reordered(self.canonical_order())

    def canonical_order(self) -> Integers:
        """(k,) numbers of the components in canonical order. Weights that differ in rounding only are alike."""
        coarse = np.round(self.weights * COARSE_WEIGHTS)
        return np.lexsort((*self.means.T[::-1], -coarse))

    def reordered(self, order: Integers) -> MixtureParams:
        """Components ``order``, the numbers they have now."""
        shared = self.covariance.shared
        covariance = self.covariance if shared else type(self.covariance)(self.covariance.values[order])
        return MixtureParams(self.weights[order], self.means[order], covariance)

    def draw(self, n: int, rng: np.random.Generator) -> tuple[Floats, Integers]:
        """n rows (n, d) drawn from the mixture, component by component, and their components (n,)."""
        k, d = self.means.shape
        labels = np.repeat(np.arange(k), rng.multinomial(n, self.weights / self.weights.sum()))
        rows = rng.standard_normal((n, d))
        for j, factor in enumerate(np.linalg.cholesky(self.covariance.dense(k, d))):
            rows[labels == j] = self.means[j] + rows[labels == j] @ factor.T
        return rows, labels

    def frame(self) -> Frame:
        """Coordinates about the mixture's own mean, scaled by powers of two near its deviations."""
        k, d = self.means.shape
        mean = self.weights @ self.means
        spread = self.covariance.variances(k, d) + (self.means - mean) ** 2
        variances = self.weights @ spread
        if self.covariance.isotropic:
            variances = np.full(d, variances.max())
        return Frame(mean, power_of_two(np.sqrt(variances)))
